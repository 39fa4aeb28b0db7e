"""The CUDA kernels' own sources, run thread by thread on the CPU (cuda_emulation.h), against the reference.

Each op is compiled by the C++ compiler with the CUDA headers, so no GPU is needed; without the headers these tests are
skipped. What only a GPU shows (memory order between warps, alignment faults, speed) they do not see.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from bkdfast.ops import cosine_monitor, norm_tap, patch_heads
from bkdfast.ops.delta_sketch import OP as SKETCH
from bkdfast.ops.delta_sketch import sketch_dtype
from bkdfast.ops.monitor_state import NONE, MonitorState
from tests.kernels.cases import check_nan

ROOT = Path(__file__).resolve().parents[2]
FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [FP16, BF16, FP32, FP64]
ORDERS = ["forward", "reverse"]
OPS = {
    "patch_heads": patch_heads._op,
    "cosine_monitor": cosine_monitor.OP,
    "norm_tap": norm_tap.TAP,
    "norm_monitor": norm_tap.MONITOR,
    "delta_sketch": SKETCH,
}
SOURCES = ["patch_heads", "cosine_monitor", "norm_tap", "delta_sketch"]


def toolkit():
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", Path(nvcc).resolve().parent.parent if nvcc else None]
    return next((Path(home) for home in homes if home and (Path(home) / "include" / "cuda_bf16.h").is_file()), None)


def build(library):
    include = [ROOT / "tests" / "kernels", *include_paths(), toolkit() / "include"]
    command = [
        "c++",
        "-shared",
        "-fPIC",
        "-std=c++20",
        "-O1",
        "-march=native",
        "-ffp-contract=off",
        "-U_FORTIFY_SOURCE",
    ]
    command += ["-w", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-o", library, *(f"-I{path}" for path in include)]
    command += ["-x", "c++", *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in SOURCES)]
    command += [*(f"-L{path}" for path in library_paths()), "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """`torch.ops.bkdfast_emulated`, with the schemas of `bkdfast`."""
    if toolkit() is None or shutil.which("c++") is None or not sys.platform.startswith("linux"):
        pytest.skip("needs Linux, a C++ compiler and the CUDA headers")
    # One build for all processes of pytest-xdist.
    base = tmp_path_factory.getbasetemp()
    library = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_emulated.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            build(library)
    schemas = torch.library.Library("bkdfast_emulated", "DEF")
    for name, op in OPS.items():
        schemas.define(str(op.dispatched._schema).removeprefix("bkdfast::"))
        assert name in str(op.dispatched._schema)
    torch.ops.load_library(library)
    yield torch.ops.bkdfast_emulated
    del schemas


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """Threads of a block in both orders: what a forgotten barrier leaves to chance differs between them."""
    if request.param == "reverse":
        monkeypatch.setenv("EMULATION_REVERSE", "1")


def relaid(x, layout):
    """x with the same values and other strides."""
    if layout == "transposed":
        return x.mT.contiguous().mT
    if layout == "odd":
        return torch.cat([torch.full_like(x[..., :1], 7), x], -1)[..., 1:]
    return x


def edits(rows, tokens, slices, sources, count, generator, seed_bad):
    """Random edits, many meeting, some empty, open or out of range (`seed_bad`: what must be skipped)."""

    def draw(low, high):
        return torch.randint(low, high, (count,), generator=generator)

    start = draw(-3, tokens)
    stop = start + draw(0, tokens + 3)
    stride = draw(0, 2)
    entry = torch.where(stride == 1, 0, draw(0, sources))
    table = torch.stack([draw(-1, rows), draw(0, 2), start, stop, draw(0, slices), entry, stride], 1).int()
    table[::7, 2], table[::7, 3] = -(1 << 30), 1 << 30
    table[::7, 6] = 0
    table[3::5] = 0
    bad = table.clone()
    if seed_bad:
        bad[1::9, 0], bad[2::9, 1], bad[4::9, 4] = rows, 2, slices
        bad[5::9, 0], bad[6::9, 1], bad[7::9, 4] = -2, -1, -1
        table[[i for i in range(count) if i % 9 in (1, 2, 4, 5, 6, 7)]] = 0
    return table, bad


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 150, 2, 16), (4, 1, 5, 40), (2, 3, 40, 1), (2, 70, 3, 6)], ids=str)
def test_patch_heads(shape, dtype, layout, kernels, order):
    rows, tokens, slices, width = shape
    g = torch.Generator().manual_seed(sum(shape))
    wide = FP64 if dtype == FP64 else FP32
    z = relaid(torch.randn(rows, tokens, slices * width, generator=g).to(dtype), layout)
    source = torch.randn(2 * tokens + 8, width, generator=g).to(wide)
    table, bad = edits(rows, tokens, slices, len(source), 75, g, seed_bad=True)
    coefficients = torch.randn(75, 2, generator=g).to(wide)
    coefficients[::4, 0] = coefficients[::3, 1] = 0
    offset = torch.randint(-2, 3, (2, rows), generator=g).int()
    want, got = z.clone(), torch.empty_strided(z.shape, z.stride(), dtype=dtype).copy_(z)
    OPS["patch_heads"].reference(want, table, coefficients, source, offset)
    kernels.patch_heads(got, bad, coefficients, source, offset)
    assert not torch.equal(want, z)
    assert torch.equal(want, got), "the same arithmetic must give the same bits"


def test_patch_heads_skips_sources_that_do_not_exist(kernels):
    z = torch.ones(1, 4, 8)
    table = torch.tensor([[0, 0, 0, 4, 0, 1, 1], [0, 0, 0, 4, 1, -1, 0]], dtype=torch.int32)
    source = torch.full((3, 4), 5.0)
    kernels.patch_heads(z, table, torch.tensor([[0.0, 1.0]] * 2), source, torch.zeros(1, 1, dtype=torch.int32))
    assert z[0, :, :4].tolist() == [[5.0] * 4] * 2 + [[1.0] * 4] * 2
    assert (z[0, :, 4:] == 1).all()


def monitor(blocks, tokens, width, count, dtype, seed=0, ranges=2, segments=4):
    """x `[blocks, N, D]`, tokens and a state of `blocks + 1` blocks; some tokens zero, not finite or not observed."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(blocks, tokens, width, generator=g, dtype=FP64).to(dtype)
    for n, value in ((2, 0.0), (5, torch.nan), (9, torch.inf), (tokens - 1, -torch.inf)):
        if n < tokens and tokens > 1:
            x[:, n, width // 2 if value else slice(None)] = value
    directions = torch.nn.functional.normalize(torch.randn(blocks + 1, count, width, generator=g), dim=2)
    spread = 0.5 / width**0.5
    bounds = torch.stack([torch.full((blocks + 1, ranges, count), s) for s in (-6 * spread, 4 * spread)], 2)
    state = MonitorState.create(directions, segments, bounds)
    segment = torch.randint(-1, segments + 1, (tokens,), generator=g).sort().values
    if tokens > 20:
        segment[: tokens // 3] = 1
    rows = torch.randint(-1, ranges + 1, (tokens,), generator=g)
    return x, state, torch.stack([segment, rows, torch.randperm(tokens, generator=g)]).int()


def same_state(got, want):
    torch.testing.assert_close(got.extremes, want.extremes, atol=2e-6, rtol=0)
    assert torch.equal(got.counts, want.counts)


COSINES = [
    (1, 1, 8, 3),
    (2, 4, 200, 9),
    (3, 16, 1000, 5),
    (2, 17, 24, 33),
    (1, 75, 264, 40),
    (1, 40, 13, 2),
    (1, 5, 8, 0),
]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", COSINES, ids=str)
def test_cosine_monitor(shape, dtype, layout, kernels, order):
    x, got, tokens = monitor(*shape, dtype)
    _, want, _ = monitor(*shape, dtype)
    arguments = (tokens, got.ranges, got.extremes, got.counts, 1)
    for _ in range(2):  # the second call meets a state that is not empty
        kernels.cosine_monitor(relaid(x, layout), got.directions, *arguments)
        OPS["cosine_monitor"].reference(x, want.directions, tokens, want.ranges, want.extremes, want.counts, 1)
    same_state(got, want)
    if shape[1] > 9 and shape[3]:
        assert (got.counts[1:, :, 0] > 0).any() and (got.first != NONE).any() and got.extremes.isfinite().any()


@pytest.mark.parametrize("tokens", [1, 3, 20])
@pytest.mark.parametrize("value", [0.0, 1e-21, 1e-18, 1e18, 1e20])
def test_cosine_monitor_at_the_ends_of_float32(value, tokens, kernels, order):
    # |x|^2 is 0, below the smallest normal number (a zero token), above it, finite, and not finite.
    state = MonitorState.create(torch.eye(8)[:3], 1)
    columns = torch.stack([torch.zeros(tokens), torch.full((tokens,), -1), torch.arange(tokens)]).int()
    x = torch.tensor([-value, 0, 0, 0, 0, 0, 0, 0]).repeat(tokens, 1)
    kernels.cosine_monitor(x, state.directions, columns, state.ranges, state.extremes, state.counts, 0)
    if value == 1e20:
        assert state.nonfinite.item() == tokens and state.first.item() == 0 and state.low.isposinf().all()
    else:
        assert state.nonfinite.item() == 0 and state.first.item() == NONE
        assert state.low.tolist() == state.high.tolist() == [[[-1.0 if value >= 1e-18 else 0.0, 0.0, 0.0]]]


def test_cosine_monitor_of_many_tokens(kernels):
    # 256 blocks of 128 tokens and more take the larger tile.
    x, got, tokens = monitor(2, 16300, 24, 5, BF16)
    _, want, _ = monitor(2, 16300, 24, 5, BF16)
    kernels.cosine_monitor(x, got.directions, tokens, got.ranges, got.extremes, got.counts, 0)
    OPS["cosine_monitor"].reference(x, want.directions, tokens, want.ranges, want.extremes, want.counts, 0)
    same_state(got, want)


def norm_arguments(tokens, width, dtype, kind):
    g = torch.Generator().manual_seed(width)
    weight, bias = torch.randn(2, width, generator=g).to(dtype)
    return weight, bias if kind == norm_tap.LAYER and width % 3 else None, 1e-5, kind


def same_norm(got, want):
    tolerance = {FP16: 2e-3, BF16: 1.6e-2, FP32: 3e-6, FP64: 3e-6}[got.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)
    if got.dtype in (FP16, BF16) and got.numel():
        equal = (got == want) | (got.isnan() & want.isnan())
        assert equal.double().mean() > 0.98, "it must round where the reference does"


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd"])
@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 4104), (4, 13), (0, 8), (20, 40)], ids=str)
def test_norms(shape, dtype, kind, layout, kernels, order):
    tokens, width = shape
    norm = norm_arguments(*shape, dtype, kind)
    x = 2 + torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    step = torch.full((2, tokens + 1, width), 7.0, dtype=dtype)
    want = OPS["norm_tap"].reference(x, *norm, step.clone(), 1)
    same_norm(kernels.norm_tap(relaid(x, layout), *norm, step, 1), want)
    assert torch.equal(step[1, :tokens], x) and (step[0] == 7).all() and (step[1, tokens:] == 7).all()
    same_norm(kernels.norm_tap(x, *norm, step[:, :0], 0), want)
    if tokens:
        x[0, 0] = torch.nan
        _, got, columns = monitor(1, *shape, 6, FP32)
        _, expected, _ = monitor(1, *shape, 6, FP32)
        y = kernels.norm_monitor(
            relaid(x, layout), *norm, got.directions, columns, got.ranges, got.extremes, got.counts, 1
        )
        want = OPS["norm_monitor"].reference(
            x, *norm, expected.directions, columns, expected.ranges, expected.extremes, expected.counts, 1
        )
        same_norm(y, want)
        same_state(got, expected)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "odd"])
