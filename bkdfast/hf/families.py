"""The table of known model families, and `describe`.

One line a family: where the blocks are (from the base model), and inside a block the attention output projection, the
MLP's down projection and the norms in running order. Sizes are not in the table; they are read off the model itself, so
an explicit `head_dim` or a different number of heads per layer comes out right.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from bkdfast.errors import InvalidTypeError, UnsupportedModelError
from bkdfast.hf.spec import BlockSpec, ModelSpec, in_features, submodule


@dataclass(frozen=True)
class Family:
    """Paths of one family: `blocks` and `final_norm` from the base model, the others from the block."""

    blocks: str
    out_proj: str
    down_proj: str | None
    norms: tuple[str, ...]
    final_norm: str | None
    transposed: bool = False
    causal: bool = True
    pre_norm: bool = True
    """The first of the norms reads the block's input."""
    mlp: str | None = None
    """The whole MLP, where there is no single down projection."""
    entry: str = ""
    """The module, from the base model, that every call goes through; OPT's head calls its decoder directly."""


_PRE = ("input_layernorm", "post_attention_layernorm")
_POST = ("post_attention_layernorm", "post_feedforward_layernorm")
_SANDWICH = (*_PRE, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LLAMA = Family("layers", "self_attn.o_proj", "mlp.down_proj", _PRE, "norm")
_GEMMA = Family("layers", "self_attn.o_proj", "mlp.down_proj", _SANDWICH, "norm")
_GEMMA_VISION = Family("language_model.layers", "self_attn.o_proj", "mlp.down_proj", _SANDWICH, "language_model.norm")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "phi3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": _GEMMA_VISION,
    "olmo2": Family("layers", "self_attn.o_proj", "mlp.down_proj", _POST, "norm", pre_norm=False),
    # Mixture of experts: there is no single down projection.
    "mixtral": Family("layers", "self_attn.o_proj", None, _PRE, "norm", mlp="mlp"),
    "gpt2": Family("h", "attn.c_proj", "mlp.c_proj", ("ln_1", "ln_2"), "ln_f", transposed=True),
    "gpt_neox": Family("layers", "attention.dense", "mlp.dense_4h_to_h", _PRE, "final_layer_norm"),
    # Which norms a Falcon has depends on its generation; those that exist are taken.
    "falcon": Family("h", "self_attention.dense", "mlp.dense_4h_to_h", (*_PRE, "ln_attn", "ln_mlp"), "ln_f"),
    "opt": Family(
        "decoder.layers",
        "self_attn.out_proj",
        "fc2",
        ("self_attn_layer_norm", "final_layer_norm"),
        "decoder.final_layer_norm",
        entry="decoder",
    ),
    "bert": Family(
        "encoder.layer",
        "attention.output.dense",
        "output.dense",
        ("attention.output.LayerNorm", "output.LayerNorm"),
        None,
        causal=False,
        pre_norm=False,
    ),
    "distilbert": Family(
        "transformer.layer",
        "attention.out_lin",
        "ffn.lin2",
        ("sa_layer_norm", "output_layer_norm"),
        None,
        causal=False,
        pre_norm=False,
    ),
}

HOW_TO_ADD = (
    "pass spec=bkdfast.hf.ModelSpec(...), or add one line to FAMILIES in bkdfast/hf/families.py and a config to "
    "tests/hf/zoo.py (CONTRIBUTING.md, 'Adding a model family')"
)

