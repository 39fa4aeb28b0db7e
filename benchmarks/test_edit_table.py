"""`EditTable.pack` of 100,000 edits, with the compiled checks and with the numpy twin.

    python -m pytest benchmarks/test_edit_table.py --benchmark-only

Both must make the same table, and refuse the same pair once two edits meet, before anything is timed. Floor: reading
the edits and writing the table once, some 10 MB.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bkdfast import EditTable, _host
from bkdfast.errors import InvalidArgumentError
from bkdfast.ops import edit_checks, edit_table
from bkdfast.ops.edit_table import ALL_ROWS, OPEN, ORIGIN, ROW, SLICE, START, STOP

EDITS, SLICES, SOURCES = 100_000, 1 << 20, 64


def mixed(rows: np.ndarray, n: np.ndarray) -> None:
    """Slices of three kinds: one edit of every row; 16 rows of 4 spans; 8 rows with a span open on either side."""
    kind = n % 3
    each = np.array([1, 64, 16])[kind]
    at = n // 3 % each
    rows[:, SLICE] = 3 * (n // 3 // each) + kind
    rows[:, ROW] = np.select([kind == 0, kind == 1], [ALL_ROWS, at // 4], at // 2)
    rows[:, START] = np.select([kind == 0, kind == 1], [2, 3 * (at % 4)], np.where(at % 2, 5, -OPEN))
    rows[:, STOP] = np.select([kind == 0, kind == 1], [9, 3 * (at % 4) + 3], np.where(at % 2, OPEN, 5))
    rows[:, ORIGIN] = n // 3 // 64 % 2


def all_rows_of_many_slices(rows: np.ndarray, n: np.ndarray) -> None:
    rows[:, ROW], rows[:, STOP], rows[:, SLICE] = ALL_ROWS, 1, n


def spans_of_one_slice(rows: np.ndarray, n: np.ndarray) -> None:
    """Every other span is of all rows, the ones between are of one row each."""
    rows[:, ROW] = np.where(n % 2, n % 512, ALL_ROWS)
    rows[:, START], rows[:, STOP] = 2 * n, 2 * n + 2


def everywhere(rows: np.ndarray, n: np.ndarray) -> None:
    """Spans without ends: of all rows, alone in their slice, and of single rows that share slices."""
    rows[:, ROW] = np.where(n % 2, n // 2 % 4096, ALL_ROWS)
    rows[:, SLICE] = np.where(n % 2, n // 8192, 100 + n)
    rows[:, START], rows[:, STOP], rows[:, ORIGIN] = -OPEN, OPEN, n % 3


@pytest.fixture(params=[mixed, all_rows_of_many_slices, spans_of_one_slice, everywhere], ids=lambda make: make.__name__)
def edits(request):
    rows = np.zeros((EDITS, 7), dtype=np.int64)
    request.param(rows, np.arange(EDITS))
    return rows[np.random.default_rng(0).permutation(EDITS)]


def pack(edits: np.ndarray) -> EditTable:
    return EditTable.pack(edits, np.full((EDITS, 2), 0.5), torch.zeros(SOURCES, 128), slices=SLICES)


def test_both_agree(edits, monkeypatch):
    answers = []
    spoilt = edits.copy()
    spoilt[60_000] = edits[777]
    for checks in twins():
        monkeypatch.setattr(edit_table, "checks", checks)
        table = pack(edits)
        assert torch.equal(table.table, torch.from_numpy(edits).int())
        with pytest.raises(InvalidArgumentError) as refused:
            pack(spoilt)
        answers.append(str(refused.value))
    assert "edits 777 and 60000" in answers[0] and len(set(answers)) == 1


def twins() -> list:
    return [edit_checks] if _host.NATIVE is None else [edit_checks, _host.NATIVE]


@pytest.mark.parametrize("checks", ["native", "numpy"])
def test_pack(benchmark, edits, checks, monkeypatch):
    if checks == "native" and _host.NATIVE is None:
        pytest.skip(f"bkdfast._native: {_host.WHY_NOT}")
    monkeypatch.setattr(edit_table, "checks", _host.NATIVE if checks == "native" else edit_checks)
    assert len(pack(edits).table) == EDITS
    benchmark(pack, edits)
