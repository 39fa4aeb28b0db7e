"""`cosine_monitor`: cosines of tokens to directions, reduced per segment (request) and compared with ranges.

    c[l, n, k] = <x[l, n], d[l, k]> / |x[l, n]|        (0 where x[l, n] is zero)

and for every token n with a segment s = tokens[SEGMENT, n] >= 0, in block l:

    extremes[l, s, 0, k] <- min(extremes[l, s, 0, k], c[l, n, k])
    extremes[l, s, 1, k] <- max(extremes[l, s, 1, k], c[l, n, k])
    counts[l, s, 0]      += 1 if the token is not finite; it then enters no extreme
    counts[l, s, 1]      <- min(counts[l, s, 1], tokens[POSITION, n]) if the token offends

A token offends when it is not finite, or when r = tokens[RANGE, n] >= 0 and some cosine is not within `[ranges[l, r, 0,
k], ranges[l, r, 1, k]]`: a cosine that is NaN (its direction is) then offends, as does any against a range that is NaN.
A cosine that is NaN enters no extreme. Not finite means that |x|^2 is not finite in float32: NaN, infinity, or |x|
above 1.8e19. A token is zero where |x|^2 is below the smallest normal float32 (|x| below 1.1e-19).

Shapes and dtypes: x `[N, D]`, or `[M, N, D]` for the M blocks from `layer` on in one launch (the step buffer of
decode), float16, bfloat16, float32 or float64, any strides; directions `[L, K, D]` float32 unit rows; tokens `[3, N]`
int32, any strides; ranges `[L, R, 2, K]` float32; extremes `[L, S, 2, K]` float32 and counts `[L, S, 2]` int32, updated
in place. The state's tensors are contiguous. Sums in float32. A segment >= S and a range row >= R are skipped like
negative ones; `pack_tokens` refuses them with a message. Minimum and maximum do not depend on order, so results repeat
bit for bit.

Floor: N*D and K*D read once per block, 2 N K D flops; at decode (N small) reading the directions dominates.

Source of the method: Watch the Weights (arXiv 2508.00161).
"""

from __future__ import annotations

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops._library import Op
from bkdfast.ops.monitor_state import NONE, POSITION, RANGE, SEGMENT, MonitorState

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(x, directions, tokens, ranges, extremes, counts, layer) -> None:
    """Refuse what does not fit; also used by `norm_tap`."""
    blocks = x.shape[0] if x.dim() == 3 else 1
    if x.dim() not in (2, 3) or directions.dim() != 3 or x.shape[-1] != directions.shape[2]:
        raise InvalidArgumentError(
            f"x must be [N, D] or [M, N, D] and directions [L, K, D], "
            f"got {tuple(x.shape)} and {tuple(directions.shape)}"
        )
    layers, count, _ = directions.shape
    if not 0 <= layer <= layers - blocks:
        raise InvalidArgumentError(f"blocks {layer} to {layer + blocks - 1} of x, but the directions have {layers}")
    if tuple(tokens.shape) != (3, x.shape[-2]) or tokens.dtype != torch.int32:
        raise InvalidArgumentError(f"tokens must be [3, {x.shape[-2]}] int32, got {tuple(tokens.shape)} {tokens.dtype}")
    segments = counts.shape[1] if counts.dim() == 3 else -1
    if tuple(counts.shape) != (layers, segments, 2) or tuple(extremes.shape) != (layers, segments, 2, count):
        raise InvalidArgumentError(
            f"extremes must be [{layers}, S, 2, {count}] and counts [{layers}, S, 2], "
            f"got {tuple(extremes.shape)} and {tuple(counts.shape)}"
        )
    if ranges.dim() != 4 or (ranges.shape[0], *ranges.shape[2:]) != (layers, 2, count):
        raise InvalidArgumentError(f"ranges must be [{layers}, R, 2, {count}], got {tuple(ranges.shape)}")
    if x.dtype not in _DTYPES:
        raise InvalidTypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    for name, tensor in (("directions", directions), ("ranges", ranges), ("extremes", extremes)):
        if tensor.dtype != torch.float32:
            raise InvalidTypeError(f"{name} must be float32, got {tensor.dtype}")
    if counts.dtype != torch.int32:
        raise InvalidTypeError(f"counts must be int32, got {counts.dtype}")
    state = (("directions", directions), ("ranges", ranges), ("extremes", extremes), ("counts", counts))
    for name, tensor in state:
        if not tensor.is_contiguous():
            raise InvalidArgumentError(f"{name} must be contiguous, its strides are {tensor.stride()}")
    for name, tensor in (*state, ("tokens", tokens)):
        if tensor.device != x.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device} but x is on {x.device}; move it there")


