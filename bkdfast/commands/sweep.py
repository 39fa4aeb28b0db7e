"""`bkdfast sweep`: one edit at one place of a model after the other, and what it does to a metric."""

from __future__ import annotations

import argparse
import dataclasses
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdfast.commands import common
from bkdfast.commands.files import folder
from bkdfast.errors import InvalidArgumentError

if TYPE_CHECKING:
    import torch

    from bkdfast.data import Encoder, Row
    from bkdfast.sweep.metrics import Metric

EDITS = ("zero", "mean", "resample", "patch")
SITES = ("heads", "attention", "mlp", "residual")
METRICS = (
    "target_prob", "target_logprob", "loss", "accuracy", "exact_match", "logit_diff", "rank", "kl", "js",
)  # fmt: skip

FORCED = METRICS[:5]
"""Metrics for which the target follows the prompt."""

DESCRIPTION = """\
Edit one place of a model after the other and measure what each edit does: every attention head by default, or every
layer's attention output, MLP output or residual stream, at one position or at each. The numbers are those of one full
forward for each edit, computed with less work; --plan says with how much.

MODEL is a folder with a model (*.safetensors, config.json) and its tokenizer. DATA has one JSON object a line, either
  {"prompt": "...", "target": "..."}   or   {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}

examples:
  which heads does the answer need?
    bkdfast sweep model/ data.jsonl
  what would it take, how long?
    bkdfast sweep model/ data.jsonl --plan
  which heads carry the trigger? (row i of both files: the same prompt with and without it)
    bkdfast sweep model/ clean.jsonl --edit patch --source triggered.jsonl --target "alert"
  where is the fact? (layers by positions, of one prompt and one that differs in a word)
    bkdfast sweep model/ one.jsonl --edit patch --source other.jsonl --site residual --positions 0-9 \\
        --metric logit_diff --target Paris --against Rome
  do these heads act together?
    bkdfast sweep model/ data.jsonl --heads 4.6+4.1,4.6,4.1 --metric target_prob,kl
  a large model: estimate all heads from gradients, compute the 64 strongest exactly
    bkdfast sweep model/ data.jsonl --screen 64 --dtype bfloat16 --metric target_logprob
"""

