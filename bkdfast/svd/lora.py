"""Singular triplets of a LoRA adapter's delta, from its factors: nothing is merged and no base weight is read.

The delta of a weight is L R with L [m, r] and R [r, n] (`scaling * B A`, several adapters side by side). With the QR
decompositions L = Q1 R1 and R^T = Q2 R2 in float64, the SVD of the small R1 R2^T [r, r] gives that of L R, all of its
nonzero singular values included; the [m, n] delta is never formed.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bkdfast.errors import CheckpointError, NonFiniteError
from bkdfast.svd.adapter import Adapter, Part, base_of, check_layer, find_adapter, has_adapter
from bkdfast.svd.certificate import angles
from bkdfast.svd.krylov import FLOOR, finish, known_limits
from bkdfast.svd.names import match_names, tensor_digest
from bkdfast.svd.numerics import svd, threads
from bkdfast.svd.result import TensorDelta
from bkdfast.svd.rule import Rule
from bkdfast.svd.source import ModuleSource, WeightSource, open_source

if TYPE_CHECKING:
    from bkdfast.svd.settings import Settings

_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


class LowRank(NamedTuple):
    """A delta `left @ right`: `[m, r]` and `[r, n]`, float64, on the CPU."""

    left: Tensor
    right: Tensor


def open_pair(
    base: nn.Module | str | os.PathLike[str] | WeightSource, tuned: nn.Module | str | os.PathLike[str] | WeightSource
) -> tuple[WeightSource, WeightSource]:
    """Sources of both sides; that of the tuned side is an `AdapterSource` where it is a LoRA adapter.

    Raises:
        CheckpointError: as `open_source` and `find_adapter`; also an adapter that does not fit the base.
        InvalidTypeError: an argument is neither a module nor a path.
    """
    adapter = find_adapter(tuned)
    if adapter is None:
        return open_source(base), open_source(tuned)
    if isinstance(base, nn.Module) and has_adapter(base):
        source: WeightSource = WrappedSource(base)
    else:
        source = open_source(base)
    return source, AdapterSource(source, adapter)


class WrappedSource(ModuleSource):
    """The base weights inside a module that PEFT put an adapter into, under the names that they had before."""

    def __init__(self, model: nn.Module) -> None:
        inner = base_of(getattr(model, "_orig_mod", model))
        layers = {name: layer for name, layer in inner.named_modules() if hasattr(layer, "adapter_layer_names")}
        for name, layer in layers.items():
            check_layer(layer, name, type(inner).__name__)
        super().__init__(inner)
        plain: dict[str, Tensor] = {}
        for name, tensor in self._tensors.items():
            owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
            if owner is None:
                plain[name] = tensor
            elif (kind := name[len(owner) + 1 :].split(".", 1))[0] in ("base_layer", "original_module"):
                plain[f"{owner}.{kind[1]}"] = tensor
        first: dict[int, str] = {}
        self._tensors, self.names = plain, tuple(plain)
        self._canonical = {name: first.setdefault(id(value), name) for name, value in plain.items()}


class AdapterSource:
    """The tuned model that base and adapter make, as a `WeightSource` with the base's names.

    `factor` gives exact triplets without reading a base weight; `get` merges one weight as PEFT does. LoRAs of two
    modules that share one weight add up, as they do when they are merged; but one and the same LoRA of both (PEFT's
    `ensure_weight_tying`) counts once, as it does in the unmerged model, although merging adds it twice.

    Raises:
        CheckpointError: the adapter does not fit the base.
    """

    def __init__(self, base: WeightSource, adapter: Adapter) -> None:
        self.base, self.adapter, self.label = base, adapter, adapter.label
        self._layout: nn.Module | None = None
        self._parts: dict[str, list[tuple[Part, bool]]] = {}
        wanted = dict.fromkeys([*(f"{part.module}.weight" for part in adapter.parts), *adapter.copies])
        self._names = match_names(wanted, base.names)
        for part in adapter.parts:
            name = self._locate(f"{part.module}.weight")
            self._parts.setdefault(base.canonical(name), []).append((part, self._transposed(part, name)))
        self._full = dict(adapter.full)
        for name, own in match_names(adapter.full, base.names).items():
            self._full[own] = self._full.pop(name)
        for name, copy in adapter.copies.items():
            own = self._locate(name)
            if copy.shape != base.shape(own) or not torch.equal(copy.read(), base.get(own).to(copy.dtype)):
                raise CheckpointError(
                    f"{self.label} has its own copy of {name}, which is not that of {base.label} (was the vocabulary "
                    "resized?); merge it (PeftModel.merge_and_unload) and pass the merged model"
                )
        if clash := [name for name in self._full if name in self._parts]:
            raise CheckpointError(f"{self.label} has both a LoRA and a full weight of {clash[0]}; merge it first")
        self.names = (*base.names, *(name for name in self._full if name not in base.names))

    def _locate(self, name: str) -> str:
        """The base's name of an adapted weight; of a tied one that no file stores, the embedding's."""
        if name in self._names:
            return self._names[name]
        if self._is_tied() and name.endswith(("lm_head.weight", "embed_out.weight")):
            stored = [own for own in self.base.names if f".{own}".endswith(tuple(f".{e}" for e in _EMBEDDINGS))]
            if len(stored) == 1:
                return stored[0]
        raise CheckpointError(
            f"{self.label} adapts {name}, which {self.base.label} lacks; it has {', '.join(self.base.names[:3])}, ...; "
            "use the model that the adapter was trained on"
        )

    def _transposed(self, part: Part, name: str) -> bool:
        shape, size = self.base.shape(name), part.size
        fits = [flag for flag in (False, True) if shape == (size[::-1] if flag else size)]
        if part.transposed is not None:
            fits = [flag for flag in fits if flag == part.transposed]
        if not fits:
            raise CheckpointError(
                f"{self.label}: the LoRA of {part.module} maps {size[1]} inputs to {size[0]} outputs, but {name} of "
                f"{self.base.label} is {shape}; use the model that the adapter was trained on, not quantised"
            )
        return fits[0] if len(fits) == 1 else self._is_conv1d(part, name)

    def _is_conv1d(self, part: Part, name: str) -> bool:
        """Of a square weight, only the class of its module says how it is stored."""
        if isinstance(self.base, ModuleSource):
            self._layout = self.base.model
        elif self._layout is None and self.base.config is not None:
            from bkdfast.svd.directions import empty_model

            self._layout = empty_model(self.base.config, self.base)
        if self._layout is None:
            return part.hint
        modules = {f"{path}.weight": module for path, module in self._layout.named_modules()}
        found = match_names([name], modules)
        if not found:
            return part.hint
        module = modules[found[name]]
        return type(getattr(module, "base_layer", module)).__name__ == "Conv1D"

    @property
    def config(self) -> Any:
        """The adapted model's config, or the base's where the adapter is in a folder."""
        return getattr(self.adapter.model, "config", None) or self.base.config

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight."""
        return self._full[name].shape if name in self._full else self.base.shape(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Dtype of a weight."""
        return self._full[name].dtype if name in self._full else self.base.dtype(name)

    def canonical(self, name: str) -> str:
        """The first name of the same storage; a weight that the adapter replaces is no longer tied."""
        return name if name in self._full else self.base.canonical(name)

    def nbytes(self, name: str) -> int:
        """Size of a weight in bytes, as if it were merged."""
        if name not in self._full:
            return self.base.nbytes(name)
        full = self._full[name]
        return math.prod(full.shape) * (full.dtype.itemsize if full.dtype is not None else 1)

    def stamp(self, name: str) -> bytes:
        """Nothing: the factors may be in memory."""
        return b""

    def quantised(self) -> str:
        """How the base's weights are quantised, in words; empty where they are not."""
        return self.base.quantised()

    def get(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """One weight of the merged model, or rows of it, merged in PEFT's order of operations and dtypes.

        Another device, or another library than PEFT, may round the last bits differently.
        """
        if name in self._full:
            return self._full[name].read()[start:stop]
        if self.base.canonical(name) not in self._parts:
            return self.base.get(name, start, stop)
        weight = self.base.get(name)
        for part, transposed in self._distinct(name):
            a, b = part.read()
            half = a.dtype in (torch.float16, torch.bfloat16) and a.device.type == "cpu"
            product = b.float() @ a.float() if half else b @ a
            delta = (product.T if transposed else product) * part.scaling
            weight = weight + delta.to(a.dtype).to(weight.device, weight.dtype)
        return weight[start:stop]

    def factors(self, name: str) -> bool:
        """`factor` has the weight's delta: the adapter does not replace the weight as a whole."""
        return name not in self._full

    def delta(self, name: str) -> LowRank | None:
        """The delta of a weight as a product; None where the adapter has no LoRA of it."""
        if name in self._full or not (found := self._distinct(name)):
            return None
        products = [_product(part, transposed) for part, transposed in found]
        return LowRank(torch.cat([left for left, _ in products], 1), torch.cat([right for _, right in products], 0))

    def _distinct(self, name: str) -> list[tuple[Part, bool]]:
        """The LoRAs of a weight; one that several modules have in common, once."""
        found = self._parts.get(self.base.canonical(name), [])
        if len({part.module for part, _ in found}) < 2:
            return found
        distinct: list[tuple[Part, bool]] = []
        seen: list[tuple[str, LowRank]] = []
        for part, transposed in found:
            left, right = _product(part, transposed)
            if any(
                part.module != module and torch.equal(left, other.left) and torch.equal(right, other.right)
                for module, other in seen
            ):
                continue
            distinct.append((part, transposed))
            seen.append((part.module, LowRank(left, right)))
        return distinct

    def _is_shared(self, name: str) -> bool:
        """Whether the base uses this weight under several names."""
        if any(self.base.canonical(own) == self.base.canonical(name) for own in self.base.names if own != name):
            return True
        return self._is_tied() and f".{name}".endswith(tuple(f".{end}" for end in _EMBEDDINGS))

    def _is_tied(self) -> bool:
        config = self.base.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        return bool(getattr(text, "tie_word_embeddings", False))

    def digests(self, name: str) -> tuple[bytes, bytes]:
        """Of the base's weight, which is not read, nothing; and of the factors (of none, nothing)."""
        product = self.delta(name)
        return b"", b"" if product is None else tensor_digest(product.left) + tensor_digest(product.right)

    def factor(self, name: str, base_name: str, settings: Settings, *, transpose: bool = False) -> TensorDelta | None:
        """The `TensorDelta` of one weight, exact but for rounding; None for one that the adapter replaces as a whole.

        Args:
            name: the weight, a name of the base.
            base_name: its name in the base.
            settings: the rule counts; the rest has no use here.
            transpose: decompose the transposed weight.

        Raises:
            NonFiniteError: a factor has NaN or infinity.
        """
        if name in self._full:
            return None
        product = self.delta(name)
        m, n = self.base.shape(base_name)
        dtype = torch.float64 if self.base.dtype(base_name) == torch.float64 else torch.float32
        if product is None:
            product = LowRank(torch.zeros(m, 0, dtype=torch.float64), torch.zeros(0, n, dtype=torch.float64))
        if transpose:
            product = LowRank(product.right.T, product.left.T)
        notes = [f"LoRA of rank {product.left.shape[1]}"] if product.left.shape[1] else []
        if notes and (modules := dict.fromkeys(part.module for part, _ in self._distinct(name))):
            if len(modules) > 1:
                notes.append(f"the LoRAs of {' and '.join(modules)}, which share this weight, added as by merging")
            elif self._is_shared(name) and len({part.module for part, _ in self._parts[self.base.canonical(name)]}) < 2:
                notes.append(f"of {next(iter(modules))} only; once merged it changes all that share this weight")
        return factor_product(name, product, settings.rule, dtype, notes)


def _product(part: Part, transposed: bool) -> LowRank:
    a, b = (factor.to("cpu", torch.float64) for factor in part.read())
    return LowRank(a.T * part.scaling, b.T) if transposed else LowRank(b * part.scaling, a)


def factor_product(
    name: str, product: LowRank, rule: Rule, dtype: torch.dtype = torch.float32, notes: list[str] | None = None
) -> TensorDelta:
    """Leading singular triplets of `left @ right`, exact but for float64 rounding, without forming the product.

    Args:
        name: of the weight.
        product: `[m, r]` and `[r, n]`.
        rule: how many triplets; a fixed rank is clipped to the product's numerical rank, with a note.
        dtype: of u and v.
        notes: what the result's note begins with.

    Returns:
        `TensorDelta` with `passes=0`; all nonzero singular values are known, so that its bounds need no probability
        and `frobenius` is exact. `changed` is the number of entries that can differ: nonzero rows of L times nonzero
        columns of R, since the entries are not formed.

    Raises:
        NonFiniteError: a factor has NaN or infinity, or the product overflows.
    """
    left, right = product
    notes = list(notes or [])
    if not (bool(torch.isfinite(left).all()) and bool(torch.isfinite(right).all())):
        raise NonFiniteError(f"{name} has NaN or infinity in its LoRA factors; repair or retrain the adapter")
    m, n = left.shape[0], right.shape[1]
    with threads(1), torch.no_grad():
        q1, r1 = torch.linalg.qr(left)  # [m, r], [r, r]
        q2, r2 = torch.linalg.qr(right.T)  # [n, r], [r, r]
        u, s, v = svd(r1 @ r2.T)
        norms = float(torch.linalg.matrix_norm(r1) * torch.linalg.matrix_norm(r2)) if len(s) else 0.0
        floor = 8 * torch.finfo(torch.float64).eps * norms
        real = int((s > floor).sum())
        frobenius = float(torch.linalg.vector_norm(s)) if real else 0.0
        k, capped = rule.choose(s[:real], frobenius, real)
        if rule.rank is not None and rule.limit > real > 0:
            notes.append(f"rank clipped to {real}, that of the LoRA")
        if capped:
            notes.append(capped)
        u, v = q1 @ u[:, :k], q2 @ v[:, :k]
        residual = torch.linalg.vector_norm(right.T @ (left.T @ u) - s[:k] * v, dim=0)
    rows, columns = int((left != 0).any(1).sum()), int((right != 0).any(0).sum())
    rounding = floor + FLOOR * torch.finfo(dtype).eps * frobenius  # of the returned u and v
    limits = known_limits(s) if real else s.new_full((1,), math.inf)
    bounds = angles(s, residual + rounding, limits, rounding, torch.finfo(dtype).eps)
    u, values, v = finish(u, s[:k], v, dtype)
    return TensorDelta(
        name=name,
        shape=(m, n),
        u=u,
        s=values,
        v=v,
        residual=residual + rounding,
        angle=bounds.vector,
        subspace=bounds.subspace,
        dimension=bounds.dimension,
        frobenius=frobenius,
        changed=rows * columns if real else 0,
        passes=0,
        note="; ".join(notes),
    )
