"""Small cases per op for kernels that run on any device: arguments of the op on the CPU, and checks against the truth.

Every check takes `launch`, called with the op's arguments on `device`, runs it on copies that keep strides and what
lies between them, and compares with the op's meaning in float64, or bit for bit where the contract fixes each rounding.
"""

import random
from collections.abc import Callable

import torch

from bkdfast.ops import cosine_monitor, norm_tap, patch_heads
from bkdfast.ops.delta_sketch import reference as sketch_reference
from bkdfast.ops.edit_table import OPEN
from bkdfast.ops.monitor_state import NONE, MonitorState
from bkdfast.ops.norm_tap import LAYER, RMS, RMS_ONE, RMS_WIDE

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN, INF = float("nan"), float("inf")
INT32 = 2**31 - 1


def move(tensor: torch.Tensor | None, device: str) -> torch.Tensor | None:
    """A copy with the same strides, in a copy of the whole storage."""
    if tensor is None:
        return None
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.clone().to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def storage(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage()).cpu()


def ulp(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance of neighbouring numbers of `dtype` at the tensor's values, float64."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(tensor.double().abs().clamp(min=info.tiny)).exponent
    return info.eps * torch.exp2(exponent.double() - 1)


# ---------------------------------------------------------------------------------------------------- patch_heads

ZERO, PATCH, ADD, SCALE, MIX = (0.0, 0.0), (0.0, 1.0), (1.0, 0.75), (-0.5, 0.0), (0.3, -1.7)
# name: (B, T, S, W), rows of the table (row, origin, start, stop, slice, source row, stride), coefficients, offset
EDITS: dict[str, tuple] = {
    "one cell": ((2, 5, 3, 4), [[1, 0, 2, 3, 1, 3, 0]], [ZERO], None),
    "odd sizes": ((3, 7, 5, 13), [[2, 0, 1, 6, 4, 7, 0], [0, 0, 0, 7, 0, 1, 0]], [PATCH, MIX], None),
    "one head, one token": ((4, 1, 1, 5), [[-1, 0, 0, 1, 0, 3, 0]], [ADD], None),
    "neurons": ((2, 3, 9, 1), [[-1, 0, 0, 3, 8, 1, 0], [1, 0, 0, 2, 0, 4, 0]], [PATCH, ADD], None),
    "wider than a block": ((2, 9, 2, 300), [[0, 0, 0, 9, 1, 0, 0], [1, 0, 1, 7, 1, 1, 1]], [PATCH, MIX], None),
    "longer than a tile": ((2, 70, 1, 64), [[-1, 0, 3, OPEN, 0, 0, 0]], [MIX], None),
    "open spans": ((2, 6, 2, 4), [[-1, 1, -OPEN, 1, 0, 0, 0], [-1, 1, 1, OPEN, 1, 1, 0]], [ZERO, SCALE],
                   [[0, 0], [-2, -5]]),
    "source per token": ((2, 6, 2, 4), [[0, 0, 1, 6, 1, 2, 1], [1, 0, 0, 4, 0, 4, 1]], [PATCH, MIX], None),
    "decode": ((3, 1, 2, 4), [[-1, 0, 4, 6, 0, 2, 1], [1, 1, 1, OPEN, 1, 0, 0]], [PATCH, ADD], [[4, 5, 9], [1, 1, 1]]),
    "chunk, left padding": ((2, 5, 2, 4), [[-1, 0, 0, 2, 0, 3, 1]], [ADD], [[0, -3], [0, 0]]),
    "beside the call": ((2, 3, 2, 4), [[-1, 0, 3, 9, 0, 0, 0], [-1, 0, -9, 0, 1, 0, 0]], [ZERO, ZERO], None),
    "empty spans": ((2, 3, 2, 4), [[0, 0, 2, 2, 0, 0, 0], [9, 9, 0, 0, 9, 99, 9], [1, 0, 0, 1, 1, 0, 0]], [PATCH] * 3,
                    None),
    "no edits": ((2, 3, 2, 4), [], [], None),
    "no rows": ((0, 3, 2, 4), [[-1, 0, 0, 3, 0, 0, 0]], [PATCH], None),
    "no tokens": ((2, 0, 2, 4), [[-1, 0, 0, 3, 0, 0, 0]], [PATCH], None),
    "far offsets": ((2, 3, 2, 4), [[-1, 0, -OPEN, OPEN, 0, 1, 0], [-1, 1, 0, 3, 1, 0, 0]], [PATCH, ZERO],
                    [[-INT32, INT32], [-INT32, INT32]]),
    "meeting edits": ((2, 4, 2, 4), [[-1, 0, 0, 4, 0, 1, 0], [0, 1, 0, 2, 0, 2, 0], [0, 0, 1, 3, 0, 3, 1]],
                      [ADD, MIX, (2.0, 1.0)], [[0, 0], [-1, -1]]),
    "a late edit of all rows": ((3, 5, 2, 4), [[1, 0, 2, 4, 1, 0, 0], [2, 1, 0, 9, 1, 1, 0], [-1, 0, 1, 4, 1, 2, 0]],
                                [ADD, ADD, MIX], [[0, 0, 0], [1, 2, -3]]),
    "unread source": ((2, 3, 2, 4), [[-1, 0, 0, 3, 0, 999, 0], [0, 0, 0, 3, 1, -7, 1]], [SCALE, ZERO], None),
}  # fmt: skip
EDIT_LAYOUTS: dict[str, Callable] = {
    "contiguous": lambda z: z,
    "batch and tokens swapped": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "head dimension first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other cell": lambda z: torch.stack([z, torch.full_like(z, 7)], -1).flatten(2)[..., ::2],
    "a part of a wider tensor": lambda z: torch.cat([torch.full_like(z, 7), z, torch.full_like(z, 7)], 2)[
        ..., z.shape[2] : 2 * z.shape[2]
    ],
}


def edits(shape, rows, coefficients, offset=None, *, dtype=FP32, sources=8, seed=0) -> tuple:
    """Arguments of `patch_heads`; |z| and |source| are in [1, 2), so that a missing edit is far from right."""
    b, t, s, w = shape
    g = torch.Generator().manual_seed(seed)
    acc = FP64 if dtype == FP64 else FP32

    def draw(*size):
        return (torch.randint(0, 2, size, generator=g) * 2 - 1) * (1 + torch.rand(size, generator=g, dtype=FP64))

    first = torch.zeros(2, b, dtype=torch.int32) if offset is None else torch.tensor(offset, dtype=torch.int32)
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 7)
    return (
        draw(b, t, s * w).to(dtype),
        table,
        torch.tensor(coefficients, dtype=acc).view(-1, 2),
        draw(sources, w).to(acc),
        first,
    )


