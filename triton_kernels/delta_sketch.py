"""`delta_sketch` in Triton: Y = D X, Z = D^T Y, |D|_F^2 and the count of changed entries, with D = W1 - W0.

Floor: reading both matrices once, 4 m n k flops. Z needs a row of Y complete, so a program takes a panel of `BLOCK_M`
rows through all columns for Y and then once more, backwards, for Z. What the first sweep read last is still in L2, so
the second reads HBM only for what does not fit there: with bfloat16 and n = 4096, 128 panels of both matrices are 67 MB
against the 50 MB of an H200. A panel of 16 rows would fit, and read X and update Z twice as often. More than 32 columns
of X read the matrices once per 32.

Z has no atomics: each of at most 128 programs adds its panels to a part of its own, and `torch.sum` adds the parts in a
fixed order. The number of programs depends on the shape only, so results repeat bit for bit. Y and Z accumulate in X's
dtype; squares in float64, because a float32 square underflows below 1e-19.

`PRECISION` "ieee" means FMA units on NVIDIA, which makes the kernel compute-bound there; "tf32x3" uses the matrix units
and loses about two bits of a product. Not measured on a GPU yet; the block sizes are a reasoned choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

PRECISION = "ieee"
_PROGRAMS = 128
_WORKSPACE = 1 << 28  # bytes of the parts of Z


@triton.jit
def _delta(
    w0, w1, row, column, m, n, stride_w0_m, stride_w0_n, stride_w1_m, stride_w1_n,
    WIDE: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A tile of W1 - W0, and where they differ [BLOCK_M, BLOCK_N]; both 0 outside the matrices."""
    inside = (row < m)[:, None] & (column < n)[None, :]
    base = tl.load(w0 + row[:, None] * stride_w0_m + column[None, :] * stride_w0_n, mask=inside, other=0).to(WIDE)
    tuned = tl.load(w1 + row[:, None] * stride_w1_m + column[None, :] * stride_w1_n, mask=inside, other=0).to(WIDE)
    return (tuned - base).to(dtype), (tuned != base).to(tl.int32)


