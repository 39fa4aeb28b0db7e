"""What a sweep cannot do, or what cannot show, is said before anything runs; nothing of the model is left changed."""

from __future__ import annotations

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, InvalidTypeError, ModelStateError
from bkdfast.sweep import base as base_run
from tests.hf import zoo
from tests.sweep import brute, kinds
from tests.sweep.brute import Brute

L, H = zoo.LAYERS, zoo.HEADS
LONG = zoo.batch(tokens=126, padding=None)  # of a context of 128


def sweep(family="llama", data=None, model=None, **options):
    defaults = dict(edit=bf.Zero(), metric=bf.metrics.target_logprob([5]), progress=False)
    return bf.sweep(model or kinds.model(family), zoo.batch() if data is None else data, **{**defaults, **options})


@contextlib.contextmanager
def no_forward(model):
    """No part of the model is called, and it is left as it was."""
    calls, right = [], torch.nn.Module._call_impl

    def counted(self, *args, **kwargs):
        calls.append(type(self))
        return right(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_call_impl", counted)
        yield
    assert not calls
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)


BEFORE = {
    "target beyond the context": (
        dict(data=LONG, metric=bf.metrics.target_logprob([5, 6, 7])),
        r"129 tokens \(prompt and target\) do not fit the model's context of 128",
    ),
    "a second metric's target beyond it": (
        dict(data=LONG, metric=[bf.metrics.logit_diff(5, 6), bf.metrics.target_prob([5] * 40)]),
        "166 tokens .* do not fit",
    ),
    "edit after the last token": (
        dict(at="generated", metric=bf.metrics.logit_diff(5, 6)),
        r"at='generated' edits after the last token of row 0, which has 11 prompt tokens and 0 of its target",
    ),
    "position after the last token": (
        dict(at=11, metric=bf.metrics.logit_diff(5, 6)),
        "at=11 edits after the last token of row 0",
    ),
    "position that one row lacks": (
        dict(at=9, metric=bf.metrics.logit_diff(5, 6)),
        "at=9 edits after the last token of row 2, which has 9 prompt tokens",
    ),
    "one of several positions": (
        dict(positions=[0, 30], metric=bf.metrics.logit_diff(5, 6)),
        "at=30 edits after the last token of row 0",
    ),
    "position before the first token": (
        dict(at=-10),
        "at=-10 is before the first token of row 2, which has 9 tokens",
    ),
    "a position for each of other rows": (dict(at=[1, 2]), "at= gives 2 positions for a batch of 3 rows"),
    "a position for each row of several batches": (
        dict(data=kinds.data("left"), at=[1, 2, 3]),
        "has a position for each row, but there are 2 batches",
    ),
    "a source for other rows": (
        dict(edit=bf.Patch(torch.zeros(2, L, H, 16))),
        "has a source for 2 rows, but a variant has 3 rows",
    ),
    "a source of another model": (
        dict(edit=bf.Patch(torch.zeros(L + 1, H, 16))),
        r"source of .* has shape \(4, 4, 16\)",
    ),
    "a source of other heads": (dict(edit=bf.Mean(torch.zeros(L, H + 1, 16))), r"has shape \(3, 5, 16\)"),
    "a source for a row, several batches": (
        dict(data=kinds.data("left"), edit=bf.Resample(torch.randn(3, L, H, 16))),
        "has a source for each row, but there are 2 batches",
    ),
    "a row without a mask": (
        dict(data={"input_ids": zoo.batch()["input_ids"]}),
        r"row 1 is padded on the left \(token 0\), but no attention_mask",
    ),
    "heads that are not there": (dict(heads=[(0, 1), (3, 0)]), r"head \(3, 0\) is out of range: 3 layers of 4 heads"),
    "a head twice in a set": (dict(heads=[[(0, 1), (0, 1)]]), "set 0 of heads= names a head twice"),
    "an edit that names its head": (dict(edit=bf.Zero(0, 1)), "a sweep fills in layer and head itself"),
    "an edit of neurons": (dict(edit=bf.Zero(neuron=3)), "a sweep fills in layer and head itself"),
    "no positions": (dict(positions=[]), "positions= is empty"),
    "no metric": (dict(metric=[]), "metric is an empty list"),
    "two metrics of a name": (
        dict(metric=[bf.metrics.target_logprob([5]), bf.metrics.target_logprob([6])]),
        "metrics 0 and 1 are both called",
    ),
    "a mask of pairs of tokens": (
        dict(data={**zoo.batch(), "attention_mask": torch.ones(3, 1, 11, 11)}),
        r"attention_mask \(3, 1, 11, 11\) must have the shape of input_ids \(3, 11\)",
    ),
    "no prefix to share": (dict(at=0, share_prefix=True), "the first edited token is a prompt's first"),
    "no prefix for all positions": (dict(at="all", share_prefix=True), "the first edited token is a prompt's first"),
    "no room in a batch": (dict(variants=0), "variants=0: at least one head has to be in a batch"),
}


