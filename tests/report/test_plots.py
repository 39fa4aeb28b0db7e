"""Figures show the numbers they are given, touch nothing global, and are written whole or not at all."""

import builtins
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from bkdfast.errors import BkdfastError, InvalidArgumentError
from bkdfast.report import plots
from tests.report.audits import TOP, make_audit


def heatmap_array(figure):
    (image,) = figure.axes[0].images
    return image.get_array()


def test_heatmap_shows_the_values_with_zero_in_the_middle_and_layer_0_at_the_bottom():
    values = torch.randn(4, 6)
    figure = plots.head_heatmap(values, label="change", title="title")
    axes = figure.axes[0]
    np.testing.assert_array_equal(heatmap_array(figure), values.numpy())
    limits = axes.images[0].get_clim()
    assert limits[0] == -limits[1] == -float(values.abs().max())
    assert axes.get_ylim()[0] < axes.get_ylim()[1]
    assert figure.axes[1].get_ylabel() == "change"


def test_heatmap_masks_heads_that_were_not_swept():
    audit = make_audit()
    figure = plots.head_heatmap(audit.attribution.mean, "change", "title")
    assert heatmap_array(figure).mask.nonzero() == (np.array([0]), np.array([1]))
    assert len(figure.axes[0].texts) == 10


def test_heatmap_marks_and_labels_the_heads_asked_for():
    values = torch.zeros(4, 6)
    values[TOP] = -0.25
    (outline,) = plots.head_heatmap(values, "change", "title", [TOP]).axes[0].patches
    assert outline.get_xy() == (TOP[1] - 0.5, TOP[0] - 0.5)
    (label,) = plots.head_heatmap(values, "change", "title", [TOP]).axes[0].texts
    assert float(label.get_text()) == -0.25


@pytest.mark.parametrize(
    ("shape", "fill"),
    [(shape, None) for shape in ((1, 1), (6, 8), (32, 32), (80, 64), (12, 128))]
    + [((6, 8), fill) for fill in (0.0, torch.nan, 1e-7)]
    + [((32, 32), 300.0)],
)
def test_heatmap_of_any_size_and_scale(shape, fill):
    values = torch.randn(shape) if fill is None else torch.full(shape, fill)
    figure = plots.head_heatmap(values, "change", "title")
    width, height = figure.get_size_inches()
    assert width < 9 and height < 11
    figure.canvas.draw()
    for label in figure.axes[0].texts:
        box = label.get_window_extent()
        cell = figure.axes[0].transData.transform([(0, 0), (1, 1)])
        assert box.width <= 1.05 * (cell[1] - cell[0])[0] and box.height <= 1.05 * (cell[1] - cell[0])[1]


def test_ablation_curve_has_rates_intervals_and_every_control():
    audit = make_audit()
    attack, accuracy = plots.ablation_curve(audit.ablation).axes
    lines = {line.get_label(): line for line in attack.lines}
    np.testing.assert_allclose(lines["top heads"].get_ydata(), [100, 99, 45, 2])
    assert len(lines["one random set"].get_ydata()) == 9
    np.testing.assert_allclose(lines["random heads (mean)"].get_ydata(), [99.0] * 3)
    band = attack.collections[0].get_paths()[0].vertices[:, 1]
    low, high = audit.ablation[2].attack.interval
    assert np.isclose(band, 100 * low).any() and np.isclose(band, 100 * high).any()
    np.testing.assert_allclose(accuracy.lines[-1].get_ydata(), [99.5, 99.5, 99.5, 99])
    assert [tick.get_text() for tick in attack.get_xticklabels()] == ["0", "1", "2", "4"]
    assert "n = 200" in attack.get_title("left")


def test_ablation_curve_without_controls():
    attack, _ = plots.ablation_curve(make_audit(random=()).ablation).axes
    assert len(attack.lines) == 1


def test_singular_values_one_line_a_block_without_empty_rows():
    directions = make_audit().directions
    directions.strength[1, 2:3] = 0
    panels = plots.singular_values(directions).axes[:2]
    for panel, rows in zip(panels, (slice(0, 3), slice(3, 6)), strict=True):
        assert panel.get_yscale() == "log" and len(panel.lines) == 4
        for line, strength in zip(panel.lines, directions.strength[:, rows], strict=True):
            np.testing.assert_allclose(line.get_ydata(), strength[strength > 0])


def test_singular_values_without_any():
    directions = make_audit().directions
    directions.strength.zero_()
    plots.singular_values(directions).canvas.draw()


