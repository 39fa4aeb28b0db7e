"""`cosine_monitor`: cosines of tokens to directions, reduced to the minimum and maximum of each request segment.

    c[n, k] = <x[n], d[k]> / |x[n]|          (0 where x[n] is zero)
    low[s, k]  <- min(low[s, k],  c[n, k])   over tokens n with segment[n] = s
    high[s, k] <- max(high[s, k], c[n, k])   likewise
    nonfinite[s] += 1                        for every token of s with a NaN or infinity, which enters no extreme

Shapes and dtypes: x `[N, D]` floating point; directions `[K, D]` float32 unit rows (a row of zeros gives 0); segment
`[N]` int32, negative for tokens that are not observed (padding, other rows of a captured graph); low, high `[S, K]`
float32 and nonfinite `[S]` int32, updated in place. Accumulation in float32. Nothing synchronises with the host.

Floor: N*D and K*D read once; at decode (N small) the directions dominate.

The reference serves every device so far. Source of the method: Watch the Weights (arXiv 2508.00161).
"""

from __future__ import annotations

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops._library import Op


def _check(x, directions, segment, low, high, nonfinite) -> None:
    if x.dim() != 2 or directions.dim() != 2 or x.shape[1] != directions.shape[1]:
        raise InvalidArgumentError(
            f"x must be [N, D] and directions [K, D], got {tuple(x.shape)} and {tuple(directions.shape)}"
        )
    if not x.is_floating_point() or directions.dtype != torch.float32:
        raise InvalidTypeError(f"x must be floating point and directions float32, got {x.dtype} and {directions.dtype}")
    if segment.shape != x.shape[:1] or segment.dtype != torch.int32:
        raise InvalidArgumentError(f"segment must be [{len(x)}] int32, got {tuple(segment.shape)} {segment.dtype}")
    slots = nonfinite.shape[0] if nonfinite.dim() == 1 else -1
    wanted = (slots, directions.shape[0])
    if tuple(low.shape) != wanted or tuple(high.shape) != wanted or nonfinite.dtype != torch.int32:
        raise InvalidArgumentError(
            f"low and high must be [S, {directions.shape[0]}] and nonfinite [S] int32, "
            f"got {tuple(low.shape)}, {tuple(high.shape)}, {tuple(nonfinite.shape)} {nonfinite.dtype}"
        )
    if low.dtype != torch.float32 or high.dtype != torch.float32:
        raise InvalidTypeError(f"low and high must be float32, got {low.dtype} and {high.dtype}")


def _fake(x, directions, segment, low, high, nonfinite) -> None:
    _check(x, directions, segment, low, high, nonfinite)


def _reference(x, directions, segment, low, high, nonfinite) -> None:
    _check(x, directions, segment, low, high, nonfinite)
    x = x.float()
    finite = torch.isfinite(x).all(1)
    observed = segment >= 0
    # The norm of x / max|x| neither overflows nor underflows; the cosine does not depend on the scale.
    scale = x.abs().amax(1, keepdim=True)
    unit = x / scale.where(scale > 0, 1)
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        cosine = (unit @ directions.T) / norm.where(norm > 0, 1)
    counts = (observed & finite)[:, None]
    slot = segment.clamp(min=0).long()
    every = slot[:, None].expand_as(cosine)
    low.scatter_reduce_(0, every, cosine.where(counts, torch.inf), "amin")
    high.scatter_reduce_(0, every, cosine.where(counts, -torch.inf), "amax")
    nonfinite.scatter_add_(0, slot, (observed & ~finite).int())


_op = Op(
    "cosine_monitor(Tensor x, Tensor directions, Tensor segment, "
    "Tensor(a!) low, Tensor(b!) high, Tensor(c!) nonfinite) -> ()",
    fake=_fake,
    reference=_reference,
)


def cosine_monitor(
    x: torch.Tensor,
    directions: torch.Tensor,
    segment: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    nonfinite: torch.Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Update the extremes of each request's cosines with the tokens `x`; see the module's docstring.

    Args:
        x: `[N, D]` residual stream of N tokens.
        directions: `[K, D]` float32 unit rows.
        segment: `[N]` int32 slot of each token's request, negative for tokens that are not observed.
        low: `[S, K]` float32, start at +inf.
        high: `[S, K]` float32, start at -inf.
        nonfinite: `[S]` int32, start at 0.
        backend: `"reference"`; None: the fastest that is there.

    Raises:
        InvalidArgumentError: shapes do not fit.
        InvalidTypeError: dtypes do not fit.
        BackendError: the backend cannot serve here.

    Example:
        >>> import torch
        >>> low, high = torch.full((1, 2), torch.inf), torch.full((1, 2), -torch.inf)
        >>> x, segment = torch.tensor([[3.0, 4.0]]), torch.zeros(1, dtype=torch.int32)
        >>> cosine_monitor(x, torch.eye(2), segment, low, high, torch.zeros(1, dtype=torch.int32))
        >>> high
        tensor([[0.6000, 0.8000]])
    """
    _op.resolve(backend)(x.detach(), directions, segment, low, high, nonfinite)
