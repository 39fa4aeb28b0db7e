"""How far singular vectors may be off: bounds that hold although only a Krylov space of D was seen.

A small residual says that (s, u, v) is near SOME triplet of D, and residual over gap bounds the angle to it, if the gap
is known: if no larger singular value, and no other one close by, was missed. What was missed cannot be seen, but the
random start block X [n, w], Gaussian and drawn without looking at D, makes missing it improbable:

- For every run of true right singular vectors next to each other, V_R [n, r], the block `V_R^T X` is Gaussian, so its
  smallest singular value is at least c_r but for a tiny probability (`least_singular_value`). D is fixed: this
  holds whatever is computed from X afterwards.
- In the Krylov space, `K = D p(D^T D) X` is known for every polynomial p of degree below the number of passes: the row
  of left Ritz vector u_i in it is `sqrt(theta_i) p(theta_i) b_i`, with b_i the Ritz vector's row of X.
- Suppose sigma_{j+1}^2 > a, with a between Ritz values j + 1 and j. Then more true vectors than Ritz vectors, j + 1
  against j, belong to values above a. A true vector further than delta_i from Ritz value i is nearly orthogonal to u_i:
  up to `e_i = outside_i sqrt(theta_i + delta_i) / delta_i`, with outside_i the part of `D^T u_i` outside the space. The
  intervals `theta_i +- delta_i` that overlap make clusters; in one of them, of multiplicity m, there are m + 1 true
  vectors in a run, or a true vector is in none. Either way their span has a unit x orthogonal to the cluster's u_i.
- If p grows from a on, `||x^T K|| >= c_{m+1} sqrt(a) p(a)`. But x^T K is made of what u_1..u_j leave of K and of e_i
  times their rows. So sigma_{j+1}^2 <= a wherever

      c_{m+1} sqrt(a) p(a) > sqrt(sum_{i > j} theta_i |b_i|^2 p(theta_i)^2)
                             + sum_{i <= j} e_i sqrt(theta_i) |b_i| p(theta_i)

The best p for the first sum is the kernel polynomial at a of that discrete measure, and the sum the inverse of its
Christoffel function: a three-term recurrence, no optimisation. All its zeros are below a.

Angles then follow from the residual forms of Davis and Kahan (Stewart & Sun 1990, section V.3), for u and v apart.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FAILURE = 1e-6
"""Probability, over the start block, that some bound of a tensor does not hold."""
_LEAST_OVERSAMPLING = 4  # columns of the start block beyond the longest run of vectors
_PLACES = 16  # at which a limit is tried between two Ritz values
_SHARPER = 4  # limits that get the sharper look
_LEAKS = (0.25, 1.0, 4.0)  # second sum over the first that delta_i are chosen for: less leakage, more in a cluster


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


def upper_limits(theta: Tensor, rows: Tensor, outside: Tensor, degree: int, slack: float, k: int) -> Tensor:
    """Upper bounds on `sigma_{j+1}^2`, j = 0, 1, ..., that all hold but for a probability of `FAILURE`.

    Args:
        theta: Ritz values (squared singular values) `[N]`, descending.
        rows: b `[N, w]`, each Ritz vector's row of the Gaussian start block.
        outside: norm of the part of `D^T u` outside the Krylov space, for each left Ritz vector u `[N]`.
        degree: degree of the polynomials: number of Krylov blocks - 1.
        slack: added for rounding of the Krylov space, in units of theta.
        k: the limits from entry k on, which bound the span of the vectors that are asked for, get a sharper look.

    Returns:
        `[J]` float64, J = w - 4; infinite where nothing below the j-th Ritz value can be said. (Entry 0 would bound the
        norm of D, and is infinite.)
    """
    theta, rows, outside = theta.double().cpu(), rows.double().cpu(), outside.double().cpu()
    share, width = rows.square().sum(1), rows.shape[1]
    count = max(min(width - _LEAST_OVERSAMPLING, len(theta)), 1)
    limits = torch.full((count,), math.inf, dtype=torch.float64)
    if count == 1:
        return limits
    j = torch.arange(1, count)  # Ritz vectors above the place
    runs = count * (count + 1) // 2
    least = torch.tensor([least_singular_value(r, width, FAILURE / runs) for r in range(1, count + 1)])
    low, high = theta[1:count], theta[: count - 1]
    at = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, _PLACES, dtype=torch.float64)  # [J, A]
    below = torch.arange(len(theta)) >= j[:, None]  # [J, N]
    weight = theta * share * below
    kernel = kernel_polynomial(theta, weight, degree, at)  # [J, A, N], p(a) = 1
    squares = kernel.square()
    rest = (squares @ weight[:, :, None]).sqrt()  # [J, A, 1]
    some = slice(k - 1, k - 1 + _SHARPER)
    weights = (squares[some] * theta * below[some, None]).flatten(0, 1)  # [S A, N]
    rest[some] = torch.minimum(rest[some], _row_norm(weights, rows).view_as(rest[some]))
    size = kernel[:, :, : count - 1].abs() * (theta * share).sqrt()[: count - 1]
    above, theta, outside = ~below[:, : count - 1], theta[: count - 1], outside[: count - 1]  # [J, I], [I], [I]
    proven = torch.zeros_like(at, dtype=torch.bool)
    for leak in _LEAKS:
        # Where it may hold: elsewhere not even a run of one vector is enough.
        limit, place = (~proven & (least[0] * at.sqrt() > (1 + leak) * rest[:, :, 0])).nonzero(as_tuple=True)  # [M]
        if len(limit) == 0:
            continue
        reach, valid = rest[limit, place], above[limit]  # [M, 1], [M, I]
        part = leak * reach / j[limit, None] / size[limit, place]  # e_i, so that together they leak so much
        ratio = (outside / part).square()
        delta = (ratio + (ratio * (ratio + 4 * theta)).sqrt()) / 2  # of e_i delta_i = outside_i sqrt(theta_i + delta_i)
        members = _largest_cluster(torch.where(valid, theta - delta, math.inf), theta + delta * valid, valid)
        proven[limit, place] = least[members] * at[limit, place].sqrt() > (1 + leak) * reach[:, 0]
    proven &= (high - low > slack)[:, None]
    first = proven.int().argmax(1, keepdim=True)
    limits[1:] = torch.where(proven.any(1), at.gather(1, first)[:, 0] + slack, math.inf)
    return limits


def _row_norm(weights: Tensor, rows: Tensor) -> Tensor:
    """Spectral norms of the matrices with rows `sqrt(weights_i) b_i`, at most: `(sum_i s_i^8)^(1/8)`.

    Args:
        weights: `[L, N]`.
        rows: b `[N, w]`.
    """
    parts = weights.split(8)  # all at once would leave the cache
    gram = torch.cat([rows.T @ (part[:, :, None] * rows) for part in parts])  # [L, w, w]
    return torch.linalg.matrix_norm(gram @ gram).pow(0.25)


def least_singular_value(rows: int, columns: int, failure: float) -> float:
    """What a Gaussian matrix's smallest singular value is below with at most this probability; rows <= columns.

    From the density of its square x, at most `L x^((columns - rows - 1) / 2)`: Chen & Dongarra 2005 (SIAM J. Matrix
    Anal. Appl. 27(3)).
    """
    power = (columns - rows + 1) / 2
    log_l = (power - 1) * math.log(2) + math.lgamma((columns + 1) / 2)
    log_l -= math.lgamma(rows / 2) + math.lgamma(columns - rows + 1)
    return math.exp((math.log(failure * power) - log_l) / power / 2)


def kernel_polynomial(nodes: Tensor, weight: Tensor, degree: int, at: Tensor) -> Tensor:
    """Values at the nodes of the polynomial with p(at) = 1 that has the least `sum_i weight_i p(nodes_i)^2`.

    Args:
        nodes: `[N]`.
        weight: `[J, N]`, zero or more, of J measures.
        degree: of the polynomials.
        at: places `[J, A]`.

    Returns:
        `[J, A, N]`.
    """
    scale = nodes.max().clamp(min=1e-300)
    nodes, at = nodes / scale, at / scale
    basis = nodes.new_zeros(len(weight), degree + 1, len(nodes))  # orthonormal polynomials at the nodes
    values = nodes.new_zeros(len(weight), degree + 1, at.shape[1])
    start = weight.sum(1).clamp(min=1e-200).rsqrt()[:, None]
    basis[:, 0], values[:, 0] = start, start
    for d in range(degree):
        new, value = nodes * basis[:, d], at * values[:, d]
        done, known = basis[:, : d + 1], values[:, : d + 1]
        for _ in range(2):  # Gram-Schmidt, twice
            parts = done @ (weight * new)[:, :, None]
            new, value = new - (parts * done).sum(1), value - (parts * known).sum(1)
        # Zero but for rounding where a polynomial of degree d + 1 vanishes at all nodes with weight.
        norm = (weight * new.square()).sum(1).sqrt().clamp(min=1e-13)[:, None]
        basis[:, d + 1], values[:, d + 1] = new / norm, value / norm
    return (values / values.square().sum(1, keepdim=True)).transpose(1, 2) @ basis


def _largest_cluster(low: Tensor, high: Tensor, valid: Tensor) -> Tensor:
    """The most intervals `[..., I]`, in descending order of their middles, that overlap in a chain; 0 without any."""
    number = torch.arange(low.shape[-1])
    highest_from = high.flip(-1).cummax(-1).values.flip(-1)
    apart = low.cummin(-1).values[..., :-1] > highest_from[..., 1:]
    first = torch.nn.functional.pad(apart * number[1:], (1, 0)).cummax(-1).values
    return ((number - first + 1) * valid).amax(-1)


def angles(s: Tensor, residual: Tensor, limits: Tensor, rounding: float, eps: float) -> Angles:
    """Bounds from residuals and limits.

    Args:
        s: singular values `[K]`, at least the k that are returned, descending.
        residual: `||D^T u - s v||` of the k that are returned, rounding included.
        limits: of `upper_limits`: `limits[j]` bounds the square of singular value j + 1 (counted from 1).
        rounding: size of `D v - s u`.
        eps: rounding of the stored vectors.
    """
    k, largest, tiny = len(residual), len(limits), torch.finfo(torch.float64).tiny  # 0 / 0 is to be infinite
    value, off, below, rounding = s[:k, None], residual[:, None].clamp(min=tiny), limits.sqrt(), max(rounding, tiny)
    gap = value.square() - limits  # [k, J]
    gap = torch.where((gap > 0) & (torch.arange(largest) > torch.arange(k)[:, None]), gap, 0.0)
    right, left = (value * off + below * rounding) / gap, (below * off + value * rounding) / gap
    subspace, dimension = (torch.maximum(right, left) + eps).clamp(max=1).min(1)
    dimension[subspace >= 1] = 0
    # Of vector i to vector i: what may lie along the vectors below it, and along those above it.
    vector = torch.ones_like(subspace)
    single = min(k, largest - 1)
    value, off, below = value[:single, 0], off[:single, 0], below[1 : single + 1]
    lower = gap.diagonal(1)[:single]
    above = torch.cat((s.new_full((1,), math.inf), s))[:single]
    upper = (above.square() - value.square() - 4 * above * rounding).clamp(min=0)
    beside = torch.where(above.isinf(), 0.0, above / upper)
    right = torch.maximum(value / lower, beside) * off + torch.maximum(below / lower, beside) * rounding
    left = torch.maximum(below / lower, beside) * off + torch.maximum(value / lower, beside) * rounding
    vector[:single] = (torch.maximum(right, left) + eps).clamp(max=1)
    return Angles(vector, subspace, dimension)
