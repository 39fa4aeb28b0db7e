"""`MonitorState`: what `cosine_monitor` and `norm_tap` compare tokens with, and what they accumulate; `pack_tokens`.

All of it lives in tensors of fixed shape, so that changing directions, ranges, requests or tokens never recompiles, and
a captured graph sees the change. Everything is checked here, when the tensors are made; the ops only check shapes.

A **segment** is what extremes are kept for: a request, or one role (prompt, generated) of a request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError

SEGMENT, RANGE, POSITION = range(3)
NONE = 2**31 - 1
"""In `counts[..., 1]`: no token of the segment has offended."""
UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class MonitorState:
    """Directions, ranges and accumulators of L blocks, S segments, K directions and R range rows.

    Attributes:
        directions: `[L, K, D]` float32, unit rows; a row of zeros is unused and gives the cosine 0.
        ranges: `[L, R, 2, K]` float32, lowest and highest cosine that does not offend.
        extremes: `[L, S, 2, K]` float32, lowest cosine so far (starts at +inf) and highest (-inf).
        counts: `[L, S, 2]` int32, number of non-finite tokens (starts at 0), and smallest position of a token that
            offended (starts at `NONE`).
    """

    directions: torch.Tensor
    ranges: torch.Tensor
    extremes: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def create(cls, directions: torch.Tensor, segments: int, ranges: torch.Tensor | None = None) -> MonitorState:
        """Check directions and ranges, and make empty accumulators on their device.

        Args:
            directions: `[L, K, D]` float32, or `[K, D]` for one block; rows of length 1 (within 1e-3) or 0.
            segments: number of segments S.
            ranges: `[L, R, 2, K]` float32; None: no ranges (R = 0).

        Raises:
            InvalidArgumentError: a shape does not fit, a direction is not finite or not of length 1, a range has NaN.
            InvalidTypeError: a dtype is not float32.
        """
        directions = directions[None] if directions.dim() == 2 else directions
        if directions.dim() != 3:
            raise InvalidArgumentError(f"directions must be [L, K, D] or [K, D], got {tuple(directions.shape)}")
        layers, count, _ = directions.shape
        if ranges is None:
            ranges = directions.new_empty(layers, 0, 2, count)
        for name, tensor in (("directions", directions), ("ranges", ranges)):
            if tensor.dtype != torch.float32:
                raise InvalidTypeError(f"{name} must be float32, got {tensor.dtype}")
        if ranges.dim() != 4 or (ranges.shape[0], *ranges.shape[2:]) != (layers, 2, count):
            raise InvalidArgumentError(f"ranges must be [{layers}, R, 2, {count}], got {tuple(ranges.shape)}")
        if ranges.device != directions.device:
            raise InvalidArgumentError(f"ranges are on {ranges.device}, directions on {directions.device}; move them")
        if segments < 0:
            raise InvalidArgumentError(f"segments={segments} is negative")
        length = torch.linalg.vector_norm(directions.double(), dim=2)  # [L, K]
        wrong = ~(((length - 1).abs() <= UNIT_TOLERANCE) | (length == 0))  # NaN is wrong
        if wrong.any():
            layer, index = wrong.nonzero()[0].tolist()
            raise InvalidArgumentError(
                f"direction {index} of block {layer} has length {length[layer, index]:.6g}, not 1 (within "
                f"{UNIT_TOLERANCE}) or 0; divide it by its norm"
            )
        if ranges.isnan().any():
            raise InvalidArgumentError("ranges have NaN; use -inf and inf for an open range")
        device = directions.device
        state = cls(
            directions.contiguous(),
            ranges.contiguous(),
            torch.empty(layers, segments, 2, count, device=device),
            torch.empty(layers, segments, 2, dtype=torch.int32, device=device),
        )
        state.reset()
        return state

    @property
    def low(self) -> torch.Tensor:
        """Lowest cosines `[L, S, K]`, a view."""
        return self.extremes[:, :, 0]

    @property
    def high(self) -> torch.Tensor:
        """Highest cosines `[L, S, K]`, a view."""
        return self.extremes[:, :, 1]

    @property
    def nonfinite(self) -> torch.Tensor:
        """Number of non-finite tokens `[L, S]`, a view."""
        return self.counts[:, :, 0]

    @property
    def first(self) -> torch.Tensor:
        """Smallest position of a token that offended `[L, S]`, `NONE` without one; a view."""
        return self.counts[:, :, 1]

    @property
    def flagged(self) -> torch.Tensor:
        """Segments with a token that offended `[L, S]`, bool."""
        return self.first != NONE

    def reset(self) -> None:
        """Empty all accumulators."""
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)
        self.nonfinite.zero_()
        self.first.fill_(NONE)


def pack_tokens(
    segment: torch.Tensor,
    *,
    segments: int,
    range_row: torch.Tensor | int = -1,
    range_rows: int = 0,
    position: torch.Tensor | None = None,
) -> torch.Tensor:
    """Check what is known of N tokens and pack it as the ops read it.

    Args:
        segment: `[N]` integers, segment of each token; negative: not observed (padding, warm-up rows).
        segments: number of segments S, for the range check.
        range_row: row of the ranges that judges each token, `[N]` or one for all; negative: not judged.
        range_rows: number of rows R, for the range check.
        position: `[N]` position of each token in its request; None: 0, 1, ..., N-1.

    Returns:
        `[3, N]` int32 on segment's device: segment, range row, position.

    Raises:
        InvalidArgumentError: a shape does not fit, or a segment, range row or position is out of range.
        InvalidTypeError: not integers.
    """
    if segment.dim() != 1:
        raise InvalidArgumentError(f"segment must be [N], got shape {tuple(segment.shape)}")
    rows = torch.as_tensor(range_row, device=segment.device)
    position = torch.arange(len(segment), device=segment.device) if position is None else position
    for name, tensor in (("segment", segment), ("range_row", rows), ("position", position)):
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise InvalidTypeError(f"{name} must be integers, got {tensor.dtype}")
    if rows.dim() and rows.shape != segment.shape or position.shape != segment.shape:
        raise InvalidArgumentError(
            f"range_row and position must be [{len(segment)}], got {tuple(rows.shape)} and {tuple(position.shape)}"
        )
    for name, tensor, count in (("segment", segment, segments), ("range_row", rows, range_rows)):
        if tensor.numel() and int(tensor.max()) >= count:
            raise InvalidArgumentError(f"{name} {int(tensor.max())} is out of range, there are {count}")
    if position.numel() and not 0 <= int(position.min()) <= int(position.max()) < NONE:
        raise InvalidArgumentError(f"position must be in [0, 2**31 - 1), found {position.aminmax()}")
    return torch.stack([segment.clamp(min=-1).int(), rows.clamp(min=-1).int().expand(len(segment)), position.int()])
