"""The compiled checks of edit tables and their numpy twin say the same of every table, word for word."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bkdfast import EditTable, _host
from bkdfast.errors import InvalidArgumentError
from bkdfast.ops import edit_checks, edit_table
from bkdfast.ops.edit_table import ALL_ROWS, OPEN

NO_NATIVE = f"bkdfast._native: {_host.WHY_NOT}"
NUMBERS = [0, 1, -1, -2, 3, 5, 128, OPEN, OPEN + 1, -OPEN - 1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1]
NUMBERS += [2**62, 2**63 - 1, -(2**63)]
FLOATS = [0.0, -0.0, 3e38, 3.5e38, -1e39, float("nan"), float("-inf")]


def pack(edits, coefficients=None, dtype=torch.float32, slices=160):
    coefficients = np.full((len(edits), 2), 0.5) if coefficients is None else coefficients
    return EditTable.pack(edits, coefficients, torch.zeros(5, 3, dtype=dtype), slices=slices)


def tables():
    """(Edits, coefficients): mostly in range, with an odd value in a cell now and then."""
    low, high = [-OPEN, -4, -2, 0, 1, 3], [1, 2, 4, 6, OPEN]
    columns = [
        st.integers(-1, 3),
        st.integers(0, 2),
        st.sampled_from(low),
        st.sampled_from(high),
        st.integers(140, 159),
    ]
    one = st.tuples(*columns, st.integers(0, 2), st.integers(0, 1)).map(list)
    oddities = st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 8), st.sampled_from(NUMBERS), st.sampled_from(FLOATS)), max_size=2
    )

    def spoil(drawn):
        edits, wrong = drawn
        coefficients = [[0.5, float(edit[3] - edit[2] < 9)] for edit in edits]  # open spans read no source
        for edit, column, number, value in wrong:
            if edit < len(edits) and column < 7:
                edits[edit][column] = number
            elif edit < len(edits):
                coefficients[edit][column - 7] = value
        return edits, coefficients

    return st.tuples(st.lists(one, min_size=1, max_size=9), oddities).map(spoil)


def answer(checks, *table):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit_table, "checks", checks)
        try:
            return pack(*table).table.tolist()
        except InvalidArgumentError as error:
            return str(error)


@pytest.mark.skipif(_host.NATIVE is None, reason=NO_NATIVE)
def test_the_same_answer():
    seen = Counter()

    @settings(max_examples=3000)
    @given(tables(), st.sampled_from([torch.float32, torch.float64]), st.sampled_from([160, 2**33]))
    @example(([[0, 0, 0, 1, 2**31, 0, 0]], [[0.5, 0.5]]), torch.float32, 2**33)  # rare among the drawn ones
    @example(([[-2, 0, 0, 1, 2**31, 0, 0]], [[0.5, 0.5]]), torch.float32, 2**33)
    def same(table, dtype, slices):
        compiled = answer(_host.NATIVE, *table, dtype, slices)
        assert answer(edit_checks, *table, dtype, slices) == compiled
        seen["packed" if isinstance(compiled, list) else compiled.split()[0]] += 1

    same()
    # Worth something only if tables are packed, refused for a value ("edit") and for a pair ("edits").
    assert all(seen[kind] > 0.1 * seen.total() for kind in ("packed", "edit", "edits")), seen


@pytest.mark.parametrize("checks", [edit_checks, _host.NATIVE], ids=["numpy", "native"])
@pytest.mark.parametrize("seed", range(20))
def test_large_tables(checks, seed, monkeypatch):
    """Thousands of disjoint edits of all kinds, shuffled; then two of them moved onto each other."""
    if checks is None:
        pytest.skip(NO_NATIVE)
    monkeypatch.setattr(edit_table, "checks", checks)
    g = np.random.default_rng(seed)
    edits = []
    for piece in range(40):
        for origin in range(3):
            at = -50
            while at < 50:
                stop = at + int(g.integers(1, 6))
                rows = [ALL_ROWS] if g.random() < 0.3 else range(int(g.integers(1, 5)))
                edits += [[row, origin, at, stop, piece, 0, 0] for row in rows]
                at = stop + int(g.integers(0, 2))
    edits += [[row, int(g.integers(3)), -OPEN, OPEN, 100, 0, 0] for row in range(60)]
    edits += [[ALL_ROWS, int(g.integers(3)), -OPEN, OPEN, piece, 0, 0] for piece in range(101, 160)]
    edits = g.permutation(np.array(edits))
    assert pack(edits).table.tolist() == edits.tolist()
    first, second = sorted(g.choice(len(edits), 2, replace=False))
    moved = edits.copy()
    moved[second, :5] = edits[first, :5]
    if g.random() < 0.5:
        moved[second, 0] = ALL_ROWS
    else:
        moved[second, 2:4] = -OPEN, OPEN
    met = [i for i in range(len(moved)) if i != second and clash(moved[i], moved[second])]
    # The others are disjoint: the pair holds the moved edit, which comes last unless all that it meets come after it.
    expected = (min(met), second) if min(met) < second else (second, min(met))
    with pytest.raises(InvalidArgumentError, match=f"^edits {expected[0]} and {expected[1]} address"):
        pack(moved)


def clash(one, other):
    """Two edits address one cell, as far as the table tells."""
    rows = one[0] == other[0] or ALL_ROWS in (one[0], other[0])
    overlap = one[1] == other[1] and one[2] < other[3] and other[2] < one[3]
    return one[4] == other[4] and rows and (overlap or any(tuple(e[2:4]) == (-OPEN, OPEN) for e in (one, other)))
