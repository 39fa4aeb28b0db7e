"""How far singular vectors may be off: bounds that hold although only a Krylov space of D was seen.

A small residual says that (s, u, v) is near SOME triplet of D, and residual over gap bounds the angle to it, if the gap
is known: if no larger singular value, and no other one close by, was missed. What was missed cannot be seen, but the
random start block X [n, w], Gaussian and drawn without looking at D, makes missing it improbable:

- Let Y be the j + 1 leading right singular vectors of D. `Y^T X` is Gaussian, so its smallest singular value is at
  least c, but for a probability that shrinks like a power of the oversampling w - j - 1 (Halko, Martinsson & Tropp
  2011, proposition 10.4). D is fixed, so this holds whatever is computed from X afterwards.
- Suppose sigma_{j+1}^2 > a. Among the j + 1 leading left singular vectors' span is a unit x orthogonal to the j
  leading Ritz vectors U_j, and for every polynomial p that grows from a on, `||x^T D p(D^T D) X|| >= c sqrt(a) p(a)`.
- In the Krylov space, `D p(D^T D) X` is known: with Ritz values theta_i and the share beta_i^2 that Ritz vector i has
  of X, what U_j leaves of it has squared Frobenius norm `sum_{i > j} theta_i beta_i^2 p(theta_i)^2`.
- So `c^2 a p(a)^2 > sum_{i > j} theta_i beta_i^2 p(theta_i)^2` for any p of degree below the number of passes
  contradicts it: sigma_{j+1}^2 <= a. The best p is the kernel polynomial of that discrete measure, and the ratio is its
  Christoffel function: a three-term recurrence, no optimisation.

Angles then follow from the residual forms of Davis and Kahan (Stewart & Sun 1990, section V.3), for u and v apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FAILURE = 1e-6
"""Probability, over the start block, that some bound of a tensor does not hold."""
_LEAST_OVERSAMPLING = 4  # of proposition 10.4
_HALVINGS = 40


class Angles(NamedTuple):
    """Bounds on sines of angles between computed and true singular vectors, the larger of left and right; `[k]` each.

    Attributes:
        vector: of vector i to the true vector i; 1 where its neighbours are too close to tell.
        subspace: of vector i to the span of the leading `dimension[i]` true vectors.
        dimension: the number of leading vectors, at least i + 1, for which that bound is the smallest; 0: none holds.
    """

    vector: Tensor
    subspace: Tensor
    dimension: Tensor


def upper_limits(theta: Tensor, share: Tensor, width: int, degree: int, slack: float) -> Tensor:
    """Upper bounds on `sigma_{j+1}^2`, j = 0, 1, ..., that all hold but for a probability of `FAILURE`.

    Args:
        theta: Ritz values (squared singular values) `[N]`, descending.
        share: `beta^2 [N]`, squared norm of each Ritz vector's row of the Gaussian start block.
        width: w, columns of that block.
        degree: degree of the polynomials: number of Krylov blocks - 1.
        slack: added for rounding of the Krylov space, in units of theta.

    Returns:
        `[J]` float64, J = w - 4; infinite where nothing below `theta_j` can be said (`theta_0` is infinite: entry 0 is
        the bound on the norm, never finite here).
    """
    count = min(width - _LEAST_OVERSAMPLING, len(theta))
    limits = torch.full((max(count, 1),), math.inf, dtype=torch.float64)
    for j in range(1, count):
        oversampling = width - j - 1
        t = (count / FAILURE) ** (1 / (oversampling + 1))
        least = (oversampling + 1) / (math.e * math.sqrt(width) * t)  # of Y^T X
        rest, weight = theta[j:], (theta * share)[j:]
        low, high = float(rest[0]) if len(rest) else 0.0, float(theta[j - 1])

        def holds(a: Tensor, rest: Tensor = rest, weight: Tensor = weight, least: float = least) -> Tensor:
            return least**2 * a * christoffel(rest, weight, degree, a) > 1

        if high <= low or not bool(holds(torch.tensor([high], dtype=torch.float64))):
            continue
        # The function grows with a: look at many places at once, twice.
        for _ in range(2):
            places = torch.linspace(low, high, _HALVINGS, dtype=torch.float64)
            first = int(holds(places).int().argmax())
            low, high = float(places[max(first - 1, 0)]), float(places[first])
        limits[j] = high + slack
    return limits


def christoffel(nodes: Tensor, weight: Tensor, degree: int, at: Tensor) -> Tensor:
    """`max p(at)^2 / sum_i weight_i p(nodes_i)^2` over polynomials p of a degree, at places `[A]`.

    Infinite where there are no more nodes than the degree: a polynomial can vanish at all of them.
    """
    total = float(weight.sum())
    if total <= 0:
        return torch.full_like(at, math.inf)
    scale = float(nodes.max()) or 1.0
    nodes, at = nodes / scale, at / scale
    basis = [torch.full_like(nodes, total**-0.5)]
    values = [torch.full_like(at, total**-0.5)]
    found = values[0].square()
    for _ in range(degree):
        new, value = nodes * basis[-1], at * values[-1]
        for _ in range(2):  # Gram-Schmidt, twice
            for old, seen in zip(basis, values, strict=True):
                part = float((weight * old * new).sum())
                new, value = new - part * old, value - part * seen
        norm = float((weight * new.square()).sum().sqrt())
        if norm <= 1e-13 * float(basis[-1].abs().max()) * math.sqrt(total):
            return torch.full_like(at, math.inf)
        basis.append(new / norm)
        values.append(value / norm)
        found = found + values[-1].square()
    return found


def angles(s: Tensor, residual: Tensor, limits: Tensor, rounding: float, eps: float) -> Angles:
    """Bounds from residuals and limits.

    Args:
        s: singular values `[K]`, at least the k that are returned, descending.
        residual: `||D^T u - s v||` of the k that are returned, rounding included.
        limits: of `upper_limits`: `limits[j]` bounds the square of singular value j + 1 (counted from 1).
        rounding: size of `D v - s u`.
        eps: rounding of the stored vectors.
    """
    k = len(residual)
    vector, subspace = torch.ones(k, dtype=torch.float64), torch.ones(k, dtype=torch.float64)
    dimension = torch.zeros(k, dtype=torch.int64)
    largest = float(s[0]) if len(s) else 0.0
    for i in range(k):
        value, off = float(s[i]), float(residual[i])
        for j in range(i + 1, len(limits)):
            gap = value**2 - float(limits[j])
            if gap <= 0:
                continue
            below = math.sqrt(float(limits[j]))
            right = (value * off + largest * rounding) / gap
            left = (below * off + value * rounding) / gap
            bound = min(max(right, left) + eps, 1.0)
            if bound < float(subspace[i]):
                subspace[i], dimension[i] = bound, j
            if j == i + 1:
                alone = max(right, left)
                if i:
                    above = float(s[i - 1])
                    gap = above**2 - value**2 - 4 * above * rounding
                    alone = max(alone, (above * off + largest * rounding) / gap) if gap > 0 else 1.0
                vector[i] = min(alone + eps, 1.0)
    return Angles(vector, subspace, dimension)
