"""The kernels of a GPU, Triton's and the compiled ones, on the interpreter's cases and on larger ones.

opcheck and `torch.compile` go through the dispatcher and so test the backend that serves; a second run with
`BKDFAST_BACKEND=triton` tests Triton's there.

Where the CUDA kernels were built, a backend that does not serve is a failure, not a skip.
"""

import random

import pytest
import torch

from bkdfast.ops import cosine_monitor, delta_sketch, norm_tap, patch_heads, prefix_attention
from bkdfast.ops._library import EXTENSION, FORCED
from bkdfast.ops.monitor_state import NONE
from tests.kernels.attention_cases import (
    ATTENTION_LAYOUTS,
    ATTENTIONS,
    attention,
    check_attention,
    check_poisoned,
)
from tests.kernels.cases import (
    ADD,
    BF16,
    EDIT_LAYOUTS,
    EDITS,
    FP16,
    FP32,
    FP64,
    MIX,
    NAN,
    NORMS,
    PATCH,
    SKETCH_DTYPES,
    SKETCHES,
    TOKEN_LAYOUTS,
    TOKENS,
    check_edits,
    check_nan,
    check_norm,
    check_sketch,
    check_tokens,
    edits,
    move,
    norm,
    random_edits,
    sketch,
    storage,
    tiny_norm,
    tokens,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
DTYPES = [FP32, FP16, BF16, FP64]
EDIT, COSINE, TAP, MONITOR, SKETCH = patch_heads._op, cosine_monitor.OP, norm_tap.TAP, norm_tap.MONITOR, delta_sketch.OP
ATTENTION = prefix_attention.OP
FUSED = [  # also rows of whole 16-byte vectors, at prefill and at decode
    (40, 70, 20, 3, 2, "runs"),
    (2500, 300, 20, 3, 2, "runs"),
    (300, 256, 40, 3, 2, "runs"),
    (3, 64, 20, 3, 2, "distinct"),
    (16, 4096, 20, 16, 2, "distinct"),
]
large = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 << 30,
    reason="needs 60 GB of GPU memory",
)
_ids = {"ids": lambda value: str(value).replace("torch.", "")}


def cuda(arguments):
    return [move(value, "cuda") if isinstance(value, torch.Tensor) else value for value in arguments]


@pytest.fixture(params=["triton", "cuda"])
def serve(request):
    """Op -> callable of the backend under test."""

    def resolve(op):
        if FORCED not in ("", request.param):
            pytest.skip(f"BKDFAST_BACKEND={FORCED}")
        status = op.backends()[request.param]
        if status != "available" and (request.param == "triton" or EXTENSION.why_no_cuda() is not None):
            pytest.skip(f"{request.param}: {status}")
        assert status == "available", f"built with its CUDA kernels, but {op.name} has none: {status}"
        return op.resolve(request.param, torch.device("cuda"))

    return resolve


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EDITS)
def test_edits(name, dtype, serve):
    check_edits(serve(EDIT), edits(*EDITS[name], dtype=dtype), "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", EDIT_LAYOUTS)
