"""Curves over nested sets of heads against one full forward with plain hooks for every point."""

from __future__ import annotations

import itertools

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from bkdfast.sweep.cumulative import CumulativeCurve, cumulative
from tests.hf import zoo

TARGETS = [[5, 6, 7], [8], [9, 10]]
WHOLE = list(itertools.product(range(zoo.LAYERS), range(zoo.HEADS)))
RANKING = [(2, 1), (0, 3), (1, 0), (0, 0), (2, 2)]


def data(padding="left"):
    return [zoo.batch(rows=2, tokens=9, padding=padding), zoo.batch(rows=1, tokens=6, padding=padding, seed=9)]


def effect(model, batches, heads, new, last_only=False):
    """`[N]`: change of the target log-probability with `heads` set to `new(z, layer, head)`; each sample alone."""
    spec = bf.hf.describe(model)

    def score(prompt, target, edited):
        handles = []
        for layer in sorted({layer for layer, _ in edited}):
            block = spec.blocks[layer]

            def hook(module, args, layer=layer, dim=block.head_dim):
                z = args[0].clone()
                at = [len(prompt) - 1] if last_only else slice(None)
                for head in (h for la, h in edited if la == layer):
                    own = slice(head * dim, (head + 1) * dim)
                    z[0, at, own] = new(z[0, at, own], layer, head)
                return (z,)

            handles.append(model.get_submodule(block.out_proj).register_forward_pre_hook(hook))
        ids = torch.cat([prompt, torch.tensor(target)])[None]
        with torch.no_grad():
            logprob = model(input_ids=ids).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return sum(logprob[len(prompt) + i - 1, token] for i, token in enumerate(target)) / len(target)

    prompts = [i[m.bool()] for b in batches for i, m in zip(b["input_ids"], b["attention_mask"], strict=True)]
    return torch.stack(
        [score(p, t, heads) - score(p, t, []) for p, t in zip(prompts, TARGETS, strict=True)]
    )  # fmt: skip


def zero(z, layer, head):
    return torch.zeros_like(z)


def curve_of(model=None, ranking=RANKING, **options):
    options = {"edit": bf.Zero(), "metric": bf.metrics.target_logprob(TARGETS), "progress": False, **options}
    return cumulative(model or zoo.build("llama"), data(), ranking, **options)


