"""nnsight: one trace for each head, in which the blocks before the head's layer are skipped (`.skip`)."""

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
            streams = nnsight.save([])
            for block in model.model.layers:
                streams.append(block.input)
            logits = nnsight.save(model.lm_head.output)
        baseline, scores = task.score(logits), []
        for layer, head, own in task.cells():
            values, stream = task.source[layer, head], streams[layer]
            with model.trace(input_ids=task.ids, **kept):
                for before in range(layer):
                    model.model.layers[before].skip(stream)
                model.model.layers[layer].self_attn.o_proj.input[:, column, own] = values
                logits = nnsight.save(model.lm_head.output)
            scores.append(task.score(logits))
        return task.effects(baseline, scores)

    return run
