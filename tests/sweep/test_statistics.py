"""Statistics of sweeps against scipy, known answers, and what they promise on simulated data."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.sweep import statistics
from bkdfast.sweep.statistics import (
    adjust_pvalues,
    bootstrap_interval,
    normalised_recovery,
    sign_flip_pvalues,
    top_with_ties,
)

NAN = math.nan


def mean(x, axis=-1):
    return np.mean(x, axis=axis)


def skewed(cells, samples, seed=0):
    """Effects whose true mean is 1."""
    return torch.from_numpy(np.random.default_rng(seed).exponential(size=(cells, samples)))


# recovery


def test_recovery_by_hand():
    corrupted, clean = torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([3.0, 1.0, 4.0, 5.0])
    patched = torch.tensor([[1.0, 2.0, 0.0, 5.0], [3.0, 1.0, 4.0, 5.0], [2.0, 3.0, 6.0, 9.0]])
    expected = [[0, 0, 0, NAN], [1, 1, 1, NAN], [0.5, -1, 1.5, NAN]]
    found = normalised_recovery(patched, corrupted, clean)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    means = normalised_recovery(patched, corrupted, clean, per_sample=False)  # gaps: 2 - 1 + 4 + 0
    torch.testing.assert_close(means, torch.tensor([0, 1, (1 + 1 + 6 + 4) / 5], dtype=torch.float64))


def test_recovery_where_there_is_nothing_to_recover():
    clean = torch.tensor([2.0, 2.0 + 1e-6, 2.1, 3.0])
    corrupted = torch.full((4,), 2.0)
    patched = torch.full((2, 3, 4), 2.5)
    assert normalised_recovery(patched, corrupted, clean)[1, 2].isnan().tolist() == [True, True, False, False]
    assert normalised_recovery(patched, corrupted, clean, floor=0.5)[0, 0].isnan().tolist() == [True, True, True, False]
    assert normalised_recovery(patched, corrupted, clean, floor=0.0)[0, 0].isnan().tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert normalised_recovery(patched, corrupted, corrupted, per_sample=False).isnan().all()
    # float32 metrics of float32 size, in float64
    assert normalised_recovery(patched, corrupted, clean).dtype == torch.float64


# intervals


def scipys(effects, method, distribution, level):
    """scipy's interval from a given bootstrap distribution `[cells, R]`."""
    given = SimpleNamespace(bootstrap_distribution=distribution)
    result = scipy.stats.bootstrap(
        (effects,), mean, axis=-1, method=method, confidence_level=level, n_resamples=0, bootstrap_result=given
    )
    return result.confidence_interval


@pytest.mark.parametrize("method", ["bca", "percentile"])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_interval_as_scipy_from_the_same_resamples(method, level):
    effects = skewed(7, 23)
    effects[0] = (effects[0] > 1).double()  # such as an accuracy: many resamples equal the estimate
    found = bootstrap_interval(effects, method=method, level=level, resamples=700, seed=3)
    counts = torch.cat(list(statistics._draws(23, 700, 3)))
    assert counts.shape == (700, 23) and (counts.sum(1) == 23).all()
    expected = scipys(effects.numpy(), method, (counts @ effects.T / 23).T.numpy(), level)
    np.testing.assert_allclose(found.low, expected.low, rtol=1e-10)
    np.testing.assert_allclose(found.high, expected.high, rtol=1e-10)


def test_interval_as_scipy_from_its_own_resamples():
    effects = skewed(5, 30)
    found = bootstrap_interval(effects, resamples=60_000, seed=1)
    expected = scipy.stats.bootstrap(
        (effects.numpy(),), mean, axis=-1, n_resamples=60_000, rng=np.random.default_rng(5)
    ).confidence_interval
    width = expected.high - expected.low
    assert np.abs((found.low.numpy() - expected.low) / width).max() < 0.02
    assert np.abs((found.high.numpy() - expected.high) / width).max() < 0.02


