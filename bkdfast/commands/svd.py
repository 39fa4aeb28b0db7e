"""`bkdfast svd`: what fine-tuning wrote into the weights, as singular triplets, tables, pictures and a report."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

from bkdfast.commands import common
from bkdfast.commands.files import folder
from bkdfast.errors import BkdfastError, InvalidArgumentError

DESCRIPTION = """\
Compare two checkpoints of one model and say what fine-tuning wrote into the weights: for every matrix the leading
singular triplets of tuned minus base, with a certificate of how far they may be off, and how its directions recur from
layer to layer. One pair of tensors is in memory at a time; the models are never loaded.

BASE and TUNED are folders with *.safetensors files (also sharded, differently on both sides) and config.json.

examples:
  which weights changed, and along how many directions?
    bkdfast svd base/ tuned/
  what would be compared, and how much would be read?
    bkdfast svd base/ tuned/ --dry-run
  only what writes to the residual stream, 64 triplets each
    bkdfast svd base/ tuned/ --include "*.o_proj.weight" --include "*.down_proj.weight" --rank 64
  as many triplets of each tensor as hold 90% of its change, but no more than 64
    bkdfast svd base/ tuned/ --energy 0.9 --max-rank 64
  without the embeddings, on a GPU
    bkdfast svd base/ tuned/ --exclude "*embed*" --exclude "lm_head*" --device cuda

Patterns are of whole names, as the shell has them (* also crosses dots); put them in quotes.
"""

AFTER = """\
How many triplets: --rank gives every tensor the same number; --energy and --tol give each the smallest that does, so
that the table tells changes of low rank from flat spectra. They try 16, 32, 64, ... triplets until these are enough,
so that a flat spectrum takes longer than with --rank; --max-rank bounds that, and the memory. A tensor that needs more
says so in its note. --dry-run says what memory it would all take at the bound.

--out gets report.html (open it in a browser), tensors.csv, overlap.csv, spectra.png, layers.png, overlap.png and
delta_svd.safetensors (bkdfast.DeltaSVD.load reads it).
"""


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "svd",
        parents=parents,
        help="what fine-tuning wrote into the weights",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=AFTER,
    )
    parser.add_argument("base", metavar="BASE", help="folder of the model before fine-tuning")
    parser.add_argument("tuned", metavar="TUNED", help="folder of the model after it")
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--include", action="append", metavar="PATTERN", help="only tensors of such names; may be repeated"
    )
    what.add_argument("--exclude", action="append", metavar="PATTERN", help="no tensors of such names; may be repeated")
    how = parser.add_argument_group("how")
    rule = how.add_mutually_exclusive_group()
    rule.add_argument("--rank", type=int, metavar="K", help="triplets for each tensor (default: 20)")
    rule.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="for each tensor the fewest triplets that hold this share of its ||delta||_F^2, e.g. 0.9",
    )
    rule.add_argument(
        "--tol",
        type=float,
        metavar="T",
        help="for each tensor the triplets with singular values of at least T times its largest, e.g. 0.05",
    )
    how.add_argument(
        "--max-rank", type=int, metavar="K", help="most triplets of any tensor (default: 128 with --energy or --tol)"
    )
    how.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="T",
        help="residual of a triplet over its singular value, at which to stop (default: %(default)s)",
    )
    how.add_argument("--seed", type=int, default=0, help="of the random start vectors (default: %(default)s)")
    how.add_argument("--device", default="cpu", help="to compute on: cpu, cuda, cuda:1, ... (default: %(default)s)")
    how.add_argument("--max-memory", metavar="SIZE", help="most main memory to use, e.g. 4GB (default: as needed)")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out", type=Path, default=Path("svd-result"), metavar="DIR", help="folder to write to (default: %(default)s)"
    )
    out.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the finished tensors in --out, which is what happens by itself; --no-resume refuses a folder "
        "that has some",
    )
    out.add_argument("--dry-run", action="store_true", help="say what would be compared and read; then stop")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from bkdfast.checkpoint import usable_device
    from bkdfast.report import delta_summary, plots, write_delta_report
    from bkdfast.svd.delta import ARTIFACT, delta_plan, delta_svd

    chosen = {name: getattr(options, name) for name in ("rank", "energy", "tol", "max_rank", "include", "exclude")}
    if options.dry_run:
        print(delta_plan(options.base, options.tuned, **chosen))
        return 0
    settings = {
        **chosen,
        "tolerance": options.tolerance,
        "seed": options.seed,
        "device": usable_device(options.device),
        "progress": not options.quiet,
        "max_memory": options.max_memory,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said again by the run itself
        plan = delta_plan(options.base, options.tuned, **chosen)
    if not plan.items:
        skipped = "".join(f"; {name} is {why}" for name, why in list(plan.skipped.items())[:1])
        raise InvalidArgumentError(
            f"nothing to compare: --include and --exclude leave no matrix of floating-point numbers{skipped}"
        )
    plots.require()
    with folder(options.out):
        stored = {"out": options.out / "store", "resume": options.resume}
        found = delta_svd(options.base, options.tuned, **settings, **stored)
        if not common.leading():
            return 0
        try:
            (options.out / "store" / ARTIFACT).replace(options.out / ARTIFACT)
            page = write_delta_report(found, options.out, model_type=_model_type(options.tuned, options.base))
        except OSError as error:
            print(delta_summary(found))
            raise BkdfastError(f"cannot write to {options.out}: {error}") from error
        print(delta_summary(found))
        print(f"\nOpen {page} in a browser for the pictures.")
    return 0


def _model_type(*models: str) -> str | None:
    """`model_type` of the first config that can be read."""
    from bkdfast.svd.source import open_source

    for model in models:
        try:
            config = open_source(model).config
        except BkdfastError:
            continue
        if isinstance(kind := getattr(config, "model_type", None), str):
            return kind
    return None
