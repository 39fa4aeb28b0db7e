"""`describe`: specs checked against the models themselves, guesses by structure, and what is refused by name."""

import warnings

import pytest
import torch
import transformers as hf

import bkdfast as bf
from bkdfast.errors import BkdfastError, InvalidArgumentError, InvalidTypeError, UnsupportedModelError
from bkdfast.hf import BlockSpec, ModelSpec, describe
from tests.hf import zoo
from tests.hf.cases import EFFECT, model
from tests.hf.plain import PATHS

H, L, TOKENS = zoo.HEADS, zoo.LAYERS, torch.arange(10).view(2, 5) + 3


def record(subject, call, paths):
    """What the modules at `paths` are given in one forward: their first argument, in the order of the calls."""
    found = []
    handles = [
        subject.get_submodule(path).register_forward_hook(
            lambda module, args, out, path=path: found.append((path, args[0] if args else None, out))
        )
        for path in paths
    ]
    with torch.no_grad():
        result = call()
    for handle in handles:
        handle.remove()
    return found, result


def holds(spec, subject):
    """Every statement of the spec is true of `subject`."""
    assert spec.layers == L and spec.width == 48
    for layer, block in enumerate(spec.blocks):
        assert block.heads == H
        found, _ = record(subject, lambda: subject(TOKENS), [block.out_proj, *block.norms, block.block])
        order = [path for path, *_ in found]
        assert sorted(order) == sorted({block.out_proj, *block.norms, block.block}), "each runs once"
        assert [path for path in order if path in block.norms] == list(block.norms), "norms in running order"
        at = dict((path, (given, out)) for path, given, out in found)
        assert at[block.out_proj][0].shape == (2, 5, H * block.head_dim)
        stream = at[block.block][1]
        assert (stream[0] if isinstance(stream, tuple) else stream).shape == (2, 5, spec.width)
        if block.down_proj is not None:
            (_, given, out), *rest = record(subject, lambda: subject(TOKENS), [block.down_proj])[0]
            assert not rest and given.numel() == 10 * block.neurons and out.numel() == 10 * spec.width
        assert f".{layer}" in block.block
    final = [spec.final_norm] if spec.final_norm else []
    found, _ = record(subject, lambda: subject(TOKENS), [spec.entry, *final, spec.embedding])
    assert sorted(path for path, *_ in found) == sorted([spec.entry, *final, spec.embedding])
    assert subject.get_submodule(spec.embedding) is subject.get_input_embeddings()
    projection = subject.get_submodule(spec.blocks[0].out_proj).weight
    assert projection.shape[0 if spec.transposed else 1] == H * spec.blocks[0].head_dim


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_with_head(family):
    spec = describe(model(family))
    holds(spec, model(family))
    blocks, attention, mlp = PATHS[family]
    assert [b.out_proj for b in spec.blocks] == [f"{blocks}.{layer}.{attention}" for layer in range(L)]
    if family == "mixtral":
        assert all(b.down_proj is None and b.neurons is None for b in spec.blocks)
    else:
        assert [b.down_proj for b in spec.blocks] == [f"{blocks}.{layer}.{mlp}" for layer in range(L)]
        assert {b.neurons for b in spec.blocks} == {40}
    assert spec.family == family and spec.causal == (family not in zoo.ENCODERS)
    assert spec.transposed == (family == "gpt2")
    assert {b.head_dim for b in spec.blocks} == {16 if model(family).config.to_dict().get("head_dim") == 16 else 12}
    assert model(family).get_submodule(spec.unembedding) is model(family).get_output_embeddings()
    assert (spec.final_norm is None) == (family in zoo.ENCODERS)


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_without_head(family):
    torch.manual_seed(0)
    subject = hf.AutoModel.from_config(zoo.CONFIGS[family]()).eval()
    spec = describe(subject)
    holds(spec, subject)
    assert spec.unembedding is None
    with torch.no_grad():
        before = subject(TOKENS)[0]
        with bf.intervene(subject, bf.Scale(100.0, 1, 2)):
            assert not torch.equal(subject(TOKENS)[0], before)


def test_other_heads_and_wrappers():
    config = zoo.CONFIGS["llama"]()
    config.num_labels = 3
    for subject in (hf.LlamaForSequenceClassification(config), hf.LlamaForTokenClassification(config)):
        spec = describe(subject.eval())
        assert spec.entry == "model" and spec.blocks[2].out_proj == "model.layers.2.self_attn.o_proj"

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model("llama")

        def forward(self, tokens):
            return self.inner(tokens)

    spec = describe(Wrapper())
    assert spec.entry == "inner.model" and spec.blocks[0].block == "inner.model.layers.0"
    with torch.no_grad(), bf.intervene(wrapper := Wrapper(), bf.Zero(1, 2)):
        got = wrapper(TOKENS).logits
    with torch.no_grad(), bf.intervene(model("llama"), bf.Zero(1, 2)):
        assert torch.equal(got, model("llama")(TOKENS).logits)


