"""nnsight: one trace for each head."""

from __future__ import annotations

import torch

from benchmarks.sweep_task import Sweep, Task

PACKAGES = ("nnsight",)


def load(task: Task) -> Sweep:
    import nnsight

    model = nnsight.NNsight(task.model)
    column, kept = task.shape.tokens - 1, {"use_cache": False, "logits_to_keep": task.shape.targets}

    @torch.no_grad()
    def run() -> torch.Tensor:
        with model.trace(input_ids=task.ids, **kept):
            logits = nnsight.save(model.lm_head.output)
        baseline, scores = task.score(logits), []
        for layer, head, own in task.cells():
            values = task.source[layer, head]
            with model.trace(input_ids=task.ids, **kept):
                model.model.layers[layer].self_attn.o_proj.input[:, column, own] = values
                logits = nnsight.save(model.lm_head.output)
            scores.append(task.score(logits))
        return task.effects(baseline, scores)

    return run