@pytest.mark.parametrize(
    "dtypes", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (FP64, FP64), (BF16, FP64)], ids=lambda d: str(d)
)
@pytest.mark.parametrize("shape", [(7, 8, 3), (130, 264, 16), (70, 24, 49), (1, 9, 20), (5, 4, 0), (0, 3, 2)], ids=str)
def test_delta_sketch(shape, dtypes, layout, kernels, order):
    m, n, k = shape
    base, tuned, x = weights(m, n, k, dtypes)
    got = kernels.delta_sketch(relaid(base, layout), relaid(tuned, layout), relaid(x, layout))
    check_sketch(got, base, tuned, x)


def test_delta_sketch_of_several_panels(kernels):
    arguments = weights(130, 1 << 15, 1, (FP32, FP32))  # panels of 64 rows
    check_sketch(kernels.delta_sketch(*arguments), *arguments)


def weights(m, n, k, dtypes):
    g = torch.Generator().manual_seed(m)
    base = torch.randn(m, n, generator=g, dtype=FP64).to(dtypes[0])
    moved = torch.randn(m, n, generator=g) * (torch.rand(m, n, generator=g) < 0.5)
    tuned = (base.double() + moved).to(dtypes[1])
    return base, tuned, torch.randn(n, k, generator=g, dtype=FP64).to(sketch_dtype(base, tuned))


def check_sketch(got, base, tuned, x):
    delta, eps = tuned.double() - base.double(), torch.finfo(x.dtype).eps
    y, bound = delta @ x.double(), delta.abs() @ x.double().abs()
    assert ((got[0].double() - y).abs() <= 8 * eps * bound).all()
    assert ((got[1].double() - delta.T @ y).abs() <= 16 * eps * (delta.abs().T @ bound)).all()
    torch.testing.assert_close(got[2], delta.square().sum(), rtol=2 * eps, atol=0)
    assert got[3].item() == (delta != 0).sum().item()


def test_nan_directions_and_ranges(kernels, order):
    check_nan(kernels.cosine_monitor, "cpu")
