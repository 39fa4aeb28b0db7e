"""`delta_sketch` against float64, over backends, shapes, strides and dtypes."""

import pytest
import torch

from bkdfast.errors import BackendError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops import delta_sketch as module
from bkdfast.ops.delta_sketch import DeltaSketch, delta_sketch, sketch_dtype

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# A row tile, a panel and a column block, each one short, whole and one over; k over and under a tile.
SHAPES = [(7, 5, 3), (64, 48, 16), (33, 129, 1), (1, 9, 2), (9, 1, 2), (300, 17, 8), (24, 512, 4), (25, 513, 5)]
SHAPES += [(23, 511, 19), (500, 97, 7), (31, 1100, 33)]
DTYPES = [(a, b) for a in (BF16, FP16, FP32, FP64) for b in (BF16, FP16, FP32, FP64)]
# The same for the matrix unit, which serves bfloat16 and k of 9 or more: a panel of 32 rows, a step of 32 columns, a
# span of 2048, groups of 16.
TILES = [(32, 32, 16), (33, 2049, 9), (31, 2048, 17), (65, 31, 40), (1, 1, 9), (520, 4100, 16), (47, 4129, 33)]
EMPTY = [(0, 5, 3), (5, 0, 3), (5, 4, 0), (0, 0, 0)]


@pytest.fixture(params=["cpp", "reference"])
def backend(request):
    state = module.OP.backends()[request.param]
    if state != "available":
        pytest.skip(state)
    return request.param


def make(m, n, k, dtypes=(FP32, FP32), seed=0):
    g = torch.Generator().manual_seed(seed)
    w0 = torch.randn(m, n, generator=g, dtype=FP64).to(dtypes[0])
    w1 = (w0.double() + 0.1 * torch.randn(m, n, generator=g, dtype=FP64) * (torch.rand(m, n, generator=g) < 0.7)).to(
        dtypes[1]
    )
    return w0, w1, torch.randn(n, k, generator=g, dtype=FP64).to(sketch_dtype(w0, w1))


def check(w0, w1, x, **kwargs):
    """The four results against float64, within a few roundings of each sum's absolute values."""
    got = delta_sketch(w0, w1, x, **kwargs)
    delta, eps = w1.double() - w0.double(), torch.finfo(x.dtype).eps
    y = delta @ x.double()
    bound_y = delta.abs() @ x.double().abs()
    bound_z = delta.abs().T @ bound_y
    assert ((got.y.double() - y).abs() <= 8 * eps * bound_y).all()
    assert ((got.z.double() - delta.T @ y).abs() <= 16 * eps * bound_z).all()
    torch.testing.assert_close(got.frobenius_sq, delta.square().sum(), rtol=2 * eps, atol=0)
    assert got.changed.item() == (delta != 0).sum().item()
    assert got.y.dtype == got.z.dtype == x.dtype
    assert got.frobenius_sq.dtype == FP64 and got.changed.dtype == torch.int64
    assert got.y.shape == (w0.shape[0], x.shape[1]) and got.z.shape == x.shape
    return got


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtypes, backend):
    got = check(*make(*shape, dtypes), backend=backend)
    assert got.changed > 0


@pytest.mark.parametrize("shape", TILES, ids=str)
def test_bfloat16_tiles_match_float64(shape, backend):
    check(*make(*shape, (BF16, BF16)), backend=backend)


def test_no_bit_of_a_difference_is_lost(backend):
    """Differences of 8 bits, of 16 and of 24: Y with columns of the identity is D itself."""
    w0, w1, _ = make(70, 100, 1, (BF16, BF16))
    w0[3::7] *= 2.0**-9
    places = torch.tensor([40, 40, 69]), torch.tensor([5, 6, 99])
    w0[places] = torch.tensor([1.5 * 2**-16, -1.25 * 2**-17, 1.125 * 2**-15]).bfloat16()
    w1[places] = torch.tensor([1.0, 3.0, -2.5]).bfloat16()
    for first in (0, 50, 84):
        x = torch.eye(100)[:, first : first + 16].contiguous()
        y = check(w0, w1, x, backend=backend).y
        assert torch.equal(y, (w1.float() - w0.float())[:, first : first + 16])
    alone = w0.clone()
    alone[places] = w1[places]
    check(w0, alone, torch.randn(100, 16), backend=backend)  # each is all there is in its column


