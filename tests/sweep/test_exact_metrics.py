"""Every metric through the engine against the same metric written down from whole logits, one sample at a time."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch

import bkdfast as bf
from bkdfast.hf import readout
from bkdfast.sweep import base as base_run
from tests.hf import zoo
from tests.sweep import brute, kinds
from tests.sweep.brute import Brute, Measure, logprobs

OTHER = [[8, 8], [1, 2, 3], [40], [60, 61]]
L = zoo.LAYERS


def span(read: str, tokens, prompt: int) -> list[int]:
    """Tokens whose logits are read."""
    return {
        "last_prompt": [prompt - 1],
        "prompt": list(range(prompt)),
        "target": list(range(prompt - 1, len(tokens) - 1)),
    }[read]


def of_next(value, targets):
    """Mean of `value(log-probabilities, next token)` over the target, or over the prompt's own tokens."""

    def score(logits, base, tokens, prompt, n):
        first, last = (prompt - 1, len(tokens) - 1) if targets else (0, prompt - 1)
        found = [value(logprobs(logits[t]), tokens[t + 1]) for t in range(first, last)]
        return torch.tensor(found, dtype=torch.float64).mean()

    return Measure(targets, score)


def divergence(kind, read, targets=None, reference=None):
    def kl(p, q):
        return (p.exp() * (p - q)).sum()

    def score(logits, base, tokens, prompt, n):
        if reference is not None:
            with torch.no_grad():
                base = reference(input_ids=torch.tensor([tokens])).logits[0]
        found = []
        for t in span(read, tokens, prompt):
            p, q = (torch.log_softmax(x[t].double(), -1) for x in (base, logits))
            m = ((p.exp() + q.exp()) / 2).log()
            found.append({"kl": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[kind])
        return torch.stack(found).mean()

    return Measure(targets, score)


def of_rows(function, read, targets=None):
    return Measure(
        targets, lambda logits, base, tokens, prompt, n: function(logits[span(read, tokens, prompt)], n).double()
    )


def entropy(logits):
    """A user's function `[R, n, vocab] -> [R]`."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean(-1)


def spread(logits):
    return logits.std(-1).amax(-1) - logits.std(-1)[:, 0]


def looked_up(logits, sample):
    return logits[:, -1].gather(-1, 3 + sample[:, None])[:, 0]


def rank(token):
    def score(logits, base, tokens, prompt, n):
        return (logits[prompt - 1] > logits[prompt - 1, token]).sum().double()

    return Measure(None, score)


@functools.cache
def table(family: str):
    """name: (metric, the same in plain words)."""
    m, T = bf.metrics, kinds.TARGETS
    reference = zoo.build(family, seed=11)

    def prob(logp, token):
        return logp[token]

    def miss(logp, token):
        return -logp[token]

    def right(logp, token):
        return float(logp.argmax() == token)

    mean = of_next(prob, T)
    hits = of_next(right, OTHER)
    return {
        "log": (m.target_logprob(T, name="log"), mean),
        "prob": (m.target_prob(T, name="prob"), Measure(T, lambda *a: mean.score(*a).exp())),
        "other": (m.target_logprob(OTHER, name="other"), of_next(prob, OTHER)),
        "loss": (m.loss(T, name="loss"), of_next(miss, T)),
        "prompt loss": (m.loss(name="prompt loss"), of_next(miss, None)),
        "accuracy": (m.accuracy(OTHER, name="accuracy"), hits),
        "exact": (m.accuracy(OTHER, exact=True, name="exact"), Measure(OTHER, lambda *a: hits.score(*a).floor())),
        "prompt accuracy": (m.accuracy(name="prompt accuracy"), of_next(right, None)),
        "diff": (m.logit_diff(5, 6, name="diff"), brute.logit_diff(5, 6)),
        "rank": (m.rank(9, name="rank"), rank(9)),
        "kl": (m.kl(name="kl"), divergence("kl", "last_prompt")),
        "kl prompt": (m.kl("prompt", name="kl prompt"), divergence("kl", "prompt")),
        "kl target": (m.kl("target", targets=T, name="kl target"), divergence("kl", "target", T)),
        "kl other": (m.kl("target", targets=OTHER, name="kl other"), divergence("kl", "target", OTHER)),
        "reverse": (m.kl(reverse=True, name="reverse"), divergence("reverse", "last_prompt")),
        "kl model": (m.kl("prompt", reference=reference, name="kl model"), divergence("kl", "prompt", None, reference)),
        "js": (m.js("prompt", name="js"), divergence("js", "prompt")),
        "js model": (
            m.js("target", targets=T, reference=reference, name="js model"),
            divergence("js", "target", T, reference),
        ),
        "entropy": (m.custom(entropy), of_rows(lambda x, n: entropy(x[None])[0], "last_prompt")),
        "entropies": (
            m.custom(entropy, "prompt", name="entropies"),
            of_rows(lambda x, n: entropy(x[None])[0], "prompt"),
        ),
        "spread": (m.custom(spread, "target", targets=T), of_rows(lambda x, n: spread(x[None])[0], "target", T)),
        "looked up": (
            m.custom(looked_up, per_sample=True, name="looked up"),
            of_rows(lambda x, n: x[-1, 3 + n], "last_prompt"),
        ),
    }  # fmt: skip


def compare(family, names, case, padding="left", data=None, **options):
    """All metrics in one sweep, each against its own words."""
    model, metrics = kinds.model(family), table(family)
    batches = data or kinds.data(padding)
    oracle = Brute(model, family, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some see nothing of some edits
        results = bf.sweep(
            model, batches, metric=[metrics[name][0] for name in names], progress=False, **{**case.options, **options}
        )
    assert list(results) == names
    for name in names:
        result = results[name]
        scores, base = oracle.scores(case.variants, metrics[name][1])
        torch.testing.assert_close(result.baseline.double(), base, atol=5e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
        found = torch.stack([result.effects[index] for index in case.index]).double()
        torch.testing.assert_close(found, scores - base, atol=5e-5, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023
    return results


TOGETHER = list(table("llama"))


@pytest.mark.parametrize(
    ("family", "grid", "padding"),
    [("llama", "last", "left"), ("llama", "each", "right"), ("gpt2", "all", "right"), ("gemma2", "sets all", "right")],
)
def test_all_metrics_at_once(family, grid, padding):
    results = compare(family, TOGETHER, kinds.case("patch", grid, kinds.head_dim(family)), padding)
    # An edit at the last prompt token comes after everything that these read.
    blind = ("prompt loss", "prompt accuracy") if grid == "last" else ()
    for name, result in results.items():
        moved = result.effects[torch.isfinite(result.effects)].abs().max()
        if name in blind:
            assert moved == 0, name
        elif name not in ("prob", "rank", "accuracy", "exact", "prompt accuracy"):
            assert moved > 1e-4, f"{name}: {moved}"


@pytest.mark.parametrize("name", TOGETHER)
def test_each_metric_alone(name):
    """Without the reads of others, which share its forwards above."""
    compare("llama", [name], kinds.case("zero", "each", 16), "right", variants=2)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_metrics_of_encoders(family):
    names = ["diff", "rank", "kl", "js model", "kl model", "reverse", "entropy", "entropies", "looked up"]
    metrics = {
        name for name in names if not table(family)[name][0].needs_causal and table(family)[name][1].targets is None
    }
    compare(family, sorted(metrics), kinds.case("patch", "last", 12), "right")


def test_prompts_of_one_token_and_targets_of_many():
    data = [{"input_ids": torch.tensor([[9, 4], [7, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}]
    targets = [[5], list(range(3, 30))]
    case = kinds.case("patch", "last", 16)
    for metric, measure in (
        (bf.metrics.target_logprob(targets), brute.logprob(targets)),
        (bf.metrics.kl("target", targets=targets), divergence("kl", "target", targets)),
        (
            bf.metrics.custom(spread, "target", targets=targets),
            of_rows(lambda x, n: spread(x[None])[0], "target", targets),
        ),
    ):
        want = Brute(kinds.model("llama"), "llama", data).effects(case.variants, measure)
        result = bf.sweep(kinds.model("llama"), data, metric=metric, progress=False, **case.options)
        brute.close(torch.stack([result.effects[index] for index in case.index]), want)


@pytest.mark.parametrize("variants", [1, None])
def test_a_custom_metric_of_columns_that_later_edits_do_not_reach(variants):
    """It needs all its columns at once, also those that need not run again for an edit of a generated token."""
    case = kinds.case("scale", "each", 16)
    spots = ["last_prompt", "generated"]
    options = {**case.options, "positions": spots}
    chosen = [[brute.Change(layer, head, at, lambda x, place: -1.5 * x)] for layer, head in kinds.FEW for at in spots]
    index = [(layer, head, i) for layer, head in kinds.FEW for i in range(2)]
    model, targets = kinds.model("llama"), [[5, 6, 7], [8, 9], [9, 10], [11, 12, 13]]
    metric = bf.metrics.custom(spread, "target", targets=targets)
    want = Brute(model, "llama", kinds.data("left")).effects(
        chosen, of_rows(lambda x, n: spread(x[None])[0], "target", targets)
    )
    result = bf.sweep(model, kinds.data("left"), metric=metric, variants=variants, progress=False, **options)
    brute.close(torch.stack([result.effects[i] for i in index]), want)


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "gpt2", "falcon", "gpt_neox", *zoo.ENCODERS])
@pytest.mark.parametrize("limit", [1, 3 * zoo.VOCAB])
def test_logits_in_chunks(family, limit, monkeypatch):
    """The numbers do not depend on how many rows of logits are held at a time."""
    case = kinds.case("patch", "last", kinds.head_dim(family))
    causal = family not in zoo.ENCODERS
    names = ["log", "other", "diff", "kl target", "js", "entropies"] if causal else ["diff", "entropies", "js"]
    metrics = [table(family)[name][0] for name in names]
    options = dict(metric=metrics, progress=False, **case.options)
    whole = bf.sweep(kinds.model(family), kinds.data("right"), **options)
    held = []

    def counted(*args, **kwargs):
        for piece, logits in read(*args, **kwargs):
            held.append(len(logits))
            yield piece, logits

    read = readout.read_logits
    monkeypatch.setattr(readout, "LIMIT", limit)
    monkeypatch.setattr(base_run, "read_logits", counted)
    chunked = bf.sweep(kinds.model(family), kinds.data("right"), **options)
    assert len(held) > 8
    for name in names:
        torch.testing.assert_close(chunked[name].effects, whole[name].effects, atol=1e-5, rtol=1e-5, equal_nan=True)
        torch.testing.assert_close(chunked[name].baseline, whole[name].baseline, atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    compare(family, names, case, "right")
