"""`delta_directions`: the directions of the residual stream that fine-tuning writes to, block by block.

The left singular vectors of the deltas of a block's attention output projection and MLP down projection span what
fine-tuning made the block add to the residual stream. The monitor watches their cosines with the residual stream after
that block (Watch the Weights, arXiv 2508.00161).
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bkdfast.svd.artifact import read_artifact, versions, write_artifact
from bkdfast.svd.delta import warn_unconverged
from bkdfast.svd.lora import AdapterSource, open_pair
from bkdfast.svd.names import match_names, weights_hash
from bkdfast.svd.plan import check_shapes, refuse_quantised
from bkdfast.svd.result import TensorDelta
from bkdfast.svd.rule import Rule
from bkdfast.svd.settings import Settings, Weights
from bkdfast.svd.source import FolderSource, ModuleSource, WeightSource

if TYPE_CHECKING:
    from bkdfast.hf.spec import ModelSpec

_KIND = "directions"
_COMPONENTS = ("out_proj", "down_proj")


@dataclass(frozen=True, eq=False, repr=False)
class Directions:
    """Unit vectors of the residual stream, K for each of L blocks; what a monitor watches.

    Attributes:
        vectors: `[L, K, D]` float32; unit rows, in each component by descending strength; rows of zeros where a delta
            has fewer than `rank` triplets.
        strength: `[L, K]` float32 singular values, 0 for the empty rows.
        component: for each of the K rows, the projection that it comes from (`"out_proj"` or `"down_proj"`).
        rank: rows per component; K = rank * number of components.
        metadata: `family`; `weights`, the tensors used, in block order; `tuned_hash`, which
            `weights_hash(model, metadata["weights"])` reproduces for the tuned model; settings, seed, versions.
    """

    vectors: Tensor
    strength: Tensor
    component: tuple[str, ...]
    rank: int
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        vectors, strength = self.vectors, self.strength
        if vectors.dim() != 3 or vectors.dtype != torch.float32:
            raise InvalidArgumentError(
                f"vectors must be float32 [L, K, D], found {vectors.dtype} {tuple(vectors.shape)}"
            )
        if strength.shape != vectors.shape[:2] or len(self.component) != vectors.shape[1]:
            raise InvalidArgumentError(
                f"vectors {tuple(vectors.shape)} need a strength of {tuple(vectors.shape[:2])} and {vectors.shape[1]} "
                f"component names, found {tuple(strength.shape)} and {len(self.component)}"
            )
        if self.rank < 1 or self.rank * len(set(self.component)) != len(self.component):
            raise InvalidArgumentError(
                f"rank {self.rank} does not fit {len(self.component)} rows of {set(self.component)}"
            )
        if not (torch.isfinite(vectors).all() and torch.isfinite(strength).all()):
            raise InvalidArgumentError("directions have NaN or infinity")
        norms = torch.linalg.vector_norm(vectors.double(), dim=-1)
        expected = (strength > 0).double()
        if (strength < 0).any() or ((norms - expected).abs() > 1e-4).any():
            raise InvalidArgumentError(
                "each direction must be a unit vector of positive strength, or zeros of strength 0"
            )

    def __repr__(self) -> str:
        layers, rows, width = self.vectors.shape
        parts = [
            f"{self.metadata.get('family', 'unknown family')}: {layers} blocks x {rows} directions of width {width}"
        ]
        parts.append(f"{self.rank} each of {', '.join(dict.fromkeys(self.component))}")
        if self.strength.numel():
            layer, row = divmod(int(self.strength.argmax()), rows)
            parts.append(f"strongest {float(self.strength[layer, row]):.3g} in block {layer} {self.component[row]}")
        if empty := int((self.strength == 0).sum()):
            parts.append(f"{empty} empty")
        if "tuned_hash" in self.metadata:
            parts.append(f"for weights {self.metadata['tuned_hash'][:12]}")
        return f"Directions({'; '.join(parts)})"

    def to(self, device: str | torch.device) -> Directions:
        """The same directions on another device."""
        return replace(self, vectors=self.vectors.to(device), strength=self.strength.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file with JSON metadata, whole or not at all.

        Raises:
            CheckpointError: the folder does not exist.
            OSError: the file cannot be written.
        """
        metadata = {"component": list(self.component), "rank": self.rank, "metadata": self.metadata}
        write_artifact(path, _KIND, {"vectors": self.vectors, "strength": self.strength}, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Directions:
        """Read what `save` wrote; shapes, finiteness and unit norms are checked.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """
        tensors, metadata = read_artifact(path, _KIND)
        try:
            component = tuple(metadata["component"])
            return cls(tensors["vectors"], tensors["strength"], component, metadata["rank"], metadata["metadata"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path} lacks {error}; it is not a complete {_KIND} file") from error
        except InvalidArgumentError as error:
            raise CheckpointError(f"{path}: {error}") from error


def delta_directions(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    *,
    rank: int = 20,
    components: Sequence[str] = _COMPONENTS,
    spec: ModelSpec | None = None,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    seed: int = 0,
    device: str | torch.device | None = None,
    backend: str | None = None,
    progress: bool = True,
) -> Directions:
    """Monitor directions: the residual-stream side of the leading singular vectors of each block's projections' deltas.

    Args:
        base: the model before fine-tuning: an `nn.Module`, or a local folder of safetensors files and `config.json`.
        tuned: the model after it, in either form, or a LoRA adapter of it (as in `delta_svd`).
        rank: directions per block and component; 20 is the published default.
        components: of each block, `"out_proj"` (attention output projection) and `"down_proj"` (MLP down projection).
            A block without a single down projection (mixture of experts) has empty rows there, with a warning.
        spec: where the projections are, for a model that `bkdfast.hf.describe` does not know.
        tolerance: as in `delta_svd`.
        max_passes: as in `delta_svd`.
        seed: as in `delta_svd`.
        device: as in `delta_svd`.
        backend: of `delta_sketch`.
        progress: show a progress bar on stderr.

    Returns:
        `Directions` with vectors `[L, K, D]`, K = rank * components, on the CPU.

    Raises:
        CheckpointError: a side cannot be read, is quantised, lacks a projection, or shapes differ.
        InvalidArgumentError: an option is out of range, or base and tuned are identical in these projections.
        NonFiniteError: a delta has NaN or infinity; the message names the tensor.
        UnsupportedModelError: the architecture is not known; pass `spec=`.

    Example:
        >>> from bkdfast.demo import PAIR
        >>> directions = delta_directions(PAIR / "base", PAIR / "tuned", rank=4, progress=False)
        >>> directions.vectors.shape, directions.component[::4]
        (torch.Size([6, 8, 128]), ('out_proj', 'down_proj'))
        >>> directions.save("directions.safetensors")  # doctest: +SKIP

    Source: Watch the Weights, arXiv 2508.00161.
    """
    settings = Settings(Rule(rank), tolerance, max_passes, seed, device, backend)
    components = _check_components(components)
    base_source, tuned_source = open_pair(base, tuned)
    refuse_quantised(base_source, tuned_source)
    spec = _describe(base_source, tuned_source, spec)
    components = _present(spec, components)
    weights = [
        (layer, i, f"{path}.weight")
        for layer, block in enumerate(spec.blocks)
        for i, component in enumerate(components)
        if (path := getattr(block, component)) is not None
    ]
    names = [name for _, _, name in weights]
    base_names, tuned_names = _locate(base_source, names), _locate(tuned_source, names)
    _check_depth(base_source, base_names, tuned_source)
    vectors = torch.zeros(spec.layers, len(components) * rank, spec.width)
    strength = torch.zeros(spec.layers, len(components) * rank)
    deltas: dict[str, TensorDelta] = {}
    for layer, i, name in tqdm(weights, "directions", unit="tensor", file=sys.stderr, disable=not progress):
        first = tuned_source.canonical(tuned_names[name])  # blocks that share their weights are decomposed once
        if first not in deltas:
            check_shapes(name, base_source.shape(base_names[name]), tuned_source.shape(tuned_names[name]))
            delta = None
            if isinstance(tuned_source, AdapterSource):
                delta = tuned_source.factor(tuned_names[name], base_names[name], settings, transpose=spec.transposed)
            if delta is None:
                w0, w1 = base_source.get(base_names[name]), tuned_source.get(tuned_names[name])
                _check_projection(name, w1, spec)
                delta = settings.factor(Weights(name, w0.T, w1.T) if spec.transposed else Weights(name, w0, w1))
            deltas[first] = delta
        delta = deltas[first]
        rows = slice(i * rank, i * rank + delta.rank)
        u = delta.u.double()
        vectors[layer, rows] = (u / torch.linalg.vector_norm(u, dim=0)).T.float()
        strength[layer, rows] = delta.s.float()
    if not (strength > 0).any():
        raise InvalidArgumentError(
            f"base and tuned are identical in {' and '.join(components)} of all {spec.layers} blocks, so there are no "
            "directions; are both the same checkpoint, or does the adapter leave them as they are?"
        )
    warn_unconverged(deltas.values(), tolerance)
    metadata = {
        "family": spec.family,
        "weights": names,
        "tuned_hash": weights_hash(tuned_source, names),
        "unconverged": [delta.name for delta in deltas.values() if not delta.converged],
        "tolerance": tolerance,
        "max_passes": max_passes,
        "seed": seed,
        "versions": versions(),
    }
    component = tuple(name for name in components for _ in range(rank))
    return Directions(vectors, strength, component, rank, metadata)


def _check_components(components: Sequence[str]) -> tuple[str, ...]:
    if isinstance(components, str):
        raise InvalidTypeError(f"components must be a sequence of names, found the string {components!r}")
    components = tuple(components)
    if not components or len(set(components)) != len(components) or not set(components) <= set(_COMPONENTS):
        raise InvalidArgumentError(f"components must be one or both of {_COMPONENTS}, found {components}")
    return components


def _describe(base: WeightSource, tuned: WeightSource, spec: ModelSpec | None) -> ModelSpec:
    from bkdfast.hf import describe

    for source in (tuned, base):
        if isinstance(source, ModuleSource):
            return describe(source.model, spec)
    if spec is not None:
        return spec
    config = tuned.config if tuned.config is not None else base.config
    if config is None:
        raise CheckpointError(f"{tuned.label} has no config.json, which says what model it is; add it, or pass spec=")
    return describe(empty_model(config, tuned))


def empty_model(config: Any, source: WeightSource) -> nn.Module:
    """The model of a config without weights: its structure is all that is needed."""
    import transformers

    named = [getattr(transformers, name, None) for name in config.architectures or ()]
    cls = next((cls for cls in named if cls is not None), None)
    try:
        with torch.device("meta"):
            return cls(config) if cls is not None else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, ImportError) as error:
        raise CheckpointError(f"transformers cannot build the model of {source.label}: {error}; pass spec=") from error


def _present(spec: ModelSpec, components: tuple[str, ...]) -> tuple[str, ...]:
    """The components that at least one block has; a warning where one is missing."""
    missing = {
        component: [layer for layer, block in enumerate(spec.blocks) if getattr(block, component) is None]
        for component in components
    }
    present = tuple(component for component in components if len(missing[component]) < spec.layers)
    if not present:
        raise InvalidArgumentError(f"no block of family {spec.family!r} has a single {components[0]}; use 'out_proj'")
    for component, layers in missing.items():
        if layers:
            where = "no block" if len(layers) == spec.layers else f"blocks {layers} do not"
            verb = "has" if len(layers) == spec.layers else "have"
            warnings.warn(
                f"{where} {verb} a single {component} (mixture of experts); what fine-tuning changed in the experts is "
                "not covered by these directions",
                stacklevel=3,
            )
    return present


def _locate(source: WeightSource, names: list[str]) -> dict[str, str]:
    found = match_names(names, source.names)
    if missing := [name for name in names if name not in found]:
        some = ", ".join(source.names[:3])
        kind = "folder" if isinstance(source, FolderSource) else "model"
        raise CheckpointError(
            f"the {kind} {source.label} has no tensor {missing[0]!r}; it has {some}, ...; is it the same kind of "
            "model, or does it need a spec="
        )
    return found


def _check_depth(base: WeightSource, matched: dict[str, str], tuned: WeightSource) -> None:
    """Refuse a base with more blocks: the fine-tune of another model would be compared block by block."""
    numbers = re.compile(r"\d+")
    forms = {numbers.sub("#", name) for name in matched.values()}
    more = [name for name in base.names if numbers.sub("#", name) in forms and name not in matched.values()]
    if more and len(match_names(more, tuned.names)) < len(more):
        raise CheckpointError(
            f"{base.label} has blocks that {tuned.label} lacks, e.g. {more[-1]}; is it the model that was tuned?"
        )


def _check_projection(name: str, weight: Tensor, spec: ModelSpec) -> None:
    if weight.dim() != 2 or not weight.is_floating_point():
        raise CheckpointError(
            f"{name} is {weight.dtype} {tuple(weight.shape)}, not a floating-point matrix; dequantise the model first"
        )
    outputs = weight.shape[1 if spec.transposed else 0]
    if outputs != spec.width:
        raise InvalidArgumentError(
            f"{name} {tuple(weight.shape)} writes {outputs} values, but the residual stream of family {spec.family!r} "
            f"has {spec.width}; check width= and transposed= of the spec"
        )
