"""Process-wide torch settings that the small algebra of an SVD needs, set for its duration and put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
