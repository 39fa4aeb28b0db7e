"""Pairs of tensors, one in memory at a time; while one is computed, threads hash it, and read and hash the next."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bkdfast.svd.names import tensor_digest
from bkdfast.svd.plan import DeltaPlan, Item
from bkdfast.svd.source import WeightSource

_CHUNK = 1 << 24  # bytes compared at a time
_THREADS = 3  # one reads, one hashes each side


@dataclass(frozen=True, eq=False)
class Pair:
    """The two tensors of an item.

    Attributes:
        w0: base.
        w1: tuned.
        same: they are the same bit by bit, and of one dtype.
        hashes: the digests of both, on their way; empty where they were not asked for.
    """

    w0: Tensor
    w1: Tensor
    same: bool
    hashes: tuple[Future[bytes], ...] = ()

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of both (`tensor_digest`), when they are there; empty where they were not asked for."""
        return tuple(found.result() for found in self.hashes)


def load_pair(base: WeightSource, tuned: WeightSource, item: Item) -> Pair:
    """Read both tensors of an item."""
    w0, w1 = (
        source.get(name, item.start, item.stop) if item.stop is not None else source.get(name)
        for source, name in ((base, item.base), (tuned, item.tuned))
    )
    if item.stacked:
        w0, w1 = w0[0], w1[0]
    return Pair(w0, w1, same_bits(w0, w1))


def same_bits(w0: Tensor, w1: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and the same bit by bit; on one device."""
    if w0.dtype != w1.dtype or w0.shape != w1.shape or w0.device != w1.device:
        return False
    if not (w0.is_contiguous() and w1.is_contiguous()):
        return False  # a copy of a whole weight costs more than the pass it saves
    a, b = (w.reshape(-1).view(torch.uint8) for w in (w0, w1))
    for start in range(0, len(a), _CHUNK):
        if not torch.equal(_words(a[start : start + _CHUNK]), _words(b[start : start + _CHUNK])):
            return False
    return True


def _words(data: Tensor) -> Tensor:
    """Eight bytes at a time where the place in memory allows it."""
    return data.view(torch.int64) if len(data) % 8 == 0 and data.storage_offset() % 8 == 0 else data


class Stream:
    """Pairs of a plan in the order in which they are asked for; a context, which ends the threads.

    While pair i is computed, a thread reads the one that follows it in `order`, unless two pairs and what the
    computation takes exceed `limit` bytes. A pair that is asked for in another order is read when it is asked for.
    Hashing, slower than a fast disk, delays neither the reads nor the computation.

    Args:
        base: the base model.
        tuned: the tuned model.
        plan: the plan.
        order: positions in `plan.items` in the order in which they will be asked for.
        limit: bytes; None: no limit.
        digest: hash the tensors.
    """

    def __init__(
        self,
        base: WeightSource,
        tuned: WeightSource,
        plan: DeltaPlan,
        order: Sequence[int],
        *,
        limit: int | None = None,
        digest: bool = True,
    ) -> None:
        self._sources, self._plan, self._limit, self._digest = (base, tuned), plan, limit, digest
        self._next = dict(zip(order, order[1:], strict=False))
        self._ahead: tuple[int, Future[Pair]] | None = None
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Stream:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="bkdfast-read")
        return self

    def __exit__(self, *error: object) -> None:
        assert self._threads is not None
        self._ahead = None
        self._threads.shutdown(cancel_futures=True)

    def take(self, position: int) -> Pair:
        """The pair of `plan.items[position]`; the caller keeps no reference to the one before."""
        assert self._threads is not None, "used outside its context"
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            pair = ahead[1].result()
        else:
            del ahead
            pair = self._load(position)
        ahead = None
        following = self._next.get(position)
        if following is not None and self._fits(position, following):
            self._ahead = following, self._threads.submit(self._load, following)
        return pair

    def _load(self, position: int) -> Pair:
        pair = load_pair(*self._sources, self._plan.items[position])
        if not self._digest:
            return pair
        assert self._threads is not None
        first = self._threads.submit(tensor_digest, pair.w0)
        return replace(pair, hashes=(first, first if pair.same else self._threads.submit(tensor_digest, pair.w1)))

    def _fits(self, position: int, following: int) -> bool:
        if self._limit is None:
            return True
        plan = self._plan
        extra = plan.work[position] if plan.work else 0
        return plan.held + plan.items[position].size + extra + plan.items[following].size <= self._limit
