"""Re-check random cells of a sweep the slow way: a plain hook that clones and assigns, and a full forward.

Shares nothing with the engine but the model and the metric: positions and sources are read off the edit by plain
indexing, no block is skipped, no row is shifted, all logits are computed.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from bkdfast.errors import VerificationError
from bkdfast.hf.batch import call
from bkdfast.hf.capture import eager
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.sweep.metrics import Metric, Scored
from bkdfast.sweep.variants import HEADS, Variant

if TYPE_CHECKING:
    from bkdfast.sweep.run import Sweep

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest plausible difference of two exact ways to compute a metric, relative to its size (here and on average)."""


class Checked(NamedTuple):
    """What re-checked cells say of one metric: largest relative and largest absolute difference of a value."""

    relative: float = 0.0
    absolute: float = 0.0


def check_cells(job: Sweep, scores: torch.Tensor, count: int) -> list[Checked]:
    """Compute `count` random (batch, variant) cells again; returns the largest differences of each metric.

    Args:
        job: the sweep.
        scores: `[M, *shape, N]`, what it found.
        count: number of cells.

    Raises:
        VerificationError: a cell differs by more than rounding. Not for ranks and the like, where rounding may decide
            between two neighbours.
    """
    draw = random.Random(0)
    device = job.state.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else job.state.dtype
    flat = scores.flatten(1, -2)
    worst = [Checked() for _ in job.metrics]
    for _ in range(count):
        number, variant = draw.randrange(len(job.jobs)), draw.choice(job.grid.variants)
        layout, first = job.jobs[number].layout, job.jobs[number].first
        for m, scored in zip(job.members[number], layout.scored, strict=True):
            metric = job.metrics[m]
            with eager(job.model):
                again, base = plain_scores(job, variant, metric, scored, layout.last)
            engine = flat[m, variant.index, first : first + layout.rows]
            off = (again - engine).abs()
            relative = (off / (base.abs().mean() + again.abs()).clamp(min=1e-30)).max().item()
            worst[m] = Checked(max(worst[m].relative, relative), max(worst[m].absolute, off.max().item()))
            if not relative <= TOLERANCE[computed] and not metric.discrete:
                raise VerificationError(
                    f"{list(variant.edits)}, batch {number}: the engine says {engine.tolist()}, a plain hook says "
                    f"{again.tolist()} ({metric.name}); the model's structure is not what was assumed; please report "
                    f"the model type ({job.state.spec.family!r})"
                )
    return worst


def plain_scores(
    job: Sweep, variant: Variant, metric: Metric, scored: Scored, last: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The metric `[B]` of one variant by plain hooks, and of the unedited model; float64 on the host."""
    rows = torch.arange(len(scored.read), device=scored.read.device)[:, None]

    def run() -> torch.Tensor:
        with torch.no_grad():
            return call(job.model, scored.batch)[rows, scored.read]

    base = run()
    with plain_edits(job.model, job.state.spec, job.grid.site, variant, scored, last):
        edited = run()
    state = metric.begin(base.flatten(0, 1), scored) if metric.needs_base else None
    return metric.score(edited, scored, state).double().cpu(), metric.score(base, scored, state).double().cpu()


@contextlib.contextmanager
def plain_edits(
    model: torch.nn.Module, spec: ModelSpec, site: str, variant: Variant, scored: Scored, last: list[int]
) -> Iterator[None]:
    """Forwards inside this context carry the variant's edits, made by hooks that clone and assign."""
    ids = scored.batch["input_ids"]
    begin, _ = prompt_ends(
        {"input_ids": ids, "attention_mask": scored.batch.get("attention_mask", torch.ones_like(ids))}
    )
    begins = begin.tolist()

    def edited(edit: Edit, x: torch.Tensor) -> torch.Tensor:
        flat, x = x.shape, x.clone().view(*ids.shape, -1)
        block = spec.blocks[edit.layer]  # type: ignore[index]
        own = slice(edit.head * block.head_dim, (edit.head + 1) * block.head_dim) if site == HEADS else slice(None)  # type: ignore[operator]
        for row, start in enumerate(begins):
            columns = _columns(edit.at, start, start + last[row], x.shape[1], row)
            first = _first_column(edit.at, start, start + last[row], columns)
            for column in columns:
                if edit.source is not None and edit.source.dim() == 5:
                    behind = len(edit.source) > 1 and column > start + last[row]
                    if behind or not 0 <= column - first < edit.source.shape[1]:
                        continue  # one entry a token, for as many as there are
                new = edit.a * x[row, column, own]
                if edit.source is not None:
                    new = new + edit.b * _source(edit, row, column - first).to(x)
                x[row, column, own] = new
        return x.view(flat)

    def on_input(edit: Edit):
        return lambda module, args: (edited(edit, args[0]), *args[1:])

    def on_output(edit: Edit):
        def hook(module, args, output):
            if isinstance(output, tuple):
                return (edited(edit, output[0]), *output[1:])
            return edited(edit, output)

        return hook

    handles = []
    for edit in variant.edits:
        block = spec.blocks[edit.layer]  # type: ignore[index]
        if site == HEADS:
            handles.append(submodule(model, block.out_proj).register_forward_pre_hook(on_input(edit)))
        else:
            path = spec.outputs(site)[edit.layer]  # type: ignore[index]
            handles.append(submodule(model, path).register_forward_hook(on_output(edit)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def _first_column(at: At, begin: int, end: int, columns: list[int]) -> int:
    """The column that the first entry of a source with one entry a token is for."""
    if isinstance(at, slice) and at.start is not None and at.start < 0:
        return end + 1 + at.start  # before the row's first token where that is short
    return begin if isinstance(at, str) and at == "prompt" else min(columns, default=begin)


def _source(edit: Edit, row: int, token: int) -> torch.Tensor:
    """The source's entry `[W]` of one cell."""
    source = edit.source
    assert source is not None
    if source.dim() < 3:
        return source if source.dim() == 1 else source[0]
    if source.dim() == 4:
        source = source[row if len(source) > 1 else 0]
    elif source.dim() == 5:
        source = source[row if len(source) > 1 else 0, token]
    return source[edit.layer, edit.head]
