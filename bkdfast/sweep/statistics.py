"""Statistics of sweeps: recovery, confidence intervals, p-values and their correction, rankings with ties.

Plain functions of `effects [..., N]` (any leading axes, the cells; N samples last), computed on the CPU in float64.
Random numbers come from `seed` alone, so the same arguments give the same result on any machine, to rounding. All cells
share the same resamples, so that what chance does to one head it does to all. A cell that is not finite in some sample
(NaN: a head that the sweep left out) gets NaN.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError

RESAMPLES_AT_ONCE = 256
"""Resamples drawn from one random stream; part of what a seed means, so not to be tuned to the machine."""
WORKING_SET = 1 << 23
"""Float64 numbers (64 MB) that one step may hold."""
ALTERNATIVES = ("two-sided", "greater", "less")


def normalised_recovery(
    patched: torch.Tensor,
    corrupted: torch.Tensor,
    clean: torch.Tensor,
    *,
    per_sample: bool = True,
    floor: float | None = None,
) -> torch.Tensor:
    """Share of the way from the corrupted to the clean run that a patch goes back.

    `(patched - corrupted) / (clean - corrupted)`: 0 where the patch does nothing, 1 where it restores the clean metric;
    beyond both ends it is not clipped.

    Args:
        patched: `[..., N]`, the metric with the patch (effects plus baseline).
        corrupted: `[N]`, the metric of the unedited inputs that were patched.
        clean: `[N]`, the metric of the inputs that the patch came from.
        per_sample: a ratio for each sample; else the ratio of the means over samples, which a sample of small
            denominator cannot dominate.
        floor: |clean - corrupted| up to which a ratio would be noise, e.g. a sweep's noise floor; None: 1e-6 of the
            larger of |clean| and |corrupted|, some roundings of float32.

    Returns:
        `[..., N]`, or `[...]` without `per_sample`, float64. NaN where the denominator is not above the floor: there
        was nothing to recover, and what is NaN stays out of `nanmean` instead of swamping it.

    Raises:
        InvalidArgumentError: shapes that do not fit, a negative floor.

    Source: Wang et al. 2022, "Interpretability in the Wild"; Heimersheim and Nanda 2024, "How to use and interpret
    activation patching".

    Example:
        >>> corrupted, clean = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([5.0, 3.0, 2.0])
        >>> normalised_recovery(torch.tensor([[3.0, 3.0, 4.0]]), corrupted, clean)
        tensor([[0.5000, 1.0000,    nan]], dtype=torch.float64)
    """
    edited, start, end = _double(patched, "patched"), _double(corrupted, "corrupted"), _double(clean, "clean")
    if start.dim() != 1 or end.shape != start.shape or edited.shape[-1] != len(start):
        raise InvalidArgumentError(
            f"patched {tuple(edited.shape)}, corrupted {tuple(start.shape)} and clean {tuple(end.shape)} do not fit; "
            "expected [..., N], [N] and [N]"
        )
    _check_floor(floor or 0.0)
    gained, gap = edited - start, end - start
    size = torch.maximum(start.abs(), end.abs())
    if not per_sample:
        gained, gap, size = gained.mean(-1), gap.mean(), size.mean()
    return (gained / gap).where(gap.abs() > (1e-6 * size if floor is None else floor), torch.nan)


class Interval(NamedTuple):
    """Ends of confidence intervals, `[...]` float64 each."""

    low: torch.Tensor
    high: torch.Tensor


def bootstrap_interval(
    effects: torch.Tensor,
    *,
    level: float = 0.95,
    method: str = "bca",
    denominator: torch.Tensor | None = None,
    resamples: int = 9999,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of each cell's mean over samples.

    Samples are drawn with replacement. `"percentile"` takes the quantiles of the resampled means; `"bca"` moves them by
    the bias z0 and the acceleration a (from the jackknife), `alpha' = Phi(z0 + (z0 + z) / (1 - a (z0 + z)))`, which is
    second-order right for skewed effects. With few samples (below 20 or so) both are too narrow.

    Args:
        effects: `[..., N]`, N at least 2.
        level: share of intervals that are to hold the true mean.
        method: `"bca"` or `"percentile"`.
        denominator: `[N]`: the interval is of `mean(effects) / mean(denominator)`, both resampled together; with
            `clean - corrupted`, of `normalised_recovery(per_sample=False)`.
        resamples: how many.
        seed: of the random numbers.

    Returns:
        `Interval(low, high)`, `[...]` each. Where all samples are equal, both are that value. NaN if so many resampled
        denominators have the wrong sign that the interval has no bounds, or a resample is 0 / 0.

    Raises:
        InvalidArgumentError: fewer than 2 samples, a level outside (0, 1), another method, resamples under 1, a
            negative seed, a denominator of another shape.

    Memory: about 200 MB (64 MB of resampled means and their sorting), whatever the number of cells.

    Source: Efron 1987, "Better bootstrap confidence intervals"; Efron and Tibshirani 1993, chapter 14.

    Example:
        >>> effects = torch.tensor([[0.1, 0.3, 0.2, 0.5, 0.4], [0.0, 0.0, 0.0, 0.0, 0.0]])
        >>> low, high = bootstrap_interval(effects, resamples=999)
        >>> bool(low[0] < 0.3 < high[0]), low[1].item(), high[1].item()
        (True, 0.0, 0.0)
    """
    cells, shape = _cells(effects)
    samples = cells.shape[1]
    if not 0 < level < 1:
        raise InvalidArgumentError(f"level={level} is not between 0 and 1; 0.95 is usual")
    if method not in ("bca", "percentile"):
        raise InvalidArgumentError(f"method={method!r} is not 'bca' or 'percentile'")
    if samples < 2:
        raise InvalidArgumentError(f"an interval needs at least 2 samples, the effects have {samples}")
    _check_resamples(resamples, seed)
    below = torch.ones(samples, dtype=torch.float64) if denominator is None else _double(denominator, "denominator")
    if below.shape != (samples,):
        raise InvalidArgumentError(f"denominator has shape {tuple(below.shape)}; expected ({samples},)")
    alpha = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    ends = torch.empty(len(cells), 2, dtype=torch.float64)
    step = max(1, WORKING_SET // resamples)
    for i in range(0, len(cells), step):
        part = cells[i : i + step]
        means = torch.empty(resamples, len(part), dtype=torch.float64)
        done = wrong_side = 0
        for counts in _draws(samples, resamples, seed):
            means[done : done + len(counts)] = counts @ part.T / (counts @ below)[:, None]
            wrong_side += int((counts @ below * below.sum() <= 0).sum())
            done += len(counts)
        levels = _bca_levels(part, below, means, alpha) if method == "bca" else alpha.expand(len(part), 2)
        # Where all samples are equal, rounding would decide on which side of the estimate a resample is.
        constant = means.amax(0) - means.amin(0) <= 1e-12 * means[0].abs()
        ends[i : i + step] = torch.where(constant[:, None], means[:1].T, _quantiles(means, levels))
        if wrong_side > resamples * alpha[0]:
            ends[i : i + step] = torch.nan
    ends = ends.view(*shape, 2)
    return Interval(ends[..., 0], ends[..., 1])


def sign_flip_pvalues(
    effects: torch.Tensor, *, alternative: str = "two-sided", resamples: int = 9999, seed: int = 0
) -> torch.Tensor:
    """P-value of each cell's mean effect under random flips of the samples' signs.

    The paired permutation test: if the edit did nothing systematic, each sample's effect would be as likely to have the
    other sign. The p-value is the share of sign patterns whose mean is at least as extreme as the observed one. All 2^N
    patterns are counted where they are no more than `resamples + 1` (N <= 13 by default); else `resamples` random ones
    and the observed one, `(1 + b) / (1 + resamples)`, which is never 0.

    Args:
        effects: `[..., N]`, independent samples.
        alternative: `"two-sided"` (|mean| is extreme), `"greater"` or `"less"`.
        resamples: random patterns; the smallest p-value is `1 / (1 + resamples)`, so correcting for 1,000 cells wants
            more than 20,000.
        seed: of the random numbers.

    Returns:
        `[...]` float64. 1 (two-sided) where all effects are 0.

    Raises:
        InvalidArgumentError: no samples, another alternative, resamples under 1, a negative seed.

    Source: Fisher 1935; Phipson and Smyth 2010, "Permutation P-values should never be zero".

    Example:
        >>> sign_flip_pvalues(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, -2.0, 3.0, -4.0]]))
        tensor([0.1250, 0.8750], dtype=torch.float64)
    """
    cells, shape = _cells(effects)
    samples = cells.shape[1]
    if alternative not in ALTERNATIVES:
        raise InvalidArgumentError(f"alternative={alternative!r} is not one of {', '.join(map(repr, ALTERNATIVES))}")
    _check_resamples(resamples, seed)
    exact = samples < 63 and 2**samples <= resamples + 1
    observed, size = cells.sum(-1), cells.abs().sum(-1)
    slack = 1e-12 * size  # the order of summation must not decide whether a pattern counts as extreme
    extreme = torch.zeros(len(cells), dtype=torch.int64)
    step = max(1, WORKING_SET // RESAMPLES_AT_ONCE)
    for signs in _all_signs(samples) if exact else _random_signs(samples, resamples, seed):
        for i in range(0, len(cells), step):
            part = slice(i, i + step)
            sums = signs @ cells[part].T
            if alternative == "two-sided":
                found = sums.abs() >= observed[part].abs() - slack[part]
            elif alternative == "greater":
                found = sums >= observed[part] - slack[part]
            else:
                found = sums <= observed[part] + slack[part]
            extreme[part] += found.sum(0)
    p = extreme.double() / 2**samples if exact else (extreme + 1).double() / (resamples + 1)
    return p.where(observed.isfinite(), torch.nan).view(shape)


def adjust_pvalues(p: torch.Tensor, *, method: str = "bh") -> torch.Tensor:
    """P-values corrected for the number of cells tested.

    Args:
        p: any shape; NaN entries were not tested, do not count and stay NaN.
        method: `"bh"` (Benjamini-Hochberg): calling cells with adjusted p <= q gives a share of false discoveries of at
            most q on average, for independent or positively dependent tests; `p_(i) m / i`, made monotone from the
            largest. `"holm"`: the chance of even one false cell is at most q, however the tests depend on each other;
            `p_(i) (m - i + 1)`, made monotone from the smallest.

    Returns:
        Adjusted p-values, float64, of the same shape, at most 1.

    Raises:
        InvalidArgumentError: another method, p-values outside [0, 1].

    Source: Benjamini and Hochberg 1995; Holm 1979, "A simple sequentially rejective multiple test procedure".

    Example:
        >>> adjust_pvalues(torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64))
        tensor([0.0400, 0.0533, 0.0533, 0.5000], dtype=torch.float64)
        >>> adjust_pvalues(torch.tensor([0.01, 0.04, 0.03, 0.5], dtype=torch.float64), method="holm")
        tensor([0.0400, 0.0900, 0.0900, 0.5000], dtype=torch.float64)
    """
    if method not in ("bh", "holm"):
        raise InvalidArgumentError(f"method={method!r} is not 'bh' (Benjamini-Hochberg) or 'holm'")
    values = _double(p, "p")
    tested = ~values.isnan()
    given = values[tested]
    if ((given < 0) | (given > 1)).any():
        raise InvalidArgumentError(f"p-values lie between 0 and 1; found {given.min().item()} to {given.max().item()}")
    ordered, order = given.sort()
    count = len(ordered)
    ranks = torch.arange(1, count + 1, dtype=torch.float64)
    if method == "bh":
        stepped = (ordered * count / ranks).flip(0).cummin(0).values.flip(0) if count else ordered
    else:
        stepped = (ordered * (count - ranks + 1)).cummax(0).values if count else ordered
    back = torch.empty_like(stepped)
    back[order] = stepped.clamp(max=1)
    adjusted = torch.full_like(values, torch.nan)
    adjusted[tested] = back
    return adjusted


class Top(NamedTuple):
    """The strongest cells, strongest first.

    Attributes:
        cells: their indices, e.g. (layer, head); more than k where others tie with the k-th.
        tied: for each of them, whether it is one of those among which the k-th place cannot be decided.
    """

    cells: list[tuple[int, ...]]
    tied: list[bool]


def top_with_ties(values: torch.Tensor, k: int, *, by: str = "increase", floor: float = 0.0) -> Top:
    """The k strongest cells and all that tie with the k-th.

    Args:
        values: `[...]`, e.g. mean effects `[L, H]`; NaN where there is no cell.
        k: at least 1, at most the number of cells.
        by: `"increase"` (largest first), `"decrease"` (most negative first) or `"size"` (largest absolute first).
        floor: difference up to which two cells count as equal: the sweep's noise floor.

    Returns:
        `Top(cells, tied)`. Cells of exactly equal strength stand in index order. Nothing is tied where exactly k cells
        are in: those beyond the k-th are then weaker by more than the floor.

    Raises:
        InvalidArgumentError: k out of range, another `by`, a negative floor.

    Example:
        >>> top_with_ties(torch.tensor([[0.5, 0.1], [0.301, 0.3]]), 2, floor=0.01)
        Top(cells=[(0, 0), (1, 0), (1, 1)], tied=[False, True, True])
    """
    found = _double(values, "values")
    keys = {"increase": found, "decrease": -found, "size": found.abs()}
    if by not in keys:
        raise InvalidArgumentError(f"by={by!r} is not one of {sorted(keys)}")
    _check_floor(floor)
    key = keys[by].flatten()
    tested = (~key.isnan()).nonzero().squeeze(1)
    if not 1 <= k <= len(tested):
        raise InvalidArgumentError(f"k={k} is out of range: there are {len(tested)} cells")
    order = tested[key[tested].argsort(descending=True, stable=True)]
    ordered = key[order]
    last = ordered[k - 1]
    near = (ordered == last) | ((ordered - last).abs() <= floor)
    members = int((near | (torch.arange(len(order)) < k)).sum())
    tied = near[:members].tolist() if members > k else [False] * k
    where = np.unravel_index(order[:members].numpy(), found.shape)
    return Top([tuple(int(i) for i in cell) for cell in zip(*where, strict=True)], tied)


def _double(values: torch.Tensor, what: str) -> torch.Tensor:
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidTypeError(f"{what} is {type(values).__name__}; expected a tensor of numbers") from None
    if tensor.is_complex():
        raise InvalidTypeError(f"{what} is {tensor.dtype}; expected real numbers")
    return tensor.detach().double().cpu()


def _cells(effects: torch.Tensor) -> tuple[torch.Tensor, torch.Size]:
    """Effects as `[cells, N]`, and the shape of the cells."""
    values = _double(effects, "effects")
    if values.dim() < 1:
        raise InvalidArgumentError("effects are a single number; expected [..., N] with the samples last")
    if not values.shape[-1]:
        raise InvalidArgumentError(f"effects of shape {tuple(values.shape)} have no samples (the last axis)")
    return values.reshape(-1, values.shape[-1]), values.shape[:-1]


def _check_floor(floor: float) -> None:
    if not floor >= 0:
        raise InvalidArgumentError(f"floor={floor} must be 0 or more")


def _check_resamples(resamples: int, seed: int) -> None:
    if resamples < 1:
        raise InvalidArgumentError(f"resamples={resamples} must be 1 or more")
    if seed < 0:
        raise InvalidArgumentError(f"seed={seed} must be 0 or more")


def _streams(resamples: int, seed: int) -> Iterator[tuple[np.random.Generator, int]]:
    """A random generator for each part of the resamples, and how many it is to draw."""
    for number, first in enumerate(range(0, resamples, RESAMPLES_AT_ONCE)):
        yield np.random.default_rng([seed, number]), min(RESAMPLES_AT_ONCE, resamples - first)


def _draws(samples: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """How often each sample is drawn, `[R', N]` float64."""
    for random, count in _streams(resamples, seed):
        drawn = torch.from_numpy(random.integers(0, samples, (count, samples)))
        yield torch.zeros(count, samples, dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(1, dtype=torch.float64).expand(count, samples)
        )


def _random_signs(samples: int, resamples: int, seed: int) -> Iterator[torch.Tensor]:
    """Random +1 and -1, `[R', N]` float64."""
    for random, count in _streams(resamples, seed):
        yield torch.from_numpy(random.integers(0, 2, (count, samples)) * 2.0 - 1.0)


def _all_signs(samples: int) -> Iterator[torch.Tensor]:
    """All 2^N sign patterns, `[R', N]` float64 at a time."""
    for first in range(0, 2**samples, RESAMPLES_AT_ONCE):
        patterns = torch.arange(first, min(first + RESAMPLES_AT_ONCE, 2**samples))
        yield 1.0 - 2.0 * (patterns[:, None] >> torch.arange(samples) & 1).double()


def _bca_levels(cells: torch.Tensor, below: torch.Tensor, means: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """`[cells, 2]`, the quantiles of the resampled ratios `means [R, cells]` that BCa takes in place of `alpha`."""
    total = cells.sum(1, keepdim=True)
    value, left_out = total / below.sum(), (total - cells) / (below.sum() - below)
    # Resamples equal to the estimate count half: few samples or many zeros make them common.
    share = (means < value.T).double().mean(0) / 2 + (means <= value.T).double().mean(0) / 2
    bias = torch.special.ndtri(share)[:, None]
    away = left_out.mean(1, keepdim=True) - left_out
    acceleration = ((away**3).sum(1) / (6 * (away**2).sum(1) ** 1.5))[:, None]
    z = bias + torch.special.ndtri(alpha)
    return torch.special.ndtr(bias + z / (1 - acceleration * z))


def _quantiles(means: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """`[cells, 2]`, quantiles of each column of `means [R, cells]`, linear between the nearest two (Hyndman-Fan 7)."""
    ordered = means.sort(0).values
    at = levels.T * (len(ordered) - 1)  # [2, cells]
    below = at.floor().clamp(0, max(len(ordered) - 2, 0)).nan_to_num().long()
    above = (below + 1).clamp(max=len(ordered) - 1)
    low, high = ordered.gather(0, below), ordered.gather(0, above)
    found = low + (high - low) * (at - below)
    return found.where(~ordered[-1].isnan(), torch.nan).T  # NaN sorts last