def random_edits(seed: int, dtype=FP32, count: int | None = None) -> tuple:
    """A random table whose edits often meet, over random offsets of two origins."""
    r = random.Random(seed)
    b, t, s, w = r.randint(1, 4), r.randint(1, 12), r.randint(1, 3), r.choice((1, 3, 8))
    rows = []
    for _ in range(r.randint(0, 12) if count is None else count):
        start = r.choice((-OPEN, r.randint(-3, t)))
        stop = r.choice((OPEN, max(start, -3) + r.randint(0, 6)))
        stride = 0 if start == -OPEN or stop == OPEN else r.randint(0, 1)
        rows.append([r.randint(-1, b - 1), r.randint(0, 1), start, stop, r.randint(0, s - 1), r.randint(0, 5), stride])
    scale = [r.choice((ZERO, PATCH, ADD, SCALE, MIX)) for _ in rows]
    offset = [[r.randint(-4, 4) for _ in range(b)] for _ in range(2)]
    return edits((b, t, s, w), rows, scale, offset, dtype=dtype, sources=12, seed=seed)


def check_edits(launch: Callable, arguments: tuple, device: str) -> None:
    """Bit for bit as the reference, cells between the strides included."""
    z, *rest = arguments
    want = move(z, "cpu")
    patch_heads._op.reference(want, *rest)
    got, inputs = move(z, device), [move(tensor, device) for tensor in rest]
    launch(got, *inputs)
    torch.testing.assert_close(storage(got), storage(want), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(storage(got).signbit() & ~storage(got).isnan(), storage(want).signbit() & ~storage(want).isnan())
    for was, now in zip(rest, inputs, strict=True):
        torch.testing.assert_close(now.cpu(), was, rtol=0, atol=0, equal_nan=True)


# ------------------------------------------------------------------------------------------- cosine_monitor, norms

# name: N, D, K, S, R, kind of segments
TOKENS: dict[str, tuple] = {
    "one token": (1, 64, 3, 1, 1, "one"),
    "one direction": (5, 33, 1, 2, 1, "mixed"),
    "decode": (8, 96, 20, 8, 2, "distinct"),
    "decode, three rows": (3, 40, 5, 3, 1, "distinct"),
    "small batch": (13, 70, 17, 4, 2, "mixed"),
    "one request": (70, 48, 20, 2, 2, "one"),
    "ragged requests": (150, 40, 20, 5, 3, "runs"),
    "many directions": (40, 32, 70, 3, 1, "runs"),
    "nothing observed": (20, 32, 4, 2, 1, "none"),
    "no ranges": (20, 32, 4, 2, 0, "mixed"),
    "no directions": (20, 32, 0, 2, 1, "mixed"),
    "no segments": (9, 32, 4, 0, 1, "none"),
    "no tokens": (0, 32, 4, 2, 1, "none"),
    "special values": (30, 37, 6, 3, 2, "mixed"),
    "special values of one request": (30, 37, 6, 3, 2, "one"),
    "special values, a request each": (16, 37, 20, 16, 2, "distinct"),
}
TOKEN_LAYOUTS: dict[str, Callable] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack([x, torch.full_like(x, NAN)], -1).flatten(-2)[..., ::2],
    "rows of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, NAN)], -1)[..., : x.shape[-1]],
}


