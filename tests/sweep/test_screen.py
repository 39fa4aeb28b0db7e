"""Gradient screening against differences that know nothing of autograd, and against the exact sweep."""

from __future__ import annotations

import contextlib

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, InvalidTypeError, ModelStateError, NonFiniteError
from bkdfast.hf.spec import BlockSpec, ModelSpec
from bkdfast.sweep.ranks import spearman
from bkdfast.sweep.screen import screen
from tests.hf import zoo

FAMILIES = ["llama", "gpt2", "gemma2", "opt", "mixtral", "falcon"]
TARGETS = [[5, 6, 7], [8], [9, 10]]
STENCIL = ((1, 0.5), (-1, -0.5))
STEP = 2e-3
"""Norms compute in float32 in a float64 model too, so smaller steps drown in rounding."""


def data(padding="left"):
    """Two batches of different size and length."""
    return [zoo.batch(rows=2, tokens=9, padding=padding), zoo.batch(rows=1, tokens=6, padding=padding, seed=9)]


def prompts(batches):
    return [ids[mask.bool()] for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)]


def score(model, prompt, target):
    """Target log-probability of one sample alone, without padding."""
    ids = torch.cat([prompt, torch.tensor(target)])[None]
    with torch.no_grad():
        logprob = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(logprob[len(prompt) + i - 1, token] for i, token in enumerate(target)) / len(target)


def moved(model, layer, heads, change):
    """A plain hook: `z[:, own] = change(z[:, own], head)` of one sample's z."""
    block = bf.hf.describe(model).blocks[layer]

    def hook(module, args):
        z = args[0].clone()
        for head in heads:
            own = slice(head * block.head_dim, (head + 1) * block.head_dim)
            z[0, :, own] = change(z[0, :, own].clone(), head)
        return (z,)

    return model.get_submodule(block.out_proj).register_forward_pre_hook(hook)


def slopes(model, batches, edited, step=STEP):
    """`[L, H, N]`: difference quotients of the metric along z' - z, where `edited(z, layer, head, n, last)` is z'."""
    spec = bf.hf.describe(model)
    found = torch.zeros(spec.layers, zoo.HEADS, len(TARGETS), dtype=torch.float64)
    for n, prompt in enumerate(prompts(batches)):
        for layer in range(spec.layers):
            for head in range(zoo.HEADS):
                last = len(prompt) - 1
                for way, weight in STENCIL:

                    def change(z, head, layer=layer, n=n, way=way, last=last):
                        return z + way * step * (edited(z.clone(), layer, head, n, last) - z)

                    handle = moved(model, layer, [head], change)
                    found[layer, head, n] += weight / step * score(model, prompt, TARGETS[n])
                    handle.remove()
    return found


def close(estimate, expected):
    assert expected.abs().max() > 0.3, "the edits must matter, or the comparison proves nothing"
    torch.testing.assert_close(estimate, expected, atol=5e-3, rtol=2e-3)


def screened(model, batches, edit, metric=None, **options):
    metric = metric or bf.metrics.target_logprob(TARGETS)
    return screen(model, batches, edit=edit, metric=metric, progress=False, **options)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_estimate_is_the_slope_along_the_edit(family, padding):
    # Left padding gives NaN in the eager attention of a float64 Gemma.
    model = zoo.build(family, dtype=torch.float32 if family == "gemma2" else torch.float64)
    if family == "mixtral":
        model.set_experts_implementation("eager")
    source = torch.randn(zoo.LAYERS, zoo.HEADS, bf.hf.describe(model).blocks[0].head_dim)

    def edited(z, layer, head, n, last):
        z[last] = source[layer, head].to(z)
        return z

    batches = data(padding)
    found = screened(model, batches, bf.Patch(source), at="last_prompt")
    expected = slopes(model, batches, edited, 1e-6 if family == "opt" else STEP)  # its ReLUs have kinks
    assert expected.abs().amax((1, 2)).min() > 1e-2, "every layer must matter"
    close(found.estimate, expected)
    expected = torch.stack([score(model, p, t) for p, t in zip(prompts(batches), TARGETS, strict=True)])
    torch.testing.assert_close(found.baseline, expected.double(), atol=1e-5, rtol=1e-5)