@pytest.mark.parametrize("name", ["odd sizes", "neurons", "source per token", "meeting edits"])
def test_edits_any_strides(name, layout, dtype, serve):
    z, *rest = edits(*EDITS[name], dtype=dtype)
    check_edits(serve(EDIT), (EDIT_LAYOUTS[layout](z), *rest), "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_random_tables(dtype, serve):
    for seed in range(300):
        check_edits(serve(EDIT), random_edits(seed, dtype), "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_edits_of_a_large_batch(dtype, serve):
    rows = [[i % 16, 0, 3 * i, 3 * i + 40, i % 8, i % 7, 0] for i in range(200)] + [[-1, 1, 5, 1 << 30, 2, 7, 0]]
    offset = [[0] * 16, list(range(-8, 8))]
    check_edits(serve(EDIT), edits((16, 600, 8, 128), rows, [MIX] * 200 + [ADD], offset, dtype=dtype), "cuda")


def test_warps_with_several_slices(serve):
    # More chunks of tokens, times slices, than the launch has warps.
    r = random.Random(0)
    rows = [
        [r.randrange(-1, 64), 0, s := r.randrange(1000), s + 90, r.randrange(64), r.randrange(8), 0] for _ in range(30)
    ]
    check_edits(serve(EDIT), edits((64, 1024, 64, 8), rows, [MIX, ADD, PATCH] * 10, dtype=BF16), "cuda")


@large
def test_edit_beyond_2_to_the_31_cells(serve):
    length, last = (1 << 19) + 5, 8
    z = torch.zeros(2, length, 4096, dtype=BF16, device="cuda")
    part, table, *rest = edits((1, last, 32, 128), [[0, 0, 3, last, 30, 2, 0]], [MIX], dtype=BF16)
    z[1, -last:] = part[0].cuda()
    moved = table.clone()
    moved[0, 0], moved[0, 2], moved[0, 3] = 1, length - last + 3, length
    coefficients, source, _ = rest
    serve(EDIT)(z, *cuda((moved, coefficients, source)), torch.zeros(1, 2, dtype=torch.int32, device="cuda"))
    EDIT.reference(part, table, *rest)
    assert torch.equal(z[1, -last:].cpu(), part[0])
    assert not z[0].any() and not z[1, :-last].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", TOKENS)
def test_tokens(name, dtype, serve):
    check_tokens(serve(COSINE), tokens(*TOKENS[name], dtype=dtype, special=name.startswith("special")), "cuda")


@pytest.mark.parametrize("n", [1, 3, 8, 11, 70])
@pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
def test_blocks_of_a_step_with_any_strides(n, layout, serve):
    x, *rest = tokens(n, 40, 9, 4, 2, "mixed", blocks=2, layers=4, layer=2, seed=1)
    check_tokens(serve(COSINE), (TOKEN_LAYOUTS[layout](x), *rest), "cuda")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("size", [(2500, 4096, 20, 7, 3, "runs"), (300, 1000, 70, 300, 2, "mixed")], **_ids)
def test_many_tokens(size, dtype, serve):
    check_tokens(serve(COSINE), tokens(*size, dtype=dtype, seed=3), "cuda")


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_tiles_of_many_tokens(dtype, serve):
    """Enough tokens and directions for the larger tile of the CUDA kernel, against all cosines at once."""
    n, k = 8192, 130
    x, directions, packed, ranges, extremes, counts, layer = tokens(n, 64, k, 5, 2, "runs", dtype=dtype)
    ranges[:, :, 0], ranges[:, :, 1] = -0.9, 0.9  # no random cosine comes near
    planted = torch.arange(7, n, 97)
    x[planted] = (3 * directions[layer, planted % k]).to(dtype)
    x[planted[::3], 5] = NAN
    segment, row, position = packed.long()
    wide = x.double()
    cosine = wide @ directions[layer].double().T / wide.norm(dim=1, keepdim=True)  # [N, K]
    bad = ~wide.isfinite().all(1)
    offends = bad | ((row >= 0) & (row < 2) & (cosine.abs() > 0.9).any(1))
    want, want_counts = extremes.double(), counts.clone()
    for s in range(5):
        here = segment == s
        assert (here & bad).any() and (here & offends & ~bad).any()
        want[layer, s, 0], want[layer, s, 1] = cosine[here & ~bad].amin(0), cosine[here & ~bad].amax(0)
        want_counts[layer, s, 0] = (here & bad).sum()
        want_counts[layer, s, 1] = position[here & offends].min()
    state = cuda((x, directions, packed, ranges, extremes, counts))
    serve(COSINE)(*state, layer)
    assert torch.equal(state[5].cpu(), want_counts)
    torch.testing.assert_close(state[4].cpu().double(), want, rtol=0, atol=2e-6)


@large
def test_tokens_beyond_2_to_the_31_cells(serve):
    n, d = (1 << 20) + 3, 4096
    x = torch.zeros(n, d, dtype=BF16, device="cuda")
    _, directions, _, ranges, extremes, counts, layer = tokens(1, d, 3, 2, 0, "one")
    packed = torch.zeros(3, n, dtype=torch.int32, device="cuda")
    packed[0, -1], packed[2] = 1, torch.arange(n, device="cuda")
    x[-1] = directions[layer, 0].to(BF16).cuda()
    state = cuda((directions, ranges, extremes, counts))
    serve(COSINE)(x, state[0], packed, *state[1:], layer)
    last = x[-1].double().cpu()
    cosine = directions[layer].double() @ last / last.norm()
    assert cosine[0] > 0.99
    torch.testing.assert_close(state[2][layer, 1].cpu().double(), cosine.expand(2, -1), rtol=0, atol=1e-5)
    assert not state[2][layer, 0].any() and (state[3][..., 0] == 0).all() and (state[3][..., 1] == NONE).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, bias", NORMS)
@pytest.mark.parametrize("n, d", [(3, 64), (5, 37), (1, 1), (0, 8), (70, 4096), (2, 20000), (2, 40000)])
def test_norm_tap(n, d, kind, bias, dtype, serve):
    arguments = norm(n, d, kind, bias, dtype=dtype)
    x, *rest = cuda(arguments)
    step = torch.full((3, n + 2, d), 5.0, dtype=dtype, device="cuda")
    check_norm(serve(TAP)(x, *rest, step, 1), arguments)
    assert torch.equal(step[1, :n], x) and (step[1, n:] == 5).all() and (step[::2] == 5).all()
    check_norm(serve(TAP)(x, *rest, x.new_empty(0, 0, 0), 0), arguments)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind, bias", NORMS)
def test_norm_tap_of_tiny_values(kind, bias, dtype, serve):
    arguments = tiny_norm(kind, bias, dtype=dtype)
    x, *rest = cuda(arguments)
    check_norm(serve(TAP)(x, *rest, x.new_empty(0, 0, 0), 0), arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind, bias", NORMS)
@pytest.mark.parametrize("size", FUSED, **_ids)
def test_norm_monitor(size, kind, bias, dtype, serve):
    _, weight, shift, eps, _ = norm(1, size[1], kind, bias, dtype=dtype)

    def launch(x, *rest):
        y = serve(MONITOR)(x, move(weight, "cuda"), move(shift, "cuda"), eps, kind, *rest)
        check_norm(y, (x.cpu(), weight, shift, eps, kind))

    check_tokens(launch, tokens(*size, dtype=dtype, seed=2), "cuda")


@pytest.mark.parametrize("dtypes", SKETCH_DTYPES, **_ids)
@pytest.mark.parametrize("size", [*SKETCHES.values(), (5000, 300, 16), (1000, 4096, 20)], ids=str)
def test_sketch(size, dtypes, serve):
    arguments = sketch(*size, dtypes)
    first = check_sketch(serve(SKETCH), arguments, "cuda")
    again = check_sketch(serve(SKETCH), arguments, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "two runs differ"


def test_sketch_any_strides(serve):
    w0, w1, _ = sketch(124, 118, 1)
    check_sketch(serve(SKETCH), (w0.T, w1.T, torch.randn(124, 6)[:, ::2]), "cuda")
    check_sketch(serve(SKETCH), (w0[::2, 3:], w1[::2, 3:], torch.randn(115, 2)), "cuda")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sketch_of_non_finite_weights(value, serve):
    w0, w1, x = sketch(140, 120, 3)
    w1[4, 5] = value
    check_sketch(serve(SKETCH), (w0, w1, x), "cuda")


@pytest.fixture
def attend():
    """`prefix_attention`'s Triton kernel; it has no other on a GPU."""
    if FORCED not in ("", "triton"):
        pytest.skip(f"BKDFAST_BACKEND={FORCED}")
    if (status := ATTENTION.backends()["triton"]) != "available":
        pytest.skip(f"triton: {status}")
    return ATTENTION.resolve("triton", torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name, dtype, attend):
    check_attention(attend, attention(*ATTENTIONS[name], dtype=dtype), "cuda", rounded=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size", [(32, 2, 4, 2, 8, 256, 128), (3, 2, 2, 1, 100, 130, 64), (9, 1, 1, 1, 8, 40, 16)], **_ids
)
def test_attention_of_many_tiles(size, dtype, attend):
    check_attention(attend, attention(*size, "padded", 0.0, False, dtype=dtype), "cuda", rounded=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("width", [16, 40, 96, 192, 256, 320, 512])
def test_attention_widths(width, dtype, attend):
    for variants in (1, 12):
        arguments = attention(variants, 2, 2, 1, 8, 40, width, "window", 30.0, True, dtype=dtype)
        check_attention(attend, arguments, "cuda", rounded=True)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", ATTENTION_LAYOUTS)
def test_attention_any_strides(layout, dtype, attend):
    *tensors, mask, scale, softcap, sinks = attention(*ATTENTIONS["any mask"], dtype=dtype)
    tensors = [ATTENTION_LAYOUTS[layout](x) for x in tensors]
    wide = torch.cat([mask, ~mask], 2)[..., : mask.shape[2]]
    check_attention(attend, (*tensors, wide, scale, softcap, sinks), "cuda", rounded=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_attention_what_is_not_seen_does_not_reach(value, dtype, attend):
    check_poisoned(attend, "cuda", value, dtype=dtype)


@large
def test_attention_beyond_2_to_the_31_cells(attend):
    memory = torch.empty(2_600_000_000, dtype=BF16, device="cuda")
    q, k, v, prefix_k, *rest = cuda(attention(3, 1, 2, 1, 2, 3, 8, "causal", 0.0, False, dtype=BF16))
    want = attend(q, k, v, prefix_k, *rest)
    for moved in range(3):
        tensors = [q, k, v]
        far = memory.as_strided(tensors[moved].shape, (1_290_000_000, 16, 8, 1))
        tensors[moved] = far.copy_(tensors[moved])
        assert torch.equal(attend(*tensors, prefix_k, *rest), want)
    prefix_v, *rest = rest
    far = memory.as_strided(prefix_k.shape, (8, 8, 1_290_000_000, 1))
    assert torch.equal(attend(q, k, v, far.copy_(prefix_k), prefix_v, *rest), want)
    assert torch.equal(attend(q, k, v, prefix_k, far.copy_(prefix_v), *rest), want)


def test_a_graph_sees_other_keys(attend):
    static = cuda(attention(*ATTENTIONS["sinks"]))
    graph, out = captured(lambda: attend(*static))

    def replay(*arguments):
        for to, of in zip(static, arguments, strict=True):
            if isinstance(to, torch.Tensor):
                to.copy_(of)
        graph.replay()
        return out.clone()

    for seed in range(3):
        check_attention(replay, attention(*ATTENTIONS["sinks"], seed=seed), "cuda")


EVERY = ["patch_heads", "cosine_monitor", "norm_tap", "norm_monitor", "delta_sketch", "prefix_attention"]


def every_op():
    """name -> (op, arguments on the GPU)."""
    *state, layer = tokens(40, 64, 20, 3, 2, "runs")
    x, weight, _, eps, kind = norm(40, 64, 0, False)
    return {
        "patch_heads": (EDIT, cuda(edits(*EDITS["meeting edits"]))),
        "cosine_monitor": (COSINE, [*cuda(state), layer]),
        "norm_tap": (TAP, [*cuda((x, weight, None)), eps, kind, torch.zeros(2, 50, 64, device="cuda"), 1]),
        "norm_monitor": (MONITOR, [*cuda((x, weight, None)), eps, kind, *cuda(state[1:]), layer]),
        "delta_sketch": (SKETCH, cuda(sketch(70, 48, 16))),
        "prefix_attention": (ATTENTION, cuda(attention(*ATTENTIONS["softcap and sinks"]))),
    }


def run(op, arguments):
    """What the op returns and what its arguments then hold."""
    result = op.dispatched(*arguments)
    results = () if result is None else result if isinstance(result, tuple) else (result,)
    return [*results, *(value for value in arguments if isinstance(value, torch.Tensor))]


@pytest.mark.parametrize("name", EVERY)
def test_opcheck(name):
    op, arguments = every_op()[name]
    torch.library.opcheck(op.dispatched, tuple(arguments))


@pytest.mark.parametrize("name", EVERY)
def test_compiles_into_one_graph(name, fresh_dynamo):
    op, arguments = every_op()[name]
    want = run(*every_op()[name])
    got = torch.compile(run, fullgraph=True)(op, arguments)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def captured(call):
    """A graph of `call`, which has run once before: Triton loads its kernels at the first call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph, results


def test_a_graph_sees_another_table(serve):
    shape, fill = (2, 4, 2, 4), [[0, 0, 0, 0, 0, 0, 0]]
    tables = [
        edits(shape, rows + fill * (4 - len(rows)), [MIX, ADD, MIX, ADD], offset, seed=seed)
        for seed, (rows, offset) in enumerate(
            [
                ([[-1, 0, 0, 4, 0, 1, 0]], None),
                ([], None),
                ([[1, 1, 0, 2, 1, 2, 0], [0, 0, 1, 3, 0, 3, 1], [-1, 1, 0, 9, 0, 0, 0]], [[0, 0], [-1, 1]]),
            ]
        )
    ]
    static = cuda(tables[0])
    graph, _ = captured(lambda: serve(EDIT)(*static))
    for table in tables:

        def replay(z, *rest):
            for to, of in zip(static, (z, *rest), strict=True):
                to.copy_(of)
            graph.replay()
            z.copy_(static[0])

        check_edits(replay, table, "cuda")


@pytest.mark.parametrize("fused", [False, True], ids=["cosine_monitor", "norm_monitor"])
def test_a_graph_sees_other_tokens_and_ranges(fused, serve):
    weight = torch.ones(64, device="cuda")
    static = [value for value in cuda(tokens(30, 64, 20, 3, 2, "runs")) if isinstance(value, torch.Tensor)]

    def call():
        if fused:
            return serve(MONITOR)(static[0], weight, None, 1e-6, 0, *static[1:], 1)
        return serve(COSINE)(*static, 1)

    graph, _ = captured(call)
    for seed, kind in enumerate(("runs", "mixed", "one", "none")):

        def replay(*arguments):
            for to, of in zip(static, arguments[:6], strict=True):
                to.copy_(of)
            graph.replay()
            arguments[4].copy_(static[4])
            arguments[5].copy_(static[5])

        check_tokens(replay, tokens(30, 64, 20, 3, 2, kind, seed=seed), "cuda")


def test_a_graph_sees_other_weights(serve):
    static = cuda(sketch(70, 48, 16))
    graph, results = captured(lambda: serve(SKETCH)(*static))

    def replay(*arguments):
        for to, of in zip(static, arguments, strict=True):
            to.copy_(of)
        graph.replay()
        return [result.clone() for result in results]

    for seed in range(3):
        check_sketch(replay, sketch(70, 48, 16, seed=seed), "cuda")


def test_a_graph_of_norms_keeps_the_step(serve):
    x, weight, _, eps, kind = static = cuda(norm(5, 64, 0, False))
    step = torch.zeros(2, 8, 64, device="cuda")
    graph, y = captured(lambda: serve(TAP)(*static, step, 1))
    for seed in range(3):
        arguments = norm(5, 64, 0, False, seed=seed)
        x.copy_(arguments[0])
        weight.copy_(arguments[1])
        graph.replay()
        check_norm(y, arguments)
        assert torch.equal(step[1, :5], x) and not storage(step[0].clone()).any()


def test_nan_directions_and_ranges(serve):
    check_nan(serve(COSINE), "cuda")
