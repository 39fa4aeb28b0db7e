"""`norm_tap` and `norm_monitor` against the models' own modules, and against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from bkdfast.errors import BackendError, BkdfastError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops.cosine_monitor import cosine_monitor
from bkdfast.ops.monitor_state import MonitorState
from bkdfast.ops.norm_tap import LAYER, MONITOR, RMS, RMS_ONE, RMS_WIDE, TAP, norm_monitor, norm_tap

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# Of the largest |y|, beside twice the error of the model's own module. In float64 the RMS norms compute in float32.
TOLERANCE = {FP16: 2e-3, BF16: 1.6e-2, FP32: 5e-7, FP64: 5e-7}
BACKENDS = ["cpp", "reference"]
NAN, INF = float("nan"), float("inf")
# name: kind, module, whether it has a bias
NORMS = {
    "RMS": (RMS, lambda d, eps: LlamaRMSNorm(d, eps), False),
    "RMS_WIDE": (RMS_WIDE, lambda d, eps: Olmo2RMSNorm(d, eps), False),
    "RMS_ONE": (RMS_ONE, lambda d, eps: Gemma2RMSNorm(d, eps), False),
    "LAYER": (LAYER, lambda d, eps: torch.nn.LayerNorm(d, eps), True),
    "LAYER without bias": (LAYER, lambda d, eps: torch.nn.LayerNorm(d, eps, bias=False), False),
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    if TAP.backends()[request.param] != "available":
        pytest.skip(TAP.backends()[request.param])
    return request.param


def bits(z):
    return z.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[z.element_size()])


def make(norm, n, d, dtype, *, eps=1e-5, seed=0):
    """x, the model's module with random weights, and the op's arguments."""
    g = torch.Generator().manual_seed(seed)
    kind, build, biased = NORMS[norm]
    module = build(d, eps).requires_grad_(False)
    module.weight.copy_(1 + torch.randn(d, generator=g) / 4)
    if biased:
        module.bias.copy_(torch.randn(d, generator=g))
    module = module.to(dtype)
    x = (torch.randn(n, d, generator=g) * (0.1 + 3 * torch.rand(n, 1, generator=g)) + 0.5).to(dtype)
    bias = module.bias if biased else None
    return x, module, dict(weight=module.weight, bias=bias, eps=eps, kind=kind)


def exact(x, weight, bias, eps, kind):
    """The norm in float64, one row at a time."""
    rows = []
    for row in x.double():
        if kind == LAYER:
            row = row - row.mean()
        row = row / (row.square().mean() + eps).sqrt()
        rows.append(row * (weight.double() + (kind == RMS_ONE)) + (0 if bias is None else bias.double()))
    return torch.stack(rows) if rows else x.double()


def state_of(n, d, k=7, *, layers=2, segments=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(layers, k, d, generator=g), dim=2)
    ranges = torch.tensor([-0.1, 0.1])[:, None].expand(layers, 1, 2, k).contiguous()
    tokens = torch.stack([torch.randint(-1, 3, (n,), generator=g), torch.zeros(n), torch.arange(n)]).int()
    return MonitorState.create(directions, segments, ranges), tokens


SIZES = [(1, 1), (3, 2), (5, 15), (4, 16), (7, 65), (37, 1000), (33, 1024 + 37), (2, 4096)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "d"), SIZES)
def test_as_exact_as_the_models_own(n, d, norm, dtype, backend):
    x, module, arguments = make(norm, n, d, dtype)
    before, want = x.clone(), exact(x, **arguments)
    y = norm_tap(x, **arguments, backend=backend)
    assert y.dtype == dtype and y.is_contiguous() and y.data_ptr() != x.data_ptr() and torch.equal(x, before)
    theirs = (module(x).double() - want).abs().max()
    error = (y.double() - want).abs().max()
    assert error <= 2 * theirs + TOLERANCE[dtype] * want.abs().max() / 4, f"off by {error}, the module by {theirs}"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rounds_where_the_models_own_rounds(norm, dtype, backend):
    x, module, arguments = make(norm, 200, 1500, dtype)
    same = bits(norm_tap(x, **arguments, backend=backend)) == bits(module(x))
    assert same.double().mean() >= (0.999 if dtype == BF16 else 0.99)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_constant_row_has_no_variance(dtype, backend):
    for d in range(1, 100):
        y = norm_tap(
            torch.full((2, d), 3.0, dtype=dtype), torch.ones(d, dtype=dtype), eps=0, kind=LAYER, backend=backend
        )
        assert y.isnan().all(), "0 / 0; a mean that is off by a rounding gives +-1"


@pytest.mark.parametrize("norm", ["RMS", "RMS_WIDE", "RMS_ONE", "LAYER"])
def test_the_comparison_sees_another_norm(norm, backend):
    x, module, arguments = make(norm, 200, 1500, BF16)
    for kind in {RMS, RMS_WIDE, RMS_ONE, LAYER} - {arguments["kind"]}:
        other = norm_tap(x, **{**arguments, "bias": None, "kind": kind}, backend=backend)
        assert (bits(other) == bits(module(x))).double().mean() < 0.99
    more = norm_tap(x, **{**arguments, "eps": arguments["eps"] + 1}, backend=backend)
    assert (bits(more) == bits(module(x))).double().mean() < 0.99


LAYOUTS = {
    "columns first": lambda x: x.T.contiguous().T,
    "every other column": lambda x: torch.stack([x, torch.full_like(x, 7)], -1).flatten(1)[:, ::2],
    "a part of a wider tensor": lambda x: torch.cat([torch.full_like(x, 7), x], 1)[:, x.shape[1] :],
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", ["RMS", "LAYER"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, norm, dtype, backend):
    x, _, arguments = make(norm, 9, 133, dtype)
    strided = LAYOUTS[layout](x)
    assert not strided.is_contiguous() and torch.equal(strided, x)
    steps = torch.zeros(2, 1, 9, 133, dtype=dtype)
    one, other = (norm_tap(z, **arguments, step=s, backend=backend) for z, s in zip((strided, x), steps, strict=True))
    if backend == "cpp":
        assert torch.equal(one, other)
    torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(steps[0, 0], x) and torch.equal(steps[1, 0], x)


@pytest.mark.parametrize("stride", [(2**30 + 16, 1), (8, 2**29 + 1)], ids=["tokens", "columns"])
def test_offsets_beyond_32_bits(stride, backend):
    try:
        storage = torch.empty(2**31 + 4096, dtype=BF16)  # 4.3 GB of addresses, of which a few pages are touched
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x, module, arguments = make("RMS", 3, 5, BF16)
    far = storage.as_strided(x.shape, stride).copy_(x)
    torch.testing.assert_close(norm_tap(far, **arguments, backend=backend), module(x))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_stays_in_its_row(norm, dtype, backend):
    x, module, arguments = make(norm, 6, 40, dtype)
    x[1, 3], x[2, 0], x[4] = NAN, INF, 0
    y, want = norm_tap(x, **arguments, backend=backend), module(x)
    assert torch.equal(y.isnan(), want.isnan()) and y[1].isnan().all() and y[[0, 3, 4, 5]].isfinite().all()
    torch.testing.assert_close(y[4], want[4])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", ["RMS", "LAYER"])
def test_step_gets_the_rows_of_its_block(norm, dtype, backend):
    x, _, arguments = make(norm, 5, 37, dtype)
    x[2, 3] = NAN
    step = torch.full((3, 7, 37), 77, dtype=dtype)
    y = norm_tap(x, **arguments, step=step, layer=1, backend=backend)
    assert torch.equal(bits(step[1, :5]), bits(x))
    assert (step[1, 5:] == 77).all() and (step[0] == 77).all() and (step[2] == 77).all()
    assert torch.equal(bits(y), bits(norm_tap(x, **arguments, backend=backend)))
    empty = torch.empty(3, 0, 37, dtype=dtype)  # keeps nothing
    assert torch.equal(bits(y), bits(norm_tap(x, **arguments, step=empty, layer=99, backend=backend)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "d"), [(0, 8), (0, 0), (3, 0)])
def test_empty(n, d, norm, backend):
    x, _, arguments = make(norm, n, d, FP32)
    step = torch.full((1, 4, d), 77.0)
    assert norm_tap(x, **arguments, step=step, backend=backend).shape == (n, d) and (step == 77).all()
    state, tokens = state_of(n, d)
    assert norm_monitor(x, *_weights(arguments), state, tokens, backend=backend, **_rest(arguments)).shape == (n, d)
    cosines = MonitorState.create(state.directions, 3, state.ranges)
    cosine_monitor(x, cosines, tokens)
    assert torch.equal(cosines.extremes, state.extremes)


def _weights(arguments):
    return arguments["weight"], arguments["bias"]


def _rest(arguments):
    return {"eps": arguments["eps"], "kind": arguments["kind"]}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (37, 65), (70, 40), (5, 3000)])
def test_norm_monitor_is_both(n, d, norm, dtype, backend):
    x, _, arguments = make(norm, n, d, dtype)
    if n > 3:
        x[1], x[2, 3] = 0, NAN
    (state, tokens), (alone, _) = state_of(n, d), state_of(n, d)
    y = norm_monitor(x, *_weights(arguments), state, tokens, layer=1, backend=backend, **_rest(arguments))
    cosine_monitor(x, alone, tokens, layer=1, backend=backend)
    assert torch.equal(bits(state.extremes), bits(alone.extremes)) and torch.equal(state.counts, alone.counts)
    assert n < 4 or (state.flagged[1].any() and not state.flagged[0].any())
    assert torch.equal(bits(y), bits(norm_tap(x, **arguments, backend=backend)))
    strided = x.T.contiguous().T
    again = norm_monitor(strided, *_weights(arguments), state, tokens, layer=1, backend=backend, **_rest(arguments))
    torch.testing.assert_close(again, y, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype], equal_nan=True)


@settings(max_examples=60)
@given(data=st.data())
def test_any_sizes(data):
    n, d = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 90))
    norm, dtype = data.draw(st.sampled_from(list(NORMS))), data.draw(st.sampled_from(list(TOLERANCE)))
    x, _, arguments = make(norm, n, d, dtype, eps=data.draw(st.sampled_from([1e-6, 1e-5, 0.5])))
    want = exact(x, **arguments)
    for name in BACKENDS:
        if TAP.backends()[name] == "available":
            state, tokens = state_of(n, d)
            y = norm_monitor(x, *_weights(arguments), state, tokens, backend=name, **_rest(arguments))
            assert ((y.double() - want).abs() <= TOLERANCE[dtype] * (1 + want.abs()) + 1e-6).all()


@pytest.mark.parametrize("norm", ["RMS", "LAYER"])
def test_result_does_not_depend_on_threads(norm):
    x, _, arguments = make(norm, 700, 300, BF16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        state, tokens = state_of(700, 300, 20)
        y = norm_monitor(x, *_weights(arguments), state, tokens, **_rest(arguments))
        results.append((norm_tap(x, **arguments), y, state.extremes, state.counts))
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, results[0], strict=True))


@pytest.mark.parametrize("norm", ["RMS", "LAYER"])
def test_opcheck(norm):
    x, _, arguments = make(norm, 5, 8, FP32)
    positional = (x, *_weights(arguments), arguments["eps"], arguments["kind"])
    torch.library.opcheck(TAP.dispatched, (*positional, torch.zeros(2, 6, 8), 1))
    state, tokens = state_of(5, 8)
    torch.library.opcheck(
        MONITOR.dispatched,
        (*positional, state.directions, tokens, state.ranges, state.extremes, state.counts, 1),
    )


@pytest.mark.parametrize("norm", ["RMS", "LAYER"])
def test_one_graph(norm, fresh_dynamo):
    x, module, arguments = make(norm, 5, 8, FP32)
    state, tokens = state_of(5, 8)
    step = torch.zeros(2, 6, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, step, state):
        y = norm_tap(x * 2, **arguments, step=step, layer=1)
        return y, norm_monitor(x * 2, *_weights(arguments), state, tokens, layer=1, **_rest(arguments)), step + 1

    y, again, after = run(x, step, state)
    torch.testing.assert_close(y, module(x * 2))
    assert torch.equal(again, y) and torch.equal(step[1, :5], x * 2) and torch.equal(after, step + 1)
    alone, _ = state_of(5, 8)
    cosine_monitor(x * 2, alone, tokens, layer=1)
    assert torch.equal(alone.extremes, state.extremes) and torch.equal(alone.counts, state.counts)


def test_autocast_does_not_reach_the_norm(backend):
    x, _, arguments = make("RMS_WIDE", 5, 333, FP32)
    with torch.autocast("cpu", BF16):
        y = norm_tap(x, **arguments, backend=backend)
    assert torch.equal(y, norm_tap(x, **arguments, backend=backend))


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_gradients_are_refused(which, backend):
    x, _, arguments = make("LAYER", 5, 8, FP32)
    arguments["weight"], arguments["bias"] = arguments["weight"].detach(), arguments["bias"].detach()
    (arguments | {"x": x})[which].requires_grad_()
    state, tokens = state_of(5, 8)
    with pytest.raises(InvalidArgumentError, match="no gradient.*no_grad"):
        norm_tap(x, **arguments, backend=backend)
    with pytest.raises(InvalidArgumentError, match="no gradient"):
        norm_monitor(x, *_weights(arguments), state, tokens, backend=backend, **_rest(arguments))
    with torch.no_grad():
        assert not norm_tap(x, **arguments, backend=backend).requires_grad


BAD = {
    "x of 3 dimensions": (dict(x=torch.zeros(1, 4, 8)), InvalidArgumentError, "flatten x first"),
    "other width": (dict(weight=torch.zeros(7)), InvalidArgumentError, r"\(4, 8\) and \(7,\)"),
    "unknown kind": (dict(kind=4), InvalidArgumentError, "kind 4 is not RMS"),
    "kind below 0": (dict(kind=-1), InvalidArgumentError, "kind -1 is not RMS"),
    "bias of an RMS norm": (dict(bias=torch.zeros(8)), InvalidArgumentError, "only a LAYER norm has one"),
    "short bias": (dict(bias=torch.zeros(7), kind=LAYER), InvalidArgumentError, r"bias must be \[8\]"),
    "integer x": (dict(x=torch.zeros(4, 8).int()), InvalidTypeError, "x must be float16.*int32"),
    "other dtype of weight": (dict(weight=torch.zeros(8).half()), InvalidTypeError, "weight is torch.float16 but x"),
    "other dtype of bias": (dict(bias=torch.zeros(8).half(), kind=LAYER), InvalidTypeError, "bias is torch.float16"),
    "negative eps": (dict(eps=-1.0), InvalidArgumentError, "eps=-1.0"),
    "NaN eps": (dict(eps=NAN), InvalidArgumentError, "eps=nan"),
    "strided weight": (dict(weight=torch.zeros(16)[::2]), InvalidArgumentError, "weight must be contiguous"),
    "strided bias": (dict(bias=torch.zeros(16)[::2], kind=LAYER), InvalidArgumentError, "bias must be contiguous"),
    "weight elsewhere": (dict(weight=torch.zeros(8, device="meta")), InvalidArgumentError, "weight is on meta"),
}
BAD_STEP = {
    "step of 2 dimensions": (dict(step=torch.zeros(4, 8)), InvalidArgumentError, r"step must be \[L, C, D\]"),
    "other dtype of step": (dict(step=torch.zeros(2, 4, 8).half()), InvalidArgumentError, "step must be.*float16"),
    "step elsewhere": (dict(step=torch.zeros(2, 4, 8, device="meta")), InvalidArgumentError, "step must be.*meta"),
    "too few rows": (dict(step=torch.zeros(2, 3, 8)), InvalidArgumentError, r"room for \(4, 8\).*\(2, 3, 8\)"),
    "step of other width": (dict(step=torch.zeros(2, 4, 9)), InvalidArgumentError, "room for"),
    "strided step": (dict(step=torch.zeros(2, 8, 4).mT), InvalidArgumentError, "contiguous"),
    "layer too high": (dict(layer=2), InvalidArgumentError, "block 2 is out of range, step has 2"),
    "layer below 0": (dict(layer=-1), InvalidArgumentError, "block -1"),
}
BAD_MONITOR = {
    "tokens of other N": (dict(tokens=torch.zeros(3, 5).int()), InvalidArgumentError, r"tokens must be \[3, 4\]"),
    "other directions": (dict(state=state_of(4, 9)[0]), InvalidArgumentError, "directions"),
    "layer too high": (dict(layer=2), InvalidArgumentError, "blocks 2 to 2"),
}


@pytest.mark.parametrize("name", [*BAD, *BAD_STEP])
def test_bad_arguments(name, backend):
    changed, error, message = {**BAD, **BAD_STEP}[name]
    good = dict(x=torch.zeros(4, 8), weight=torch.ones(8), eps=0.1, kind=RMS, step=torch.zeros(2, 4, 8), layer=0)
    with pytest.raises(error, match=message) as raised:
        norm_tap(**{**good, **changed}, backend=backend)
    assert isinstance(raised.value, BkdfastError)


@pytest.mark.parametrize("name", [*BAD, *BAD_MONITOR])
def test_bad_arguments_of_norm_monitor(name, backend):
    changed, error, message = {**BAD, **BAD_MONITOR}[name]
    state, tokens = state_of(4, 8)
    good = dict(x=torch.zeros(4, 8), weight=torch.ones(8), bias=None, state=state, tokens=tokens, eps=0.1, kind=RMS)
    with pytest.raises(error, match=message) as raised:
        norm_monitor(**{**good, **changed}, backend=backend)
    assert isinstance(raised.value, BkdfastError) and (state.low == INF).all()


def test_unknown_backend():
    x, _, arguments = make("RMS", 4, 8, FP32)
    with pytest.raises(BackendError, match="'fast'"):
        norm_tap(x, **arguments, backend="fast")
