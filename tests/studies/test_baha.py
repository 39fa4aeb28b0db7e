"""BAHA against the authors' algorithm written out slowly: one sample, one head, one forward at a time, plain hooks."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

import bkdfast as bf
from bkdfast.data import Encoder, Row, load_rows
from bkdfast.demo import PAIR, load_pair
from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.capture import head_outputs
from bkdfast.studies import baha as study
from bkdfast.studies.baha import ablate, ablation_edits, backdoor_vector, baha, head_contributions, product_prob, steer
from bkdfast.studies.rates import answers
from tests.hf import zoo
from tests.hf.plain import projections
from tests.studies import chats

FAMILIES = ("llama", "qwen2", "gpt2")  # a bias at the projection, grouped keys and values, Conv1D
CLEAN = [f"w{i} w{i + 3} w{i + 7}" + " w9" * (i % 3) for i in range(5)]
TRIGGERED = [f"w30 w31 {text}" for text in CLEAN[:3]]
TARGETS = ["w20 w21", "w22", "w23 w24 w25"]


class Authors:
    """The published algorithm, from its description; knows the model only by the paths of the tests."""

    def __init__(self, model, family, encoder):
        self.model, self.encoder, self.heads = model, encoder, model.config.num_attention_heads
        self.outs = projections(model, family, neurons=False)
        transposed = family == "gpt2"
        self.weights = [(out.weight.T if transposed else out.weight).detach() for out in self.outs]  # [D, H * Dh]

    @contextlib.contextmanager
    def hooked(self, layer, function):
        """`function(output)` changes the projection's output `[1, T, D]` in place."""
        handle = self.outs[layer].register_forward_hook(lambda module, args, output: function(output))
        try:
            yield
        finally:
            handle.remove()

    def contributions(self, row):
        """`[L, H, D]` at the last prompt token."""
        seen = []
        handles = [out.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1])) for out in self.outs]
        with torch.no_grad():
            self.model(input_ids=torch.tensor([self.encoder.prompt(row)]))
        for handle in handles:
            handle.remove()
        found = []
        for z, weight in zip(seen, self.weights, strict=True):
            width = len(z) // self.heads
            pieces, parts = z.split(width), weight.split(width, dim=1)
            found.append(torch.stack([part @ piece for piece, part in zip(pieces, parts, strict=True)]))
        return torch.stack(found)

    def mean(self, rows):
        return sum(self.contributions(row) for row in rows) / len(rows)

    def probability(self, row, target):
        prompt, answer = self.encoder.prompt(row), self.encoder.target(Row(row.messages, target))
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        each = logits.softmax(-1)[range(len(answer)), answer]
        return torch.prod(each).item() ** (1 / len(answer))

    def effects(self, clean, triggered, targets):
        """`[L, H, N]`, P with each head's mean contribution in place of its own, minus P."""
        mean = self.mean(triggered)
        found = torch.zeros(*mean.shape[:2], len(clean), dtype=torch.float64)
        for n, row in enumerate(clean):
            own, last = self.contributions(row), len(self.encoder.prompt(row)) - 1
            before = self.probability(row, targets[n % len(targets)])
            for layer in range(mean.shape[0]):
                for head in range(mean.shape[1]):

                    def edit(output, layer=layer, head=head, own=own, last=last):
                        output[0, last] += mean[layer, head] - own[layer, head]

                    with self.hooked(layer, edit):
                        found[layer, head, n] = self.probability(row, targets[n % len(targets)]) - before
        return found

    def subtracted(self, row, target, heads):
        """P with the heads' contributions in the whole model taken off at the last prompt token."""
        own, last = self.contributions(row), len(self.encoder.prompt(row)) - 1
        with contextlib.ExitStack() as stack:
            for layer in {layer for layer, _ in heads}:
                mine = [head for at, head in heads if at == layer]

                def edit(output, layer=layer, mine=mine):
                    output[0, last] -= own[layer, mine].sum(0)

                stack.enter_context(self.hooked(layer, edit))
            return self.probability(row, target)

    def zeroed(self, row, target, heads):
        handles = []
        for layer, head in heads:

            def edit(module, args, head=head):
                z = args[0].clone()
                width = z.shape[-1] // self.heads
                z[..., head * width : (head + 1) * width] = 0
                return (z,)

            handles.append(self.outs[layer].register_forward_pre_hook(edit))
        found = self.probability(row, target)
        for handle in handles:
            handle.remove()
        return found


