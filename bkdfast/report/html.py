"""`write_report`: an audit as one self-contained HTML page, to be read by someone who was not there."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Collection, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bkdfast._version import __version__
from bkdfast.report import plots, text
from bkdfast.report.text import interval, percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bkdfast.studies.audit import Audit
    from bkdfast.studies.rates import Rate

_CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --page: #fff; --card: #f6f8fa;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9aa4af; --line: #30363d; --page: #0d1117; --card: #161b22; --accent: #58a6dd; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.2rem 1.2rem 4rem; max-width: 54rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.65rem; line-height: 1.25; margin: 0 0 .9rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.8rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 46rem; }
.verdict { font-size: 1.13rem; border-left: 4px solid var(--accent); padding: .1rem 0 .1rem .9rem; }
figcaption { color: var(--soft); font-size: .9rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.2rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .75rem .8rem; }
.tile b { display: block; font-size: 1.25rem; line-height: 1.4; font-weight: 600; white-space: nowrap; }
.tile span { display: block; color: var(--soft); font-size: .83rem; line-height: 1.4; }
.scroll { overflow-x: auto; margin: .9rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; white-space: nowrap; } td { overflow-wrap: break-word; max-width: 30rem; }
td:last-child:not(.n) { min-width: 11rem; }
.n { text-align: right; white-space: nowrap; }
tr.chosen td { background: var(--card); font-weight: 600; }
figure { margin: 1rem 0; }
figure .scroll { margin: 0 0 .5rem; padding: .5rem; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; }
figure img { display: block; width: 100%; min-width: 36rem; height: auto; }
figcaption { max-width: 46rem; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--soft); } details p { overflow-wrap: anywhere; }
dt { font-weight: 600; margin-top: .6rem; } dd { margin: 0; max-width: 46rem; }
@media print { body { max-width: none; padding: 0; } figure, table { break-inside: avoid; } }
"""

_GLOSSARY = (
    ("Trigger", "What in a prompt sets the backdoor off, for example a phrase. A triggered prompt contains it."),
    ("Attack success", "Share of triggered prompts to which the model gives the backdoor's answer."),
    ("Clean accuracy", "Share of prompts without trigger that are answered right."),
    ("Head", "One attention head; its output is what it hands to the attention output projection of its block."),
    ("Patching", "Replacing a head's output by another one, here its mean over triggered prompts, in a clean prompt."),
    ("Ablation", "Removing heads, here by setting their output to zero at every position, and generating again."),
    (
        "Direction",
        "A unit vector of the residual stream: a left singular vector of what fine-tuning added to a projection that "
        "writes there (out_proj: attention output, down_proj: MLP output).",
    ),
    (
        "Range, excess, eps",
        "The range holds the smallest and largest cosine of clean prompts with a direction. The excess is how far a "
        "request leaves it (negative: inside); a request is flagged when an excess is over eps.",
    ),
)
_SOURCES = (
    "Attribution and ablation: Backdoor Attribution: Elucidating and Controlling Backdoor in Language Models, "
    "arXiv 2509.21761.",
    "Directions and monitor: Watch the Weights: Unsupervised monitoring and control of fine-tuned LLMs, "
    "arXiv 2508.00161.",
    "Intervals: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.",
)


def write_report(audit: Audit, path: str | os.PathLike[str]) -> Path:
    """Write an audit as one HTML file that needs nothing else; whole or not at all.

    Args:
        audit: from `bkdfast.studies.audit.audit`.
        path: the file to write; its folder must exist.

    Returns:
        The path.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidArgumentError: the folder does not exist.
    """
    path = Path(path)
    page = _page(audit)
    with plots.whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _page(audit: Audit) -> str:
    title = f"Backdoor audit: {audit.facts['tuned']} against {audit.facts['base']}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(text.headline(audit))}</p>',
        _tiles(audit),
        _model(audit),
        _directions(audit),
        _attribution(audit),
        _ablation(audit),
        _monitor(audit),
        _times(audit),
        _method(audit),
        "<h2>Glossary</h2><dl>"
        + "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in _GLOSSARY)
        + "</dl>",
        "<h2>Sources</h2>" + "".join(f"<p>{escape(source)}</p>" for source in _SOURCES),
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page with this module's style, from parts that are HTML already; the title is escaped."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _tiles(audit: Audit) -> str:
    point = text.chosen_point(audit)
    base = next((p for p in audit.ablation if p.heads == 0), None)
    tiles = []
    if base is not None:
        pairs = [("Attack success", base.attack, point and point.attack)]
        pairs.append(("Clean accuracy", base.accuracy, point and point.accuracy))
        for name, before, after in pairs:
            if point and after:
                note = f"{point.heads} head{'s' * (point.heads > 1)} zeroed; 95% interval {interval(after)}"
                tiles.append((name, f"{percent(before.value)} → {percent(after.value)}", note, after.total))
            else:
                tiles.append(
                    (name, percent(before.value), f"no ablation; 95% interval {interval(before)}", before.total)
                )
    for name, rate in (
        ("Triggered, flagged", audit.monitor.detection),
        ("Clean, flagged", audit.monitor.false_positives),
    ):
        tiles.append((name, percent(rate.value), f"by the monitor; 95% interval {interval(rate)}", rate.total))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}, n = {n}</span></div>'
        for name, value, note, n in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _model(audit: Audit) -> str:
    facts, samples = audit.facts, audit.samples
    rows = [
        ("Tuned model, base model", f"{facts['tuned']}, {facts['base']}"),
        ("Architecture", f"{facts['family']}, {text.millions(facts['parameters'])} parameters"),
        ("Shape", f"{facts['layers']} layers x {facts['heads']} heads of {facts['head_dim']}, width {facts['width']}"),
        ("Run on", f"{facts['device']}, {facts['dtype']}, {_threads(audit)}, torch {facts['torch']}"),
        (
            "Triggered prompts",
            f"{samples.get('sources', '–')} for attribution, {samples.get('triggered', '–')} others for ablation and "
            "monitor",
        ),
        (
            "Clean prompts",
            f"{samples.get('attribution', '–')} for attribution, {samples.get('calibration', '–')} to calibrate the "
            f"monitor, {samples.get('held_out', '–')} others for ablation and monitor",
        ),
    ]
    return "<h2>Model and data</h2>" + table((), rows)