def _setting(rows, value):
    def edited(z, layer, head, n, last):
        at = rows(n, last, len(z))
        z[at] = value(z[at], layer, head, n, at)
        return z

    return edited


G = torch.Generator().manual_seed(3)
SOURCE = torch.randn(zoo.LAYERS, zoo.HEADS, 16, generator=G, dtype=torch.float64)
OF_ROWS = torch.randn(3, zoo.LAYERS, zoo.HEADS, 16, generator=G, dtype=torch.float64)
OF_TOKENS = torch.randn(3, 4, zoo.LAYERS, zoo.HEADS, 16, generator=G, dtype=torch.float64)
RESAMPLE = bf.Resample(OF_ROWS, seed=4, at=-2)
EVERY = {
    "zero": (bf.Zero(), _setting(lambda n, last, t: list(range(t)), lambda z, *_: 0 * z)),
    "mean": (
        bf.Mean(SOURCE, at="prompt"),
        _setting(lambda n, last, t: list(range(last + 1)), lambda z, la, h, *_: SOURCE[la, h].expand_as(z)),
    ),
    "scale": (bf.Scale(2.5, at=slice(1, 3)), _setting(lambda n, last, t: [1, 2], lambda z, *_: 2.5 * z)),
    "add": (
        bf.Add(SOURCE, scale=3.0, at="generated"),
        _setting(lambda n, last, t: list(range(last + 1, t)), lambda z, la, h, *_: z + 3 * SOURCE[la, h]),
    ),
    "one vector": (
        bf.Patch(SOURCE[0, 0], at=[4, 0, 2]),
        _setting(lambda n, last, t: [[4, 0, 2][n]], lambda z, *_: SOURCE[0, 0]),
    ),
    "resample": (RESAMPLE, _setting(lambda n, last, t: [last - 1], lambda z, la, h, n, at: RESAMPLE.source[n, la, h])),
    "tokens": (
        bf.Patch(OF_TOKENS, at=slice(2, None)),
        _setting(lambda n, last, t: list(range(2, min(6, t))), lambda z, la, h, n, at: OF_TOKENS[n, : len(at), la, h]),
    ),
}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", EVERY)
def test_every_edit(name, padding, monkeypatch):
    edit, edited = EVERY[name]
    monkeypatch.setitem(globals(), "TARGETS", [[5, 6, 7], [8, 3], [9, 10]])
    model, batches = zoo.build("llama", dtype=torch.float64), [zoo.batch(rows=3, tokens=9, padding=padding)]
    close(screened(model, batches, edit).estimate, slopes(model, batches, edited))


def test_the_estimate_becomes_exact_as_the_edit_shrinks():
    model, batches = zoo.build("llama", dtype=torch.float64), data()
    metric = bf.metrics.target_logprob(TARGETS)
    errors = []
    for factor in (1e-1, 1e-2, 1e-3):
        estimate = screened(model, batches, bf.Scale(1 + factor)).estimate.mean(-1)
        exact = bf.sweep(model, batches, edit=bf.Scale(1 + factor), metric=metric, progress=False).mean.double()
        errors.append(float((estimate - exact).abs().max() / exact.abs().max()))
    assert errors[0] < 0.5 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5