def test_weights_of_unrelated_sizes(backend):
    """Most differences have more bits than two bfloat16 numbers."""
    w0, w1, x = make(70, 90, 16, (BF16, BF16))
    scale = torch.randint(-20, 3, (70, 90), generator=torch.Generator().manual_seed(1)).double()
    check((w0 * 2**scale).bfloat16(), w1, x, backend=backend)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e-6, 1e6, 1e12], ids=str)
@pytest.mark.parametrize("what", ["delta", "x", "a column of x"])
def test_extreme_sizes(what, size, backend):
    w0, w1, x = make(50, 40, 16, (BF16, BF16))
    if what == "delta":
        w0, w1 = (w0 * size).bfloat16(), (w1 * size).bfloat16()
        x /= size  # Z stays in the range of float32
    elif what == "x":
        x *= size
    else:
        x[:, 3] *= size
    check(w0, w1, x, backend=backend)


def test_the_kernel_serves_by_itself(monkeypatch):
    if module.OP.backends()["cpp"] != "available":
        pytest.skip(module.OP.backends()["cpp"])
    args = make(40, 30, 4)
    for got, want in zip(delta_sketch(*args), delta_sketch(*args, backend="cpp"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, backend):
    got = check(*make(*shape), backend=backend)
    assert got.y.shape == (shape[0], shape[2]) and got.z.shape == (shape[1], shape[2])


def test_panels_cover_every_row(monkeypatch):
    monkeypatch.setattr(module, "_PANEL", 64)
    check(*make(37, 13, 5), backend="reference")  # panels of 4 rows, the last one of 1
    check(*make(3, 200, 5), backend="reference")  # a row longer than a panel


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP16, FP64), (FP64, FP64)], ids=str)
def test_strides(dtypes, backend):
    w0, w1, _ = make(24, 18, 1, dtypes)
    x = torch.randn(24, 6, dtype=sketch_dtype(w0, w1))[:, ::2]
    check(w0.T, w1.T, x, backend=backend)
    check(w0.T, w1.T.contiguous(), x, backend=backend)
    check(w0.T, w1.T, x.T.contiguous().T, backend=backend)
    wide = torch.randn(15, 2, dtype=x.dtype)
    check(w0[::2, 3:], w1[::2, 3:], wide, backend=backend)
    check(w0[::2, 3:], w1.T.contiguous().T[::2, 3:], wide, backend=backend)
    check(w0[:1].expand(5, 18), w1[:5], torch.randn(18, 2, dtype=x.dtype), backend=backend)
    check(w0[:, :1].expand(24, 18), w1, torch.randn(18, 2, dtype=x.dtype), backend=backend)


@pytest.mark.parametrize("shape", [(70, 600, 9), (600, 70, 17)], ids=str)
def test_transposed_views_of_several_panels_and_blocks(shape, backend):
    m, n, k = shape
    w0, w1, _ = make(n, m, 1, (BF16, BF16))
    check(w0.T, w1.T, torch.randn(n, k), backend=backend)


def test_offsets_beyond_32_bits(backend):
    """Rows, and then columns, so far apart that those of a second panel or block are 2**31 elements on."""
    memory = torch.empty(2_600_000_000, dtype=BF16)  # never touched but at the entries
    _, w1, x = make(26, 20, 4)
    w0 = memory.as_strided((26, 20), (91_000_000, 1))
    w0.copy_(torch.randn(26, 20))
    check(w0, w1, x, backend=backend)
    _, w1, x = make(3, 520, 4)
    w0 = memory.as_strided((3, 520), (1, 4_700_000))
    w0.copy_(torch.randn(3, 520))
    check(w0, w1, x, backend=backend)


