"""`prefix_attention` in Triton: an online softmax over tiles of the shared prefix, then over the suffixes.

The query rows of a batch row and a key-value head (variants, then the query heads that share it, then tokens) are cut
into tiles of `BLOCK_M`, whatever the length of a suffix: with 8 tokens and 64 rows a tile holds 8 variants, and a tile
of the prefix is read once for all of them. The suffixes of the tile's variants are then one more list of keys, of which
a row sees those of its own variant: 64 keys for 64 rows there, the work of a quarter of a prefix of 256. One tile per
variant would leave the matrix units with 8 rows of 16 at best, and read the prefix once per variant.

What a query does not see has weight 0, but 0 * NaN is NaN: a value that is not finite counts as 0, and the logit of its
key is NaN for those who see it.

Floor: 4 R H S (P + S) Dh flops, q and out moved once, the prefix read once per tile of query rows of its head (from L2
after the first). float32 uses FMA units on NVIDIA ("ieee"), a chunk of the columns at a time: whole rows spill. 16-bit
types use the matrix units with float32 sums; weights are rounded to those types before the values are summed, as the
models' own attention does. Keys behind the diagonal are computed and masked: where suffixes are long, a factor of up to
2. In a forward with suffixes of 8 tokens over 256 all of this is 1% of the work.

Not measured on a GPU yet; the block sizes are a reasoned choice.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

PRECISION = "ieee"


@triton.jit
def _tanh(x):
    """Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) would lose its digits."""
    square = x * x
    p = -5.70498872745e-3 * square + 2.06390887954e-2
    p = p * square - 5.37397155531e-2
    p = p * square + 1.33314422036e-1
    p = p * square - 3.33332819422e-1
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    far = tl.where(x < 0, -far, far)
    # float64 keeps enough digits without the polynomial, which has those of a float32.
    near = (tl.abs(x) < 0.625) & (x.dtype != tl.float64)
    return tl.where(near, x + x * square * p, far)


@triton.jit
def _add_keys(
    q, queries, exists, keys, values, known, seen, width, peak, total, acc,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the online softmax.

    `q` points to the rows [BLOCK_M, 1], `queries` are those rows where one chunk holds them; `keys` and `values` point
    to rows [BLOCK_N], of which those of `known` exist; `seen` is [BLOCK_M, BLOCK_N].
    """
    wide: tl.constexpr = acc.dtype
    column = tl.arange(0, BLOCK_D)
    value = tl.load(
        values[:, None] + column[None, :], mask=known[:, None] & (column < width)[None, :], other=0
    )  # [BLOCK_N, BLOCK_D]
    finite = tl.abs(value.to(wide)) < float("inf")
    logits = tl.zeros([queries.shape[0], keys.shape[0]], wide)
    if CHUNK == BLOCK_D:
        key = tl.load(keys[None, :] + column[:, None], mask=(column < width)[:, None] & known[None, :], other=0)
        logits = tl.dot(queries, key.to(OPERAND), logits, input_precision=PRECISION, out_dtype=wide)
    else:
        for start in range(0, width, CHUNK):
            part = start + tl.arange(0, CHUNK)
            some = tl.load(q + part[None, :], mask=exists[:, None] & (part < width)[None, :], other=0).to(OPERAND)
            key = tl.load(keys[None, :] + part[:, None], mask=(part < width)[:, None] & known[None, :], other=0)
            logits = tl.dot(some, key.to(OPERAND), logits, input_precision=PRECISION, out_dtype=wide)
    logits = logits * SCALE
    if SOFTCAP > 0:
        logits = SOFTCAP * _tanh(logits / SOFTCAP)
    lost = tl.max((~finite).to(tl.int32), axis=1) > 0
    logits = tl.where(lost[None, :], float("nan"), logits)
    # The reduction does nothing but hide from the compiler that `seen` was bytes: it would lay out the operands of the
    # next product for 8-bit elements, which it cannot do for float64 (Triton 3.6).
    seen = tl.max(seen[:, :, None].to(tl.int32), axis=2) > 0
    logits = tl.where(seen, logits, -float("inf"))
    highest = tl.maximum(peak, tl.max(logits, axis=1))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weights = tl.exp(logits - base[:, None])
    factor = tl.exp(peak - base)
    total = total * factor + tl.sum(weights, axis=1)
    value = tl.where(finite, value, 0.0).to(OPERAND)
    acc = tl.dot(weights.to(OPERAND), value, acc * factor[:, None], input_precision=PRECISION, out_dtype=wide)
    return highest, total, acc


