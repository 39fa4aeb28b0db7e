"""Corners where the engine's reuse of the base run and the model's own ways meet."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from tests.hf import zoo

TARGETS = [[5, 6, 7], [8, 9], [9, 10, 11, 12]]


def sweep(model, batch, metric, **options):
    """The result, every cell of it checked with plain hooks in all likelihood."""
    return bf.sweep(model, batch, edit=bf.Zero(), metric=metric, verify=40, progress=False, **options)


def test_whole_rows_are_read_from_before_the_edit_too():
    """A custom metric gets the last prompt token's logits, although the edit comes after it."""
    metric = bf.metrics.custom(lambda logits: logits[:, :, 5].sum(1), "target", targets=TARGETS, name="sum")
    options = dict(heads=[(1, 0), (1, 2), (2, 1)], positions=[6, "generated"], variants=1)
    result = sweep(zoo.build("llama"), zoo.batch(), metric, **options)
    assert result.facts["shared_prefix"] and result.effects[1, :3:2].abs().max() > 0.1


def test_a_model_that_counts_positions_itself_skips_holes_in_the_mask():
    """OPT counts real tokens, also where a mask has holes; its rows are not given other positions."""
    for padding in ("left", "right", None):
        batch = zoo.batch(tokens=14, padding=padding)
        batch["attention_mask"][0, 4:6] = 0
        result = sweep(zoo.build("opt"), batch, bf.metrics.target_logprob([[5, 6]] * 3), at="last_prompt")
        assert result.facts["largest_error"] < 1e-5 and result.effects.abs().max() > 0.1


def test_labels_of_a_data_collator_are_left_out():
    """With labels a model returns its loss before the logits."""
    batch = zoo.batch()
    labelled = batch | {"labels": batch["input_ids"].clone()}
    model, metrics = zoo.build("llama"), [bf.metrics.logit_diff(5, 6), bf.metrics.target_logprob([5, 6])]
    want, found = (sweep(model, data, metrics, at="last_prompt") for data in (batch, labelled))
    assert all(torch.equal(found[name].effects, want[name].effects) for name in want)


def test_router_logits_are_not_asked_for():
    """A Mixtral that was trained returns an auxiliary loss first, and cannot compute it for a part of the tokens."""
    model = zoo.build("mixtral")
    options = dict(at="last_prompt", heads=[(0, 1), (1, 2)])
    want = sweep(model, zoo.batch(), bf.metrics.logit_diff(5, 6), **options)
    model.config.output_router_logits = True
    found = sweep(model, zoo.batch(), bf.metrics.logit_diff(5, 6), **options)
    torch.testing.assert_close(found.effects, want.effects, equal_nan=True)
    assert model.config.output_router_logits


def test_heads_as_tensors():
    """`top()` of another library, or nonzero() of a mask: numbers in tensors are numbers."""
    model, pairs = zoo.build("llama"), [(0, 1), (1, 2)]
    for heads in (torch.tensor(pairs), torch.tensor([pairs]), [torch.tensor(pairs), [(2, 0)]]):
        plain = torch.as_tensor(heads[0]).tolist()
        listed = heads.tolist() if isinstance(heads, torch.Tensor) else [plain, [(2, 0)]]
        want, found = (
            sweep(model, zoo.batch(), bf.metrics.logit_diff(5, 6), at="last_prompt", heads=given)
            for given in (listed, heads)
        )
        torch.testing.assert_close(found.effects, want.effects, equal_nan=True)


def test_positions_as_tensors():
    """An axis of positions, or one position, may be numbers of torch or NumPy."""
    model, metric = zoo.build("llama"), bf.metrics.logit_diff(5, 6)
    want = sweep(model, zoo.batch(), metric, positions=[3, 4])
    for given in (torch.arange(3, 5), np.arange(3, 5)):
        found = sweep(model, zoo.batch(), metric, positions=given)
        assert torch.equal(found.effects, want.effects) and found.coords["position"] == want.coords["position"]
    found = sweep(model, zoo.batch(), metric, at=np.int64(3), positions=None)
    torch.testing.assert_close(found.effects, want.effects[:, :, 0])