def segments_of(kind: str, n: int, count: int, g: torch.Generator) -> torch.Tensor:
    if kind == "none" or count == 0:
        return torch.full((n,), -1)
    if kind == "one":
        return torch.full((n,), count - 1)
    if kind == "distinct":
        return torch.randperm(max(n, count), generator=g)[:n] % count
    drawn = torch.randint(-1, count + 1, (n,), generator=g)  # -1 and `count`: not observed
    return drawn.sort().values if kind == "runs" else drawn


def tokens(n, d, k, segments, range_rows, kind, *, dtype=FP32, blocks=0, layers=3, layer=1, special=False, seed=0):
    """Arguments of `cosine_monitor`; blocks = 0: x is [N, D]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*([blocks] if blocks else []), n, d, generator=g).to(dtype)
    if special:
        values = (NAN, INF, -INF, 0.0, 1e-30 if dtype != FP16 else 0.0)
        for i, value in enumerate(values):
            x[..., 3 * i, :] = value if i > 2 else x[..., 3 * i, :]
            x[..., 3 * i, i] = value
    directions = torch.nn.functional.normalize(torch.randn(layers, k, d, generator=g), dim=2)
    if k > 2:
        directions[:, 1] = 0  # an unused row
    width = 0.3 + 0.2 * torch.rand(layers, range_rows, 1, k, generator=g)
    state = MonitorState.create(directions, segments, torch.cat([-width, width], 2))
    packed = torch.stack(
        [
            segments_of(kind, n, segments, g),
            torch.randint(-1, range_rows + 1, (n,), generator=g),
            torch.randperm(max(n, 1), generator=g)[:n],
        ]
    ).int()
    return x, state.directions, packed, state.ranges, state.extremes, state.counts, layer


def _truth(arguments: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Extremes and counts by float64 cosines and a loop over tokens."""
    x, directions, packed, ranges, extremes, counts, layer = arguments
    extremes, counts = extremes.double(), counts.clone()
    x = (x if x.dim() == 3 else x[None]).float()
    for m in range(len(x)):
        at = layer + m
        for i in range(x.shape[1]):
            segment, row, position = packed[:, i].tolist()
            if not 0 <= segment < counts.shape[1]:
                continue
            offends = not torch.isfinite(x[m, i].square().sum())
            if offends:
                counts[at, segment, 0] += 1
            else:
                wide = x[m, i].double()
                cosine = directions[at].double() @ wide / (wide.norm() if wide.norm() > 1.1e-19 else INF)
                extremes[at, segment, 0] = extremes[at, segment, 0].minimum(cosine)
                extremes[at, segment, 1] = extremes[at, segment, 1].maximum(cosine)
                if 0 <= row < ranges.shape[1]:
                    low, high = ranges[at, row].double()
                    margin = torch.cat([cosine - low, cosine - high]).abs()
                    assert (margin > 1e-5).all(), "a bound too near to a cosine; take another seed"
                    offends = bool(((cosine < low) | (cosine > high)).any())
            if offends:
                counts[at, segment, 1] = min(int(counts[at, segment, 1]), position)
    return extremes, counts


