"""One library's side: `python -m benchmarks.peers.worker RUNNER FOLDER`, in that library's environment.

Answers each line of stdin with one line of JSON: "first" runs the sweep, measures memory and writes the effects into
FOLDER; "run" runs it, and says how long it took and how far the effects are from the written ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.memory import peak_growth
from benchmarks.sweep_task import Sweep, Task


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runner", help="a module of benchmarks/peers/runners")
    parser.add_argument("folder", type=Path, help="where the task is")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print; their lines go to stderr
    os.dup2(2, 1)
    torch.set_num_threads(options.threads)
    runner = importlib.import_module(f"benchmarks.peers.runners.{options.runner}")
    sweep: Sweep = runner.load(Task.load(options.folder))
    versions = {name: importlib.metadata.version(name) for name in (*runner.PACKAGES, "torch", "transformers")}
    answers.write(json.dumps({"versions": versions}) + "\n")
    written = options.folder / f"{options.runner}.safetensors"
    for line in sys.stdin:
        command = line.strip()
        if command == "first":
            effects, growth, peak = peak_growth(sweep)
            save_file({"effects": effects.clone()}, written)
            answers.write(json.dumps({"growth": growth, "peak": peak}) + "\n")
        elif command == "run":
            start = time.perf_counter()
            effects = sweep()
            took = time.perf_counter() - start
            drift = (effects - load_file(written)["effects"]).abs().max().item()
            answers.write(json.dumps({"seconds": took, "drift": drift}) + "\n")
        else:
            raise SystemExit(f"{command!r} is neither 'first' nor 'run'")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
