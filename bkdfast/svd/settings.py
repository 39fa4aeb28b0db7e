"""What is computed of a pair of weights, whoever asks for it: `Settings`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from bkdfast.svd.batched import batched_triplets
from bkdfast.svd.krylov import Triplets, block_width, dense, unchanged
from bkdfast.svd.noise import rounding_edge
from bkdfast.svd.plan import Item
from bkdfast.svd.result import TensorDelta
from bkdfast.svd.rule import Rule

RANK = 20
"""Triplets of each weight where no rule is given."""


@dataclass(frozen=True, eq=False)
class Weights:
    """A pair of weights `[m, n]` by its name; `same`: they are the same bit by bit."""

    name: str
    w0: Tensor
    w1: Tensor
    note: str = ""
    same: bool = False


@dataclass(frozen=True)
class Settings:
    """What `delta_svd`, `delta_directions` and `extract_lora` share: the arguments of `leading_triplets`, checked.

    Raises:
        InvalidArgumentError: a number is out of its range.
        InvalidTypeError: `max_passes` or `seed` is not an integer.
    """

    rule: Rule = Rule(RANK)
    tolerance: float = 1e-4
    max_passes: int = 12
    seed: int = 0
    device: str | torch.device | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("max_passes", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidTypeError(f"{name} must be an integer, found {value!r}")
        if self.max_passes < 2:
            raise InvalidArgumentError(
                f"max_passes must be at least 2, since one pass only sees random vectors; found {self.max_passes}"
            )
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise InvalidArgumentError(f"tolerance must be positive and finite, found {self.tolerance}")

    def work(self, item: Item) -> tuple[int, int]:
        """Bytes that the computation of an item takes beside its tensors, at most, and those of its result."""
        m, n = item.shape
        ranks = self.rule.ranks(m, n)
        return max(self._work(m, n, rank) for rank in ranks), 4 * ranks[-1] * (m + n + 10)

    def batch_work(self, item: Item) -> int:
        """Bytes that an item takes in a batch, beside its tensors, at most."""
        return 5 * self.work(item)[0]

    def _work(self, m: int, n: int, rank: int) -> int:
        if dense(m, n, rank):
            return 6 * 8 * m * n
        width = block_width(rank)
        return 8 * self.max_passes * width * (m + 2 * n) + 64 * n * width

    def factor(self, pair: Weights) -> TensorDelta:
        """What the rule keeps of the singular triplets of one pair's delta."""
        return self.factor_all([pair])[0]

    def factor_all(self, pairs: Sequence[Weights]) -> list[TensorDelta]:
        """The same of many pairs of one shape, dtype and device, at once: see `bkdfast.svd.batched`."""
        device = self.device if self.device is not None else pairs[0].w1.device
        pairs = [replace(pair, w0=pair.w0.to(device), w1=pair.w1.to(device)) for pair in pairs]
        edges = [rounding_edge(pair.w1) for pair in pairs]
        changed = [i for i, pair in enumerate(pairs) if not pair.same]
        try:
            searched = self._search([pairs[i] for i in changed], [edges[i] for i in changed])
            found = dict(zip(changed, searched, strict=True))
            for i, pair in enumerate(pairs):
                if pair.same:
                    found[i] = unchanged(pair.w1), min(pair.w1.shape)
        except NonFiniteError:
            if len(pairs) > 1:
                return [self.factor(pair) for pair in pairs]  # one of them tells its name
            pair = pairs[0]
            sides = [side for side, w in (("base", pair.w0), ("tuned", pair.w1)) if not bool(torch.isfinite(w).all())]
            where = f"the {' and '.join(sides)} weights" if sides else "the difference, which overflows"
            raise NonFiniteError(f"{pair.name} has NaN or infinity in {where}; repair it") from None
        return [self._kept(pair, *found[i], edges[i]) for i, pair in enumerate(pairs)]

    def _kept(self, pair: Weights, found: Triplets, rank: int, edge: float) -> TensorDelta:
        """What the rule keeps of the triplets that were found with a rank."""
        m, n = pair.w1.shape
        count, smaller, notes = len(found.s), min(m, n), [pair.note] if pair.note else []
        if self.rule.rank is not None and self.rule.limit > smaller:
            notes.append(f"rank clipped to {smaller}, the smaller side")
        kept, capped = self.rule.choose(found.s, found.frobenius, count if count < rank else smaller)
        if 0 < kept == count < rank:
            notes.append(f"numerical rank {count}")
        if capped:
            notes.append(capped)
        whole = TensorDelta(
            name=pair.name,
            shape=(m, n),
            u=found.u,
            s=found.s,
            v=found.v,
            residual=found.residual,
            angle=found.angles.vector,
            subspace=found.angles.subspace,
            dimension=found.angles.dimension,
            frobenius=found.frobenius,
            changed=found.changed,
            passes=found.passes,
            converged=found.converged,
            rounding=edge,
            note="; ".join(notes),
        )
        return self.leading(whole, kept)

    def leading(self, delta: TensorDelta, k: int) -> TensorDelta:
        """The first k triplets; they may have converged although weaker ones have not."""
        kept = delta.leading(k)
        fine = (kept.residual <= self.tolerance * kept.s) | (kept.s <= kept.rounding)
        return replace(kept, converged=kept.converged or bool(fine.all()))

    def _search(self, pairs: Sequence[Weights], edges: Sequence[float]) -> list[tuple[Triplets, int]]:
        """The triplets with the first rank that meets the rule, and that rank; `passes` are those of all ranks."""
        found: dict[int, tuple[Triplets, int]] = {}
        left, passes = list(range(len(pairs))), [0] * len(pairs)
        for rank in self.rule.ranks(*pairs[0].w0.shape) if pairs else ():
            made = self._triplets([pairs[i] for i in left], [edges[i] for i in left], rank)
            for i, triplets in zip(left, made, strict=True):
                passes[i] += triplets.passes
                found[i] = replace(triplets, passes=passes[i]), rank
            left = [i for i in left if not self._enough(*found[i])]
            if not left:
                break
        return [found[i] for i in range(len(pairs))]

    def _enough(self, found: Triplets, rank: int) -> bool:
        return len(found.s) < rank or self.rule.needed(found.s, found.frobenius) is not None

    def _triplets(self, pairs: Sequence[Weights], edges: Sequence[float], rank: int) -> list[Triplets]:
        return batched_triplets(
            [pair.w0 for pair in pairs],
            [pair.w1 for pair in pairs],
            rank=rank,
            tolerance=self.tolerance,
            max_passes=self.max_passes,
            seeds=[_tensor_seed(self.seed, pair.name) for pair in pairs],
            ignore_below=edges,
            backend=self.backend,
        )


def _tensor_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