@pytest.mark.parametrize("shape", [(1000, 300, 16), (700, 1200, 5), (26, 2000, 24), (1500, 100, 40)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape):
    if module.OP.backends()["cpp"] != "available":
        pytest.skip(module.OP.backends()["cpp"])
    args = make(*shape, (BF16, BF16))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(delta_sketch(*args, backend="cpp"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_change_is_exactly_zero(backend):
    w0, _, x = make(20, 10, 4, (BF16, BF16))
    got = delta_sketch(w0, w0.float(), x, backend=backend)  # the same values in another dtype
    assert got.changed == 0 and got.frobenius_sq == 0 and not got.y.any() and not got.z.any()
    assert delta_sketch(torch.zeros(2, 2), -torch.zeros(2, 2), torch.eye(2), backend=backend).changed == 0


@pytest.mark.parametrize("row, column", [(0, 0), (999, 332), (23, 511), (24, 512), (998, 599), (5, 15)])
def test_one_changed_entry_is_found(row, column, backend):
    w0, _, x = make(1000, 600, 2)
    w1 = w0.clone()
    w1[row, column] += 1
    got = check(w0, w1, x, backend=backend)
    assert got.changed == 1 and (got.y != 0).any(1).nonzero().tolist() == [[row]]
    assert (got.z != 0).any(1).nonzero().tolist() == [[column]]


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, FP64), (BF16, BF16), (FP64, FP64)], ids=str)
def test_squares_of_tiny_deltas_do_not_vanish(dtypes, backend):
    w0, w1 = torch.zeros(10, 10, dtype=dtypes[0]), torch.full((10, 10), 1e-25, dtype=dtypes[1])
    got = delta_sketch(w0, w1, torch.eye(10, dtype=sketch_dtype(w0, w1)), backend=backend)
    assert got.frobenius_sq.item() == pytest.approx(100 * w1[0, 0].item() ** 2, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
def test_what_a_call_leaves_in_memory_does_not_reach_the_next(dtype, backend):
    """Padding behind the last column is multiplied too: it must be zeros, not the NaN of an earlier call."""
    poison = torch.full((9, 16), float("nan"), dtype=dtype)
    for k in (3, 20):
        x = torch.full((16, k), float("nan"), dtype=sketch_dtype(poison, poison))
        for columns in range(1, 16):
            args = make(9, columns, k, (dtype, dtype))
            for _ in range(3):
                delta_sketch(poison, poison, x, backend=backend)
            assert all(result.isfinite().all() for result in delta_sketch(*args, backend=backend))


def test_double_minus_single_is_taken_in_double(backend):
    w0 = torch.ones(4, 4)
    w1 = torch.full((4, 4), 1 + 1e-10, dtype=FP64)
    got = delta_sketch(w0, w1, torch.eye(4), backend=backend)
    assert got.changed == 16 and got.frobenius_sq.item() == pytest.approx(16e-20, rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32, FP64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["base", "tuned", "both"])
@pytest.mark.parametrize("k", [3, 16])
def test_non_finite_shows_in_the_norm(k, value, side, dtype, backend):
    w0, w1, x = make(30, 20, k, (dtype, dtype))
    for name, weight in (("base", w0), ("tuned", w1)):
        if side in (name, "both"):
            weight[4, 5] = value
    got = delta_sketch(w0, w1, x, backend=backend)
    assert not torch.isfinite(got.frobenius_sq)
    assert not torch.isfinite(got.y[4]).any() and torch.isfinite(got.y[:4]).all() and torch.isfinite(got.y[5:]).all()
    assert not torch.isfinite(got.z[5]).any()
    assert got.changed == (w0 != w1).sum()


def test_non_finite_x_spoils_its_column_alone(backend):
    w0, w1, x = make(30, 20, 16, (BF16, BF16))
    x[4, 5], x[6, 7] = float("nan"), float("inf")
    got = delta_sketch(w0, w1, x, backend=backend)
    spoilt = torch.zeros(16, dtype=torch.bool).index_fill_(0, torch.tensor([5, 7]), True)
    assert torch.equal(got.z.isfinite().all(0), ~spoilt) and got.y[:, ~spoilt].isfinite().all()
    assert torch.isfinite(got.frobenius_sq)


def test_fp16_and_bf16_values_survive_the_widening(backend):
    """Every finite 16-bit value, subnormals too, against zero: Y with X = 1 is the value itself."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (BF16, FP16):
        values = bits.view(dtype)
        values = values[torch.isfinite(values)].view(-1, 1)
        got = delta_sketch(torch.zeros_like(values), values, torch.ones(1, 1), backend=backend)
        assert torch.equal(got.y, values.float())


def test_input_is_not_changed(backend):
    w0, w1, x = make(30, 20, 3)
    before = [t.clone() for t in (w0, w1, x)]
    delta_sketch(w0, w1, x, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(before, (w0, w1, x), strict=True))


@pytest.mark.parametrize(
    "dtypes, view", [((FP32, FP32), False), ((BF16, FP16), False), ((FP64, FP64), False), ((FP32, FP32), True)]
)
def test_opcheck(dtypes, view):
    w0, w1, x = make(12, 12, 4, dtypes)
    torch.library.opcheck(torch.ops.bkdfast.delta_sketch.default, (w0.T, w1.T, x) if view else (w0, w1, x))


def test_compiles_into_one_graph():
    def relative(w0, w1, x):
        sketch = delta_sketch(w0, w1, x)
        return sketch.y / sketch.frobenius_sq.sqrt(), sketch.z, sketch.changed

    w0, w1, x = make(15, 11, 4)
    torch._dynamo.reset()
    compiled = torch.compile(relative, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(w0, w1, x), relative(w0, w1, x), strict=True):
        assert torch.equal(got, want)


def test_result_is_named():
    assert isinstance(delta_sketch(*make(3, 3, 1)), DeltaSketch)


@pytest.mark.parametrize(
    "w0, w1, x, error, says",
    [
        (torch.ones(3, 4), torch.ones(4, 3), torch.ones(4, 1), InvalidArgumentError, r"\(3, 4\) and \(4, 3\)"),
        (torch.ones(3), torch.ones(3), torch.ones(3, 1), InvalidArgumentError, "two matrices"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(3, 1), InvalidArgumentError, "n = 4"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(4), InvalidArgumentError, r"\(4,\)"),
        (torch.ones(3, 4).int(), torch.ones(3, 4), torch.ones(4, 1), InvalidTypeError, "w0 is torch.int32"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.ones(4, 1).half(), InvalidTypeError, "x must be torch.float32"),
        (torch.ones(3, 4).double(), torch.ones(3, 4).double(), torch.ones(4, 1), InvalidTypeError, "torch.float64"),
        (torch.ones(3, 4), torch.ones(3, 4, device="meta"), torch.ones(4, 1), InvalidArgumentError, "one device"),
        (torch.ones(3, 4, requires_grad=True), torch.ones(3, 4), torch.ones(4, 1), InvalidArgumentError, "no gradient"),
    ],
)
def test_bad_arguments(w0, w1, x, error, says):
    with pytest.raises(error, match=says):
        delta_sketch(w0, w1, x)


def test_parameters_are_fine_without_grad_mode():
    w = torch.ones(3, 4, requires_grad=True)
    with torch.no_grad():
        assert delta_sketch(w, w, torch.ones(4, 1)).changed == 0


def test_unknown_backend():
    with pytest.raises(BackendError, match="not one of"):
        delta_sketch(*make(3, 3, 1), backend="abacus")


def test_autocast_does_not_reach_the_products():
    w0, w1, x = torch.randn(9, 7), torch.randn(9, 7), torch.randn(7, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found = delta_sketch(w0, w1, x)
    assert torch.equal(found.y, delta_sketch(w0, w1, x).y) and torch.equal(found.z, delta_sketch(w0, w1, x).z)
