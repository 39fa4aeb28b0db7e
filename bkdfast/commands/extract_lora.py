"""`bkdfast extract-lora`: the delta of a full fine-tune as a PEFT adapter."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdfast.commands.common import DTYPES, SHOWN
from bkdfast.errors import BkdfastError

if TYPE_CHECKING:
    from bkdfast.svd.extract import Extraction

DESCRIPTION = """\
Write what fine-tuning changed (TUNED - BASE) as a LoRA adapter. PeftModel.from_pretrained(base_model, DIR) loads it;
merged, each adapted weight is base + its delta cut off after the leading singular triplets. Both sides are read one
tensor at a time. TUNED may be an adapter too: it is then brought down to a lower rank.

examples:
  bkdfast extract-lora base/ tuned/ --out adapter/
  bkdfast extract-lora base/ tuned/ --out adapter/ --energy 0.95 --max-rank 64
  bkdfast extract-lora base/ tuned/ --out adapter/ --tol 0.05 --include "*.self_attn.*"
  the smallest loss: whatever is no matrix is saved whole
  bkdfast extract-lora base/ tuned/ --out adapter/ --rank 32 --save-rest
"""

AFTER = """\
How to choose: --rank gives every weight the same; --energy and --tol give each weight the smallest rank that does, so
that weights with a flat spectrum get more (rank_pattern and alpha_pattern in adapter_config.json). The table says how
much of the squared norm of the delta each weight's LoRA carries; a full fine-tune often needs a high rank.
"""


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "extract-lora",
        parents=parents,
        help="write the delta of a fine-tune as a LoRA adapter",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=AFTER,
    )
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the model before fine-tuning")
    parser.add_argument("tuned", type=Path, metavar="TUNED", help="folder of the model after it, or of an adapter")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    size = parser.add_argument_group("size, one of")
    rule = size.add_mutually_exclusive_group()
    rule.add_argument("--rank", type=int, metavar="R", help="of every LoRA (default: 16)")
    rule.add_argument("--energy", type=float, metavar="E", help="share of each ||delta||_F^2 to keep, e.g. 0.95")
    rule.add_argument(
        "--tol",
        type=float,
        metavar="T",
        help="keep singular values of at least T times the weight's largest, e.g. 0.05",
    )
    size.add_argument("--max-rank", type=int, metavar="R", help="of any LoRA (default: 128 with --energy or --tol)")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--include", action="append", metavar="PATTERN", help='names to adapt, e.g. "*.mlp.*"; repeatable'
    )
    what.add_argument("--exclude", action="append", metavar="PATTERN", help="names to leave out; repeatable")
    what.add_argument(
        "--save-rest",
        action="store_true",
        help="save changed biases, norms and other tensors that no LoRA carries whole",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", choices=DTYPES, help="of the adapter (default: the tuned model's)")
    how.add_argument(
        "--tolerance", type=float, default=1e-4, help="relative residual of singular vectors (default: %(default)s)"
    )
    how.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cpu)")
    how.add_argument("--seed", type=int, default=0, help="of the random start vectors (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    import torch

    from bkdfast.checkpoint import usable_device
    from bkdfast.svd.extract import extract_lora

    try:
        found = extract_lora(
            options.base,
            options.tuned,
            options.out,
            rank=options.rank,
            energy=options.energy,
            tol=options.tol,
            max_rank=options.max_rank,
            include=options.include,
            exclude=options.exclude,
            save_rest=options.save_rest,
            dtype=getattr(torch, options.dtype) if options.dtype else None,
            tolerance=options.tolerance,
            seed=options.seed,
            device=usable_device(options.device) if options.device else None,
            progress=not options.quiet,
        )
    except OSError as error:
        raise BkdfastError(f"cannot write to {options.out}: {error}") from error
    print(_text(found))
    return 0


def _text(found: Extraction) -> str:
    """The extraction for a terminal: the weights whose deltas are the largest, and what became of the others."""
    rows = sorted(found.tensors.values(), key=lambda one: one.frobenius, reverse=True)
    cells = [["weight", "shape", "rank", "||delta||", "kept"]]
    for one in rows[:SHOWN]:
        kept = {"lora": f"{one.energy:.1%}", "saved": "saved whole", "lost": f"lost: {one.note}"}[one.how]
        cells.append([one.name, "x".join(map(str, one.shape)), str(one.rank or "-"), f"{one.frobenius:.3g}", kept])
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = []
    for name, *numbers, kept in cells:
        middle = [cell.rjust(width) for cell, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *middle, kept]))
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} more with smaller deltas")
    adapted = [one for one in rows if one.how == "lora"]
    values = sum(one.rank * sum(one.shape) for one in adapted)
    total = sum(one.shape[0] * one.shape[1] for one in adapted)
    counts = [f"{len(adapted)} weights adapted, with {values:,} values ({values / total:.2%} of theirs)"]
    saved = sum(one.how == "saved" for one in rows)
    for count, what in ((saved, "saved whole"), (len(found.lost), "lost"), (found.unchanged, "unchanged")):
        counts += [f"{count} tensors {what}"] if count else []
    kept = f"{found.energy:.1%} of the squared norm of all deltas is in the adapter"
    return "\n".join([*lines, "", ", ".join(counts), kept, f"written to {found.path}"])
