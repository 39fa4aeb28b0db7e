"""`cosine_monitor` in Triton: cosines of tokens to directions, reduced per segment and compared with ranges.

Floor: N*D and K*D read once per block, 2 N K D flops. A program takes a tile of tokens and a tile of directions through
all of D, so x is read once per tile of up to 64 directions and the directions once per tile of tokens (from L2 after
the first). Splitting D as well would give decode more programs, but adding the parts in a fixed order would need a
second launch; small tiles of directions give it enough: 32 blocks, 20 directions and up to 8 tokens are 160 programs.

Up to 8 tokens the products are summed elementwise: a matrix instruction would work on 16 rows. Above, `tl.dot` with
`PRECISION` "ieee", which means FMA units on NVIDIA and matrix units on AMD; "tf32x3" uses NVIDIA's matrix units.

Minimum and maximum go through integer atomics on the float's bits and counts through integer adds, which do not depend
on order, so results repeat bit for bit; a tile whose tokens share a segment is reduced first. NaN never gets there.

Not measured on a GPU yet; the block sizes are a reasoned choice. There is no autotuning: its trial runs would count
non-finite tokens again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

PRECISION = "ieee"
_DECODE = 8  # tokens up to which there is no tl.dot


@triton.jit
def square_and_dot(
    x, rows, known, directions, chosen, start, d, stride_d, square, dot,
    DOT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add columns [start, start + BLOCK_D) to |x|^2 `square` [BLOCK_N] and <x, d> `dot` [BLOCK_N, BLOCK_K]."""
    column = start + tl.arange(0, BLOCK_D).to(tl.int64)
    inside = (column < d)[None, :]
    # Upcast before any arithmetic: float32 sums, and the interpreter has no bfloat16 arithmetic.
    part = tl.load(x + rows[:, None] + column[None, :] * stride_d, mask=known[:, None] & inside, other=0)
    part = part.to(tl.float32)  # [BLOCK_N, BLOCK_D]
    unit = tl.load(directions[:, None] + column[None, :], mask=chosen[:, None] & inside, other=0)  # [BLOCK_K, BLOCK_D]
    square += tl.sum(part * part, axis=1)
    if DOT:
        dot = tl.dot(part, tl.trans(unit), dot, input_precision=PRECISION)
    else:
        dot += tl.sum(part[:, None, :] * unit[None, :, :], axis=2)
    return part, square, dot


@triton.jit
def observe(
    square, dot, token, direction, block, tokens, ranges, extremes, counts, n, k, range_rows, segments,
    stride_field, stride_token,
):  # fmt: skip
    """Fold the cosines of a tile of tokens with a tile of directions into the accumulators."""
    finite = square < float("inf")  # False for NaN
    usable = finite & (square >= 1.1754943508222875e-38)  # below: a zero token, cosine 0
    length = tl.sqrt(tl.where(usable, square, 1.0))
    cosine = tl.where(usable[:, None], dot / length[:, None], 0.0)

    known = token < n
    segment = tl.load(tokens + token * stride_token, mask=known, other=-1)
    row = tl.load(tokens + stride_field + token * stride_token, mask=known, other=-1)
    position = tl.load(tokens + 2 * stride_field + token * stride_token, mask=known, other=0)
    observed = (segment >= 0) & (segment < segments)
    chosen = (direction < k)[None, :]

    judged = (observed & (row >= 0) & (row < range_rows))[:, None] & chosen
    bounds = ranges + ((block * range_rows + row) * 2 * k)[:, None] + direction[None, :]
    low = tl.load(bounds, mask=judged, other=-float("inf"))
    high = tl.load(bounds + k, mask=judged, other=float("inf"))
    beyond = judged & ~((cosine >= low) & (cosine <= high))  # NaN, of either, is outside
    offends = observed & (~finite | (tl.max(beyond.to(tl.int32), axis=1) > 0))
    # Every tile of directions sees the same tokens: the first one counts those that are not finite.
    lost = observed & ~finite & (tl.min(direction, axis=0) == 0)
    enters = (observed & finite)[:, None] & chosen & (cosine == cosine)

    last = tl.max(tl.where(observed, segment, -1), axis=0)
    if last >= 0:
        if tl.min(tl.where(observed, segment, last), axis=0) == last:
            slot = block * segments + last
            kept = extremes + slot * 2 * k + direction
            lowest = tl.min(tl.where(enters, cosine, float("inf")), axis=0)
            highest = tl.max(tl.where(enters, cosine, -float("inf")), axis=0)
            tl.atomic_min(kept, lowest, mask=direction < k, sem="relaxed")
            tl.atomic_max(kept + k, highest, mask=direction < k, sem="relaxed")
            lost_here = tl.sum(lost.to(tl.int32), axis=0)
            first = tl.min(tl.where(offends, position, 2147483647), axis=0)
            tl.atomic_add(counts + slot * 2, lost_here, mask=lost_here > 0, sem="relaxed")
            tl.atomic_min(counts + slot * 2 + 1, first, mask=first < 2147483647, sem="relaxed")
        else:
            slots = block * segments + segment
            cells = extremes + (slots * 2 * k)[:, None] + direction[None, :]
            tl.atomic_min(cells, cosine, mask=enters, sem="relaxed")
            tl.atomic_max(cells + k, cosine, mask=enters, sem="relaxed")
            tl.atomic_add(counts + slots * 2, lost.to(tl.int32), mask=lost, sem="relaxed")
            tl.atomic_min(counts + slots * 2 + 1, position, mask=offends, sem="relaxed")


