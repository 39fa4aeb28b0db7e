"""pyvene: an intervenable model for each head, made before the clock starts."""

from __future__ import annotations

import torch

from benchmarks.sweep_task import Sweep, Task

PACKAGES = ("pyvene",)


def load(task: Task) -> Sweep:
    import pyvene

    kept = {"use_cache": False, "logits_to_keep": task.shape.targets}
    base, column, rows = {"input_ids": task.ids, **kept}, task.shape.tokens - 1, task.shape.batch
    models = []
    for layer, head, _ in task.cells():
        config = {
            "layer": layer,
            "component": "head_attention_value_output",
            "unit": "h.pos",
            "intervention_type": pyvene.VanillaIntervention,
            "source_representation": task.source[layer, head],
        }
        models.append((pyvene.IntervenableModel(config, model=task.model), head))

    @torch.no_grad()
    def run() -> torch.Tensor:
        baseline, scores = task.score(task.model(**base).logits), []
        for model, head in models:
            where = {"sources->base": (None, [[[[head]] * rows, [[column]] * rows]])}
            _, output = model(base=base, unit_locations=where)
            scores.append(task.score(output.logits))
        return task.effects(baseline, scores)

    return run
