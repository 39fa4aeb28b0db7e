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