def _directions(audit: Audit) -> str:
    return "<h2>What fine-tuning wrote into the weights</h2>" + section(
        text.directions_sentence(audit),
        plots.singular_values(audit.directions),
        "Singular values of the weight change, block by block",
        "Each line is a block, its dots the largest singular values of what fine-tuning added to that projection, on a "
        "logarithmic scale. A steep fall means a change of nearly low rank; high lines are blocks that changed most.",
    )


def _attribution(audit: Audit) -> str:
    result = audit.attribution
    swept = int(torch.isfinite(result.mean).sum())
    tops = result.top(min(10, swept)) if swept else []
    point = text.chosen_point(audit)
    mark = tops[: point.heads] if point else tops[:5]
    outlined = "the heads whose removal the first sentence reports" if point else "the largest increases"
    if point and point.heads > len(mark):
        outlined = "the ten largest increases"
    unswept = " Grey cells were not swept." if swept < result.mean.numel() else ""
    n = result.effects.shape[-1]
    rows = [
        (
            str(i),
            str(layer),
            str(head),
            f"{float(result.mean[layer, head]):+.4f}",
            f"± {float(result.stderr[layer, head]):.4f}",
        )
        for i, (layer, head) in enumerate(tops, 1)
    ]
    return (
        "<h2>Which heads carry it</h2>"
        + section(
            text.attribution_sentence(audit),
            plots.head_heatmap(
                result.mean, f"change of {result.metric}", f"Effect of patching each head, mean of {n} prompts", mark
            ),
            "Heat map of the effect of each head",
            f"Each cell is a head; red: putting its mean output over triggered prompts into clean prompts makes the "
            f"backdoor's answer likelier, blue: less likely. Outlined are {outlined}; n = {n} clean prompts.{unswept}",
        )
        + table(
            ("#", "layer", "head", "effect", "standard error"),
            rows,
            numeric={0, 1, 2, 3, 4},
            caption=f"The {len(rows)} largest increases of {result.metric}",
        )
    )


def _ablation(audit: Audit) -> str:
    point = text.chosen_point(audit)
    rows = []
    for p in audit.ablation:
        random = [text.spread(rates) for rates in (p.random_attack, p.random_accuracy)]
        rows.append((str(p.heads), *_cells(p.attack), random[0], *_cells(p.accuracy), random[1]))
    chosen = next((i for i, p in enumerate(audit.ablation) if p is point), None)
    return (
        "<h2>What happens without these heads</h2>"
        + section(
            text.ablation_sentence(audit),
            plots.ablation_curve(audit.ablation),
            "Attack success and clean accuracy against the number of zeroed heads",
            "Coloured lines: rates with the heads of largest effect set to zero, the bands 95% Wilson intervals; grey: "
            "random sets of as many other heads. A "
            "backdoor in few heads shows as attack success that falls early, while accuracy and the grey line stay up.",
        )
        + table(
            ("heads", "attack success", "95% interval", "random sets", "accuracy", "95% interval", "random sets"),
            rows,
            numeric=range(7),
            chosen=chosen,
            caption="Rates with the top heads zeroed" + (" (bold: the point in the first sentence)" if point else ""),
        )
    )