class Linear(torch.nn.Module):
    """Causal averaging instead of attention, no norms and no nonlinearity: logits are linear in every z."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(zoo.VOCAB, 12)
        self.blocks = torch.nn.ModuleList(Averaging() for _ in range(3))
        self.head = torch.nn.Linear(12, zoo.VOCAB)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return (self.head(x),)


class Averaging(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12)

    def forward(self, x):
        tokens = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + self.out(self.value(x).cumsum(1) / tokens)


def linear():
    blocks = tuple(BlockSpec(f"blocks.{i}", f"blocks.{i}.out", None, (), 4, 5, None) for i in range(3))
    return Linear().double().eval(), ModelSpec("linear", blocks, 12, embedding="embed", unembedding="head")


def test_the_estimate_is_exact_for_a_linear_model():
    model, spec = linear()
    batch, metric = zoo.batch(padding=None), bf.metrics.logit_diff(5, 6)
    for edit in (bf.Zero(), bf.Patch(torch.randn(3, 4, 5, dtype=torch.float64), at="last_prompt")):
        exact = bf.sweep(model, batch, edit=edit, metric=metric, spec=spec, progress=False).effects.double()
        for options in ({}, {"steps": 3}, {"steps": 2, "path": "joint"}):
            estimate = screened(model, batch, edit, metric, spec=spec, **options).estimate
            torch.testing.assert_close(estimate, exact, atol=1e-6, rtol=1e-5)
        assert exact.abs().max() > 0.1


def test_encoder():
    """Attention that looks ahead; against plain hooks on the padded batch."""
    model, batch = zoo.build("bert", dtype=torch.float64), zoo.batch(padding="right")
    found = screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6)).estimate
    last = batch["attention_mask"].sum(1) - 1
    block = bf.hf.describe(model).blocks[1]
    own = slice(2 * block.head_dim, 3 * block.head_dim)
    expected = 0
    for way, weight in STENCIL:

        def hook(module, args, way=way):
            z = args[0].clone()
            z[..., own] *= 1 - way * STEP
            return (z,)

        handle = model.get_submodule(block.out_proj).register_forward_pre_hook(hook)
        with torch.no_grad():
            logits = model(**batch).logits[torch.arange(len(last)), last]
        handle.remove()
        expected = expected + weight / STEP * (logits[:, 5] - logits[:, 6])
    close(found[1:2, 2:3], expected[None, None])


def all_moved(model, batches, changes, layers):
    """`[N]`: the metric with `changes[n][layer]` added to the unedited run's z, in all `layers` at once."""
    found = []
    for n, prompt in enumerate(prompts(batches)):
        handles = [
            model.get_submodule(bf.hf.describe(model).blocks[layer].out_proj).register_forward_pre_hook(
                lambda module, args, n=n, layer=layer: (args[0] + changes[n][layer],)
            )
            for layer in layers
        ]
        found.append(score(model, prompt, TARGETS[n]))
        for handle in handles:
            handle.remove()
    return torch.stack(found)


