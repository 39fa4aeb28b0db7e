"""`MonitorState` and `pack_tokens`: what they refuse, and what they make."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bkdfast.errors import BkdfastError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops.monitor_state import NONE, UNIT_TOLERANCE, MonitorState, pack_tokens

NAN, INF = float("nan"), float("inf")


def test_create_makes_empty_accumulators():
    directions = torch.eye(4)[:3].expand(2, 3, 4)
    ranges = torch.tensor([-0.5, INF])[:, None].expand(2, 5, 2, 3)
    state = MonitorState.create(directions, 6, ranges)
    for tensor, shape, dtype in (
        (state.directions, (2, 3, 4), torch.float32),
        (state.ranges, (2, 5, 2, 3), torch.float32),
        (state.extremes, (2, 6, 2, 3), torch.float32),
        (state.counts, (2, 6, 2), torch.int32),
    ):
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert torch.equal(state.directions, directions) and torch.equal(state.ranges, ranges)
    assert (state.low == INF).all() and (state.high == -INF).all() and (state.nonfinite == 0).all()
    assert (state.first == NONE).all() and not state.flagged.any()


def test_views_and_reset():
    state = MonitorState.create(torch.eye(3), 2)
    assert state.directions.shape == (1, 3, 3) and state.ranges.shape == (1, 0, 2, 3)
    state.low[0, 1, 2], state.high[0, 0, 1], state.nonfinite[0, 1], state.first[0, 0] = -0.5, 0.25, 3, 0
    assert state.extremes[0, 1, 0, 2] == -0.5 and state.extremes[0, 0, 1, 1] == 0.25
    assert state.counts[0].tolist() == [[0, 0], [3, NONE]]
    assert state.flagged.tolist() == [[True, False]]
    before = [t.data_ptr() for t in (state.directions, state.ranges, state.extremes, state.counts)]
    state.reset()
    assert (state.low == INF).all() and (state.high == -INF).all() and state.counts[0].tolist() == [[0, NONE]] * 2
    assert before == [t.data_ptr() for t in (state.directions, state.ranges, state.extremes, state.counts)]


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 3, 0)])
def test_create_empty(shape):
    state = MonitorState.create(torch.zeros(shape), 0)
    assert state.extremes.shape == (shape[0], 0, 2, shape[1])


def test_rows_of_length_1_or_0():
    directions = torch.eye(3)[None].repeat(2, 1, 1)
    directions[1, 1] = 0
    directions[1, 2] *= 1 + 0.9 * UNIT_TOLERANCE
    MonitorState.create(directions, 1)
    for scale in (1 + 1.1 * UNIT_TOLERANCE, 1 - 1.1 * UNIT_TOLERANCE, 1e-3, -2, NAN, INF):
        wrong = directions.clone()
        wrong[1, 2, 2] = scale
        with pytest.raises(InvalidArgumentError, match="direction 2 of block 1 has length.*divide it by its norm"):
            MonitorState.create(wrong, 1)


BAD = {
    "one dimension": (dict(directions=torch.ones(1)), InvalidArgumentError, r"\[L, K, D\] or \[K, D\], got \(1,\)"),
    "float64": (dict(directions=torch.eye(3).double()), InvalidTypeError, "directions must be float32.*float64"),
    "half ranges": (dict(ranges=torch.zeros(1, 1, 2, 3).half()), InvalidTypeError, "ranges must be float32.*float16"),
    "ranges of 3 dimensions": (dict(ranges=torch.zeros(1, 2, 3)), InvalidArgumentError, r"ranges must be \[1, R, 2, 3"),
    "ranges of other L": (dict(ranges=torch.zeros(2, 1, 2, 3)), InvalidArgumentError, r"got \(2, 1, 2, 3\)"),
    "ranges of other K": (dict(ranges=torch.zeros(1, 1, 2, 4)), InvalidArgumentError, r"got \(1, 1, 2, 4\)"),
    "ranges without both ends": (dict(ranges=torch.zeros(1, 1, 1, 3)), InvalidArgumentError, r"got \(1, 1, 1, 3\)"),
    "ranges with NaN": (dict(ranges=torch.full((1, 1, 2, 3), NAN)), InvalidArgumentError, "NaN; use -inf and inf"),
    "ranges elsewhere": (dict(ranges=torch.zeros(1, 1, 2, 3, device="meta")), InvalidArgumentError, "on meta"),
    "negative segments": (dict(segments=-1), InvalidArgumentError, "segments=-1 is negative"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_state(name):
    changed, error, message = BAD[name]
    with pytest.raises(error, match=message) as raised:
        MonitorState.create(**{"directions": torch.eye(3), "segments": 2, **changed})
    assert isinstance(raised.value, BkdfastError)


def test_pack_tokens():
    packed = pack_tokens(torch.tensor([0, -7, 2]), segments=3)
    assert packed.dtype == torch.int32 and packed.is_contiguous()
    assert packed.tolist() == [[0, -1, 2], [-1, -1, -1], [0, 1, 2]]
    rows = torch.tensor([1, -5, 0])
    packed = pack_tokens(
        torch.tensor([0, 1, 1]), segments=2, range_row=rows, range_rows=2, position=torch.tensor([9, 9, NONE - 1])
    )
    assert packed.tolist() == [[0, 1, 1], [1, -1, 0], [9, 9, NONE - 1]]
    assert pack_tokens(torch.tensor([0, 0]), segments=1, range_row=1, range_rows=2)[1].tolist() == [1, 1]
    assert pack_tokens(torch.zeros(0, dtype=torch.int64), segments=0).shape == (3, 0)


BAD_TOKENS = {
    "two dimensions": (dict(segment=torch.zeros(2, 2).long()), InvalidArgumentError, r"segment must be \[N\]"),
    "float segment": (dict(segment=torch.zeros(2)), InvalidTypeError, "segment must be integers.*float32"),
    "bool segment": (dict(segment=torch.zeros(2).bool()), InvalidTypeError, "segment must be integers.*bool"),
    "float row": (dict(range_row=torch.zeros(2)), InvalidTypeError, "range_row must be integers"),
    "float position": (dict(position=torch.zeros(2)), InvalidTypeError, "position must be integers"),
    "rows of other N": (dict(range_row=torch.zeros(3).long()), InvalidArgumentError, r"must be \[2\], got \(3,\)"),
    "positions of other N": (dict(position=torch.zeros(1).long()), InvalidArgumentError, r"\(1,\)"),
    "segment too high": (dict(segment=torch.tensor([0, 2])), InvalidArgumentError, "segment 2 is out of range.*2"),
    "row too high": (dict(range_row=torch.tensor([1, 0])), InvalidArgumentError, "range_row 1 is out of range.*1"),
    "one row too high": (dict(range_row=1), InvalidArgumentError, "range_row 1 is out of range"),
    "position below 0": (dict(position=torch.tensor([0, -1])), InvalidArgumentError, r"position must be in \[0"),
    "position too high": (dict(position=torch.tensor([0, NONE])), InvalidArgumentError, "position must be in"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_bad_tokens(name):
    changed, error, message = BAD_TOKENS[name]
    good = {"segment": torch.tensor([0, 1]), "segments": 2, "range_rows": 1}
    with pytest.raises(error, match=message) as raised:
        pack_tokens(**{**good, **changed})
    assert isinstance(raised.value, BkdfastError)


@given(data=st.data())
def test_packed_tokens_are_what_was_given(data):
    segments, rows = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    n = data.draw(st.integers(0, 8))
    columns = [
        data.draw(st.lists(st.integers(low, high), min_size=n, max_size=n))
        for low, high in ((-3, segments - 1), (-3, rows - 1), (0, NONE - 1))
    ]
    segment, row, position = (torch.tensor(column, dtype=torch.int64) for column in columns)
    packed = pack_tokens(segment, segments=segments, range_row=row, range_rows=rows, position=position)
    assert packed.tolist() == [[max(v, -1) for v in columns[0]], [max(v, -1) for v in columns[1]], columns[2]]