def _check_state(arguments: tuple, extremes: torch.Tensor, counts: torch.Tensor) -> None:
    want, want_counts = _truth(arguments)
    assert torch.equal(counts.cpu(), want_counts)
    d = arguments[1].shape[2]
    torch.testing.assert_close(extremes.cpu().double(), want, rtol=0, atol=2e-7 * max(4, d**0.5))


def check_tokens(launch: Callable, arguments: tuple, device: str) -> None:
    """Extremes against float64, counts exactly; twice over the same tokens only adds non-finite counts."""
    *tensors, layer = arguments
    moved = [move(tensor, device) for tensor in tensors]
    launch(*moved, layer)
    _check_state(arguments, moved[4], moved[5])
    for was, now in zip(tensors[:4], moved[:4], strict=True):
        torch.testing.assert_close(now.cpu(), was, rtol=0, atol=0, equal_nan=True)
    first = [moved[4].cpu().clone(), moved[5].cpu().clone()]
    launch(*moved, layer)
    assert torch.equal(moved[4].cpu(), first[0]) and torch.equal(moved[5].cpu()[..., 1], first[1][..., 1])
    assert torch.equal(moved[5].cpu()[..., 0], 2 * first[1][..., 0])


NORMS = [(RMS, False), (RMS_WIDE, False), (RMS_ONE, False), (LAYER, False), (LAYER, True)]


def tiny_norm(kind, bias, *, dtype=FP32) -> tuple:
    """Rows whose mean square is below the smallest normal float32, which 1 / sqrt must not take for 0; eps = 0."""
    x, weight, shift, _, _ = norm(3, 64, kind, bias, dtype=FP64)
    return *((x * 1e-20).to(dtype), weight.to(dtype), None if shift is None else shift.to(dtype)), 0.0, kind


def norm(n, d, kind, bias, *, dtype=FP32, seed=0) -> tuple:
    """x, weight, bias, eps, kind."""
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, d, generator=g) * 3 + (1.5 if kind == LAYER else 0)).to(dtype)
    weight = (torch.randn(d, generator=g) * 0.5 + 1).to(dtype)
    return x, weight, torch.randn(d, generator=g).to(dtype) if bias else None, 1e-5, kind


def check_norm(got: torch.Tensor, arguments: tuple) -> None:
    """Within a few last digits of the model's own rounding steps; float32 allows for sums in another order."""
    x, weight, bias, eps, kind = arguments
    want = norm_tap._norm(x, weight, bias, eps, kind)
    assert got.is_contiguous() and got.dtype == x.dtype and got.shape == x.shape
    error = (got.cpu().double() - want.double()).abs()
    scale = want.double().abs()
    if kind == LAYER:  # x - mean and the bias may cancel
        wide = x.double()
        size = wide.abs() + wide.abs().mean(1, keepdim=True)
        size = size * (wide.var(1, correction=0, keepdim=True) + eps).rsqrt()
        scale = size * weight.double().abs() + (0 if bias is None else bias.double().abs())
    narrow = x.dtype in (FP16, BF16)
    rounding = ulp(scale, FP32 if x.dtype == FP64 and kind != LAYER else x.dtype)
    same = got.cpu().isnan() & want.isnan()
    if narrow and want.numel() > 100:  # a rounding too few or too many shows in every third value
        assert (same | (error == 0)).double().mean() > 0.95
    assert (same | (error <= (3 if narrow else 8) * rounding)).all(), f"off by {(error / rounding)[~same].max()} digits"


