"""Sweeps whose edits have a source for each sample: one batch after the other, put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bkdfast.sweep.engine import sweep
from bkdfast.sweep.result import SweepResult


def sweep_batches(
    model: torch.nn.Module,
    batches: Sequence[dict[str, torch.Tensor]],
    question: Callable[[dict[str, torch.Tensor], slice], dict[str, Any]],
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Any:
    """One `sweep` for each batch, each with an edit and a metric of its own, as one result.

    Args:
        model: as for `sweep`.
        batches: tokenised batches.
        question: from a batch and its place among the samples to the arguments of `sweep` that depend on them: `edit`,
            with sources of B rows, and `metric`, with B targets.
        out: as for `sweep`; each batch has a folder in it.
        progress: show a progress bar.
        **options: the other arguments of `sweep`.

    Returns:
        As `sweep` does.
    """
    results, first = [], 0
    with tqdm(total=len(batches), desc="sweep by batch", unit="batch", disable=not progress or len(batches) < 2) as bar:
        for number, batch in enumerate(batches):
            samples = slice(first, first := first + len(batch["input_ids"]))
            folder = None if out is None else Path(out) / f"batch-{number:05}"
            asked = {**options, **question(batch, samples)}
            results.append(sweep(model, batch, out=folder, progress=progress and len(batches) == 1, **asked))
            bar.update()
    if isinstance(results[0], dict):
        return {name: joined([result[name] for result in results]) for name in results[0]}
    return joined(results)


def joined(results: Sequence[SweepResult]) -> SweepResult:
    """Results of the same sweep on different samples as one; facts are those of the first."""
    first = results[0]
    worst = {
        name: max((result.facts[name] for result in results), default=None)
        for name in ("largest_error", "noise_floor")
        if first.facts.get(name) is not None
    }
    return dataclasses.replace(
        first,
        effects=torch.cat([result.effects for result in results], -1),
        baseline=torch.cat([result.baseline for result in results]),
        seconds=sum(result.seconds for result in results),
        facts={**first.facts, **worst},
        provenance={**first.provenance, "data": [result.provenance.get("data") for result in results]},
    )
