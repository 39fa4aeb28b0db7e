"""`Ranges`: the cosines that clean traffic shows, and `Verdict`: what a request shows against them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.ops.monitor_state import NONE

ROLES = ("prompt", "generated")


@dataclass(frozen=True)
class Observations:
    """Extremes of the cosines of R requests, per role (prompt, generated), block and direction.

    Attributes:
        low: `[R, 2, L, K]` float32, +inf where no token was seen.
        high: `[R, 2, L, K]` float32, -inf where no token was seen.
        tokens: `[R, 2]` int64, tokens seen.
        nonfinite: `[R, 2]` int64, tokens with a NaN or infinity in some block.
        first: running number of the first request.
        lost: requests that were overwritten before they were collected; they come before `first` and were not judged.
        unseen: `[R]` int64, tokens that were not observed: in the cache already when the request began, or in a forward
            that did not come through all blocks; None: none.
        first_outside: `[R]` int64, position of the first token that was not finite or left the ranges in force when it
            was seen, `NONE` (2**31 - 1) without one; None: none.
    """

    low: torch.Tensor
    high: torch.Tensor
    tokens: torch.Tensor
    nonfinite: torch.Tensor
    first: int = 0
    lost: int = 0
    unseen: torch.Tensor | None = None
    first_outside: torch.Tensor | None = None

    _PER_REQUEST: ClassVar = ("low", "high", "tokens", "nonfinite", "unseen", "first_outside")

    def __post_init__(self) -> None:
        if self.unseen is None:
            object.__setattr__(self, "unseen", torch.zeros(len(self.tokens), dtype=torch.int64))
        if self.first_outside is None:
            object.__setattr__(self, "first_outside", torch.full((len(self.tokens),), NONE))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def join(cls, parts: Sequence[Observations]) -> Observations:
        """Consecutive observations as one."""
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in cls._PER_REQUEST}
        return cls(**joined, first=parts[0].first, lost=sum(part.lost for part in parts))

    def select(self, rows: torch.Tensor) -> Observations:
        """Some of the requests, by a boolean mask or indices."""
        return Observations(**{name: getattr(self, name)[rows] for name in self._PER_REQUEST})


@dataclass(frozen=True)
class Ranges:
    """Smallest and largest cosine of clean requests.

    Attributes:
        low: `[2, L, K]` float32, +inf for a role that was not calibrated.
        high: `[2, L, K]` float32, -inf likewise.
        requests: `[2]` int64, how many requests each role's range rests on.
    """

    low: torch.Tensor
    high: torch.Tensor
    requests: torch.Tensor

    @classmethod
    def of(cls, seen: Observations) -> Ranges:
        """The ranges of some requests."""
        return cls(seen.low.amin(0), seen.high.amax(0), (seen.tokens > 0).sum(0))

    def merge(self, other: Ranges) -> Ranges:
        """Ranges of both; exact, so replicas can be calibrated apart."""
        if self.low.shape != other.low.shape:
            raise InvalidArgumentError(f"ranges of shapes {tuple(self.low.shape)} and {tuple(other.low.shape)} differ")
        return Ranges(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.requests + other.requests,
        )

    def excess(self, seen: Observations) -> torch.Tensor:
        """How far each request is outside, `[R, 2, L, K]`: positive outside, in units of cosine; -inf where unseen."""
        outside = torch.maximum(self.low - seen.low, seen.high - self.high)
        return outside.where((self.requests > 0)[:, None, None], -torch.inf)


@dataclass(frozen=True)
class Verdict:
    """What the monitor says of one request.

    Attributes:
        request: running number of the request, from 0 at attachment.
        status: `"flagged"` (a cosine left its range, or activations were not finite), `"clean"`, or `"incomplete"` (no
            finding, but some of its tokens could not be judged: never to be read as clean).
        excess: largest distance outside a range, in units of cosine (negative: inside; -inf: nothing was judged).
        role: `"prompt"` or `"generated"`, where that excess was.
        layer: block of that excess.
        direction: index into the directions of that block.
        tokens: tokens seen, by role.
        nonfinite: tokens whose activations were NaN or infinite.
        token: position in the request (its real tokens, from 0) of the first token that left the ranges in force when
            it was seen, or was not finite; None without one.
        reason: in words.
    """

    request: int
    status: str
    excess: float
    role: str
    layer: int
    direction: int
    tokens: dict[str, int]
    nonfinite: int
    token: int | None
    reason: str

    @property
    def flagged(self) -> bool:
        """The request was flagged."""
        return self.status == "flagged"


def judge(ranges: Ranges, seen: Observations, eps: float) -> list[Verdict]:
    """One verdict for each request, in the order in which they began."""
    excess = ranges.excess(seen)
    _, layers, directions = excess.shape[1:]
    verdicts = []
    for i in range(len(seen)):
        worst = int(excess[i].flatten().argmax())
        role, layer, direction = worst // (layers * directions), worst // directions % layers, worst % directions
        value = float(excess[i].flatten()[worst])
        tokens = dict(zip(ROLES, seen.tokens[i].tolist(), strict=True))
        nonfinite = int(seen.nonfinite[i].sum())
        missed = [name for r, name in enumerate(ROLES) if tokens[name] and seen.low[i, r].isinf().any()]
        unseen = int(seen.unseen[i]) if seen.unseen is not None else 0
        first = int(seen.first_outside[i]) if seen.first_outside is not None else NONE
        unjudged = [name for r, name in enumerate(ROLES) if tokens[name] and not ranges.requests[r]]
        if nonfinite:
            status, reason = "flagged", f"{nonfinite} tokens with NaN or infinite activations"
        elif value > eps:
            status = "flagged"
            reason = f"{ROLES[role]}: direction {direction} of block {layer} is {value:.3f} outside its range"
        elif unseen:
            status, reason = (
                "incomplete",
                f"{unseen} tokens were not observed (in the cache before, or in a forward that stopped)",
            )
        elif missed:
            status, reason = "incomplete", f"some blocks were not observed with {' and '.join(missed)} tokens"
        elif unjudged or not sum(tokens.values()):
            status = "incomplete"
            reason = f"no range was calibrated for {' and '.join(unjudged)} tokens" if unjudged else "no token was seen"
        else:
            status, reason = "clean", "inside all ranges"
        token = first if status == "flagged" and first != NONE else None
        verdicts.append(
            Verdict(seen.first + i, status, value, ROLES[role], layer, direction, tokens, nonfinite, token, reason)
        )
    return verdicts