def test_an_axis_from_the_first_token_on_shares_prefixes():
    """A map of layers and positions begins at token 0, but most of its variants do not."""
    batch, metric = zoo.batch(tokens=30), bf.metrics.target_logprob(TARGETS)
    options = dict(site="residual", positions=range(25), variants=4)
    for family in ("llama", "mistral", "falcon"):
        model = zoo.build(family)
        result = sweep(model, batch, metric, **options)
        assert result.facts["shared_prefix"] and result.effects.abs().max() > 0.1
        plan = bf.sweep(model, batch, edit=bf.Zero(), metric=metric, plan=True, **options)
        assert plan.suffix[0] < 0.7 * plan.suffix[1]
    alone = sweep(model, batch, metric, site="residual", positions=[0, 1])
    assert not alone.facts["shared_prefix"]


def test_an_axis_from_the_first_token_on_in_units(tmp_path, monkeypatch):
    """A unit with the axis' first positions only has no prefix to keep; in float64 attention is ours even so."""
    monkeypatch.setattr(sys.modules["bkdfast.sweep.plan"], "AMORTISED", 0.01)
    model, batch = zoo.build("llama", dtype=torch.float64), zoo.batch(tokens=30, padding="left")
    options = dict(site="residual", positions=[0, 24, 26], variants=1)
    metric = bf.metrics.target_logprob(TARGETS)
    whole = sweep(model, batch, metric, share_prefix=False, **options)
    split = sweep(model, batch, metric, out=tmp_path, **options)
    assert split.facts["shared_prefix"]
    torch.testing.assert_close(split.effects, whole.effects)


@pytest.mark.parametrize("part", ["self_attn.o_proj", "mlp.down_proj", ""])
def test_layers_that_share_a_module_are_refused(part):
    model = zoo.build("llama")
    if part:
        parent, _, name = part.rpartition(".")
        setattr(model.model.layers[2].get_submodule(parent), name, model.model.layers[0].get_submodule(part))
    else:
        model.model.layers[2] = model.model.layers[0]
    with pytest.raises(InvalidArgumentError, match="layers share one .* module"):
        bf.sweep(model, zoo.batch(), edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)


def test_autocast_shares_no_prefix():
    model = zoo.build("llama")
    with torch.autocast("cpu", torch.bfloat16):
        options = dict(edit=bf.Zero(), at="last_prompt", metric=bf.metrics.target_logprob([5, 6]), progress=False)
        with pytest.warns(UserWarning, match="autocast is on"):
            found = bf.sweep(model, zoo.batch(), verify=20, **options)
    assert not found.facts["shared_prefix"]
    assert 1e-4 < found.facts["largest_error"] < 5e-2  # bf16 does not compute better


def test_cells_of_a_compiled_model_are_checked_with_hooks_that_run():
    """`model.compile()` keeps a graph in the module, which hooks of the check cannot enter."""
    model, graphs = zoo.build("llama"), []
    bf.prepare(model)
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph)
    with torch.no_grad():
        model(**zoo.batch())
    compiled = len(graphs)
    found = sweep(model, zoo.batch(), bf.metrics.target_logprob([5, 6]), at="last_prompt")
    assert found.facts["largest_error"] < 1e-5 and found.effects.abs().max() > 0.1
    assert 0 < compiled == len(graphs) and model._compiled_call_impl is not None


@pytest.mark.filterwarnings("ignore:hooks of yours")
@pytest.mark.parametrize(("part", "site"), [("self_attn", "heads"), ("self_attn", "attention"), ("mlp", "mlp")])
def test_hooks_that_do_nothing_until_something_is_edited(part, site):
    """The base run cannot tell that a clamp on a part of the edited block changes it."""
    model = zoo.build("llama")
    module = model.model.layers[1].get_submodule(part)
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    seen = []
    handle = module.register_forward_hook(lambda module, args, output: seen.append(first(output).abs().max()))
    with torch.no_grad():
        model(**zoo.batch())
    handle.remove()
    limit, calls = float(max(seen)) * 1.01, []

    def clamp(module, args, output):
        calls.append(1)
        if isinstance(output, tuple):
            return (output[0].clamp(-limit, limit), *output[1:])
        return output.clamp(-limit, limit)

    module.register_forward_hook(clamp)
    source = torch.full((16 if site == "heads" else 48,), 50.0)
    options = dict(heads=[(1, 2)]) if site == "heads" else dict(layers=[1], site=site)
    metric = bf.metrics.logit_diff(5, 6)
    found = bf.sweep(
        model, zoo.batch(), edit=bf.Patch(source), at="last_prompt", metric=metric, verify=4, progress=False, **options
    )
    assert found.facts["largest_error"] < 1e-4 and len(calls) >= 2
    module._forward_hooks.clear()
    free = bf.sweep(
        model, zoo.batch(), edit=bf.Patch(source), at="last_prompt", metric=metric, progress=False, **options
    )
    assert (free.effects - found.effects).nan_to_num().abs().max() > 1e-3  # it does clamp