def test_singular_values_of_one_component():
    directions = make_audit().directions
    one = replace(
        directions, vectors=directions.vectors[:, :3], strength=directions.strength[:, :3], component=("out_proj",) * 3
    )
    assert len(plots.singular_values(one).axes) == 2  # one panel and the colour bar


def test_monitor_ranges_draws_every_request_in_every_block():
    outcome = make_audit().monitor
    figure = plots.monitor_ranges(outcome)
    excess, intervals = figure.axes
    for name, seen in (("clean", outcome.clean), ("triggered", outcome.triggered)):
        dots = [c for c in excess.collections if c.get_gid() == name]
        assert len(dots) == 4 + 1
        expected = outcome.monitor.ranges.excess(seen)[:, 0].amax(-1)
        for block in range(4):
            np.testing.assert_allclose(dots[block].get_offsets()[:, 1], expected[:, block])
        np.testing.assert_allclose(dots[4].get_offsets()[:, 1], expected.amax(1))
        (lines,) = (c for c in intervals.collections if c.get_gid() == name)
        assert len(lines.get_segments()) == len(seen)
    assert intervals.get_title("left") == "Block 1, down_proj direction 1"
    dashed = next(line for line in excess.lines if "flagged" in str(line.get_label()))
    assert set(dashed.get_ydata()) == {outcome.monitor.eps}


def test_telling_direction_finds_the_one_that_moved():
    outcome = make_audit().monitor
    found = plots.telling_direction(outcome.monitor.ranges, outcome.monitor.eps, outcome.clean, outcome.triggered)
    assert found == (0, 1, 4)


def test_monitor_ranges_of_many_blocks_many_requests_and_none():
    plots.monitor_ranges(make_audit(layers=48, n_clean=300).monitor).canvas.draw()
    outcome = make_audit().monitor
    empty = outcome.triggered.select(torch.zeros(30, dtype=torch.bool))
    plots.monitor_ranges(replace(outcome, triggered=empty)).canvas.draw()
    outcome.monitor.ranges = None
    with pytest.raises(InvalidArgumentError, match="calibrate"):
        plots.monitor_ranges(outcome)


@pytest.mark.parametrize("name", ["f.png", "f.svg", "F.PNG"])
def test_save_writes_the_format_of_the_suffix(tmp_path, name):
    figure = plots.head_heatmap(torch.randn(2, 3), "a $x$ & <b>", "t")
    assert plots.save(figure, tmp_path / name) is figure
    data = (tmp_path / name).read_bytes()
    assert data.startswith(b"\x89PNG") if name.lower().endswith("png") else b"<svg" in data
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert plots.save(figure, None) is figure


def test_save_is_reproducible(tmp_path):
    for name in ("a.svg", "b.svg"):
        plots.save(plots.monitor_ranges(make_audit().monitor), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_save_refuses_what_it_cannot_write(tmp_path):
    figure = plots.head_heatmap(torch.randn(2, 3), "label", "title")
    for name in ("f.jpg", "f", "f.pdf"):
        with pytest.raises(InvalidArgumentError, match=r"neither \.png nor \.svg"):
            plots.save(figure, tmp_path / name)
    with pytest.raises(InvalidArgumentError, match="no folder"):
        plots.save(figure, tmp_path / "missing" / "f.png")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    figure = plots.head_heatmap(torch.randn(2, 3), "label", "title")
    path = tmp_path / "f.png"
    path.write_text("old")

    def half(to, **options):
        to.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        plots.save(figure, path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.png"]


def test_a_file_appears_by_one_rename(tmp_path, monkeypatch):
    path = tmp_path / "f.svg"
    path.write_text("old")

    def refuse(*args):
        raise PermissionError("no rename")

    monkeypatch.setattr(plots.os, "replace", refuse)
    with pytest.raises(PermissionError):
        plots.save(plots.head_heatmap(torch.randn(2, 3), "label", "title"), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f.svg"]


def test_figures_leave_the_users_matplotlib_alone():
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 31, "text.usetex": True}):
        figure = plots.ablation_curve(make_audit().ablation)
        assert matplotlib.rcParams["font.size"] == 31
    assert figure.axes[0].title.get_fontsize() < 15
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(plots.MissingDependencyError, match=r'pip install "bkdfast\[viz\]"') as caught:
        make_audit().attribution.plot()
    assert isinstance(caught.value, BkdfastError) and isinstance(caught.value, ImportError)
