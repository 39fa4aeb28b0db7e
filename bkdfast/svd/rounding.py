"""How large singular values rounding alone gives a delta: those below are not what fine-tuning meant to write."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SAMPLE = 1 << 16


def rounding_edge(tuned: Tensor) -> float:
    """Largest singular value, about, of the rounding errors of weights stored in a 16-bit or 32-bit format.

    A weight of binary exponent e is rounded by up to half a step of its format, evenly, so with a variance of
    `step^2 / 12`; a matrix `[m, n]` of independent errors of variance `tau^2` has its largest singular value near
    `tau (sqrt(m) + sqrt(n))` (Bai & Yin 1993). The variance is the mean over `_SAMPLE` entries evenly spread. Where a
    change was too small to leave its old value, the error is smaller than that: the edge is an upper estimate.

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
