"""What one call of an op costs through its public Python function, on tensors so small that nothing else counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

import bkdfast as bf
from bkdfast.ops.cosine_monitor import cosine_monitor
from bkdfast.ops.delta_sketch import delta_sketch
from bkdfast.ops.monitor_state import MonitorState, pack_tokens
from bkdfast.ops.norm_tap import RMS, norm_monitor, norm_tap
from bkdfast.ops.prefix_attention import prefix_attention

_CALLS, _ROUNDS = 2000, 15
_GPU_CALLS = 150  # what a GPU's queue holds; with more, the host waits for the kernels


def overheads(device: torch.device) -> dict[str, float]:
    """Microseconds a call, the median over rounds; on a GPU the time to issue it."""
    return {name: _microseconds(call, device) for name, call in _calls(device).items()}


def _calls(device: torch.device) -> dict[str, Callable[[], object]]:
    x, weight = torch.randn(1, 8, device=device), torch.ones(8, device=device)
    state = MonitorState.create(torch.eye(8, device=device)[:2].contiguous(), segments=1)
    tokens = pack_tokens(torch.zeros(1, dtype=torch.int64, device=device), segments=1)
    step = torch.zeros(1, 1, 8, device=device)
    z, source = torch.randn(1, 1, 8, device=device), torch.zeros(1, 4, device=device)
    edit = bf.EditTable.pack([[0, 0, 0, 1, 0, 0, 0]], [[0.0, 1.0]], source, slices=2)
    offset = torch.zeros(1, 1, dtype=torch.int32, device=device)
    head, seen = torch.randn(1, 1, 1, 8, device=device), torch.ones(1, 1, 2, dtype=torch.bool, device=device)
    w0, w1, block = (torch.randn(8, 8, device=device) for _ in range(3))
    return {
        "patch_heads": lambda: bf.patch_heads(z, edit, offset),
        "cosine_monitor": lambda: cosine_monitor(x, state, tokens),
        "norm_tap": lambda: norm_tap(x, weight, eps=1e-6, kind=RMS, step=step),
        "norm_monitor": lambda: norm_monitor(x, weight, None, state, tokens, eps=1e-6, kind=RMS),
        "delta_sketch": lambda: delta_sketch(w0, w1, block),
        "prefix_attention": lambda: prefix_attention(head, head, head, head, head, seen, scale=1.0),
    }


def _microseconds(call: Callable[[], object], device: torch.device) -> float:
    times, gpu = [], device.type == "cuda"
    calls = _GPU_CALLS if gpu else _CALLS
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
        if gpu:
            torch.cuda.synchronize()
    return statistics.median(times)
