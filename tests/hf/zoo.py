"""Small random models of every family: real HuggingFace architectures at test size.

The traps are on purpose: `head_dim` differs from width / heads where the config allows it, grouped-query attention
where the family has it, biases are random (HuggingFace initialises them to zero, which hides a forgotten bias), and
weights are large enough that one head moves the logits by far more than any tolerance.
"""

from __future__ import annotations

import torch
import transformers as hf

VOCAB = 67
LAYERS = 3
HEADS = 4

_rotary = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    head_dim=16,  # 4 x 16 = 64 inputs of the output projection, for a width of 48
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_absolute = dict(_rotary, num_key_value_heads=HEADS)
_encoder = dict(
    vocab_size=VOCAB,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    max_position_embeddings=128,
    pad_token_id=0,
)

CONFIGS = {
    "llama": lambda: hf.LlamaConfig(**_rotary, attention_bias=True),
    "qwen2": lambda: hf.Qwen2Config(**_rotary),
    "qwen3": lambda: hf.Qwen3Config(**_rotary),
    "mistral": lambda: hf.MistralConfig(**_rotary, sliding_window=8),
    "gemma2": lambda: hf.Gemma2Config(**_rotary, sliding_window=8),
    "gemma3_text": lambda: hf.Gemma3TextConfig(
        **_rotary, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "phi3": lambda: hf.Phi3Config(**_rotary),
    "olmo2": lambda: hf.Olmo2Config(**_rotary),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=48, n_layer=LAYERS, n_head=HEADS, n_positions=128, n_inner=40,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**{**_encoder, "bos_token_id": 1, "eos_token_id": 2}),
    "falcon": lambda: hf.FalconConfig(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=LAYERS, num_attention_heads=HEADS, ffn_hidden_size=40,
        bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=48, word_embed_proj_dim=48, ffn_dim=40, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ),
    "mixtral": lambda: hf.MixtralConfig(**_rotary, num_local_experts=4, num_experts_per_tok=2),
    "bert": lambda: hf.BertConfig(**_encoder),
    "distilbert": lambda: hf.DistilBertConfig(
        vocab_size=VOCAB, dim=48, hidden_dim=40, n_layers=LAYERS, n_heads=HEADS, max_position_embeddings=128,
        pad_token_id=0,
    ),
}  # fmt: skip
ENCODERS = ("bert", "distilbert")
DECODERS = tuple(name for name in CONFIGS if name not in ENCODERS)


def build(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> torch.nn.Module:
    """A random model of `family` in eval mode, with weights large enough to matter."""
    config = CONFIGS[family]()
    if attention is not None:
        config._attn_implementation = attention
    auto = hf.AutoModelForMaskedLM if family in ENCODERS else hf.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config)
    return randomise(model, seed).to(dtype)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights, biases and sinks large enough to matter; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() >= 2:
                spread = 0.5 if "embed" in name or "wte" in name else 2.0 / weight.shape[-1] ** 0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
            elif name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
            elif name.endswith("sinks"):
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model.eval()


def batch(rows: int = 3, tokens: int = 11, *, padding: str | None = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """Random token ids with ragged rows: row i has i tokens of padding on the given side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padding else 0):
        hidden = slice(0, row) if padding == "left" else slice(tokens - row, tokens)
        mask[row, hidden] = 0
        ids[row, hidden] = 0
    return {"input_ids": ids, "attention_mask": mask}
