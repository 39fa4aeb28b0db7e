"""Metrics against the formula in float64, each sample run alone, unpadded and all at once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError
from bkdfast.hf.batch import complete
from bkdfast.sweep.metrics import base as base_module
from bkdfast.sweep.metrics import inputs
from tests.hf import zoo

M = bf.metrics
TARGETS = [[5, 6, 7], [8], [9, 10]]
RIGHT, WRONG = [5, 8, 9], [6, 7, 11]
VOCAB = zoo.VOCAB + 3  # of random logits
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    return float(
        np.mean([sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in zip(p, q, strict=True)])
    )


def followed(logits, prompt, target):
    """Probabilities of a target's tokens from logits `[T, vocab]` of prompt and target."""
    p = softmax(logits)
    return np.array([p[len(prompt) + i - 1, token] for i, token in enumerate(target)])


def own(logits, prompt):
    p = softmax(logits)
    return np.array([p[i, prompt[i + 1]] for i in range(len(prompt) - 1)])


def greedy(logits, prompt, target):
    return [int(logits[len(prompt) + i - 1].argmax()) == token for i, token in enumerate(target)]


def js_divergence(p, q):
    return (divergence(p, (p + q) / 2) + divergence(q, (p + q) / 2)) / 2


# name -> (metric, does it append the targets, oracle(base [T, V], edited [T, V], prompt, target, sample))
CASES = {
    "target_logprob": (M.target_logprob(TARGETS), True, lambda b, e, p, t, n: np.log(followed(e, p, t)).mean()),
    "target_prob": (M.target_prob(TARGETS), True, lambda b, e, p, t, n: np.prod(followed(e, p, t)) ** (1 / len(t))),
    "loss of targets": (M.loss(TARGETS), True, lambda b, e, p, t, n: -np.log(followed(e, p, t)).mean()),
    "loss": (M.loss(), False, lambda b, e, p, t, n: -np.log(own(e, p)).mean()),
    "accuracy": (M.accuracy(TARGETS), True, lambda b, e, p, t, n: np.mean(greedy(e, p, t))),
    "exact match": (M.accuracy(TARGETS, exact=True), True, lambda b, e, p, t, n: float(all(greedy(e, p, t)))),
    "accuracy of the prompt": (
        M.accuracy(),
        False,
        lambda b, e, p, t, n: np.mean([int(e[i].argmax()) == p[i + 1] for i in range(len(p) - 1)]),
    ),
    "logit_diff": (M.logit_diff(RIGHT, WRONG), False, lambda b, e, p, t, n: e[-1, RIGHT[n]] - e[-1, WRONG[n]]),
    "logit_diff, one for all": (M.logit_diff(3, WRONG), False, lambda b, e, p, t, n: e[-1, 3] - e[-1, WRONG[n]]),
    "rank": (M.rank(RIGHT), False, lambda b, e, p, t, n: sorted(-e[-1]).index(-e[-1, RIGHT[n]])),
    "kl": (M.kl(), False, lambda b, e, p, t, n: divergence(softmax(b[-1:]), softmax(e[-1:]))),
    "kl reversed": (M.kl(reverse=True), False, lambda b, e, p, t, n: divergence(softmax(e[-1:]), softmax(b[-1:]))),
    "kl over the prompt": (M.kl("prompt"), False, lambda b, e, p, t, n: divergence(softmax(b), softmax(e))),
    "kl over targets": (
        M.kl("target", targets=TARGETS),
        True,
        lambda b, e, p, t, n: divergence(softmax(b[len(p) - 1 : -1]), softmax(e[len(p) - 1 : -1])),
    ),
    "js": (M.js(), False, lambda b, e, p, t, n: js_divergence(softmax(b[-1:]), softmax(e[-1:]))),
    "js over the prompt": (M.js("prompt"), False, lambda b, e, p, t, n: js_divergence(softmax(b), softmax(e))),
    "custom": (M.custom(lambda x: x[:, 0].amax(-1)), False, lambda b, e, p, t, n: e[-1].max()),
    "custom over the prompt": (
        M.custom(lambda x: x.amax(-1).std(1, correction=0), "prompt"),
        False,
        lambda b, e, p, t, n: e.max(-1).std(),
    ),
    "custom over targets": (
        M.custom(lambda x, n: x.sum((1, 2)) * (1 + n), "target", targets=TARGETS, per_sample=True),
        True,
        lambda b, e, p, t, n: e[len(p) - 1 : -1].sum() * (1 + n),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    """An unedited model and another of the same shape that stands for the edited one; and a batch's prompts."""
    return zoo.build("llama", dtype=torch.float64), zoo.build("llama", dtype=torch.float64, seed=1)


def prompts(padding):
    batch = zoo.batch(rows=3, tokens=7, padding=padding)
    return batch, [ids[m.bool()].tolist() for ids, m in zip(batch["input_ids"], batch["attention_mask"], strict=True)]


def read_logits(model, scored):
    """Logits `[B, n, vocab]` where the metric reads."""
    with torch.no_grad():
        logits = model(**complete(model, scored.batch, bf.hf.describe(model))).logits
    return logits[torch.arange(len(logits))[:, None], scored.read]


def through(metric, scored, base, edited):
    state = metric.begin(base.flatten(0, 1), scored) if metric.needs_base else None
    return metric.score(edited, scored, state)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("case", CASES)
def test_against_each_sample_alone(models, case, padding):
    metric, appends, oracle = CASES[case]
    batch, rows = prompts(padding)
    scored = metric.extend(batch, 0)
    base, edited = (read_logits(model, scored) for model in models)
    found = through(metric, scored, base, torch.cat([edited, base]))
    assert found.shape == (6,) and found.dtype == torch.float64
    for n, (prompt, target) in enumerate(zip(rows, TARGETS, strict=True)):
        ids = torch.tensor([prompt + (target if appends else [])])
        with torch.no_grad():
            b, e = (model(input_ids=ids).logits[0].numpy() for model in models)
        for got, logits in ((found[n], e), (found[3 + n], b)):
            assert got.item() == pytest.approx(oracle(b, logits, prompt, target, n), rel=1e-9, abs=1e-12)
    if case not in ("exact match", "accuracy", "accuracy of the prompt"):
        assert ((found[:3] - found[3:]).abs() / found[:3].abs()).min() > 1e-3, (
            "the models must differ, or the comparison proves nothing"
        )


def test_accuracy_of_what_greedy_decoding_writes(models):
    """Random models are never right by chance: take their own words as targets, with one wrong token."""
    batch, rows = prompts("left")
    written = []
    for prompt in rows:
        ids = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                ids.append(int(models[0](input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        written.append(ids[len(prompt) :])
    written[1] = written[1][:2]  # shorter, still all right
    written[2][2] = (written[2][2] + 1) % zoo.VOCAB
    for exact, expected in ((False, [1, 1, 2 / 3]), (True, [1, 1, 0])):
        metric = M.accuracy(written, exact=exact)
        scored = metric.extend(batch, 0)
        assert metric.score(read_logits(models[0], scored), scored).tolist() == pytest.approx(expected)
    scored = M.rank([w[0] for w in written]).extend(batch, 0)
    assert M.rank([w[0] for w in written]).score(read_logits(models[0], scored), scored).tolist() == [0, 0, 0]


# Vectorised functions round the end of a chunk differently, by one bit.
SAME = dict(rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_chunks_of_mixed_rows_are_the_same_numbers(case, monkeypatch):
    """`token` on shuffled chunks, as the engine calls it; inputs stay as they were."""
    metric, _, _ = CASES[case]
    batch, _ = prompts("left")
    scored = metric.extend(batch, 0)
    rows, n = scored.read.shape
    base, logits = torch.randn(rows, n, VOCAB), torch.randn(5 * rows, n, VOCAB)
    before = base.clone(), logits.clone()
    expected = through(metric, scored, base, logits)
    monkeypatch.setattr(base_module, "CHUNK_ELEMENTS", 3 * VOCAB)
    torch.testing.assert_close(through(metric, scored, base, logits), expected, **SAME)
    if metric.whole_rows:
        order = torch.randperm(len(logits))
        found = torch.cat([metric.score_rows(logits[part], scored, part % rows) for part in order.split(4)])
        torch.testing.assert_close(found, expected[order], **SAME)
    else:
        state = metric.begin(base.flatten(0, 1), scored) if metric.needs_base else None
        flat, values = logits.flatten(0, 1), torch.full((5 * rows * n,), torch.nan)
        for part in torch.randperm(len(flat)).split(7):
            values[part] = metric.token(flat[part], part % (rows * n), scored, state)
        found = metric.reduce(values.view(-1, n), scored.weight.repeat(5, 1))
        torch.testing.assert_close(found, expected, **SAME)
    assert torch.equal(base, before[0]) and torch.equal(logits, before[1])


# Largest error relative to float64 of the same logits. Only reading and normalising happens here, in float32.
ERROR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-6, torch.float16: 3e-6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_half_precision_logits_are_scored_in_float32(case, dtype):
    metric, _, _ = CASES[case]
    scored = metric.extend(prompts("right")[0], 0)
    rows, n = scored.read.shape
    base = (torch.randn(rows, n, 3000, dtype=torch.float64) * 5).to(dtype)
    logits = (base.double() + torch.randn(rows, n, 3000)).to(dtype)
    found = through(metric, scored, base, logits)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = through(metric, scored, base.double(), logits.double())
    assert ((found - expected).abs() / expected.abs().clamp(min=1)).max() <= ERROR[dtype]


def test_small_divergences_are_not_rounding():
    """p ln(p/q) summed in float32 cancels: here its error exceeds the divergence itself."""
    base = torch.randn(4, 50_000) * 4
    edited = base + torch.randn_like(base) * 1e-4
    p, q = base.double().log_softmax(-1), edited.double().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    truth = {
        "kl": (p.exp() * (p - q)).sum(-1),
        "reverse": (q.exp() * (q - p)).sum(-1),
        "js": ((p.exp() * (p - m)).sum(-1) + (q.exp() * (q - m)).sum(-1)) / 2,
    }
    batch = {"input_ids": torch.ones(4, 3, dtype=torch.long)}
    for name, metric in {"kl": M.kl(), "reverse": M.kl(reverse=True), "js": M.js()}.items():
        scored = metric.extend(batch, 0)
        state = metric.begin(base, scored)
        found = metric.score(edited[:, None], scored, state)
        assert (found / truth[name] - 1).abs().max() < 0.02, name
        assert metric.score(base[:, None], scored, state).max() < 1e-12, name
    single = (base.log_softmax(-1).exp() * (base.log_softmax(-1) - edited.log_softmax(-1))).sum(-1)
    assert (single / truth["kl"] - 1).abs().max() > 0.1, "the plain sum would do; this test proves nothing"


def test_divergence_where_probabilities_vanish():
    off = -torch.inf
    scored = M.kl().extend({"input_ids": torch.ones(3, 2, dtype=torch.long)}, 0)
    base = torch.tensor([[0.0, 0.0, off], [0.0, 0.0, off], [0.0, 200.0, -300.0]])
    edited = torch.tensor([[0.0, 0.0, off], [0.0, off, off], [150.0, 0.0, 100.0]])
    kl = M.kl().score(edited[:, None], scored, M.kl().begin(base, scored))
    torch.testing.assert_close(kl, torch.tensor([0.0, torch.inf, 150.0]))
    js = M.js().score(edited[:, None], scored, M.js().begin(base, scored))
    p, q = 0.5, 1.0
    middle = 0.5 * (p * math.log(p / 0.75) + p * math.log(p / 0.25) + q * math.log(q / 0.75))
    torch.testing.assert_close(js, torch.tensor([0.0, middle, math.log(2)]))


def test_probability_near_one_keeps_its_digits():
    logits = torch.zeros(1, 1, 100)
    logits[..., 7] = 20.0
    metric = M.loss([7])
    scored = metric.extend({"input_ids": torch.ones(1, 2, dtype=torch.long)}, 0)
    assert metric.score(logits + 1000, scored).item() == pytest.approx(math.log1p(99 * math.exp(-20)), abs=1.3e-7)


def test_ties_count_as_in_argmax():
    logits = torch.tensor([[3.0, 5.0, 5.0, 5.0]], dtype=torch.bfloat16)[:, None]
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    for token, expected_rank in ((1, 0), (2, 1), (3, 2), (0, 3)):
        scored = M.rank(token).extend(batch, 0)
        assert M.rank(token).score(logits, scored).item() == expected_rank
        assert M.accuracy([token]).score(logits, scored).item() == (logits[0, 0].argmax() == token)


def test_reference_model(models):
    """KL to another model's logits at the same inputs, padding and appended targets included."""
    for padding in ("left", "right"):
        batch, rows = prompts(padding)
        metric = M.kl("target", targets=TARGETS, reference=models[1])
        scored = metric.extend(batch, 0)
        edited = read_logits(models[0], scored)
        # What the engine hands over as the unedited model's logits must not matter, nor positions made for that model.
        handed = replace(scored, batch=dict(scored.batch, position_ids=torch.zeros_like(scored.batch["input_ids"])))
        state = metric.begin(torch.randn_like(edited).flatten(0, 1), handed)
        found = metric.score(edited, scored, state)
        for n, (prompt, target) in enumerate(zip(rows, TARGETS, strict=True)):
            with torch.no_grad():
                e, r = (m(input_ids=torch.tensor([prompt + target])).logits[0].numpy() for m in models)
            expected = divergence(softmax(r[len(prompt) - 1 : -1]), softmax(e[len(prompt) - 1 : -1]))
            assert found[n].item() == pytest.approx(expected, rel=1e-9) and expected > 1e-3
    assert not models[1].lm_head._forward_pre_hooks


def test_reference_model_with_another_vocabulary(models):
    metric = M.kl(reference=models[1])
    scored = metric.extend(prompts("left")[0], 0)
    with pytest.raises(InvalidArgumentError, match="reference model has a vocabulary of 67 tokens, this one of 70"):
        metric.begin(torch.zeros(3, 70), scored)


def test_padding_columns_are_never_read_and_never_count():
    """NaN wherever weight is 0 changes nothing; and no read column is padding."""
    for case, (metric, _, _) in CASES.items():
        for padding in ("left", "right"):
            scored = metric.extend(prompts(padding)[0], 0)
            mask = scored.batch["attention_mask"]
            assert mask.gather(1, scored.read).all(), case
            logits = torch.randn(3, scored.read.shape[1], VOCAB)
            expected = through(metric, scored, logits.flip(0), logits)
            poisoned = logits.clone()
            poisoned[scored.weight == 0] = torch.nan
            base = logits.flip(0).clone()
            base[scored.weight == 0] = torch.nan
            assert torch.equal(through(metric, scored, base, poisoned), expected), case


@pytest.mark.parametrize("case", [c for c in CASES if not c.startswith("custom")])
def test_nan_logits_are_nan_in_the_metric(case):
    """The engine then says which sample; zero or a plausible rank would pass unseen."""
    metric, _, _ = CASES[case]
    scored = metric.extend(prompts("left")[0], 0)
    logits = torch.randn(3, scored.read.shape[1], VOCAB)
    broken = logits.clone()
    broken[1, 0, -1] = torch.nan  # of a token that no target names
    if case.startswith("logit_diff"):  # reads two entries alone
        broken[1, 0] = torch.nan
    assert through(metric, scored, logits, broken).isnan().tolist() == [False, True, False]
    if metric.needs_base:
        with pytest.raises(NonFiniteError, match="the unedited model's logits of row 1 of the batch"):
            through(metric, scored, broken, logits)


def test_masks_with_holes_survive_teacher_forcing():
    batch = {
        "input_ids": torch.arange(10).view(2, 5),
        "attention_mask": torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]]),
    }
    scored = inputs.append(batch, [[7, 8], [9]])
    assert scored.batch["input_ids"].tolist() == [[0, 1, 2, 3, 7, 8], [5, 6, 7, 8, 9, 9]]
    assert scored.batch["attention_mask"].tolist() == [[1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
    assert scored.read.tolist() == [[3, 4], [4, 4]] and scored.weight.tolist() == [[1, 1], [1, 0]]


def test_later_batches_use_later_samples():
    batch = zoo.batch(rows=2, tokens=4, padding=None)
    assert M.target_prob(TARGETS).extend(batch, 1).tokens.tolist() == [[8, 0], [9, 10]]
    assert M.logit_diff(RIGHT, 3).extend(batch, 1).tokens.tolist() == [[[8, 3]], [[9, 3]]]
    assert M.rank(RIGHT).extend(batch, 1).tokens.tolist() == [[8], [9]]
    assert M.custom(len, "target", targets=TARGETS).extend(batch, 1).tokens[:, 0].tolist() == [1, 2]


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize(
    ("targets", "samples", "ids"),
    [
        ([5, 6], None, [[5, 6]]),
        (torch.tensor([5, 6]), None, [[5, 6]]),
        (np.array([5, 6]), None, [[5, 6]]),
        ([torch.tensor([5]), torch.tensor([6])], 2, [[5], [6]]),
        ("5 6", None, [[5, 6]]),
        (["5 6", "7"], 2, [[5, 6], [7]]),
        (np.array([[5, 6], [7, 8]]), 2, [[5, 6], [7, 8]]),
    ],
)
def test_ways_to_give_targets(targets, samples, ids):
    metric = M.target_prob(targets, Words())
    assert metric.samples == samples and metric.targets.ids == ids


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: M.target_prob([]), InvalidArgumentError, "no targets were given"),
        (lambda: M.target_prob([[5], []]), InvalidArgumentError, "target 1 is empty"),
        (lambda: M.target_prob("  ", Words()), InvalidArgumentError, "target 0 is empty"),
        (lambda: M.target_prob("5"), InvalidTypeError, "pass tokenizer="),
        (lambda: M.target_prob([[5], [6.5]]), InvalidTypeError, "target 1 has 6.5"),
        (lambda: M.target_prob([[5], [True]]), InvalidTypeError, "target 1 has True"),
        (lambda: M.target_prob([[5], None]), InvalidTypeError, "target 1 is None"),
        (lambda: M.loss([[5, -100]]), InvalidArgumentError, "token id -100"),
        (lambda: M.logit_diff([], 5), InvalidArgumentError, "empty list of tokens"),
        (lambda: M.logit_diff([5, 6], [7, 8, 9]), InvalidArgumentError, "2 right tokens but 3 wrong ones"),
        (lambda: M.logit_diff("5 6", "7", Words()), InvalidArgumentError, r"'5 6' is 2 tokens, \[5, 6\]"),
        (lambda: M.rank(2.5), InvalidTypeError, "2.5"),
        (lambda: M.kl("everywhere"), InvalidArgumentError, "over='everywhere' is not one of"),
        (lambda: M.kl("target"), InvalidArgumentError, "pass targets="),
        (lambda: M.js(targets=[5]), InvalidArgumentError, "pass over='target'"),
        (lambda: M.custom(5), InvalidTypeError, "custom needs a function"),
        (lambda: M.custom(len, "target"), InvalidArgumentError, "pass targets="),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (M.target_prob([39, 40]), "token 40 in its targets, but the model's vocabulary has 40"),
        (M.accuracy([40]), "vocabulary has 40"),
        (M.logit_diff(40, 1), "vocabulary has 40"),
        (M.logit_diff(1, 40), "vocabulary has 40"),
        (M.rank(40), "vocabulary has 40"),
    ],
)
def test_tokens_outside_the_vocabulary(metric, message):
    scored = metric.extend({"input_ids": torch.ones(1, 2, dtype=torch.long)}, 0)
    with pytest.raises(InvalidArgumentError, match=message):
        metric.score(torch.zeros(1, scored.read.shape[1], 40), scored)


def test_prompt_tokens_that_the_unembedding_lacks_are_nan():
    scored = M.loss().extend({"input_ids": torch.tensor([[1, 2], [1, 50]])}, 0)
    assert M.loss().score(torch.zeros(2, 1, 40), scored).isnan().tolist() == [False, True]


def test_bad_batches():
    one = {"input_ids": torch.tensor([[0, 3], [4, 5]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    with pytest.raises(InvalidArgumentError, match="row 0 of the batch is one token"):
        M.loss().extend(one, 0)
    for metric in (M.target_prob([[5]]), M.logit_diff([5, 6], 7), M.rank([5, 6]), M.kl("target", targets=[[5]])):
        with pytest.raises(InvalidArgumentError, match="but the data has more than"):
            metric.extend(one, 1)
    scored = M.kl().extend(one, 0)
    with pytest.raises(InvalidArgumentError, match="pass state="):
        M.kl().score(torch.zeros(2, 1, 40), scored)
    for shape in ((3, 1, 40), (2, 2, 40), (2, 40), (0, 1, 40)):
        with pytest.raises(InvalidArgumentError, match="expected .R, 1, vocab. with R a multiple of the batch's 2"):
            M.rank(5).score(torch.zeros(shape), scored)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: x.sum(), InvalidArgumentError, r"returned shape \(\) for logits of shape \(3, 1, 40\)"),
        (lambda x: x[:, 0], InvalidArgumentError, r"returned shape \(3, 40\)"),
        (lambda x: [0.0] * len(x), InvalidTypeError, "returned list"),
    ],
)
def test_custom_functions_that_return_something_else(function, error, message):
    metric = M.custom(function, name="mine")
    scored = metric.extend(prompts(None)[0], 0)
    with pytest.raises(error, match=message) as caught:
        metric.score(torch.zeros(3, 1, 40), scored)
    assert "'mine'" in str(caught.value)


def test_context_is_checked_with_the_target(models):
    """A prompt that fills the context leaves no room for a target; without one it is fine."""
    full = zoo.batch(rows=1, tokens=128, padding=None)
    spec = bf.hf.describe(models[0])
    assert complete(models[0], M.rank(5).extend(full, 0).batch, spec)["input_ids"].shape == (1, 128)
    with pytest.raises(InvalidArgumentError, match=r"129 tokens \(prompt and target\) do not fit .* context of 128"):
        complete(models[0], M.target_prob([5]).extend(full, 0).batch, spec)


@pytest.mark.parametrize("name", ["loss", "rank", "accuracy", "custom", "logit_diff"])
def test_every_metric_runs_in_a_sweep(name):
    metric = CASES[name][0]
    result = bf.sweep(
        zoo.build("llama"), zoo.batch(), edit=bf.Zero(), metric=metric, heads=[(0, 0), (2, 3)], verify=2, progress=False
    )
    assert result.baseline.isfinite().all() and result.metric == metric.name
