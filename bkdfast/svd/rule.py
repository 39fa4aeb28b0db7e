"""How many singular triplets of a delta are kept: a number, a share of its energy, or those above a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.svd.krylov import dense
from bkdfast.svd.result import TensorDelta

_FIRST = 16
_MAX_RANK = 128


@dataclass(frozen=True)
class Rule:
    """How many triplets of a delta are kept: a number, or the fewest that meet `energy` or `tol`, up to `max_rank`.

    Attributes:
        rank: a number of triplets.
        energy: the leading triplets that have this share of `||delta||_F^2`, above 0 and at most 1.
        tol: those whose singular values are at least `tol` times the largest, above 0 and at most 1.
        max_rank: the most triplets; None: as many as `rank`, or 128 with `energy` or `tol`.

    Raises:
        InvalidArgumentError: a number is out of its range, or not just one of the three rules is given.
        InvalidTypeError: a rank is not an integer, or `energy` or `tol` is not a number.
    """

    rank: int | None = None
    energy: float | None = None
    tol: float | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("rank", "energy", "tol") if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidArgumentError(f"give one of rank, energy and tol, found {' and '.join(given) or 'none'}")
        for name in ("rank", "max_rank"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidTypeError(f"{name} must be an integer, found {value!r}")
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name} must be at least 1, found {value}")
        for name in ("energy", "tol"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise InvalidTypeError(f"{name} must be a number, found {value!r}")
            if value is not None and not 0 < value <= 1:
                raise InvalidArgumentError(f"{name} must be above 0 and at most 1, found {value}")

    @classmethod
    def of(
        cls, rank: int | None, energy: float | None, tol: float | None, max_rank: int | None, *, default: int
    ) -> Rule:
        """The rule that a function's arguments give; `rank=default` where they give none."""
        return cls(default if rank is energy is tol is None else rank, energy, tol, max_rank)

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)

    @property
    def limit(self) -> int:
        """The most triplets."""
        return min(x for x in (self.rank or _MAX_RANK if self.max_rank is None else self.max_rank, self.rank) if x)

    @property
    def settings(self) -> dict[str, Any]:
        """For manifests and metadata: the same for rules that keep the same."""
        if self.rank is not None:
            return {"rank": self.limit, "energy": None, "tol": None, "max_rank": None}
        return {"rank": None, "energy": self.energy, "tol": self.tol, "max_rank": self.limit}

    def ranks(self, m: int, n: int) -> list[int]:
        """The ranks to decompose a matrix `[m, n]` with, one after the other, until one meets the rule.

        They double, up to the cap; from where the matrix is decomposed directly, all triplets come at once.
        """
        last = min(self.limit, m, n)
        found, rank = [], _FIRST
        while self.rank is None and rank < last and not dense(m, n, rank):
            found.append(rank)
            rank *= 2
        return [*found, last]

    def needed(self, s: Tensor, frobenius: float) -> int | None:
        """How many of the leading triplets the rule asks for; None: these are not enough to tell.

        Args:
            s: leading singular values `[K]`, descending.
            frobenius: of the whole delta.
        """
        if self.energy is not None:
            reached = (s / frobenius).square().cumsum(0) >= self.energy * (1 - 1e-12)
            return int(reached.int().argmax()) + 1 if bool(reached.any()) else None
        if self.tol is not None:
            kept = int((s >= self.tol * s[:1]).sum())
            return kept if kept < len(s) else None
        return self.limit if len(s) >= self.limit else None

    def choose(self, s: Tensor, frobenius: float, total: int) -> tuple[int, str]:
        """How many triplets to keep, and a note where the rule asks for more than `max_rank`.

        Args:
            s: as of `needed`; enough of them for the rule, or up to `max_rank`, or all.
            frobenius: of the whole delta.
            total: the number of its triplets, at most.
        """
        needed = self.needed(s, frobenius)
        wanted = total if needed is None else needed
        if self.rank is None and wanted > self.limit:
            return self.limit, self.cap_note
        return min(wanted, self.limit), ""

    def capped(self, delta: TensorDelta) -> bool:
        """Whether `max_rank` kept a delta from what the rule asks for."""
        return delta.note.endswith(self.cap_note)

    @property
    def cap_note(self) -> str:
        """The last of such a delta's notes."""
        return f"max_rank {self.limit} reached"
