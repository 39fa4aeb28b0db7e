"""The bounds on angles hold: against the true vectors of matrices with known spectra."""

from __future__ import annotations

import random

import pytest
import torch

from bkdfast.svd import krylov
from bkdfast.svd.batched import batched_triplets
from bkdfast.svd.certificate import kernel_polynomial, least_singular_value
from bkdfast.svd.krylov import leading_triplets
from tests.svd.matrices import FP64, with_spectrum

SPECTRA = {
    "powers": lambda n, draw: draw.uniform(0.5, 0.97) ** torch.arange(n, dtype=FP64),
    "harmonic": lambda n, draw: torch.arange(1, n + 1, dtype=FP64) ** -draw.uniform(0.3, 1.5),
    "low rank and noise": lambda n, draw: torch.cat(
        [torch.linspace(3, 1, 8, dtype=FP64), draw.uniform(0.01, 0.6) * torch.rand(n - 8, dtype=FP64).sqrt()]
    ),
    "pairs": lambda n, draw: (draw.uniform(0.6, 0.9) ** torch.arange(n // 2 + 1, dtype=FP64)).repeat_interleave(2)[:n],
    "plateau": lambda n, draw: torch.cat([torch.ones(20, dtype=FP64), 0.3 * torch.rand(n - 20, dtype=FP64)]),
    "one outlier": lambda n, draw: torch.cat([torch.tensor([100.0], dtype=FP64), torch.rand(n - 1, dtype=FP64)]),
    "low rank": lambda n, draw: torch.cat([torch.linspace(2, 1, 6, dtype=FP64), torch.zeros(n - 6, dtype=FP64)]),
    "graded": lambda n, draw: 10.0 ** -torch.linspace(0, draw.uniform(1, 6), n, dtype=FP64),
    "bulk": lambda n, draw: torch.linspace(1, 0.2, n, dtype=FP64),
}


def off(true: torch.Tensor, found: torch.Tensor) -> float:
    """Sine of the angle between a unit vector and a span of orthonormal columns."""
    found = found / torch.linalg.vector_norm(found)
    return float(torch.linalg.vector_norm(found - true @ (true.T @ found)))


def check(kind: str, number: int) -> tuple[int, int]:
    """(bounds below 1%, vectors), after checking that all bounds hold for one random matrix."""
    draw = random.Random(f"{kind} {number}")
    m, n = draw.choice([(300, 420), (420, 300), (350, 350)])
    torch.manual_seed(number)
    s = SPECTRA[kind](min(m, n), draw).sort(descending=True).values
    delta = with_spectrum(m, n, s, seed=number)
    dtype = draw.choice([torch.float32, torch.float64])
    w0 = torch.zeros(m, n, dtype=dtype)
    w1 = delta.to(dtype)
    rank, passes = draw.randint(1, 12), draw.randint(2, 12)
    found = leading_triplets(w0, w1, rank=rank, max_passes=passes, seed=number)
    u, _, vt = torch.linalg.svd(w1.double(), full_matrices=False)
    for i in range(len(found.s)):
        for true, made in ((u, found.u), (vt.T, found.v)):
            bound, j = float(found.angles.subspace[i]), int(found.angles.dimension[i])
            assert off(true[:, i : i + 1], made[:, i].double()) <= float(found.angles.vector[i]) + 1e-13
            assert j == 0 or (j > i and off(true[:, :j], made[:, i].double()) <= bound + 1e-13)
    return int((found.angles.subspace < 0.01).sum()), len(found.s)


@pytest.mark.parametrize("kind", SPECTRA)
def test_the_true_angle_never_exceeds_the_bound(kind):
    """40 random matrices of each kind, stopped after any number of passes."""
    useful, total = (sum(part) for part in zip(*(check(kind, number) for number in range(40)), strict=True))
    share = {"bulk": 0.0, "plateau": 0.0, "graded": 0.0, "harmonic": 0.15, "one outlier": 0.15}.get(kind, 0.3)
    assert useful >= share * total


def test_limits_that_are_too_small_would_be_caught(monkeypatch):
    """Of two equal singular values neither has a vector of its own, which limits that are too small would grant it."""
    monkeypatch.setattr(
        krylov, "upper_limits", lambda theta, *rest: torch.cat([theta.new_full((1,), float("inf")), theta[1:12] / 2])
    )
    with pytest.raises(AssertionError):
        for number in range(10):
            check("pairs", number)


@pytest.mark.parametrize("degree", [0, 1, 4, 9])
def test_kernel_polynomial_is_the_best(degree):
    """Against least squares over the coefficients in a Chebyshev basis, for two measures at once."""
    torch.manual_seed(degree)
    nodes = torch.rand(60, dtype=FP64).sort(descending=True).values
    weights = torch.rand(2, 60, dtype=FP64) * torch.tensor([[1.0], [0.0]]).where(torch.arange(60) < 20, 1.0)
    places = torch.tensor([[1.01, 1.3, 4.0], [nodes[19], 1.0, 1.3]], dtype=FP64)
    found = kernel_polynomial(nodes, weights, degree, places)
    chebyshev = lambda x: torch.special.chebyshev_polynomial_t(2 * x[:, None] - 1, torch.arange(degree + 1))  # noqa: E731
    for weight, at, values in zip(weights, places, found, strict=True):
        gram = chebyshev(nodes).T @ (weight[:, None] * chebyshev(nodes))
        best = torch.linalg.solve(gram, chebyshev(at).T)  # [D, A]
        best = chebyshev(nodes) @ (best / (chebyshev(at).T * best).sum(0))
        torch.testing.assert_close(values.T, best, rtol=1e-4, atol=1e-8)


def test_kernel_polynomial_with_more_degrees_than_nodes_vanishes_at_them():
    nodes = torch.tensor([3.0, 2.0, 1.0], dtype=FP64)
    found = kernel_polynomial(nodes, torch.tensor([[0.0, 1.0, 1.0]], dtype=FP64), 5, nodes[:1, None])
    torch.testing.assert_close(found[0, 0], torch.tensor([1.0, 0.0, 0.0], dtype=FP64))


@pytest.mark.parametrize("shape", [(1, 5), (3, 6), (4, 16)])
def test_least_singular_value(shape):
    """As often below it as said, or less often, and not by far."""
    blocks = torch.randn(20_000, *shape, dtype=FP64, generator=torch.Generator().manual_seed(0))
    share = (torch.linalg.svdvals(blocks)[:, -1] < least_singular_value(*shape, failure=0.02)).double().mean()
    assert 0.005 < share < 0.02 + 3 * (0.02 / len(blocks)) ** 0.5


def test_limits_hold_and_are_close():
    """Of sigma^2 itself, for many start blocks; with more blocks they come close."""
    s = torch.arange(1, 301, dtype=FP64) ** -0.5
    w0, w1 = torch.zeros(300, 300), with_spectrum(300, 300, s).float()
    seen, original = [], krylov.upper_limits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(krylov, "upper_limits", lambda *given: seen.append(original(*given)) or seen[-1])
        for seed in range(10):
            found = leading_triplets(w0, w1, rank=8, seed=seed)
            assert found.angles.subspace.max() <= 1e-4
            assert (seen[-1][1:7].sqrt() <= 1.05 * s[1:7]).all()
    for limits in seen:
        assert (limits[1:] >= s[1 : len(limits)].square() - 1e-6).all()


@pytest.mark.parametrize(("kind", "passes"), [("harmonic", 8), ("geometric", 3)])
def test_how_many_passes_a_certificate_takes(kind, passes):
    number = torch.arange(300, dtype=FP64)
    s = (number + 1) ** -0.5 if kind == "harmonic" else 10.0 ** (-number / 8)
    w1 = with_spectrum(300, 300, s).float()
    for seed in range(5):
        found = leading_triplets(torch.zeros_like(w1), w1, rank=8, seed=seed)
        assert found.passes <= passes and found.angles.subspace.max() <= 1e-4


@pytest.mark.parametrize(("rank", "s"), [(20, 0.9 ** torch.arange(32)), (6, torch.linspace(2, 1, 16))])
@pytest.mark.parametrize("many", [False, True])
def test_all_vectors_of_a_delta_of_low_rank_are_certified(rank, s, many):
    """Of more than were asked for, so that there is something to be missed; nothing is left to iterate on."""
    w1 = with_spectrum(512, 600, s.double()).float()
    w0 = torch.zeros_like(w1)
    found = leading_triplets(w0, w1, rank=rank)
    if many:
        (found, _) = batched_triplets([w0] * 2, [w1] * 2, rank=rank, seeds=[0, 1], ignore_below=[0.0] * 2)
    assert found.passes <= 4 and found.angles.subspace.max() <= 1e-4
