"""From edits (layers, heads, positions by name) to edit tables (rows of integers), one for each layer and site."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import SupportsIndex, TypeGuard

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf.edits import HEADS, NEURONS, At, Edit, Resample
from bkdfast.hf.spec import ModelSpec
from bkdfast.ops.edit_table import ALL_ROWS, COLUMN, FIRST, LAST, OPEN, ORIGIN, ROW, EditTable

NAMED: dict[str, tuple[int, int, int]] = {
    "all": (FIRST, -OPEN, OPEN),
    "last_prompt": (LAST, 0, 1),
    "prompt": (LAST, -OPEN, 1),
    "generated": (LAST, 1, OPEN),
}
Key = tuple[str, int]
"""Site (`"heads"` or `"neurons"`) and layer."""


@dataclass
class _Rows:
    edits: list[tuple[int, ...]] = field(default_factory=list)
    coefficients: list[tuple[float, float]] = field(default_factory=list)
    sources: list[torch.Tensor] = field(default_factory=list)
    count: int = 0

    def add_source(self, source: torch.Tensor) -> int:
        """Append `[n, W]` source rows; returns the index of the first."""
        self.sources.append(source)
        self.count += len(source)
        return self.count - len(source)


@dataclass
class Tables:
    """Edit tables by (site, layer), and the number of batch rows they were made for (None: any)."""

    tables: dict[Key, EditTable]
    batch: int | None = None
    relative: bool = False
    """Some edit counts from the end of the prompt."""

    @property
    def rows(self) -> int:
        """Number of batch rows that the edits need at least."""
        return max((int(t.table[:, ROW].max()) + 1 for t in self.tables.values() if len(t.table)), default=0)


def lower(
    edits: Iterable[Edit],
    spec: ModelSpec,
    *,
    dtype: torch.dtype,
    variants: Sequence[Iterable[Edit]] = (),
    batch: int = 0,
    last: Sequence[int] | None = None,
    begin: Sequence[int] | None = None,
) -> Tables:
    """Check edits against the model and make their tables.

    Args:
        edits: edits of all rows of a call.
        spec: the model.
        dtype: of the model's activations.
        variants: instead of `edits`: one list of edits for each variant of a batch of `len(variants) * batch` rows, in
            which variant v has rows `[v * batch, (v + 1) * batch)`.
        batch: rows of one variant.
        last: for rows that hold more than the prompt (teacher-forced targets): the position of each row's last prompt
            token, counted from its first real token. None: the prompt ends where the row does. A source with an entry
            for each row and token then has none for tokens after the prompt, and they stay as they are.
        begin: with `last`, the column of each row's first real token (0 if left out).

    Raises:
        InvalidArgumentError: a layer, head, neuron, row or position is out of range, a source has the wrong shape, or
            two edits address one cell.
    """
    rows: dict[Key, _Rows] = {}
    batches: set[int] = set()
    if variants:
        for v, variant in enumerate(variants):
            for edit in variant:
                _lower_one(edit, spec, rows, v * batch, batch, batches, last, begin)
    else:
        for edit in edits:
            _lower_one(edit, spec, rows, 0, None, batches, last, begin)
    if len(batches) > 1:
        raise InvalidArgumentError(f"edits are made for batches of different sizes: {sorted(batches)} rows")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    tables = {}
    for key, r in rows.items():
        site, layer = key
        width, slices = site_shape(spec, site, layer)
        source = (
            # On the host: sources may come from several devices, and the tables are copied to the model's anyway.
            torch.cat([s.to("cpu", accumulate) for s in r.sources])
            if r.sources
            else torch.zeros(1, width, dtype=accumulate)
        )
        try:
            tables[key] = EditTable.pack(r.edits, r.coefficients, source, slices=slices)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"layer {layer}, {site}: {error}") from None
    size = len(variants) * batch if variants else next(iter(batches), None)
    return Tables(tables, size, any((t.table[:, ORIGIN] == LAST).any() for t in tables.values()))


def site_shape(spec: ModelSpec, site: str, layer: int) -> tuple[int, int]:
    """Slice width W and number of slices S of a site: (Dh, H) for heads, (1, M) for neurons."""
    block = spec.blocks[layer]
    if site == HEADS:
        return block.head_dim, block.heads
    if block.neurons is None:
        raise InvalidArgumentError(
            f"layer {layer} of {spec.family} has no single MLP down projection (mixture of experts): no neurons to edit"
        )
    return 1, block.neurons


def _lower_one(
    edit: Edit,
    spec: ModelSpec,
    rows: dict[Key, _Rows],
    base: int,
    count: int | None,
    batches: set[int],
    last: Sequence[int] | None,
    begin: Sequence[int] | None,
) -> None:
    if not isinstance(edit, Edit):
        raise InvalidTypeError(f"expected an edit (Zero, Mean, Resample, Patch, Scale, Add), got {type(edit).__name__}")
    layers = _indices(edit.layer, spec.layers, "layer", "the model")
    chosen = edit.head if edit.site == HEADS else edit.neuron
    spans = positions(edit.at)
    if last is not None and spans[0][0] == LAST:
        _, start, stop = spans[0]
        spans = [(FIRST, _shift(start, end), _shift(stop, end)) for end in last]
    for layer in layers:
        width, slices = site_shape(spec, edit.site, layer)
        pieces = _indices(chosen, slices, edit.site[:-1], f"layer {layer}")
        source, per_row, tokens = _source(edit, layer, pieces, width, slices, spec.layers)
        if isinstance(edit, Resample) and per_row is None:
            raise InvalidArgumentError(
                f"the source of {edit!r} has no row for each sample to draw from; it is [B, L, H, Dh], as head_outputs "
                "returns it (means are for Mean)"
            )
        if per_row is not None:
            batches.add(per_row)
            if count is not None and per_row != count:
                raise InvalidArgumentError(f"{edit!r} has a source for {per_row} rows, but a variant has {count} rows")
        targets = _targets(edit, spans, per_row, count)
        if one_a_row(edit.at) and edit.rows is None:
            batches.add(len(spans))
        r = rows.setdefault((edit.site, layer), _Rows())
        for i, piece in enumerate(pieces):
            first = r.add_source(source[:, :, i].reshape(-1, width)) if source is not None else 0
            for row in targets:
                origin, start, stop = spans[row if len(spans) > 1 else 0]
                if tokens:
                    origin, start, stop = _bounded(edit, origin, start, stop, tokens)
                if tokens and last is not None and per_row is not None:
                    end = last[row] + (begin[row] if begin is not None and origin == COLUMN else 0)
                    if start > end:
                        raise InvalidArgumentError(
                            f"at={edit.at!r} is behind the prompt of row {row}, which has {last[row] + 1} tokens; the "
                            "source has no entry for it"
                        )
                    stop = min(stop, end + 1)
                entry = first + (max(row, 0) * max(tokens, 1) if per_row is not None else 0)
                place = base + row if row >= 0 else ALL_ROWS
                r.edits.append((place, origin, start, stop, piece, entry, int(tokens > 1)))
                r.coefficients.append((edit.a, edit.b))


def _targets(edit: Edit, spans: list, per_row: int | None, count: int | None) -> list[int]:
    """Rows of the (variant's) batch that the edit addresses; [-1] for all rows of any batch."""
    listed = len(spans) if len(spans) > 1 or (one_a_row(edit.at) and edit.rows is None) else None
    known = per_row or listed or count
    if count is not None and known != count:
        raise InvalidArgumentError(f"{edit!r} gives positions for {known} rows, but a variant has {count} rows")
    if edit.rows is not None:
        if known is not None:
            return _indices(edit.rows, known, "row", "the batch")
        return _indices(edit.rows, 1 << 31, "row", "the batch")
    return [ALL_ROWS] if known is None else list(range(known))


def _shift(position: int, by: int) -> int:
    return position if abs(position) >= OPEN else position + by


def _bounded(edit: Edit, origin: int, start: int, stop: int, tokens: int) -> tuple[int, int, int]:
    """A span that reads one source row a token: at most as many tokens as the source has."""
    if (start, stop) == (-OPEN, OPEN):
        return COLUMN, 0, tokens
    if start <= -OPEN:
        if origin == LAST:
            raise InvalidArgumentError(
                f"{edit!r}: a source with a token dimension needs a first position; give at=slice(0, None) or at='all'"
            )
        start = 0  # a sweep knows where the prompt ends
    return origin, start, min(stop, start + tokens)


def _indices(chosen, count: int, name: str, where: str) -> list[int]:
    if chosen is None:
        return list(range(count))
    chosen = [chosen] if _is_int(chosen) else list(chosen)
    if any(isinstance(i, bool) or getattr(i, "dtype", None) == torch.bool for i in chosen):
        raise InvalidTypeError(f"{name}s {chosen} are a mask; give indices (mask.nonzero())")
    found = [operator.index(i) for i in chosen]
    if len(set(found)) != len(found):
        raise InvalidArgumentError(f"{name}s {found} name one {name} twice")
    for index in found:
        if not 0 <= index < count:
            raise InvalidArgumentError(
                f"{name} {index} is out of range: {where} has {count} {name}s (0 to {count - 1})"
            )
    return found


def _source(
    edit: Edit, layer: int, pieces: list[int], width: int, slices: int, layers: int
) -> tuple[torch.Tensor | None, int | None, int]:
    """The source as `[B or 1, T or 1, len(pieces), W]`, with B where it is given for each row, and T (0 without).

    One entry where there could be B of them serves all rows; of each column of a batch (`at="all"`) it cannot, as rows
    begin in different ones.
    """
    if edit.source is None:
        return None, None, 0
    given, source = tuple(edit.source.shape), edit.source.detach()
    if edit.site == NEURONS:
        source = source.unsqueeze(-1)
    shape = tuple(source.shape)
    if shape == (width,):
        return source.expand(1, 1, len(pieces), width), None, 0
    if shape == (len(pieces), width):
        return source[None, None], None, 0
    if shape[-3:] == (layers, slices, width) and len(shape) in (3, 4, 5):
        one = slice(pieces[0], pieces[0] + 1)  # a view, and several times as fast as a list
        at_layer = source[..., layer, one if len(pieces) == 1 else pieces, :]
        if len(shape) == 3:
            return at_layer[None, None], None, 0
        per_row = shape[0] if shape[0] > 1 or (len(shape) == 5 and positions(edit.at) == [NAMED["all"]]) else None
        return (at_layer[:, None], per_row, 0) if len(shape) == 4 else (at_layer, per_row, shape[1])
    unit = "[Dh]" if edit.site == HEADS else "a scalar"
    raise InvalidArgumentError(
        f"the source of {edit!r} has shape {given}; layer {layer} needs {unit} of width {width}, one for each of the "
        f"{len(pieces)} {edit.site}, or [L, ...] = {(layers, slices, width)} with [B] or [B, T] before it"
    )


def _is_int(value: object) -> TypeGuard[SupportsIndex]:
    """An int of Python, NumPy or a 0-d tensor; arrays have `__index__` too."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def one_a_row(at: At) -> bool:
    """`at` lists one position for each row."""
    return not isinstance(at, (str, slice)) and not _is_int(at)


def positions(at: At) -> list[tuple[int, int, int]]:
    """(origin, start, stop) of a position argument: one, or one for each row."""
    if isinstance(at, str):
        if at not in NAMED:
            raise InvalidArgumentError(f"at={at!r} is not one of {sorted(NAMED)}, an int, a slice or a list of ints")
        return [NAMED[at]]
    if isinstance(at, slice):
        return [_slice(at)]
    if _is_int(at):
        at = operator.index(at)
        return [(FIRST, at, at + 1) if at >= 0 else (LAST, at + 1, at + 2)]
    if not isinstance(at, Iterable):
        raise InvalidTypeError(f"at={at!r} is not one of {sorted(NAMED)}, an int, a slice or a list of ints")
    found = [operator.index(position) for position in at]
    if not found or min(found) < 0:
        raise InvalidArgumentError(f"at={found}: positions for each row must be given, and count from the start (>= 0)")
    return [(FIRST, position, position + 1) for position in found]


def _slice(at: slice) -> tuple[int, int, int]:
    start, stop = at.start, at.stop
    if at.step not in (None, 1):
        raise InvalidArgumentError(f"at={at}: a step is not supported; list the edits")
    negative = [bound < 0 for bound in (start, stop) if bound is not None]
    if any(negative) and not all(negative):
        raise InvalidArgumentError(f"at={at}: both ends must count from the same side")
    if any(negative):
        span = (LAST, -OPEN if start is None else start + 1, 1 if stop is None else stop + 1)
    else:
        span = (FIRST, 0 if start is None else start, OPEN if stop is None else stop)
    if span[1] >= span[2]:
        raise InvalidArgumentError(f"at={at} is empty")
    return span
