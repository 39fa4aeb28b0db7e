"""`patch_heads` in Triton: in-place edits of [B, T, S*W] activations by an edit table.

Floor: the edited cells, read and written once. Nothing here depends on B or T: programs belong to edits, not to cells,
and those of an edit share its rows and tokens. An empty edit costs `parts` programs that read one table row and stop.

Edits that meet in a cell apply in table order, though programs run in any: a cell belongs to the first edit that covers
it, and that edit's program applies all later ones to it as well, rounding after each. So no two programs touch one
cell. Whether another edit can meet this one is decided once a program from the table alone (`_rivals`); where none can,
the usual case, the walk over the edits has one step. One program per (row, slice) would need no such rule, but S*B
programs would each read the whole table, and one long span would be one program's work.

An edit that addresses what is not there (row, origin, slice, source row) is skipped where it does: a kernel cannot
raise. Not measured on a GPU yet; the block sizes are a reasoned choice, and there is no autotuning because trial runs
of an in-place kernel would edit the data.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

_CELLS = 1024  # of a tile
_PROGRAMS = 1024  # that the edits share


@triton.jit
def _rivals(table, edit, edits, row, origin, start, stop, piece, BLOCK_E: tl.constexpr):
    """First and last edit of the table that may cover a cell which `edit` covers, itself included."""
    lowest, highest = edit, edit
    for begin in range(0, edits, BLOCK_E):
        other = begin + tl.arange(0, BLOCK_E).to(tl.int64)
        inside = other < edits
        fields = table + other * 7
        row2 = tl.load(fields, mask=inside, other=0)
        origin2 = tl.load(fields + 1, mask=inside, other=0)
        start2 = tl.load(fields + 2, mask=inside, other=0)
        stop2 = tl.load(fields + 3, mask=inside, other=0)
        piece2 = tl.load(fields + 4, mask=inside, other=-1)
        meets = (start2 < stop2) & (piece2 == piece) & ((row2 == row) | (row2 < 0) | (row < 0))
        # Spans of different origins stand at different tokens in every row: they are compared there, token by token.
        meets &= (origin2 != origin) | ((start2 < stop) & (start < stop2))
        lowest = tl.minimum(lowest, tl.min(tl.where(meets & inside, other, edit), axis=0))
        highest = tl.maximum(highest, tl.max(tl.where(meets & inside, other, edit), axis=0))
    return lowest, highest


@triton.jit
def _covers(table, edit, offset, i, t, piece, b, tokens, origins, sources, stride_origin, stride_offset):
    """Which of the tokens `t` of row i the edit changes [BLOCK_T], and the source row of each."""
    fields = table + edit * 7
    row, origin, start, stop = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    known = (origin >= 0) & (origin < origins)
    here = known & (start < stop) & (tl.load(fields + 4) == piece) & ((row == -1) | (row == i))
    first = tl.load(offset + origin.to(tl.int64) * stride_origin + i * stride_offset, mask=known, other=0)
    position = t + first.to(tl.int64)  # 64-bit: an open span's ends are far outside what 32 bits can shift
    entry = tl.load(fields + 5) + tl.load(fields + 6) * (position - start)
    covered = here & (t < tokens) & (position >= start) & (position < stop)
    return covered & ((b == 0) | ((entry >= 0) & (entry < sources))), entry


@triton.jit(do_not_specialize=["edits", "rows", "tokens", "origins", "sources"])
def patch_heads_kernel(
    z,
    table,
    coefficients,
    source,
    offset,
    edits,
    rows,
    tokens,
    slices,
    width,
    origins,
    sources,
    stride_row,
    stride_token,
    stride_cell,
    stride_origin,
    stride_offset,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (edits, parts)."""
    edit = tl.program_id(0).to(tl.int64)
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1).to(tl.int64)
    fields = table + edit * 7
    row, origin = tl.load(fields), tl.load(fields + 1)
    start, stop, piece = tl.load(fields + 2), tl.load(fields + 3), tl.load(fields + 4)
    live = (start < stop) & (row >= -1) & (row < rows) & (origin >= 0) & (origin < origins)
    live &= (piece >= 0) & (piece < slices)
    tiles = tl.cdiv(tl.minimum(stop.to(tl.int64) - start, tokens), BLOCK_T)
    blocks = tl.cdiv(width, BLOCK_W)
    of_row = tiles * blocks
    items = tl.where(live, of_row * tl.where(row < 0, rows, 1), 0)
    if part < items:
        lowest, highest = _rivals(table, edit, edits, row, origin, start, stop, piece, BLOCK_E)
        reads = tl.load(coefficients + 2 * edit) != 0  # a == 0: z is not read, NaN there does not survive an ablation
        for item in range(part, items, parts):
            i = tl.maximum(row, 0).to(tl.int64) + item // of_row
            first = tl.load(offset + origin.to(tl.int64) * stride_origin + i * stride_offset).to(tl.int64)
            tile = (item % of_row) // blocks
            t = tl.maximum(start - first, 0) + tile * BLOCK_T + tl.arange(0, BLOCK_T)  # [BLOCK_T]
            w = (item % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)  # [BLOCK_W]
            b = tl.load(coefficients + 2 * edit + 1)
            mine, _ = _covers(
                table, edit, offset, i, t, piece, b, tokens, origins, sources, stride_origin, stride_offset
            )
            column = (piece.to(tl.int64) * width + w) * stride_cell
            cells = z + i * stride_row + t[:, None] * stride_token + column[None, :]
            inside = (w < width)[None, :]
            value = tl.load(cells, mask=mine[:, None] & inside & reads, other=0).to(source.dtype.element_ty)
            for other in range(lowest, highest + 1):
                if tl.load(table + other * 7 + 4) == piece:
                    a, b = tl.load(coefficients + 2 * other), tl.load(coefficients + 2 * other + 1)
                    covered, entry = _covers(
                        table, other, offset, i, t, piece, b, tokens, origins, sources, stride_origin, stride_offset
                    )
                    mine &= (other >= edit) | ~covered
                    applies = (mine & covered)[:, None] & inside
                    rows_read = source + entry[:, None] * width + w[None, :]
                    added = b * tl.load(rows_read, mask=applies & (b != 0), other=0)
                    kept = a * value
                    # Not 0 + added nor kept + 0: they would turn -0 into 0.
                    new = tl.where(a == 0, tl.where(b == 0, 0.0, added), tl.where(b == 0, kept, kept + added))
                    rounded = new.to(z.dtype.element_ty).to(source.dtype.element_ty)
                    value = tl.where(applies, rounded, value)
            tl.store(cells, value.to(z.dtype.element_ty), mask=mine[:, None] & inside)


