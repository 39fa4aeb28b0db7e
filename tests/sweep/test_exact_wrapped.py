"""Models that are more than plain weights: LoRA, quantised and offloaded projections, hooks of the user's, wrappers,
and modules that are not from HuggingFace.
"""

from __future__ import annotations

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, UnsupportedModelError
from bkdfast.sweep import base as base_run
from bkdfast.sweep.projection import CALL, RUN, UPDATE, projection_mode
from tests.hf import zoo
from tests.sweep import brute, kinds
from tests.sweep.brute import ATTENTION, HEADS, MLP, RESIDUAL

CASES = (
    ("patch", "last", "left", HEADS),
    ("zero", "sets all", "right", HEADS),
    ("add", "each", "right", HEADS),
    ("zero", "last", "right", ATTENTION),
    ("patch", "each", "left", MLP),
    ("patch", "last", "left", MLP),
    ("zero", "each", "right", RESIDUAL),
)
LATE = tuple(case for case in CASES if case[1] == "last")


def exact(model, paths, cases=CASES, *, head_dim=16, width=48, call=None, **options):
    for kind, grid, padding, site in cases:
        case = kinds.case(kind, grid, head_dim if site == HEADS else width, site=site)
        metric = bf.metrics.target_logprob(kinds.TARGETS)
        kinds.check(model, paths, case, padding, brute.logprob(kinds.TARGETS), metric, call=call, **options)


def mode(model, layer=1) -> str:
    return projection_mode(model, bf.hf.describe(model), layer)


# LoRA and quantised projections: called, not sliced.


def lora(family, modules):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, lora_dropout=0.1, bias="none")
    model = peft.get_peft_model(zoo.build(family), config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn_like(weight) * 0.3)
    return model


@pytest.mark.parametrize(
    ("family", "modules", "paths"),
    [
        ("llama", ["q_proj", "o_proj", "down_proj"], ("model.layers", "self_attn.o_proj", "mlp.down_proj")),
        ("gpt2", ["c_proj"], ("transformer.h", "attn.c_proj", "mlp.c_proj")),
        ("llama", ["v_proj"], ("model.layers", "self_attn.o_proj", "mlp.down_proj")),
    ],
)
def test_lora(family, modules, paths):
    model = lora(family, modules)
    assert mode(model) == (UPDATE if modules == ["v_proj"] else CALL)
    paths = ("base_model.model." + paths[0], *paths[1:])
    exact(model, paths, head_dim=kinds.head_dim(family))
    # The adapter matters, or the test of it would say nothing.
    with torch.no_grad():
        batch = zoo.batch(padding=None)
        assert (model(**batch).logits - kinds.model(family)(**batch).logits).abs().max() > 0.1
    result = bf.sweep(
        model,
        zoo.batch(),
        edit=bf.Zero(),
        at="last_prompt",
        metric=bf.metrics.target_prob([5]),
        verify=12,
        progress=False,
    )
    assert result.facts["shared_prefix"] and result.facts["largest_error"] < 1e-4