_MLA = re.compile(r"deepseek_v[23]|kimi|minicpm3|longcat|glm_moe_dsa|glm4_moe_lite|youtu")
_RECURRENT = re.compile(
    r"mamba|rwkv|xlstm|recurrent_gemma|jamba|bamba|zamba|lfm2|falcon_h1|granitemoehybrid|nemotron_h|qwen3_next|"
    r"qwen3_5|olmo_hybrid|minimax|plamo2|hybrid"
)
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def describe(model: torch.nn.Module, spec: ModelSpec | None = None) -> ModelSpec:
    """Where `model`'s blocks, heads, projections and norms are.

    A family of the table is looked up; an unknown one is guessed from its structure and then checked by a probe run
    (`bkdfast.hf.structure`), with a warning. Models wrapped by `torch.compile` or PEFT are looked into.

    Args:
        model: a HuggingFace model (weights may be on the meta device for a known family), or any module with `spec`.
        spec: a spec of your own; it is checked against the model and returned.

    Returns:
        The model's `ModelSpec`; all paths start at `model`.

    Raises:
        UnsupportedModelError: the family is refused by name (latent attention, state-space and hybrid layers,
            encoder-decoders), or is unknown and the probe run failed. The message says how to add it.
        InvalidArgumentError: `spec` does not fit the model.

    Example:
        >>> from transformers import AutoModelForCausalLM
        >>> from bkdfast.demo import PAIR
        >>> spec = describe(AutoModelForCausalLM.from_pretrained(PAIR / "tuned"))
        >>> spec.blocks[0].out_proj, spec.blocks[0].heads
        ('model.layers.0.self_attn.o_proj', 8)
    """
    if not isinstance(model, torch.nn.Module):
        raise InvalidTypeError(f"describe needs a torch.nn.Module, got {type(model).__name__}")
    model = unwrap(model)
    if spec is not None:
        return spec.check(model)
    prefix, inner = _pretrained(model)
    config = inner.config.get_text_config(decoder=True)
    refuse_by_name(inner.config)
    # Gemma-3 with a vision tower has the outer model_type "gemma3" and a text config of its own.
    family = next((f for f in (inner.config.model_type, config.model_type) if f in FAMILIES), None)
    if family is None:
        from bkdfast.hf.structure import guess

        spec = guess(model, inner, prefix, config)
        warnings.warn(
            f"model type {config.model_type!r} is not in the tested list; its structure was guessed and passed a probe "
            f"run (output projection {spec.blocks[0].out_proj}, {spec.blocks[0].heads} heads of "
            f"{spec.blocks[0].head_dim}). To be sure, {HOW_TO_ADD}",
            stacklevel=2,
        )
        return spec
    return _from_table(inner, prefix, config, family).check(model)


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The module inside a `torch.compile` wrapper, or the model itself."""
    return getattr(model, "_orig_mod", model)


def refuse_by_name(config) -> None:
    """Raise for architectures whose layers this version does not do right."""
    kind = str(getattr(config, "model_type", ""))
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) or _MLA.search(kind):
        raise UnsupportedModelError(
            f"{kind}: multi-head latent attention (MLA) is not supported yet; its heads have their own value dimension"
        )
    layer_types = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    if _RECURRENT.search(kind) or not layer_types <= _ATTENTION_LAYERS:
        odd = sorted(layer_types - _ATTENTION_LAYERS)
        raise UnsupportedModelError(
            f"{kind}: state-space, linear-attention and hybrid layers are not supported yet"
            + (f" (found layer types {odd})" if odd else "")
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind}: encoder-decoder models are not supported yet")


def _pretrained(model: torch.nn.Module) -> tuple[str, Any]:
    """The HuggingFace model at or below `model` (PEFT wraps it), with its path."""
    from transformers import PreTrainedModel

    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            return path, module
    raise UnsupportedModelError(
        f"{type(model).__name__} is not a HuggingFace model, so its heads are not known; {HOW_TO_ADD}"
    )


def base_path(inner: Any) -> str:
    """Path of the base model (without head) inside a HuggingFace model; `""` if it is one itself."""
    prefix = inner.base_model_prefix
    return prefix if prefix and hasattr(inner, prefix) else ""


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _from_table(inner: Any, prefix: str, config, family: str) -> ModelSpec:
    line = FAMILIES[family]
    base_prefix = base_path(inner)
    base = submodule(inner, base_prefix) if base_prefix else inner
    blocks = submodule(base, line.blocks)
    # An OPT with its norms behind the sublayers has no final one.
    final = line.final_norm if line.final_norm in dict(base.named_modules()) else None
    return ModelSpec(
        family=family,
        blocks=tuple(
            block_spec(block, _join(prefix, base_prefix, line.blocks, str(i)), line, config.num_attention_heads)
            # Not children(), which leaves repeated ones out.
            for i, block in enumerate(b for b in blocks._modules.values() if b is not None)
        ),
        width=config.hidden_size,
        final_norm=_join(prefix, base_prefix, final) if final else None,
        transposed=line.transposed,
        causal=line.causal or bool(getattr(config, "is_decoder", False)),  # a BERT can be made one
        entry=_join(prefix, base_prefix, line.entry),
        **embeddings(inner, prefix),
    )


def block_spec(block: torch.nn.Module, path: str, line: Family, heads: int) -> BlockSpec:
    """The spec of one block, sizes read off its modules."""
    names = dict(block.named_modules())
    width = in_features(submodule(block, line.out_proj))
    if width is None or width % heads:
        raise UnsupportedModelError(
            f"{_join(path, line.out_proj)} has {width} inputs, which {heads} heads do not divide; pass spec="
        )
    # A dense layer of an otherwise sparse model has its own down projection, and the other way round.
    down = line.down_proj if line.down_proj in names else None
    norms = tuple(_join(path, norm) for norm in line.norms if norm in names)
    # OPT says of each block whether its norms come first.
    first = line.pre_norm and getattr(block, "do_layer_norm_before", True)
    return BlockSpec(
        block=path,
        out_proj=_join(path, line.out_proj),
        down_proj=_join(path, down) if down else None,
        norms=norms,
        heads=heads,
        head_dim=width // heads,
        neurons=in_features(names[down]) if down else None,
        input_norm=norms[0] if norms and first else None,
        mlp=_join(path, line.mlp) if line.mlp and line.mlp in names and not down else None,
    )


def embeddings(inner: Any, prefix: str) -> dict[str, Any]:
    """Paths of the token embedding and the unembedding, as the model itself names them."""
    names = {module: path for path, module in inner.named_modules()}
    token, output = inner.get_input_embeddings(), inner.get_output_embeddings()
    return {
        "embedding": _join(prefix, names[token]) if token in names else None,
        "unembedding": _join(prefix, names[output]) if output in names else None,
    }