def changes_of(model, batches, factor):
    """`(factor - 1) * z` of every layer, of each sample alone."""
    found = []
    for n, prompt in enumerate(prompts(batches)):
        z = {}
        handles = [
            model.get_submodule(block.out_proj).register_forward_pre_hook(
                lambda module, args, layer=layer, z=z: z.update({layer: (factor - 1) * args[0]})
            )
            for layer, block in enumerate(bf.hf.describe(model).blocks)
        ]
        score(model, prompt, TARGETS[n])
        for handle in handles:
            handle.remove()
        found.append(z)
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
def test_integrated_gradients_add_up_to_the_effect_of_the_whole_path(padding):
    """Which also says which path it is: completeness holds only if the points lie on it."""
    model, batches = zoo.build("gpt2", dtype=torch.float64), data(padding)
    changes = changes_of(model, batches, 0.4)
    base = torch.stack([score(model, p, t) for p, t in zip(prompts(batches), TARGETS, strict=True)])
    joint = screened(model, batches, bf.Scale(0.4), steps=12, path="joint").estimate
    expected = all_moved(model, batches, changes, range(zoo.LAYERS)) - base
    torch.testing.assert_close(joint.sum((0, 1)), expected, atol=1e-3, rtol=1e-3)
    by_layer = screened(model, batches, bf.Scale(0.4), steps=8).estimate
    for layer in range(zoo.LAYERS):
        expected = all_moved(model, batches, changes, [layer]) - base
        torch.testing.assert_close(by_layer[layer].sum(0), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(joint.sum(1), by_layer.sum(1), atol=0.05)


@pytest.mark.parametrize("family", [*FAMILIES, "bert"])
def test_blocks_before_the_layer_on_the_path_need_not_run(family, monkeypatch):
    model, batch = zoo.build(family), zoo.batch(padding="right")
    metric, runs = bf.metrics.logit_diff(5, 6), []
    options = dict(edit=bf.Scale(0.5), metric=metric, at="prompt", steps=2)
    handle = bf.hf.spec.submodule(model, bf.hf.describe(model).blocks[0].norms[0]).register_forward_hook(
        lambda *_: runs.append(1)
    )
    found = screened(model, batch, **options).estimate
    assert len(runs) == 3, "the unedited run, and layer 0's two points"
    handle.remove()
    monkeypatch.setattr("bkdfast.hf.prefix.Recording.resume", lambda *_: contextlib.nullcontext())
    torch.testing.assert_close(found, screened(model, batch, **options).estimate, atol=1e-5, rtol=1e-4)


def test_integrated_gradients_mend_a_saturated_probability():
    """Logits are linear in z, so all that bends is the softmax, which is near 1 at the unedited run."""
    torch.manual_seed(2)
    model, spec = linear()
    with torch.no_grad():
        model.head.weight *= 20
        model.head.bias *= 20
        batch = zoo.batch(rows=6, padding=None)
        best = model(**batch)[0][:, -1].argmax(-1)
    metric = bf.metrics.target_prob([[int(token)] for token in best])
    exact = bf.sweep(model, batch, edit=bf.Zero(), metric=metric, spec=spec, progress=False)
    assert exact.baseline.max() > 0.95
    true = exact.effects.double()
    plain, better = (screened(model, batch, bf.Zero(), metric, spec=spec, steps=n) for n in (1, 4))
    errors = [float((found.estimate - true).abs().mean() / true.abs().mean()) for found in (plain, better)]
    assert errors[1] < 0.7 * errors[0]
    assert spearman(better.mean.flatten(), true.mean(-1).flatten()).rho > 0.9
    assert spearman(plain.mean.flatten(), true.mean(-1).flatten()).rho < 0.87


def test_divergence_from_the_unedited_model():
    """Zero with a zero gradient where it is taken: refused; along a path, or from another model, it has one."""
    model, batch = zoo.build("llama"), zoo.batch()
    for metric in (bf.metrics.kl(), bf.metrics.js()):
        with pytest.raises(InvalidArgumentError, match="its gradient is zero there.*steps="):
            screened(model, batch, bf.Zero(), metric)
    found = screened(model, batch, bf.Scale(0.9), bf.metrics.kl(), steps=2)
    assert found.baseline.abs().max() < 1e-6 and found.mean.abs().max() > 1e-5
    other = screened(model, batch, bf.Zero(), bf.metrics.kl(reference=zoo.build("llama", seed=1)))
    assert other.baseline.min() > 0.1 and other.mean.abs().max() > 1e-2


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_parameters_get_no_gradient_and_stay_as_they_were(context):
    model = zoo.build("llama")
    kept = model.model.layers[0].mlp.up_proj.weight
    kept.grad = torch.ones_like(kept)
    model.model.norm.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    with context():
        batch = zoo.batch()
        found = screened(model, batch, bf.Zero(), bf.metrics.target_logprob([5]))
        with pytest.raises(InvalidArgumentError):
            screened(model, batch, bf.Zero(), bf.metrics.rank(5))
    assert found.mean.abs().max() > 1e-2 and not found.estimate.requires_grad
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert all(p.grad is None for p in model.parameters() if p is not kept)
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_prepared_model_and_a_frozen_one_give_the_same():
    model, batch = zoo.build("llama"), zoo.batch()
    metric = bf.metrics.target_logprob([5, 6])
    expected = screened(model, batch, bf.Zero(), metric).estimate
    handle = bf.prepare(model)
    try:
        assert torch.equal(screened(model, batch, bf.Zero(), metric).estimate, expected)
    finally:
        handle.remove()
    model.requires_grad_(False)
    assert torch.equal(screened(model, batch, bf.Zero(), metric).estimate, expected)


def test_metrics_of_whole_rows_and_losses():
    model, batch = zoo.build("llama"), zoo.batch()
    own = bf.metrics.custom(lambda logits: logits[:, -1, 5] - logits[:, -1, 6], name="own")
    expected = screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6)).estimate
    torch.testing.assert_close(screened(model, batch, bf.Zero(), own).estimate, expected)
    loss = screened(model, batch, bf.Zero(), bf.metrics.loss([5, 6])).estimate
    torch.testing.assert_close(loss, -screened(model, batch, bf.Zero(), bf.metrics.target_logprob([5, 6])).estimate)
    sharp = bf.metrics.custom(lambda logits: (0 * logits[:, -1, 5]).sqrt(), name="sharp")
    with pytest.raises(NonFiniteError, match="gradient of the sharp of sample 0 with respect to layer 0, head 0"):
        screened(model, batch, bf.Zero(), sharp)


