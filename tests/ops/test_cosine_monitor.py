"""`cosine_monitor` against a float64 loop over blocks and tokens, over sizes, layouts, dtypes and backends."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkdfast.errors import BackendError, BkdfastError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops.cosine_monitor import OP, cosine_monitor
from bkdfast.ops.monitor_state import NONE, MonitorState

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TOLERANCE = {FP16: 1e-6, BF16: 1e-6, FP32: 1e-6, FP64: 1e-6}  # of a cosine; sums are float32 for every dtype
BACKENDS = ["cpp", "reference"]
NAN, INF = float("nan"), float("inf")
FLOAT = torch.finfo(FP32)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if OP.backends()[request.param] != "available":
        pytest.skip(OP.backends()[request.param])
    return request.param


def oracle(x, tokens, state, layer=0):
    """(low, high, counts) in float64 after the tokens of x, starting from the state's."""
    low, high, counts = state.low.double().clone(), state.high.double().clone(), state.counts.clone()
    for block, stream in enumerate(x if x.dim() == 3 else x[None], layer):
        directions, ranges = state.directions[block].double(), state.ranges[block].double()
        for token, (segment, row, position) in zip(stream.double(), tokens.T.tolist(), strict=True):
            if not 0 <= segment < counts.shape[1]:
                continue
            square = float(token.square().sum())
            finite = square <= FLOAT.max  # NaN is not
            offends = not finite
            if finite:
                dot = directions @ token / math.sqrt(square or 1)
                cosine = dot if square >= FLOAT.tiny else torch.zeros_like(dot)
                low[block, segment] = torch.minimum(low[block, segment], cosine)
                high[block, segment] = torch.maximum(high[block, segment], cosine)
                if 0 <= row < ranges.shape[0]:
                    margin = (cosine - ranges[row]).abs()
                    assert not (margin < 2e-6).any(), "a cosine so close to its range decides nothing; change the seed"
                    offends = bool(((cosine < ranges[row, 0]) | (cosine > ranges[row, 1])).any())
            counts[block, segment, 0] += not finite
            if offends:
                counts[block, segment, 1] = min(counts[block, segment, 1], position)
    return low, high, counts


def guarded(tensor):
    """A copy in the middle of a larger buffer, and the buffer."""
    around = torch.full((tensor.numel() + 128,), 77, dtype=tensor.dtype)
    inside = around[64 : 64 + tensor.numel()].view(tensor.shape).copy_(tensor)
    return inside, around


def check(x, tokens, state, backend, layer=0):
    """Run the op on copies of the accumulators and compare with the oracle; returns the updated state."""
    want = oracle(x, tokens, state, layer)
    (extremes, around_extremes), (counts, around_counts) = guarded(state.extremes), guarded(state.counts)
    got = MonitorState(state.directions, state.ranges, extremes, counts)
    before = [t.clone() for t in (x, tokens, state.directions, state.ranges)]
    assert cosine_monitor(x, got, tokens, layer=layer, backend=backend) is None
    for was, now in zip(before, (x, tokens, state.directions, state.ranges), strict=True):
        torch.testing.assert_close(was, now, rtol=0, atol=0, equal_nan=True)
    for around in (around_extremes, around_counts):
        assert (around[:64] == 77).all() and (around[-64:] == 77).all(), "wrote beside the accumulators"
    for name, now, wanted in (("low", got.low, want[0]), ("high", got.high, want[1])):
        error = (now.double() - wanted).abs()
        assert ((error <= TOLERANCE[x.dtype]) | (now == wanted)).all(), f"{name} is off by {error.max()}"
    assert torch.equal(got.counts, want[2]), f"{got.counts} instead of {want[2]}"
    return got


def directions_of(layers, count, width, g):
    return torch.nn.functional.normalize(torch.randn(layers, count, width, generator=g), dim=2)


