"""`EditTable.pack`: what it stores, everything it refuses, and overlap detection against brute force.

Every test runs with the compiled checks and with the numpy twin.
"""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bkdfast import BkdfastError, EditTable, _host, patch_heads
from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops import edit_checks, edit_table
from bkdfast.ops.edit_table import ALL_ROWS, FIRST, LAST, OPEN

ONE = [0, FIRST, 0, 1, 0, 0, 0]
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=["native", "numpy"], autouse=True)
def checks(request, monkeypatch):
    if request.param == "native" and _host.NATIVE is None:
        pytest.skip(f"bkdfast._native: {_host.WHY_NOT}")
    monkeypatch.setattr(edit_table, "checks", _host.NATIVE if request.param == "native" else edit_checks)


def pack(edits, coefficients=None, source=None, slices=4):
    source = torch.zeros(5, 3) if source is None else source
    return EditTable.pack(
        edits, [[0.5, 1.0]] * len(edits) if coefficients is None else coefficients, source, slices=slices
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [list, np.array])
def test_stores_what_it_was_given(dtype, kind):
    edits = [[1, LAST, -3, OPEN, 2, 4, 0], [ALL_ROWS, FIRST, 2, 5, 3, 1, 1]]
    source = torch.randn(5, 3, dtype=dtype).T.contiguous().T  # not contiguous
    table = pack(kind(edits), kind([[0.5, 1.0], [2.0, -1.0]]), source)
    assert table.table.tolist() == edits and table.table.dtype == torch.int32
    assert table.coefficients.tolist() == [[0.5, 1.0], [2.0, -1.0]] and table.coefficients.dtype == dtype
    assert torch.equal(table.source, source)
    assert all(t.is_contiguous() for t in (table.table, table.coefficients, table.source))


@pytest.mark.parametrize("edits", [[], np.zeros((0, 7), dtype=int)])
def test_no_edits(edits):
    table = pack(edits, [])
    assert table.table.shape == (0, 7) and table.coefficients.shape == (0, 2)
    assert torch.equal(patch_heads(torch.ones(2, 2, 12), table), torch.ones(2, 2, 12))


def changed(**columns):
    names = ["row", "origin", "start", "stop", "slice", "source", "stride"]
    return [columns.get(name, value) for name, value in zip(names, ONE, strict=True)]


