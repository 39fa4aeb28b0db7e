"""What the small algebra of an SVD needs: torch's process-wide settings for its duration, LAPACK's SVD made safe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep float32 products in float32, whatever the caller allows elsewhere (TF32 would lose three digits)."""
    before = torch.get_float32_matmul_precision()
    if before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with `count` threads.

    LAPACK on blocks of 32 columns loses more to thread barriers than it gains (30 ms became 2.5 s on a busy machine);
    one thread also makes its bits independent of the caller's number of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`U [m, k]`, `s [k]` and `V [n, k]` of a finite matrix `[m, n]`, k = min(m, n).

    LAPACK's divide and conquer gives up on some matrices with repeated singular values, about one in a thousand; then
    it gets the transposed matrix, and at last a triangular factor. Tall matrices take it a third of the time.
    """
    tall = x if x.shape[0] >= x.shape[1] else x.mT
    for attempt in (_direct, _transposed, _triangular):
        try:
            u, s, v = attempt(tall)
            break
        except torch.linalg.LinAlgError as error:
            failure = error
    else:
        raise failure
    return (u, s, v) if tall is x else (v, s, u)


def from_squares(gram: Tensor, rank: int, weakest: float) -> tuple[Tensor, Tensor] | None:
    """All singular values `[w]` and right singular vectors `[w, w]` of a matrix X from `gram` = X^T X, float64.

    A half or a third of the time of an SVD. Squares lose digits of weak values: None where value number `rank` is not
    above `weakest` times the first, or LAPACK gives up.
    """
    try:
        squares, v = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError:
        return None
    s = squares.flip(0).clamp(min=0).sqrt()
    return (s, v.flip(1)) if bool(s[rank - 1] > weakest * s[0]) else None


def _direct(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return u, s, vt.mT


def _transposed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    v, s, u = _direct(x.mT)
    return u, s, v


def _triangular(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, r = torch.linalg.qr(x)
    u, s, v = _direct(r)
    return q @ u, s, v