def test_metrics_of_other_lengths_do_not_change_each_other():
    """Rotary frequencies that depend on the length of a row: the prompt alone and with its target are two runs."""
    from tests.sweep.test_exact_models import long_rope

    model, batch = long_rope(), zoo.batch(tokens=7, padding=None)
    alone = bf.metrics.logit_diff(5, 6)
    want = bf.sweep(model, batch, edit=bf.Zero(), metric=alone, at="last_prompt", progress=False)
    both = [alone, bf.metrics.target_logprob([[5, 6, 7, 8]] * 3)]
    found = bf.sweep(model, batch, edit=bf.Zero(), metric=both, at="last_prompt", progress=False)[alone.name]
    torch.testing.assert_close(found.baseline, want.baseline)
    torch.testing.assert_close(found.effects, want.effects, atol=1e-5, rtol=1e-4)


def test_tokens_that_a_mask_leaves_out_are_not_scored():
    model = zoo.build("llama")
    batch = zoo.batch(rows=1, tokens=8, padding=None)
    batch["attention_mask"][0, 3] = 0
    result = bf.sweep(model, batch, edit=bf.Zero(), metric=[bf.metrics.loss(), bf.metrics.kl(over="prompt")],
                      at="last_prompt", heads=[(0, 0)], progress=False)  # fmt: skip
    with torch.no_grad():
        logprob = model(**batch).logits.log_softmax(-1)
    read = [i for i in range(7) if i not in (2, 3)]  # neither the token that is left out, nor what predicts it
    want = -torch.stack([logprob[0, i, batch["input_ids"][0, i + 1]] for i in read]).mean()
    torch.testing.assert_close(result["loss"].baseline[0], want, atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_that_no_variant_reads(monkeypatch):
    """Without a shared prefix, a cache would hold the keys and values of every variant for nobody."""
    from transformers.cache_utils import DynamicCache

    calls = []
    monkeypatch.setattr(DynamicCache, "update", lambda *args, **options: calls.append(1))
    for family in ("llama", "falcon", "gpt2"):
        batch, metric = zoo.batch(), bf.metrics.target_logprob([5, 6])
        bf.sweep(zoo.build(family), batch, edit=bf.Zero(), metric=metric, verify=2, progress=False)
        bf.head_means(zoo.build(family), batch)
    assert not calls


def test_a_spec_of_the_users_is_checked_whatever_its_name():
    model = zoo.build("llama")
    spec = bf.hf.describe(model)
    options = dict(edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
    assert bf.sweep(model, zoo.batch(), spec=spec, **options).facts["verified_cells"] == 4
    bf.prepare(model)
    wide = dataclasses.replace(
        spec, blocks=tuple(dataclasses.replace(block, heads=8, head_dim=8) for block in spec.blocks)
    )
    with pytest.raises(InvalidArgumentError, match="the model was prepared with another spec"):
        bf.sweep(model, zoo.batch(), spec=wide, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metric=bf.metrics.loss), "metric=<class .* is not a metric; call one"),
        (dict(metric=[bf.metrics.loss(), 3]), "metric=3 is not a metric"),
        (dict(metric=None), "metric=None is not a metric"),
        (dict(edit=bf.Zero), "is not an edit"),
        (dict(heads=(0, 1)), r"heads=\(0, 1\) is not a list of \(layer, head\) pairs"),
        (dict(heads={(0, 1)}), "heads=.* is not a list"),
        (dict(site="mlp", layers=0), "layers=0 is not a list"),
        (dict(positions=5), "positions=5 is not a list"),
        (dict(positions="last_prompt"), "positions='last_prompt' is not a list"),
        (dict(verify=-1), "verify=-1"),
    ],
)
def test_arguments_of_another_kind(options, message):
    defaults = dict(edit=bf.Zero(), metric=bf.metrics.loss(), progress=False)
    with pytest.raises(bf.errors.BkdfastError, match=message):
        bf.sweep(zoo.build("llama"), zoo.batch(), **defaults | options)


def test_layers_are_whole_numbers():
    with pytest.raises(TypeError):
        bf.sweep(zoo.build("llama"), zoo.batch(), edit=bf.Zero(), site="mlp", layers=[1.9], metric=bf.metrics.loss())