@pytest.mark.parametrize("direction", ["add", "remove"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_point_is_the_set_edited_together(family, direction):
    model = zoo.build(family)
    found = curve_of(model, direction=direction, controls=1)
    assert found.sizes == (0, 1, 2, 3, 4, 5) and list(found.order) == RANKING
    for k in found.sizes:
        edited = RANKING[:k] if direction == "add" else [head for head in WHOLE if head not in RANKING[:k]]
        expected = effect(model, data(), edited, zero)
        torch.testing.assert_close(found.effects[k], expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found.full, effect(model, data(), WHOLE, zero), atol=2e-5, rtol=1e-4)
    assert found.effects.diff(dim=0).abs().amax(1).min() > 1e-3, "every head must matter"
    (order,) = found.control_orders
    last = order if direction == "add" else [head for head in WHOLE if head not in order]
    torch.testing.assert_close(found.controls[0, -1], effect(model, data(), last, zero), atol=2e-5, rtol=1e-4)


def test_patching_at_the_last_prompt_token():
    model = zoo.build("llama")
    source = torch.randn(zoo.LAYERS, zoo.HEADS, 16)
    found = curve_of(model, edit=bf.Patch(source), at="last_prompt", sizes=[5, 2, 2], controls=0)
    assert found.sizes == (2, 5) and found.controls.shape == (0, 2, 3)
    for i, k in enumerate(found.sizes):
        expected = effect(model, data(), RANKING[:k], lambda z, la, h: source[la, h].expand_as(z), last_only=True)
        torch.testing.assert_close(found.effects[i], expected, atol=2e-5, rtol=1e-4)


def test_the_ends_of_the_curve():
    model = zoo.build("llama")
    add, remove = (curve_of(model, WHOLE, direction=direction) for direction in ("add", "remove"))
    assert add.effects[0].abs().max() == 0 and torch.equal(add.effects[-1], add.full)
    assert remove.effects[-1].abs().max() == 0 and torch.equal(remove.effects[0], remove.full)
    assert torch.equal(add.full, remove.full)
    # Orders of all heads end where the ranking does.
    assert torch.equal(add.controls[:, -1], add.full.expand(3, -1))
    for curve in (add, remove):
        assert float(curve.share[0]) == 0 and float(curve.share[-1]) == 1


def test_controls_follow_the_seed():
    first, again, other = (curve_of(seed=seed) for seed in (0, 0, 1))
    assert first.control_orders == again.control_orders != other.control_orders
    assert torch.equal(first.controls, again.controls) and not torch.equal(first.controls, other.controls)
    torch.testing.assert_close(first.effects, other.effects, atol=1e-5, rtol=1e-4)
    assert curve_of(controls=1).control_orders == first.control_orders[:1]
    assert len({tuple(order) for order in first.control_orders}) == 3
    for order in first.control_orders:
        assert len(set(order)) == 5 and set(order) <= set(WHOLE)


@pytest.mark.parametrize("by", ["increase", "decrease", None])
@pytest.mark.parametrize("direction", ["add", "remove"])
def test_reranking_takes_the_best_of_the_remaining_heads_at_every_step(direction, by):
    model, batches = zoo.build("llama"), data()
    found = curve_of(model, direction=direction, rerank=True, by=by, controls=1)
    assert set(found.order) == set(RANKING) and found.sizes == (0, 1, 2, 3, 4, 5)
    sign = {"increase": 1, "decrease": -1, None: 1 if found.full.mean() > 0 else -1}[by]
    for k in (1, 2, 3):
        chosen = list(found.order[: k - 1])
        strength = {}
        for head in (head for head in RANKING if head not in chosen):
            together = [*chosen, head]
            edited = together if direction == "add" else [h for h in WHOLE if h not in together]
            strength[head] = sign * float(effect(model, batches, edited, zero).mean())
        best = (max if direction == "add" else min)(strength, key=strength.get)
        assert found.order[k - 1] == best
        assert sign * float(found.mean[k]) == pytest.approx(strength[best], abs=1e-4)
    fixed = curve_of(model, direction=direction, controls=1)
    better = sign * (found.mean[1] - fixed.mean[1])
    assert better >= -1e-6 if direction == "add" else better <= 1e-6
    assert torch.allclose(found.effects[-1], fixed.effects[-1], atol=1e-5), "the same heads in the end"
    assert torch.equal(found.controls, fixed.controls)


def test_reranking_tries_only_the_best_ranked_of_the_remaining_heads():
    one = curve_of(rerank=True, keep=1)
    assert list(one.order) == RANKING
    fixed = curve_of()
    torch.testing.assert_close(one.effects, fixed.effects, atol=1e-5, rtol=1e-4)
    two = curve_of(rerank=True, keep=2, sizes=[0, 3])
    assert two.order[0] in RANKING[:2] and len(two.order) == 3 and two.sizes == (0, 3)


def made(mean, full=1.0, direction="add", sizes=None, controls=()):
    effects = torch.tensor(mean)[:, None]
    sizes = tuple(range(len(mean))) if sizes is None else sizes
    lines = torch.tensor(controls)[..., None] if controls else torch.zeros(0, len(mean), 1)
    order = tuple(WHOLE[: sizes[-1]])
    return CumulativeCurve(
        direction, sizes, order, effects, lines, (order,) * len(lines), torch.tensor([full]), torch.zeros(1), "m",
        "Zero", 0.0,
    )  # fmt: skip


def test_heads_needed_and_area():
    curve = made([0.0, -0.5, -1.9, -1.0, -2.0], full=-2.0)
    assert [curve.heads_needed(share) for share in (0.25, 0.3, 0.9, 1.0)] == [1, 2, 2, 4]
    assert curve.share.tolist() == pytest.approx([0, 0.25, 0.95, 0.5, 1])
    assert curve.area() == pytest.approx((0.125 + 0.6 + 0.725 + 0.75) / 4)
    away = made([2.0, 0.5, 0.1], full=2.0, direction="remove", sizes=(0, 4, 8), controls=[[2.0, 2.0, 2.0]])
    assert away.heads_needed(0.7) == 4 and away.heads_needed(0.99) is None
    assert away.control_area() == [0.0] and away.area() == pytest.approx((0.375 + 0.85) / 2)
    for share in (0, 1.2):
        with pytest.raises(InvalidArgumentError, match="share="):
            curve.heads_needed(share)
    with pytest.raises(InvalidArgumentError, match="does not change the m"):
        made([0.0, 1.0], full=0.0).heads_needed()
    with pytest.raises(InvalidArgumentError, match="one size"):
        made([1.0]).area()


def test_table_and_picture():
    curve = curve_of(sizes=[0, 1, 4])
    frame = curve.to_pandas()
    assert list(frame) == [
        "heads", "layer", "head", "effect", "stderr", "share", "control_0", "control_1", "control_2"
    ]  # fmt: skip
    assert frame.heads.tolist() == [0, 1, 4] and frame.layer.isna().tolist() == [True, False, False]
    assert (frame.layer[2], frame["head"][2]) == RANKING[3]
    torch.testing.assert_close(torch.tensor(frame.effect.to_numpy()), curve.mean, check_dtype=False)
    other = curve_of(sizes=[0, 1, 4], direction="remove", controls=0)
    (axes,) = curve.plot(others=[other]).axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["ranked heads added"].get_ydata()) == pytest.approx(curve.mean.tolist())
    assert list(lines["ranked heads taken out"].get_xdata()) == [0, 1, 4]
    assert float(lines["all heads of the model"].get_ydata()[0]) == pytest.approx(float(curve.full.mean()))
    assert "heads zeroed" in axes.get_xlabel() and axes.get_ylabel() == "change of target log-probability"
    assert "3 samples" in axes.get_title("left")
    controls = curve.controls.mean(-1)
    band = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(float(controls.max())) and band.min() == pytest.approx(float(controls.min()))
    same = curve_of(sizes=[0, 1, 4], rerank=True)
    assert len(curve.plot(others=[same]).axes[0].lines) == 5, "equal controls are drawn once"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(ranking=[]), "ranking is empty"),
        (dict(ranking=[(0, 1), (0, 1)]), r"names head \(0, 1\) twice"),
        (dict(ranking=5), "such as sweep"),
        (dict(ranking=[(0, 4)]), r"head \(0, 4\) is out of range"),
        (dict(sizes=[6]), r"sizes=\[6\]"),
        (dict(sizes=[]), r"sizes=\[\]"),
        (dict(direction="up"), "direction='up'"),
        (dict(by="size"), "by='size'"),
        (dict(controls=-1), "controls=-1"),
        (dict(keep=0, rerank=True), "keep=0"),
        (dict(edit=bf.Zero(1)), "fills in layer and head itself"),
        (dict(positions=[0]), "positions"),
        (dict(metric=[bf.metrics.rank(5)]), "one metric"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises((InvalidArgumentError, TypeError), match=message):
        curve_of(**options)


def test_a_killed_curve_goes_on(tmp_path, monkeypatch):
    """Steps that are in the folder are not computed again, and the result is the same to the last bit."""
    import sys

    module = sys.modules["bkdfast.sweep.cumulative"]
    real, calls = module.sweep, []

    def killed(*args, **options):
        calls.append(options["out"].name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **options)

    whole = curve_of(rerank=True)
    monkeypatch.setattr(module, "sweep", killed)
    with pytest.raises(KeyboardInterrupt):
        curve_of(rerank=True, out=tmp_path / "run")
    monkeypatch.undo()
    again = curve_of(rerank=True, out=tmp_path / "run")
    assert calls == ["curve", "step-0001", "step-0002", "step-0003"]
    assert again.order == whole.order and torch.equal(again.effects, whole.effects)
    with pytest.raises(InvalidArgumentError, match="results of another edit"):
        curve_of(rerank=True, out=tmp_path / "run", edit=bf.Scale(2.0))