def _reference(x, directions, tokens, ranges, extremes, counts, layer) -> None:
    check(x, directions, tokens, ranges, extremes, counts, layer)
    x = (x if x.dim() == 3 else x[None]).float()  # [M, N, D]
    blocks = slice(layer, layer + len(x))
    segments, rows = counts.shape[1], ranges.shape[1]
    if segments == 0:
        return
    square = x.square().sum(2)  # [M, N]
    zero, finite = square < torch.finfo(torch.float32).tiny, square.isfinite()
    with torch.autocast(x.device.type, enabled=False):
        cosine = x @ directions[blocks].mT / square.sqrt()[:, :, None]  # [M, N, K]
    cosine = cosine.masked_fill(zero[:, :, None], 0)

    segment, row, position = tokens[SEGMENT], tokens[RANGE], tokens[POSITION]
    observed = (segment >= 0) & (segment < segments)
    slot = segment.where(observed, 0).long()
    every = slot[None, :, None].expand_as(cosine)
    enters = (observed & finite)[:, :, None] & ~cosine.isnan()
    extremes[blocks, :, 0].scatter_reduce_(1, every, cosine.where(enters, torch.inf), "amin")
    extremes[blocks, :, 1].scatter_reduce_(1, every, cosine.where(enters, -torch.inf), "amax")

    offends = ~finite
    if rows:
        low, high = ranges[blocks, row.clamp(0, rows - 1).long()].unbind(2)  # [M, N, K]
        offends |= ~((cosine >= low) & (cosine <= high)).all(2) & (row >= 0) & (row < rows)
    counts[blocks, :, 0].scatter_add_(1, slot.expand(len(x), -1), (observed & ~finite).int())
    where = position.expand_as(offends).where(observed & offends, NONE)
    counts[blocks, :, 1].scatter_reduce_(1, slot.expand(len(x), -1), where, "amin")


OP = Op(
    "cosine_monitor(Tensor x, Tensor directions, Tensor tokens, Tensor ranges, "
    "Tensor(a!) extremes, Tensor(b!) counts, int layer) -> ()",
    check=check,
    reference=_reference,
    triton="cosine_monitor",
)


def cosine_monitor(
    x: torch.Tensor, state: MonitorState, tokens: torch.Tensor, *, layer: int = 0, backend: str | None = None
) -> None:
    """Update the accumulators of `state` with tokens of one block or of several; see the module's docstring.

    Args:
        x: `[N, D]` residual stream of N tokens after block `layer`, or `[M, N, D]` after blocks `layer`, ...,
            `layer + M - 1`.
        state: directions, ranges and accumulators; `MonitorState.create` makes and checks one.
        tokens: `[3, N]` int32, segment, range row and position of each token; `pack_tokens` makes and checks one.
        layer: index of x's (first) block in the state.
        backend: `"cpp"`, `"cuda"`, `"triton"` or `"reference"`; None: the fastest that is there.

    Raises:
        InvalidArgumentError: shapes, strides or devices do not fit.
        InvalidTypeError: dtypes do not fit.
        BackendError: the backend cannot serve here.

    Example:
        >>> import torch
        >>> state = MonitorState.create(torch.eye(2), segments=1, ranges=torch.tensor([[[[-1.0, -1], [1, 0.7]]]]))
        >>> cosine_monitor(torch.tensor([[3.0, 4.0]]), state, torch.tensor([[0], [0], [5]]).int())
        >>> state.high, state.first
        (tensor([[[0.6000, 0.8000]]]), tensor([[5]], dtype=torch.int32))
    """
    arguments = (x.detach(), state.directions, tokens, state.ranges, state.extremes, state.counts, layer)
    try:
        OP.resolve(backend, x.device)(*arguments)
    except RuntimeError:
        check(*arguments)  # what a compiled kernel refuses, in our exceptions
        raise
