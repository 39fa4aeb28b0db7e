"""`delta_sketch` against the same two products in plain PyTorch. Floor: both matrices read once, 4 m n k flops.

Ours also counts the changed entries and sums the squares of the delta; the plain versions do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case, backends, compiled
from bkdfast.ops.delta_sketch import OP, delta_sketch


def cases(device: torch.device) -> Iterator[Case]:
    """Llama-2-7B's o_proj and down_proj, at the widths that k = 8 and k = 20 singular vectors need."""
    for m, n, k, dtype in (
        (4096, 4096, 16, torch.bfloat16),
        (4096, 4096, 32, torch.bfloat16),
        (4096, 11008, 16, torch.bfloat16),
        (4096, 4096, 16, torch.float32),
    ):
        yield _case(m, n, k, dtype, device, goal=2.4 if (n, k, dtype) == (4096, 16, torch.bfloat16) else None)


def _case(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, goal: float | None) -> Case:
    torch.manual_seed(0)
    base = torch.randn(m, n, device=device)
    w0, w1 = base.to(dtype), (base + 0.01 * torch.randn(m, n, device=device)).to(dtype)
    x = torch.randn(n, k, device=device)

    def ours(backend):
        return lambda: delta_sketch(w0, w1, x, backend=backend)[:2]

    def panels(rows):
        def chunked():
            y, z = x.new_empty(m, k), x.new_zeros(n, k)
            for start in range(0, m, rows):
                delta = (w1[start : start + rows] - w0[start : start + rows]).float()
                y[start : start + rows] = delta @ x
                z.addmm_(delta.T, y[start : start + rows])
            return y, z

        return chunked

    def whole():
        delta = (w1 - w0).float()
        y = delta @ x
        return y, delta.T @ y

    rows = (32, 128) if device.type == "cpu" else (1024,)
    plain = {f"panels of {count} rows": panels(count) for count in rows}
    plain |= {"whole delta": whole, "whole delta, compiled": compiled(whole)}

    scale = [tensor.norm() / tensor.numel() ** 0.5 for tensor in whole()]

    def outputs(version):
        return tuple(tensor / size for tensor, size in zip(version(), scale, strict=True))

    return Case(
        "delta_sketch",
        f"{m}x{n} {str(dtype)[6:]}, k={k}",
        {backend: ours(backend) for backend in backends(OP, device)},
        plain,
        outputs,
        # The plain versions round the delta to the weights' dtype; ours takes it in float32.
        tolerance=(1e-3 if dtype == torch.float32 else 0.05, 0.0),
        bytes=2.0 * m * n * dtype.itemsize,
        flops=4.0 * m * n * k,
        goal=goal,
    )
