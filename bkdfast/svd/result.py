"""What `delta_svd` returns: `TensorDelta` for one weight, `DeltaSVD` for a model."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bkdfast.errors import CheckpointError, optional
from bkdfast.svd.artifact import read_artifact, write_artifact
from bkdfast.svd.comparison import Comparison

if TYPE_CHECKING:
    import pandas

_KIND = "delta_svd"
PARTS = ("u", "s", "v", "residual", "angle", "subspace", "dimension")
SCALARS = ("frobenius", "changed", "passes", "converged", "rounding", "note")


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """Leading singular triplets of `tuned - base` of one weight, as stored: `delta ~ u @ diag(s) @ v.T`.

    Attributes:
        name: the tensor's name in the tuned model.
        shape: `(m, n)`.
        u: left singular vectors `[m, k]`, unit columns, float32 (float64 when both weights are); the sign makes the
            largest entry of each positive.
        s: singular values `[k]`, float64, descending, in the weights' unit.
        v: right singular vectors `[n, k]`.
        residual: `||delta^T u - s v||` of each triplet `[k]`, float64, rounding included; `delta v = s u` holds to
            rounding. Divided by the gap to the rest of the spectrum it bounds the vectors' angle, provided that no
            larger triplet was missed.
        frobenius: `||delta||_F`, from all entries.
        changed: number of entries that differ; of a LoRA's delta, which is not formed, those that can.
        angle: for each triplet `[k]`, float64, a bound on the sine of the angles between its vectors and the true ones,
            the larger of left and right; 1 where its neighbours are too close to tell it from them.
        subspace: for each triplet `[k]`, float64, a bound on the sine of the angles between its vectors and the spans
            of the leading `dimension` true vectors; 1 where no gap behind it is certain.
        dimension: `[k]` int64, at least i + 1 for triplet i; 0 where `subspace` is 1. The bounds hold but for a
            probability of 1e-6 for each rank that was tried, whatever was missed (`bkdfast.svd.certificate`).
        passes: how often both matrices were read by the iteration, with all ranks that were tried; 0 where they are the
            same byte for byte, and for a LoRA, whose factors are decomposed.
        converged: every residual is below `tolerance * s`, or as small as rounding allows, but for
            those `below_rounding`.
        rounding: about the largest singular value that rounding to the tuned weights' format gives a delta by itself.
        note: what a reader should know (clipped rank, lower numerical rank, `max_rank` reached, names that differ), or
            "".
    """

    name: str
    shape: tuple[int, int]
    u: Tensor
    s: Tensor
    v: Tensor
    residual: Tensor
    angle: Tensor
    subspace: Tensor
    dimension: Tensor
    frobenius: float
    changed: int
    passes: int
    converged: bool = True
    rounding: float = 0.0
    note: str = ""

    @property
    def rank(self) -> int:
        """Number of triplets k: what the rule asks for, or the delta's numerical rank where that is lower."""
        return self.s.shape[0]

    @property
    def below_rounding(self) -> Tensor:
        """`[k]` bool: singular values that rounding alone may have given."""
        return self.s < self.rounding

    @property
    def unchanged(self) -> bool:
        """Whether no entry differs."""
        return self.changed == 0

    @property
    def energy(self) -> float:
        """Share of the delta's squared Frobenius norm in these triplets, 0 to 1; 0 for a zero delta."""
        return float(self.s.square().sum()) / self.frobenius**2 if self.frobenius > 0 else 0.0

    def leading(self, k: int) -> TensorDelta:
        """The same with the first k triplets only."""
        parts: dict[str, Any] = {part: getattr(self, part)[..., :k].contiguous() for part in PARTS}
        return replace(self, **parts)


@dataclass(frozen=True, eq=False, repr=False)
class DeltaSVD(Comparison[TensorDelta]):
    """The `TensorDelta` of every compared weight, by its name in the tuned model, and what was not compared.

    Matrix e of a stack `[E, a, b]` is `name[e]`; `skipped` has what is no floating-point matrix, `metadata` labels and
    hashes of both sides, settings, seed and versions. The other attributes are those of `Comparison`.
    """

    def __repr__(self) -> str:
        text = f"DeltaSVD({len(self)} tensors, {len(self.unchanged)} unchanged, {len(self.skipped)} skipped"
        if self.tensors:
            top = max(self.tensors.values(), key=lambda delta: delta.frobenius)
            text += f", largest delta {top.frobenius:.3g} in {top.name}"
        return text + ")"

    def to_pandas(self) -> pandas.DataFrame:
        """One row per tensor, indexed by name: shape, rank, s_1, Frobenius norm, energy, changed share, convergence.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pd = optional("pandas", "a data frame", "viz")
        rows = [
            {
                "name": delta.name,
                "rows": delta.shape[0],
                "columns": delta.shape[1],
                "rank": delta.rank,
                "largest_s": float(delta.s[0]) if delta.rank else 0.0,
                "smallest_s": float(delta.s[-1]) if delta.rank else 0.0,
                "frobenius": delta.frobenius,
                "energy": delta.energy,
                "changed": delta.changed,
                "changed_share": delta.changed / max(1, delta.shape[0] * delta.shape[1]),
                "relative_residual": float((delta.residual / delta.s).max()) if delta.rank else 0.0,
                "largest_angle": float(delta.subspace.max()) if delta.rank else 0.0,
                "above_rounding": int((~delta.below_rounding).sum()),
                "passes": delta.passes,
                "converged": delta.converged,
                "note": delta.note,
            }
            for delta in self.tensors.values()
        ]
        columns = list(rows[0]) if rows else ["name"]
        return pd.DataFrame(rows, columns=columns).set_index("name")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file with JSON metadata, whole or not at all.

        Raises:
            CheckpointError: the folder does not exist.
            OSError: the file cannot be written.
        """
        tensors, entries = {}, {}
        for name, delta in self.tensors.items():
            for part in PARTS:
                tensors[f"{name}.{part}"] = getattr(delta, part)
            entries[name] = {key: getattr(delta, key) for key in SCALARS}
        metadata = {
            "tensors": entries,
            "only_in_base": list(self.only_in_base),
            "only_in_tuned": list(self.only_in_tuned),
            "skipped": self.skipped,
            "tied": self.tied,
            "metadata": self.metadata,
        }
        write_artifact(path, _KIND, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DeltaSVD:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or something else.
        """
        tensors, metadata = read_artifact(path, _KIND)
        try:
            deltas = {}
            for name, scalars in metadata["tensors"].items():
                parts: dict[str, Any] = {part: tensors[f"{name}.{part}"] for part in PARTS}
                scalars = {key: scalars[key] for key in SCALARS}
                shape = parts["u"].shape[0], parts["v"].shape[0]
                deltas[name] = TensorDelta(name, shape, **parts, **scalars)
                if len({part.shape[-1] for part in parts.values()}) > 1:
                    raise CheckpointError(f"{path}: the parts of {name} do not have one rank")
                if not all(torch.isfinite(part).all() for part in parts.values()):
                    raise CheckpointError(f"{path}: {name} has NaN or infinity")
            only = tuple(metadata["only_in_base"]), tuple(metadata["only_in_tuned"])
            return cls(deltas, *only, metadata["skipped"], metadata["tied"], metadata["metadata"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path} lacks {error}; it is not a complete {_KIND} file") from error