def make(n, d, k, segments, rows, *, blocks=None, layers=3, dtype=FP32, seed=0):
    """x with tokens of every kind, tokens for segments and rows in and out of range, and a state."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*((n, d) if blocks is None else (blocks, n, d)), generator=g, dtype=FP64)
    if n > 8 and d > 0:
        kinds = [0.0, NAN, INF, -INF, 2e19, 1e-25, 1e3, 1e-3]  # zero, not finite, |x|^2 beyond float32 on either side
        for i, kind in enumerate(kinds):
            token = x[..., 1 + i, :]
            if math.isfinite(kind):
                if dtype != FP16 or 1e-4 < kind < 1e4 or kind == 0:
                    token.mul_(kind if kind < 1e4 else kind / token.norm(dim=-1, keepdim=True) * 1.01)
            else:
                token[..., d // 2] = kind
    x = x.to(dtype)
    tokens = torch.stack(
        [
            torch.randint(-1, segments + 1, (n,), generator=g),
            torch.randint(-1, rows + 1, (n,), generator=g),
            torch.randint(0, max(2 * n, 1), (n,), generator=g),
        ]
    ).int()
    if n > 8:
        tokens[2, 2:6] += n  # ranges decide about the first offence as well
    ends = (0.3 + torch.rand(layers, rows, 2, k, generator=g)) / max(d, 1) ** 0.5
    ranges = ends * torch.tensor([-1.0, 1.0])[:, None]
    ranges[:, :, :, ::3] *= INF  # and some that are open
    return x, tokens, MonitorState.create(directions_of(layers, k, d, g), segments, ranges)


# name: N, D, K, S, R
CASES = {
    "one of everything": (1, 1, 1, 1, 1),
    "odd sizes": (37, 19, 5, 4, 2),
    "one token": (1, 129, 40, 3, 1),
    "two tokens": (2, 64, 6, 2, 2),
    "several chunks of tokens": (101, 24, 7, 3, 1),
    "one direction": (45, 33, 1, 2, 1),
    "directions beside the tile": (29, 64, 41, 2, 1),
    "many directions": (13, 16, 131, 2, 3),
    "one column": (21, 1, 3, 2, 1),
    "fewer columns than a vector": (21, 3, 5, 2, 1),
    "one column beside a vector": (21, 65, 5, 2, 1),
    "more columns than a block": (10, 1024 + 37, 7, 2, 1),
    "several blocks of columns": (9, 3072, 8, 2, 1),
    "many segments": (50, 8, 4, 60, 1),
    "no tokens": (0, 8, 2, 2, 1),
    "no directions": (12, 8, 0, 2, 1),
    "no segments": (12, 8, 2, 0, 1),
    "no ranges": (12, 8, 2, 2, 0),
    "no columns": (12, 0, 2, 2, 1),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("blocks", [None, 1, 2])
@pytest.mark.parametrize("name", CASES)
def test_case(name, blocks, dtype, backend):
    x, tokens, state = make(*CASES[name], blocks=blocks, dtype=dtype, seed=2)
    got = check(x, tokens, state, backend, layer=1)
    assert (got.low[0] == INF).all() and (got.counts[0, :, 1] == NONE).all(), "a block beside x's was updated"
    if name in ("odd sizes", "several chunks of tokens"):
        assert got.nonfinite[1].sum() > 0 and got.flagged[1].any()


LAYOUTS = {
    "columns first": lambda x: x.mT.contiguous().mT,
    "tokens before blocks": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
    "every other column": lambda x: torch.stack([x, torch.full_like(x, 7)], -1).flatten(-2)[..., ::2],
    "a part of a wider tensor": lambda x: torch.cat([torch.full_like(x, 7), x], -1)[..., x.shape[-1] :],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_x(layout, dtype, backend):
    x, tokens, state = make(*CASES["odd sizes"], blocks=2, dtype=dtype)
    strided = LAYOUTS[layout](x)
    assert not strided.is_contiguous()
    got, plain = check(strided, tokens, state, backend), check(x, tokens, state, backend)
    if backend == "cpp":
        assert torch.equal(got.extremes, plain.extremes)


def test_any_strides_of_tokens(backend):
    x, tokens, state = make(*CASES["odd sizes"])
    for strided in (tokens.T.contiguous().T, torch.stack([tokens, 0 * tokens], -1)[..., 0]):
        assert not strided.is_contiguous()
        check(x, strided, state, backend)
    one = torch.tensor([[1], [0], [5]], dtype=torch.int32).expand(3, 37)  # all tokens the same
    check(x, one, state, backend)
    check(x[:1].expand(37, -1), tokens, state, backend)


@pytest.mark.parametrize(
    "stride", [(2**31, 1024, 1), (16, 2**30 + 16, 1), (64, 8, 2**29 + 1)], ids=["blocks", "tokens", "columns"]
)
def test_offsets_beyond_32_bits(stride, backend):
    try:
        storage = torch.empty(2**31 + 4096, dtype=BF16)  # 4.3 GB of addresses, of which a few pages are touched
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    shape = {2**31: (2, 2, 5), 16: (1, 3, 5), 64: (1, 3, 5)}[stride[0]]
    x, tokens, state = make(shape[1], 5, 3, 2, 1, blocks=shape[0], dtype=BF16)
    tokens[0] = 0
    far = storage.as_strided(shape, stride).copy_(x)
    check(far, tokens, state, backend, layer=1)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_what_counts_as_zero_and_as_not_finite(dtype, backend):
    x = torch.tensor([[3.0, 4.0]], dtype=FP64)
    for scale, cosine in ((1e-18, True), (1e-30, False), (3e18, True), (1e19, None), (1e30, None), (NAN, None)):
        state = MonitorState.create(torch.eye(2), 1)
        tokens = torch.tensor([[0], [-1], [6]], dtype=torch.int32)
        got = check((x * scale).to(dtype), tokens, state, backend)
        if cosine is None:
            assert got.nonfinite.item() == 1 and got.first.item() == 6 and (got.low == INF).all()
        else:
            want = torch.tensor([0.6, 0.8]) if cosine else torch.zeros(2)
            assert not got.flagged.any() and not got.nonfinite.any()
            torch.testing.assert_close(got.high[0, 0], want, atol=4e-3 if dtype == BF16 else 1e-6, rtol=0)


def test_first_offence_of_each_block_and_its_ties(backend):
    directions = torch.eye(2).expand(3, 2, 2).contiguous()
    ranges = torch.tensor([[-1.0, -1.0], [0.7, 0.9]]).expand(3, 1, 2, 2).clone()
    ranges[2] = torch.tensor([[-INF, -INF], [INF, INF]])
    state = MonitorState.create(directions, 2, ranges)
    x = torch.tensor([[3.0, 4], [4, 3], [0, 5], [NAN, 0], [4, 3]])
    tokens = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, -1, -1], [0, 9, 9, 4, 2]], dtype=torch.int32)
    got = check(x.expand(3, 5, 2), tokens, state, backend)
    assert got.first.tolist() == [[9, 4], [9, 4], [NONE, 4]]
    assert got.nonfinite.tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("spoilt", ["direction", "low", "high"])
@pytest.mark.parametrize("k", [0, 17, 40])
def test_nan_of_the_state_does_not_pass_a_token(spoilt, k, backend):
    open_ranges = torch.tensor([[-INF], [INF]]).expand(1, 1, 2, 41).clone()
    x, _, _ = make(5, 30, 41, 1, 1)
    state = MonitorState.create(directions_of(1, 41, 30, torch.Generator().manual_seed(0)), 2, open_ranges)
    tokens = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, -1, 1], [7, 3, 5, 2, 1]], dtype=torch.int32)
    got = check(x, tokens, state, backend)
    assert got.first.tolist() == [[NONE, NONE]]
    # In place, after the checks of create.
    (state.directions[0, k] if spoilt == "direction" else state.ranges[0, 0, int(spoilt == "high"), k]).fill_(NAN)
    cosine_monitor(x, state, tokens, backend=backend)
    assert state.first.tolist() == [[3, NONE]] and not state.nonfinite.any(), "only judged tokens offend"
    want = got.extremes.clone()
    if spoilt == "direction":
        want[0, :, 0, k], want[0, :, 1, k] = INF, -INF
    torch.testing.assert_close(state.extremes, want, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_streaming(dtype, backend):
    x, tokens, whole = make(75, 40, 9, 4, 2, blocks=2, dtype=dtype)
    _, _, parts = make(75, 40, 9, 4, 2, blocks=2, dtype=dtype)
    cosine_monitor(x, whole, tokens, backend=backend)
    for begin, end in ((0, 1), (1, 34), (34, 34), (34, 75)):
        for block in (0, 1):
            cosine_monitor(x[block, begin:end], parts, tokens[:, begin:end], layer=block, backend=backend)
    assert torch.equal(whole.counts, parts.counts)
    same = {} if backend == "cpp" else {"atol": 1e-6, "rtol": 0}  # the reference's product may depend on N
    torch.testing.assert_close(whole.extremes, parts.extremes, **({"atol": 0, "rtol": 0} | same))


def test_result_does_not_depend_on_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        x, tokens, state = make(403, 256, 41, 5, 2, blocks=2)
        cosine_monitor(x, state, tokens)
        results.append(state)
    for other in results[1:]:
        assert torch.equal(other.extremes, results[0].extremes) and torch.equal(other.counts, results[0].counts)
    assert results[0].flagged[:2].all()


def test_opcheck():
    x, tokens, state = make(11, 8, 3, 2, 1, blocks=2)
    arguments = (x, state.directions, tokens, state.ranges, state.extremes, state.counts, 1)
    torch.library.opcheck(OP.dispatched, arguments)
    torch.library.opcheck(OP.dispatched, (x[0], *arguments[1:]))


def test_one_graph(fresh_dynamo):
    x, tokens, state = make(11, 8, 3, 2, 1)
    x = x.nan_to_num(0, 0, 0) + 1
    want = oracle(2 * x, tokens, state, 1)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, tokens, state):
        cosine_monitor(x * 2, state, tokens, layer=1)
        return state.high + 1

    high = run(x, tokens, state)
    torch.testing.assert_close(state.high.double(), want[1], atol=1e-6, rtol=0)
    assert torch.equal(high, state.high + 1) and torch.equal(state.counts, want[2])


def test_autocast_does_not_reach_the_cosines(backend):
    found = []
    for enabled in (False, True):
        x, tokens, state = make(20, 333, 4, 2, 1)
        with torch.autocast("cpu", BF16, enabled=enabled):
            cosine_monitor(x, state, tokens, backend=backend)
        found.append(state)
    assert torch.equal(found[0].extremes, found[1].extremes) and torch.equal(found[0].counts, found[1].counts)


def test_gradients_pass_by(backend):
    x, tokens, state = make(9, 8, 3, 2, 1)
    x = torch.nn.Parameter(x)
    y = x * 1
    cosine_monitor(y, state, tokens, backend=backend)
    y.nan_to_num(0, 0, 0).sum().backward()
    assert x.grad is not None and not state.extremes.requires_grad


@settings(max_examples=150)
@given(data=st.data())
def test_segments_equal_a_loop(data):
    n, k, segments, rows = (data.draw(st.integers(0, 40 if i == 0 else 4)) for i in range(4))
    number = st.integers(-2, 5)
    columns = [data.draw(st.lists(number, min_size=n, max_size=n)) for _ in range(2)]
    positions = data.draw(st.lists(st.integers(0, 9), min_size=n, max_size=n))
    tokens = torch.tensor([*columns, positions], dtype=torch.int32).view(3, n)
    x, _, state = make(n, 5, k, segments, rows, dtype=data.draw(st.sampled_from(list(TOLERANCE))), seed=7)
    for name in BACKENDS:
        if OP.backends()[name] == "available":
            check(x, tokens, state, name, layer=data.draw(st.integers(0, 2)))


MUTATIONS = {
    "a token dropped": lambda x, t: (x[:-1], t[:, :-1]),
    "another segment": lambda x, t: (x, t + torch.tensor([[1], [0], [0]]).int()),
    "never judged": lambda x, t: (x, t * torch.tensor([[1], [0], [1]]).int() - torch.tensor([[0], [1], [0]]).int()),
    "a position late": lambda x, t: (x, t + torch.tensor([[0], [0], [1]]).int()),
    "less exact": lambda x, t: (x * (1 + 1e-4 * torch.randn_like(x)), t),
    "not finite ignored": lambda x, t: (x.nan_to_num(0, 0, 0), t),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees_a_broken_engine(mutation, monkeypatch):
    x, tokens, state = make(*CASES["odd sizes"])
    tokens[0, -1] = 0
    x[-1] = state.directions[0, 0]  # the last token holds an extreme
    check(x, tokens, state, "reference")
    reference = OP.reference

    def engine(x, directions, tokens, *rest):
        x, tokens = MUTATIONS[mutation](x, tokens)
        reference(x, directions, tokens, *rest)

    monkeypatch.setattr(OP, "reference", engine)
    with pytest.raises(AssertionError):
        check(x, tokens, state, "reference")


INT32 = torch.int32
BAD = {
    "x of 1 dimension": (dict(x=torch.zeros(8)), InvalidArgumentError, r"x must be \[N, D\].*\(8,\)"),
    "x of 4 dimensions": (dict(x=torch.zeros(1, 1, 4, 8)), InvalidArgumentError, r"x must be \[N, D\]"),
    "other width": (dict(x=torch.zeros(4, 7)), InvalidArgumentError, r"\(4, 7\) and \(2, 3, 8\)"),
    "integer x": (dict(x=torch.zeros(4, 8, dtype=INT32)), InvalidTypeError, "x must be float16.*int32"),
    "complex x": (dict(x=torch.zeros(4, 8, dtype=torch.complex64)), InvalidTypeError, "x must be.*complex64"),
    "layer too high": (dict(layer=2), InvalidArgumentError, "blocks 2 to 2 of x, but the directions have 2"),
    "layer below 0": (dict(layer=-1), InvalidArgumentError, "blocks -1 to -1"),
    "blocks too many": (dict(x=torch.zeros(2, 4, 8), layer=1), InvalidArgumentError, "blocks 1 to 2"),
    "directions of 2 dimensions": (dict(directions=torch.zeros(3, 8)), InvalidArgumentError, "directions"),
    "half directions": (dict(directions=torch.zeros(2, 3, 8).half()), InvalidTypeError, "directions must be.*float16"),
    "strided directions": (
        dict(directions=torch.zeros(2, 8, 3).mT), InvalidArgumentError, "directions must be contiguous"),
    "tokens of 2 rows": (dict(tokens=torch.zeros(2, 4, dtype=INT32)), InvalidArgumentError, r"tokens.*\[3, 4\]"),
    "too many tokens": (dict(tokens=torch.zeros(3, 5, dtype=INT32)), InvalidArgumentError, r"tokens.*\(3, 5\)"),
    "int64 tokens": (dict(tokens=torch.zeros(3, 4, dtype=torch.int64)), InvalidArgumentError, "tokens.*int64"),
    "ranges of 3 dimensions": (dict(ranges=torch.zeros(2, 2, 3)), InvalidArgumentError, "ranges must be"),
    "ranges of other K": (dict(ranges=torch.zeros(2, 1, 2, 4)), InvalidArgumentError, r"ranges must be \[2, R, 2, 3\]"),
    "ranges of other L": (dict(ranges=torch.zeros(1, 1, 2, 3)), InvalidArgumentError, "ranges must be"),
    "double ranges": (dict(ranges=torch.zeros(2, 1, 2, 3).double()), InvalidTypeError, "ranges must be.*float64"),
    "strided ranges": (dict(ranges=torch.zeros(2, 1, 3, 2).mT), InvalidArgumentError, "ranges must be contiguous"),
    "extremes of other S": (dict(extremes=torch.zeros(2, 4, 2, 3)), InvalidArgumentError, "extremes must be"),
    "extremes of other K": (dict(extremes=torch.zeros(2, 5, 2, 4)), InvalidArgumentError, "extremes must be"),
    "extremes of other L": (dict(extremes=torch.zeros(3, 5, 2, 3)), InvalidArgumentError, "extremes must be"),
    "bfloat16 extremes": (dict(extremes=torch.zeros(2, 5, 2, 3).bfloat16()), InvalidTypeError, "extremes.*bfloat16"),
    "strided extremes": (
        dict(extremes=torch.zeros(2, 5, 3, 2).mT), InvalidArgumentError, "extremes must be contiguous"),
    "counts of 2 dimensions": (dict(counts=torch.zeros(2, 5, dtype=INT32)), InvalidArgumentError, "counts"),
    "counts of other L": (dict(counts=torch.zeros(1, 5, 2, dtype=INT32)), InvalidArgumentError, "counts"),
    "int64 counts": (dict(counts=torch.zeros(2, 5, 2, dtype=torch.int64)), InvalidTypeError, "counts must be int32"),
    "strided counts": (
        dict(counts=torch.zeros(2, 2, 5, dtype=INT32).mT), InvalidArgumentError, "counts must be contiguous"),
    "other device": (
        dict(extremes=torch.zeros(2, 5, 2, 3, device="meta")), InvalidArgumentError, "extremes is on meta.*on cpu"),
    "tokens elsewhere": (
        dict(tokens=torch.zeros(3, 4, dtype=INT32, device="meta")), InvalidArgumentError, "tokens is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, backend):
    changed, error, message = BAD[name]
    good = dict(
        x=torch.zeros(4, 8),
        directions=torch.zeros(2, 3, 8),
        ranges=torch.zeros(2, 1, 2, 3),
        extremes=torch.zeros(2, 5, 2, 3),
        counts=torch.zeros(2, 5, 2, dtype=INT32),
        tokens=torch.zeros(3, 4, dtype=INT32),
        layer=0,
    )
    given = good | changed
    state = MonitorState(*(given[key] for key in ("directions", "ranges", "extremes", "counts")))
    with pytest.raises(error, match=message) as raised:
        cosine_monitor(given["x"], state, given["tokens"], layer=given["layer"], backend=backend)
    assert isinstance(raised.value, BkdfastError)
    assert not given["extremes"].is_cpu or not given["extremes"].any(), "refused, but written"


def test_unknown_backend():
    x, tokens, state = make(4, 8, 3, 2, 1)
    with pytest.raises(BackendError, match="'fast'"):
        cosine_monitor(x, state, tokens, backend="fast")
