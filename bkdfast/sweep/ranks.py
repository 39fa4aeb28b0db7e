"""Orders of heads, how well two of them agree, and what a sample says of the heads that were left out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bkdfast.errors import InvalidArgumentError

Head = tuple[int, int]
"""(layer, head)."""
NOT_HERE = ("heads", "layers", "plan", "positions", "site")
"""Arguments of `sweep` that methods which choose the heads themselves do not pass on."""


def ranked(values: torch.Tensor, by: str = "increase") -> list[Head]:
    """Heads of `values [L, H]`, strongest first; those that are NaN are left out, ties stay in layer order.

    Args:
        values: one number a head.
        by: `"increase"` (largest first), `"decrease"` (most negative first) or `"size"` (largest absolute first).
    """
    keys = {"increase": values, "decrease": -values, "size": values.abs()}
    if by not in keys:
        raise InvalidArgumentError(f"by={by!r} is not one of {sorted(keys)}")
    known = int((~values.isnan()).sum())
    order = keys[by].nan_to_num(nan=-torch.inf).flatten().argsort(descending=True, stable=True)[:known]
    return [(int(i) // values.shape[1], int(i) % values.shape[1]) for i in order]


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation of n pairs with its 95% confidence interval; NaN where it is not defined."""

    rho: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        if math.isnan(self.rho):
            return f"not defined (n = {self.n})"
        if math.isnan(self.low):
            return f"{self.rho:.2f} (n = {self.n})"
        return f"{self.rho:.2f} [{self.low:.2f}, {self.high:.2f}] (n = {self.n})"


def spearman(a: torch.Tensor, b: torch.Tensor) -> Correlation:
    """Spearman's rank correlation of two vectors `[n]`; tied values share their mean rank.

    The interval is Fisher's z with the variance of Bonett and Wright (2000), from n = 4 on. Of n ranks a perfect order
    does not prove a perfect correlation: for the interval it counts as half a swap of neighbours away from one.

    Example:
        >>> print(spearman(torch.arange(8.0), torch.tensor([0.0, 2, 1, 3, 4, 6, 5, 7])))
        0.95 [0.66, 0.99] (n = 8)
    """
    n = len(a)
    x, y = (_mean_ranks(v.double()) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(x.norm() * y.norm())
    if n < 2 or norm == 0:
        return Correlation(math.nan, math.nan, math.nan, n)
    rho = max(-1.0, min(float(x @ y) / norm, 1.0))
    if n < 4:
        return Correlation(rho, math.nan, math.nan, n)
    most = 1 - 6 / (n * (n * n - 1))
    z = math.atanh(max(-most, min(rho, most)))
    half = 1.959964 * math.sqrt((1 + rho * rho / 2) / (n - 3))
    return Correlation(rho, min(math.tanh(z - half), rho), max(math.tanh(z + half), rho), n)


def _mean_ranks(values: torch.Tensor) -> torch.Tensor:
    _, group, size = values.unique(return_inverse=True, return_counts=True)
    return (size.cumsum(0) - (size - 1) / 2)[group]


def most_in_population(found: int, drawn: int, population: int, *, level: float = 0.95) -> int:
    """Upper confidence bound on how many of a population have a property that `found` of `drawn` have.

    Drawn without replacement, so the bound is `found` itself where all were drawn (hypergeometric, one-sided).

    Example:
        >>> most_in_population(0, 16, 100)  # none of 16: at most 15 of the 100
        15
    """
    most = found
    for count in range(found + 1, population - drawn + found + 1):
        ways = (math.comb(count, i) * math.comb(population - count, drawn - i) for i in range(found + 1))
        if sum(ways) <= (1 - level) * math.comb(population, drawn):
            break
        most = count
    return most
