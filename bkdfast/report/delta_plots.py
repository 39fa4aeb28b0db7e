"""Figures of weight deltas: spectra, what changed where, and how much directions have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bkdfast.report.plots import BLUE, GREEN, GREY, INK, ORANGE, WIDTH, _figure, _step, _styled, shortened
from bkdfast.svd.noise import noise_edge
from bkdfast.svd.places import labels, places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bkdfast.svd.overlap import Overlap
    from bkdfast.svd.result import TensorDelta

PANELS, ROWS, LINES = 12, 24, 8
"""Most panels of spectra, rows of a map, lines of overlaps; the projections of largest delta or overlap are kept."""
_COLOURS = (ORANGE, BLUE, GREEN, "#CC79A7", "#E69F00", "#56B4E9", INK, GREY)
_MARKERS = "osD^vPX*"


def by_projection(deltas: Mapping[str, TensorDelta]) -> dict[str, dict[int, list[TensorDelta]]]:
    """Deltas of the blocks: projection -> layer -> one delta, or one for each expert; in the order of the data's flow.

    Projections are named as by `bkdfast.svd.places.labels`.
    """
    found = [p for p in places(deltas) if p.layer is not None]
    label = labels(found)
    groups: dict[str, dict[int, list[TensorDelta]]] = {}
    for p in sorted(found, key=lambda p: p.order):  # stable: layers stay sorted
        groups.setdefault(label[p.stack, p.projection], {}).setdefault(p.layer or 0, []).append(deltas[p.name])
    return groups


def outside(deltas: Mapping[str, TensorDelta]) -> list[TensorDelta]:
    """Deltas of weights outside the blocks."""
    return [deltas[p.name] for p in places(deltas) if p.layer is None]


def norm_of(deltas: Sequence[TensorDelta]) -> float:
    """Frobenius norm of several deltas together."""
    return math.hypot(*(delta.frobenius for delta in deltas))


def energy_of(deltas: Sequence[TensorDelta]) -> float:
    """Share of the squared Frobenius norm of several deltas that their triplets hold; NaN where nothing changed."""
    total = sum(delta.frobenius**2 for delta in deltas)
    return min(sum(float(delta.s.square().sum()) for delta in deltas) / total, 1.0) if total > 0 else math.nan


@_styled
def spectra(deltas: Mapping[str, TensorDelta]) -> Figure | None:
    """Leading singular values, a panel for each projection and a line for each layer, with the noise edge.

    Of experts the one of largest norm is drawn for each layer. Weights outside the blocks share the last panel.

    Args:
        deltas: `DeltaSVD`, or any mapping from names to deltas.

    Returns:
        The figure; None where nothing changed.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    groups = {
        label: {layer: max(found, key=lambda delta: delta.frobenius) for layer, found in layers.items()}
        for label, layers in by_projection(deltas).items()
        if any(delta.rank for found in layers.values() for delta in found)
    }
    weight = {label: norm_of(list(layers.values())) for label, layers in groups.items()}
    kept = sorted(groups, key=lambda label: -weight[label])[:PANELS]
    groups = {label: layers for label, layers in groups.items() if label in kept}
    rest = [delta for delta in outside(deltas) if delta.rank]
    count = len(groups) + bool(rest)
    if not count:
        return None
    across = count if count <= 3 else 2 if count == 4 else 3
    down = math.ceil(count / across)
    figure = _figure(0.75 + (2.9 if down == 1 else 2.25 * down))
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    numbers = sorted({layer for layers in groups.values() for layer in layers})
    depth = _depth(numbers)
    for axes, (label, layers) in zip(grid.flat, groups.items(), strict=False):
        for layer, delta in layers.items():
            _spectrum(axes, delta, depth(layer), len(layers))
        _edges(axes, list(layers.values()))
        _words(axes, label, list(layers.values()))
    if rest:
        axes = grid.flat[len(groups)]
        named = sorted(rest, key=lambda delta: -delta.frobenius)[: len(_COLOURS) - 2]
        for delta, colour in zip(named, _COLOURS, strict=False):
            _spectrum(axes, delta, colour, len(named))
        _edges(axes, named)
        more = f" (the {len(named)} largest)" if len(rest) > len(named) else ""
        _words(axes, "outside the blocks" + more, named)
        lines = [Line2D([], [], color=colour) for _, colour in zip(named, _COLOURS, strict=False)]
        names = [_tail(delta.name.removesuffix(".weight"), 26) for delta in named]
        axes.legend(
            lines, names, loc="upper right", bbox_to_anchor=(1.0, 0.92), fontsize=7.5, handlelength=1.2,
            borderaxespad=0.2, labelspacing=0.25,
        )  # fmt: skip
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for i in range(count):
        if i + across >= count:
            grid.flat[i].tick_params(labelbottom=True)
        if i // across == down - 1:
            grid.flat[i].set_xlabel("singular value, in falling order")
    shown = [*(delta for layers in groups.values() for delta in layers.values()), *rest]
    _value_axis(grid.flat[0], shown)
    for row in grid:
        row[0].set_ylabel("singular value of the delta")
    if len(numbers) > 1:
        _depth_bar(figure, list(grid.flat[:count]), numbers)
    if any(noise_edge(delta) > 0 for delta in shown):
        mark = Patch(facecolor="#E2E5E8", edgecolor="#59636E", linewidth=0.9, linestyle=(0, (4, 3)))
        figure.legend([mark], ["noise edge (from lowest to highest of a panel's lines)"], loc="outside lower center")
    return figure


