"""Figures of sweeps show the numbers, and are readable at any size."""

import numpy as np
import pytest
import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.report import sweeps
from tests.sweep.results import SHAPES, make_result


def overlapping(labels):
    boxes = [label.get_window_extent() for label in labels if label.get_text()]
    return any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[i + 1 :])


@pytest.mark.parametrize("dims", SHAPES, ids="-".join)
def test_every_result_has_a_figure(tmp_path, dims):
    result = make_result(dims)
    figure = result.plot(tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 5000
    assert "Patch" in figure.axes[0].get_title("left")


@pytest.mark.parametrize("dims", [("layer", "position"), ("layer", "head")])
def test_a_map_shows_the_means(dims):
    result = make_result(dims)
    figure = result.plot()
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), result.mean.numpy())
    assert figure.axes[0].get_xlabel() == dims[1] and figure.axes[0].get_ylabel() == dims[0]


def test_tokens_name_the_positions():
    result = make_result(("layer", "position"))
    tokens = ["<s>", "a\n", "an exceedingly long token", "b", "$x$", "</s>"]
    figure = result.plot(tokens=tokens)
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert (
        shown[0] == "<s>" and shown[1] == "a\N{OPEN BOX}" and shown[2].startswith("an exceedingly") and len(shown) == 6
    )
    with pytest.raises(InvalidArgumentError, match="5 tokens, but 6 positions"):
        result.plot(tokens=tokens[:5])
    with pytest.raises(InvalidArgumentError, match="6 tokens, but 0 positions"):
        make_result().plot(tokens=tokens)


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (12, 30), (32, 128), (4, 64), (80, 200), (1, 1)])
def test_labels_do_not_overlap(shape, tokens):
    result = make_result(("layer", "position"), shape=shape, coords={}, left_out=False)
    figure = result.plot(tokens=[f"a longer token {i}" for i in range(shape[1])] if tokens else None)
    figure.canvas.draw()
    axes, bar = figure.axes
    assert not overlapping(axes.get_xticklabels()) and not overlapping(axes.get_yticklabels())
    width, height = figure.canvas.get_width_height()
    for label in (bar.yaxis.label, axes.title):
        box = label.get_window_extent()
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_a_map_of_many_heads_shows_the_strongest():
    result = make_result(("layer", "head", "position"), shape=(8, 8, 5), coords={})
    axes = result.plot().axes[0]
    shown = [label.get_text() for label in axes.get_yticklabels()]
    strength = result.mean.abs().nan_to_num(nan=-1.0).amax(-1).flatten()
    expected = sorted(strength.argsort(descending=True)[: sweeps.ROWS].tolist())
    assert shown == [f"{i // 8}.{i % 8}" for i in expected]
    np.testing.assert_array_equal(axes.images[0].get_array(), result.mean.flatten(0, 1)[expected])


def test_a_line_over_layers_with_its_error():
    result = make_result(("layer",))
    axes = result.plot().axes[0]
    line = next(line for line in axes.lines if line.get_label() == "mean")
    np.testing.assert_array_equal(line.get_xdata(), [0, 2, 3, 4])
    np.testing.assert_array_equal(line.get_ydata(), result.mean[[0, 2, 3, 4]])
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert np.isclose(band, float(result.mean[3] + result.stderr[3])).any()


def test_sets_that_grow_are_a_line_over_their_size():
    heads = [(0, 1), (3, 2), (1, 1), (2, 0)]
    result = make_result(("set",), coords={"set": [heads[:k] for k in range(1, 5)]}, left_out=False)
    axes = result.plot().axes[0]
    assert axes.get_xlabel() == "number of heads"
    np.testing.assert_array_equal(axes.lines[-1].get_xdata(), [1, 2, 3, 4])


def test_other_sets_are_bars_in_their_order():
    result = make_result(("set",), left_out=False)
    axes = result.plot().axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], result.mean, rtol=1e-6)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["none", "3.1", "4.6+4.1", "0.0+2.2+2.3"]
    assert len(make_result(("set",)).plot().axes[0].patches) == 3, "a set that was not swept has no bar"


def test_of_many_sets_the_strongest_are_shown():
    sets = [[(i, 0)] for i in range(99)] + [[(i, 1) for i in range(20)]]
    result = make_result(("set",), shape=(100,), coords={"set": sets})
    figure = result.plot()
    assert len(figure.axes[0].patches) == sweeps.BARS and "40 strongest of 99" in figure.axes[0].get_title("left")
    assert figure.get_size_inches()[1] < 11


def test_an_empty_sweep_can_be_drawn():
    for dims in SHAPES:
        result = make_result(dims)
        result.effects.fill_(torch.nan)
        result.plot().canvas.draw()
