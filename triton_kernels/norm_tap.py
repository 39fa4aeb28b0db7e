"""`norm_tap` and `norm_monitor` in Triton: a normalisation that also feeds the monitor.

`norm_tap`: one program a row. Floor: x read and y written once, and one row of the step buffer. The first `BLOCK_D`
columns stay in registers, which is the whole row up to 8192; only what is longer is read again.

`norm_monitor`: a program takes a tile of tokens through D for |x|^2 and the products with the directions, folds the
cosines into the accumulators, and goes through the tile again, backwards and from L2, to write y (LAYER goes twice: its
variance is of centred values). Floor: x read and y written once, K*D read once, 2 N K D flops. It fuses where there are
enough tiles of tokens to occupy a GPU; with few tokens, or more than 64 directions, the two kernels run one after the
other and the second finds x in L2.

Not measured on a GPU yet; block sizes and `FUSE_FROM` are a reasoned choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from bkdfast.triton_kernels import cosine_monitor as _cosine
from bkdfast.triton_kernels.cosine_monitor import observe, square_and_dot

RMS, RMS_WIDE, RMS_ONE, LAYER = range(4)  # as in bkdfast/ops/norm_tap.py
FUSE_FROM = 2048
"""Tokens from which `norm_monitor` is one kernel."""
_FUSE_DIRECTIONS = 64


@triton.jit
def _rsqrt(v):
    """1 / sqrt(v), also of subnormal v: `tl.rsqrt` of float32 takes those for 0 in compiled kernels."""
    if v.dtype == tl.float64:
        return tl.rsqrt(v)
    tiny = v < 2.0**-78
    return tl.rsqrt(tl.where(tiny, v * 2.0**48, v)) * tl.where(tiny, 2.0**24, 1.0)


@triton.jit
def _scaled(x, mean, scale, w, b, KIND: tl.constexpr, dtype: tl.constexpr):
    """A tile of the norm from upcast x, w and b; it rounds where the models' modules do."""
    if KIND == 0:
        # r(w * r(unit)): both factors have x's dtype, and the product is rounded once more at the store.
        return (w * (x * scale).to(dtype).to(w.dtype)).to(dtype)
    if KIND == 1:
        return (w * (x * scale)).to(dtype)
    if KIND == 2:
        return ((x * scale) * (1 + w.to(tl.float32))).to(dtype)
    return ((x - mean) * scale * w + b).to(dtype)


@triton.jit
def norm_tap_kernel(
    x,
    weight,
    bias,
    step,
    y,
    d,
    stride_n,
    stride_d,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (rows,)."""
    dtype: tl.constexpr = y.dtype.element_ty
    # LAYER of float64 in float64, the RMS norms in float32 like the models' modules; weights in the wider of both.
    wide: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    acc: tl.constexpr = wide if KIND == 3 else tl.float32
    n = tl.program_id(0).to(tl.int64)
    x += n * stride_n
    step += n * d
    y += n * d
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    raw = tl.load(x + column * stride_d, mask=column < d, other=0)
    if STEP:
        tl.store(step + column, raw, mask=column < d)
    kept = raw.to(acc)  # the first columns stay in registers

    mean = tl.zeros([], acc)
    if KIND == 3:
        total = tl.sum(kept, axis=0)
        for start in range(BLOCK_D, d, BLOCK_D):
            at = start + column
            total += tl.sum(tl.load(x + at * stride_d, mask=at < d, other=0).to(acc), axis=0)
        mean = total / d
    centred = tl.where(column < d, kept - mean, 0.0)
    square = tl.sum(centred * centred, axis=0)
    for start in range(BLOCK_D, d, BLOCK_D):
        at = start + column
        raw = tl.load(x + at * stride_d, mask=at < d, other=0)
        if STEP:
            tl.store(step + at, raw, mask=at < d)
        centred = tl.where(at < d, raw.to(acc) - mean, 0.0)
        square += tl.sum(centred * centred, axis=0)
    scale = _rsqrt(square / d + EPS)

    for start in range(0, d, BLOCK_D):
        at = start + column
        if start > 0:
            kept = tl.load(x + at * stride_d, mask=at < d, other=0).to(acc)
        w = tl.load(weight + at, mask=at < d, other=0).to(wide)
        b = tl.zeros([BLOCK_D], wide)
        if BIAS:
            b = tl.load(bias + at, mask=at < d, other=0).to(wide)
        tl.store(y + at, _scaled(kept, mean, scale, w, b, KIND, dtype), mask=at < d)


@triton.jit(do_not_specialize=["layer", "n", "range_rows", "segments"])
def norm_monitor_kernel(
    x,
    weight,
    bias,
    y,
    directions,
    tokens,
    ranges,
    extremes,
    counts,
    layer,
    n,
    d,
    k,
    range_rows,
    segments,
    stride_n,
    stride_d,
    stride_field,
    stride_token,
    EPS: tl.constexpr,
    KIND: tl.constexpr,
    BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (tiles of tokens,); all directions are in one tile."""
    dtype: tl.constexpr = y.dtype.element_ty
    token = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    known = token < n
    direction = tl.arange(0, BLOCK_K)
    block = tl.zeros([], tl.int64) + layer
    square = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    dot = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    rows = token * stride_n
    units = directions + (block * k + direction) * d
    for start in range(0, d, BLOCK_D):
        part, square, dot = square_and_dot(
            x, rows, known, units, direction < k, start, d, stride_d, square, dot, True, PRECISION, BLOCK_D
        )
        total += tl.sum(part, axis=1)
    observe(
        square, dot, token, direction, block, tokens, ranges, extremes, counts, n, k, range_rows, segments,
        stride_field, stride_token,
    )  # fmt: skip

    mean = total / d
    if KIND == 3:
        square = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, d, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D).to(tl.int64)
            inside = known[:, None] & (column < d)[None, :]
            part = tl.load(x + rows[:, None] + column[None, :] * stride_d, mask=inside, other=0).to(tl.float32)
            centred = tl.where(inside, part - mean[:, None], 0.0)
            square += tl.sum(centred * centred, axis=1)
    scale = _rsqrt(square / d + EPS)
    steps = tl.cdiv(d, BLOCK_D)
    for back in range(0, steps):
        column = (steps - 1 - back) * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = known[:, None] & (column < d)[None, :]
        part = tl.load(x + rows[:, None] + column[None, :] * stride_d, mask=inside, other=0).to(tl.float32)
        w = tl.load(weight + column, mask=column < d, other=0).to(tl.float32)
        b = tl.zeros([BLOCK_D], tl.float32)
        if BIAS:
            b = tl.load(bias + column, mask=column < d, other=0).to(tl.float32)
        out = _scaled(part, mean[:, None], scale[:, None], w[None, :], b[None, :], KIND, dtype)
        tl.store(y + token[:, None] * d + column[None, :], out, mask=inside)


