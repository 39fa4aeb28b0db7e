"""A result says what its numbers are, in every form it is turned into."""

import builtins
import math
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bkdfast.errors import InvalidArgumentError, MissingDependencyError, StoreError
from bkdfast.jobs import store
from bkdfast.sweep import SweepResult
from bkdfast.sweep.result import set_name
from tests.jobs.processes import fork, kill_at_line, wait
from tests.sweep.results import SETS, SHAPES, make_result

ALL = pytest.mark.parametrize("dims", SHAPES, ids="-".join)


def same(one, other):
    names = ("metric", "edit", "seconds", "facts", "dims", "coords", "provenance")
    return all(getattr(one, name) == getattr(other, name) for name in names) and all(
        torch.equal(getattr(one, name).view(torch.int32), getattr(other, name).view(torch.int32))
        for name in ("effects", "baseline")
    )


@ALL
def test_save_and_load_give_back_everything(tmp_path, dims):
    result = make_result(dims)
    result.save(tmp_path / "r.safetensors")
    found = SweepResult.load(tmp_path / "r.safetensors")
    assert same(found, result) and repr(found) == repr(result)
    assert found.effects.isnan().any() and found.effects.dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["r.safetensors"]


def test_saving_again_replaces_the_file_whole(tmp_path):
    make_result().save(tmp_path / "r.safetensors")
    make_result(samples=9).save(tmp_path / "r.safetensors")
    assert len(SweepResult.load(tmp_path / "r.safetensors").baseline) == 9


def test_saving_killed_at_any_line_leaves_the_old_or_the_new_result(tmp_path):
    path, old, new = tmp_path / "r.safetensors", make_result(), make_result(samples=9)

    def save(number):
        kill_at_line({store.__file__}, number)
        new.save(path)

    killed = []
    for number in range(1, 30):
        old.save(path)
        status = wait(fork(save, number))
        found = SweepResult.load(path)
        assert same(found, new if len(found.baseline) == 9 else old)
        killed.append((status, len(found.baseline)))
    assert {(-signal.SIGKILL, 7), (-signal.SIGKILL, 9), (0, 9)} == set(killed)


