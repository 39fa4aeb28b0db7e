"""Figures of an audit: plain functions from results to a matplotlib `Figure`, without pyplot and its global state."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import secrets
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch

from bkdfast.errors import InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bkdfast.monitor import Observations
    from bkdfast.monitor.ranges import Ranges
    from bkdfast.studies.audit import AblationPoint, MonitorOutcome
    from bkdfast.svd import Directions

# Okabe and Ito's palette, which stays apart under the common colour-vision deficiencies.
BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#D55E00", "#009E73", "#8C959F", "#1F2328"
WIDTH = 8.2  # inches
SHOWN = 60  # requests of a group drawn as intervals
_STYLE: Any = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is no formula
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#E1E4E8",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
    "svg.fonttype": "path",
    "svg.hashsalt": "bkdfast",
}
_P = ParamSpec("_P")
_R = TypeVar("_R")


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """This module's style, for as long as a figure is built or written.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise MissingDependencyError(
            f'figures and reports need matplotlib, which cannot be imported ({error}); pip install "bkdfast[viz]"'
        ) from error
    # The user's own matplotlibrc is out of force here, so that figures look the same everywhere.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def require() -> None:
    """Raise MissingDependencyError now rather than after the work that the figures are to show."""
    with _style():
        pass


def _styled(draw: Callable[_P, _R]) -> Callable[_P, _R]:
    @functools.wraps(draw)
    def styled(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with _style():
            return draw(*args, **kwargs)

    return styled


def _figure(height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: str | os.PathLike[str] | None) -> Figure:
    """Write a figure whole or not at all, if there is a path.

    Args:
        figure: a matplotlib figure.
        path: a `.png` or `.svg` file; None: write nothing.

    Returns:
        The figure.

    Raises:
        InvalidArgumentError: another suffix, or the folder does not exist.
    """
    if path is None:
        return figure
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".png", ".svg"):
        raise InvalidArgumentError(f"cannot write {path.name}: the suffix {kind!r} is neither .png nor .svg")
    with whole(path) as temporary:
        render(figure, temporary, kind[1:])
    return figure


