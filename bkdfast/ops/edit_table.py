"""The edit table: which cells of `[B, T, S * W]` activations change, and how. Data of `patch_heads`.

The last dimension is divided into S slices of width W: for attention heads a slice is one head (W = head_dim), for MLP
neurons it is one neuron (W = 1). Each edit addresses one slice over a span of tokens, in one row or in all rows:

    z[row, t, slice] <- a * z[row, t, slice] + b * source[source_row + stride * (t - start)]

Token positions are relative to an **origin**, one offset per origin and batch row (`offset`, `[origins, B]`): it says
where this call's first token stands, so the same table serves a prompt, each decode step and a chunk of a prefill.
The HuggingFace layer uses three origins: the row's first real token (`FIRST`), its last prompt token (`LAST`), and the
first column of the prompt, padding included (`COLUMN`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError

# Columns of the integer table.
ROW, ORIGIN, START, STOP, SLICE, SOURCE, STRIDE = range(7)
COLUMNS = 7
ALL_ROWS = -1
FIRST, LAST, COLUMN = 0, 1, 2
OPEN = 1 << 30
"""Positions at or beyond +-OPEN mean "without end"."""


@dataclass(frozen=True)
class EditTable:
    """A checked edit table in tensors.

    Attributes:
        table: `[E, 7]` int32, columns `row, origin, start, stop, slice, source_row, stride`; `row` -1 is every row; an
            edit with `start >= stop` does nothing, so a table of zeros is empty.
        coefficients: `[E, 2]` (a, b), float32 (float64 for float64 activations). `a == 0` does not read z and
            `b == 0` does not read the source: NaN there does not spread.
        source: `[R, W]`, same dtype as the coefficients.
    """

    table: torch.Tensor
    coefficients: torch.Tensor
    source: torch.Tensor

    @classmethod
    def pack(
        cls,
        edits: np.ndarray | list,
        coefficients: np.ndarray | list,
        source: torch.Tensor,
        *,
        slices: int,
    ) -> EditTable:
        """Check edits and make the tensors.

        Args:
            edits: `[E, 7]` integers as in `table`.
            coefficients: `[E, 2]` floats.
            source: `[R, W]` float32 or float64.
            slices: number of slices S of the activations, for the range check.

        Raises:
            InvalidArgumentError: a slice, span, source row or stride is out of range, or two edits address one cell.
            InvalidTypeError: the source is not float32 or float64.
        """
        if source.dtype not in (torch.float32, torch.float64):
            raise InvalidTypeError(f"source must be float32 or float64, got {source.dtype}")
        if source.dim() != 2:
            raise InvalidArgumentError(f"source must be [rows, width], got shape {tuple(source.shape)}")
        rows = _matrix(edits, "edits", COLUMNS).astype(np.int64)
        scale = _matrix(coefficients, "coefficients", 2).astype(np.float64)
        if len(rows) != len(scale):
            raise InvalidArgumentError(f"{len(rows)} edits but {len(scale)} coefficient pairs; give one pair per edit")
        _check_ranges(rows, scale, slices, len(source), torch.finfo(source.dtype).max)
        _check_disjoint(rows)
        return cls(
            torch.from_numpy(rows.astype(np.int32)).to(source.device),
            torch.from_numpy(scale).to(source.device, source.dtype),
            source.contiguous(),
        )


def _matrix(values: np.ndarray | list, name: str, columns: int) -> np.ndarray:
    found = np.asarray(values)
    if found.size == 0:
        return np.zeros((0, columns), dtype=np.int64)
    if found.ndim != 2 or found.shape[1] != columns:
        raise InvalidArgumentError(f"{name} must be [E, {columns}], got shape {found.shape}")
    if name == "edits" and found.dtype.kind not in "iu":
        raise InvalidTypeError(f"edits must be integers, got {found.dtype}")
    return found


def _check_ranges(rows: np.ndarray, scale: np.ndarray, slices: int, sources: int, largest: float) -> None:
    def refuse(bad: np.ndarray, what: str) -> None:
        if bad.any():
            edit = int(bad.argmax())
            raise InvalidArgumentError(f"edit {edit}: {what.format(*rows[edit])}")

    refuse((rows[:, SLICE] < 0) | (rows[:, SLICE] >= slices), f"slice {{4}} is out of range, there are {slices}")
    refuse(rows[:, ROW] < ALL_ROWS, "row {0} is negative; use -1 for every row")
    refuse(rows[:, ROW] >= 1 << 31, "row {0} does not fit 32 bits")
    refuse(rows[:, START] > rows[:, STOP], "span [{2}, {3}) ends before it starts")
    refuse((np.abs(rows[:, START]) > OPEN) | (np.abs(rows[:, STOP]) > OPEN), "span [{2}, {3}) is beyond +-2**30")
    refuse((rows[:, ORIGIN] < 0) | (rows[:, ORIGIN] > 127), "origin {1} is out of range")
    refuse(~np.isin(rows[:, STRIDE], (0, 1)), "stride {6} is not 0 (one source row) or 1 (one source row a token)")
    reads = (scale[:, 1] != 0) & (rows[:, START] < rows[:, STOP])
    last = rows[:, SOURCE] + rows[:, STRIDE] * np.maximum(rows[:, STOP] - rows[:, START] - 1, 0)
    refuse(
        reads & ((rows[:, SOURCE] < 0) | (last >= sources)), f"source row {{5}} is out of range, there are {sources}"
    )
    usable = np.abs(scale) <= largest  # False for NaN
    if not usable.all():
        edit = int((~usable).any(1).argmax())
        raise InvalidArgumentError(
            f"edit {edit}: coefficients {scale[edit].tolist()} are not finite in the source's dtype"
        )


def _check_disjoint(rows: np.ndarray) -> None:
    """Refuse two edits of one cell, as far as the table alone can tell.

    Spans counted from different origins meet or not depending on a prompt's length, so they are compared only where a
    span is open on both sides. Where such edits do meet, they apply in the order of the table.
    """
    index = np.flatnonzero(rows[:, START] < rows[:, STOP])
    live = rows[index]
    everywhere = (live[:, START] == -OPEN) & (live[:, STOP] == OPEN)

    order = np.lexsort((live[:, START], live[:, ROW], live[:, ORIGIN], live[:, SLICE]))
    before, after = live[order[:-1]], live[order[1:]]
    same = (before[:, [SLICE, ORIGIN, ROW]] == after[:, [SLICE, ORIGIN, ROW]]).all(1)
    clash = same & (before[:, STOP] > after[:, START])
    if clash.any():
        at = int(clash.argmax())
        _refuse_pair(rows, index[order[at]], index[order[at + 1]])

    # Wildcards (all rows, or all positions of any origin) against the others of their slice.
    for i in np.flatnonzero((live[:, ROW] == ALL_ROWS) | everywhere):
        one = live[i]
        meets = (live[:, SLICE] == one[SLICE]) & (
            (one[ROW] == ALL_ROWS) | (live[:, ROW] == ALL_ROWS) | (live[:, ROW] == one[ROW])
        )
        overlap = (live[:, ORIGIN] == one[ORIGIN]) & (live[:, START] < one[STOP]) & (live[:, STOP] > one[START])
        meets &= overlap | everywhere | everywhere[i]
        meets[i] = False
        if meets.any():
            _refuse_pair(rows, index[i], index[int(meets.argmax())])


def _refuse_pair(rows: np.ndarray, first: int, second: int) -> None:
    first, second = sorted((int(first), int(second)))
    raise InvalidArgumentError(
        f"edits {first} and {second} address the same cell: slice {rows[first, SLICE]}, "
        f"rows {rows[first, ROW]} and {rows[second, ROW]} (-1 is every row), spans "
        f"[{rows[first, START]}, {rows[first, STOP]}) and [{rows[second, START]}, {rows[second, STOP]}); "
        "merge them into one edit"
    )
