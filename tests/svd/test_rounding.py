"""The edge below which singular values of a delta are rounding."""

import pytest
import torch

from bkdfast.svd.noise import rounding_edge
from bkdfast.svd.rule import Rule
from bkdfast.svd.settings import Settings, Weights
from tests.svd.matrices import FP64, with_spectrum


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(600, 600), (300, 900)], ids=str)
def test_the_edge_is_where_rounding_ends(dtype, shape):
    """Of weights that all moved by more than a step: the errors' largest singular value, to 10%."""
    torch.manual_seed(0)
    exact = 0.02 * torch.randn(shape, dtype=FP64)
    stored = exact.to(dtype)
    largest = torch.linalg.matrix_norm(stored.double() - exact, 2).item()
    assert rounding_edge(stored) == pytest.approx(largest, rel=0.1)


def test_values_below_it_are_flagged_and_those_above_are_not():
    torch.manual_seed(0)
    base = (0.02 * torch.randn(600, 500)).bfloat16()
    written = with_spectrum(600, 500, torch.tensor([1.0, 0.5, 0.25]))
    found = Settings(Rule(12)).factor(Weights("w", base, (base.double() + written).bfloat16()))
    assert found.below_rounding.tolist() == [False] * 3 + [True] * 9
    assert 0.3 * found.rounding < found.s[3] < found.rounding
    # No pass is spent on what is noise; the others are certified.
    assert found.converged and found.passes <= 4 and found.subspace[:3].max() < 1e-4


def test_exact_formats_and_nothing():
    assert rounding_edge(torch.randn(8, 8, dtype=FP64)) == 0 == rounding_edge(torch.zeros(0, 4))
    assert 0 <= rounding_edge(torch.zeros(8, 8)) < 1e-30
