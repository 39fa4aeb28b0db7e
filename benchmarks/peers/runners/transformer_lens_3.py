"""TransformerLens 3: `HookedTransformer`, each head's forward begins at its layer (`start_at_layer`)."""

from __future__ import annotations

import torch

from benchmarks.sweep_task import Sweep, Task

PACKAGES = ("transformer-lens",)


def hooked(task: Task):
    """The model as `HookedTransformer.from_pretrained_no_processing` makes it, from a config instead of a name."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights

    shape, config = task.shape, task.model.config
    model = HookedTransformer(
        HookedTransformerConfig(
            n_layers=shape.layers,
            d_model=shape.width,
            d_head=shape.head_dim,
            n_heads=shape.heads,
            d_mlp=shape.mlp,
            d_vocab=shape.vocab,
            n_ctx=config.max_position_embeddings,
            act_fn="silu",
            normalization_type="RMS",
            final_rms=True,
            gated_mlp=True,
            eps=config.rms_norm_eps,
            positional_embedding_type="rotary",
            rotary_adjacent_pairs=False,
            rotary_dim=shape.head_dim,
            rotary_base=int(config.rope_parameters["rope_theta"]),
            original_architecture="LlamaForCausalLM",
            dtype=task.model.dtype,
            device="cpu",
        )
    )
    weights = convert_llama_weights(task.model, model.cfg)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval()


def load(task: Task) -> Sweep:
    model, read = hooked(task), slice(task.shape.tokens - 1, None)
    entering = [f"blocks.{layer}.hook_resid_pre" for layer in range(task.shape.layers)]

    @torch.no_grad()
    def run() -> torch.Tensor:
        logits, streams = model.run_with_cache(task.ids, names_filter=entering, return_cache_object=False)
        baseline, scores = task.score(logits[:, read]), []
        for layer, head, _ in task.cells():

            def patch(z, hook, head=head, values=task.source[layer, head]):
                z[:, task.shape.tokens - 1, head] = values
                return z

            hooks = [(f"blocks.{layer}.attn.hook_z", patch)]
            logits = model.run_with_hooks(streams[entering[layer]], fwd_hooks=hooks, start_at_layer=layer)
            scores.append(task.score(logits[:, read]))
        return task.effects(baseline, scores)

    return run
