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
    """The norm alone, with a row of the step buffer (decode), and with the monitor in the same pass (prefill)."""
    for dtype in (torch.float32, torch.bfloat16):
        for count in (512,) if device.type == "cpu" else (512, 8192):
            yield from _cases(count, dtype, device)
        for count in (4, 64):
            yield _decode(count, dtype, device)


def _module(dtype: torch.dtype, device: torch.device) -> tuple[LlamaRMSNorm, tuple[float, float]]:
    """A norm, and how near its versions come: compiled, it rounds once where it rounds twice."""
    module = LlamaRMSNorm(WIDTH, eps=EPS).to(device, dtype)
    module.weight.data.normal_()
    return module.requires_grad_(False), (1e-5, 2.0**-6 if dtype == torch.bfloat16 else 1e-5)


@torch.no_grad()
def _decode(count: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    x = torch.randn(count, WIDTH, device=device).to(dtype)
    module, tolerance = _module(dtype, device)
    step = torch.zeros(2, 64, WIDTH, device=device, dtype=dtype)

    def ours(backend):
        return lambda: norm_tap(x, module.weight, eps=EPS, kind=RMS, step=step, layer=1, backend=backend)

    def plain(norm):
        def copy_and_norm():
            step[1, :count] = x
            return norm()

        return copy_and_norm

    def outputs(version):
        step.zero_()
        return version().float(), step.float()

    module_and_copy = plain(lambda: module(x))
    return Case(
        "norm_tap",
        f"N={count}, D={WIDTH} {str(dtype)[6:]}, with a step buffer",
        {backend: ours(backend) for backend in backends(TAP, device)},
        {
            "LlamaRMSNorm": module_and_copy,
            "F.rms_norm": plain(lambda: torch.nn.functional.rms_norm(x, (WIDTH,), module.weight, EPS)),
            "LlamaRMSNorm, compiled": compiled(module_and_copy),
        },
        outputs,
        tolerance,
        bytes=3.0 * count * WIDTH * dtype.itemsize,
        rival="LlamaRMSNorm",
    )


@torch.no_grad()
def _cases(count: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    torch.manual_seed(0)
    x = torch.randn(count, WIDTH, device=device).to(dtype)
    module, tolerance = _module(dtype, device)
    state = state_of(1, WIDTH, DIRECTIONS, REQUESTS, device)
    segment = torch.arange(count, device=device) * REQUESTS // count
    tokens = pack_tokens(segment, segments=REQUESTS, range_row=0, range_rows=1)
    name = f"N={count}, D={WIDTH} {str(dtype)[6:]}"
    moved = 2.0 * count * WIDTH * dtype.itemsize

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
        {
            "LlamaRMSNorm": stock,
            "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (WIDTH,), module.weight, EPS),
            "LlamaRMSNorm, compiled": compiled(stock),
        },
        outputs,
        tolerance,
        bytes=moved,
        goal=2.0,
        rival="LlamaRMSNorm",
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
        [tolerance, (2e-6, 0.0), (0.0, 0.0)],
        bytes=moved + 4.0 * DIRECTIONS * WIDTH,
        flops=2.0 * count * DIRECTIONS * WIDTH,
        goal=3.0,
        rival="LlamaRMSNorm + monitor",
    )
