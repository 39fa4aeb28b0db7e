"""bkdfast."""

from __future__ import annotations

import torch

import bkdfast as bf
from benchmarks.sweep_task import Sweep, Task

PACKAGES = ("bkdfast",)


def load(task: Task) -> Sweep:
    batch = {"input_ids": task.prompts}
    metric = bf.metrics.target_prob(task.targets.tolist())
    edit, at = (bf.Zero(), "all") if task.shape.everywhere else (bf.Patch(task.source), "last_prompt")

    def run() -> torch.Tensor:
        return bf.sweep(task.model, batch, edit=edit, at=at, metric=metric, progress=False).effects

    return run