@triton.jit(do_not_specialize=["m"])
def delta_sketch_kernel(
    w0,
    w1,
    x,
    y,
    z_parts,
    square_parts,
    changed_parts,
    m,
    n,
    k,
    stride_w0_m,
    stride_w0_n,
    stride_w1_m,
    stride_w1_n,
    stride_x_n,
    stride_x_k,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Grid: (programs, tiles of X's columns)."""
    dtype: tl.constexpr = x.dtype.element_ty
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    of_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K).to(tl.int64)
    z_part = z_parts + program * n * k
    squares = tl.zeros([BLOCK_M], tl.float64)
    changed = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    steps = tl.cdiv(n, BLOCK_N)
    for panel in range(program, tl.cdiv(m, BLOCK_M), programs):
        row = panel * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        sums = tl.zeros([BLOCK_M, BLOCK_K], dtype)
        for step in range(0, steps):
            column = step * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
            delta, differs = _delta(
                w0, w1, row, column, m, n, stride_w0_m, stride_w0_n, stride_w1_m, stride_w1_n, WIDE, dtype
            )
            squares += tl.sum(delta.to(tl.float64) * delta.to(tl.float64), axis=1)
            changed += differs
            entries = x + column[:, None] * stride_x_n + of_k[None, :] * stride_x_k
            vectors = tl.load(entries, mask=(column < n)[:, None] & (of_k < k)[None, :], other=0)
            sums = tl.dot(delta, vectors, sums, input_precision=PRECISION, out_dtype=dtype)
        tl.store(y + row[:, None] * k + of_k[None, :], sums, mask=(row < m)[:, None] & (of_k < k)[None, :])

        # Other threads of the program may read what these wrote to the part of Z for the panel before.
        tl.debug_barrier()
        steps_z = tl.cdiv(n, BLOCK_Z)
        for back in range(0, steps_z):
            column = (steps_z - 1 - back) * BLOCK_Z + tl.arange(0, BLOCK_Z).to(tl.int64)
            delta, _ = _delta(
                w0, w1, row, column, m, n, stride_w0_m, stride_w0_n, stride_w1_m, stride_w1_n, WIDE, dtype
            )
            cells = z_part + column[:, None] * k + of_k[None, :]
            inside = (column < n)[:, None] & (of_k < k)[None, :]
            before = tl.load(cells, mask=inside & (panel > program), other=0, cache_modifier=".cg")
            added = tl.dot(tl.trans(delta), sums, input_precision=PRECISION, out_dtype=dtype)
            tl.store(cells, before + added, mask=inside)
    if tl.program_id(1) == 0:
        tl.store(square_parts + program, tl.sum(squares, axis=0))
        tl.store(changed_parts + program, tl.sum(tl.sum(changed, axis=1).to(tl.int64), axis=0))


def _blocks(n: int, k: int, wide: torch.dtype, dtype: torch.dtype) -> dict:
    double = dtype == torch.float64
    block_k = min(32, max(16, triton.next_power_of_2(max(k, 1))))
    # Wider tiles spill registers.
    widest = 16 if double else 64
    return {
        "WIDE": tl.float64 if wide == torch.float64 else tl.float32,
        "PRECISION": PRECISION,
        "BLOCK_M": 32,
        "BLOCK_N": min(widest, max(16, triton.next_power_of_2(max(n, 1)))),
        # A tl.dot of 64 rows or more runs in TF32 on sm_100 whatever input_precision says (Triton 3.6, operands that
        # come from 16-bit types).
        "BLOCK_Z": 16 if double else 32,
        "BLOCK_K": block_k,
    }


def launch(
    w0: torch.Tensor, w1: torch.Tensor, x: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, z, frobenius_sq, changed); arguments as in `bkdfast.ops.delta_sketch`."""
    (m, n), k = w0.shape, x.shape[1]
    blocks = _blocks(n, k, torch.promote_types(w0.dtype, w1.dtype), x.dtype)
    part = max(1, n * k * x.element_size())
    programs = min(triton.cdiv(m, blocks["BLOCK_M"]), _PROGRAMS, max(1, _WORKSPACE // part))
    y = x.new_empty((m, k))
    z_parts = x.new_empty((programs, n, k))
    square_parts = x.new_empty(programs, dtype=torch.float64)
    changed_parts = x.new_empty(programs, dtype=torch.int64)
    if programs:
        with torch.cuda.device_of(w0):
            delta_sketch_kernel[(programs, max(1, triton.cdiv(k, blocks["BLOCK_K"])))](
                w0,
                w1,
                x,
                y,
                z_parts,
                square_parts,
                changed_parts,
                m,
                n,
                k,
                *w0.stride(),
                *w1.stride(),
                *x.stride(),
                **blocks,
                num_warps=8,
                num_stages=2,
            )
    return y, z_parts.sum(0), square_parts.sum(), changed_parts.sum()


def aot_variants() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) for ahead-of-time compilation.

    "i32:16" is an integer divisible by 16; inner strides are the constant 1: what the launcher specialises on.
    """
    integers = {"m": "i32"} | dict.fromkeys(("n", "k", "stride_w0_m", "stride_w1_m", "stride_x_n"), "i32:16")
    unit = dict.fromkeys(("stride_w0_n", "stride_w1_n", "stride_x_k"), 1)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    pairs = [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "fp64"), ("fp64", "fp64")]
    for base, tuned in pairs:
        dtype = "fp64" if base == tuned == "fp64" else "fp32"
        signature = {"w0": f"*{base}", "w1": f"*{tuned}", **dict.fromkeys(("x", "y", "z_parts"), f"*{dtype}")}
        signature |= {"square_parts": "*fp64", "changed_parts": "*i64"} | integers
        for k in (16, 32) if base == tuned else (16,):
            constants = unit | _blocks(4096, k, torch.promote_types(names[base], names[tuned]), names[dtype])
            yield f"{base}-{tuned}-k{k}", delta_sketch_kernel, signature, constants, 8, 2