@triton.jit(do_not_specialize=["variants", "batch", "length", "past", "stride_m_b", "stride_m_s"])
def prefix_attention_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    mask,
    sinks,
    out,
    variants,
    batch,
    shared,
    group,
    length,
    past,
    width,
    stride_q_r,
    stride_q_h,
    stride_q_s,
    stride_k_r,
    stride_k_h,
    stride_k_s,
    stride_v_r,
    stride_v_h,
    stride_v_s,
    stride_pk_b,
    stride_pk_h,
    stride_pk_s,
    stride_pv_b,
    stride_pv_h,
    stride_pv_s,
    stride_m_b,
    stride_m_s,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Grid: batch rows * key-value heads * tiles of query rows, the last running fastest: the prefix is in L2."""
    wide: tl.constexpr = tl.float64 if q.dtype.element_ty == tl.float64 else tl.float32
    of_variant = group * length
    rows = variants * of_variant
    tiles = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    batch_row, head = program // tiles // shared, program // tiles % shared
    begin = (program % tiles * BLOCK_M).to(tl.int32)
    index = begin + tl.arange(0, BLOCK_M)
    exists = index < rows
    variant = tl.where(exists, index // of_variant, -1)
    token = index % length
    query_head = head * group + index % of_variant // length
    first, last = begin // of_variant, (tl.minimum(begin + BLOCK_M, rows) - 1) // of_variant
    row = variant.to(tl.int64) * batch + batch_row
    column = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (column < width)[None, :]
    cells = q + (row * stride_q_r + query_head * stride_q_h + token * stride_q_s)[:, None]
    if CHUNK == BLOCK_D:
        queries = tl.load(cells + column[None, :], mask=inside, other=0).to(OPERAND)
    else:
        queries = tl.zeros([BLOCK_M, 1], OPERAND)

    acc = tl.zeros([BLOCK_M, BLOCK_D], wide)
    if SINKS:
        peak = tl.load(sinks + query_head, mask=exists, other=0).to(wide)
        total = tl.full([BLOCK_M], 1.0, wide)
    else:
        peak = tl.full([BLOCK_M], -float("inf"), wide)
        total = tl.zeros([BLOCK_M], wide)
    k += head * stride_k_h
    v += head * stride_v_h
    prefix_k += batch_row * stride_pk_b + head * stride_pk_h
    prefix_v += batch_row * stride_pv_b + head * stride_pv_h
    mask += batch_row * stride_m_b
    # 32 bits: 64-bit pointers to a tile of bytes take too many registers. A batch row's mask is smaller than 2 GB.
    seen_by = (token * stride_m_s).to(tl.int32)[:, None]
    for start in range(0, past, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        known = key < past
        seen = tl.load(mask + seen_by + key[None, :], mask=exists[:, None] & known[None, :], other=0)
        far = key.to(tl.int64)
        peak, total, acc = _add_keys(
            cells, queries, exists, prefix_k + far * stride_pk_s, prefix_v + far * stride_pv_s, known, seen != 0,
            width, peak, total, acc, SCALE, SOFTCAP, OPERAND, PRECISION, BLOCK_D, CHUNK,
        )  # fmt: skip
    for start in range(0, ((last - first + 1) * length).to(tl.int32), BLOCK_N):
        item = start + tl.arange(0, BLOCK_N)
        owner, key = first + item // length, item % length
        known = owner <= last
        own = known[None, :] & (variant[:, None] == owner[None, :])
        seen = tl.load(mask + seen_by + (past + key)[None, :], mask=own, other=0)
        of_row, far = owner.to(tl.int64) * batch + batch_row, key.to(tl.int64)
        peak, total, acc = _add_keys(
            cells, queries, exists, k + of_row * stride_k_r + far * stride_k_s,
            v + of_row * stride_v_r + far * stride_v_s, known, seen != 0,
            width, peak, total, acc, SCALE, SOFTCAP, OPERAND, PRECISION, BLOCK_D, CHUNK,
        )  # fmt: skip
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    target = ((row * length + token) * shared * group + query_head) * width
    tl.store(out + target[:, None] + column[None, :], acc.to(out.dtype.element_ty), mask=inside)


# Bytes of an element: {columns of a head up to: (rows, keys, columns of a chunk of q k^T, warps)}. No spills, by
# tests/kernels/resources.csv.
_TILES = {
    2: {64: (64, 32, 64, 4), 128: (64, 32, 128, 8), 256: (32, 32, 256, 8), 512: (16, 16, 512, 8)},
    # A tl.dot of 64 rows of float32 does not compute in float32 on sm_100 (Triton 3.6).
    4: {64: (32, 32, 32, 8), 128: (32, 16, 32, 4), 256: (32, 16, 32, 8), 512: (16, 16, 32, 8)},
    8: {64: (16, 16, 16, 4), 128: (16, 16, 32, 4), 512: (16, 16, 16, 8)},
}
_OPERANDS = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def _blocks(rows: int, width: int, dtype: torch.dtype) -> dict:
    block_d = max(16, triton.next_power_of_2(width))
    sizes = _TILES[dtype.itemsize]
    tallest, block_n, chunk, warps = sizes[min((size for size in sizes if size >= block_d), default=512)]
    block_m = min(tallest, max(16, triton.next_power_of_2(rows)))
    if block_m == 16 and block_d <= 128 and dtype.itemsize == 2:
        warps, chunk = 4, 64  # 128 columns at once take 8 bytes of stack on sm_90 and sm_100
    return {
        "OPERAND": _OPERANDS[dtype],
        "PRECISION": PRECISION,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "CHUNK": min(chunk, block_d),
        "num_warps": warps,
        "num_stages": 2,
    }


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The output [R, S, H, Dh]; arguments as in `bkdfast.ops.prefix_attention`."""
    (count, heads, length, width), (batch, shared, past, _) = q.shape, prefix_k.shape
    out = q.new_empty((count, length, heads, width))
    if out.numel() == 0:
        return out
    for name, x in (("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v)):
        if width > 1 and x.numel() and x.stride(3) != 1:
            raise RuntimeError(f"prefix_attention: {name}'s last dimension must be contiguous, strides {x.stride()}")
    variants, group = count // batch, heads // shared
    blocks = _blocks(variants * group * length, width, q.dtype)
    tiles = triton.cdiv(variants * group * length, blocks["BLOCK_M"])
    with torch.cuda.device_of(q):
        prefix_attention_kernel[(batch * shared * tiles,)](
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            mask,
            sinks,
            out,
            variants,
            batch,
            shared,
            group,
            length,
            past,
            width,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *prefix_k.stride()[:3],
            *prefix_v.stride()[:3],
            *mask.stride()[:2],
            # Constants of a model. As arguments they would be float32, for float64 inputs too.
            SCALE=scale,
            SOFTCAP=softcap,
            SINKS=sinks is not None,
            **blocks,
        )
    return out


def aot_variants() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) for ahead-of-time compilation.

    "i32:16" is an integer divisible by 16; inner strides are the constant 1: what the launcher specialises on.
    """
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
    strides = [f"stride_{x}_{i}" for x, of in (("q", "rhs"), ("k", "rhs"), ("v", "rhs")) for i in of]
    strides += [f"stride_{x}_{i}" for x in ("pk", "pv") for i in "bhs"]
    integers = dict.fromkeys("variants batch shared group length past stride_m_b stride_m_s".split(), "i32")
    integers |= dict.fromkeys(("width", *strides), "i32:16")
    for dtype, torch_dtype in names.items():
        tensors = dict.fromkeys("q k v prefix_k prefix_v out".split(), f"*{dtype}")
        tensors |= {"mask": "*i1", "sinks": "*fp64" if dtype == "fp64" else "*fp32"}
        few = () if dtype == "fp64" else ((8, 64), (8, 128))  # its tiles have 16 rows anyway
        for rows, width in (*few, (256, 64), (256, 128), (256, 256)):
            blocks = _blocks(rows, width, torch_dtype)
            warps, stages = blocks.pop("num_warps"), blocks.pop("num_stages")
            constants = {"SCALE": 0.125, "SOFTCAP": 30.0, "SINKS": True, **blocks}
            if width != 64:
                constants |= {"SOFTCAP": 0.0, "SINKS": False, "sinks": None}
            name = f"{dtype}-m{blocks['BLOCK_M']}-d{width}"
            yield name, prefix_attention_kernel, tensors | integers, constants, warps, stages
