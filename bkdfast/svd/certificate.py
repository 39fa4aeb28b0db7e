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

import numpy as np
import torch
from torch import Tensor

FAILURE = 1e-6
"""Probability, over the start block, that some bound of a tensor does not hold."""
_LEAST_OVERSAMPLING = 4  # of proposition 10.4
_PLACES = 200  # at which a limit is tried between two Ritz values


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
        `[J]` float64, J = w - 4; infinite where nothing below the j-th Ritz value can be said. (Entry 0 would bound the
        norm of D, and is infinite.)
    """
    nodes, weight = theta.double().cpu().numpy(), (theta * share).double().cpu().numpy()
    count = max(min(width - _LEAST_OVERSAMPLING, len(nodes)), 1)
    limits = np.full(count, np.inf)
    for j in range(1, count):
        low, high = nodes[j], nodes[j - 1]
        if high - low <= slack:
            continue
        oversampling = width - j - 1
        t = (count / FAILURE) ** (1 / (oversampling + 1))
        least = (oversampling + 1) / (math.e * math.sqrt(width) * t)  # singular value of Y^T X
        places = np.linspace(low, high, _PLACES)
        holds = least**2 * places * christoffel(nodes[j:], weight[j:], degree, places) > 1
        if holds.any():
            limits[j] = places[holds.argmax()] + slack
    return torch.from_numpy(limits)


def christoffel(nodes: np.ndarray, weight: np.ndarray, degree: int, at: np.ndarray) -> np.ndarray:
    """`max p(at)^2 / sum_i weight_i p(nodes_i)^2` over polynomials p of a degree, at places `[A]`.

    Infinite where there are no more nodes than the degree: a polynomial can vanish at all of them.
    """
    total, scale = weight.sum(), nodes.max(initial=0.0)
    if total <= 0 or len(nodes) <= degree:
        return np.full_like(at, np.inf)
    nodes, at = nodes / scale, at / scale
    basis = np.zeros((degree + 1, len(nodes)))  # orthonormal polynomials at the nodes
    basis[0] = total**-0.5
    values = np.zeros((degree + 1, len(at)))
    values[0] = basis[0, 0]
    for d in range(degree):
        new, value = nodes * basis[d], at * values[d]
        for _ in range(2):  # Gram-Schmidt, twice
            parts = basis[: d + 1] @ (weight * new)
            new, value = new - parts @ basis[: d + 1], value - parts @ values[: d + 1]
        norm = math.sqrt(weight @ new**2)
        if norm <= 1e-13:
            return np.full_like(at, np.inf)
        basis[d + 1], values[d + 1] = new / norm, value / norm
    return (values**2).sum(0)


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
