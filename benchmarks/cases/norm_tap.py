"""`norm_tap` against the model's own module (HuggingFace's eager RMSNorm). Floor: x read, y written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.case import Case, backends, compiled
from benchmarks.cases.cosine_monitor import plain_monitor, state_of
from bkdfast.ops.monitor_state import pack_tokens
from bkdfast.ops.norm_tap import MONITOR, RMS, TAP, norm_monitor, norm_tap

WIDTH, DIRECTIONS, REQUESTS, EPS = 4096, 40, 16, 1e-6


def cases(device: torch.device) -> Iterator[Case]:
    """The norm alone, and the norm with the monitor in the same pass."""
    for dtype in (torch.float32, torch.bfloat16):
        for count in (512,) if device.type == "cpu" else (512, 8192):
            yield from _cases(count, dtype, device)


@torch.no_grad()
def _cases(count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    x = torch.randn(count, WIDTH, device=device).to(dtype)
    module = LlamaRMSNorm(WIDTH, eps=EPS).to(device, dtype)
    module.weight.data.normal_()
    module.requires_grad_(False)
    state = state_of(1, WIDTH, DIRECTIONS, REQUESTS, device)
    segment = torch.arange(count, device=device) * REQUESTS // count
    tokens = pack_tokens(segment, segments=REQUESTS, range_row=0, range_rows=1)
    name = f"N={count}, D={WIDTH} {str(dtype)[6:]}"
    moved = 2.0 * count * WIDTH * dtype.itemsize
    # Compiled, the module rounds once where it rounds twice: up to two units in the last place.
    tolerance = (1e-5, 2.0**-6 if dtype == torch.bfloat16 else 1e-5)

    def alone(backend):
        return lambda: norm_tap(x, module.weight, eps=EPS, kind=RMS, backend=backend)

    def both(backend):
        return lambda: norm_monitor(x, module.weight, None, state, tokens, eps=EPS, kind=RMS, backend=backend)

    def stock():
        return module(x)

    def stock_and_monitor():
        plain_monitor(x, state, segment, 0)
        return module(x)

    def outputs(version):
        return (version().float(),)

    def outputs_and_state(version):
        state.reset()
        y = version()
        return y.float(), state.extremes, state.first.float() / count

    yield Case(
        "norm_tap",
        name,
        {backend: alone(backend) for backend in backends(TAP, device)},
        {"LlamaRMSNorm": stock, "LlamaRMSNorm, compiled": compiled(stock)},
        outputs,
        tolerance,
        bytes=moved,
        goal=2.0,
    )
    yield Case(
        "norm_monitor",
        f"{name}, K={DIRECTIONS}",
        {backend: both(backend) for backend in backends(MONITOR, device)},
        {
            "LlamaRMSNorm + monitor": stock_and_monitor,
            "LlamaRMSNorm + monitor, compiled": compiled(stock_and_monitor),
        },
        outputs_and_state,
        tolerance,
        bytes=moved + 4.0 * DIRECTIONS * WIDTH,
        flops=2.0 * count * DIRECTIONS * WIDTH,
        goal=3.0,
    )