def test_compiled_models_are_looked_into():
    assert describe(torch.compile(model("gpt2"))) == describe(model("gpt2"))


def test_meta_device():
    with torch.device("meta"):
        subject = hf.LlamaForCausalLM(zoo.CONFIGS["llama"]())
    assert describe(subject) == describe(model("llama"))


def test_falcon_of_the_newer_kind():
    config = hf.FalconConfig(
        vocab_size=zoo.VOCAB, hidden_size=48, num_hidden_layers=L, num_attention_heads=H, ffn_hidden_size=40,
        new_decoder_architecture=True, num_kv_heads=2,
    )  # fmt: skip
    subject = hf.FalconForCausalLM(config).eval()
    assert [norm.rsplit(".", 1)[1] for norm in describe(subject).blocks[0].norms] == ["ln_attn", "ln_mlp"]
    holds(describe(subject), subject)


def test_gemma3_with_a_vision_tower():
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
    config = hf.Gemma3Config(
        text_config=zoo.CONFIGS["gemma3_text"]().to_dict(), vision_config={**vision, "patch_size": 14},
        mm_tokens_per_image=4, image_token_index=66, boi_token_index=65, eoi_token_index=64,
    )  # fmt: skip
    subject = hf.Gemma3ForConditionalGeneration(config).eval()
    spec = describe(subject)
    holds(spec, subject)
    assert spec.family == "gemma3" and spec.blocks[0].block == "model.language_model.layers.0"
    with torch.no_grad():
        before = subject(TOKENS).logits
        with bf.intervene(subject, bf.Scale(50.0, 1, 2, at=-1)):
            moved = (subject(TOKENS).logits - before).abs().amax(-1)
    assert (moved[:, -1] > EFFECT).all() and (moved[:, :-1] == 0).all()