@triton.jit(do_not_specialize=["layer", "n", "range_rows", "segments"])
def cosine_monitor_kernel(
    x,
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
    stride_block,
    stride_n,
    stride_d,
    stride_field,
    stride_token,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: (tiles of tokens * tiles of directions, blocks); tiles of directions run fastest: x is in L2 for them."""
    tile, step = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    tiles_k = tl.maximum(tl.cdiv(k, BLOCK_K), 1)
    token = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    direction = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    block = step + layer
    square = tl.zeros([BLOCK_N], tl.float32)
    dot = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    rows = step * stride_block + token * stride_n
    units = directions + (block * k + direction) * d
    for start in range(0, d, BLOCK_D):
        _, square, dot = square_and_dot(
            x, rows, token < n, units, direction < k, start, d, stride_d, square, dot, DOT, PRECISION, BLOCK_D
        )
    observe(
        square, dot, token, direction, block, tokens, ranges, extremes, counts, n, k, range_rows, segments,
        stride_field, stride_token,
    )  # fmt: skip


def _blocks(n: int, d: int, k: int) -> dict:
    deepest = triton.next_power_of_2(max(d, 16))
    if n <= _DECODE:
        block_n = triton.next_power_of_2(n)
        return {
            "DOT": False,
            "PRECISION": PRECISION,
            "BLOCK_N": block_n,
            "BLOCK_K": 4,
            "BLOCK_D": min(deepest, 512, 2048 // block_n),
        }
    # Not 64 rows: Triton 3.6 does not compile those for sm_100.
    block_n, block_k = (16, 16) if n <= 16 else (32, min(64, max(16, triton.next_power_of_2(k))))
    return {"DOT": True, "PRECISION": PRECISION, "BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_D": min(deepest, 64)}


def _stages(size: int) -> int:
    return 3 if size == 2 else 2  # 3 stages of wider elements spill


def launch(
    x: torch.Tensor,
    directions: torch.Tensor,
    tokens: torch.Tensor,
    ranges: torch.Tensor,
    extremes: torch.Tensor,
    counts: torch.Tensor,
    layer: int,
) -> None:
    """Update extremes and counts in place; arguments as in `bkdfast.ops.cosine_monitor`."""
    x = x if x.dim() == 3 else x[None]
    (blocks, n, d), k, segments = x.shape, directions.shape[1], counts.shape[1]
    if n == 0 or blocks == 0 or segments == 0:
        return
    sizes = _blocks(n, d, k)
    # Without directions (k = 0) non-finite tokens still count.
    tiles_k = max(1, triton.cdiv(k, sizes["BLOCK_K"]))
    with torch.cuda.device_of(x):
        cosine_monitor_kernel[(triton.cdiv(n, sizes["BLOCK_N"]) * tiles_k, blocks)](
            x,
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
            **sizes,
            num_warps=4,
            num_stages=_stages(x.element_size()),
        )


SIGNATURE = {"x": "", "directions": "*fp32", "tokens": "*i32", "ranges": "*fp32", "extremes": "*fp32", "counts": "*i32"}
INTEGERS = dict.fromkeys("layer n k range_rows segments stride_field".split(), "i32")
INTEGERS |= dict.fromkeys(("d", "stride_block", "stride_n"), "i32:16")
UNIT = {"stride_d": 1, "stride_token": 1}


def aot_variants() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) for ahead-of-time compilation.

    "i32:16" is an integer divisible by 16; inner strides are the constant 1: what the launcher specialises on.
    """
    for dtype, size in (("bf16", 2), ("fp16", 2), ("fp32", 4), ("fp64", 8)):
        signature = SIGNATURE | INTEGERS | {"x": f"*{dtype}"}
        for n, k in ((4, 20), (16, 20), (4096, 20), (4096, 64)):
            constants = UNIT | _blocks(n, 4096, k)
            kinds = signature | ({} if k % 16 else {"k": "i32:16"})
            yield f"{dtype}-n{n}-k{k}", cosine_monitor_kernel, kinds, constants, 4, _stages(size)
