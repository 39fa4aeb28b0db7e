"""Models beyond the table of tested families, and odd members of it: right, or refused by name."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
import transformers as hf

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, ModelStateError, UnsupportedModelError
from bkdfast.hf.shared_prefix import joining
from tests.hf import zoo
from tests.sweep import brute, kinds
from tests.sweep.brute import ATTENTION, HEADS, MLP, RESIDUAL, Brute

_base = dict(
    vocab_size=zoo.VOCAB, hidden_size=48, intermediate_size=40, num_hidden_layers=zoo.LAYERS,
    num_attention_heads=zoo.HEADS, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
_grouped = dict(_base, num_key_value_heads=2)
_old = dict(vocab_size=zoo.VOCAB, n_embd=48, n_layer=zoo.LAYERS, n_head=zoo.HEADS, n_positions=128)
_falcon = dict(
    vocab_size=zoo.VOCAB, hidden_size=48, num_hidden_layers=zoo.LAYERS, num_attention_heads=zoo.HEADS,
    ffn_hidden_size=40, bias=True, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj")
EXPERTS = ("model.layers", "self_attn.o_proj", "mlp")
# name: (config, paths, how a prefix is shared)
GUESSED = {
    # Attention sinks, experts and alternating windows that are shorter than the prompt.
    "gpt_oss": (
        lambda: hf.GptOssConfig(**_grouped, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=4),
        EXPERTS,
        "shared",
    ),
    "bloom": (
        lambda: hf.BloomConfig(vocab_size=zoo.VOCAB, hidden_size=48, n_layer=3, n_head=4, pad_token_id=0),
        ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
        "copied",
    ),
    "gptj": (
        lambda: hf.GPTJConfig(**_old, rotary_dim=8, n_inner=40),
        ("transformer.h", "attn.out_proj", "mlp.fc_out"),
        "copied",
    ),
    "gpt_neo": (
        lambda: hf.GPTNeoConfig(
            vocab_size=zoo.VOCAB, hidden_size=48, num_layers=3, num_heads=4, intermediate_size=40, window_size=4,
            attention_types=[[["global", "local", "global"], 1]], max_position_embeddings=128,
        ),
        ("transformer.h", "attn.attention.out_proj", "mlp.c_proj"),
        None,
    ),
    "phi": (lambda: hf.PhiConfig(**_grouped), ("model.layers", "self_attn.dense", "mlp.fc2"), "shared"),
    "stablelm": (
        lambda: hf.StableLmConfig(**_grouped, use_parallel_residual=True, partial_rotary_factor=0.5),
        LLAMA,
        "copied",
    ),
    "granite": (
        lambda: hf.GraniteConfig(
            **_grouped, residual_multiplier=0.5, logits_scaling=2.0, embedding_multiplier=3.0, attention_multiplier=0.3
        ),
        LLAMA,
        "shared",
    ),
    "cohere": (lambda: hf.CohereConfig(**_grouped, logit_scale=0.3), LLAMA, "shared"),
    "starcoder2": (
        lambda: hf.Starcoder2Config(**_grouped, sliding_window=4),
        ("model.layers", "self_attn.o_proj", "mlp.c_proj"),
        "shared",
    ),
    "olmoe": (lambda: hf.OlmoeConfig(**_grouped, num_experts=4, num_experts_per_tok=2), EXPERTS, "shared"),
    "llama4_text": (  # attention in chunks
        lambda: hf.Llama4TextConfig(
            **_grouped, head_dim=16, intermediate_size_mlp=40, num_local_experts=2, attention_chunk_size=4
        ),
        ("model.layers", "self_attn.o_proj", "feed_forward"),
        "shared",
    ),
}  # fmt: skip
# Of families that are in the table.
MEMBERS = {
    "falcon, new decoder": (
        lambda: hf.FalconConfig(**_falcon, num_kv_heads=2, new_decoder_architecture=True),
        ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
        "copied",
    ),
    "falcon with alibi": (
        lambda: hf.FalconConfig(**_falcon, alibi=True, parallel_attn=False, multi_query=False),
        ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
        "copied",
    ),
    "mistral, short window": (lambda: hf.MistralConfig(**_grouped, sliding_window=3), LLAMA, "shared"),
    "gemma2, short window": (lambda: hf.Gemma2Config(**_grouped, head_dim=12, sliding_window=3), LLAMA, "shared"),
    "gemma3, short window": (
        lambda: hf.Gemma3TextConfig(
            **_grouped, head_dim=12, sliding_window=3,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        LLAMA,
        "shared",
    ),
    "qwen2, windows in some layers": (
        lambda: hf.Qwen2Config(**_grouped, use_sliding_window=True, sliding_window=3, max_window_layers=1),
        LLAMA,
        "shared",
    ),
    "llama, tied": (lambda: hf.LlamaConfig(**_grouped, tie_word_embeddings=True), LLAMA, "shared"),
    "llama, dynamic frequencies": (
        lambda: hf.LlamaConfig(
            **_grouped, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        ),
        LLAMA,
        "shared",
    ),
    "opt, norms behind, projected embeddings": (
        lambda: hf.OPTConfig(
            vocab_size=zoo.VOCAB, hidden_size=48, word_embed_proj_dim=24, ffn_dim=40, num_hidden_layers=3,
            num_attention_heads=4, max_position_embeddings=128, pad_token_id=0, do_layer_norm_before=False,
        ),
        ("model.decoder.layers", "self_attn.out_proj", "fc2"),
        "shared",
    ),
    "gpt2, scaled by layer": (
        lambda: hf.GPT2Config(**_old, n_inner=40, scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True),
        ("transformer.h", "attn.c_proj", "mlp.c_proj"),
        "shared",
    ),
    "bert as a decoder": (
        lambda: hf.BertConfig(**_base, is_decoder=True),
        ("bert.encoder.layer", "attention.output.dense", "output.dense"),
        None,
    ),
}  # fmt: skip


@functools.cache
def build(name: str) -> torch.nn.Module:
    config = (GUESSED | MEMBERS)[name][0]()
    torch.manual_seed(0)
    return zoo.randomise(hf.AutoModelForCausalLM.from_config(config))


def head_dim(name: str) -> int:
    return 16 if name in ("gpt_oss", "llama4_text") else 12


def exact(name: str, kind: str, grid: str, padding: str, site: str, **options) -> None:
    case = kinds.case(kind, grid, head_dim(name) if site == HEADS else 48, site=site)
    metric = bf.metrics.target_logprob(kinds.TARGETS[: 3 if case.batches == 1 else None])
    measure = brute.logprob(kinds.TARGETS)
    kinds.check(build(name), (GUESSED | MEMBERS)[name][1], case, padding, measure, metric, **options)


CASES = (
    ("patch", "last", "left", HEADS),
    ("zero", "sets all", "right", HEADS),
    ("patch a token", "each", "right", HEADS),
    ("zero", "last", "right", ATTENTION),
    ("patch", "each", "left", MLP),
    ("add", "rows", "right", RESIDUAL),
)


@pytest.mark.parametrize("name", GUESSED)
def test_guessed_families(name):
    _, _, how = GUESSED[name]
    with pytest.warns(UserWarning, match=f"model type '{name}' is not in the tested list"):
        spec = bf.hf.describe(build(name))
    assert joining(build(name), spec) == how
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for kind, grid, padding, site in CASES:
            exact(name, kind, grid, padding, site)
        if how:  # also where it would not pay
            exact(name, "zero", "span", "left", HEADS, share_prefix=True)


@pytest.mark.parametrize("name", MEMBERS)
def test_members_of_tested_families(name):
    assert joining(build(name), bf.hf.describe(build(name))) == MEMBERS[name][2]
    for kind, grid, padding, site in CASES:
        exact(name, kind, grid, padding, site)


def test_sinks_and_windows_are_seen():
    """What the comparison of GPT-OSS would miss if they had no effect."""
    model, batch = build("gpt_oss"), zoo.batch(padding=None)
    with torch.no_grad():
        before = model(**batch).logits
        sinks = [layer.self_attn.sinks.clone() for layer in model.model.layers]
        try:
            for layer in model.model.layers:
                layer.self_attn.sinks.fill_(-1e4)
            assert (model(**batch).logits - before).abs().max() > 0.1
        finally:
            for layer, sink in zip(model.model.layers, sinks, strict=True):
                layer.self_attn.sinks.copy_(sink)
    for name in ("mistral, short window", "gemma2, short window", "qwen2, windows in some layers"):
        config = MEMBERS[name][0]()
        config.sliding_window = 100
        wide = hf.AutoModelForCausalLM.from_config(config).eval()
        wide.load_state_dict(build(name).state_dict())
        with torch.no_grad():
            assert (wide(**batch).logits - build(name)(**batch).logits).abs().max() > 0.1, name


def long_rope():
    """Over 8 tokens all frequencies are others, those of the first tokens too."""
    factors = dict(short_factor=[1.0] * 6, long_factor=[3.0] * 6, original_max_position_embeddings=8)
    config = hf.Phi3Config(
        **_grouped,
        original_max_position_embeddings=8,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    torch.manual_seed(0)
    return zoo.randomise(hf.AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("tokens", [6, 11])
def test_long_rope_runs_whole_where_the_length_decides(tokens):
    model = long_rope()
    data, targets = zoo.batch(tokens=tokens, padding=None), [[5, 6]] * 3
    for kind, grid in (("patch", "last"), ("zero", "all"), ("patch", "each")):
        case = kinds.case(kind, grid, 12)
        want = Brute(model, LLAMA, [data]).effects(case.variants, brute.logprob(targets))
        result = bf.sweep(model, data, metric=bf.metrics.target_logprob(targets), progress=False, **case.options)
        brute.close(torch.stack([result.effects[index] for index in case.index]), want)
        assert result.facts["shared_prefix"] == (tokens == 6 and grid != "all")


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma2"])
@pytest.mark.parametrize(
    "change",
    [dict(output_hidden_states=True), dict(use_cache=False), dict(output_attentions=True)],
    ids=str,
)
def test_settings_of_the_config(name, change):
    model = zoo.build(name, attention="eager" if "output_attentions" in change else None)
    for setting, value in change.items():
        setattr(model.config, setting, value)
    case = kinds.case("patch", "last", kinds.head_dim(name))
    oracle = dict(call=lambda ids: model(input_ids=ids)[0][0])
    want = Brute(model, name, kinds.data("right"), **oracle).effects(case.variants, brute.logprob(kinds.TARGETS))
    metric = bf.metrics.target_logprob(kinds.TARGETS)
    result = bf.sweep(model, kinds.data("right"), metric=metric, progress=False, **case.options)
    brute.close(torch.stack([result.effects[index] for index in case.index]), want)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations(attention):
    """A model's own choice is used where no prefix is shared, and comes back after the sweep."""
    model = zoo.build("llama", attention=attention)
    for kind, grid in (("patch", "last"), ("zero", "all")):
        case = kinds.case(kind, grid, 16)
        kinds.check(
            model, "llama", case, "left", brute.logprob(kinds.TARGETS), bf.metrics.target_logprob(kinds.TARGETS)
        )
    assert model.config._attn_implementation == attention


