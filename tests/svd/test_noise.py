"""The noise edge of matrices whose noise is known."""

import pytest
import torch

from bkdfast.svd.noise import noise_edge
from bkdfast.svd.rule import Rule
from bkdfast.svd.settings import Settings, Weights
from tests.report.delta_results import basis, tensor_delta


@pytest.mark.parametrize("shape", [(200, 200), (120, 400)])
def test_signal_stands_out_and_noise_does_not(shape):
    m, n = shape
    noise = 0.01 * torch.randn(m, n, generator=torch.Generator().manual_seed(0))
    top = float(torch.linalg.svdvals(noise)[0])
    signal = basis(m, 3, 1) @ torch.diag(torch.tensor([6.0, 4.0, 3.0]) * top).double() @ basis(n, 3, 2).T
    delta = Settings(Rule(10)).factor(Weights("w", torch.zeros(m, n), noise + signal.float()))
    edge = noise_edge(delta)
    assert edge == pytest.approx(top, rel=0.05)
    assert [float(s) > 1.05 * edge for s in delta.s] == [True] * 3 + [False] * 7


def test_no_edge_where_nothing_is_left():
    assert noise_edge(tensor_delta("w", 20, 30, 4, 0, rest=0.0)) == 0
    assert noise_edge(tensor_delta("w", 20, 30, 0, 0)) == 0
    assert noise_edge(tensor_delta("w", 4, 30, 4, 0, rest=1e-3)) == 0
