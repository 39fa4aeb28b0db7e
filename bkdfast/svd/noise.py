"""Where the spectrum of a delta stops telling it from noise: of the stored format's rounding, and of any kind."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bkdfast.svd.result import TensorDelta

_ROUNDING = 1e-6  # share of the energy
_SAMPLE = 1 << 16


def rounding_edge(tuned: Tensor) -> float:
    """Largest singular value, about, of the rounding errors of weights stored in a 16-bit or 32-bit format.

    A weight of binary exponent e is rounded by up to half a step of its format, evenly, so with a variance of
    `step^2 / 12`; a matrix `[m, n]` of independent errors of variance `tau^2` has its largest singular value near
    `tau (sqrt(m) + sqrt(n))` (Bai & Yin 1993). The variance is the mean over `_SAMPLE` entries evenly spread. Errors of
    changes about as small as the step depend on the change: they are not independent then, and their largest singular
    value may be half as large again as the edge.

    Args:
        tuned: `[m, n]` floating point, as stored.

    Returns:
        The edge, in the weights' unit; 0 for float64 and for empty matrices.
    """
    if tuned.numel() == 0 or tuned.dtype == torch.float64:
        return 0.0
    flat = (tuned if tuned.is_contiguous() else tuned.T).detach().reshape(-1)  # Conv1D comes as a view
    stride = max(flat.numel() // _SAMPLE, 1)
    # An even stride may keep to a few columns.
    values = flat[:: stride + 1 - stride % 2][:_SAMPLE].double().abs()
    info = torch.finfo(tuned.dtype)
    step = torch.exp2(torch.frexp(values.clamp(min=info.smallest_normal)).exponent.double() - 1) * info.eps
    tau = math.sqrt(float(step.square().mean()) / 12)
    return tau * sum(math.sqrt(side) for side in tuned.shape)


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
