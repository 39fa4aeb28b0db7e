"""Norms that feed the monitor: which are taken over, what they compute, and what they leave behind."""

from __future__ import annotations

import copy

import pytest
import torch

import bkdfast as bf
from bkdfast.monitor import tap
from bkdfast.monitor.fuse import Replacement, recognise, successors
from bkdfast.ops.norm_tap import LAYER, RMS, RMS_ONE, RMS_WIDE
from tests.hf import zoo
from tests.monitor.test_monitor import directions_for, extremes, residual_streams

POST_NORM = {"olmo2", "bert", "distilbert"}
KINDS = {
    "llama": RMS, "qwen2": RMS, "qwen3": RMS, "mistral": RMS, "phi3": RMS, "mixtral": RMS, "olmo2": RMS_WIDE,
    "gemma2": RMS_ONE, "gemma3_text": RMS_ONE,
    "gpt2": LAYER, "gpt_neox": LAYER, "falcon": LAYER, "opt": LAYER, "bert": LAYER, "distilbert": LAYER,
}  # fmt: skip


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_the_norm_reads_the_blocks_output(family):
    """The very tensor, so that watching the norm is watching the block."""
    model, spec = zoo.build(family), bf.hf.describe(zoo.build(family))
    paths = [block.input_norm for block in spec.blocks[1:]] + [spec.final_norm]
    assert all(path is None for path in paths[:-1]) == (family in POST_NORM)
    found = {}

    def keep(key, value):
        found[key] = (value[0] if isinstance(value, tuple) else value).detach().clone()

    for layer, path in enumerate(paths):
        if path:
            block = model.get_submodule(spec.blocks[layer].block)
            block.register_forward_hook(lambda m, a, out, layer=layer: keep(("block", layer), out))
            norm = model.get_submodule(path)
            norm.register_forward_pre_hook(lambda m, args, layer=layer: keep(("norm", layer), args[0]))
    with torch.no_grad():
        model(**zoo.batch())
    for layer, path in enumerate(paths):
        assert not path or torch.equal(found["block", layer], found["norm", layer]), layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_the_formula_of_every_family_is_recognised(family, dtype):
    model = zoo.build(family).to(dtype)
    spec = bf.hf.describe(model)
    wanted = {RMS, RMS_WIDE} if dtype == torch.float32 and KINDS[family] in (RMS, RMS_WIDE) else {KINDS[family]}
    for path in spec.blocks[0].norms:
        torch.nn.init.normal_(model.get_submodule(path).weight)  # with weights of 1 two formulas are the same
        norm = recognise(model.get_submodule(path), spec.width)
        assert norm is not None and norm.kind in wanted, (path, norm)
    if family not in POST_NORM:
        assert all(successors(model, spec))


class Clamped(torch.nn.Module):
    def __init__(self, limit):
        super().__init__()
        self.weight, self.eps, self.limit = torch.nn.Parameter(torch.randn(16)), 1e-6, limit

    def forward(self, x):
        x = x.clamp(-self.limit, self.limit)
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


class Scaled(torch.nn.Module):
    def __init__(self, factor=1.0, eps=1e-6):
        super().__init__()
        self.weight, self.eps, self.factor = torch.nn.Parameter(torch.randn(16)), eps, factor

    def forward(self, x):
        return self.factor * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_other_modules_are_left_alone():
    assert recognise(Scaled(), 16) is not None
    assert recognise(Scaled(factor=1.001), 16) is None
    assert recognise(Scaled(eps=1e-5), 16) is None, "an eps that is not the one in use"
    assert recognise(torch.nn.Linear(16, 16), 16) is None
    assert recognise(torch.nn.LayerNorm(16, elementwise_affine=False), 16) is None
    assert recognise(Scaled(), 8) is None
    assert recognise(torch.nn.BatchNorm1d(16).eval(), 16) is None
    assert recognise(Clamped(1e9), 16) is not None
    assert recognise(Clamped(100.0), 16) is None, "massive activations go beyond any ordinary trial"
    hooked = Scaled()
    hooked.register_forward_pre_hook(lambda module, args: (args[0] + 3,))
    assert recognise(hooked, 16) is None, "its input is not the block's output"