def test_interval_of_a_ratio_of_means():
    """Both resampled together; jackknife and bias against scipy's paired statistic."""
    effects, gaps = skewed(3, 25), skewed(1, 25, seed=4)[0] + 1
    found = bootstrap_interval(effects, denominator=gaps, resamples=500)
    counts = torch.cat(list(statistics._draws(25, 500, 0)))
    distribution = ((counts @ effects.T) / (counts @ gaps)[:, None]).T.numpy()
    for cell in range(3):
        given = SimpleNamespace(bootstrap_distribution=distribution[cell])
        expected = scipy.stats.bootstrap(
            (effects[cell].numpy(), gaps.numpy()),
            lambda x, y, axis=-1: mean(x, axis) / mean(y, axis),
            paired=True,
            n_resamples=0,
            bootstrap_result=given,
        ).confidence_interval
        assert (found.low[cell].item(), found.high[cell].item()) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(
        torch.stack(bootstrap_interval(effects, denominator=torch.full((25,), 2.0))),
        torch.stack(bootstrap_interval(effects)) / 2,
    )


def test_intervals_hold_the_truth_as_often_as_they_say():
    """1,500 simulated sweeps a case; the standard error of the share is 0.6%."""
    normal = torch.from_numpy(np.random.default_rng(0).normal(1, 1, (1500, 40)))
    for effects in (normal, skewed(1500, 60)):
        for level, slack in ((0.95, 0.03), (0.8, 0.03)):
            low, high = bootstrap_interval(effects, level=level, resamples=1999)
            held = ((low <= 1) & (high >= 1)).double().mean().item()
            assert abs(held - level) < slack, (held, level)


def test_bca_misses_less_unevenly_on_skewed_effects():
    """The percentile interval is too low there: it misses above far more often than below."""
    effects, uneven = skewed(3000, 30), {}
    for method in ("bca", "percentile"):
        low, high = bootstrap_interval(effects, method=method, resamples=1999)
        uneven[method] = ((high < 1).double().mean() - (low > 1).double().mean()).item()
    assert uneven["percentile"] > 0.04 and uneven["bca"] < uneven["percentile"] - 0.01, uneven


def test_intervals_do_not_depend_on_memory_or_on_other_cells(monkeypatch):
    effects = skewed(9, 12).view(3, 3, 12)
    whole = bootstrap_interval(effects, resamples=600)
    monkeypatch.setattr(statistics, "WORKING_SET", 1300)  # two cells at a time
    parts = bootstrap_interval(effects, resamples=600)
    torch.testing.assert_close(torch.stack(parts), torch.stack(whole), rtol=1e-13, atol=0)
    alone = bootstrap_interval(effects[1, 2], resamples=600)
    torch.testing.assert_close(alone.low, whole.low[1, 2], rtol=1e-13, atol=0)
    assert not torch.equal(bootstrap_interval(effects, resamples=600, seed=1).low, whole.low)


def test_intervals_of_degenerate_cells():
    effects = torch.tensor([[0.0, 0, 0, 0], [0.3, 0.3, 0.3, 0.3], [1, NAN, 2, 3], [1, 2, 3, math.inf], [1, 2, 3, 4]])
    for method in ("bca", "percentile"):
        low, high = bootstrap_interval(effects, method=method, resamples=300)
        assert low[0] == high[0] == 0
        assert low[1].item() == high[1].item() == pytest.approx(0.3)
        assert low[2:4].isnan().all() and high[2:4].isnan().all()
        assert low[4] < 2.5 < high[4]
        gaps = torch.tensor([1.0, 2.0, 3.0, 4.0])
        low, high = bootstrap_interval(effects[[0, 4]], method=method, denominator=gaps, resamples=300)
        assert low.tolist() == high.tolist() == pytest.approx([0, 1]), "full recovery of every sample"
        low, high = bootstrap_interval(effects, denominator=gaps - 2.4, method=method, resamples=300)
        assert low.isnan().all() and high.isnan().all(), "the sign of the denominator is not known"
    rare = torch.tensor([1.0, 2.0, 1.0, 1.0] + [0.0] * 16)  # 1% of the resamples have none of them: 0 / 0
    assert bootstrap_interval(rare + torch.rand(20) * rare, denominator=rare).low.isnan()
    assert bootstrap_interval(torch.zeros(0, 5)).low.shape == (0,)
    assert bootstrap_interval(torch.rand(5)).low.shape == ()


