"""Figures of a sweep: which one depends on what its variants are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.report.plots import BLUE, GREY, INK, ORANGE, _figure, _styled, head_heatmap, shortened
from bkdfast.sweep.result import set_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bkdfast.sweep import SweepResult

ROWS = 24  # heads in a map of heads by positions
BARS = 40


def result_figure(result: SweepResult, tokens: Sequence[str] | None = None) -> Figure:
    """The figure that fits a result's dims; see `SweepResult.plot`.

    Args:
        result: of a sweep.
        tokens: what stands at each position, to label them.

    Raises:
        InvalidArgumentError: another number of tokens than positions, or tokens without positions.
        MissingDependencyError: matplotlib is not installed.
    """
    dims, mean, label = result.dims, result.mean, f"change of {result.metric}"
    if tokens is not None and len(tokens) != len(result.coords.get("position", ())):
        raise InvalidArgumentError(f"{len(tokens)} tokens, but {len(result.coords.get('position', ()))} positions")
    if dims == ("layer", "head"):
        return head_heatmap(mean, label, f"{result.edit}, head by head")
    if dims == ("layer",):
        return effect_curve(
            list(result.coords["layer"]), mean, result.stderr, "layer", label, f"{result.edit} by layer"
        )
    if dims == ("set",):
        return _of_sets(result, label)
    columns = [str(position) for position in result.coords["position"]]
    if tokens is not None:
        columns = [shortened(token) for token in tokens]
    if dims == ("layer", "position"):
        rows = [str(layer) for layer in result.coords["layer"]]
        return effect_map(mean, rows, columns, ("layer", "position"), label, f"{result.edit} by layer and position")
    if dims == ("set", "position"):
        rows = [_short_name(heads) for heads in result.coords["set"]]
        return effect_map(mean, rows, columns, ("heads", "position"), label, f"{result.edit} by position")
    rows = [f"{layer}.{head}" for layer in result.coords["layer"] for head in result.coords["head"]]
    title = f"{result.edit} by head and position"
    return effect_map(mean.flatten(0, 1), rows, columns, ("layer.head", "position"), label, title)


def effect_map(
    values: torch.Tensor, rows: Sequence[str], columns: Sequence[str], names: tuple[str, str], label: str, title: str
) -> Figure:
    """Heat map of one value a row and position, colours centred at zero; of heads and sets only the `ROWS` strongest.

    Args:
        values: `[R, P]`, NaN where nothing was swept.
        rows: names of the rows.
        columns: names of the positions.
        names: what rows and columns are.
        label: what the values are, with unit.
        title: above the map.
    """
    if names[0] != "layer" and len(values) > ROWS:
        strength = values.abs().nan_to_num(nan=-1.0).amax(1)
        kept = sorted(strength.argsort(descending=True, stable=True)[:ROWS].tolist())
        values, rows = values[kept], [rows[i] for i in kept]
        title += f", the {ROWS} strongest"
    numbers = all(name == str(i) for i, name in enumerate(columns))
    few = values.shape[1] <= 16
    return head_heatmap(
        values, label, title, None if few else [], names=names, rows=rows, columns=None if numbers else columns
    )


@_styled
def effect_curve(
    x: Sequence[Any], mean: torch.Tensor, stderr: torch.Tensor, xlabel: str, label: str, title: str
) -> Figure:
    """A line with a band of one standard error on either side, and a line at zero.

    Args:
        x: where each value stands.
        mean: `[R]`, NaN where nothing was swept.
        stderr: `[R]`.
        xlabel: what x is.
        label: what the values are, with unit.
        title: above the figure.
    """
    from matplotlib.ticker import MaxNLocator

    axes = (figure := _figure(3.4)).subplots()
    swept = torch.isfinite(mean)
    at = [value for value, kept in zip(x, swept.tolist(), strict=True) if kept]
    middle, error = mean[swept].numpy(), stderr[swept].numpy()
    axes.axhline(0, color=GREY, linewidth=1)
    axes.fill_between(at, middle - error, middle + error, color=BLUE, alpha=0.18, linewidth=0, label="standard error")
    axes.plot(at, middle, "o-", color=BLUE, linewidth=2, markersize=4.5 if len(at) <= 40 else 0, label="mean")
    axes.set(xlabel=xlabel, ylabel=label, title=title)
    if at:
        room = max(0.4, 0.02 * (max(at) - min(at)))
        axes.set_xlim(min(at) - room, max(at) + room)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.legend(loc="best")
    return figure


@_styled
def effect_bars(mean: torch.Tensor, stderr: torch.Tensor, names: Sequence[str], label: str, title: str) -> Figure:
    """Horizontal bars in the order given, first on top, with one standard error on either side.

    Args:
        mean: `[R]`.
        stderr: `[R]`.
        names: of the bars.
        label: what the values are, with unit.
        title: above the figure.
    """
    figure = _figure(0.95 + 0.24 * max(len(names), 2))
    axes = figure.subplots()
    values, error = mean.numpy(), stderr.numpy()
    colours = [ORANGE if value > 0 else BLUE for value in values]
    axes.barh(range(len(names)), values, height=0.68, color=colours, alpha=0.85)
    axes.errorbar(values, range(len(names)), xerr=error, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(names)), [shortened(name, 32) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set(xlabel=f"{label} (mean, standard error)", title=title)
    axes.grid(axis="x")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    return figure


def _of_sets(result: SweepResult, label: str) -> Figure:
    sets, mean, stderr = result.coords["set"], result.mean, result.stderr
    if len(sets) > 2 and all(set(one) < set(other) for one, other in pairwise(sets)):
        sizes = [len(heads) for heads in sets]
        return effect_curve(sizes, mean, stderr, "number of heads", label, f"{result.edit} of more and more heads")
    title, kept = f"{result.edit} of sets of heads (layer.head)", torch.isfinite(mean).nonzero().flatten().tolist()
    if len(kept) > BARS:
        title += f", the {BARS} strongest of {len(kept)}"
        kept = sorted(sorted(kept, key=lambda i: -abs(float(mean[i])))[:BARS])
    return effect_bars(mean[kept], stderr[kept], [_short_name(sets[i]) for i in kept], label, title)


def _short_name(heads: Sequence[tuple[int, int]]) -> str:
    return set_name(heads) if len(heads) <= 4 else f"{set_name(heads[:2])} and {len(heads) - 2} more"