class Conditional(Scaled):
    def forward(self, x, condition):
        return super().forward(x) * condition


def test_a_norm_that_wants_more_arguments_is_left_alone():
    assert recognise(Conditional(), 16) is None


@pytest.mark.parametrize("tokens", [4, 40], ids=["step buffer", "one pass"])
@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_same_cosines_and_same_logits(family, tokens):
    """Small calls go through the step buffer, large ones do not; both against plain hooks and the model itself."""
    model, batch, directions = zoo.build(family), zoo.batch(tokens=tokens), directions_for()
    low, high = extremes(residual_streams(model, batch), batch["attention_mask"], directions)
    monitor = bf.Monitor(directions)
    with torch.no_grad():
        logits = model(**batch)[0]
        with monitor.attach(model):
            watched = model(**batch)[0]
    seen = monitor.collect()
    torch.testing.assert_close(seen.low[:, 0].double(), low, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.high[:, 0].double(), high, atol=1e-5, rtol=0)
    torch.testing.assert_close(watched, logits, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(module.__dict__.get("forward"), Replacement) for module in model.modules())


def test_not_fused_leaves_the_logits_alone():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    with torch.no_grad():
        logits = model(**batch)[0]
        with monitor.attach(model, fuse=False):
            assert torch.equal(model(**batch)[0], logits)
    assert len(monitor.collect()) == 3


