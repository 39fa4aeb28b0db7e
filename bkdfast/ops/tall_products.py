"""`tall_dot` and `tall_combine`: products of tall, thin float64 matrices, with the same bits for any number of threads.

With A `[n, P]` given as blocks of its columns, A = [A_1 A_2 ...]:

    tall_dot(A, B) = A^T B                             [P, q]
    tall_combine(A, C) = A C                           [n, q]
    tall_combine(A, C, X) = X - A C                    [n, q]

Shapes and dtypes: A_i `[n, w_i]`, B and X `[n, q]`, C `[P, q]`, all float64 and contiguous. n, w_i and q may be 0.

The compiled CPU kernel adds up in an order that does not depend on the number of threads. The reference, which serves
GPUs, is plain PyTorch: its bits are those of the device's matrix product.

Floor: 2 n P q flops.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops._library import Op


def _check(a: Sequence[Tensor], **others: Tensor) -> None:
    if not a:
        raise InvalidArgumentError("a must have one block of columns at least")
    named = {f"a[{i}]": block for i, block in enumerate(a)} | others
    for name, matrix in named.items():
        if matrix.dim() != 2:
            raise InvalidArgumentError(f"{name} must be a matrix, found {tuple(matrix.shape)}")
        if matrix.dtype != torch.float64:
            raise InvalidTypeError(f"{name} must be torch.float64, found {matrix.dtype}")
        if not matrix.is_contiguous():
            raise InvalidArgumentError(f"{name} must be contiguous, its strides are {matrix.stride()}")
        if matrix.device != a[0].device:
            raise InvalidArgumentError(f"{name} is on {matrix.device} but a[0] is on {a[0].device}; move it there")
        rows = sum(block.shape[1] for block in a) if name == "c" else a[0].shape[0]
        if matrix.shape[0] != rows:
            raise InvalidArgumentError(f"{name} must have {rows} rows, found {tuple(matrix.shape)}")


def _check_dot(a: Sequence[Tensor], b: Tensor) -> None:
    _check(a, b=b)


def _check_combine(a: Sequence[Tensor], c: Tensor, x: Tensor | None = None) -> None:
    _check(a, c=c)
    if x is not None:
        _check(a, x=x)
        if x.shape[1] != c.shape[1]:
            raise InvalidArgumentError(f"x must have {c.shape[1]} columns like c, found {tuple(x.shape)}")


def _fake_dot(a: Sequence[Tensor], b: Tensor) -> Tensor:
    return b.new_empty(sum(block.shape[1] for block in a), b.shape[1])


def _fake_combine(a: Sequence[Tensor], c: Tensor, x: Tensor | None = None) -> Tensor:
    return c.new_empty(a[0].shape[0], c.shape[1])


def _reference_dot(a: Sequence[Tensor], b: Tensor) -> Tensor:
    _check_dot(a, b)
    with torch.autocast(b.device.type, enabled=False):
        return torch.cat([block.T @ b for block in a])


def _reference_combine(a: Sequence[Tensor], c: Tensor, x: Tensor | None = None) -> Tensor:
    _check_combine(a, c, x)
    total = c.new_zeros(a[0].shape[0], c.shape[1])
    with torch.autocast(c.device.type, enabled=False):
        for block, part in zip(a, c.split([block.shape[1] for block in a]), strict=True):
            total = torch.addmm(total, block, part)
    return total if x is None else x - total


DOT = Op("tall_dot(Tensor[] a, Tensor b) -> Tensor", check=_check_dot, fake=_fake_dot, reference=_reference_dot)
COMBINE = Op(
    "tall_combine(Tensor[] a, Tensor c, Tensor? x=None) -> Tensor",
    check=_check_combine,
    fake=_fake_combine,
    reference=_reference_combine,
)


def tall_dot(a: Sequence[Tensor], b: Tensor, *, backend: str | None = None) -> Tensor:
    """`A^T B` of a tall matrix in blocks of columns.

    Args:
        a: blocks `[n, w_i]` of A's P columns, float64, contiguous; at least one.
        b: `[n, q]`, like them.
        backend: `"cpp"` or `"reference"`; None: the fastest that is there.

    Returns:
        `[P, q]` float64.

    Raises:
        InvalidArgumentError: shapes, strides or devices do not fit.
        InvalidTypeError: a matrix is not float64.
        BackendError: `backend` cannot serve this op here.

    Example:
        >>> import torch
        >>> tall_dot([torch.tensor([[1.0], [2.0]]).double()], torch.tensor([[3.0], [4.0]]).double())
        tensor([[11.]], dtype=torch.float64)
    """
    try:
        return DOT.resolve(backend, b.device)(a, b)
    except RuntimeError:
        _check_dot(a, b)  # what a compiled kernel refuses, in our exceptions
        raise


def tall_combine(a: Sequence[Tensor], c: Tensor, x: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`A C` of a tall matrix in blocks of columns, or `X - A C`.

    Args:
        a: blocks `[n, w_i]` of A's P columns, float64, contiguous; at least one.
        c: `[P, q]`, like them.
        x: `[n, q]`, like them; None: the product alone.
        backend: `"cpp"` or `"reference"`; None: the fastest that is there.

    Returns:
        `[n, q]` float64.

    Raises:
        InvalidArgumentError: shapes, strides or devices do not fit.
        InvalidTypeError: a matrix is not float64.
        BackendError: `backend` cannot serve this op here.

    Example:
        >>> import torch
        >>> a, c = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0]]).double()
        >>> tall_combine([a], c, torch.ones(2, 1).double())
        tensor([[-2.],
                [-5.]], dtype=torch.float64)
    """
    try:
        return COMBINE.resolve(backend, c.device)(a, c, x)
    except RuntimeError:
        _check_combine(a, c, x)
        raise
