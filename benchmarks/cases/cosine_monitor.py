"""`cosine_monitor` against a matrix product, a norm and scatter reductions. Floor: N D and K D read, 2 N K D flops."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case, backends, compiled, unit
from bkdfast.ops.cosine_monitor import OP, cosine_monitor
from bkdfast.ops.monitor_state import MonitorState, pack_tokens


def cases(device: torch.device) -> Iterator[Case]:
    """A prefill of 16 requests in one block, and a decode step of 4 requests in 32 blocks at once."""
    for dtype in (torch.float32, torch.bfloat16):
        yield case(1, 512, 4096, 40, 16, dtype, device, goal=3.0)
        yield case(32, 4, 4096, 40, 4, dtype, device, goal=5.0)
    if device.type == "cuda":
        for dtype in (torch.float32, torch.bfloat16):
            yield case(1, 8192, 4096, 40, 16, dtype, device, goal=3.0)


def state_of(layers: int, width: int, count: int, segments: int, device: torch.device) -> MonitorState:
    """A state with one row of ranges that a random token leaves now and then."""
    limit = 3.0 / width**0.5
    ranges = torch.tensor([-limit, limit], device=device)[:, None].expand(layers, 1, 2, count).contiguous()
    return MonitorState.create(unit(layers, count, width, device=device), segments, ranges)


def plain_monitor(x: torch.Tensor, state: MonitorState, slot: torch.Tensor, layer: int) -> None:
    """What one writes without the kernel, for tokens that are all finite and observed: extremes and ranges."""
    wide = x.float()
    cosine = (wide @ state.directions[layer].T) / torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    index = slot[:, None].expand_as(cosine)
    state.low[layer].scatter_reduce_(0, index, cosine, "amin")
    state.high[layer].scatter_reduce_(0, index, cosine, "amax")
    low, high = state.ranges[layer, 0]
    outside = ((cosine < low) | (cosine > high)).any(1)
    position = torch.arange(len(x), dtype=torch.int32, device=x.device).where(outside, 2**31 - 1)
    state.first[layer].scatter_reduce_(0, slot, position, "amin")


def plain_batched(x: torch.Tensor, state: MonitorState, slot: torch.Tensor) -> None:
    """The same for all blocks at once, from a step buffer."""
    wide = x.float()
    cosine = torch.bmm(wide, state.directions.mT) / torch.linalg.vector_norm(wide, dim=2, keepdim=True)
    index = slot[None, :, None].expand_as(cosine)
    state.low.scatter_reduce_(1, index, cosine, "amin")
    state.high.scatter_reduce_(1, index, cosine, "amax")
    low, high = state.ranges[:, 0, None].unbind(2)
    outside = ((cosine < low) | (cosine > high)).any(2)
    position = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).where(outside, 2**31 - 1)
    state.first.scatter_reduce_(1, slot.expand(len(x), -1), position, "amin")


def case(
    layers: int,
    count: int,
    width: int,
    directions: int,
    requests: int,
    dtype: torch.dtype,
    device: torch.device,
    goal: float | None,
) -> Case:
    """`count` tokens of `requests` requests in each of `layers` blocks."""
    torch.manual_seed(0)
    x = torch.randn(layers, count, width, device=device).to(dtype)
    state = state_of(layers, width, directions, requests, device)
    segment = torch.arange(count, device=device) * requests // count
    tokens = pack_tokens(segment, segments=requests, range_row=0, range_rows=1)

    def ours(backend):
        return lambda: cosine_monitor(x, state, tokens, backend=backend)

    def by_block():
        for layer in range(layers):
            plain_monitor(x[layer], state, segment, layer)

    def batched():
        plain_batched(x, state, segment)

    def outputs(version):
        state.reset()
        version()
        return state.extremes, state.first.float() / count

    plain = {"block by block": by_block, "block by block, compiled": compiled(by_block)}
    if layers > 1:
        plain |= {"bmm over blocks": batched, "bmm over blocks, compiled": compiled(batched)}
    name = f"{f'{layers} blocks, ' if layers > 1 else ''}N={count}, D={width}, K={directions} {str(dtype)[6:]}"
    return Case(
        "cosine_monitor",
        name,
        {backend: ours(backend) for backend in backends(OP, device)},
        plain,
        outputs,
        tolerance=(2e-6, 0.0),
        bytes=layers * width * (count * dtype.itemsize + directions * 4),
        flops=2.0 * layers * count * directions * width,
        goal=goal,
        rival="block by block",
    )