def _spectrum(axes: Any, delta: TensorDelta, colour: Any, lines: int) -> None:
    values = delta.s[delta.s > 0].tolist()
    looks: Any = {"linewidth": 1.4 if lines <= 12 else 0.9, "rasterized": lines > 24}
    marker = "o-" if lines <= 8 or len(values) == 1 else "-"
    axes.plot(range(1, len(values) + 1), values, marker, markersize=2.8, color=colour, alpha=0.9, zorder=3, **looks)


def _edges(axes: Any, deltas: Sequence[TensorDelta]) -> None:
    edges = [edge for delta in deltas if (edge := noise_edge(delta)) > 0]
    if edges:
        low, high = min(edges), max(edges)
        axes.axhspan(low, high, color=GREY, alpha=0.25, linewidth=0, zorder=1)
        for edge in {low, high}:
            axes.axhline(edge, color="#59636E", linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)


def _words(axes: Any, label: str, deltas: Sequence[TensorDelta]) -> None:
    """Name of a panel, and the energy captured where the falling lines leave room."""
    axes.set_title(_tail(label, 36), fontsize=min(10.0, 280 / min(len(label), 36)))
    shares = sorted(100 * delta.energy for delta in deltas if delta.rank)
    ends = dict.fromkeys(f"{share:.0f}" for share in (shares[0], shares[-1]))
    axes.text(
        0.985, 0.97, f"energy captured {' to '.join(ends)}%", transform=axes.transAxes, ha="right", va="top",
        fontsize=8, color="#59636E", zorder=5,
        bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 1.0},
    )  # fmt: skip


