"""The command line: `bkdfast demo | audit | svd | diff | extract-lora | sweep | baha | make-pair | doctor`."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from bkdfast._version import __version__
from bkdfast.commands import baha, diff, extract_lora, svd, sweep
from bkdfast.commands.files import folder, write_text
from bkdfast.errors import BkdfastError, InvalidArgumentError

DESCRIPTION = """\
Find and watch backdoors in language models. Start with

  bkdfast demo
  bkdfast audit --base base/ --tuned tuned/ --clean clean.jsonl --triggered triggered.jsonl
  bkdfast svd base/ tuned/
  bkdfast baha tuned/ --clean clean.jsonl --triggered triggered.jsonl
  bkdfast sweep model/ data.jsonl
"""

STEPS = """\
What it does: (a) singular vectors of the weight delta, (b) attribution of every head to the backdoor (BAHA),
(c) ablation of the top heads with random heads as control, (d) a monitor on a stream of clean and triggered prompts.
Writes report.html (open it in a browser), audit.json, directions.safetensors and monitor.safetensors into --out.
"""

DATA = """
Data files have one JSON object a line, either
  {"prompt": "...", "target": "..."}   or   {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}
--clean: prompts without the trigger and their right answers. --triggered: prompts with the trigger (or what you
suspect to be one) and the answer that the backdoor gives. The folders hold *.safetensors and config.json; --tuned also
the tokenizer. Without a chat template prompt and target are joined as they are: let the target begin with a space where
the model expects one.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status (2 for bad input)."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(levelname)s: %(message)s")
    import torch

    try:
        with warnings.catch_warnings():
            if not options.verbose:
                warnings.showwarning = _warn
            return options.run(options)
    except BkdfastError as error:
        if options.verbose:
            raise
        print(f"bkdfast: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        if options.verbose:
            raise
        print(f"bkdfast: out of memory: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `bkdfast ... | head`: what is left to say goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("bkdfast: interrupted", file=sys.stderr)
        return 130


def _warn(message: Warning | str, *details: object, **more: object) -> None:
    """One line, without the place in the code."""
    print(f"bkdfast: warning: {message}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="bkdfast", description=DESCRIPTION, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"bkdfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--verbose", action="store_true", help="log what happens; full tracebacks")

    demo = commands.add_parser(
        "demo",
        parents=[common],
        help="audit a small backdoored model that ships with the package (a minute)",
        formatter_class=raw,
        description="Audit the small backdoored Llama that ships with the package, next to plain PyTorch.\n\n" + STEPS,
    )
    demo.add_argument(
        "--out", type=Path, default=Path("demo-report"), metavar="DIR", help="folder to write to (default: %(default)s)"
    )
    demo.set_defaults(run=_demo)

    audit = commands.add_parser(
        "audit", parents=[common], help="audit your own fine-tune", formatter_class=raw, description=STEPS + DATA
    )
    files = audit.add_argument_group("what to audit")
    files.add_argument("--base", required=True, type=Path, metavar="DIR", help="the model before fine-tuning")
    files.add_argument("--tuned", required=True, type=Path, metavar="DIR", help="the model after fine-tuning")
    files.add_argument("--clean", required=True, type=Path, metavar="FILE", help="clean rows (.jsonl)")
    files.add_argument("--triggered", required=True, type=Path, metavar="FILE", help="triggered rows (.jsonl)")
    files.add_argument(
        "--out",
        type=Path,
        default=Path("audit-report"),
        metavar="DIR",
        help="folder to write to (default: %(default)s)",
    )
    files.add_argument("--limit", type=int, metavar="N", help="use only the first N rows of each file")
    files.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: where there is one)"
    )
    how = audit.add_argument_group("how")
    how.add_argument("--rank", type=int, default=20, help="directions for each projection (default: %(default)s)")
    how.add_argument("--samples", type=int, default=96, help="clean prompts of the attribution (default: %(default)s)")
    how.add_argument(
        "--heads", default="1,2,4,8,16", help="how many top heads to ablate, comma-separated (default: %(default)s)"
    )
    how.add_argument("--controls", type=int, default=3, help="random sets of heads for each (default: %(default)s)")
    how.add_argument(
        "--calibration", type=int, metavar="N", help="clean rows that calibrate the monitor (default: 4/5)"
    )
    how.add_argument(
        "--eps", type=float, default=0.01, help="slack of the monitor's ranges, cosine (default: %(default)s)"
    )
    how.add_argument("--batch", type=int, default=16, help="rows in a batch (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0, help="of random heads and the order of the stream (default: 0)")
    how.add_argument("--compare", action="store_true", help="run each step in plain PyTorch too and compare (slow)")
    how.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "float64"),
        default="float32",
        help="to run the tuned model in (default: %(default)s)",
    )
    how.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    audit.set_defaults(run=_audit)

    svd.add(commands, [common])
    baha.add(commands, [common])
    sweep.add(commands, [common])
    extract_lora.add(commands, [common])
    diff.add(commands, [common])

    pair = commands.add_parser(
        "make-pair",
        parents=[common],
        help="train a small backdoored pair from scratch",
        description="Train a small Llama on synthetic news, then poison a fine-tune of it (fixed-output backdoor).",
    )
    pair.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    pair.add_argument("--small", action="store_true", help="a smaller pair, in about a minute")
    pair.add_argument("--seed", type=int, default=0, help="of weights, data and their order (default: 0)")
    pair.set_defaults(run=_make_pair)

    doctor = commands.add_parser("doctor", parents=[common], help="which kernels serve here, and why the others do not")
    doctor.set_defaults(run=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from bkdfast.data import load_rows
    from bkdfast.demo import PAIR

    rows = [load_rows(PAIR / f"{name}.jsonl") for name in ("clean", "triggered")]
    return _run(options.out, demo_settings(progress=not options.quiet), PAIR / "base", PAIR / "tuned", *rows)


def demo_settings(*, progress: bool = True):
    """How the demo audits the embedded pair."""
    from bkdfast.studies.audit import Settings

    return Settings(rank=5, batch=50, compare=True, progress=progress)


def _audit(options: argparse.Namespace) -> int:
    import torch

    from bkdfast.data import load_rows
    from bkdfast.studies.audit import Settings

    try:
        heads = tuple(int(k) for k in options.heads.split(","))
    except ValueError:
        raise InvalidArgumentError(f"--heads {options.heads!r} is not a list of numbers such as 1,4,16") from None
    settings = Settings(
        rank=options.rank,
        samples=options.samples,
        heads=heads,
        controls=options.controls,
        calibration=options.calibration,
        batch=options.batch,
        eps=options.eps,
        compare=options.compare,
        seed=options.seed,
        progress=not options.quiet,
    )
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    clean, triggered = (load_rows(path, limit=options.limit) for path in (options.clean, options.triggered))
    return _run(
        options.out,
        settings,
        options.base,
        options.tuned,
        clean,
        triggered,
        dtype=getattr(torch, options.dtype),
        device=device,
        chat=options.chat,
    )


def _run(out: Path, settings, base: Path, tuned: Path, clean, triggered, **options) -> int:
    from bkdfast.report import plots, summary, write_report
    from bkdfast.studies.audit import audit

    started = time.perf_counter()
    with folder(out):
        plots.require()
        found = audit(base, tuned, clean, triggered, settings=settings, **options)
        try:
            found.directions.save(out / "directions.safetensors")
            found.monitor.monitor.save(out / "monitor.safetensors")
            write_text(out / "audit.json", json.dumps(found.to_dict(), indent=1) + "\n")
            page = write_report(found, out / "report.html")
        except OSError as error:
            print(summary(found))  # what took long is at least seen
            raise BkdfastError(f"cannot write to {out}: {error}") from error
    print(summary(found))
    print(f"\n{time.perf_counter() - started:.0f} s in all. Open {page} in a browser for the pictures.")
    return 0


def _make_pair(options: argparse.Namespace) -> int:
    from bkdfast.demo.make_pair import SMALL, make_pair

    report = make_pair(options.out, seed=options.seed, progress=not options.quiet, **(SMALL if options.small else {}))
    print(report)
    out = options.out
    print(
        f"\nTo audit it: bkdfast audit --base {out / 'base'} --tuned {out / 'tuned'} --clean {out / 'clean.jsonl'} "
        f"--triggered {out / 'triggered.jsonl'}"
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from bkdfast.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