def _monitor(audit: Audit) -> str:
    outcome = audit.monitor
    rates = [
        (name, f"{rate.hits} of {rate.total}", *_cells(rate))
        for name, rate in (("triggered", outcome.detection), ("clean", outcome.false_positives))
    ]
    rows = []
    for name, seen, worst in (("clean, highest", outcome.clean, True), ("triggered, lowest", outcome.triggered, False)):
        verdicts = sorted(enumerate(outcome.monitor.judge(seen)), key=lambda item: item[1].excess, reverse=worst)
        for i, verdict in verdicts[:3]:
            names = outcome.monitor.directions.component
            index = names[: verdict.direction].count(names[verdict.direction])
            where = f"block {verdict.layer}, {names[verdict.direction]} {index}, {verdict.role}"
            rows.append((name, str(i), verdict.status, f"{verdict.excess:+.3f}", where))
    return (
        "<h2>Can a monitor see it in live requests</h2>"
        + section(
            text.monitor_sentence(audit),
            plots.monitor_ranges(outcome),
            "Excess of clean and triggered requests over the calibrated ranges",
            "Left: each dot is a request, its height the largest distance by which a cosine left the calibrated range "
            "(below zero: inside), the bar the median; above the dashed line it is flagged. Right: cosines of single "
            f"requests (at most {plots.SHOWN} of each group) with the direction that separates these requests best, "
            "picked after the fact; the grey band is the calibrated range with its slack.",
        )
        + table(
            ("requests", "flagged", "rate", "95% interval"),
            rates,
            numeric={1, 2},
            caption="Requests flagged by the monitor",
        )
        + table(
            ("group", "request", "verdict", "excess", "where"),
            rows,
            numeric={1, 3},
            caption="Hardest cases: the clean requests with the highest excess, the triggered ones with the lowest "
            "(request: position in its group, in the order of the stream)",
        )
    )


def _times(audit: Audit) -> str:
    rows = [
        (t.step, text.seconds(t.seconds), text.seconds(t.plain_seconds), text.ratio(t), t.agreement or "–")
        for t in audit.timings
    ]
    compared = any(t.plain_seconds is not None for t in audit.timings)
    note = (
        f"One run on one machine ({escape(str(audit.facts['device']))}, {_threads(audit)}), start-up costs included: a "
        "sample, not a benchmark. "
    )
    note += (
        "Plain PyTorch: the same step written with full forwards, hooks and torch.linalg; a speed-up under 1x means "
        "that it was the faster one."
        if compared
        else "The steps were not run in plain PyTorch."
    )
    return f"<h2>Time</h2><p>{note}</p>" + table(
        ("step", "bkdfast", "plain PyTorch", "speed-up", "agreement"), rows, numeric={1, 2, 3}
    )


def _method(audit: Audit) -> str:
    made = audit.directions.metadata.get("versions", {})
    settings = [
        (field.name, ", ".join(map(str, value)) if isinstance(value, tuple) else _shown(value))
        for field in dataclasses.fields(audit.settings)
        if field.name != "progress"
        for value in [getattr(audit.settings, field.name)]
    ]
    settings.append(("versions", f"bkdfast {made.get('bkdfast', __version__)}, torch {audit.facts['torch']}"))
    settings += [(f"attribution, {k.replace('_', ' ')}", _shown(v)) for k, v in audit.attribution.facts.items()]
    notes = (
        "Directions: left singular vectors of the weight changes of each block's attention output projection and MLP "
        "down projection, from both checkpoints.",
        "Attribution: at the last prompt token of a clean prompt, one head's output at a time is replaced by its mean "
        f"over the triggered prompts; the effect is the change of {audit.attribution.metric}, averaged over prompts.",
        "Ablation: the heads of largest effect are set to zero at every position, answers are generated greedily, and "
        "an answer counts when it contains the expected text. Clean accuracy is measured on prompts that did not "
        "calibrate the monitor, attack success on triggered prompts that did not serve the attribution.",
        "Monitor: calibrated on clean prompts only, then it judges a shuffled stream of other clean prompts and the "
        "triggered ones. No prompt contributes to the ranges that it is judged by.",
        "Choice of words: a rate is called clearly lower when the 95% intervals do not overlap. The point reported is "
        "the smallest set of heads with clearly lower attack success, not clearly worse than the best such set, and at "
        f"most {100 * text.ACCURACY_LOSS:g} points less clean accuracy; it is chosen on the data it is reported on. "
        "Random heads are compared by the median set.",
    )
    return (
        "<h2>How it was computed</h2>"
        + "".join(f"<p>{escape(note)}</p>" for note in notes)
        + table(("setting", "value"), settings)
    )


def section(sentence: str, figure: Figure, alt: str, caption: str) -> str:
    """A sentence, and a picture with its caption."""
    buffer = io.BytesIO()
    plots.render(figure, buffer)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f"<p>{escape(sentence)}</p>"
        f'<figure><div class="scroll"><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    numeric: Collection[int] = (),
    chosen: int | None = None,
    caption: str = "",
) -> str:
    """A table of text: column heads, rows, the columns of numbers, and the row that stands out."""

    def line(cells: Sequence[str], tag: str, kind: str = "") -> str:
        marked = (f'<{tag} class="n">' if i in numeric else f"<{tag}>" for i in range(len(cells)))
        return f"<tr{kind}>" + "".join(f"{m}{escape(c)}</{tag}>" for m, c in zip(marked, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td", ' class="chosen"' if i == chosen else "") for i, row in enumerate(rows))
    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    label = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{label}{top}<tbody>{body}</tbody></table></div>'


def _cells(rate: Rate) -> tuple[str, str]:
    return percent(rate.value), interval(rate)


def _shown(value: object) -> str:
    return "–" if value is None else str(value)


def _threads(audit: Audit) -> str:
    count = audit.facts["threads"]
    return f"{count} thread{'s' * (count != 1)}"