class WeightOnly(torch.nn.Linear):
    """8-bit weights with a scale for each output, as weight-only quantisation stores them."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("levels", (linear.weight.detach() / scale).round().to(torch.int8))
        self.weight.data.fill_(torch.nan)  # nobody may slice it
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.levels.to(x.dtype) * self.scale, self.bias)


def test_weight_only_quantisation():
    model = zoo.build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = WeightOnly(layer.self_attn.o_proj)
    assert mode(model) == CALL
    exact(model, "llama")


def test_a_projection_whose_forward_was_replaced():
    model = zoo.build("llama")
    projection = model.model.layers[1].self_attn.o_proj
    projection.forward = lambda x: torch.nn.functional.linear(x, projection.weight * 0.5, projection.bias)
    assert [mode(model, layer) for layer in range(3)] == [UPDATE, CALL, UPDATE]
    exact(model, "llama")
    assert "forward" in vars(projection)


def test_dynamic_int8_is_refused():
    model = zoo.build("llama")
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(
        UnsupportedModelError, match=r"model.layers.0.self_attn.q_proj is Linear: int8 with activations"
    ):
        bf.sweep(model, zoo.batch(), edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)


# Hooks of the user's.


def scaled_input(module, args):
    return (args[0] * 0.5, *args[1:])


def shifted(output, by=0.7):
    return (output[0] + by, *output[1:]) if isinstance(output, tuple) else output + by


def shifted_output(module, args, output):
    return shifted(output)


def doubled_in_place(module, args, output):
    (output[0] if isinstance(output, tuple) else output).mul_(2)


def stream_in(module, args, kwargs):
    return (args[0] * 0.9, *args[1:]), kwargs


HOOKS = {
    "projection, before": ("model.layers.1.self_attn.o_proj", "pre", scaled_input),
    "projection, after": ("model.layers.1.self_attn.o_proj", "post", shifted_output),
    "attention, after": ("model.layers.1.self_attn", "post", shifted_output),
    "attention, after, in place": ("model.layers.1.self_attn", "post", doubled_in_place),
    "mlp, after": ("model.layers.1.mlp", "post", shifted_output),
    "mlp, after, in place": ("model.layers.1.mlp", "post", doubled_in_place),
    "down projection, after": ("model.layers.1.mlp.down_proj", "post", shifted_output),
    "block, before": ("model.layers.1", "pre with kwargs", stream_in),
    "block, after": ("model.layers.1", "post", shifted_output),
    "first block, after": ("model.layers.0", "post", shifted_output),
    "embedding, after": ("model.embed_tokens", "post", shifted_output),
    "final norm, after": ("model.norm", "post", doubled_in_place),
    "unembedding, before": ("lm_head", "pre", scaled_input),
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_of_the_user(name):
    """They run once for what they are on, before the edit, in every variant."""
    path, when, hook = HOOKS[name]
    model = zoo.build("llama")
    module = model.get_submodule(path)
    if when == "post":
        module.register_forward_hook(hook)
    else:
        module.register_forward_pre_hook(hook, with_kwargs="kwargs" in when)
    assert mode(model) == (RUN if path.endswith("o_proj") else UPDATE)
    with pytest.warns(UserWarning, match="hooks of yours are on the model and get whole rows: no prefix is shared"):
        exact(model, "llama")
    exact(model, "llama", [*LATE, ("patch", "last", "left", RESIDUAL)], share_prefix=True)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 1


@pytest.mark.filterwarnings("ignore:hooks of yours")
@pytest.mark.parametrize(("share", "shapes"), [(None, [(3, 12), (3, 12)]), (True, [(3, 10), (3, 2), (3, 2)])])
def test_what_hooks_of_the_user_see(share, shapes):
    """Whole rows of the base run and of the variant; or, where asked for, the prefix, and the rest of both."""
    model, seen = zoo.build("llama"), []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(tuple(args[0].shape[:2])))
    options = dict(metric=bf.metrics.target_logprob([5, 6]), share_prefix=share, progress=False)
    bf.sweep(model, zoo.batch(), edit=bf.Zero(), at="last_prompt", heads=[(0, 0)], **options)
    assert seen == shapes


# Offloaded weights.


@pytest.mark.parametrize("where", ["cpu", "disk", "some"])
def test_offloaded_weights(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = zoo.build("llama")
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        names = [
            "model.embed_tokens",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
            *(f"model.layers.{i}" for i in range(3)),
        ]
        places = {name: "disk" if where == "disk" or name.endswith("1") else "cpu" for name in names}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        assert model.model.layers[1].self_attn.o_proj.weight.device.type == "meta"
    assert mode(model) == CALL
    exact(model, "llama")


# Modules that are not from HuggingFace, and wrappers around those that are.


class Plain(torch.nn.Module):
    """Learned absolute positions, no norms, no attention mask, no cache; returns a plain tensor."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = torch.nn.Linear(48, 144), torch.nn.Linear(48, 48)
            self.up, self.down = torch.nn.Linear(48, 40), torch.nn.Linear(40, 48)

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 12).permute(2, 0, 3, 1, 4)
            z = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(z.transpose(1, 2).flatten(2))
            return x + self.down(self.up(x).relu())

    def __init__(self):
        super().__init__()
        self.embed, self.place = torch.nn.Embedding(67, 48), torch.nn.Embedding(32, 48)
        self.blocks = torch.nn.ModuleList([Plain.Block() for _ in range(3)])
        self.unembed = torch.nn.Linear(48, 67)

    def forward(self, tokens):
        x = self.embed(tokens) + self.place(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.unembed(x)


def plain(**changes):
    torch.manual_seed(0)
    block = dict(norms=(), heads=4, head_dim=12, neurons=40)
    blocks = tuple(bf.hf.BlockSpec(f"blocks.{i}", f"blocks.{i}.out", f"blocks.{i}.down", **block) for i in range(3))
    spec = bf.hf.ModelSpec("toy", blocks, width=48, embedding="embed", unembedding="unembed", **changes)
    return Plain().eval(), spec


@pytest.mark.parametrize("known_head", [True, False])
def test_a_plain_module(known_head):
    """Rows stay where they are, nothing is cached; padding on the right is behind all that counts."""
    model, spec = plain()
    if not known_head:
        spec = bf.hf.ModelSpec(**{**spec.__dict__, "unembedding": None})
    cases = [(kind, grid, "right", site) for kind, grid, _, site in CASES]
    paths = ("blocks", "out", "down")
    exact(model, paths, cases, head_dim=12, call=lambda ids: model(ids)[0], spec=spec, verify=4)
    options = dict(edit=bf.Zero(), at="last_prompt", metric=bf.metrics.kl(), spec=spec, progress=False)
    batch = zoo.batch(padding=None)
    bare = bf.sweep(model, {"input_ids": batch["input_ids"]}, **options)
    assert torch.equal(bare.effects, bf.sweep(model, batch, **options).effects) and not bare.facts["shared_prefix"]
    found = bf.head_outputs(model, {"input_ids": batch["input_ids"]}, spec=spec, at="each")
    want = brute.Brute(model, paths, [batch], call=lambda ids: model(ids)[0]).values(HEADS, 1)
    torch.testing.assert_close(found[1].flatten(-2), want, atol=2e-5, rtol=1e-4)


def test_what_a_plain_module_cannot_be_given():
    model, spec = plain()
    options = dict(edit=bf.Zero(), metric=bf.metrics.target_prob([5]), spec=spec, progress=False)
    with pytest.raises(InvalidArgumentError, match="row 1 has padding on the left, but Plain takes no attention_mask"):
        bf.sweep(model, zoo.batch(padding="left"), **options)
    with pytest.raises(InvalidArgumentError, match="share_prefix=True, but toy is not a causal HuggingFace model"):
        bf.sweep(model, zoo.batch(padding=None), share_prefix=True, **options)
    both_ways = bf.hf.ModelSpec(**{**spec.__dict__, "causal": False})
    with pytest.raises(InvalidArgumentError, match="row 1 has padding, but Plain takes no attention_mask.*one length"):
        bf.sweep(model, zoo.batch(padding="right"), **{**options, "spec": both_ways, "metric": bf.metrics.kl()})


class Wrapped(torch.nn.Module):
    """A user's module around a HuggingFace model, without position_ids and cache."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


def test_a_wrapper_that_takes_less_than_the_model():
    model = Wrapped(zoo.build("llama"))
    cases = [(kind, grid, "right", site) for kind, grid, _, site in CASES]
    exact(model, ("inner.model.layers", "self_attn.o_proj", "mlp.down_proj"), cases)


def test_a_model_that_counts_positions_by_itself_is_not_shifted(monkeypatch):
    """BLOOM takes no position_ids. What its rows share begins where the first of them is edited."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BloomConfig(vocab_size=zoo.VOCAB, hidden_size=48, n_layer=3, n_head=4, pad_token_id=0)
    model, layouts = zoo.randomise(hf.AutoModelForCausalLM.from_config(config)), []
    monkeypatch.setattr(base_run.BaseRun, "__post_init__", spy(base_run.BaseRun.__post_init__, layouts))
    options = dict(edit=bf.Zero(), at="last_prompt", metric=bf.metrics.target_logprob([5, 6]), progress=False)
    with pytest.warns(UserWarning, match="not in the tested list"):
        result = bf.sweep(model, zoo.batch(padding="right"), verify=12, **options)
    assert result.facts["shared_prefix"]
    (layout,) = layouts
    assert layout.begin.tolist() == [0, 0, 0] and "position_ids" not in layout.inputs


def spy(right, layouts):
    def seen(self):
        layouts.append(self.layout)
        right(self)

    return seen