def test_masks_with_holes():
    """A token masked in the middle of a prompt is not seen, and shifts no position, shared prefix or not."""
    model, batch = kinds.model("llama"), zoo.batch(padding=None)
    batch["attention_mask"][1, 3:5] = 0
    options = dict(edit=bf.Zero(), at="last_prompt", metric=bf.metrics.logit_diff(5, 6), progress=False)
    shared, whole = (bf.sweep(model, batch, share_prefix=share, verify=6, **options) for share in (True, False))
    assert shared.facts["shared_prefix"] and not whole.facts["shared_prefix"]
    torch.testing.assert_close(shared.effects, whole.effects, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        logits = model(**batch).logits[:, -1]
    torch.testing.assert_close(shared.baseline, logits[:, 5] - logits[:, 6], atol=2e-5, rtol=1e-4)


REFUSED = {
    "mamba": (lambda: hf.MambaConfig(vocab_size=67, hidden_size=48, num_hidden_layers=2), "state-space"),
    "jamba": (lambda: hf.JambaConfig(**_grouped, use_mamba_kernels=False), "hybrid layers"),
    "gemma3n_text": (
        lambda: hf.Gemma3nTextConfig(
            **_grouped, head_dim=16, vocab_size_per_layer_input=67, hidden_size_per_layer_input=8,
            num_kv_shared_layers=0, layer_types=["full_attention"] * 3,
        ),
        "not the residual stream",
    ),
    "openai-gpt": (lambda: hf.OpenAIGPTConfig(**_old), "not the residual stream"),
    # Its positions begin at 2: those that rows with padding are given would be wrong.
    "roberta": (lambda: hf.RobertaConfig(**_base, is_decoder=True), "position_ids 0, 1, 2, .* are not those"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    config, message = REFUSED[name]
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config()).eval()
    with pytest.raises(UnsupportedModelError, match=rf"{name}: .*{message}"):
        bf.sweep(model, zoo.batch(), edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)


def test_two_attentions_in_a_block_do_not_share_a_prefix():
    torch.manual_seed(0)
    model = zoo.randomise(hf.AutoModelForCausalLM.from_config(hf.DiffLlamaConfig(**_grouped)))
    options = dict(edit=bf.Zero(), at="last_prompt", metric=bf.metrics.target_logprob([5]), progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(
            ModelStateError, match="called the attention interface 6 times in 3 layers.*share_prefix=False"
        ):
            bf.sweep(model, zoo.batch(), **options)
        result = bf.sweep(model, zoo.batch(), share_prefix=False, verify=12, **options)
    assert result.effects.abs().max() > 0.1


def test_a_layer_without_a_known_mlp():
    spec = bf.hf.describe(kinds.model("mixtral"))
    blocks = tuple(bf.hf.BlockSpec(**{**block.__dict__, "mlp": None}) for block in spec.blocks)
    spec = bf.hf.ModelSpec(**{**spec.__dict__, "blocks": blocks})
    with pytest.raises(InvalidArgumentError, match="layer 0 of mixtral has no MLP that is known; pass spec= with mlp="):
        bf.sweep(
            kinds.model("mixtral"),
            zoo.batch(),
            edit=bf.Zero(),
            site="mlp",
            metric=bf.metrics.target_prob([5]),
            spec=spec,
        )