# p-values


def enumerated(x, alternative):
    """Over all sign patterns, one by one."""
    sums = [
        math.fsum(s * v for s, v in zip(signs, x, strict=True)) for signs in itertools.product((1, -1), repeat=len(x))
    ]
    total, slack = math.fsum(x), 1e-9
    extreme = {
        "two-sided": lambda s: abs(s) >= abs(total) - slack,
        "greater": lambda s: s >= total - slack,
        "less": lambda s: s <= total + slack,
    }[alternative]
    return sum(map(extreme, sums)) / len(sums)


@pytest.mark.parametrize("alternative", statistics.ALTERNATIVES)
@pytest.mark.parametrize("samples", [1, 2, 5, 10])
def test_exact_pvalues(samples, alternative):
    effects = torch.randn(6, samples, dtype=torch.float64) + 0.3
    effects[1] = effects[1].sign() / 10  # ties, in numbers that are not exact in binary
    effects[2] = 0
    found = sign_flip_pvalues(effects, alternative=alternative)
    assert found.tolist() == pytest.approx([enumerated(x.tolist(), alternative) for x in effects], rel=1e-12)
    if samples > 1:
        expected = scipy.stats.permutation_test(
            (effects.numpy(), np.zeros_like(effects.numpy())),
            lambda x, y, axis: mean(x, axis) - mean(y, axis),
            permutation_type="samples",
            alternative=alternative,
            vectorized=True,
            axis=-1,
            n_resamples=10_000,
        ).pvalue
        np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("alternative", statistics.ALTERNATIVES)
def test_random_patterns_approach_the_exact_pvalue(alternative):
    effects = torch.randn(8, 14, dtype=torch.float64) + 0.2
    exact = sign_flip_pvalues(effects, alternative=alternative, resamples=2**14 - 1)
    found = sign_flip_pvalues(effects, alternative=alternative, resamples=2**14 - 2)
    error = (exact * (1 - exact) / 2**14).sqrt()
    assert not torch.equal(found, exact) and ((found - exact).abs() / error).max() < 4.5
    steps = found * (2**14 - 1)
    assert (steps - steps.round()).abs().max() < 1e-6 and steps.min() >= 1, "(1 + b) / (1 + R)"


def test_the_smallest_pvalue_is_not_zero():
    effects = torch.ones(1, 60) + torch.rand(60) * 0.1
    assert sign_flip_pvalues(effects, resamples=99).item() == pytest.approx(1 / 100)
    assert sign_flip_pvalues(torch.zeros(1, 60), resamples=99).item() == 1


def test_pvalues_are_uniform_under_the_null():
    random = np.random.default_rng(1)
    for null in (random.normal(size=(3000, 24)), random.laplace(size=(3000, 24)) * np.arange(1, 25)):
        for alternative in statistics.ALTERNATIVES:
            p = sign_flip_pvalues(torch.from_numpy(null), alternative=alternative, resamples=1999)
            assert scipy.stats.kstest(p.numpy(), "uniform").pvalue > 1e-3
    exact = sign_flip_pvalues(torch.from_numpy(random.normal(size=(4000, 6))))
    for level in (2 / 64, 4 / 64, 0.25):
        assert (exact <= level + 1e-9).double().mean().item() == pytest.approx(level, abs=4 * (level / 4000) ** 0.5)


def test_pvalues_see_an_effect():
    effects = torch.randn(200, 24) + 0.8
    assert (sign_flip_pvalues(effects) < 0.05).double().mean() > 0.9
    assert (sign_flip_pvalues(effects, alternative="less") > 0.9).double().mean() > 0.9


