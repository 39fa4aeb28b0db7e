"""Sources with an entry for each row and token: what they are not for stays as it is."""

from __future__ import annotations

import pytest

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from tests.hf import zoo
from tests.sweep import kinds

TARGETS = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]]


def sweep(batch, source, **options):
    metric = bf.metrics.target_logprob(TARGETS)
    return bf.sweep(kinds.model("llama"), batch, edit=bf.Patch(source), metric=metric, progress=False, **options)


def outputs(site, batch, at):
    if site == "heads":
        return bf.head_outputs(kinds.model("llama"), batch, at=at)
    return bf.site_outputs(kinds.model("llama"), batch, site=site, at=at)


@pytest.mark.parametrize("site", ["heads", "residual"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("at", ["all", slice(0, None), slice(2, 40), "prompt"])
def test_a_model_patched_with_its_own_prompts_is_unchanged(site, padding, at):
    """Prompts of 11, 10 and 9 tokens: the source has nothing for the targets behind them."""
    batch = zoo.batch(padding=padding)
    source = outputs(site, batch, "all" if at == "all" else "each")
    if isinstance(at, slice):
        source = source[:, at]
    found = sweep(batch, source, at=at, site=site, verify=6)
    assert found.effects.nan_to_num().abs().max() < 1e-5
    assert sweep(batch, source * 1.5, at=at, site=site).effects.nan_to_num().abs().max() > 0.01


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_behind_a_prompt_are_refused(padding):
    batch = zoo.batch(padding=padding)
    source = outputs("residual", batch, "each")
    assert sweep(batch, source, positions=range(9), site="residual").effects.abs().max() < 1e-5
    with pytest.raises(InvalidArgumentError, match="at=9 is behind the prompt of row 2, which has 9 tokens"):
        sweep(batch, source, positions=range(11), site="residual")


def test_means_of_positions_serve_shorter_rows():
    """They are of other rows anyway."""
    batch = zoo.batch(padding="left")
    means = bf.head_means(kinds.model("llama"), batch, at="each")  # [1, 11, L, H, Dh]
    found = sweep(batch, means, positions=[8, 10], verify=6)
    assert found.effects[:, :, 1].abs().max() > 1e-3


def test_resampling_needs_samples():
    means = bf.head_means(kinds.model("llama"), zoo.batch())
    with pytest.raises(InvalidArgumentError, match=r"Resample\(.* has no row for each sample to draw from"):
        bf.sweep(
            kinds.model("llama"), zoo.batch(), edit=bf.Resample(means), metric=bf.metrics.loss(), progress=False
        )  # fmt: skip
