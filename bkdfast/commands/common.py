"""What the commands on one model share: its options, lists such as `0-3,7`, tables and files of results."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bkdfast.commands.files import write_text
from bkdfast.errors import BkdfastError, InvalidArgumentError

if TYPE_CHECKING:
    import torch

    from bkdfast.data import Encoder
    from bkdfast.sweep import SweepResult

DTYPES = ("float32", "bfloat16", "float16", "float64")
SHOWN = 10
"""Places in a table."""


def add_model_options(group: Any) -> None:
    """Options of how a model is run."""
    group.add_argument("--batch", type=int, default=16, metavar="N", help="rows in a batch (default: %(default)s)")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="to run the model in (default: %(default)s)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: where there is one)"
    )
    group.add_argument(
        "--variants", type=int, metavar="N", help="edits that share a forward (default: as many as fill the device)"
    )
    group.add_argument(
        "--verify",
        type=int,
        metavar="N",
        help="compute N random cells again with plain hooks, and fail if one differs (default: 4 for a model type that "
        "is not in the tested list, else 0)",
    )


def add_output_options(group: Any, out: str) -> None:
    """Options of where results go."""
    group.add_argument(
        "--out", type=Path, default=Path(out), metavar="DIR", help="folder to write to (default: %(default)s)"
    )
    group.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="go on with the finished work in --out, which is what happens by itself; --no-resume refuses a folder "
        "that has some",
    )
    group.add_argument("--plan", action="store_true", help="say what would be run, what is saved, how long; then stop")


def load(options: argparse.Namespace) -> tuple[torch.nn.Module, Encoder]:
    """The model and the encoder that a command is about."""
    import torch

    from bkdfast.checkpoint import load_model, load_tokenizer, usable_device
    from bkdfast.data import Encoder

    device = options.device
    if device == "auto":  # each process that torchrun starts has a device of its own
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    encoder = Encoder(load_tokenizer(options.model), chat=options.chat)
    model = load_model(options.model, dtype=getattr(torch, options.dtype), device=usable_device(device))
    return model, encoder


def numbers(text: str, name: str) -> list[int]:
    """`0-3,7` as [0, 1, 2, 3, 7]."""
    found: list[int] = []
    for part in text.split(","):
        if not (span := re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)):
            raise InvalidArgumentError(f"{name} {text!r} is not a list of numbers such as 0-3,7")
        first = int(span[1])
        last = first if span[2] is None else int(span[2])
        if last < first:
            raise InvalidArgumentError(f"{name} {text!r}: {part.strip()} goes backwards")
        found += range(first, last + 1)
    return found


def position(text: str, name: str) -> str | int | slice:
    """A position: its name, an int, or a slice such as `2:5` or `-3:`."""
    text = text.strip()
    if text in ("all", "last_prompt", "prompt", "generated"):
        return text
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if span := re.fullmatch(r"(-?\d+)?:(-?\d+)?", text):
        return slice(*(None if end is None else int(end) for end in span.groups()))
    raise InvalidArgumentError(
        f"{name} {text!r} is not a position; give all, last_prompt, prompt, generated, a number (0 is the first token, "
        "-1 the last of the prompt) or a range such as 2:5"
    )


def table(result: SweepResult, frame: Any, unit: str = "") -> str:
    """The strongest places of a result as text, from `to_pandas(statistics=True)`."""
    shown = frame.reindex(frame["effect"].abs().sort_values(ascending=False, kind="stable").index)[:SHOWN]
    with_statistics = "p" in frame
    header = [*result.dims, "effect", *(["95% interval", "p (Holm)"] if with_statistics else [])]
    lines = [header]
    for row in shown.to_dict("records"):
        line = [*(_label(name, row[name]) for name in result.dims), f"{row['effect']:+.4g}"]
        if with_statistics:
            line += [f"[{row['low']:+.3g}, {row['high']:+.3g}]", "<0.001" if row["p"] < 0.001 else f"{row['p']:.3f}"]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join(f"  {line}" for line in text)


def write(result: SweepResult, out: Path, name: str, tokens: list[str] | None = None) -> tuple[Any, Path]:
    """Save a result as `NAME.safetensors`, `.csv` and `.png`; returns its table (a data frame) and the picture."""
    frame = result.to_pandas(statistics=result.effects.shape[-1] > 1)
    try:
        result.save(out / f"{name}.safetensors")
        write_text(out / f"{name}.csv", frame.to_csv(index=False))
        result.plot(out / f"{name}.png", **({"tokens": tokens} if tokens else {}))
    except OSError as error:
        raise BkdfastError(f"cannot write to {out}: {error}") from error
    return frame, out / f"{name}.png"


def write_json(path: Path, told: Mapping[str, Any]) -> None:
    """Write plain data as JSON, with tensors and paths as text."""
    try:
        write_text(path, json.dumps(told, indent=1, default=str) + "\n")
    except OSError as error:
        raise BkdfastError(f"cannot write to {path.parent}: {error}") from error


def headline(result: SweepResult) -> str:
    """What was swept, on what, and how long it took."""
    facts = result.facts
    line = repr(result).removeprefix("SweepResult(").removesuffix(")")
    if facts.get("noise_floor") is not None:
        line += (
            f"\n{facts['verified_cells']} cells computed again with plain hooks: the largest difference is "
            f"{facts['noise_floor']:.1e}"
        )
    return line


def leading() -> bool:
    """This process is the one that prints and writes (the first of those that torchrun started)."""
    from bkdfast.jobs.units import place

    return place()[0] == 0


def _label(name: str, value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text.count('+') + 1} heads: {text[:24]}..."