def test_what_cannot_be_saved_or_loaded_is_told(tmp_path):
    result = make_result()
    with pytest.raises(InvalidArgumentError, match="results are .safetensors files"):
        result.save(tmp_path / "r.pt")
    with pytest.raises(InvalidArgumentError, match="there is no folder"):
        result.save(tmp_path / "no" / "r.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(StoreError, match="still in memory"):
        result.save(tmp_path / "folder.safetensors")
    with pytest.raises(InvalidArgumentError, match="cannot read .*No such file"):
        SweepResult.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidArgumentError, match="not a saved sweep result"):
        SweepResult.load(tmp_path / "other.safetensors")
    result.save(tmp_path / "r.safetensors")
    data = (tmp_path / "r.safetensors").read_bytes()
    for damaged in (b"", data[:9], data[:-5], b"PK" + data):
        (tmp_path / "r.safetensors").write_bytes(damaged)
        with pytest.raises(InvalidArgumentError, match="or is damaged"):
            SweepResult.load(tmp_path / "r.safetensors")
    (tmp_path / "r.safetensors").write_bytes(data.replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    with pytest.raises(InvalidArgumentError, match="format 9, and this version reads 1"):
        SweepResult.load(tmp_path / "r.safetensors")


def test_mean_and_standard_error():
    result = make_result(left_out=False)
    values = result.effects.numpy().astype(np.float64)
    np.testing.assert_allclose(result.mean, values.mean(-1), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result.stderr, values.std(-1, ddof=1) / math.sqrt(7), rtol=1e-5)
    assert not make_result(samples=1, left_out=False).stderr.any()


@pytest.mark.parametrize("by", ["increase", "decrease", "size"])
@ALL
def test_top_gives_labels_strongest_first(dims, by):
    result = make_result(dims)
    swept = int(torch.isfinite(result.mean).sum())
    assert swept == result.mean.numel() - 1
    found = result.top(swept, by=by)
    keys = []
    for labels in found:
        labels = labels if len(dims) > 1 else (labels,)
        at = tuple(result.coords[name].index(label) for name, label in zip(dims, labels, strict=True))
        keys.append({"increase": -1, "decrease": 1}.get(by, 1) * float(result.mean[at]))
    keys = [-abs(key) for key in keys] if by == "size" else keys
    assert keys == sorted(keys) and len(set(found)) == swept
    assert result.top(2, by=by) == found[:2]


def test_labels_of_every_kind():
    assert make_result(("set",)).coords["set"] == tuple(tuple(heads) for heads in SETS)
    assert make_result(("layer", "head", "position")).coords["position"] == ("last_prompt", "1:3")
    assert make_result(("set", "position")).coords["position"] == ("rows 0", -1)
    assert make_result(("layer",), coords={"layer": torch.tensor([2, 4, 6, 8, 9])}).coords["layer"] == (2, 4, 6, 8, 9)
    assert make_result().coords == {"layer": (0, 1, 2), "head": (0, 1, 2, 3)}
    assert make_result(("layer", "position"), coords={"position": [slice(None, -1)] * 6}).coords["position"][0] == ":-1"
    assert make_result(("set",), left_out=False).top(4)[0] in set(map(tuple, SETS))
    assert set_name([(3, 1), (4, 6)]) == "3.1+4.6" and set_name([]) == "none"


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"they must be \[layer, head, sample\] and \[sample\]"):
        SweepResult(torch.zeros(2, 3), torch.zeros(3), "m", "Zero", 0.0)
    with pytest.raises(InvalidArgumentError, match=r"baseline \(2,\)"):
        SweepResult(torch.zeros(2, 3, 4), torch.zeros(2), "m", "Zero", 0.0)
    with pytest.raises(InvalidArgumentError, match="3 labels for set, but effects 4"):
        make_result(("set",), coords={"set": SETS[:3]})
    with pytest.raises(InvalidArgumentError, match="'neuron' is not one of"):
        make_result(("layer", "neuron"), shape=(2, 2))


@ALL
def test_pandas_has_one_row_a_variant(dims):
    result = make_result(dims)
    frame = result.to_pandas()
    assert list(frame.columns) == [*dims, "effect", "stderr"] and len(frame) == result.mean.numel() - 1
    assert frame.effect.is_monotonic_decreasing
    expected = {float(value) for value in result.mean.flatten() if not math.isnan(value)}
    assert set(frame.effect.astype(float)) == expected
    best = frame.iloc[0]
    labels = result.top(1)[0] if len(dims) > 1 else (result.top(1)[0],)
    assert tuple(best[list(dims)]) == tuple(set_name(x) if isinstance(x, tuple) else x for x in labels)
    at = int(result.mean.flatten().nan_to_num(nan=-9).argmax())
    assert best.stderr == pytest.approx(float(result.stderr.flatten()[at]))


@ALL
def test_pandas_with_statistics(dims):
    """Each variant has its own interval and p-value, in whatever order the table is."""
    result = make_result(dims)
    frame = result.to_pandas(statistics=True)
    assert list(frame.columns) == [*dims, "effect", "stderr", "low", "high", "p"]
    low, high = result.confidence()
    swept = torch.isfinite(result.mean)
    order = result.mean[swept].argsort(descending=True, stable=True)
    for name, expected in (("low", low), ("high", high), ("p", result.pvalues())):
        np.testing.assert_allclose(frame[name], expected[swept][order])
    assert (frame.low < frame.effect).all() and (frame.effect < frame.high).all()


