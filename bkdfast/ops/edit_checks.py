"""The checks of edit tables in numpy: the twin of `csrc/native/edit_table.cpp`, for installs without `bkdfast._native`.

Both say the same of every table. What the columns mean is in `edit_table.py`.
"""

from __future__ import annotations

import numpy as np

ALL_ROWS = -1
OPEN = 1 << 30
"""Positions at or beyond +-OPEN mean "without end"."""
WIDE = 1 << 31

# What is wrong with an edit, in the order in which it is looked for (`enum class Fault` in csrc/native/native.h).
FAULTS = (
    "slice {4} is out of range, there are {slices}",
    "slice {4} does not fit 32 bits",
    "row {0} is negative; use -1 for every row",
    "row {0} does not fit 32 bits",
    "span [{2}, {3}) ends before it starts",
    "span [{2}, {3}) is beyond +-2**30",
    "origin {1} is out of range",
    "stride {6} is not 0 (one source row) or 1 (one source row a token)",
    "source row {5} does not fit 32 bits",
    "source row {5} is out of range, there are {sources}",
    "coefficients {coefficients} are not finite in the source's dtype",
)


def first_fault(
    rows: np.ndarray, coefficients: np.ndarray, slices: int, sources: int, largest: float
) -> tuple[int, int] | None:
    """(Index into `FAULTS`, edit) of the first edit with a value out of range, or None.

    Args:
        rows: `[E, 7]` int64.
        coefficients: `[E, 2]` float64.
        slices: number of slices of the activations.
        sources: number of source rows.
        largest: largest finite value of the source's dtype.
    """
    row, origin, start, stop, piece, entry, stride = rows.T
    reads = (coefficients[:, 1] != 0) & (start < stop)
    # Of a value that would overflow here an earlier line has said that it is out of range.
    last = entry + stride * (stop - start - 1)
    faults = np.stack(  # [faults, E]
        [
            (piece < 0) | (piece >= slices),
            piece >= WIDE,
            row < ALL_ROWS,
            row >= WIDE,
            start > stop,
            (start < -OPEN) | (stop > OPEN),
            (origin < 0) | (origin > 127),
            (stride != 0) & (stride != 1),
            (entry < -WIDE) | (entry >= WIDE),
            reads & ((entry < 0) | (last >= sources)),
            ~(np.abs(coefficients) <= largest).all(1),  # not >: NaN compares False with everything
        ]
    )
    faulty = faults.any(0)
    if not faulty.any():
        return None
    edit = int(faulty.argmax())
    return int(faults[:, edit].argmax()), edit


def disjoint(rows: np.ndarray) -> bool:
    """Whether no two edits of `rows` (`[E, 7]` int64, without faults) address one cell.

    Spans counted from different origins meet or not depending on a prompt's length, so they are compared only where a
    span is open on both sides. Where such edits do meet, they apply in the order of the table.
    """
    live = rows[rows[:, 2] < rows[:, 3]]
    row, origin, start, stop, piece = live.T[:5]
    every_row, everywhere = row == ALL_ROWS, (start == -OPEN) & (stop == OPEN)

    # One row: in the order of their starts, two spans overlap only if two neighbours do.
    order = np.lexsort((start, origin, row, piece))
    if (_continues(live[order][:, [4, 0, 1]]) & (stop[order][:-1] > start[order][1:])).any():
        return False

    # A row and every row: a span meets an earlier one that reaches beyond its start.
    if every_row.any() and not every_row.all():
        order = np.lexsort((start, origin, piece))
        group = np.concatenate([[0], np.cumsum(~_continues(live[order][:, [4, 1]]))]) << 32
        begin, end, wild = group + start[order] + OPEN, group + stop[order] + OPEN, every_row[order]
        for reaching, meeting in ((wild, ~wild), (~wild, wild)):
            reach = np.maximum.accumulate(np.where(reaching, end, 0))
            if (meeting & (reach > begin)).any():
                return False

    if everywhere.any():
        _, piece = np.unique(piece, return_inverse=True)
        _, place, count = np.unique((piece << 32) + row + 1, return_inverse=True, return_counts=True)
        wild = np.bincount(piece, every_row)[piece] > 0
        met = np.where(every_row, np.bincount(piece)[piece] > 1, wild | (count[place] > 1))
        return not (everywhere & met).any()
    return True


def _continues(keys: np.ndarray) -> np.ndarray:
    """Of each row of `keys` but the first, whether it equals the one before."""
    return (keys[1:] == keys[:-1]).all(1)