class Toy(torch.nn.Module):
    """A plain module without norms: two attention blocks over a residual stream."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(12, 36), torch.nn.Linear(12, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return x + self.out(z.transpose(1, 2).flatten(2))

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(20, 12)
        self.blocks = torch.nn.ModuleList([Toy.Block(), Toy.Block()])
        self.unembed = torch.nn.Linear(12, 20)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


def toy_spec(**changes):
    block = dict(down_proj=None, norms=(), heads=3, head_dim=4, neurons=None) | changes
    blocks = tuple(BlockSpec(**{"block": f"blocks.{i}", "out_proj": f"blocks.{i}.out", **block}) for i in range(2))
    return ModelSpec("toy", blocks, width=12, embedding="embed", unembedding="unembed")


@pytest.mark.parametrize("at", ["all", "last_prompt", 1])
def test_a_spec_of_ones_own(at):
    torch.manual_seed(0)
    toy, spec, tokens = Toy().eval(), toy_spec(), TOKENS + 1
    assert describe(toy, spec) is spec
    columns = {"all": slice(None), "last_prompt": slice(4, 5), 1: slice(1, 2)}[at]

    def hook(module, args):
        z = args[0].clone()
        z[:, columns, 8:12] = 0
        return (z,)

    with torch.no_grad():
        before = toy(tokens)
        handle = toy.blocks[1].out.register_forward_pre_hook(hook)
        want = toy(tokens)
        handle.remove()
        with bf.intervene(toy, bf.Zero(1, 2, at=at), spec=spec):
            got = toy(tokens)
        assert torch.equal(got, want) and (want - before).abs().max() > EFFECT
        assert torch.equal(toy(tokens), before)


WRONG = {
    "a path": (toy_spec(out_proj="blocks.0.o_proj"), r"blocks.0 has no submodule 'o_proj'; it has \['out', 'qkv'\]"),
    "a path from the root": (toy_spec(block="layers.0"), "Toy has no submodule 'layers'"),
    "a norm": (toy_spec(norms=("blocks.0.norm",)), "no submodule 'norm'"),
    "head_dim": (toy_spec(head_dim=5), "layer 0: 3 heads of head_dim 5 need a projection with 15 inputs.*has 12"),
    "heads": (toy_spec(heads=4), "layer 0: 4 heads of head_dim 4 need a projection with 16 inputs.*has 12"),
    "no blocks": (ModelSpec("toy", (), width=12), "'toy' has no blocks"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_spec(name):
    spec, message = WRONG[name]
    for use in (describe, lambda toy, spec: bf.prepare(toy, spec=spec)):
        with pytest.raises(InvalidArgumentError, match=message):
            use(Toy(), spec)


GUESSED = {
    "gptj": lambda: hf.GPTJConfig(
        vocab_size=67, n_embd=48, n_layer=L, n_head=H, n_positions=64, rotary_dim=8, n_inner=40,
    ),
    "bloom": lambda: hf.BloomConfig(vocab_size=67, hidden_size=48, n_layer=L, n_head=H),
    "stablelm": lambda: hf.StableLmConfig(
        vocab_size=67, hidden_size=48, intermediate_size=40, num_hidden_layers=L, num_attention_heads=H,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "gpt_neo": lambda: hf.GPTNeoConfig(
        vocab_size=67, hidden_size=48, num_layers=L, num_heads=H, attention_types=[[["global"], L]],
        intermediate_size=40, max_position_embeddings=64,
    ),
    "electra": lambda: hf.ElectraConfig(
        vocab_size=67, embedding_size=48, hidden_size=48, num_hidden_layers=L, num_attention_heads=H,
        intermediate_size=40, max_position_embeddings=64,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", GUESSED)
def test_unknown_families_by_structure(kind):
    torch.manual_seed(0)
    auto = hf.AutoModelForMaskedLM if kind == "electra" else hf.AutoModelForCausalLM
    subject = auto.from_config(GUESSED[kind]()).eval()
    with pytest.warns(UserWarning, match=f"model type '{kind}' is not in the tested list.*4 heads of 12.*families.py"):
        spec = describe(subject)
    assert spec.family == kind and spec.causal == (kind != "electra") and spec.layers == L
    projection = subject.get_submodule(spec.blocks[1].out_proj)

    def hook(module, args):
        z = args[0].clone()
        z[:, :, 24:36] *= 50
        return (z, *args[1:])

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = subject(TOKENS)[0]
        handle = projection.register_forward_pre_hook(hook)
        want = subject(TOKENS)[0]
        handle.remove()
        with bf.intervene(subject, bf.Scale(50.0, 1, 2)):
            got = subject(TOKENS)[0]
    assert torch.equal(got, want) and (want - before).abs().max() > 1e-3


REFUSED = {
    "deepseek_v3": (hf.DeepseekV3Config(num_hidden_layers=2), r"deepseek_v3: multi-head latent attention \(MLA\)"),
    "mamba": (hf.MambaConfig(num_hidden_layers=2), "mamba: state-space, linear-attention and hybrid layers"),
    "qwen3_next": (hf.Qwen3NextConfig(num_hidden_layers=4), r"qwen3_next: state-space.*\['linear_attention'\]"),
    "t5": (hf.T5Config(num_layers=2), "t5: encoder-decoder models are not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_by_name(kind):
    config, message = REFUSED[kind]
    auto = hf.AutoModelForSeq2SeqLM if kind == "t5" else hf.AutoModelForCausalLM
    with torch.device("meta"):
        subject = auto.from_config(config)
    for use in (describe, bf.prepare):
        with pytest.raises(UnsupportedModelError, match=message) as raised:
            use(subject)
        assert isinstance(raised.value, BkdfastError)


def test_shared_blocks_are_refused_by_the_probe():
    config = hf.AlbertConfig(
        vocab_size=67, embedding_size=48, hidden_size=48, num_hidden_layers=L, num_attention_heads=H,
        intermediate_size=40,
    )  # fmt: skip
    subject = hf.AlbertForMaskedLM(config).eval()
    with pytest.raises(UnsupportedModelError, match=r"albert: .*probe run says: .*in the order \[0, 0, 0\]"):
        describe(subject)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in subject.modules()), "the probe left a hook"


def test_not_a_model_at_all():
    with pytest.raises(UnsupportedModelError, match=r"Toy is not a HuggingFace model.*pass spec=.*families.py"):
        describe(Toy())
    with pytest.raises(InvalidTypeError, match="describe needs a torch.nn.Module, got str"):
        describe("meta-llama/Llama-3.1-8B")


def test_a_guessed_mixture_of_experts_is_causal():
    """Its earlier tokens move by rounding when a later one changes its expert."""
    sizes = dict(num_experts=4, num_experts_per_tok=2)
    config = hf.OlmoeConfig(**{**zoo.CONFIGS["llama"]().to_dict(), "model_type": "olmoe", "head_dim": 12}, **sizes)
    torch.manual_seed(0)
    subject = hf.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for weight in subject.parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape, generator=generator) * 2.0 / weight.shape[-1] ** 0.5
    with pytest.warns(UserWarning, match="guessed"):
        spec = describe(subject)
    assert spec.causal and spec.blocks[0].down_proj is None
