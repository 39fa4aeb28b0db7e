"""Tall float64 matrices, kept as blocks of columns: their products with the caller's threads, and their QR by products.

The rest of the small algebra runs on one thread (`numerics.threads`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bkdfast.ops.tall_products import cholesky_inverse, combine_and_dot, tall_combine, tall_dot
from bkdfast.svd.numerics import threads

# About how far from orthonormal the result of a step of CholeskyQR may be: to be taken, and to be mended by another.
_TAKEN, _MENDED = 1e-12, 1e-5


class Tall:
    """Products and QR of tall matrices `[n, w]`.

    Args:
        callers: number of threads; no bit depends on it.
        lapack: QR is LAPACK's: for float64 sketches, of which CholeskyQR may lose a digit, and on GPUs.
    """

    def __init__(self, callers: int = 1, *, lapack: bool = False) -> None:
        self.callers, self.lapack = callers, lapack

    def dot(self, a: Sequence[Tensor], b: Tensor) -> Tensor:
        """`A^T B` `[P, q]` of A in blocks of columns."""
        with threads(self.callers):
            return tall_dot(a, b)

    def combine(self, a: Sequence[Tensor], c: Tensor, x: Tensor | None = None) -> Tensor:
        """`A C` `[n, q]`, or `X - A C`."""
        with threads(self.callers):
            return tall_combine(a, c.contiguous(), x)

    def combine_and_dot(
        self, a: Sequence[Tensor], c: Tensor, x: Tensor | None = None, b: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        """That, Y, and `[B Y]^T Y`."""
        with threads(self.callers):
            return combine_and_dot(a, c.contiguous(), x, b)

    def qr(self, x: Tensor, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Q and R, by CholeskyQR2 (Yamamoto et al. 2015, ETNA 44) where x is far enough from rank-deficient.

        `gram`: its Gram matrix, where that is known.
        """
        if self.lapack:
            return _lapack_qr(x)
        first = cholesky_r(self.dot([x], x) if gram is None else gram)
        if first is None:
            return _lapack_qr(x)
        r, inverse, skewed = first
        if skewed <= _TAKEN:
            return self.combine([x], inverse), r
        q, gram = self.combine_and_dot([x], inverse)
        second = cholesky_r(gram)
        assert second is not None  # nearly orthonormal
        return self.combine([q], second[1]), second[0] @ r

    def orthonormal(self, x: Tensor, gram: Tensor) -> Tensor:
        """An orthonormal basis of the columns of a nearly orthonormal x with a Gram matrix."""
        found = cholesky_r(gram)
        return _lapack_qr(x)[0] if found is None else self.combine([x], found[1])

    def directions(self, x: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A `[n, w]`, B `[w, w]` and R with `x = A B R` and A B nearly orthonormal; `gram` as of `qr`."""
        found = None if self.lapack else cholesky_r(gram)
        if found is None:
            q, r = _lapack_qr(x)
            return q, torch.eye(len(r), dtype=r.dtype, device=r.device), r
        return x, found[1], found[0]


def cholesky_r(gram: Tensor) -> tuple[Tensor, Tensor, float] | None:
    """R of a matrix X with Gram matrix `gram` `[w, w]`, its inverse, and about how far X R^-1 is from orthonormal.

    None: that is too much.
    """
    r, inverse, skewed = cholesky_inverse(gram.contiguous())
    return (r, inverse, float(skewed)) if float(skewed) <= _MENDED else None


def _lapack_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(x)
    return q.contiguous(), r  # it comes by columns
