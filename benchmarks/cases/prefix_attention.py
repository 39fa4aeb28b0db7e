"""`prefix_attention` against attention over a copied prefix. Floor: the flops of seen keys; everything moved once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.case import Case, backends, compiled
from bkdfast.ops.prefix_attention import OP, prefix_attention


def cases(device: torch.device) -> Iterator[Case]:
    """Suffixes of an edit at the last prompt token and 8 target tokens; then suffixes as long as the prompt."""
    for dtype in (torch.float32, torch.bfloat16):
        if device.type == "cuda":  # Llama-2-7B and Llama-3-8B
            yield case(32, 96, 32, 32, 8, 256, 128, dtype, device)
            yield case(32, 96, 32, 8, 8, 256, 128, dtype, device)
            yield case(8, 16, 32, 32, 256, 0, 128, dtype, device)
        else:
            yield case(64, 4, 8, 8, 9, 120, 64, dtype, device)
            yield case(8, 4, 8, 8, 9, 120, 64, dtype, device)
            yield case(64, 4, 8, 8, 9, 504, 64, dtype, device)
            yield case(64, 4, 8, 2, 9, 504, 64, dtype, device)
            yield case(8, 4, 8, 8, 128, 0, 64, dtype, device)
            yield case(8, 4, 8, 8, 64, 64, 64, dtype, device)


def case(
    variants: int,
    batch: int,
    heads: int,
    shared: int,
    length: int,
    past: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Case:
    """V variants of B rows: S tokens after P, H query heads on Hkv key-value heads."""
    torch.manual_seed(0)
    torch.compiler.reset()  # each size is a graph of its own, and there may be eight of one function

    def draw(*size):
        return torch.randn(*size, width, device=device).to(dtype)

    rows, scale = variants * batch, width**-0.5
    # As a model's projections leave them: heads inside.
    q, k, v = (draw(rows, length, count).transpose(1, 2) for count in (heads, shared, shared))
    prefix_k, prefix_v = draw(batch, shared, past), draw(batch, shared, past)
    mask = torch.ones(length, past + length, dtype=torch.bool, device=device).tril(past).expand(batch, -1, -1)
    rows_mask = mask.repeat(variants, 1, 1)[:, None]

    def ours(backend):
        return lambda: prefix_attention(q, k, v, prefix_k, prefix_v, mask, scale=scale, backend=backend)

    def joined(prefix, own):
        prefix = prefix.expand(variants, -1, -1, -1, -1)
        return torch.cat([prefix, own.unflatten(0, (variants, batch))], 3).flatten(0, 1)

    def attend(keys, values):
        out = torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, rows_mask, scale=scale, enable_gqa=heads != shared
        )
        return out.transpose(1, 2).contiguous()

    def copied():
        return attend(joined(prefix_k, k), joined(prefix_v, v))

    ready = joined(prefix_k, k), joined(prefix_v, v)

    def einsums():
        queries = q.unflatten(1, (shared, -1)).unflatten(0, (variants, batch))  # [V, B, Hkv, G, S, Dh]
        own_k, own_v = (x.unflatten(0, (variants, batch)) for x in (k, v))
        logits = torch.cat(
            [
                torch.einsum("vbngsd,bnpd->vbngsp", queries, prefix_k),
                torch.einsum("vbngsd,vbntd->vbngst", queries, own_k),
            ],
            -1,
        )
        weights = (logits.float() * scale).masked_fill(~mask[:, None, None], -torch.inf).softmax(-1).to(dtype)
        out = torch.einsum("vbngsp,bnpd->vbsngd", weights[..., :past], prefix_v)
        out = out + torch.einsum("vbngst,vbntd->vbsngd", weights[..., past:], own_v)
        return out.flatten(0, 1).flatten(2, 3)

    name = f"V={variants}, B={batch}, H={heads}, Hkv={shared}, S={length}, P={past}, Dh={width} {str(dtype)[6:]}"
    moved = 2 * rows * (heads + shared) * length + 2 * batch * shared * past
    return Case(
        "prefix_attention",
        name,
        {backend: ours(backend) for backend in backends(OP, device)},
        {
            "copied prefix": copied,
            "prefix copied beforehand": lambda: attend(*ready),
            "einsum": einsums,
            "einsum, compiled": compiled(einsums),
        },
        lambda version: (version().float(),),
        tolerance=(2e-5, 1e-5) if dtype == torch.float32 else (0.03, 0.02),
        bytes=float(moved * width * dtype.itemsize),
        flops=4.0 * variants * heads * width * int(mask.sum()),
        rival="copied prefix",
    )