SLICES = 2**33  # more than the table can address
REFUSED = {
    "slice": (changed(slice=SLICES), f"slice {SLICES} is out of range, there are {SLICES}"),
    "negative slice": (changed(slice=-1), "slice -1 is out of range"),
    "slice of 33 bits": (changed(slice=2**31), "slice 2147483648 does not fit"),
    "row": (changed(row=-2), "row -2 is negative; use -1"),
    "row of 33 bits": (changed(row=2**32), "row 4294967296 does not fit"),
    "span": (changed(start=3, stop=2), r"span \[3, 2\) ends before it starts"),
    "far start": (changed(start=-OPEN - 1), "beyond"),
    "far stop": (changed(stop=OPEN + 1), "beyond"),
    "origin": (changed(origin=128), "origin 128"),
    "negative origin": (changed(origin=-1), "origin -1"),
    "stride": (changed(stride=2), "stride 2 is not 0"),
    "negative stride": (changed(stride=-1), "stride -1 is not 0"),
    "source": (changed(source=5), "source row 5 is out of range, there are 5"),
    "negative source": (changed(source=-1), "source row -1 is out of range"),
    "last source": (changed(stop=4, source=2, stride=1), "source row 2 is out of range, there are 5"),
    "start of 64 bits": (changed(start=-(2**63)), "beyond"),
    "stop of 64 bits": (changed(stop=2**63 - 1), "beyond"),
    "source of 33 bits": (changed(source=2**31), "source row 2147483648 does not fit"),
    "negative source of 33 bits": (changed(source=-(2**31) - 1), "source row -2147483649 does not fit"),
    "source of 64 bits": (changed(stop=9, source=2**63 - 1, stride=1), "source row 9223372036854775807 does not fit"),
    "endless source": (changed(stop=OPEN, stride=1), "source row 0 is out of range"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_out_of_range(name):
    edit, message = REFUSED[name]
    with pytest.raises(InvalidArgumentError, match=f"^edit 1: .*{message}") as raised:
        pack([changed(slice=3), edit], slices=SLICES)
    assert isinstance(raised.value, BkdfastError)


@pytest.mark.parametrize("name", REFUSED)
def test_the_first_edit_is_named(name):
    edit, message = REFUSED[name]
    others = [case[0] for case in REFUSED.values()]
    with pytest.raises(InvalidArgumentError, match=f"^edit 0: .*{message}"):
        pack([edit, *others, ONE, ONE], [[0.0, 1.0]] + [[NAN, 1.0]] * (len(others) + 2), slices=SLICES)


def test_the_cases_have_every_fault():
    """In the order of `FAULTS`, which the compiled checks number by hand; the last one is about coefficients."""
    first_fault, scale = edit_table.checks.first_fault, np.ones((1, 2))
    found = {first_fault(np.array([edit]), scale, SLICES, 5, 1e30)[0] for edit, _ in REFUSED.values()}
    assert found == set(range(len(edit_checks.FAULTS) - 1))


def test_the_limits_themselves_pass():
    edit = changed(slice=2**31 - 1, row=2**31 - 1, start=-OPEN, stop=OPEN, origin=127, source=4)
    assert pack([edit], slices=SLICES).table.tolist() == [edit]
    pack([changed(stop=3, source=2, stride=1)])


@pytest.mark.parametrize(
    "form",
    [
        np.int8,
        np.int32,
        np.uint64,
        ">i8",
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: np.frombuffer(b"-" + a.tobytes(), np.int64, offset=1).reshape(a.shape),  # not aligned, read-only
    ],
)
def test_integers_of_any_layout(form):
    edits = np.array([changed(row=1, source=2), changed(row=2, slice=3)])
    given = form(edits) if callable(form) and not isinstance(form, type) else edits.astype(form)
    assert pack(given).table.tolist() == edits.tolist()


def test_unsigned_integers_do_not_wrap():
    edits = np.array([ONE, ONE], dtype=np.uint64)
    edits[1, 0] = 2**64 - 1  # -1, every row, if it wrapped
    with pytest.raises(InvalidArgumentError, match="edit 1: a value does not fit 64 bits"):
        pack(edits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_table_does_not_share_the_callers_memory(dtype):
    edits, coefficients = np.array([ONE]), np.ones((1, 2))
    table = pack(edits, coefficients, torch.zeros(5, 3, dtype=dtype))
    edits[:], coefficients[:] = 7, 7
    assert table.table.tolist() == [ONE] and table.coefficients.tolist() == [[1, 1]]


def test_an_unread_source_row_is_not_checked():
    assert len(pack([changed(source=99)], [[0.5, 0.0]]).table) == 1
    assert len(pack([changed(start=2, stop=2, source=99)]).table) == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e39])
@pytest.mark.parametrize("place", [0, 1])
def test_coefficients_must_be_finite(bad, place):
    coefficients = [[1.0, 1.0], [1.0, 1.0]]
    coefficients[1][place] = bad
    with pytest.raises(InvalidArgumentError, match="edit 1: coefficients.*finite"):
        pack([ONE, changed(slice=1)], coefficients)
    if bad == 1e39:  # fits float64
        assert (
            pack([ONE, changed(slice=1)], coefficients, torch.zeros(5, 3, dtype=torch.float64)).coefficients.max()
            == bad
        )


MALFORMED = {
    "6 columns": (dict(edits=[[0] * 6]), InvalidArgumentError, r"edits must be \[E, 7\].*\(1, 6\)"),
    "14 columns": (dict(edits=[[0] * 14], coefficients=[[1, 0]] * 2), InvalidArgumentError, r"edits must be \[E, 7\]"),
    "a flat edit": (dict(edits=ONE, coefficients=[[1, 0]]), InvalidArgumentError, r"edits must be \[E, 7\].*\(7,\)"),
    "floats": (dict(edits=[[0, 0, 0.7, 1, 0, 0, 0]]), InvalidTypeError, "edits must be integers, got float64"),
    "3 coefficients": (dict(coefficients=[[0.0, 1.0, 2.0]]), InvalidArgumentError, r"coefficients must be \[E, 2\]"),
    "too few coefficients": (dict(coefficients=[]), InvalidArgumentError, "1 edits but 0 coefficient pairs"),
    "bfloat16": (dict(source=torch.zeros(5, 3).bfloat16()), InvalidTypeError, "source must be float32.*bfloat16"),
    "integers": (dict(source=torch.zeros(5, 3).int()), InvalidTypeError, "source must be float32.*int32"),
    "1-d source": (dict(source=torch.zeros(5)), InvalidArgumentError, r"source must be \[rows, width\].*\(5,\)"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed(name):
    arguments, error, message = MALFORMED[name]
    with pytest.raises(error, match=message):
        pack(**{"edits": [ONE], **arguments})


LOW, HIGH = -7, 7  # bounds are drawn inside; an open end reaches one further


def cells(edit, rows=3):
    row, _, start, stop, piece = edit[:5]
    span = range(max(start, LOW), min(stop, HIGH))
    return {(i, t, piece) for i in (range(rows) if row == ALL_ROWS else [row]) for t in span}


def meet(one, other):
    """Two edits address one cell; of different origins only where one of them spans every position."""
    if one[1] == other[1]:
        return bool(cells(one) & cells(other))
    if all(edit[2] < edit[3] for edit in (one, other)) and any(edit[2:4] == [-OPEN, OPEN] for edit in (one, other)):
        rows = [{0, 1, 2} if edit[0] == ALL_ROWS else {edit[0]} for edit in (one, other)]
        return one[4] == other[4] and bool(rows[0] & rows[1])
    return False


def first_pair(edits):
    """The first edit that meets an earlier one, and the earliest that it meets."""
    pairs = ((i, j) for j in range(len(edits)) for i in range(j) if meet(edits[i], edits[j]))
    return next(pairs, None)


def edits(origins):
    bounds = st.tuples(st.integers(-6, 6), st.integers(-6, 6)).map(sorted)
    ends = st.tuples(bounds, st.sampled_from(["closed"] * 4 + ["start", "stop", "both"])).map(
        lambda drawn: [
            -OPEN if drawn[1] in ("start", "both") else drawn[0][0],
            OPEN if drawn[1] in ("stop", "both") else drawn[0][1],
        ]
    )
    one = st.tuples(st.integers(-1, 2), st.sampled_from(origins), ends, st.integers(0, 3)).map(
        lambda drawn: [drawn[0], drawn[1], *drawn[2], drawn[3], 0, 0]
    )
    return st.lists(one, min_size=1, max_size=6)


@settings(max_examples=1500)
@given(edits([LAST]))
@example([[0, 0, 0, 5, 0, 0, 0], [0, 0, 5, 6, 0, 0, 0]])
@example([[0, 0, 0, 9, 0, 0, 0], [0, 0, 1, 2, 0, 0, 0], [0, 0, 3, 4, 0, 0, 0]])
@example([[0, 0, 2, 2, 0, 0, 0], [0, 0, 0, 5, 0, 0, 0]])
def test_overlaps_equal_brute_force(edits):
    agree(edits)


@settings(max_examples=500)
@given(edits([FIRST, LAST]))
@example([[0, 0, -OPEN, OPEN, 0, 0, 0], [0, 1, 1, 2, 0, 0, 0]])
@example([[-1, 0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0]])
def test_overlaps_of_two_origins(edits):
    agree(edits)


def agree(edits):
    pair = first_pair(edits)
    if pair:
        with pytest.raises(InvalidArgumentError) as raised:
            pack(edits)
        first, second = (edits[i] for i in pair)
        assert str(raised.value) == (
            f"edits {pair[0]} and {pair[1]} address the same cell: slice {first[4]}, rows {first[0]} and {second[0]} "
            f"(-1 is every row), spans [{first[2]}, {first[3]}) and [{second[2]}, {second[3]}); "
            "merge them into one edit"
        )
    else:
        assert pack(edits).table.tolist() == edits


def test_both_outcomes_are_drawn():
    """The property above is worth something only if random tables meet about as often as they do not."""
    g = np.random.default_rng(0)
    outcomes = []
    for _ in range(300):
        spans = np.sort(g.integers(-6, 7, (4, 2)), axis=1)
        outcomes.append(
            first_pair([[int(g.integers(-1, 3)), 0, *map(int, span), int(g.integers(0, 4)), 0, 0] for span in spans])
            is not None
        )
    assert 0.2 < np.mean(outcomes) < 0.9


def test_a_hundred_thousand_edits():
    count = 100_000
    edits = np.zeros((count, 7), dtype=np.int64)
    edits[:, 0], edits[:, 4] = np.arange(count) // 32, np.arange(count) % 32
    edits[:, 3] = 4
    coefficients = np.zeros((count, 2))
    assert len(EditTable.pack(edits, coefficients, torch.zeros(1, 4), slices=32).table) == count
    edits[70_000] = edits[3]
    with pytest.raises(InvalidArgumentError, match="edits 3 and 70000 address the same cell: slice 3"):
        EditTable.pack(edits, coefficients, torch.zeros(1, 4), slices=32)
