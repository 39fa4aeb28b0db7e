"""`delta_sketch`: what one block Krylov pass needs of a weight delta, from one read of both matrices.

With D = W1 - W0 (tuned minus base), which is never stored:

    Y = D X                      [m, k]
    Z = D^T Y = D^T D X          [n, k]
    frobenius_sq = sum D_ij^2    scalar, float64
    changed = #{ij : W1_ij != W0_ij}    scalar, int64

Shapes and dtypes: W0 and W1 `[m, n]`, each bfloat16, float16, float32 or float64, not necessarily the same, any strides
(a transposed view is read in place); X `[n, k]` float32, or float64 when both weights are float64. Y and Z have X's
dtype. The difference is taken in the wider of the two weight dtypes, at least float32, and rounded to X's dtype; sums
for Y and Z run in X's dtype, the squared norm in float64 (on a CPU's matrix unit four squares at a time in float32, a
relative error of 2e-7 at most and 1e-9 in large matrices). m, n and k may be 0.

NaN and infinity propagate to Y, Z and `frobenius_sq` (an infinity at the same place of both weights gives NaN), so a
non-finite `frobenius_sq` is the sign that the delta has one; NaN counts as changed. `+0` and `-0` are equal.

Floor: reading both matrices once, 4 m n k flops. The CPU kernel allocates a Z for each of 16 groups of rows, whatever
the number of threads, so that the sums do not depend on it: 16 n k numbers of X's dtype, k rounded up to 16 on
the matrix unit. The reference reads row panels
of `_PANEL` elements, whose size does not depend on the number of threads. Its GEMMs obey
`torch.set_float32_matmul_precision`; who needs float32 sets it.

One pass per iteration gives both factors: Halko, Martinsson & Tropp 2011 (SIAM Review 53(2)), section 4.5; Musco &
Musco 2015 (NeurIPS), algorithm 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops._library import Op

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_PANEL = 1 << 20


class DeltaSketch(NamedTuple):
    """What `delta_sketch` returns: `y` [m, k], `z` [n, k], `frobenius_sq` [] float64, `changed` [] int64."""

    y: Tensor
    z: Tensor
    frobenius_sq: Tensor
    changed: Tensor


def sketch_dtype(w0: Tensor, w1: Tensor) -> torch.dtype:
    """Dtype that X must have: float64 when both weights are float64, else float32."""
    both_double = w0.dtype == torch.float64 and w1.dtype == torch.float64
    return torch.float64 if both_double else torch.float32


def _check(w0: Tensor, w1: Tensor, x: Tensor) -> None:
    if w0.dim() != 2 or w0.shape != w1.shape:
        raise InvalidArgumentError(
            f"the weights must be two matrices of one shape, found {tuple(w0.shape)} and {tuple(w1.shape)}"
        )
    if x.dim() != 2 or x.shape[0] != w0.shape[1]:
        raise InvalidArgumentError(
            f"x must be [n, k] with n = {w0.shape[1]}, the number of columns of the weights; found {tuple(x.shape)}"
        )
    for name, weight in (("w0", w0), ("w1", w1)):
        if weight.dtype not in _DTYPES:
            raise InvalidTypeError(
                f"{name} is {weight.dtype}; bfloat16, float16, float32 and float64 are supported. Dequantise it first"
            )
    if x.dtype != sketch_dtype(w0, w1):
        raise InvalidTypeError(
            f"x must be {sketch_dtype(w0, w1)} for weights of {w0.dtype} and {w1.dtype}, found {x.dtype}"
        )
    if not w0.device == w1.device == x.device:
        raise InvalidArgumentError(
            f"all tensors must be on one device, found {w0.device}, {w1.device} and {x.device} (w0, w1, x)"
        )


def fake(w0: Tensor, w1: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes of the results."""
    (m, n), k = w0.shape, x.shape[1]
    scalar = ()
    return (
        x.new_empty((m, k)),
        x.new_empty((n, k)),
        x.new_empty(scalar, dtype=torch.float64),
        x.new_empty(scalar, dtype=torch.int64),
    )


def reference(w0: Tensor, w1: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the meaning of the op, a panel of rows at a time."""
    (m, n), k = w0.shape, x.shape[1]
    wide = torch.promote_types(torch.promote_types(w0.dtype, w1.dtype), torch.float32)
    y = x.new_empty((m, k))
    z = x.new_zeros((n, k))
    frobenius_sq = x.new_zeros((), dtype=torch.float64)
    changed = x.new_zeros((), dtype=torch.int64)
    rows = max(1, _PANEL // max(n, 1))
    for start in range(0, m, rows):
        base, tuned = w0[start : start + rows].to(wide), w1[start : start + rows].to(wide)
        changed += (base != tuned).sum()
        delta = (tuned - base).to(x.dtype)  # [rows, n]
        # Squares in float64: a float32 square of a small delta underflows below 1e-19.
        frobenius_sq += delta.double().square().sum()
        with torch.autocast(x.device.type, enabled=False):
            panel = delta @ x  # [rows, k]
            y[start : start + rows] = panel
            z.addmm_(delta.T, panel)
    return y, z, frobenius_sq, changed


OP = Op(
    "delta_sketch(Tensor w0, Tensor w1, Tensor x) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=fake,
    reference=reference,
    triton="delta_sketch",
)


def delta_sketch(w0: Tensor, w1: Tensor, x: Tensor, *, backend: str | None = None) -> DeltaSketch:
    """`Y = (W1 - W0) X`, `Z = (W1 - W0)^T Y`, squared Frobenius norm and count of changed entries.

    Args:
        w0: base weights `[m, n]`; bfloat16, float16, float32 or float64, any strides.
        w1: tuned weights `[m, n]`, the same set of dtypes, not necessarily `w0`'s.
        x: block of n-vectors `[n, k]`, float32; float64 when both weights are float64.
        backend: `"cpp"`, `"cuda"`, `"triton"` or `"reference"`; None: the fastest that is there.

    Returns:
        `DeltaSketch(y, z, frobenius_sq, changed)`: `[m, k]`, `[n, k]`, float64 scalar, int64 scalar, on x's device.

    Raises:
        InvalidArgumentError: shapes or devices do not fit, or an input requires a gradient (the op has none).
        InvalidTypeError: a dtype is not supported, or x's does not fit the weights'.
        BackendError: `backend` cannot serve this op here.

    Example:
        >>> import torch
        >>> w0 = torch.zeros(3, 2)
        >>> w1 = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> sketch = delta_sketch(w0, w1, torch.eye(2))
        >>> sketch.z.tolist(), sketch.frobenius_sq.item(), sketch.changed.item()
        ([[1.0, 0.0], [0.0, 4.0]], 5.0, 2)
    """
    _check(w0, w1, x)
    if torch.is_grad_enabled() and (w0.requires_grad or w1.requires_grad or x.requires_grad):
        raise InvalidArgumentError(
            "delta_sketch has no gradient; pass detached tensors or call it under torch.no_grad()"
        )
    return DeltaSketch(*OP.resolve(backend, w0.device)(w0, w1, x))
