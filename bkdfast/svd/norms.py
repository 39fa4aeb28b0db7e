"""`delta_norms`: how much every tensor changed, in one read of both models and without singular vectors."""

from __future__ import annotations

import csv
import io
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from bkdfast.errors import optional
from bkdfast.ops.delta_sketch import delta_sketch, sketch_dtype
from bkdfast.svd.artifact import versions
from bkdfast.svd.comparison import Comparison
from bkdfast.svd.plan import FLOATS, Item, make_plan, memory_limit
from bkdfast.svd.source import open_source
from bkdfast.svd.stream import Pair, Stream

if TYPE_CHECKING:
    import pandas

_CHUNK = 1 << 20  # elements that are converted at a time
_COLUMNS = ("name", "shape", "dtype", "frobenius", "relative", "largest", "changed", "changed_share", "note")


@dataclass(frozen=True)
class TensorNorm:
    """How much one tensor changed.

    Attributes:
        name: the tensor's name in the tuned model.
        shape: of what was compared.
        dtype: of the base and of the tuned tensor, as "bfloat16" or "float32 -> bfloat16".
        frobenius: `||delta||_F`, the square root of the sum of all squared differences, in the weights' unit; NaN
            where the difference has NaN or infinity.
        base: `||base||_F` in the same unit.
        largest: largest |difference| of one entry.
        changed: number of entries that differ.
        note: what a reader should know, or "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    frobenius: float
    base: float
    largest: float
    changed: int
    note: str = ""

    @property
    def relative(self) -> float:
        """`||delta||_F / ||base||_F`; infinity where only the base is zero, 0 where both are."""
        if self.base == 0:
            return math.inf if self.frobenius > 0 else 0.0 * self.frobenius
        return self.frobenius / self.base

    @property
    def unchanged(self) -> bool:
        """Whether no entry differs."""
        return self.changed == 0

    @property
    def changed_share(self) -> float:
        """Share of the entries that differ, 0 to 1."""
        return self.changed / max(1, math.prod(self.shape))


@dataclass(frozen=True, eq=False, repr=False)
class DeltaNorms(Comparison[TensorNorm]):
    """The `TensorNorm` of every compared tensor, by its name in the tuned model; attributes as of `Comparison`."""

    def __repr__(self) -> str:
        return (
            f"DeltaNorms({len(self)} tensors, {len(self.unchanged)} unchanged, ||delta|| {self.frobenius:.4g}, "
            f"{self.relative:.3%} of the base)"
        )

    @property
    def frobenius(self) -> float:
        """Norm of all deltas together."""
        return math.sqrt(math.fsum(norm.frobenius**2 for norm in self.tensors.values()))

    @property
    def relative(self) -> float:
        """Norm of all deltas together, over that of the base's compared tensors; 0 where the base is zero."""
        base = math.sqrt(math.fsum(norm.base**2 for norm in self.tensors.values()))
        return self.frobenius / base if base else 0.0

    def ranked(self) -> list[TensorNorm]:
        """The tensors by falling relative norm; those with NaN first."""
        return sorted(self.tensors.values(), key=lambda norm: (not math.isnan(norm.relative), -norm.relative))

    def to_pandas(self) -> pandas.DataFrame:
        """One row per tensor, indexed by name.

        Raises:
            MissingDependencyError: pandas is not installed.
        """
        pd = optional("pandas", "a data frame", "viz")
        rows = [[getattr(norm, column) for column in _COLUMNS] for norm in self.tensors.values()]
        return pd.DataFrame(rows, columns=list(_COLUMNS)).set_index("name")

    def to_csv(self) -> str:
        """One line per tensor, by falling relative norm, in full precision; the first line names the columns."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(_COLUMNS)
        for norm in self.ranked():
            shape = "x".join(map(str, norm.shape))
            table.writerow([shape if column == "shape" else getattr(norm, column) for column in _COLUMNS])
        return text.getvalue()


def delta_norms(
    base: nn.Module | str | os.PathLike[str],
    tuned: nn.Module | str | os.PathLike[str],
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    backend: str | None = None,
    max_memory: int | str | None = None,
    progress: bool = True,
) -> DeltaNorms:
    """How much every tensor changed from `base` to `tuned`: norms and changed entries, from one read of both.

    Tensors of any shape and dtype are compared, one pair in memory at a time. Of matrices with a row for each token
    whose vocabularies differ in size, the common rows are, with a warning and a note.

    Args:
        base: the model before fine-tuning, as in `delta_svd`.
        tuned: the model after it.
        include: shell pattern or patterns of names to compare; all if None.
        exclude: patterns of names to leave out, applied after `include`.
        device: where to compute; by default where the tuned tensor is.
        backend: of `delta_sketch`.
        max_memory: as in `delta_svd`.
        progress: show a progress bar, in bytes of both sides, on stderr.

    Returns:
        `DeltaNorms`, a mapping from names to `TensorNorm`.

    Raises:
        CheckpointError: a side cannot be read or is quantised, shapes differ, or no name is in both.
        InvalidArgumentError: a pattern of `include` matches nothing, or the largest pair does not fit into
            `max_memory`.
        InvalidTypeError: an argument has the wrong type.

    Warns:
        UserWarning: names on one side only; resized vocabularies.

    Example:
        >>> from bkdfast.demo import PAIR
        >>> norms = delta_norms(PAIR / "base", PAIR / "tuned", progress=False)
        >>> norms.ranked()[0].name, len(norms), len(norms.unchanged)
        ('model.layers.5.self_attn.v_proj.weight', 56, 0)
    """
    limit = memory_limit(max_memory)
    sources = open_source(base), open_source(tuned)
    plan = make_plan(*sources, include, exclude, matrices=False, work=lambda item: (64 * _CHUNK, 0))
    plan.refuse_too_large(limit)
    found: dict[str, TensorNorm] = {}
    order = plan.order()
    bar = tqdm(
        total=plan.nbytes, desc="diff", unit="B", unit_scale=True, file=sys.stderr, disable=not progress, leave=False
    )
    with bar, Stream(*sources, plan, order, limit=limit, digest=False) as stream:
        for position in order:
            item = plan.items[position]
            bar.set_postfix_str(item.name, refresh=False)
            found[item.name] = _norm(item, stream.take(position), device, backend)
            bar.update(item.size)
    metadata = {"base": sources[0].label, "tuned": sources[1].label, "versions": versions()}
    tensors = {item.name: found[item.name] for item in plan.items}
    return DeltaNorms(tensors, plan.only_in_base, plan.only_in_tuned, plan.skipped, plan.tied, metadata)


def _norm(item: Item, pair: Pair, device: str | torch.device | None, backend: str | None) -> TensorNorm:
    device = device if device is not None else pair.w1.device
    w0, w1 = pair.w0.to(device), pair.w1.to(device)
    names = [str(w.dtype).removeprefix("torch.") for w in (w0, w1)]
    notes = [item.note] if item.note else []
    with torch.no_grad():
        sketched = w0.dtype in FLOATS and w1.dtype in FLOATS and w0.numel() > 0 and not pair.same
        base, squared, largest, changed = sums(w0, w1, same=pair.same, sketched=sketched)
        if sketched:
            rows = w0.shape[0] if w0.dim() > 1 else 1
            a, b = w0.reshape(rows, -1), w1.reshape(rows, -1)
            sketch = delta_sketch(a, b, a.new_empty((a.shape[1], 0), dtype=sketch_dtype(a, b)), backend=backend)
            squared, changed = sketch.frobenius_sq.item(), int(sketch.changed.item())
    if not (math.isfinite(squared) and math.isfinite(base)):
        notes.append(f"NaN or infinity in the {'tuned' if math.isfinite(base) else 'base'} weights")
        squared = largest = math.nan
    dtype = names[0] if names[0] == names[1] else " -> ".join(names)
    norms = math.sqrt(squared), math.sqrt(base) if base >= 0 else math.nan
    return TensorNorm(item.name, item.shape, dtype, *norms, largest, changed, "; ".join(notes))


def sums(w0: Tensor, w1: Tensor, *, same: bool, sketched: bool) -> tuple[float, float, float, int]:
    """Squared norms of base and delta, largest |delta| and number of changes, a chunk of elements at a time.

    Where the tensors are the `same`, only the first; where they are `sketched`, not the second and the last.
    """
    base, squared, largest, changed = 0.0, 0.0, 0.0, 0
    wide = torch.promote_types(w0.dtype, w1.dtype) if sketched else torch.float64
    wide = torch.promote_types(wide, torch.float32)
    for a, b in zip(w0.reshape(-1).split(_CHUNK), w1.reshape(-1).split(_CHUNK), strict=True):
        values = a.double()
        base += float(values.dot(values))
        if same or len(a) == 0:
            continue
        delta = b.to(wide) - a.to(wide)
        largest = max(largest, float(delta.abs().max()))
        if not sketched:
            squared += float(delta.square().sum())
            exact = a.dtype == b.dtype and a.dtype not in FLOATS and not a.is_floating_point()
            changed += int((a != b).sum() if exact else (delta != 0).sum())
    return base, squared, largest, changed