def test_pvalues_of_cells_that_are_not_finite(monkeypatch):
    effects = torch.randn(2, 3, 20)
    whole = sign_flip_pvalues(effects, resamples=600)
    monkeypatch.setattr(statistics, "WORKING_SET", 520)
    assert torch.equal(sign_flip_pvalues(effects, resamples=600), whole)
    effects[0, 1, 5], effects[1, 2, 0] = NAN, math.inf
    found = sign_flip_pvalues(effects, resamples=600)
    assert found.isnan().tolist() == [[False, True, False], [False, False, True]]
    assert torch.equal(found[~found.isnan()], whole[~found.isnan()])


# correction


def stepwise(p, method):
    """By the definitions: the smallest level at which the procedure rejects each hypothesis."""
    order, m = sorted(range(len(p)), key=p.__getitem__), len(p)
    out = [0.0] * m
    for place, i in enumerate(order):
        if method == "bh":
            out[i] = min(1, min(p[j] * m / (rank + 1) for rank, j in enumerate(order) if rank >= place))
        else:
            out[i] = min(1, max(p[j] * (m - rank) for rank, j in enumerate(order) if rank <= place))
    return out


@pytest.mark.parametrize("method", ["bh", "holm"])
def test_adjusted_pvalues(method):
    p = torch.rand(4, 6, dtype=torch.float64) ** 3
    p[1, 2], p[3, 3], p[0, 0] = p[2, 2], 1.0, 0.0
    found = adjust_pvalues(p, method=method)
    assert found.shape == p.shape
    assert found.flatten().tolist() == pytest.approx(stepwise(p.flatten().tolist(), method), rel=1e-12)
    if method == "bh":
        np.testing.assert_allclose(
            found.flatten(), scipy.stats.false_discovery_control(p.flatten().numpy()), rtol=1e-12
        )
    holes = torch.full((2, 24), NAN, dtype=torch.float64)
    holes[:, ::2] = p.view(2, 12)
    torch.testing.assert_close(adjust_pvalues(holes, method=method)[:, ::2].reshape(4, 6), found)
    assert adjust_pvalues(holes, method=method)[:, 1::2].isnan().all()
    assert adjust_pvalues(torch.full((3,), NAN), method=method).isnan().all()
    assert adjust_pvalues(torch.zeros(0), method=method).shape == (0,)


def test_a_published_example():
    """Benjamini and Hochberg 1995, section 4.1: 15 comparisons, four rejected at 0.05, three by Holm and Bonferroni."""
    p = [
        0.0001,
        0.0004,
        0.0019,
        0.0095,
        0.0201,
        0.0278,
        0.0298,
        0.0344,
        0.0459,
        0.3240,
        0.4262,
        0.5719,
        0.6528,
        0.7590,
        1,
    ]
    assert int((adjust_pvalues(torch.tensor(p)) <= 0.05).sum()) == 4
    assert int((adjust_pvalues(torch.tensor(p), method="holm") <= 0.05).sum()) == 3


def test_corrections_keep_their_promise():
    """Of 60 cells 20 are real; 400 sweeps. Uncorrected testing would break both promises."""
    random = np.random.default_rng(0)
    shift = np.concatenate([np.full(20, 3.0), np.zeros(40)])
    p = torch.from_numpy(scipy.stats.norm.sf(random.normal(size=(400, 60)) + shift))
    for method, share in (("bh", "false discoveries"), ("holm", "any false cell")):
        called = torch.stack([adjust_pvalues(row, method=method) for row in p]) <= 0.1
        wrong = called[:, 20:].sum(1).double()
        broken = wrong / called.sum(1).clamp(min=1) if share == "false discoveries" else (wrong > 0).double()
        assert broken.mean() < 0.1 + 0.03, method
        assert called[:, :20].double().mean() > 0.5, "a correction that calls nothing keeps any promise"
    assert ((p <= 0.1)[:, 20:].any(1)).double().mean() > 0.9


# ranking


