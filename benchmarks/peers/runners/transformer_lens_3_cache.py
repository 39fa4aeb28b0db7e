"""TransformerLens 3 at its fastest: `start_at_layer`, over a frozen key-value cache of the prompt's first tokens.

We know of nobody who writes this; all of it is in the library, and it is the same algebra as ours.
"""

from __future__ import annotations

import torch

from benchmarks.peers.runners.transformer_lens_3 import PACKAGES, hooked
from benchmarks.sweep_task import Sweep, Task

__all__ = ["PACKAGES", "load"]


def load(task: Task) -> Sweep:
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    model, begin = hooked(task), task.shape.tokens - 1
    prefix, suffix = task.ids[:, :begin], task.ids[:, begin:]
    entering = [f"blocks.{layer}.hook_resid_pre" for layer in range(task.shape.layers)]

    @torch.no_grad()
    def run() -> torch.Tensor:
        cache = TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", task.shape.batch)
        model(prefix, attention_mask=torch.ones_like(prefix), past_kv_cache=cache, return_type=None)
        cache.freeze()
        logits, streams = model.run_with_cache(
            suffix,
            attention_mask=torch.ones_like(suffix),
            past_kv_cache=cache,
            names_filter=entering,
            return_cache_object=False,
        )
        baseline, scores = task.score(logits), []
        for layer, head, _ in task.cells():

            def patch(z, hook, head=head, values=task.source[layer, head]):
                z[:, 0, head] = values
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", patch)]
            logits = model.run_with_hooks(
                streams[entering[layer]], fwd_hooks=hooks, start_at_layer=layer, past_kv_cache=cache
            )
            scores.append(task.score(logits))
        return task.effects(baseline, scores)

    return run