def render(figure: Figure, to: Path | IO[bytes], kind: str = "svg") -> None:
    """Write a figure to a file or buffer as `"svg"` or `"png"`; equal figures give equal bytes."""
    with _style():
        figure.savefig(to, format=kind, metadata={"Date": None} if kind == "svg" else None)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces `path` at the end and is removed on an error.

    Raises:
        InvalidArgumentError: the folder of `path` does not exist.
    """
    if not path.parent.is_dir():
        raise InvalidArgumentError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@_styled
def head_heatmap(
    values: torch.Tensor,
    label: str,
    title: str,
    mark: Sequence[tuple[int, int]] | None = None,
    *,
    names: tuple[str, str] = ("layer", "head"),
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
) -> Figure:
    """Heat map of one value a head, layers upwards and heads to the right, colours centred at zero.

    Args:
        values: `[L, H]`, NaN for heads that were not swept (grey).
        label: what the values are, with unit; beside the colour bar.
        title: above the map.
        mark: (layer, head) to outline; None: the ten largest absolute values.
        names: what rows and columns are, in a map of something else.
        rows: names of the rows; None: their numbers.
        columns: names of the columns; None: their numbers.
    """
    import matplotlib
    from matplotlib.patches import Rectangle

    values = values.detach().cpu().float()
    layers, heads = values.shape
    swept = torch.isfinite(values)
    limit = float(values[swept].abs().max()) if swept.any() else 0.0
    limit = limit or 1.0
    if mark is None:
        order = values.abs().nan_to_num(nan=-1.0).flatten().argsort(descending=True, stable=True)[:10].tolist()
        mark = [divmod(i, heads) for i in order if swept.flatten()[i]]

    wide = WIDTH - 1.7  # inches of the map itself
    cell = min(wide / heads, 0.62)
    height = min(max(layers * min(max(cell, 0.11), 0.42), 1.4), 9.0)
    figure = _figure(height + 0.95)
    axes = figure.subplots()
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad="#D0D7DE")
    image = axes.imshow(
        values.numpy(), origin="lower", aspect="auto", cmap=colours, vmin=-limit, vmax=limit, interpolation="nearest"
    )
    axes.set(xlabel=names[1], ylabel=names[0], title=title)
    _name_ticks(axes.xaxis, heads, wide, columns)
    up = range(0, layers, _step(layers, min(34, int(height / 0.15))))
    axes.set_yticks(up, None if rows is None else [shortened(rows[i]) for i in up])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xticks([i - 0.5 for i in range(1, heads)], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, layers)], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8 if cell > 0.3 else 0.3)
    axes.tick_params(which="minor", length=0)

    roomy = wide / heads > 0.5
    decimals = min(max(0, (2 if roomy else 1) - math.floor(math.log10(limit))), 6)
    letters = len(f"{limit:+.{decimals}f}")
    points = min(9.0, 72 * wide / heads / (0.62 * letters), 0.6 * 72 * height / layers)
    for layer, head in mark:
        value = float(values[layer, head])
        outline = Rectangle((head - 0.5, layer - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.3, zorder=3)
        axes.add_patch(outline).set_clip_on(False)
        if points >= 4.5 and math.isfinite(value):
            ink = "white" if abs(value) > 0.6 * limit else INK
            axes.text(
                head, layer, f"{value:+.{decimals}f}", ha="center", va="center", fontsize=points, color=ink, zorder=4
            )
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=max(10, 6 * height))
    bar.set_label(textwrap.fill(label, max(12, int(height / 0.078))))
    bar.outline.set_visible(False)
    return figure


@_styled
def ablation_curve(points: Sequence[AblationPoint]) -> Figure:
    """Attack success and clean accuracy against the number of zeroed heads, with 95% Wilson intervals.

    Sets of random heads are grey: one dot a set, a line through their mean.
    """
    figure = _figure(3.5)
    panels = figure.subplots(1, 2, sharey=True)
    series = (
        (panels[0], "Attack success", ORANGE, "triggered", [(p.attack, p.random_attack) for p in points]),
        (panels[1], "Clean accuracy", BLUE, "clean", [(p.accuracy, p.random_accuracy) for p in points]),
    )
    for axes, name, colour, unit, rates in series:
        sets = [(x, [100 * rate.value for rate in controls]) for x, (_, controls) in enumerate(rates) if controls]
        dots = [(x + d, value) for x, values in sets for d, value in zip(_fan(len(values)), values, strict=True)]
        if dots:
            means = [(x, sum(values) / len(values)) for x, values in sets]
            grey = {"color": GREY, "zorder": 2}
            axes.plot(*zip(*means, strict=True), "--", linewidth=1.3, label="random heads (mean)", **grey)
            axes.plot(*zip(*dots, strict=True), "o", markersize=3.5, alpha=0.8, label="one random set", **grey)
        x = range(len(points))
        low, high = ([100 * rate.interval[end] for rate, _ in rates] for end in (0, 1))
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0, label="95% interval")
        values = [100 * rate.value for rate, _ in rates]
        axes.plot(x, values, "o-", color=colour, linewidth=2, markersize=5.5, zorder=3, label="top heads")
        axes.set_xticks(x, [str(point.heads) for point in points])
        axes.set(ylim=(-4, 104), xlabel="heads zeroed (categories, not to scale)")
        axes.set_title(f"{name} (n = {max(rate.total for rate, _ in rates)} {unit} prompts)")
        axes.grid(axis="y")
        axes.tick_params(length=0)
    panels[0].set_ylabel("rate (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4)
    return figure


@_styled
def singular_values(directions: Directions) -> Figure:
    """Singular values of each block's deltas in falling order, one panel a projection, one line a block."""
    import matplotlib
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    components = list(dict.fromkeys(directions.component))
    layers = len(directions.strength)
    figure = _figure(3.4)
    panels = figure.subplots(1, len(components), sharey=True, squeeze=False)[0]
    ramp = matplotlib.colormaps["viridis"](torch.linspace(0.0, 0.88, 256).numpy())
    colours = LinearSegmentedColormap.from_list("blocks", ramp, N=max(layers, 2))
    looks: Any = {"linewidth": 1.3, "markersize": 3.5, "alpha": 0.9, "rasterized": layers > 24}  # else large files
    for axes, component in zip(panels, components, strict=True):
        rows = [i for i, name in enumerate(directions.component) if name == component]
        for layer, strength in enumerate(directions.strength[:, rows].cpu()):
            shown = strength[strength > 0].numpy()
            axes.plot(range(1, len(shown) + 1), shown, "o-", color=colours(layer), **looks)
        axes.set_yscale("log")
        axes.set_title(f"Change of {component}")
        axes.set_xlabel("singular value, in falling order")
        axes.set_xlim(0.6, len(rows) + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.grid(axis="y")
    positive = directions.strength[directions.strength > 0]
    spread = float(positive.max() / positive.min()) if len(positive) else 1.0
    ticks = (1.0,) if spread > 300 else (1.0, 2.0, 5.0) if spread > 20 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    panels[0].yaxis.set_major_locator(LogLocator(subs=ticks))
    panels[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panels[0].yaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("singular value of the weight change")
    scale = matplotlib.cm.ScalarMappable(BoundaryNorm([i - 0.5 for i in range(layers + 1)], max(layers, 2)), colours)
    bar = figure.colorbar(scale, ax=list(panels), pad=0.015, aspect=25, ticks=range(0, layers, _step(layers, 12)))
    bar.set_label("block")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, which="both")
    return figure


@_styled
def monitor_ranges(outcome: MonitorOutcome) -> Figure:
    """How far clean and triggered requests leave the calibrated ranges.

    Left: for each block, and for all together, the largest excess of each request over the block's directions. Right:
    for the direction that tells the two groups apart best on these requests, each request's interval of cosines.
    """
    ranges, eps = outcome.monitor.ranges, outcome.monitor.eps
    if ranges is None:
        raise InvalidArgumentError("the monitor has no ranges, so there is nothing to draw; calibrate it first")
    left, right = (figure := _figure(4.2)).subplots(1, 2, width_ratios=(1.55, 1))
    groups = [("clean", BLUE, outcome.clean), ("triggered", ORANGE, outcome.triggered)]
    _excess_strips(left, ranges, eps, groups)
    _intervals(right, ranges, eps, groups, outcome.monitor.directions.component)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


_Group = tuple[str, str, "Observations"]


def request_excess(ranges: Ranges, seen: Observations) -> torch.Tensor:
    """Largest excess of each request by block, `[R, L]`, in units of cosine; NaN where nothing was judged."""
    layers = ranges.low.shape[1]
    if not len(seen):
        return torch.empty(0, layers)
    largest = ranges.excess(seen).amax((1, 3))
    return largest.where(torch.isfinite(largest), torch.nan)


def _excess_strips(axes: Any, ranges: Ranges, eps: float, groups: Sequence[_Group]) -> None:
    noise = torch.Generator().manual_seed(0)  # jitter, so that equal values show as many
    layers = ranges.low.shape[1]
    wide = max(1.0, layers / 14)  # of the last column, which has to be seen beside many blocks
    last = layers - 0.3 + 0.6 * wide
    for (name, colour, seen), side in zip(groups, (-0.2, 0.2), strict=True):
        excess = request_excess(ranges, seen)
        columns = [*excess.unbind(1), excess.nan_to_num(nan=-torch.inf).amax(1)]
        for x, column in enumerate(columns):
            column = column[torch.isfinite(column)]
            if not len(column):
                continue
            at, size = (last, wide) if x == layers else (x, 1.0)
            at += side * size
            jitter = (torch.rand(len(column), generator=noise) - 0.5) * 0.3 * size
            axes.scatter(
                at + jitter, column, s=7, color=colour, alpha=0.3, linewidth=0, zorder=2, rasterized=True, gid=name
            )
            axes.plot(
                [at - 0.17 * size, at + 0.17 * size],
                [float(column.median())] * 2,
                color=colour,
                linewidth=2.2,
                zorder=4,
            )
        axes.plot([], [], "o", color=colour, markersize=5, label=f"{name} (n = {len(seen)})")
    axes.axhline(eps, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3, label=f"flagged beyond (eps = {eps:g})")
    axes.axvline(layers - 0.3, color=GREY, linewidth=0.7)
    blocks = range(0, layers, _step(layers, 16))
    axes.set_xticks([*blocks, last], [*map(str, blocks), "all"])
    axes.set_xlim(-0.6, last + 0.6 * wide)
    axes.set(xlabel="block", ylabel="largest excess over the range (cosine)", title="Distance outside the clean ranges")
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")


def _intervals(axes: Any, ranges: Ranges, eps: float, groups: Sequence[_Group], component: Sequence[str]) -> None:
    role, layer, row = telling_direction(ranges, eps, groups[0][2], groups[1][2])
    low, high = (float(end[role, layer, row]) for end in (ranges.low, ranges.high))
    top = 0
    for name, colour, seen in groups:
        ends = torch.stack((seen.low[:, role, layer, row], seen.high[:, role, layer, row]), 1)
        ends = ends[torch.isfinite(ends).all(1)]
        ends = ends[ends.sum(1).argsort()]
        if len(ends) > SHOWN:  # evenly through the sorted list, its ends included
            ends = ends[torch.linspace(0, len(ends) - 1, SHOWN).round().long()]
        axes.hlines(
            range(top, top + len(ends)), ends[:, 0], ends[:, 1], color=colour, linewidth=0.9, alpha=0.75, gid=name
        )
        if len(ends):
            axes.text(
                -0.015, top + len(ends) / 2, name, color=colour, rotation=90, ha="right", va="center",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        top += len(ends) + max(4, len(ends) // 20)
    if math.isfinite(low) and math.isfinite(high):
        axes.axvspan(low - eps, high + eps, color=GREY, alpha=0.22, linewidth=0, zorder=0)
        for end in (low - eps, high + eps):
            axes.axvline(end, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    names = [i for i, name in enumerate(component) if name == component[row]]
    axes.set_title(f"Block {layer}, {component[row]} direction {names.index(row)}")
    axes.set(xlabel="range of cosines in a request", yticks=[], ylim=(-2, max(top, 1)))
    axes.spines["left"].set_visible(False)


def telling_direction(ranges: Ranges, eps: float, clean: Observations, triggered: Observations) -> tuple[int, int, int]:
    """(role, block, direction) that best flags triggered but not clean requests; ties by median excess."""
    shape = ranges.low.shape
    gap, middle = torch.zeros(shape), torch.zeros(shape)
    for seen, sign in ((triggered, 1), (clean, -1)):
        if len(seen):
            excess = ranges.excess(seen)
            gap += sign * (excess > eps).float().mean(0)
            middle += sign * excess.clamp(min=-2).median(0).values
    best = int((gap + 1e-3 * middle).flatten().argmax())
    role, rest = divmod(best, shape[1] * shape[2])
    return role, rest // shape[2], rest % shape[2]


def _name_ticks(axis: Any, count: int, inches: float, names: Sequence[str] | None) -> None:
    """Numbers, or names that are turned where they are too long to stand side by side."""
    if names is None:
        room = 0.085 * len(str(count - 1)) + 0.06
        axis.set_ticks(range(0, count, _step(count, min(34, int(inches / room)))))
        return
    shown = range(0, count, _step(count, 64))
    texts = [shortened(names[i]) for i in shown]
    each = inches / len(shown)
    turned = max(len(text) for text in texts) * 0.085 + 0.06 > each
    axis.set_ticks(shown, texts, rotation=90 if turned else 0, fontsize=min(9.5, 62 * each) if turned else 9.5)


def shortened(text: str, most: int = 18) -> str:
    """A label that leaves room for the figure."""
    text = "".join(c if c.isprintable() else "\N{OPEN BOX}" for c in text)
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _step(count: int, most: int) -> int:
    """Distance of ticks, so that there are at most `most`."""
    need = math.ceil(count / most)
    return next((step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32) if step >= need), need)


def _fan(count: int) -> list[float]:
    """Small offsets that set equal dots beside each other."""
    return [0.09 * (i - (count - 1) / 2) for i in range(count)] if count <= 5 else [0.0] * count
