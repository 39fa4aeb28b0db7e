"""Re-check random cells of a sweep the slow way: a plain hook that clones and assigns, and a full forward.

Shares nothing with the engine but the model and the metric: positions and sources are read off the edit by plain
indexing, no block is skipped, all logits are computed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from bkdfast.errors import VerificationError
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.prepare import Prepared
from bkdfast.hf.spec import submodule
from bkdfast.sweep.metrics import Metric, Scored

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest plausible difference of two exact ways to compute a metric, relative to its size (here and on average)."""


def check_cells(
    model: torch.nn.Module,
    state: Prepared,
    template: Edit,
    metric: Metric,
    jobs: Sequence[tuple[torch.Tensor, Scored]],
    wanted: Sequence[tuple[int, int]],
    effects: torch.Tensor,
    baseline: torch.Tensor,
    count: int,
) -> float:
    """Compute `count` random (batch, head) cells again; returns the largest relative difference.

    `jobs` has, for each batch, the prompt's attention mask `[B, T]` and the metric's inputs; the other arguments are
    the sweep's.

    Raises:
        VerificationError: a cell differs by more than rounding.
    """
    draw = random.Random(0)
    starts = [0]
    for mask, _ in jobs:
        starts.append(starts[-1] + len(mask))
    worst = 0.0
    for _ in range(count):
        number, (layer, head) = draw.randrange(len(jobs)), draw.choice(wanted)
        rows = slice(starts[number], starts[number + 1])
        again = plain_cell(model, state, template, layer, head, metric, *jobs[number]).cpu()
        engine = effects[layer, head, rows] + baseline[rows]
        error = ((again - engine).abs() / (baseline.abs().mean() + again.abs()).clamp(min=1e-30)).max().item()
        worst = max(worst, error)
        if not error <= TOLERANCE[state.dtype]:
            raise VerificationError(
                f"layer {layer}, head {head}, batch {number}: the engine says {engine.tolist()}, a plain hook says "
                f"{again.tolist()} ({metric.name}); the model's structure is not what was assumed; please report the "
                f"model type ({state.spec.family!r})"
            )
    return worst


def plain_cell(
    model: torch.nn.Module,
    state: Prepared,
    edit: Edit,
    layer: int,
    head: int,
    metric: Metric,
    mask: torch.Tensor,
    scored: Scored,
) -> torch.Tensor:
    """The metric `[B]` of one edited head, by a plain hook."""
    block = state.spec.blocks[layer]
    begin, end = (x.tolist() for x in prompt_ends({"input_ids": mask, "attention_mask": mask}))
    own = slice(head * block.head_dim, (head + 1) * block.head_dim)

    def hook(module: torch.nn.Module, args: tuple):
        z = args[0].clone()
        for row in range(len(mask)):
            columns = _columns(edit.at, begin[row], end[row], z.shape[1], row)
            if edit.source is not None and edit.source.dim() == 5:  # one entry a token, for as many as there are
                columns = columns[: edit.source.shape[1]]
            for i, column in enumerate(columns):
                new = edit.a * z[row, column, own]
                if edit.source is not None:
                    new = new + edit.b * _source(edit.source, row, i, layer, head).to(z)
                z[row, column, own] = new
        return (z, *args[1:])

    handle = submodule(model, block.out_proj).register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            logits = model(**scored.batch)[0]
    finally:
        handle.remove()
    rows = torch.arange(len(mask), device=logits.device)[:, None]
    return metric.score(logits[rows, scored.read], scored)


def _columns(at: At, begin: int, end: int, width: int, row: int) -> list[int]:
    prompt = list(range(begin, end + 1))
    later = list(range(end + 1, width))
    if isinstance(at, str):
        return {
            "all": list(range(width)),
            "last_prompt": prompt[-1:],
            "prompt": list(range(end + 1)),
            "generated": later,
        }[at]
    if isinstance(at, int):
        return [(prompt + later)[at]] if at >= 0 else [prompt[at]]
    if isinstance(at, slice):
        negative = any(bound is not None and bound < 0 for bound in (at.start, at.stop))
        return prompt[at] if negative else (prompt + later)[at]
    return [(prompt + later)[int(at[row])]]


def _source(source: torch.Tensor, row: int, token: int, layer: int, head: int) -> torch.Tensor:
    if source.dim() < 3:
        return source if source.dim() == 1 else source[0]
    if source.dim() == 4:
        source = source[row]
    elif source.dim() == 5:
        source = source[row, token]
    return source[layer, head]
