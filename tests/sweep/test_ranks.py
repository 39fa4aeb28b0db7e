"""Rank correlation with its interval, the bound on missed heads, and rankings."""

from __future__ import annotations

import math
import random

import pandas as pd
import pytest
import torch

from bkdfast.sweep.ranks import most_in_population, ranked, spearman


def test_spearman_against_pandas_and_its_interval():
    draw = random.Random(0)
    for n in (4, 9, 30):
        x = torch.tensor([float(draw.randrange(6)) for _ in range(n)])  # ties
        y = torch.tensor([v + draw.randrange(4) for v in x.tolist()])
        found = spearman(x, y)
        frame = pd.DataFrame({"x": x.numpy(), "y": y.numpy()})
        assert found.rho == pytest.approx(frame.corr("spearman").iloc[0, 1]) and found.n == n
        assert -1 <= found.low < found.rho <= found.high <= 1
    assert spearman(torch.arange(50.0), -torch.arange(50.0)).rho == pytest.approx(-1)
    assert math.isnan(spearman(torch.ones(5), torch.arange(5.0)).rho)
    assert str(spearman(torch.ones(5), torch.arange(5.0))) == "not defined (n = 5)"
    few, many = (spearman(torch.arange(float(n)), torch.arange(float(n))) for n in (5, 50))
    assert few.low < 0.7 < 0.99 < many.low, "five ranks in order prove little"


def test_spearman_interval_covers_the_truth():
    """Of normal pairs with correlation 0.6, whose rank correlation is 6/pi asin(0.3)."""
    generator = torch.Generator().manual_seed(0)
    truth = 6 / math.pi * math.asin(0.3)
    pairs = torch.randn(600, 2, 16, generator=generator)
    hits = 0
    for x, e in pairs:
        found = spearman(x, 0.6 * x + 0.8 * e)
        hits += found.low <= truth <= found.high
    assert 0.92 < hits / 600 < 0.985


def test_bound_on_missed_heads_is_the_largest_number_that_the_sample_does_not_refute():
    population, drawn = 30, 8
    for found in range(4):
        bound = most_in_population(found, drawn, population)

        def chance(count, found=found):
            draws = math.comb(population, drawn)
            return sum(
                math.comb(count, i) * math.comb(population - count, drawn - i) / draws for i in range(found + 1)
            )  # fmt: skip

        assert chance(bound) > 0.05 >= chance(bound + 1)
    assert most_in_population(2, 30, 30) == 2 and most_in_population(0, 0, 7) == 7


def test_ranked_orders_and_leaves_out_nan():
    values = torch.tensor([[1.0, -3.0, torch.nan], [0.5, 1.0, -0.25]])
    assert ranked(values) == [(0, 0), (1, 1), (1, 0), (1, 2), (0, 1)]
    assert ranked(values, "decrease")[0] == ranked(values, "size")[0] == (0, 1)
