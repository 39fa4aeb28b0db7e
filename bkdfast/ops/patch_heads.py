"""`patch_heads`: in-place edits of per-head outputs by an edit table.

    z[b, t, s*W:(s+1)*W] <- a * z[b, t, s*W:(s+1)*W] + b * source[r + stride * (p - start)]
    for every edit (row, origin, start, stop, s, r, stride), (a, b) and every token with
    p = t + offset[origin, b] in [start, stop), in the rows it names (row -1: all)

Zero, mean and resample ablation, patching, scaling and steering are all rows of that table, and each batch row has its
own, so many different patches run in one forward. z is the input of the attention output projection (W = head_dim) or
of the MLP's down projection (W = 1).

Shapes and dtypes: z `[B, T, S*W]` float16, bfloat16, float32 or float64, any strides; table `[E, 7]` int32;
coefficients `[E, 2]` and source `[R, W]` float32 (float64 when z is); offset `[origins, >=B]` int32, any strides. z's
cells share no memory with each other or with the source. Arithmetic is in the dtype of the coefficients, rounded once
at the store. Edits that meet in a cell apply in table order.

Floor: the edited cells, read and written once; cost does not depend on B or T.

Gradient: the in-place op has none. `patch_heads_functional` returns a new tensor and is differentiable in z (the
gradient of z' = a z + b s is the same edit with b = 0); table, coefficients and source are constants.
"""

from __future__ import annotations

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops._library import Op
from bkdfast.ops.edit_table import COLUMNS, EditTable


def _check(z, table, coefficients, source, offset) -> None:
    if z.dim() != 3:
        raise InvalidArgumentError(f"z must be [B, T, S*W], got shape {tuple(z.shape)}")
    if table.dim() != 2 or table.shape[1] != COLUMNS or table.dtype != torch.int32:
        raise InvalidArgumentError(f"table must be [E, {COLUMNS}] int32, got {tuple(table.shape)} {table.dtype}")
    if coefficients.dim() != 2 or coefficients.shape[0] != table.shape[0] or coefficients.shape[1] != 2:
        raise InvalidArgumentError(f"coefficients must be [{table.shape[0]}, 2], got {tuple(coefficients.shape)}")
    if source.dim() != 2 or source.shape[1] == 0 or z.shape[2] % source.shape[1]:
        raise InvalidArgumentError(
            f"source must be [rows, W] with W dividing z's last dimension {z.shape[2]}, got {tuple(source.shape)}"
        )
    if offset.dim() != 2 or offset.dtype != torch.int32 or offset.shape[1] < z.shape[0]:
        raise InvalidArgumentError(
            f"offset must be [origins, >={z.shape[0]}] int32, got {tuple(offset.shape)} {offset.dtype}"
        )
    if not z.is_floating_point():
        raise InvalidTypeError(f"z must be float16, bfloat16, float32 or float64, got {z.dtype}")
    wanted = torch.float64 if z.dtype == torch.float64 else torch.float32
    if coefficients.dtype != wanted or source.dtype != wanted:
        raise InvalidTypeError(
            f"z is {z.dtype}: coefficients and source must be {wanted}, got {coefficients.dtype} and {source.dtype}"
        )
    for name, tensor in (("table", table), ("coefficients", coefficients), ("source", source), ("offset", offset)):
        if tensor.device != z.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device} but z is on {z.device}; move it there")


def _check_memory(z, source) -> None:
    """Refuse cells that share memory: the result would depend on the order of the writes, each backend's own."""
    if z.numel() == 0:
        return
    extent = 1  # elements from the first cell to behind the last one, over the dimensions seen so far
    for stride, size in sorted(zip(z.stride(), z.shape, strict=True)):
        if size == 1:
            continue
        if stride < extent:
            raise InvalidArgumentError("z is expanded or overlaps itself, its cells share memory; clone it")
        extent += (size - 1) * stride
    cells, rows = z.data_ptr(), source.data_ptr()
    behind = rows + ((source.shape[0] - 1) * source.stride(0) + (source.shape[1] - 1) * source.stride(1) + 1) * (
        source.element_size()
    )
    if source.numel() and rows < cells + extent * z.element_size() and cells < behind:
        raise InvalidArgumentError("source lies within z's memory; clone it")