@ALL
def test_pandas_of_samples(dims):
    result = make_result(dims)
    frame = result.to_pandas(samples=True)
    assert list(frame.columns) == [*dims, "sample", "effect", "baseline"]
    assert len(frame) == (result.mean.numel() - 1) * 7
    means = frame.groupby(list(dims), sort=False).effect.mean()
    swept = result.mean[torch.isfinite(result.mean)]
    np.testing.assert_allclose(means, swept, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(frame[frame["sample"] == 3].baseline.unique(), [result.baseline[3].item()])


@ALL
def test_xarray_keeps_axes_and_labels(dims):
    pytest.importorskip("xarray")
    result = make_result(dims)
    found = result.to_xarray()
    assert found.effect.dims == (*dims, "sample") and found.baseline.dims == ("sample",)
    np.testing.assert_array_equal(found.effect.values, result.effects.numpy())
    assert found.attrs["metric"] == "target probability" and '"hash": "ab"' in found.attrs["provenance"]
    labels = result.top(1)[0] if len(dims) > 1 else (result.top(1)[0],)
    at = {name: set_name(x) if isinstance(x, tuple) else x for name, x in zip(dims, labels, strict=True)}
    at = {name: str(x) if found[name].dtype.kind == "U" else x for name, x in at.items()}
    strongest = found.effect.mean("sample").sel(at)
    assert float(strongest) == pytest.approx(float(result.mean.nan_to_num(nan=-9).max()))


@pytest.mark.parametrize(("module", "method"), [("pandas", "to_pandas"), ("xarray", "to_xarray")])
def test_without_the_extra_the_message_says_what_to_install(monkeypatch, module, method):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == module:
            raise ModuleNotFoundError(f"No module named {module!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingDependencyError, match=r'pip install "bkdfast\[studies\]"'):
        getattr(make_result(), method)()


@ALL
def test_repr_names_the_strongest(dims):
    text = repr(make_result(dims))
    assert "Patch of" in text and "7 samples" in text and "target probability" in text
    assert f"{float(make_result(dims).mean.abs().nan_to_num().max()):.3g}" in text


class TestStatistics:
    """What `statistics` computes is tested there; here, that it gets the right numbers."""

    def test_recovery(self):
        pytest.importorskip("bkdfast.sweep.statistics")
        effects = torch.tensor([[[0.5, 1.0], [0.0, 0.0]]])
        result = SweepResult(effects, torch.tensor([1.0, 2.0]), "m", "Patch", 0.0)
        per_sample = result.recovery(torch.tensor([2.0, 4.0]), per_sample=True)
        torch.testing.assert_close(per_sample, torch.tensor([[[0.5, 0.5], [0.0, 0.0]]], dtype=torch.float64))
        found = result.recovery(5.0)
        torch.testing.assert_close(found, torch.tensor([[1.5 / 7, 0.0]], dtype=torch.float64))

    def test_confidence_and_pvalues(self):
        pytest.importorskip("bkdfast.sweep.statistics")
        result = make_result(samples=30)
        result.effects[2, 3] += 5
        low, high = result.confidence(0.9, resamples=499)
        assert low.shape == (3, 4) and bool((low[2, 3] > 3) & (low <= high).logical_or(low.isnan()).all())
        wide = result.confidence(0.99, resamples=499)
        assert wide[0][0, 0] < low[0, 0] and wide[1][0, 0] > high[0, 0]
        raw, corrected = result.pvalues(None), result.pvalues()
        assert raw[2, 3] < 1e-3 and corrected[2, 3] == pytest.approx(11 * raw[2, 3].item()) and raw[0, 1].isnan()
        assert bool((result.pvalues("bh").nan_to_num() <= corrected.nan_to_num()).all())

    def test_ties(self):
        pytest.importorskip("bkdfast.sweep.statistics")
        effects = torch.zeros(2, 2, 3)
        effects[0, 0], effects[0, 1], effects[1, 0] = 3.0, 2.0, 1.99
        result = SweepResult(effects, torch.zeros(3), "m", "Patch", 0.0)
        assert result.top(2) == result.top(2, ties=0.0) == [(0, 0), (0, 1)]
        assert result.top(2, ties=0.05) == [(0, 0), (0, 1), (1, 0)]
