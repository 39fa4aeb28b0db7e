"""TransformerLens 4: `run_with_hooks` of the bridge, one full forward for each head.

Its `start_at_layer` still executes the blocks before that layer (so its documentation says), so it would save nothing.
"""

from __future__ import annotations

import torch

from benchmarks.sweep_task import Sweep, Task

PACKAGES = ("transformer-lens",)


def load(task: Task) -> Sweep:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    bridge = build_bridge_from_module(task.model, "LlamaForCausalLM", hf_config=task.model.config)
    column, kept = task.shape.tokens - 1, {"use_cache": False, "logits_to_keep": task.shape.targets}

    @torch.no_grad()
    def run() -> torch.Tensor:
        baseline = task.score(bridge(task.ids, return_type="logits", **kept))
        scores = []
        for layer, head, _ in task.cells():

            def patch(z, hook, head=head, values=task.source[layer, head]):
                z[:, column, head] = values  # [B, T, H, Dh]
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", patch)]
            scores.append(task.score(bridge.run_with_hooks(task.ids, fwd_hooks=hooks, return_type="logits", **kept)))
        return task.effects(baseline, scores)

    return run