def _reference(z, table, coefficients, source, offset) -> None:
    _check(z, table, coefficients, source, offset)
    _check_memory(z, source)
    rows, tokens, width = z.shape[0], z.shape[1], source.shape[1]
    slices, origins = z.shape[2] // width, offset.shape[0]
    first = offset.tolist()
    for edit, (row, origin, start, stop, piece, entry, stride) in enumerate(table.tolist()):
        if start >= stop:
            continue
        if not (-1 <= row < rows and 0 <= origin < origins and 0 <= piece < slices):
            raise InvalidArgumentError(
                f"edit {edit} addresses row {row}, origin {origin}, slice {piece}, "
                f"but there are {rows} rows, {origins} origins, {slices} slices"
            )
        a, b = coefficients[edit]
        if b != 0 and stride not in (0, 1):
            raise InvalidArgumentError(
                f"edit {edit} has stride {stride}, which is not 0 (one source row) or 1 (one source row a token)"
            )
        for i in range(rows) if row < 0 else (row,):
            begin, end = max(start - first[origin][i], 0), min(stop - first[origin][i], tokens)
            if begin >= end:
                continue
            cells = z[i, begin:end, piece * width : (piece + 1) * width]
            new = torch.zeros_like(cells, dtype=coefficients.dtype)
            if a != 0:
                new = a * cells.to(new.dtype)
            if b != 0:
                at = entry + stride * (begin + first[origin][i] - start)
                count = (end - begin - 1) * stride + 1
                if entry < 0 or at + count > source.shape[0]:
                    raise InvalidArgumentError(f"edit {edit} reads source row {at + count - 1} of {source.shape[0]}")
                added = b * source[at : at + count]
                new = added.expand_as(new) if a == 0 else new + added
            cells.copy_(new)


_op = Op(
    "patch_heads(Tensor(a!) z, Tensor table, Tensor coefficients, Tensor source, Tensor offset) -> ()",
    check=_check,
    reference=_reference,
    triton="patch_heads",
)


def _functional_reference(z, table, coefficients, source, offset):
    out = z.clone(memory_format=torch.contiguous_format)
    _op.dispatched(out, table, coefficients, source, offset)
    return out


def _functional_fake(z, table, coefficients, source, offset):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


_functional = Op(
    "patch_heads_functional(Tensor z, Tensor table, Tensor coefficients, Tensor source, Tensor offset) -> Tensor",
    check=_check,
    fake=_functional_fake,
    reference=_functional_reference,
    composite=True,
)


def _setup_context(ctx, inputs, output) -> None:
    _, table, coefficients, source, offset = inputs
    # These are buffers that the next edit overwrites; the backward needs what this forward saw. It reads no source.
    ctx.save_for_backward(table.clone(), coefficients.clone(), source.new_zeros(1, source.shape[1]), offset.clone())


def _backward(ctx, grad):
    table, coefficients, source, offset = ctx.saved_tensors
    keep = coefficients * coefficients.new_tensor([1.0, 0.0])
    return _functional.dispatched(grad, table, keep, source, offset), None, None, None, None


_functional.register_autograd(_backward, setup_context=_setup_context)


def patch_heads(
    z: torch.Tensor, edits: EditTable, offset: torch.Tensor | None = None, *, backend: str | None = None
) -> torch.Tensor:
    """Apply an edit table to per-head outputs, in place where no gradient flows.

    Args:
        z: `[B, T, S*W]` activations, float16, bfloat16, float32 or float64.
        edits: the table; `EditTable.pack` makes and checks one.
        offset: `[origins, >=B]` int32, position of each row's first token from each origin; None: zeros (origin 0 is
            then this call's first token).
        backend: `"cpp"`, `"cuda"`, `"triton"` or `"reference"`; None: the fastest that is there.

    Returns:
        z itself, edited in place; under autograd (grad mode on and z requires a gradient) a new tensor.

    Raises:
        InvalidArgumentError: shapes or devices do not fit, or an edit is out of range.
        InvalidTypeError: a dtype does not fit.
        BackendError: the backend cannot serve here.

    Example:
        >>> import torch, bkdfast as bf
        >>> z = torch.ones(2, 3, 8)  # two rows, three tokens, two heads of four
        >>> edit = bf.EditTable.pack([[1, 0, 2, 3, 0, 0, 0]], [[0.0, 0.0]], torch.zeros(1, 4), slices=2)
        >>> bf.patch_heads(z, edit)[1, 2].tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    """
    if offset is None:
        offset = torch.zeros(1, z.shape[0], dtype=torch.int32, device=z.device)
    tensors = (edits.table, edits.coefficients, edits.source, offset)
    _check(z, *tensors)
    functional = torch.is_grad_enabled() and z.requires_grad
    if functional and backend is not None:
        raise InvalidArgumentError("backend= serves the in-place op; under autograd leave it unset")
    try:
        if functional:
            return _functional.dispatched(z, *tensors)
        _op.resolve(backend, z.device)(z, *tensors)
    except RuntimeError as error:
        if "patch_heads: " in str(error):  # a check of the compiled kernel
            raise InvalidArgumentError(str(error).rsplit("patch_heads: ", 1)[1]) from None
        raise
    torch.autograd.graph.increment_version(z)
    return z
