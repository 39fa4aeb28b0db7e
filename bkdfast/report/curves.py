"""Figures of screened and cumulative sweeps: exact against estimated effects, effect against number of heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from bkdfast.report.plots import BLUE, GREEN, GREY, INK, ORANGE, _figure, _styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bkdfast.sweep.cumulative import CumulativeCurve
    from bkdfast.sweep.screened import ScreenedSweep

DONE = {"Zero": "zeroed", "Mean": "mean-ablated", "Patch": "patched", "Resample": "resampled", "Scale": "scaled"}
"""What an edit does to heads, in words; others are "edited"."""
WAYS = {"add": "added", "remove": "taken out"}
_COLOURS = (BLUE, ORANGE, GREEN, INK)


@_styled
def cumulative_curves(curves: Sequence[CumulativeCurve]) -> Figure:
    """Mean effect against the number of heads: a line a curve with its standard error, and the random orders' range.

    Curves should be of one metric and one edit: they share the axes.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(3.9)
    axes = figure.subplots()
    first = curves[0]
    samples = first.effects.shape[-1]
    marker = "o-" if max(len(curve.sizes) for curve in curves) <= 40 else "-"
    colours = _colours(len(curves))
    for number, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        x, mean, error = list(curve.sizes), curve.mean, curve.stderr
        if samples > 1:
            axes.fill_between(x, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0, zorder=3)
        above = sum(other.direction == curve.direction for other in curves[number + 1 :])
        width = 2 + 2.2 * above  # a curve under another one shows at its sides
        axes.plot(x, mean, marker, color=colour, linewidth=width, markersize=2.5 + width, zorder=4, label=_name(curve))
    bands = _bands(curves, colours)
    for curve, colour, name in bands:
        x, controls = list(curve.sizes), curve.controls.mean(-1)  # [C, S]
        axes.fill_between(x, controls.amin(0), controls.amax(0), color=colour, alpha=0.22, linewidth=0, zorder=1)
        label = f"{name}{len(controls)} random order{'s' if len(controls) > 1 else ''} (mean, range)"
        axes.plot(x, controls.mean(0), "--", color=colour, linewidth=1.3, zorder=2, label=label)
    full = float(first.full.mean())
    axes.axhline(full, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2, label="all heads of the model")
    axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    done = DONE.get(first.edit, "edited")
    words = {"add": f"heads {done}", "remove": f"heads left alone (all others {done})"}
    directions = sorted({curve.direction for curve in curves})
    axes.set_xlabel(", or ".join(words[direction] for direction in directions))
    mean_of = f"mean of {samples} samples, ± standard error" if samples > 1 else "1 sample"
    axes.set_ylabel(f"change of {first.metric}")
    axes.set_title(f"{first.edit} of heads together ({mean_of})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    axes.grid(axis="y")
    axes.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=3 if len(bands) < 2 else 2)
    return figure


def _bands(curves: Sequence[CumulativeCurve], colours: Sequence[Any]) -> list[tuple[CumulativeCurve, Any, str]]:
    """Controls to draw, each once: (curve, colour, name)."""
    found: list[tuple[CumulativeCurve, Any, str]] = []
    for curve, colour in zip(curves, colours, strict=True):
        drawn = [(other.direction, other.sizes, other.control_orders) for other, _, _ in found]
        if len(curve.controls) and (curve.direction, curve.sizes, curve.control_orders) not in drawn:
            found.append((curve, colour, f"{WAYS[curve.direction]}: "))
    return [(found[0][0], GREY, "")] if len(found) == 1 else found


@_styled
def estimate_scatter(found: ScreenedSweep) -> Figure:
    """Exact against estimated mean effect of the heads computed exactly, and where the estimates of the others lie."""
    figure = _figure(4.4)
    axes = figure.subplots()
    estimate, exact = found.screening.mean, found.sweep.mean
    chosen = {*found.kept, *found.sampled}
    others = [
        float(value)
        for head, value in zip(_heads(estimate), estimate.flatten(), strict=True)
        if head not in chosen and torch.isfinite(value)
    ]
    ends = [0.0]
    for heads, name, colour in ((found.kept, "kept", ORANGE), (found.sampled, "sampled", BLUE)):
        if heads:
            x, y = ([float(values[head]) for head in heads] for values in (estimate, exact))
            of = " of sizes" if found.by == "size" else ""
            label = f"{name}: rank correlation{of} {found.correlation(name)}"
            axes.plot(x, y, "o", color=colour, markersize=5.5, alpha=0.85, zorder=4, label=label)
            ends += x + y
    if others:
        # They have no height: ticks at the axis.
        label = f"{len(others)} not computed exactly"
        axes.plot(
            others, [0.025] * len(others), "|", color=GREY, markersize=9, alpha=0.8, zorder=2, label=label,
            transform=axes.get_xaxis_transform(),
        )  # fmt: skip
    low, high = min(ends), max(ends)
    margin = 0.06 * ((high - low) or 1.0)
    line = [low - margin, high + margin]
    axes.plot(line, line, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="exact = estimate")
    axes.axhline(0, color=GREY, linewidth=0.7, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.7, zorder=0)
    for head in found.top(min(4, len(found.kept))):
        axes.annotate(
            f"L{head[0]}H{head[1]}", (float(estimate[head]), float(exact[head])), xytext=(6, 4),
            textcoords="offset points", fontsize=8.5, color=INK, zorder=5,
        )  # fmt: skip
    metric = found.screening.metric
    axes.set(xlabel=f"estimated change of {metric}", ylabel=f"exact change of {metric}")
    axes.set_title(f"{found.screening.edit}, head by head: gradient estimate against exact effect")
    axes.grid()
    axes.tick_params(length=0)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _name(curve: CumulativeCurve) -> str:
    order = "re-ranked" if curve.facts.get("rerank") else "ranked"
    return f"{order} heads {WAYS[curve.direction]}"


def _colours(count: int) -> list[Any]:
    import matplotlib

    if count <= len(_COLOURS):
        return list(_COLOURS[:count])
    return list(matplotlib.colormaps["viridis"](torch.linspace(0, 0.88, count).numpy()))


def _heads(values: torch.Tensor) -> list[tuple[int, int]]:
    layers, heads = values.shape
    return [(layer, head) for layer in range(layers) for head in range(heads)]