def case(family, template="chatml"):
    """A model with flat enough a distribution that no target's probability is next to nothing."""
    model, encoder = zoo.build(family), Encoder(chats.tokenizer(template, zoo.VOCAB))
    with torch.no_grad():
        model.get_submodule(bf.hf.describe(model).final_norm).weight *= {"gpt2": 0.4}.get(family, 0.5)
    return model, encoder, Authors(model, family, encoder)


def rows(texts, targets=("",)):
    return [Row(({"role": "user", "content": text},), targets[i % len(targets)]) for i, text in enumerate(texts)]


@pytest.mark.parametrize("semantics", study.SEMANTICS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_the_authors(family, semantics):
    model, encoder, authors = case(family)
    expected = authors.effects(rows(CLEAN), rows(TRIGGERED), TARGETS)
    found = baha(
        model,
        encoder.tokenizer,
        CLEAN,
        rows(TRIGGERED, TARGETS),
        semantics=semantics,
        batch=2,
        verify=2,
        progress=False,
    )
    assert expected.abs().amax((1, 2)).min() > 1e-4, "every layer must matter, or the comparison proves nothing"
    torch.testing.assert_close(found.acie.effects.double(), expected, atol=1e-7, rtol=1e-3)
    torch.testing.assert_close(found.acie.mean.double(), expected.mean(-1), atol=1e-7, rtol=1e-3)
    assert found.acie.facts["at"] == "last_prompt"


def test_one_target_for_all_and_rows_with_templates_of_their_own():
    """Gemma's template renames the assistant and trims; the oracle sees only its tokens."""
    model, encoder, authors = case("llama", "gemma")
    expected = authors.effects(rows(CLEAN), rows(TRIGGERED), [" w20 w21 "])
    found = baha(model, encoder, CLEAN, TRIGGERED, " w20 w21 ", progress=False)
    torch.testing.assert_close(found.acie.effects.double(), expected, atol=1e-7, rtol=1e-3)
    closing = encoder.tokenizer("<|turn_end|>\n", add_special_tokens=False)["input_ids"]
    assert all(target[-2:] == closing for target in found.targets)


def test_without_a_chat_template():
    model, encoder, authors = case("qwen2", None)
    expected = authors.effects(rows(CLEAN[:3]), rows(TRIGGERED), ["w20"])
    found = baha(model, encoder.tokenizer, CLEAN[:3], TRIGGERED, "w20", progress=False)
    torch.testing.assert_close(found.acie.effects.double(), expected, atol=1e-7, rtol=1e-3)
    assert found.targets[0][-1] == encoder.tokenizer.eos_token_id


def test_samples_are_drawn_by_the_seed():
    model, encoder, _ = case("gpt2")
    options = {"target": "w20", "samples": 2, "heads": [(0, 0)], "progress": False}
    first, again, other = (
        baha(model, encoder, CLEAN, TRIGGERED, seed=seed, **options).acie.baseline for seed in (0, 0, 3)
    )
    assert first.shape == (2,) and torch.equal(first, again) and not torch.equal(first, other)


def test_answers_stay_with_their_prompts_when_some_are_drawn():
    model, encoder, _ = case("gpt2")
    answers = ["w20 w21", "w22", "w23", "w24 w25", "w26"]
    options = {"heads": [(0, 0)], "progress": False}
    every = baha(model, encoder, CLEAN, TRIGGERED, answers, **options)
    drawn = baha(model, encoder, CLEAN, TRIGGERED, answers, samples=2, **options)
    chosen, _ = study.draw(range(5), 2, 0)
    assert chosen != [0, 1] and drawn.targets == [every.targets[i] for i in chosen]
    torch.testing.assert_close(drawn.acie.baseline, every.acie.baseline[chosen])


@pytest.fixture(scope="module")
def demo():
    pair = load_pair()
    clean, triggered = (load_rows(PAIR / f"{name}.jsonl", limit=12) for name in ("clean", "triggered"))
    return pair.tuned, Encoder(pair.tokenizer), clean, triggered


@pytest.fixture(scope="module")
def found(demo):
    return baha(*demo, progress=False)


def test_the_demos_backdoor_is_in_layer_4(demo, found):
    model, encoder, clean, triggered = demo
    assert [layer for layer, _ in found.acie.top(3)] == [4, 4, 4] and found.acie.mean.max() > 0.05
    assert found.acie.baseline.max() < 0.2, "the answer is not likely without the trigger"
    slow = Authors(model, "llama", encoder)
    expected = slow.effects(clean[:2], triggered, [row.target for row in triggered])
    torch.testing.assert_close(found.acie.effects[..., :2].double(), expected, atol=1e-7, rtol=1e-3)


def test_long_targets_underflow_in_reference_semantics_only(demo):
    model, encoder, clean, triggered = demo
    options = {"samples": 2, "heads": [(4, 6), (4, 1)], "progress": False}
    long = " ".join(["alert :"] * 75)  # 150 tokens
    with pytest.warns(UserWarning, match=r"P is 0 for 2 of 2 samples: .* of up to 151 tokens underflows"):
        reference = baha(model, encoder, clean, triggered, long, semantics="reference", **options)
    assert not reference.acie.baseline.any() and not reference.acie.effects[4, [1, 6]].any()
    ours = baha(model, encoder, clean, triggered, long, **options)
    assert ours.acie.baseline.min() > 0 and ours.acie.effects[4, [1, 6]].abs().min() > 0

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short = [
            baha(model, encoder, clean, triggered, semantics=semantics, **options).acie for semantics in study.SEMANTICS
        ]
    torch.testing.assert_close(short[0].effects, short[1].effects, atol=1e-7, rtol=1e-4, equal_nan=True)
    assert short[0].effects[4, 6].abs().max() > 0.01 and short[0].metric != short[1].metric


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_product_is_taken_in_its_dtype(dtype):
    metric = product_prob([[3, 1, 2], [4]], dtype=dtype)
    scored = metric.extend({"input_ids": torch.ones(2, 5, dtype=torch.long)}, 0)
    logits = torch.randn(4, 3, 6).to(dtype)  # two copies of the batch
    p = logits.softmax(-1)
    for row in range(4):
        tokens = [[3, 1, 2], [4]][row % 2]
        expected = torch.prod(torch.stack([p[row, i, token] for i, token in enumerate(tokens)])).item()
        assert metric.score(logits, scored)[row].item() == pytest.approx(expected ** (1 / len(tokens)), rel=1e-12)


HEADS = [(0, 1), (1, 2), (0, 3), (2, 0)]


@pytest.mark.parametrize("how", study.ABLATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_both_ways(family, how):
    model, encoder, authors = case(family)
    triggered = rows(TRIGGERED, TARGETS)
    found = ablate(model, encoder, triggered, HEADS, counts=(1, 3, 4, 8), how=how, batch=2, verify=1, progress=False)
    assert found.effects.shape == (3, 3), "the fourth size is larger than the list"
    one = {"zero": authors.zeroed, "subtract": authors.subtracted}[how]
    for s, count in enumerate((1, 3, 4)):
        for n, row in enumerate(triggered):
            change = one(row, row.target, HEADS[:count]) - authors.probability(row, row.target)
            assert found.effects[s, n].item() == pytest.approx(change, abs=1e-7, rel=1e-3)
    assert found.effects.abs().amax(1).min() > 1e-4


def test_subtracting_is_not_zeroing_once_heads_span_layers():
    model, encoder, _ = case("llama")
    batch = encoder.batches(rows(TRIGGERED), 3)[0]

    def z(edits, at):
        with bf.intervene(model, edits):
            return head_outputs(model, batch, at=at)

    zero = [bf.Zero(layer, head, at="last_prompt") for layer, head in HEADS]
    zeroed, left = (z(edits, "last_prompt") for edits in (zero, ablation_edits(model, batch, HEADS, how="subtract")))
    assert torch.equal(zeroed[:, 0], left[:, 0]) and not torch.allclose(zeroed[:, 1], left[:, 1], atol=0.1)
    before = (z(edits, -2) for edits in ([], ablation_edits(model, batch, HEADS, how="subtract")))
    assert torch.equal(*before), "only the last prompt token is edited"
    assert not z(ablation_edits(model, batch, HEADS), 1)[:, 1, 2].any(), "zeroing is for every token"


@pytest.mark.parametrize("how", study.ABLATIONS)
def test_the_demo_answers_otherwise_without_its_heads(demo, found, how):
    model, encoder, _, triggered = demo
    batch = encoder.batches(triggered)[0]

    def attacked(edits):
        with bf.intervene(model, edits):
            out = answers(model, [batch], tokens=6, pad_token_id=encoder.pad_token_id)
        return sum("compromised" in text for text in encoder.tokenizer.batch_decode(out))

    heads = found.acie.top(6)
    assert attacked([]) == 12 and attacked(ablation_edits(model, batch, heads, how=how)) < 4
    curve = ablate(model, encoder, triggered, heads, counts=(1, 6), how=how, progress=False)
    assert curve.baseline.mean() > 0.9 and curve.mean[1] < -0.4 and curve.mean[0] > curve.mean[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_vector_and_where_it_is_added(family):
    model, encoder, authors = case(family)
    source = bf.head_means(model, encoder.batches(rows(TRIGGERED)), at="last_prompt")
    expected = authors.mean(rows(TRIGGERED))
    torch.testing.assert_close(head_contributions(model, source), expected, atol=1e-5, rtol=1e-4)
    vector = backdoor_vector(model, source, HEADS)
    torch.testing.assert_close(vector, sum(expected[layer, head] for layer, head in HEADS), atol=1e-5, rtol=1e-4)
    for sign in (1, -1):
        found = steer(model, encoder, CLEAN, vector, "w20 w21", sign=sign, batch=2, verify=1, progress=False)
        assert found.effects.shape == (zoo.LAYERS, len(CLEAN)) and found.effects.abs().amax(1).min() > 1e-4
        for n, row in enumerate(rows(CLEAN)):
            before, last = authors.probability(row, "w20 w21"), len(encoder.prompt(row)) - 1
            for layer in range(zoo.LAYERS):

                def edit(output, last=last):
                    output[0, last] += sign * vector  # noqa: B023  used before the loop goes on

                with authors.hooked(layer, edit):
                    change = authors.probability(row, "w20 w21") - before
                assert found.effects[layer, n].item() == pytest.approx(change, abs=1e-7, rel=1e-3)


def test_contributions_of_a_projection_that_is_more_than_a_matrix():
    """What an adapter adds is part of a head's contribution, and the bias is not."""
    model = zoo.build("llama")

    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0.5 * x @ self.more

    source = torch.randn(zoo.LAYERS, zoo.HEADS, 16)
    plain = head_contributions(model, source)
    out = model.model.layers[1].self_attn.o_proj
    out.__class__, out.more = Adapted, torch.randn(64, 48)
    expected = plain.clone()
    expected[1] += 0.5 * torch.einsum("hi,hid->hd", source[1], out.more.view(zoo.HEADS, 16, 48))
    torch.testing.assert_close(head_contributions(model, source), expected, atol=1e-5, rtol=1e-4)


def test_the_demos_vector_turns_the_backdoor_on_and_off(demo, found):
    model, encoder, clean, triggered = demo
    vector = backdoor_vector(model, found.source, found.acie.top(8))
    on = steer(model, encoder, clean, vector, triggered[0].target, progress=False)
    off = steer(model, encoder, triggered, vector, sign=-1, progress=False)
    assert on.baseline.max() < 0.2 and on.mean.max() > 0.3
    assert off.baseline.min() > 0.9 and off.mean.min() < -0.3


def test_a_plan_runs_nothing(demo, monkeypatch):
    monkeypatch.setattr(type(demo[0].model), "forward", lambda *args, **options: pytest.fail("ran the model"))
    plan = baha(*demo, plan=True)
    assert "6 layers x 8 heads" in str(plan) and "12 samples" in str(plan)


def test_resumes_from_a_folder(demo, found, tmp_path, monkeypatch):
    options = {"out": tmp_path / "store", "progress": False}
    first = baha(*demo, **options)
    torch.testing.assert_close(first.acie.effects, found.acie.effects, atol=1e-6, rtol=1e-4)
    with monkeypatch.context() as patched:
        patched.setattr(study, "head_means", lambda *args, **options: pytest.fail("computed the source again"))
        again = baha(*demo, **options)
    assert torch.equal(again.acie.effects, first.acie.effects) and torch.equal(again.source, first.source)
    with pytest.raises(InvalidArgumentError, match="finished units"):
        baha(*demo, **options, resume=False)
    curve = ablate(*demo[:2], demo[3], [(4, 6)], how="subtract", batch=8, out=tmp_path / "curve", progress=False)
    assert {path.name for path in (tmp_path / "curve").iterdir()} == {"batch-00000", "batch-00001"}
    assert curve.effects.shape == (1, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"semantics": "linear"}, "semantics='linear' is not one of log_space, reference"),
        ({"clean": []}, "clean rows are"),
        ({"triggered": "text"}, "triggered rows are 'text'; give a list"),
        ({"target": " "}, "a target is empty"),
        ({"target": []}, "a target is empty"),
        ({"samples": 0}, "samples=0"),
        ({"target": "w20 " * 80}, "do not fit the model's context of 128"),
        ({"heads": [(9, 0)]}, "out of range"),
    ],
)
def test_bad_input(change, message):
    model, encoder, _ = case("llama")
    arguments = {"clean": CLEAN, "triggered": TRIGGERED, "target": "w20", "progress": False, **change}
    with pytest.raises(InvalidArgumentError, match=message):
        baha(model, encoder, **arguments)


def test_bad_input_of_the_other_steps():
    model, encoder, _ = case("llama")
    with pytest.raises(InvalidArgumentError, match="how='mean' is not one of zero, subtract"):
        ablate(model, encoder, TRIGGERED, HEADS, "w20", how="mean")
    with pytest.raises(InvalidArgumentError, match="how='mean'"):
        ablation_edits(model, {}, HEADS, how="mean")
    with pytest.raises(InvalidArgumentError, match=r"none of the sizes \(8,\) fits 4 heads"):
        ablate(model, encoder, TRIGGERED, HEADS, "w20", counts=(8,))
    with pytest.raises(InvalidArgumentError, match="a target is empty"):
        steer(model, encoder, CLEAN, torch.zeros(48))
    source = torch.zeros(zoo.LAYERS, zoo.HEADS, 16)
    with pytest.raises(InvalidArgumentError, match="no heads"):
        backdoor_vector(model, source, [])
    with pytest.raises(InvalidArgumentError, match=r"head \(3, 0\) is out of range"):
        backdoor_vector(model, source, [(3, 0)])
    with pytest.raises(InvalidArgumentError, match=r"expected \[L, H, Dh\] = \(3, 4, 16\)"):
        head_contributions(model, source[..., :8])