def _value_axis(axes: Any, deltas: Sequence[TensorDelta]) -> None:
    """A log scale over all values that are drawn, with room above for the words, and edges that are not far below."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    values = torch.cat([delta.s[delta.s > 0] for delta in deltas])
    edges = [noise_edge(delta) for delta in deltas]
    top = max(float(values.max()), *edges)
    low = min([float(values.min()), *(edge for edge in edges if edge > float(values.min()) / 3)])
    span = max(top / low, 1.6)
    axes.set_yscale("log")
    axes.set_ylim(low / span**0.06, top * span**0.16)
    subs = (1.0,) if span > 100 else (1.0, 2.0, 5.0) if span > 8 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    most = max(delta.rank for delta in deltas)
    margin = max(0.04 * most, 0.15)
    axes.set_xlim(1 - margin, most + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))
    for panel in axes.figure.axes:
        panel.grid(axis="y")
        panel.tick_params(length=0, which="both")


def _depth(numbers: Sequence[int]) -> Any:
    """Colour of a layer, from dark (first) to light (last)."""
    import matplotlib

    if len(numbers) <= 1:
        return lambda layer: BLUE
    ramp = matplotlib.colormaps["viridis"]
    low, high = numbers[0], numbers[-1]
    return lambda layer: ramp(0.88 * (layer - low) / (high - low))


def _depth_bar(figure: Figure, panels: Sequence[Any], numbers: Sequence[int]) -> None:
    import matplotlib
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    ramp = matplotlib.colormaps["viridis"](torch.linspace(0.0, 0.88, 256).numpy())
    low, high = numbers[0], numbers[-1]
    scale = matplotlib.cm.ScalarMappable(Normalize(low, high), LinearSegmentedColormap.from_list("depth", ramp))
    bar = figure.colorbar(scale, ax=panels, pad=0.015, aspect=30, ticks=range(low, high + 1, _step(high - low + 1, 12)))
    bar.set_label("layer")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, which="both")


@_styled
def layer_maps(deltas: Mapping[str, TensorDelta], rank: int | None = None) -> Figure | None:
    """Frobenius norm of each delta, layer by projection, and under it what its triplets say of it.

    That is the share of its energy that `rank` of them capture; where a rule chose how many to keep, that number.

    Args:
        deltas: `DeltaSVD`, or any mapping from names to deltas. Experts of a layer count together.
        rank: triplets of every delta; None: as many as a rule kept of each.

    Returns:
        The figure; None where less than two cells would be there.
    """
    groups = by_projection(deltas)
    if sum(len(layers) for layers in groups.values()) < 2:
        return None
    weight = {label: norm_of([d for found in layers.values() for d in found]) for label, layers in groups.items()}
    kept = sorted(groups, key=lambda label: -weight[label])[:ROWS]
    rows = [label for label in groups if label in kept]
    numbers = sorted({layer for label in rows for layer in groups[label]})
    norms = torch.full((len(rows), len(numbers)), torch.nan, dtype=torch.float64)
    counts = norms.clone()
    for i, label in enumerate(rows):
        for layer, found in groups[label].items():
            norms[i, numbers.index(layer)] = norm_of(found)
            told = 100 * energy_of(found) if rank is not None else max(delta.rank for delta in found) or math.nan
            counts[i, numbers.index(layer)] = told
    each = min(0.3, 5.0 / len(rows))
    height = max(each * len(rows), 0.6)
    figure = _figure(2 * height + 1.75)
    upper, lower = figure.subplots(2, 1, sharex=True)
    more = f", the {len(rows)} projections of largest delta of {len(groups)}" if len(rows) < len(groups) else ""
    _map(upper, norms, f"Frobenius norm of the delta{more}", "norm", "Blues", _scale(norms), numbers, rows, height)
    if rank is not None:
        title, unit, top = f"Share of its squared norm that the {rank} leading triplets hold", "percent", 100.0
    else:
        title, unit, top = "Triplets that were kept", "number", max(float(counts.nan_to_num().max()), 1.0)
    _map(lower, counts, title, unit, "Oranges", (0.0, top, False), numbers, rows, height)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("layer")
    return figure


def _scale(values: torch.Tensor) -> tuple[float, float, bool]:
    """Lower and upper end of the colours, and whether they are logarithmic."""
    positive = values[values > 0]
    if not len(positive):
        return 0.0, 1.0, False
    low, high = float(positive.min()), float(positive.max())
    return (low, high, True) if high > 100 * low else (0.0, high, False)


def _map(
    axes: Any, values: torch.Tensor, title: str, unit: str, colours: str, scale: tuple[float, float, bool],
    numbers: Sequence[int], rows: Sequence[str], height: float,
) -> None:  # fmt: skip
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize

    low, high, log = scale
    shown = values.clamp(min=low) if log else values  # unchanged ones at the lower end
    cmap = matplotlib.colormaps[colours].with_extremes(bad="#D0D7DE")
    norm = (LogNorm if log else Normalize)(low, high)
    image = axes.imshow(shown.numpy(), aspect="auto", cmap=cmap, norm=norm, interpolation="nearest")
    axes.set_title(title + (" (log scale)" if log else ""))
    axes.set_yticks(range(len(rows)), [_tail(row, 32) for row in rows], fontsize=min(9.5, 65 * height / len(rows)))
    step = _step(len(numbers), 24)
    axes.set_xticks(range(0, len(numbers), step), [str(numbers[i]) for i in range(0, len(numbers), step)])
    axes.tick_params(length=0, which="both")
    axes.spines[:].set_visible(False)
    axes.set_xticks([i - 0.5 for i in range(1, len(numbers))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(rows))], minor=True)
    axes.grid(which="minor", color="white", linewidth=0.8 if len(numbers) <= 40 else 0.3)
    width = (WIDTH - 3.0) / len(numbers)
    texts = [[_short(value, whole=unit == "number") for value in row] for row in values.tolist()]
    letters = max(len(text) for row in texts for text in row)
    points = min(8.5, 72 * width / (0.68 * max(letters, 3)), 46 * height / len(rows))
    if points >= 6:
        for i, row in enumerate(texts):
            for j, text in enumerate(row):
                ink = "white" if float(norm(float(shown[i, j]))) > 0.6 else INK
                axes.text(j, i, text, ha="center", va="center", fontsize=points, color=ink)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015, aspect=max(6, 5 * height))
    bar.set_label(unit)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, which="both")


def _tail(text: str, most: int) -> str:
    """The end of a name, which tells more than its beginning."""
    text = shortened(text, len(text) or 1)
    return text if len(text) <= most else "\N{HORIZONTAL ELLIPSIS}" + text[1 - most :]


def _short(value: float, *, whole: bool) -> str:
    """Two or three digits."""
    if math.isnan(value):
        return ""
    return f"{value:.0f}" if whole or value == 0 or 10 <= value < 1000 else f"{value:#.2g}"


@_styled
def overlap_curves(found: Sequence[Overlap]) -> Figure | None:
    """Overlaps with the next layer, a line for each projection, and of output and down projection of the same layer.

    Args:
        found: of `bkdfast.svd.overlap.overlaps`.

    Returns:
        The figure, with what random directions would give; None where there is no overlap to draw.
    """
    from matplotlib.ticker import MaxNLocator

    found = [o for o in found if not math.isnan(o.overlap)]
    sides = [kind for kind in ("next layer", "same layer") if any(o.comparison == kind for o in found)]
    if not sides:
        return None
    figure = _figure(4.3)
    panels = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    titles = {
        "next layer": ("Each projection: layer l and layer l + 1", "layer l"),
        "same layer": ("Attention output and MLP down projection", "layer"),
    }
    for axes, kind in zip(panels, sides, strict=True):
        lines: dict[str, list[Overlap]] = {}
        for o in found:
            if o.comparison == kind:
                second = o.second.removeprefix(o.first.partition(": ")[0] + ": ")
                lines.setdefault(o.first if kind == "next layer" else f"{o.first}, {second}", []).append(o)
        mean = {name: sum(o.overlap for o in line) / len(line) for name, line in lines.items()}
        kept = sorted(lines, key=lambda name: -mean[name])[:LINES]
        for number, name in enumerate(name for name in lines if name in kept):
            line = sorted(lines[name], key=lambda o: o.layer)
            _line(axes, line, number, _tail(name, 48), kind == "same layer")
        random = [o.random for line in lines.values() for o in line]
        low, high = min(random), max(random)
        axes.axhspan(low, high, color=INK, alpha=0.12, linewidth=0, zorder=1)
        axes.axhline(high, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        said = f"{high:.2g}" if high - low < 0.02 * high else f"{low:.2g} to {high:.2g}"
        axes.plot([], [], color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"random directions: {said}")
        more = f" ({len(kept)} of {len(lines)})" if len(kept) < len(lines) else ""
        axes.set_title(titles[kind][0] + more)
        axes.set_xlabel(titles[kind][1])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        numbers = [o.layer for line in lines.values() for o in line]
        if min(numbers) == max(numbers):
            axes.set_xticks(numbers[:1])
        columns = 2 if len(kept) > 3 and max(map(len, kept)) <= 22 else 1
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=8, ncols=columns)
        axes.grid(axis="y")
        axes.tick_params(length=0)
    top = max(max(o.overlap, o.random) for o in found)
    panels[0].set_ylim(0, min(1.0, 1.12 * top) * 1.02)
    panels[0].set_ylabel("mean squared cosine")
    return figure


def _line(axes: Any, line: Sequence[Overlap], number: int, name: str, alone: bool) -> None:
    x: list[float] = []
    y: list[float] = []
    for o in line:
        if x and o.layer != x[-1] + 1:  # a gap where layers were not compared
            x.append(math.nan)
            y.append(math.nan)
        x.append(o.layer)
        y.append(o.overlap)
    colour = INK if alone and number == 0 else _COLOURS[number % len(_COLOURS)]
    small = len(line) > 40
    axes.plot(
        x, y, marker=_MARKERS[number % len(_MARKERS)], markersize=2.2 if small else 4.2, color=colour,
        linewidth=1 if small else 1.5, alpha=0.92, zorder=3, label=name,
    )  # fmt: skip