def test_bfloat16_is_near_float32():
    batch, metric = zoo.batch(), bf.metrics.target_logprob([5, 6])
    exact, rough = (
        screened(zoo.build("llama", dtype=dtype), batch, bf.Zero(), metric).mean
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert (rough - exact).norm() < 0.3 * exact.norm()


def test_refusals():
    model, batch = zoo.build("llama"), zoo.batch()
    for metric in (bf.metrics.accuracy([5, 6]), bf.metrics.rank(5)):
        with pytest.raises(InvalidArgumentError, match=f"{metric.name} has no gradient"):
            screened(model, batch, bf.Zero(), metric)
    with pytest.raises(InvalidTypeError, match="one by one"):
        screened(model, batch, bf.Zero(), [bf.metrics.rank(5)])
    with pytest.raises(InvalidArgumentError, match="steps=0"):
        screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6), steps=0)
    with pytest.raises(InvalidArgumentError, match="path='head' is not one of layer, joint"):
        screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6), path="head")
    with pytest.raises(InvalidArgumentError, match="fills in layer and head itself"):
        screened(model, batch, bf.Zero(1), bf.metrics.logit_diff(5, 6))
    with pytest.raises(InvalidArgumentError, match="targets for 3 samples, but the data has 2"):
        screened(model, zoo.batch(rows=2), bf.Zero())
    with pytest.raises(InvalidArgumentError, match="after the last token"):
        screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6), at=50)
    with bf.intervene(model, bf.Zero(0, 1)), pytest.raises(InvalidArgumentError, match="inside intervene"):
        screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6))
    trained = zoo.build("llama").train()
    trained.gradient_checkpointing_enable()
    with pytest.raises(ModelStateError, match="gradient checkpointing"):
        screened(trained, batch, bf.Zero(), bf.metrics.logit_diff(5, 6))
    with torch.inference_mode():
        loaded = zoo.build("llama")
    with pytest.raises(ModelStateError, match="loaded under torch.inference_mode"):
        screened(loaded, batch, bf.Zero(), bf.metrics.logit_diff(5, 6))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="sample 0 is nan without any edit"):
        screened(model, batch, bf.Zero(), bf.metrics.logit_diff(5, 6))


def test_a_model_that_passes_no_gradient_on_is_named(monkeypatch):
    model = zoo.build("llama")
    forward = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: forward(x.detach()))
    with pytest.raises(ModelStateError, match="no gradient flows from the heads"):
        screened(model, zoo.batch(), bf.Zero(), bf.metrics.logit_diff(5, 6))


def test_out_of_memory_says_what_would_fit(monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("pretend")

    monkeypatch.setattr(torch.autograd, "grad", full)
    with pytest.raises(torch.OutOfMemoryError, match="batch of 4 rows and 11 tokens.*batches of 2 rows"):
        screened(zoo.build("llama"), zoo.batch(rows=4), bf.Zero(), bf.metrics.logit_diff(5, 6))


def test_everything_says_that_it_is_an_estimate():
    found = screened(zoo.build("llama"), zoo.batch(), bf.Zero(), bf.metrics.logit_diff(5, 6))
    assert "attribution patching" in found.facts["estimate"] and "ESTIMATED" in repr(found)
    frame = found.to_pandas()
    assert list(frame) == ["layer", "head", "estimate", "stderr"] and frame.estimate.is_monotonic_decreasing
    assert found.top(1)[0] == (frame.layer[0], frame["head"][0])
    axes = found.plot().axes
    assert "estimate" in axes[0].get_title("left") and "estimated" in axes[1].get_ylabel()
    assert "integrated" in screened(
        zoo.build("llama"), zoo.batch(), bf.Zero(), bf.metrics.logit_diff(5, 6), steps=2
    ).facts["estimate"]  # fmt: skip
    with pytest.raises(InvalidArgumentError, match="k=13"):
        found.top(13)