def calls(monkeypatch, *names):
    """Counts of the ops that a tap calls."""
    count = dict.fromkeys(names, 0)
    for name in names:
        op = getattr(tap, name)

        def counted(*args, name=name, op=op, **kwargs):
            count[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(tap, name, counted)
    return count


def test_a_decode_step_is_one_launch(monkeypatch):
    model, monitor = zoo.build("llama"), bf.Monitor(directions_for())
    count = calls(monkeypatch, "cosine_monitor", "norm_tap", "norm_monitor")
    with torch.no_grad(), monitor.attach(model):
        model(**zoo.batch(tokens=4))
    assert count == {"cosine_monitor": 1, "norm_tap": zoo.LAYERS, "norm_monitor": 0}
    with torch.no_grad(), monitor.attach(model):
        model(**zoo.batch(tokens=40))
    assert count == {"cosine_monitor": 1, "norm_tap": zoo.LAYERS, "norm_monitor": zoo.LAYERS}


@pytest.mark.parametrize("how", ["gradient", "autocast", "float32 input"])
def test_where_the_op_cannot_stand_in_the_module_serves(how, monkeypatch):
    model, batch, directions = zoo.build("llama"), zoo.batch(tokens=4), directions_for()
    count = calls(monkeypatch, "cosine_monitor", "norm_tap", "norm_monitor")
    monitor = bf.Monitor(directions)
    with monitor.attach(model):
        if how == "gradient":
            model(**batch)[0].sum().backward()
            assert model.get_submodule("model.layers.1.input_layernorm").weight.grad.abs().sum() > 0
        elif how == "autocast":
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                model(**batch)
        else:  # the last norm sees another dtype: what is in the step buffer by then is observed all the same
            model.model.norm.bfloat16()
            with torch.no_grad():
                model.model(**batch)
    assert count["norm_monitor"] == 0
    assert (count["norm_tap"], count["cosine_monitor"]) == (
        (0, zoo.LAYERS) if how != "float32 input" else (zoo.LAYERS - 1, 2)
    )
    seen = monitor.collect()
    assert torch.isfinite(seen.low[:, 0]).all(), "every block was observed"


def test_a_copy_of_a_watched_model_is_not_watched():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    with torch.no_grad(), monitor.attach(model):
        twin = copy.deepcopy(model)
        twin.model.norm.weight.zero_()
        assert not twin(**batch)[0].any() and model(**batch)[0].any()
    assert len(monitor.collect()) == 3


def stopped_forward(model, batch, where):
    """A forward that dies in the module at path `where`."""

    def stop(module, args):
        raise RuntimeError("stopped")

    handle = model.get_submodule(where).register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        model(**batch)
    handle.remove()


@pytest.mark.parametrize("tokens", [4, 40])
@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("where", ["model.layers.0.mlp", "model.layers.1.mlp", "lm_head"])
def test_what_a_stopped_forward_did_not_show_is_not_clean(where, fuse, tokens):
    model, batch, monitor = zoo.build("llama"), zoo.batch(tokens=tokens), bf.Monitor(directions_for())
    monitor.calibrate(model, [zoo.batch(tokens=tokens, seed=seed) for seed in range(4)] + [batch], progress=False)
    with torch.no_grad(), monitor.attach(model, fuse=fuse):
        stopped_forward(model, batch, where)
        model(**batch)
    found = [verdict.status for verdict in monitor.verdicts()]
    complete = "clean" if where == "lm_head" else "incomplete"
    assert found == [complete] * 3 + ["clean"] * 3


def test_what_a_stopped_forward_showed_counts():
    """A NaN of the first block is reported though the forward stops in the third, while it is in the step buffer."""
    model, batch, monitor = zoo.build("llama"), zoo.batch(tokens=4), bf.Monitor(directions_for())
    monitor.calibrate(model, batch, progress=False)
    with torch.no_grad(), monitor.attach(model):
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
        stopped_forward(model, batch, f"model.layers.{zoo.LAYERS - 1}.mlp")
    assert all(verdict.flagged and verdict.nonfinite for verdict in monitor.verdicts())


def test_norms_called_on_their_own_are_not_traffic():
    """A logit lens: the final norm on the hidden states of every layer, outside the model's own forward."""
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    monitor.calibrate(model, batch, progress=False)
    with torch.no_grad(), monitor.attach(model):
        hidden = model(**batch, output_hidden_states=True).hidden_states
        for state in hidden[:-1]:
            model.lm_head(model.model.norm(state * 5 + 1))
    assert [verdict.status for verdict in monitor.verdicts()] == ["clean"] * 3


def test_a_norm_in_two_places_is_not_taken_over():
    model = zoo.build("llama")
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    assert successors(model, bf.hf.describe(model))[0] is None
    assert successors(model, bf.hf.describe(model))[1] is not None


def test_a_norm_that_sees_part_of_the_tokens_leaves_requests_incomplete():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    monitor.calibrate(model, batch, progress=False)
    with torch.no_grad(), monitor.attach(model):
        norm = model.model.norm.forward
        model.model.norm.forward = lambda hidden: norm(hidden[:, -1:])
        model(**batch)
        del model.model.norm.forward
    assert [verdict.status for verdict in monitor.verdicts()] == ["incomplete"] * 3


def test_training_of_biases_alone():
    model, batch = zoo.build("gpt2"), zoo.batch()
    model.requires_grad_(False)
    bias = model.transformer.h[1].ln_1.bias.requires_grad_()
    with bf.Monitor(directions_for()).attach(model):
        model(**batch)[0].sum().backward()
    assert bias.grad.abs().sum() > 0


def test_forward_mode_gradients_are_kept():
    from torch.autograd import forward_ad

    model = zoo.build("gpt2", attention="eager").requires_grad_(False)
    x = torch.randn(1, 4, 48)
    with bf.Monitor(directions_for()).attach(model), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.randn_like(x))
        logits = model(inputs_embeds=dual).logits
        assert forward_ad.unpack_dual(logits).tangent.norm() > 0


def test_a_forward_wrapped_while_attached_does_nothing_after():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    with torch.no_grad():
        logits = model(**batch)[0]
        with monitor.attach(model):
            ours = model.model.norm.forward
            model.model.norm.forward = lambda hidden: ours(hidden)
            model(**batch)
        assert torch.equal(model(**batch)[0], logits)
    assert len(monitor.collect()) == 3


def test_attached_under_inference_mode_and_left_outside():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    with torch.inference_mode():
        context = monitor.attach(model)
        context.__enter__()
        model(**batch)
    context.__exit__(None, None, None)
    assert len(monitor.collect()) == 3 and monitor._tap is None


def test_a_model_without_final_norm():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=48, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        do_layer_norm_before=False, max_position_embeddings=64,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    assert bf.hf.describe(model).final_norm is None
    monitor = bf.Monitor(directions_for(layers=2))
    with torch.no_grad(), monitor.attach(model):
        model(torch.arange(8).view(1, 8))
    assert monitor.collect().tokens.tolist() == [[8, 0]]
