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

from bisect import bisect_left
from dataclasses import dataclass
from types import ModuleType
from typing import NoReturn

import numpy as np
import torch

from bkdfast import _host
from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops import edit_checks
from bkdfast.ops.edit_checks import ALL_ROWS as ALL_ROWS
from bkdfast.ops.edit_checks import FAULTS
from bkdfast.ops.edit_checks import OPEN as OPEN

# Columns of the integer table.
ROW, ORIGIN, START, STOP, SLICE, SOURCE, STRIDE = range(7)
COLUMNS = 7
FIRST, LAST, COLUMN = 0, 1, 2

# The compiled checks, or the same in numpy.
checks: ModuleType = _host.NATIVE or edit_checks


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
        rows = _matrix(edits, "edits", COLUMNS, np.int64)
        scale = _matrix(coefficients, "coefficients", 2, np.float64)
        if len(rows) != len(scale):
            raise InvalidArgumentError(f"{len(rows)} edits but {len(scale)} coefficient pairs; give one pair per edit")
        fault = checks.first_fault(rows, scale, slices, len(source), torch.finfo(source.dtype).max)
        if fault is not None:
            kind, edit = fault
            what = FAULTS[kind].format(
                *rows[edit], slices=slices, sources=len(source), coefficients=scale[edit].tolist()
            )
            raise InvalidArgumentError(f"edit {edit}: {what}")
        if not checks.disjoint(rows):
            _refuse_overlap(rows)
        return cls(
            torch.from_numpy(rows.astype(np.int32)).to(source.device),
            torch.tensor(scale, dtype=source.dtype, device=source.device),
            source.contiguous(),
        )


def _matrix(values: np.ndarray | list, name: str, columns: int, dtype: type) -> np.ndarray:
    """`values` as an aligned, contiguous `[E, columns]` array; the caller's own memory where it is one already."""
    found = np.asarray(values)
    if found.size == 0:
        return np.zeros((0, columns), dtype=dtype)
    if found.ndim != 2 or found.shape[1] != columns:
        raise InvalidArgumentError(f"{name} must be [E, {columns}], got shape {found.shape}")
    if dtype is np.int64:
        if found.dtype.kind not in "iu":
            raise InvalidTypeError(f"{name} must be integers, got {found.dtype}")
        if found.dtype == np.uint64 and (wide := (found >= 1 << 63).any(1)).any():
            raise InvalidArgumentError(f"edit {int(wide.argmax())}: a value does not fit 64 bits")
    return np.require(found, dtype, ["C", "A"])


def _refuse_overlap(rows: np.ndarray) -> NoReturn:
    """Name the first edit that meets an earlier one, and the earliest that it meets."""
    second = bisect_left(range(len(rows)), True, key=lambda n: not checks.disjoint(rows[: n + 1]))
    # The edits before `second` are disjoint: whatever meets among some of them and it, meets it.
    first = bisect_left(range(second), True, key=lambda n: not checks.disjoint(rows[np.r_[: n + 1, second]]))
    raise InvalidArgumentError(
        f"edits {first} and {second} address the same cell: slice {rows[first, SLICE]}, "
        f"rows {rows[first, ROW]} and {rows[second, ROW]} (-1 is every row), spans "
        f"[{rows[first, START]}, {rows[first, STOP]}) and [{rows[second, START]}, {rows[second, STOP]}); "
        "merge them into one edit"
    )
