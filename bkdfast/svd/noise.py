"""Where the spectrum of a delta stops telling it from noise."""

from __future__ import annotations

import math

from bkdfast.svd.result import TensorDelta

_ROUNDING = 1e-6  # share of the energy


def noise_edge(delta: TensorDelta) -> float:
    """The largest singular value that a random matrix with the energy outside the triplets would have.

    Independent entries of variance `t^2` in `[m, n]` have singular values up to `t (sqrt(m) + sqrt(n))`; `t^2` is what
    the k triplets leave of `||delta||_F^2`, over the `(m - k) (n - k)` degrees of freedom that are left. A singular
    value above the edge stands out from such noise. One below it may still be real: the rest need not be noise, and
    structure in it raises the edge.

    Args:
        delta: of `[m, n]` with k triplets.

    Returns:
        The edge, in the weights' unit; 0 where the triplets are all there is, up to rounding.

    Source: Marchenko & Pastur 1967; Geman 1980, A limit theorem for the norm of random matrices.
    """
    (m, n), k = delta.shape, delta.rank
    total = delta.frobenius**2
    rest = total - float(delta.s.square().sum())
    if rest <= _ROUNDING * total or k >= min(m, n):
        return 0.0
    return math.sqrt(rest / ((m - k) * (n - k))) * (math.sqrt(m) + math.sqrt(n))
