"""`bkdfast diff`: how much every tensor of two checkpoints differs, from one read of both."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdfast.commands.files import write_text
from bkdfast.errors import BkdfastError, InvalidArgumentError

if TYPE_CHECKING:
    from bkdfast.svd import DeltaNorms

DESCRIPTION = """\
Compare two checkpoints tensor by tensor: the norm of the difference, relative to the base's own norm, the largest
difference of one weight, and the share of weights that differ. Each file is read once, and never both models are in
memory. BASE and TUNED are folders of safetensors files (sharded in any way) or hub ids that were downloaded before.

examples:
  which tensors did the fine-tune change most?
    bkdfast diff base/ tuned/
  the attention of the first layer, as a table for other programs
    bkdfast diff base/ tuned/ --include '*layers.0.self_attn*' --out diff.csv
"""
_NAMED = 5  # one-sided tensors that are named


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "diff",
        parents=parents,
        help="how much every tensor of two checkpoints differs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
    )
    parser.add_argument("base", metavar="BASE", help="the model before fine-tuning")
    parser.add_argument("tuned", metavar="TUNED", help="the model after it")
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="only tensors whose names match this shell pattern (may be given again)",
    )
    parser.add_argument("--exclude", action="append", metavar="PATTERN", help="not those that match this one")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="rows to print (default: 20; 0: all)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all tensors to this file (.csv)")
    parser.add_argument("--max-memory", metavar="SIZE", help="memory for weights, e.g. 2GB (default: as it comes)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    if options.top < 0:
        raise InvalidArgumentError(f"--top is {options.top}; give a number of rows, or 0 for all")
    if options.out is not None and not options.out.parent.is_dir():
        raise InvalidArgumentError(f"--out {options.out}: there is no folder {options.out.parent}; create it first")
    from bkdfast.svd import delta_norms

    norms = delta_norms(
        options.base,
        options.tuned,
        include=options.include,
        exclude=options.exclude,
        max_memory=options.max_memory,
        progress=not options.quiet,
    )
    print(text(norms, options.top or len(norms)))
    if options.out is not None:
        try:
            write_text(options.out, norms.to_csv())
        except OSError as error:
            raise BkdfastError(f"cannot write {options.out}: {error}") from error
        print(f"\nall {len(norms)} tensors: {options.out}")
    return 0


def text(norms: DeltaNorms, top: int) -> str:
    """The tensors that changed most as a table, the totals, and what was not compared."""
    changed = [norm for norm in norms.ranked() if norm.changed]
    rows = [("tensor", "shape", "|delta|", "relative", "largest", "changed")]
    for norm in changed[:top]:
        shape = " x ".join(map(str, norm.shape)) or "scalar"
        figures = (f"{norm.frobenius:.4g}", f"{norm.relative:.3%}", f"{norm.largest:.3g}", f"{norm.changed_share:.2%}")
        rows.append((norm.name, shape, *figures))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    if not changed:
        lines = ["no tensor differs"]
    if len(changed) > top:
        lines.append(f"... and {len(changed) - top} more")
    entries = sum(math.prod(norm.shape) for norm in norms.values())
    differing = sum(norm.changed for norm in norms.values())
    lines += [
        "",
        f"{len(norms)} tensors compared, {len(norms.unchanged)} of them unchanged; {differing:,} of {entries:,} "
        f"weights differ ({differing / max(1, entries):.2%})",
        f"all together: |delta| {norms.frobenius:.4g}, {norms.relative:.3%} of the base",
    ]
    for title, names in (
        ("only in the base", norms.only_in_base),
        ("only in the tuned model", norms.only_in_tuned),
        ("tied, compared once", tuple(norms.tied)),
        ("not compared", tuple(f"{name} ({why})" for name, why in norms.skipped.items())),
    ):
        if names:
            more = f", ... ({len(names)} in all)" if len(names) > _NAMED else ""
            lines.append(f"{title}: {', '.join(names[:_NAMED])}{more}")
    lines += [f"{norm.name}: {norm.note}" for norm in norms.values() if norm.note]
    return "\n".join(lines)
