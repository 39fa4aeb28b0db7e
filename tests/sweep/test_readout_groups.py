"""Which metrics share a run: those that read the same numbers from it, and no others."""

from __future__ import annotations

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import complete
from bkdfast.sweep.readout_groups import check_metrics, read_groups
from tests.hf import zoo

M = bf.metrics
TARGETS = [[5, 6, 7], [8], [9, 10]]


@pytest.fixture(scope="module")
def model():
    return zoo.build("llama", dtype=torch.float64)


def logits_at(model, inputs, read):
    """`[B, n, vocab]` at columns `read [B, n]`."""
    with torch.no_grad():
        logits = model(**complete(model, inputs, bf.hf.describe(model))).logits
    return logits[torch.arange(len(logits))[:, None], read]


def score(metric, scored, base, logits):
    return metric.score(logits, scored, metric.begin(base.flatten(0, 1), scored) if metric.needs_base else None)


@pytest.mark.parametrize("padding", ["left", "right", None])
def test_metrics_that_share_a_run_read_the_same_numbers(model, padding):
    batch = zoo.batch(tokens=7, padding=padding)
    longer = [[5, 6, 7, 3], [8], [9, 10, 2]]
    metrics = [
        M.rank(5),
        M.target_prob(TARGETS),
        M.loss(),
        M.loss(TARGETS),
        M.target_logprob([4, 4], name="other"),
        M.accuracy(longer),
        M.kl("prompt"),
    ]
    scored = [metric.extend(batch, 0) for metric in metrics]
    groups = read_groups(scored, causal=True)
    assert [group.members for group in groups] == [(0, 1, 2, 3, 5, 6), (4,)]
    for group in groups:
        for number, own_scored in zip(group.members, group.scored, strict=True):
            assert own_scored.batch is group.batch
            shared = logits_at(model, group.batch, own_scored.read)
            alone = logits_at(model, scored[number].batch, scored[number].read)
            found = score(metrics[number], own_scored, alone.flip(0), shared)
            expected = score(metrics[number], scored[number], alone.flip(0), alone)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_runs_are_not_shared_where_that_would_change_them():
    batch = zoo.batch(tokens=7)
    metrics = [M.rank(5), M.loss([5]), M.loss([5, 6]), M.kl(), M.loss([6]), M.js("target", targets=[5])]
    scored = [metric.extend(batch, 0) for metric in metrics]
    assert [g.members for g in read_groups(scored, causal=False)] == [(0, 3), (1, 5), (2,), (4,)]
    assert [g.members for g in read_groups(scored, causal=True)] == [(0, 1, 2, 3, 5), (4,)]
    other = dict(batch, token_type_ids=torch.zeros_like(batch["input_ids"]))
    zeros, ones = M.rank(5).extend(other, 0), M.rank(5).extend(dict(batch, token_type_ids=batch["attention_mask"]), 0)
    assert [g.members for g in read_groups([scored[0], zeros, ones], causal=True)] == [(0, 1), (2,)]
    # The same tokens, one of them hidden from attention.
    hole = dict(batch, attention_mask=batch["attention_mask"].index_fill(1, torch.tensor([4]), 0))
    assert len(read_groups([M.loss([5]).extend(batch, 0), M.rank(5).extend(hole, 0)], causal=True)) == 2
    # A target that continues with the very token that pads the other row on the right.
    padded = zoo.batch(tokens=7, padding="right")
    assert [
        g.members for g in read_groups([M.loss([5]).extend(padded, 0), M.loss([5, 0]).extend(padded, 0)], causal=False)
    ] == [(0,), (1,)]


def test_names_are_unique_within_a_sweep():
    check_metrics([M.loss(), M.loss([5], name="loss of the target"), M.rank(5)])
    with pytest.raises(InvalidArgumentError, match="metrics 0 and 2 are both called 'loss'"):
        check_metrics([M.loss(), M.rank(5), M.loss([5])])
    with pytest.raises(InvalidArgumentError, match="empty list"):
        check_metrics([])