# ------------------------------------------------------------------------------------------------------ delta_sketch

SKETCHES: dict[str, tuple] = {
    "odd sizes": (7, 5, 3),
    "several panels": (70, 48, 16),
    "several tiles": (33, 290, 1),
    "one row": (1, 40, 2),
    "one column": (40, 1, 2),
    "wide block": (20, 17, 70),
    "no rows": (0, 5, 3),
    "no columns": (5, 0, 3),
    "no vectors": (40, 20, 0),
}
SKETCH_DTYPES = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, BF16), (FP64, FP32), (FP64, FP64)]


def sketch(m, n, k, dtypes=(FP32, FP32), seed=0) -> tuple:
    g = torch.Generator().manual_seed(seed)
    w0 = torch.randn(m, n, generator=g, dtype=FP64).to(dtypes[0])
    change = 0.1 * torch.randn(m, n, generator=g, dtype=FP64) * (torch.rand(m, n, generator=g) < 0.7)
    dtype = FP64 if dtypes == (FP64, FP64) else FP32
    return w0, (w0.double() + change).to(dtypes[1]), torch.randn(n, k, generator=g, dtype=FP64).to(dtype)


def check_sketch(launch: Callable, arguments: tuple, device: str) -> tuple:
    """The four results against float64, within a few roundings of each sum's absolute values."""
    w0, w1, x = arguments
    moved = [move(tensor, device) for tensor in arguments]
    y, z, square, changed = (tensor.cpu() for tensor in launch(*moved))
    delta, eps = w1.double() - w0.double(), torch.finfo(x.dtype).eps
    want = delta @ x.double()
    bound = delta.abs() @ x.double().abs()
    assert y.dtype == z.dtype == x.dtype and (square.dtype, changed.dtype) == (FP64, torch.int64)
    assert y.shape == want.shape and z.shape == x.shape and square.shape == changed.shape == ()
    if delta.isfinite().all():
        assert ((y.double() - want).abs() <= 8 * eps * bound).all()
        assert ((z.double() - delta.T @ want).abs() <= 16 * eps * (delta.abs().T @ bound)).all()
        torch.testing.assert_close(square, delta.square().sum(), rtol=(8 if x.dtype == FP64 else 2) * eps, atol=0)
    else:
        ref_y, ref_z, ref_square, _ = sketch_reference(*arguments)
        assert torch.equal(y.isfinite(), ref_y.isfinite()) and torch.equal(z.isfinite(), ref_z.isfinite())
        assert torch.equal(square.isnan(), ref_square.isnan()) and not square.isfinite()
    assert changed.item() == (w0.double() != w1.double()).sum().item()
    return y, z, square, changed


def check_nan(launch: Callable, device: str) -> None:
    """Directions and ranges can be changed in place: NaN in them makes judged tokens offend, and enters no extreme."""
    for n in (5, 40):
        for name in (1, 3):  # directions, ranges
            *tensors, layer = tokens(n, 24, 5, 2, 2, "runs")
            tensors[name][:, 0] = NAN
            moved = [move(tensor, device) for tensor in tensors]
            launch(*moved, layer)
            cosine_monitor.OP.reference(*tensors, layer)
            torch.testing.assert_close(moved[4].cpu(), tensors[4], rtol=0, atol=2e-6)
            assert torch.equal(moved[5].cpu(), tensors[5])
            assert not moved[4].isnan().any() and (tensors[5][layer, :, 1] != NONE).any()
