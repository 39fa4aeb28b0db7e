"""`write_delta_report`: what fine-tuning wrote into the weights, as one HTML page, CSV tables and pictures."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdfast.report import plots
from bkdfast.report.delta_plots import by_projection, energy_of, layer_maps, norm_of, outside, overlap_curves, spectra
from bkdfast.report.html import document, section, table
from bkdfast.report.text import percent
from bkdfast.svd.noise import noise_edge
from bkdfast.svd.overlap import Overlap, overlaps
from bkdfast.svd.places import input_first, place, places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bkdfast.svd.result import DeltaSVD, TensorDelta

SHOWN = 30
"""Rows of the first table of the page; longer tables are folded up under it."""

_GLOSSARY = (
    ("Delta", "The tuned weight minus the base weight, entry by entry."),
    (
        "Singular triplet",
        "A singular value s with its unit vectors u and v: the delta is the sum of s u v' over all triplets. The "
        "leading ones are the directions in which fine-tuning changed most.",
    ),
    ("Energy", "Squared Frobenius norm: the sum of the squares of all entries, or of all singular values."),
    (
        "Noise edge",
        "The largest singular value that a random matrix with the energy outside the triplets would have. What lies "
        "above it stands out from such noise; below it a direction may still be real, but looks like any other.",
    ),
    (
        "Angle bound",
        "A bound on the sine of the angle between a computed singular vector and the span of the true leading ones. It "
        "holds but for a probability of one in a million. Where singular values lie too close together to be told "
        "apart, a triplet has none.",
    ),
    (
        "Residual stream",
        "The vector of width D that all blocks read and add to. Output and down projections write to it, query, key, "
        "value, gate and up projections read it; the side of their delta that is the stream is compared here.",
    ),
    (
        "Overlap",
        "Mean squared cosine of the principal angles between two sets of directions: 1 when one spans the other, 0 "
        "when they are orthogonal, and k / D on average for k random directions of width D.",
    ),
)
_SOURCES = (
    "Singular triplets: Halko, Martinsson and Tropp 2011; Musco and Musco 2015.",
    "Principal angles: Bjorck and Golub, Numerical methods for computing angles between linear subspaces, 1973.",
    "Noise edge: Marchenko and Pastur 1967; Geman, A limit theorem for the norm of random matrices, 1980.",
)


def write_delta_report(result: DeltaSVD, out: str | os.PathLike[str], *, model_type: str | None = None) -> Path:
    """Write `report.html`, `tensors.csv`, `overlap.csv`, and the pictures `spectra.png`, `layers.png`, `overlap.png`.

    Every file is written whole or not at all. The page holds its pictures and needs nothing else. A picture for which
    there is nothing to draw (no block in the names, no change) is left out, and an older one of that name removed.

    Args:
        result: of `delta_svd`.
        out: the folder to write to; it must exist.
        model_type: `model_type` of the models' config. It says which weights are stored `[in, out]` (GPT-2's Conv1D);
            None: all are taken as `[out, in]`, and the page says so.

    Returns:
        Path of the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        InvalidArgumentError: the folder does not exist.
        OSError: a file cannot be written.

    Example:
        >>> import tempfile
        >>> from bkdfast import delta_svd
        >>> from bkdfast.demo import PAIR
        >>> deltas = delta_svd(PAIR / "base", PAIR / "tuned", rank=4, include="*o_proj.weight", progress=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_delta_report(deltas, folder, model_type="llama")
        ...     page.name, sorted(path.name for path in page.parent.iterdir())[-2:]
        ('report.html', ['spectra.png', 'tensors.csv'])
    """
    out = Path(out)
    plots.require()
    found = overlaps(result, model_type)
    figures = {
        "spectra": spectra(result),
        "layers": layer_maps(result, result.metadata.get("rank")),
        "overlap": overlap_curves(found),
    }
    _write_csv(out / "tensors.csv", _TENSOR_COLUMNS, tensor_rows(result))
    _write_csv(
        out / "overlap.csv", [f.name for f in dataclasses.fields(Overlap)], [dataclasses.asdict(o) for o in found]
    )
    for name, figure in figures.items():
        if figure is None:
            (out / f"{name}.png").unlink(missing_ok=True)
        else:
            plots.save(figure, out / f"{name}.png")
    path = out / "report.html"
    page = _page(result, found, figures, model_type)
    with plots.whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


_TENSOR_COLUMNS = (
    "name", "layer", "projection", "expert", "rows", "columns", "frobenius", "energy", "changed", "changed_share",
    "rank", "largest_s", "smallest_s", "rounding", "noise_edge", "above_noise", "largest_angle", "uncertified",
    "passes", "converged", "note",
)  # fmt: skip


def ranked(result: DeltaSVD) -> list[TensorDelta]:
    """The deltas by falling Frobenius norm, equal ones in the order of the model."""
    return sorted((result[p.name] for p in places(result)), key=lambda delta: -delta.frobenius)


def tensor_rows(result: DeltaSVD) -> list[dict[str, Any]]:
    """A row of `tensors.csv` for each delta, by falling Frobenius norm; None where there is no such number.

    `largest_angle` is the largest angle bound (a sine) of the triplets that have one, `uncertified` the number of
    triplets that have none, `above_noise` the number of singular values above `noise_edge`; `rounding` is the edge
    that storing the tuned weights gives by itself.
    """
    rows = []
    for delta in ranked(result):
        where, certified = place(delta.name), delta.subspace[delta.dimension > 0]
        edge = noise_edge(delta)
        rows.append(
            {
                "name": delta.name,
                "layer": where.layer,
                "projection": where.projection,
                "expert": where.expert,
                "rows": delta.shape[0],
                "columns": delta.shape[1],
                "frobenius": delta.frobenius,
                "energy": delta.energy if delta.frobenius > 0 else None,
                "changed": delta.changed,
                "changed_share": delta.changed / max(1, delta.shape[0] * delta.shape[1]),
                "rank": delta.rank,
                "largest_s": float(delta.s[0]) if delta.rank else None,
                "smallest_s": float(delta.s[-1]) if delta.rank else None,
                "rounding": delta.rounding,
                "noise_edge": edge,
                "above_noise": int((delta.s > edge).sum()),
                "largest_angle": float(certified.max()) if len(certified) else None,
                "uncertified": delta.rank - len(certified),
                "passes": delta.passes,
                "converged": delta.converged,
                "note": delta.note,
            }
        )
    return rows


def delta_summary(result: DeltaSVD, most: int = 10) -> str:
    """The findings for a terminal: a sentence, and a table of the tensors of largest delta.

    Args:
        result: of `delta_svd`.
        most: rows of the table.
    """
    rows = tensor_rows(result)
    lines = [["tensor", "norm", "energy", "changed", "rank", "angle <=", ""]]
    for row in rows[:most]:
        name = "".join(c if c.isprintable() else "?" for c in row["name"])
        name = name if len(name) <= 60 else f"{name[:28]}...{name[-29:]}"
        lines.append([name, *_cells(row), "" if row["converged"] else "not converged"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    table = [
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]]).rstrip()
        for line in lines
    ]
    more = [f"  ... and {len(rows) - most} more"] if len(rows) > most else []
    return "\n".join([_headline(result), "", *table, *more])


def _cells(row: dict[str, Any]) -> list[str]:
    """Norm, energy, changed share, rank and angle bound of a row, as text."""
    angle = "–" if row["largest_angle"] is None else f"{row['largest_angle']:.1e}"
    if row["uncertified"]:
        angle += f" ({row['uncertified']} without)"
    energy = "–" if row["energy"] is None else percent(row["energy"])
    return [f"{row['frobenius']:#.4g}".rstrip("."), energy, percent(row["changed_share"]), str(row["rank"]), angle]


def _headline(result: DeltaSVD) -> str:
    count, changed = len(result), len(result) - len(result.unchanged)
    if not count:
        return "No tensor was compared."
    if not changed:
        return f"None of the {count} tensors that were compared differs."
    top = ranked(result)[0]
    tensors = "the one tensor" if count == 1 else f"{changed} of {count} tensors"
    deltas = list(result.values())
    return (
        f"Fine-tuning changed {tensors}, most of all {top.name} (Frobenius norm {top.frobenius:.3g}). The leading "
        f"triplets hold {percent(energy_of(deltas))} of the energy of all deltas together."
    )


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    with plots.whole(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: "" if _missing(value) else value for key, value in row.items()})


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _page(result: DeltaSVD, found: Sequence[Overlap], figures: dict[str, Figure | None], model_type: str | None) -> str:
    facts = result.metadata
    title = f"Weight deltas: {Path(facts.get('tuned', 'tuned')).name} against {Path(facts.get('base', 'base')).name}"
    rows = tensor_rows(result)
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="verdict">{escape(_headline(result))}</p>',
            _tiles(result),
            _compared(result, found, model_type),
            _tensors(rows),
            _spectra(figures["spectra"]),
            _layers(figures["layers"]),
            _overlap(figures["overlap"], found),
            _outside(result, rows),
            _left_out(result),
            "<h2>Glossary</h2><dl>"
            + "".join(f"<dt>{escape(word)}</dt><dd>{escape(meaning)}</dd>" for word, meaning in _GLOSSARY)
            + "</dl>",
            "<h2>Sources</h2>" + "".join(f"<p>{escape(source)}</p>" for source in _SOURCES),
        ],
    )


def _tiles(result: DeltaSVD) -> str:
    deltas = list(result.values())
    entries = sum(delta.shape[0] * delta.shape[1] for delta in deltas)
    changed = sum(delta.changed for delta in deltas)
    open_ = sum(not delta.converged for delta in deltas)
    above = sum(int((delta.s > noise_edge(delta)).sum()) for delta in deltas)
    tiles = [
        ("Tensors changed", f"{len(deltas) - len(result.unchanged)} of {len(deltas)}", f"{len(result.skipped)} others "
         "are no matrices or cannot be compared"),
        ("Entries changed", percent(changed / entries) if entries else "–", f"{changed:,} of {entries:,}"),
        ("Norm of all deltas", f"{norm_of(deltas):.3g}" if deltas else "–", "Frobenius, of all tensors together"),
        ("Energy captured", percent(energy_of(deltas)), "by the leading triplets"),
        ("Above the noise edge", f"{above:,}", f"of {sum(delta.rank for delta in deltas):,} triplets"),
        ("Not converged", str(open_), "tensors; their angle bounds hold all the same"),
    ]  # fmt: skip
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        for name, value, note in tiles
    )
    return f'<div class="tiles">{cells}</div>'


def _compared(result: DeltaSVD, found: Sequence[Overlap], model_type: str | None) -> str:
    facts = result.metadata
    made = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    rows = [
        ("Tuned model, base model", f"{facts.get('tuned', '–')}, {facts.get('base', '–')}"),
        ("Triplets of a tensor", _rule(facts)),
        ("Tolerance, seed", ", ".join(str(facts.get(key, "–")) for key in ("tolerance", "seed"))),
        ("Hashes of tuned and base", ", ".join(facts.get(f"{side}_hash", "–")[:16] for side in ("tuned", "base"))),
        ("Stored as", _stored(result, model_type)),
        ("Side of the residual stream", _sides(found)),
        ("Versions", made or "–"),
    ]
    return "<h2>What was compared</h2>" + table((), rows)


def _rule(facts: dict[str, Any]) -> str:
    """The rule that chose their number, as it was given."""
    told = [f"{name}={facts[name]}" for name in ("rank", "energy", "tol", "max_rank") if facts.get(name) is not None]
    return ", ".join(told) or "–"


def _stored(result: DeltaSVD, model_type: str | None) -> str:
    turned = [p for p in places(result) if input_first(p, model_type)]
    known = f"model type {model_type}" if model_type else "no config was given, so nn.Linear is assumed"
    if not turned:
        return f"[out, in] ({known}): u is the output side"
    rest = "all weights of the blocks" if len(turned) == sum(p.layer is not None for p in places(result)) else "experts"
    return f"{rest} as [in, out] ({known}): there v is the output side"


def _sides(found: Sequence[Overlap]) -> str:
    """Which singular vectors were compared, for which projections."""
    taken: dict[str, list[str]] = {}
    for o in found:
        for name, factor in zip((o.first, o.second), o.factors.split(", "), strict=True):
            side = taken.setdefault(f"{o.side} side, {factor}", [])
            if name not in side:
                side.append(name)
    return "; ".join(f"{side}: {', '.join(names)}" for side, names in taken.items()) or "nothing to compare"


def _tensors(rows: Sequence[dict[str, Any]]) -> str:
    notes = any(row["note"] for row in rows)
    head = ["tensor", "norm", "energy", "changed", "rank", "s1", "above noise", "angle bound", "converged"]
    head += ["notes"] * notes
    body = [
        (
            row["name"],
            *_cells(row)[:4],
            "–" if row["largest_s"] is None else f"{row['largest_s']:.3g}",
            f"{row['above_noise']}" if row["rank"] else "–",
            _cells(row)[4],
            "yes" if row["converged"] else "no",
            *(row["note"],) * notes,
        )
        for row in rows
    ]
    numeric = {1, 2, 3, 4, 5, 6, 7}
    words = (
        "<p>By the Frobenius norm of the delta. Energy: share of its square that the leading triplets hold; changed: "
        "share of entries that differ; s1: largest singular value; above noise: triplets over the noise edge; angle "
        "bound: the largest sine of those that have one. tensors.csv has the same in full.</p>"
    )
    first = table(head, body[:SHOWN], numeric=numeric, caption=f"{_of(min(SHOWN, len(body)), len(body))} tensors")
    rest = ""
    if len(body) > SHOWN:
        folded = table(head, body[SHOWN:], numeric=numeric)
        rest = f"<details><summary>The other {len(body) - SHOWN} tensors</summary>{folded}</details>"
    return "<h2>Which tensors changed most</h2>" + words + first + rest


def _of(shown: int, total: int) -> str:
    return f"The {shown} largest of {total}" if shown < total else f"All {total}"


def _spectra(figure: Figure | None) -> str:
    if figure is None:
        return "<h2>Spectra</h2><p>Nothing changed, so there is no spectrum.</p>"
    return "<h2>Spectra</h2>" + section(
        "How steeply the singular values fall says how many directions a change has.",
        figure,
        "Singular values of the deltas, projection by projection",
        "Each line is a layer, dark for the first and light for the last; the scale is logarithmic. A steep fall means "
        "a change of nearly low rank. Singular values above the grey band of noise edges stand out from noise with the "
        "energy that the triplets leave. Energy captured: lowest and highest share of a line's squared norm. Of the "
        "experts of a layer the one of largest norm is drawn.",
    )


def _layers(figure: Figure | None) -> str:
    if figure is None:
        return "<h2>Layer by layer</h2><p>There are not two weights whose names say which layer they are of.</p>"
    return "<h2>Layer by layer</h2>" + section(
        "Where in the model fine-tuning changed most.",
        figure,
        "Norm of the delta and what its triplets capture, by layer and projection",
        "Projections in the order of the data's flow. Grey: not compared; in the lower map also unchanged. The experts "
        "of a layer count together.",
    )


def _overlap(figure: Figure | None, found: Sequence[Overlap]) -> str:
    title = "<h2>Directions in common</h2>"
    if figure is None:
        return title + "<p>There are no two neighbouring layers of a projection, nor both writing projections.</p>"
    real = [o for o in found if not math.isnan(o.overlap)]
    top = max(real, key=lambda o: o.overlap / o.random)
    where = (
        f"{top.first} of layers {top.layer} and {top.other_layer}"
        if top.comparison == "next layer"
        else f"{top.first} and {top.second} of layer {top.layer}"
    )
    over = sum(o.overlap > o.random for o in real)
    return title + section(
        f"{over} of {len(real)} pairs have more in common than random directions would on average; most in proportion "
        f"{where}: {top.overlap:.2g}, where random directions would have {top.random:.2g}.",
        figure,
        "Overlap of directions between layers and between projections",
        "Mean squared cosine of the principal angles between the leading directions of two deltas, on their side of "
        "the residual stream: 1 when one spans the other, 0 when they are orthogonal. Dashed: the average for random "
        "directions. What many blocks write or read alike shows as high lines. overlap.csv has all pairs.",
    )


def _outside(result: DeltaSVD, rows: Sequence[dict[str, Any]]) -> str:
    names = {delta.name for delta in outside(result)}
    if not names or not by_projection(result):
        return ""
    body = [(row["name"], f"{row['rows']} x {row['columns']}", *_cells(row)) for row in rows if row["name"] in names]
    head = ("tensor", "shape", "norm", "energy", "changed", "rank", "angle bound")
    words = "<p>Embeddings, heads and others whose names do not say a layer; they are not in the maps above.</p>"
    return "<h2>Outside the blocks</h2>" + words + table(head, body, numeric=range(1, 7))


def _left_out(result: DeltaSVD) -> str:
    groups: list[tuple[str, list[str]]] = [
        ("only in the base model", list(result.only_in_base)),
        ("only in the tuned model", list(result.only_in_tuned)),
        ("stored once under two names", [f"{name} (as {first})" for name, first in result.tied.items()]),
    ]
    for reason, _ in Counter(result.skipped.values()).most_common():
        groups.append((reason, [name for name, why in result.skipped.items() if why == reason]))
    parts = [
        f"<details><summary>{len(names)}: {escape(why)}</summary><p>{escape(', '.join(names))}</p></details>"
        for why, names in groups
        if names
    ]
    return "<h2>What was not compared</h2>" + ("".join(parts) or "<p>Every tensor that was asked for was compared.</p>")