@pytest.mark.parametrize("name", BEFORE)
def test_refused_before_anything_runs(name):
    options, message = BEFORE[name]
    with no_forward(kinds.model("llama")), pytest.raises(InvalidArgumentError, match=message):
        sweep(**options)


def test_empty_targets():
    for targets in ([], [[]], [[5], []]):
        with pytest.raises(InvalidArgumentError, match="no targets were given|target [01] is empty"):
            bf.metrics.target_prob(targets)
    with pytest.raises(InvalidTypeError, match="is a string.*pass tokenizer="):
        bf.metrics.target_prob("Sure")


def test_a_prompt_that_fills_the_context():
    """It can be scored at its last token; only a target has no room."""
    data = zoo.batch(rows=1, tokens=128, padding=None)
    result = sweep(data=data, at="last_prompt", heads=kinds.FEW, metric=bf.metrics.logit_diff(5, 6))
    variants = [[brute.Change(layer, head, "last_prompt", lambda x, place: 0 * x)] for layer, head in kinds.FEW]
    want = Brute(kinds.model("llama"), "llama", [data]).effects(variants, brute.logit_diff(5, 6))
    brute.close(torch.stack([result.effects[place] for place in kinds.FEW]), want)
    with pytest.raises(InvalidArgumentError, match="129 tokens"):
        sweep(data=data)


BLIND = [
    dict(at="last_prompt", metric=bf.metrics.loss()),
    dict(at="generated", metric=bf.metrics.target_logprob([5])),
    dict(positions=[10, "last_prompt"], metric=bf.metrics.loss(), data=zoo.batch(padding=None)),
    dict(at=10, metric=bf.metrics.accuracy(), data=zoo.batch(padding=None)),
]


@pytest.mark.parametrize("share", [None, False])
@pytest.mark.parametrize("family", ["llama", "falcon"])
@pytest.mark.parametrize("options", BLIND, ids=range(len(BLIND)))
def test_a_metric_that_reads_only_before_the_edit(options, family, share):
    """Legal, and exactly without effect; a message says so."""
    with pytest.warns(UserWarning, match=r"reads no position at or after the edit \(at=.*\): its effect is zero"):
        result = sweep(family, share_prefix=share, **options)
    assert (result.effects == 0).all() and torch.isfinite(result.baseline).all()


def test_out_of_memory_at_one_variant_says_what_would_fit(monkeypatch):
    def none(self, variants, start):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    model = zoo.build("llama")
    monkeypatch.setattr(base_run.BaseRun, "scores", none)
    options = dict(edit=bf.Zero(), metric=bf.metrics.target_logprob([5]), progress=False)
    message = (
        "one variant of a batch of 3 rows and 11 tokens does not fit into memory; batches of 1 rows need about half"
    )
    with pytest.raises(torch.OutOfMemoryError, match=message):
        bf.sweep(model, zoo.batch(), **options)
    with pytest.raises(
        torch.OutOfMemoryError, match="1 rows and 2 tokens does not fit into memory; use shorter prompts"
    ):
        bf.sweep(model, zoo.batch(rows=1), **{**options, "metric": bf.metrics.target_logprob([5, 6])}, at="last_prompt")
    monkeypatch.undo()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert bf.sweep(model, zoo.batch(), **options).effects.abs().max() > 0