def _row_blocks(d: int) -> tuple[int, int]:
    """BLOCK_D and the number of warps."""
    block = min(triton.next_power_of_2(max(d, 1)), 8192)
    return block, min(8, max(1, block // 512))


def _tile_blocks(d: int, k: int) -> dict:
    return {
        "PRECISION": _cosine.PRECISION,
        "BLOCK_N": 32,
        "BLOCK_K": max(16, triton.next_power_of_2(max(k, 1))),
        "BLOCK_D": min(64, max(16, triton.next_power_of_2(d))),
    }


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: int,
    step: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """The norm of x, and x kept in `step[layer]`; arguments as in `bkdfast.ops.norm_tap`."""
    (n, d), y = x.shape, torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    block, warps = _row_blocks(d)
    keeps = step.shape[1] > 0
    with torch.cuda.device_of(x):
        norm_tap_kernel[(n,)](
            x,
            weight,
            weight if bias is None else bias,
            step[layer] if keeps else y,
            y,
            d,
            *x.stride(),
            EPS=eps,
            KIND=kind,
            BIAS=bias is not None,
            STEP=keeps,
            BLOCK_D=block,
            num_warps=warps,
        )
    return y


def launch_norm_monitor(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: int,
    directions: torch.Tensor,
    tokens: torch.Tensor,
    ranges: torch.Tensor,
    extremes: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
) -> torch.Tensor:
    """The norm of x, and extremes and counts updated in place; arguments as in `bkdfast.ops.norm_tap`."""
    (n, d), k, segments = x.shape, directions.shape[1], counts.shape[1]
    # The fused kernel has one width of arithmetic; a float64 LAYER needs two.
    if n < max(FUSE_FROM, 1) or d == 0 or k > _FUSE_DIRECTIONS or segments == 0 or x.dtype == torch.float64:
        _cosine.launch(x, directions, tokens, ranges, extremes, counts, layer)
        return launch(x, weight, bias, eps, kind, x.new_empty(0, 0, 0), 0)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    blocks = _tile_blocks(d, k)
    with torch.cuda.device_of(x):
        norm_monitor_kernel[(triton.cdiv(n, blocks["BLOCK_N"]),)](
            x,
            weight,
            weight if bias is None else bias,
            y,
            directions,
            tokens,
            ranges,
            extremes,
            counts,
            layer,
            n,
            d,
            k,
            ranges.shape[1],
            segments,
            *x.stride(),
            *tokens.stride(),
            EPS=eps,
            KIND=kind,
            BIAS=bias is not None,
            **blocks,
            num_warps=4,
            num_stages=3,
        )
    return y


def aot_variants() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) for ahead-of-time compilation.

    "i32:16" is an integer divisible by 16; inner strides are the constant 1: what the launcher specialises on.
    """
    for dtype in ("bf16", "fp16", "fp32", "fp64"):
        rows = dict.fromkeys(("x", "weight", "bias", "step", "y"), f"*{dtype}")
        rows |= dict.fromkeys(("d", "stride_n"), "i32:16")
        for kind in (RMS, RMS_WIDE, RMS_ONE, LAYER):
            for d in (4096, 16384) if kind in (RMS, LAYER) else (4096,):
                block, warps = _row_blocks(d)
                form = {"EPS": 1e-6, "KIND": kind, "BIAS": kind == LAYER, "STEP": True, "BLOCK_D": block}
                constants = {"stride_d": 1, **form}
                yield f"tap-{dtype}-kind{kind}-d{d}", norm_tap_kernel, rows, constants, warps, 3
    integers = {name: kind for name, kind in _cosine.INTEGERS.items() if name != "stride_block"}
    for dtype in ("bf16", "fp32"):
        tiles = dict.fromkeys(("x", "weight", "bias", "y"), f"*{dtype}")
        tiles |= {name: kind for name, kind in _cosine.SIGNATURE.items() if name != "x"}
        tiles |= integers
        for kind in (RMS, LAYER):
            for k in (20, 64):
                form = {"EPS": 1e-6, "KIND": kind, "BIAS": kind == LAYER}
                constants = _cosine.UNIT | form | _tile_blocks(4096, k)
                kinds = tiles | ({} if k % 16 else {"k": "i32:16"})
                yield f"monitor-{dtype}-kind{kind}-k{k}", norm_monitor_kernel, kinds, constants, 4, 3