@pytest.mark.parametrize(
    ("by", "k", "floor", "cells", "tied"),
    [
        ("increase", 2, 0.0, [(0, 1), (1, 0)], [False, False]),
        ("increase", 3, 0.0, [(0, 1), (1, 0), (1, 1)], [False] * 3),
        ("increase", 1, 0.2, [(0, 1), (1, 0)], [True, True]),
        ("increase", 2, 0.06, [(0, 1), (1, 0), (1, 1)], [False, True, True]),
        ("increase", 3, 0.06, [(0, 1), (1, 0), (1, 1)], [False] * 3),
        ("increase", 4, 0.0, [(0, 1), (1, 0), (1, 1), (0, 2), (1, 2)], [False] * 3 + [True] * 2),
        ("increase", 6, 0.0, [(0, 1), (1, 0), (1, 1), (0, 2), (1, 2), (0, 0)], [False] * 6),
        ("decrease", 1, 0.0, [(0, 0)], [False]),
        ("size", 1, 0.0, [(0, 0)], [False]),
        ("size", 2, 0.0, [(0, 0), (0, 1)], [False, False]),
        ("size", 1, 0.1, [(0, 0), (0, 1)], [True, True]),
    ],
)
def test_top(by, k, floor, cells, tied):
    values = torch.tensor([[-1.0, 0.9, 0.1, NAN], [0.75, 0.7, 0.1, NAN]], dtype=torch.float64)
    assert top_with_ties(values, k, by=by, floor=floor) == (cells, tied)


def test_top_with_infinities_and_one_axis():
    values = torch.tensor([NAN, -math.inf, math.inf, 1.0, math.inf])
    assert top_with_ties(values, 1) == ([(2,), (4,)], [True, True])
    assert top_with_ties(torch.ones(3000), 1).cells == [(i,) for i in range(3000)]
    assert top_with_ties(values, 4).cells == [(2,), (4,), (3,), (1,)]


VALUE, TYPE = InvalidArgumentError, InvalidTypeError
recovery, interval = normalised_recovery, bootstrap_interval


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: recovery(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2)), VALUE, "do not fit"),
        (lambda: recovery(torch.zeros(2), torch.zeros(2), torch.zeros(2), floor=-1), VALUE, "floor"),
        (lambda: interval(torch.zeros(2, 1)), VALUE, "at least 2 samples, the effects have 1"),
        (lambda: interval(torch.zeros(2, 5), level=95), VALUE, "level=95"),
        (lambda: interval(torch.zeros(2, 5), method="t"), VALUE, "method='t'"),
        (lambda: interval(torch.zeros(2, 5), resamples=0), VALUE, "resamples=0"),
        (lambda: interval(torch.zeros(2, 5), seed=-1), VALUE, "seed=-1"),
        (lambda: interval(torch.zeros(2, 5), denominator=torch.ones(4)), VALUE, r"expected \(5,\)"),
        (lambda: interval(torch.tensor(1.0)), VALUE, "single number"),
        (lambda: interval("effects"), TYPE, "effects is str"),
        (lambda: sign_flip_pvalues(torch.zeros(2, 0)), VALUE, "no samples"),
        (lambda: sign_flip_pvalues(torch.zeros(2, 5), alternative="both"), VALUE, "alternative='both'"),
        (lambda: adjust_pvalues(torch.tensor([0.5, 1.5])), VALUE, "between 0 and 1; found 0.5 to 1.5"),
        (lambda: adjust_pvalues(torch.tensor([0.5]), method="fdr"), VALUE, "method='fdr'"),
        (lambda: top_with_ties(torch.tensor([1.0, NAN]), 2), VALUE, "k=2 is out of range: there are 1"),
        (lambda: top_with_ties(torch.tensor([1.0]), 0), VALUE, "k=0"),
        (lambda: top_with_ties(torch.tensor([1.0]), 1, by="name"), VALUE, "by='name'"),
        (lambda: top_with_ties(torch.tensor([1.0]), 1, floor=NAN), VALUE, "floor=nan"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