def test_a_failure_half_way_leaves_the_model_as_it_was():
    model, batch = zoo.build("gpt2"), zoo.batch()
    with torch.no_grad():
        before = model(**batch).logits

    calls = []

    def fails(logits):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("in the user's metric")
        return logits[:, -1].std(-1)

    for share in (None, False):
        calls.clear()
        with pytest.raises(ValueError, match="in the user's metric"):
            bf.sweep(
                model, batch, edit=bf.Zero(), at="last_prompt", metric=bf.metrics.custom(fails), variants=1,
                share_prefix=share, progress=False,
            )  # fmt: skip
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, before)
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
        assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["llama", "falcon", "bert"])
def test_a_plan_runs_nothing_of_the_model(family, capsys):
    model = kinds.model(family)
    causal = family != "bert"
    metric = bf.metrics.target_prob([5, 6]) if causal else bf.metrics.logit_diff(5, 6)
    data = zoo.batch(tokens=40, padding="right")
    with no_forward(model):
        plan = bf.sweep(model, data, edit=bf.Zero(), at="last_prompt", metric=metric, plan=True)
    text = str(plan)
    print(text)
    assert "3 layers x 4 heads" in text and "3 samples" in text
    assert re.search(r"flops .* instead of .*: [\d.]+x fewer than a full forward for each variant", text)
    assert re.search(r"memory +about .*B beyond the model", text) and re.search(r"time +at least", text)
    assert ("columns run for a variant" in text) == causal and plan.loop_flops > plan.flops > 0
    assert plan.seconds > 0


def test_a_plan_says_what_cannot_show():
    plan = sweep(at="last_prompt", metric=bf.metrics.loss(), plan=True)
    assert "note     the metric reads no position at or after the edit" in str(plan)


def test_checkpointing_in_train_mode():
    """It takes the keys and values away that variants would share."""
    model = zoo.build("llama")
    options = dict(edit=bf.Zero(), at="last_prompt", metric=bf.metrics.target_logprob([5]), progress=False)
    wanted = bf.sweep(model, zoo.batch(), **options)
    model.train()
    model.gradient_checkpointing_enable()
    for module in model.modules():  # which would be reason enough not to share
        module._forward_hooks.clear()
    found = bf.sweep(model, zoo.batch(), **options)
    assert wanted.facts["shared_prefix"] and not found.facts["shared_prefix"]
    torch.testing.assert_close(found.effects, wanted.effects, atol=2e-5, rtol=1e-4)


def test_inside_intervene():
    model = kinds.model("llama")
    with bf.intervene(model, bf.Zero(0, 1)), pytest.raises(InvalidArgumentError, match="cannot run inside intervene"):
        sweep()


def test_in_another_thread():
    """Edits belong to the model, not to a thread: a second sweep of it would measure the first one's edits."""
    model, refused = zoo.build("llama"), []

    def meanwhile(logits):
        for call in (lambda: sweep(model=model), lambda: bf.intervene(model, bf.Zero(0, 1)).__enter__()):
            with ThreadPoolExecutor(1) as pool, pytest.raises(ModelStateError, match="sweep is running on this model"):
                pool.submit(call).result()
            refused.append(1)
        return logits[:, -1, 5]

    found = sweep(model=model, heads=kinds.FEW, metric=bf.metrics.custom(meanwhile))
    assert len(refused) >= 4
    want = sweep(heads=kinds.FEW, metric=bf.metrics.custom(lambda logits: logits[:, -1, 5]))
    torch.testing.assert_close(found.effects, want.effects, equal_nan=True)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_positions_of_the_users_own():
    """They are made from the mask; others would be silently ignored."""
    batch = zoo.batch(padding=None)
    own = {**batch, "position_ids": torch.arange(11).expand(3, 11)}
    assert torch.equal(sweep(data=own).effects, sweep(data=batch).effects)
    with pytest.raises(InvalidArgumentError, match="position_ids"):
        sweep(data={**batch, "position_ids": torch.arange(11).expand(3, 11) + 4})