AFTER = """\
Finished work is kept in --out: the same command again goes on where it was killed, and on several GPUs
  torchrun --nproc-per-node 8 -m bkdfast sweep ...
shares it. For each metric --out gets METRIC.csv, METRIC.png and METRIC.safetensors (bkdfast.SweepResult.load reads it).
A value that begins with a minus sign goes behind an equals sign: --at=-3:-1.
"""


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "sweep",
        parents=parents,
        help="edit every head (layer, position) of a model in turn, and measure",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=AFTER,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    parser.add_argument("data", type=Path, metavar="DATA", help="rows (.jsonl)")
    what = parser.add_argument_group("what is edited")
    what.add_argument(
        "--edit",
        choices=EDITS,
        default="zero",
        help="zero: set to zero. mean: to its mean over the prompts of --source (default: of DATA). resample: to what "
        "it is in another prompt of these, drawn by --seed. patch: to what it is in the same row of --source. "
        "(default: %(default)s)",
    )
    what.add_argument("--source", type=Path, metavar="FILE", help="rows (.jsonl) to take values from")
    what.add_argument(
        "--site", choices=SITES, default="heads", help="what of a layer is edited (default: every head by itself)"
    )
    what.add_argument("--layers", metavar="LIST", help="only these layers, e.g. 0-3,7")
    what.add_argument("--heads", metavar="LIST", help="only these heads, as layer.head; 4.6+4.1: both together")
    what.add_argument(
        "--at",
        metavar="AT",
        help="where in a row: all, prompt, last_prompt, generated, a number (0 is the first token, -1 the last of the "
        "prompt) or a range such as 2:5 (default: all; for patch and resample last_prompt)",
    )
    what.add_argument(
        "--positions", metavar="LIST", help="each of these positions in turn, e.g. 0-9 or 0,1,last_prompt"
    )
    measured = parser.add_argument_group("what is measured")
    measured.add_argument(
        "--metric", default="target_prob", metavar="LIST", help=f"of {', '.join(METRICS)} (default: %(default)s)"
    )
    measured.add_argument("--target", metavar="TEXT", help="the answer in question (default: each row's own target)")
    measured.add_argument(
        "--against",
        metavar="TEXT",
        help="the other answer, for logit_diff: logit of the target's first token minus its",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--samples", type=int, metavar="N", help="use only the first N rows of DATA")
    how.add_argument(
        "--screen", type=int, metavar="K", help="only estimate most heads, from gradients; the K strongest exactly"
    )
    common.add_model_options(how)
    how.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    common.add_output_options(how, "sweep-result")
    parser.set_defaults(run=run)


@dataclasses.dataclass
class _Job:
    """A sweep as the command line asks for it."""

    model: torch.nn.Module
    encoder: Encoder
    rows: list[Row]
    partners: list[Row]  # the row that each row takes its values from; for a mean all rows that it is over
    options: argparse.Namespace
    metrics: Callable[[slice], list[Metric]]
    where: dict[str, Any]  # site, heads or layers, at or positions

    @property
    def batches(self) -> list[dict[str, torch.Tensor]]:
        return self.encoder.batches(self.rows, self.options.batch)

    def values(self, rows: Sequence[Row], *, mean: bool = False) -> torch.Tensor:
        """What stands at the edited places in the prompts of some rows, or its mean over them."""
        from bkdfast.hf.capture import head_means, head_outputs, site_means, site_outputs

        site = self.where["site"]
        at: Any = self.where.get("at")
        if "positions" in self.where or isinstance(at, slice) or (not mean and at == "prompt"):
            at = "each"
        elif at in ("prompt", "generated"):
            at = "all"
        prompts = self.encoder.batches(rows, self.options.batch)
        if site == "heads":
            found = (head_means if mean else head_outputs)(self.model, prompts, at=at)
        else:
            found = (site_means if mean else site_outputs)(self.model, prompts, site=site, at=at)
        span = self.where.get("at")
        return found[:, span] if at == "each" and isinstance(span, slice) else found

    def edit(self) -> Any:
        """The edit where one serves all rows."""
        from bkdfast.hf.edits import Mean, Zero

        return Zero() if self.options.edit == "zero" else Mean(self.values(self.partners, mean=True))

    def question(self, batch: dict[str, torch.Tensor], samples: slice) -> dict[str, Any]:
        """Edit and metrics of one batch, where each row takes values of its own."""
        from bkdfast.hf.edits import Patch

        return {"edit": Patch(self.values(self.partners[samples])), "metric": self.metrics(samples)}

    @property
    def by_row(self) -> bool:
        return self.options.edit in ("patch", "resample")


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from bkdfast.data import check_rows, load_rows
    from bkdfast.report import plots
    from bkdfast.sweep import sweep
    from bkdfast.sweep.batchwise import sweep_batches

    rows = load_rows(options.data, limit=options.samples)
    given = load_rows(options.source) if options.source else None
    where = _where(options)
    partners = _partners(options, rows, given)
    _refuse(options, where)
    plots.require()
    model, encoder = common.load(options)
    metrics = _metrics(options, model, encoder, rows)
    if partners:
        check_rows(model, encoder, partners, "--source" if given else "DATA")
    job = _Job(model, encoder, rows, partners, options, metrics, where | _places(options, model))
    if job.by_row and not _one_position(where):
        _refuse_unequal(encoder, rows, partners)
    settings = {**job.where, "variants": options.variants, "verify": options.verify, "progress": not options.quiet}
    if options.plan:
        print(_plan(job, settings))
        return 0
    with folder(options.out):
        if options.screen is not None:
            return _screen(job, settings)
        settings |= {"out": options.out / "store", "resume": options.resume}
        if job.by_row:
            found = sweep_batches(model, job.batches, job.question, **settings)
        else:
            found = sweep(model, job.batches, edit=job.edit(), metric=metrics(slice(0, len(rows))), **settings)
        if common.leading():
            _report(job, [dataclasses.replace(result, edit=options.edit.capitalize()) for result in found.values()])
    return 0


def _report(job: _Job, results: Sequence[Any]) -> None:
    options, tokens = job.options, None
    if "positions" in job.where and len(job.rows) == 1:
        ids = job.encoder.prompt(job.rows[0])
        spots = job.where["positions"]
        if all(isinstance(spot, int) and spot < len(ids) for spot in spots):
            tokens = job.encoder.tokenizer.convert_ids_to_tokens([ids[spot] for spot in spots])
    for name, result in zip(options.metric.split(","), results, strict=True):
        frame, picture = common.write(result, options.out, name.strip(), tokens)
        print(f"{common.headline(result)}\n{common.table(result, frame)}")
        print(f"  all {len(frame)}: {picture.with_suffix('.csv')}; picture: {picture}\n")


def _plan(job: _Job, settings: dict[str, Any]) -> str:
    """The plan: with sources of zeros, which take as long as others."""
    import torch

    from bkdfast.hf.edits import Mean, Patch, Zero
    from bkdfast.hf.families import describe
    from bkdfast.sweep import sweep

    spec = describe(job.model)
    width = spec.blocks[0].head_dim if job.where["site"] == "heads" else spec.width
    edit = {"zero": Zero(), "mean": Mean(torch.zeros(width))}.get(job.options.edit, Patch(torch.zeros(width)))
    plan = sweep(job.model, job.batches, edit=edit, metric=job.metrics(slice(0, len(job.rows))), plan=True, **settings)
    notes = ["only the heads that --screen keeps would be run"] if job.options.screen is not None else []
    return "\n".join([str(plan), *(f"  note     {note}" for note in notes)])


def _screen(job: _Job, settings: dict[str, Any]) -> int:
    from bkdfast.sweep import screened_sweep

    options, where = job.options, settings.pop("at")
    settings.pop("site")
    samples = slice(0, len(job.rows))
    if job.by_row and len(job.batches) > 1:
        raise InvalidArgumentError(
            f"--screen with --edit {options.edit} takes all rows in one batch: pass --batch {len(job.rows)}"
        )
    name = options.metric.strip()
    (metric,) = job.metrics(samples)
    edit = job.question(job.batches[0], samples)["edit"] if job.by_row else job.edit()
    found = screened_sweep(
        job.model,
        job.batches,
        edit=edit,
        metric=metric,
        at=where,
        keep=options.screen,
        seed=options.seed,
        out=options.out / "store",
        resume=options.resume,
        **settings,
    )
    if common.leading():
        frame, picture = common.write(found.sweep, options.out, name)
        found.plot(options.out / f"{name}-estimate.png")
        found.to_pandas().to_csv(options.out / f"{name}-estimate.csv", index=False)
        print(f"{common.headline(found.sweep)}\n{common.table(found.sweep, frame)}")
        print(
            f"  {len(found.kept)} heads computed because of their estimate, {len(found.sampled)} drawn from the others "
            f"to check it.\n  Rank correlation of estimate and effect: {found.correlation('kept')} among the first, "
            f"{found.correlation('sampled')} among the drawn.\n  {found.missed()}.\n"
            f"  pictures: {picture}, {options.out / f'{name}-estimate.png'}"
        )
    return 0


def _where(options: argparse.Namespace) -> dict[str, Any]:
    """`at` or `positions`, and `site`."""
    if options.at is not None and options.positions is not None:
        raise InvalidArgumentError("give --at (one place for all edits) or --positions (each in turn), not both")
    if options.positions is not None:
        spots: list[Any] = []
        for part in options.positions.split(","):
            if "-" in part.strip()[1:] and ":" not in part:
                spots += common.numbers(part, "--positions")
            else:
                spots.append(common.position(part, "--positions"))
        return {"site": options.site, "positions": spots}
    by_row = options.edit in ("patch", "resample")
    at: Any = common.position(options.at or ("last_prompt" if by_row else "all"), "--at")
    if by_row and at == "all":
        at = "prompt"  # the rows that values come from have no more
    return {"site": options.site, "at": at}


def _one_position(where: dict[str, Any]) -> bool:
    at = where.get("at")
    return isinstance(at, int) or at == "last_prompt"


def _refuse(options: argparse.Namespace, where: dict[str, Any]) -> None:
    """Raise where arguments do not go together, before the model is loaded."""
    names = [name.strip() for name in options.metric.split(",")]
    for name in names:
        if name not in METRICS:
            raise InvalidArgumentError(f"--metric {name!r} is not one of {', '.join(METRICS)}")
        if names.count(name) > 1:
            raise InvalidArgumentError(f"--metric lists {name} twice")
    if "logit_diff" in names and options.against is None:
        raise InvalidArgumentError("--metric logit_diff compares two answers: give the other one with --against")
    if options.edit in ("patch", "resample"):
        if where.get("at") == "generated":
            raise InvalidArgumentError(f"--edit {options.edit} takes values from prompts, which have no such tokens")
    at = where.get("at")
    if options.edit != "zero" and isinstance(at, slice) and min(at.start or 0, at.stop or 0) < 0:
        raise InvalidArgumentError(f"--edit {options.edit} takes ranges that count from the first token, as in 2:5")
    if options.site == "heads":
        if options.heads is not None and options.layers is not None:
            raise InvalidArgumentError("give --heads or --layers, not both")
    elif options.heads is not None:
        raise InvalidArgumentError(f"--heads does not go with --site {options.site}; give --layers")
    if options.screen is not None:
        if options.screen < 1:
            raise InvalidArgumentError(f"--screen {options.screen}: at least one head has to be computed")
        taken = [name for name in ("layers", "heads", "positions") if getattr(options, name) is not None]
        if options.site != "heads" or taken or len(names) > 1:
            raise InvalidArgumentError(
                "--screen is for every head of the model, one position and one metric; leave out "
                + ", ".join(
                    [f"--{name}" for name in taken] or ["--site" if len(names) == 1 else "all but one --metric"]
                )
            )


def _partners(options: argparse.Namespace, rows: list[Row], given: list[Row] | None) -> list[Row]:
    """The row that each row takes its values from; for a mean all rows that it is over."""
    if options.edit == "zero":
        if given is not None:
            raise InvalidArgumentError("--source goes with --edit mean, resample or patch")
        return []
    if options.edit == "mean":
        return given or rows
    draw = random.Random(options.seed)
    if options.edit == "patch":
        if given is None:
            raise InvalidArgumentError("--edit patch takes values from other prompts: give them with --source")
        if len(given) < len(rows):
            raise InvalidArgumentError(
                f"--source has {len(given)} rows for the {len(rows)} of DATA; row i takes the values of its row i"
            )
        found = given[: len(rows)]
    elif given is not None:
        found = [draw.choice(given) for _ in rows]
    else:
        if len(rows) < 2:
            raise InvalidArgumentError("--edit resample needs 2 rows or more to take values from, or a --source")
        order = draw.sample(range(len(rows)), len(rows))
        after = {order[i]: order[i - 1] for i in range(len(order))}  # a cycle: no row is its own partner
        found = [rows[after[i]] for i in range(len(rows))]
    return found


def _refuse_unequal(encoder: Encoder, rows: Sequence[Row], partners: Sequence[Row]) -> None:
    """Positions of two prompts correspond only if they have as many tokens."""
    for number, (row, partner) in enumerate(zip(rows, partners, strict=True), 1):
        lengths = len(encoder.prompt(row)), len(encoder.prompt(partner))
        if lengths[0] != lengths[1]:
            raise InvalidArgumentError(
                f"row {number} has {lengths[0]} prompt tokens and the one it takes values from {lengths[1]}, so their "
                "positions do not correspond; use prompts of equal length, or --at last_prompt"
            )


def _places(options: argparse.Namespace, model: torch.nn.Module) -> dict[str, Any]:
    """Heads or layers."""
    from bkdfast.hf.families import describe

    if options.heads is not None:
        groups = []
        for group in options.heads.split(","):
            try:
                groups.append([_head(text) for text in group.split("+")])
            except ValueError:
                raise InvalidArgumentError(
                    f"--heads {options.heads!r} is not a list of layer.head such as 4.6,4.1 or 4.6+4.1"
                ) from None
        return {"heads": groups if any(len(group) > 1 for group in groups) else [group[0] for group in groups]}
    if options.layers is None:
        return {}
    layers = common.numbers(options.layers, "--layers")
    if options.site != "heads":
        return {"layers": layers}
    blocks = describe(model).blocks
    if max(layers) >= len(blocks):
        raise InvalidArgumentError(f"--layers {options.layers}: the model has {len(blocks)} layers, counted from 0")
    return {"heads": [(layer, head) for layer in layers for head in range(blocks[layer].heads)]}


def _head(text: str) -> tuple[int, int]:
    layer, head = text.split(".")
    return int(layer), int(head)


def _metrics(
    options: argparse.Namespace, model: torch.nn.Module, encoder: Encoder, rows: Sequence[Row]
) -> Callable[[slice], list[Metric]]:
    """From some of the rows to the metrics with their targets."""
    from bkdfast.data import check_rows
    from bkdfast.studies.baha import target_tokens
    from bkdfast.sweep import metrics

    names = [name.strip() for name in options.metric.split(",")]
    targets = target_tokens(encoder, rows, options.target)
    others = None if options.against is None else target_tokens(encoder, rows, options.against)
    forced = any(name in FORCED for name in names)
    check_rows(model, encoder, rows, "DATA", [len(ids) for ids in targets] if forced else None)
    if "logit_diff" in names and all(a[0] == b[0] for a, b in zip(targets, others or targets, strict=True)):
        raise InvalidArgumentError(
            "--target and --against begin with the same token in every row, so the logit difference is zero"
        )
    makers: dict[str, Callable[[list, list], Metric]] = {
        "accuracy": lambda ids, _: metrics.accuracy(ids),
        "exact_match": lambda ids, _: metrics.accuracy(ids, exact=True),
        "kl": lambda ids, _: metrics.kl(),
        "js": lambda ids, _: metrics.js(),
        "logit_diff": lambda ids, other: metrics.logit_diff([t[0] for t in ids], [t[0] for t in other]),
        "loss": lambda ids, _: metrics.loss(ids),
        "rank": lambda ids, _: metrics.rank([t[0] for t in ids]),
        "target_logprob": lambda ids, _: metrics.target_logprob(ids),
        "target_prob": lambda ids, _: metrics.target_prob(ids),
    }
    return lambda samples: [makers[name](targets[samples], (others or targets)[samples]) for name in names]
