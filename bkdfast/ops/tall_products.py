"""`tall_dot`, `tall_combine`, `cholesky_inverse`: products and QR of tall float64 matrices, on any number of threads.

With A `[n, P]` given as blocks of its columns, A = [A_1 A_2 ...]:

    tall_dot(A, B) = A^T B                             [P, q]
    tall_combine(A, C) = A C                           [n, q]
    tall_combine(A, C, X) = X - A C                    [n, q]
    combine_and_dot(A, C, X, B) = Y, [B Y]^T Y         the Y above, and its products while it is in the cache

and with a Gram matrix G = X^T X `[w, w]`, which makes columns orthonormal

    cholesky_inverse(G) = R, R^-1, skewed              G = R^T R, R upper triangular

where `skewed` says how far X R^-1 is from orthonormal by the rounding of G, within a small factor: eps |S^-1|_F^2, with
S the R of X with columns of norm 1. It is infinite (or NaN) where there is no R, and the others then mean nothing. One
op, because LAPACK's and what goes with them are ten, each of which finds cold caches after a pass over the weights.

Shapes and dtypes: A_i `[n, w_i]`, B and X `[n, q]`, C `[P, q]`, all float64 and contiguous. n, w_i and q may be 0. The
B of `combine_and_dot` is blocks of columns, like A, or none.

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
        rows = _columns(a) if name == "c" else a[0].shape[0]
        if matrix.shape[0] != rows:
            raise InvalidArgumentError(f"{name} must have {rows} rows, found {tuple(matrix.shape)}")


def _check_dot(a: Sequence[Tensor], b: Tensor) -> None:
    _check(a, b=b)


def _check_combine(a: Sequence[Tensor], c: Tensor, x: Tensor | None, b: Sequence[Tensor], dot: bool) -> None:
    _check(a, c=c, **({} if x is None else {"x": x}), **{f"b[{i}]": block for i, block in enumerate(b)})
    if x is not None and x.shape[1] != c.shape[1]:
        raise InvalidArgumentError(f"x must have {c.shape[1]} columns like c, found {tuple(x.shape)}")


def _fake_dot(a: Sequence[Tensor], b: Tensor) -> Tensor:
    return b.new_empty(_columns(a), b.shape[1])


def _fake_combine(
    a: Sequence[Tensor], c: Tensor, x: Tensor | None, b: Sequence[Tensor], dot: bool
) -> tuple[Tensor, Tensor]:
    rows, columns = a[0].shape[0], c.shape[1]
    return c.new_empty(rows, columns), c.new_empty(_columns(b) + columns if dot else 0, columns)


def _columns(blocks: Sequence[Tensor]) -> int:
    return sum(block.shape[1] for block in blocks)


def _reference_dot(a: Sequence[Tensor], b: Tensor) -> Tensor:
    _check_dot(a, b)
    with torch.autocast(b.device.type, enabled=False):
        return torch.cat([block.T @ b for block in a])


def _reference_combine(
    a: Sequence[Tensor], c: Tensor, x: Tensor | None, b: Sequence[Tensor], dot: bool
) -> tuple[Tensor, Tensor]:
    _check_combine(a, c, x, b, dot)
    y = c.new_zeros(a[0].shape[0], c.shape[1])
    with torch.autocast(c.device.type, enabled=False):
        for block, part in zip(a, c.split([block.shape[1] for block in a]), strict=True):
            y = torch.addmm(y, block, part)
    y = y if x is None else x - y
    return y, _reference_dot([*b, y], y) if dot else c.new_empty(0, c.shape[1])


def _check_gram(gram: Tensor) -> None:
    _check([gram])
    if gram.shape[0] != gram.shape[1]:
        raise InvalidArgumentError(f"gram must be a square matrix, found {tuple(gram.shape)}")


def _fake_cholesky(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(gram), torch.empty_like(gram), gram.new_empty(())


def _reference_cholesky(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_gram(gram)
    size = gram.diagonal().sqrt()
    # In units of the columns' norms: their sizes do not matter.
    upper, info = torch.linalg.cholesky_ex(gram / size / size[:, None], upper=True)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    skewed = torch.finfo(gram.dtype).eps * inverse.square().sum()
    r, inverse = (upper * size).contiguous(), (inverse / size[:, None]).contiguous()
    return r, inverse, torch.where(info > 0, torch.inf, skewed)


DOT = Op("tall_dot(Tensor[] a, Tensor b) -> Tensor", check=_check_dot, fake=_fake_dot, reference=_reference_dot)
COMBINE = Op(
    "tall_combine(Tensor[] a, Tensor c, Tensor? x, Tensor[] b, bool dot) -> (Tensor, Tensor)",
    check=_check_combine,
    fake=_fake_combine,
    reference=_reference_combine,
)
CHOLESKY = Op(
    "cholesky_inverse(Tensor gram) -> (Tensor, Tensor, Tensor)",
    check=_check_gram,
    fake=_fake_cholesky,
    reference=_reference_cholesky,
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
    return _combine(a, c, x, (), False, backend)[0]


def combine_and_dot(
    a: Sequence[Tensor],
    c: Tensor,
    x: Tensor | None = None,
    b: Sequence[Tensor] = (),
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`tall_combine`, and the products of its result with a second matrix and with itself.

    Args:
        a: as of `tall_combine`, like the next two.
        c: `[P, q]`.
        x: `[n, q]` or None.
        b: blocks `[n, w_i]` of B's R columns, or none.
        backend: as of `tall_combine`.

    Returns:
        Y `[n, q]` and `[B Y]^T Y` `[R + q, q]`.

    Raises:
        InvalidArgumentError: as `tall_combine`, like the others.
        InvalidTypeError: a matrix is not float64.
        BackendError: `backend` cannot serve this op here.

    Example:
        >>> import torch
        >>> a, c = torch.tensor([[1.0], [2.0]]).double(), torch.tensor([[3.0]]).double()
        >>> combine_and_dot([a], c)[1]
        tensor([[45.]], dtype=torch.float64)
    """
    return _combine(a, c, x, b, True, backend)


def _combine(
    a: Sequence[Tensor], c: Tensor, x: Tensor | None, b: Sequence[Tensor], dot: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    try:
        return COMBINE.resolve(backend, c.device)(a, c, x, b, dot)
    except RuntimeError:
        _check_combine(a, c, x, b, dot)  # what a compiled kernel refuses, in our exceptions
        raise


def cholesky_inverse(gram: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """R of X, its inverse, and about how far `X R^-1` is from orthonormal, from the Gram matrix of X.

    Args:
        gram: `[w, w]` float64, contiguous.
        backend: `"cpp"` or `"reference"`; None: the fastest that is there.

    Returns:
        R `[w, w]` upper triangular, `R^-1` `[w, w]`, and a scalar; see the module's docstring.

    Raises:
        InvalidArgumentError: it is not a square matrix, or not contiguous.
        InvalidTypeError: it is not float64.
        BackendError: `backend` cannot serve this op here.

    Example:
        >>> import torch
        >>> cholesky_inverse(torch.tensor([[4.0]]).double())[:2]
        (tensor([[2.]], dtype=torch.float64), tensor([[0.5000]], dtype=torch.float64))
    """
    try:
        return CHOLESKY.resolve(backend, gram.device)(gram)
    except RuntimeError:
        _check_gram(gram)
        raise