def _blocks(width: int) -> dict[str, int]:
    block_w = min(triton.next_power_of_2(width), 256)
    return {"BLOCK_T": _CELLS // block_w, "BLOCK_W": block_w, "BLOCK_E": 256}


def launch(
    z: torch.Tensor, table: torch.Tensor, coefficients: torch.Tensor, source: torch.Tensor, offset: torch.Tensor
) -> None:
    """Apply the edit table to z in place; arguments as in `bkdfast.ops.patch_heads`."""
    (rows, tokens, cells), (edits, width) = z.shape, (table.shape[0], source.shape[1])
    if any(step == 0 and size > 1 for step, size in zip(z.stride(), z.shape, strict=True)):
        raise RuntimeError("patch_heads: z is expanded, its rows share memory; clone it")
    for name, tensor in (("table", table), ("coefficients", coefficients), ("source", source)):
        if not tensor.is_contiguous():
            raise RuntimeError(f"patch_heads: {name} must be contiguous, its strides are {tensor.stride()}")
    if z.numel() == 0 or edits == 0:
        return
    blocks = _blocks(width)
    items = rows * triton.cdiv(tokens, blocks["BLOCK_T"]) * triton.cdiv(width, blocks["BLOCK_W"])
    parts = min(items, max(4, _PROGRAMS // edits))
    with torch.cuda.device_of(z):
        patch_heads_kernel[(edits, parts)](
            z,
            table,
            coefficients,
            source,
            offset,
            edits,
            rows,
            tokens,
            cells // width,
            width,
            offset.shape[0],
            source.shape[0],
            *z.stride(),
            *offset.stride(),
            **blocks,
            num_warps=4,
            enable_fp_fusion=False,  # a*z + b*s is rounded as PyTorch rounds it, term by term
        )


def aot_variants() -> Iterator[tuple]:
    """(name, kernel, signature, constexprs, num_warps, num_stages) for ahead-of-time compilation.

    "i32:16" is an integer divisible by 16; inner strides are the constant 1: what the launcher specialises on.
    """
    integers = "edits rows tokens slices width origins sources stride_row stride_token stride_origin stride_offset"
    for dtype, acc in (("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")):
        for width in (1, 128):
            signature = {"z": f"*{dtype}", "table": "*i32", "coefficients": f"*{acc}", "source": f"*{acc}"}
            signature |= {"offset": "*i32"} | dict.fromkeys(integers.split(), "i32")
            signature |= dict.fromkeys(("stride_row", "stride_token"), "i32:16")
            constants = {"stride_cell": 1, **_blocks(width)}
            yield f"{dtype}-w{width}", patch_heads_kernel, signature, constants, 4, 3
