"""Screened sweeps: exact effects of the heads with the largest estimates, and how far to trust the rest."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from bkdfast.sweep.screened import screened_sweep
from tests.hf import zoo
from tests.sweep.test_screen import TARGETS, data


def sweep_of(model=None, **options):
    options = {"edit": bf.Zero(), "metric": bf.metrics.target_logprob(TARGETS), "keep": 3, "check": 4, **options}
    return screened_sweep(model or zoo.build("llama"), data(), progress=False, **options)


def test_exact_and_estimated_values_are_kept_apart():
    model = zoo.build("llama")
    found = sweep_of(model)
    whole = bf.sweep(
        model, data(), edit=bf.Zero(), metric=bf.metrics.target_logprob(TARGETS), progress=False
    )  # fmt: skip
    computed = {*found.kept, *found.sampled}
    assert len(computed) == 7 and found.kept == tuple(found.screening.top(3, by="size"))
    assert found.estimate.isfinite().all()
    for layer in range(zoo.LAYERS):
        for head in range(zoo.HEADS):
            if (layer, head) in computed:
                torch.testing.assert_close(found.exact[layer, head], whole.effects[layer, head], atol=1e-5, rtol=1e-4)
            else:
                assert found.exact[layer, head].isnan().all()
    frame = found.to_pandas()
    assert len(frame) == 12 and frame.exact.isna().sum() == 5
    assert frame.chosen.value_counts().to_dict() == {"left out": 5, "sampled": 4, "kept": 3}
    assert found.top(1)[0] in computed
    assert "rank correlation of the estimate: kept" in repr(found)


def test_the_sample_is_drawn_from_the_others():
    assert sweep_of().sampled == sweep_of(seed=0).sampled != sweep_of(seed=1).sampled
    assert len(sweep_of(keep=0.5).kept) == 6
    everything = sweep_of(keep=10, check=99)
    assert len(everything.sampled) == 2 and everything.exact.isfinite().all()
    assert not sweep_of(check=0).sampled
    for options, message in (
        ({"keep": 0}, "keep=0"), ({"keep": 1.5}, "keep=1.5"), ({"check": -1}, "check=-1"), ({"by": "big"}, "by='big'"),
        ({"positions": [0]}, "leave out positions"),
    ):  # fmt: skip
        with pytest.raises(InvalidArgumentError, match=message):
            sweep_of(**options)


def test_correlation_and_missed_heads():
    found = sweep_of(keep=4, check=6)
    estimate, exact = (
        pd.Series([abs(float(values[head])) for head in found.sampled])
        for values in (found.screening.mean, found.sweep.mean)
    )
    assert found.correlation("sampled").rho == pytest.approx(
        pd.concat([estimate, exact], axis=1).corr("spearman").iloc[0, 1]
    )
    assert found.correlation("kept").n == 4 and found.correlation("both").n == 10
    size = found.sweep.mean.abs()
    for k in range(1, 5):
        least = sorted((float(size[head]) for head in found.kept), reverse=True)[k - 1]
        assert found.missed(k).found == sum(float(size[head]) > least for head in found.sampled)
    told = found.missed(2)
    assert told.left_out == 8 and told.sampled == 6 and told.found <= told.at_most <= told.found + 2
    with pytest.raises(InvalidArgumentError, match="k=5"):
        found.missed(5)
    with pytest.raises(InvalidArgumentError, match="among='all'"):
        found.correlation("all")


def test_a_screened_sweep_goes_on_with_the_same_heads(tmp_path, monkeypatch):
    """The choice of heads is kept with the results: gradients on a GPU are not the same to the last bit."""
    import sys

    module = sys.modules["bkdfast.sweep.screened"]
    real, calls = module.screen, []
    monkeypatch.setattr(module, "screen", lambda *a, **k: calls.append(1) or real(*a, **k))
    first = sweep_of(out=tmp_path / "run")
    again = sweep_of(out=tmp_path / "run")
    assert len(calls) == 1
    assert again.kept == first.kept and torch.equal(again.estimate, first.estimate)
    assert torch.equal(again.exact.nan_to_num(), first.exact.nan_to_num())
    assert again.screening.facts == first.screening.facts
    with pytest.raises(InvalidArgumentError, match="results of another"):
        sweep_of(out=tmp_path / "run", steps=2)
    with pytest.raises(InvalidArgumentError, match="results of another edit"):
        sweep_of(out=tmp_path / "run", edit=bf.Scale(2.0))


def test_scatter_shows_the_pairs_and_leaves_out_no_head():
    found = sweep_of()
    (axes,) = found.plot().axes
    lines = {line.get_label().split(":")[0]: line for line in axes.lines}
    assert list(lines["kept"].get_xdata()) == [float(found.screening.mean[head]) for head in found.kept]
    assert list(lines["sampled"].get_ydata()) == [float(found.sweep.mean[head]) for head in found.sampled]
    assert len(lines["5 not computed exactly"].get_xdata()) == 5
    assert "estimated change of" in axes.get_xlabel() and "exact change of" in axes.get_ylabel()
