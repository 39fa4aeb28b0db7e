"""Sweeps against the hook loop: `python -m benchmarks.sweep` (or `make bench-sweep`).

For each size the effects of all competitors are compared before anything is timed: with each other, and with a hook
loop in float64, from which ours may be at most twice as far as the plain loop in the same dtype. Then they take turns,
round after round; a ratio is the median over rounds of the ratio within a round. Memory is what a fresh process grows
by.

The time that the algebra leaves is the plan's operations (`Shape.flops`) over the rate of matrix products of the
model's own sizes, measured here; next to it stands what was measured.

A size that fails is a row with its error; the run goes on, and its exit status is 1. Writes
`benchmarks/results/sweep-<machine>.json` after every size; `python -m benchmarks.tables` puts it into README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.peers.drive import Entry, first_run
from benchmarks.peers.runners import ours
from benchmarks.run import RESULTS, compare, machine, seconds, slug
from benchmarks.sweep_task import Shape, Sweep, Task, build, cached_loop, hook_loop

LOOP, CACHED, OURS = "hook loop", "hook loop, prompt cached", "bkdfast"
RUNNERS = {LOOP: "hook_loop", CACHED: "cached_loop", OURS: "ours"}
AGREE = {"float32": 1e-3, "bfloat16": 0.5}
"""Largest admitted difference of an effect from the plain loop's, in units of the largest effect."""
_LONG = 10.0  # seconds; a slower loop gets fewer rounds
_CPU = torch.device("cpu")


def shapes() -> Iterator[Shape]:
    """All sizes: the attribution task, every position, and models so small that only overhead is left."""
    for tokens in (128, 512):
        yield Shape(tokens=tokens)
    yield Shape(tokens=128, batch=1)
    yield Shape(tokens=128, dtype="bfloat16")
    for tokens in (32, 128, 512):
        for batch in (1, 4):
            yield Shape(tokens=tokens, batch=batch, everywhere=True)
    for layers in (2, 8):
        tiny = Shape(layers=layers, width=64, mlp=176, vocab=67, tokens=16, targets=4, batch=1)
        yield tiny
        yield Shape(**{**vars(tiny), "everywhere": True})


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="turns, 3 where one takes long (default: %(default)s)")
    parser.add_argument("--only", help="sizes whose name has this in it, e.g. T=128; the file's others are kept")
    parser.add_argument("--no-memory", action="store_true", help="leave out the fresh processes that measure memory")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/sweep-<machine>.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    facts = machine(_CPU)
    out = options.out or RESULTS / f"sweep-{slug(facts['name'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = _kept(out, facts) if options.only else []
    chosen = [shape for shape in shapes() if options.only is None or options.only in shape.name]
    if not chosen:
        sys.exit(f"no size has {options.only!r} in its name; sizes: {'; '.join(shape.name for shape in shapes())}")
    for shape in tqdm(chosen, desc="sizes", unit="size"):
        try:
            row = measure(shape, options.rounds, None if options.no_memory else options.threads)
        except Exception as error:  # the other sizes are still worth having
            row = {"name": shape.name, "shape": vars(shape), "error": f"{type(error).__name__}: {error}"}
        rows = _in_order([*(old for old in rows if old["name"] != row["name"]), row])
        tqdm.write(summary(row))
        out.write_text(json.dumps({"machine": facts, "sweeps": rows}, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    slower = [row["name"] for row in rows if "error" not in row and row["versions"][OURS]["speedup"] < 1]
    if slower:
        print(f"slower than the hook loop: {'; '.join(slower)}")
    if failed := sum("error" in row for row in rows):
        sys.exit(f"{failed} of {len(rows)} sizes failed")


def _kept(out: Path, facts: dict) -> list[dict]:
    """Rows of an earlier run on this machine with these versions."""
    if not out.exists():
        return []
    old = json.loads(out.read_text(encoding="utf-8"))
    same = {name: value for name, value in facts.items() if name != "commit"}
    return old["sweeps"] if same == {name: old["machine"].get(name) for name in same} else []


def _in_order(rows: list[dict]) -> list[dict]:
    names = [shape.name for shape in shapes()]
    return sorted((row for row in rows if row["name"] in names), key=lambda row: names.index(row["name"]))


def measure(shape: Shape, rounds: int, threads: int | None) -> dict:
    """Agreement, times and memory (with `threads`, in fresh processes) of one size."""
    task = build(shape)
    versions = competitors(task)
    found, first = {}, {}
    for name, run in versions.items():
        start = time.perf_counter()
        found[name] = run()
        first[name] = time.perf_counter() - start
    long = first[LOOP] > _LONG
    agreement = check(task, found, sampled=long)
    # Small sizes repeat a run within a sample, so that the clock's steps and the first call of a turn do not show.
    calls = {name: max(1, round(0.2 / took)) for name, took in first.items()}
    work, products = matrix_products(task)
    samples: dict[str, list[float]] = {name: [] for name in versions}
    rates = []
    outside = []
    for _ in range(min(rounds, 3) if long else rounds):
        for name, run in versions.items():
            with inside(task.model.model) as forwards:
                samples[name].append(seconds(run, calls[name], _CPU))
            if name == OURS:
                outside.append(samples[name][-1] - sum(forwards) / calls[name])
        rates.append(work / seconds(products, 1, _CPU))
    _, figures = compare(samples, [LOOP])
    flops = shape.flops()
    memory = {name: growth(shape, runner, threads) if threads else {} for name, runner in _runners(shape).items()}
    return {
        "name": shape.name,
        "shape": vars(shape),
        "rounds": len(rates),
        "agreement": agreement,
        "flops": flops,
        "flop_ratio": flops["loop"] / flops["plan"],
        "gemm_gflop_s": statistics.median(rates) / 1e9,
        "unavoidable_s": flops["plan"] / statistics.median(rates),
        "over_unavoidable": statistics.median(
            took * rate / flops["plan"] for took, rate in zip(samples[OURS], rates, strict=True)
        ),
        "per_variant_ms": figures[OURS]["median_us"] / 1e3 / (shape.layers * shape.heads),
        "overhead_ms": statistics.median(outside) * 1e3 / (shape.layers * shape.heads),
        "versions": {name: {"ours": name == OURS, **figures[name], **memory[name]} for name in versions},
    }


@contextlib.contextmanager
def inside(module: torch.nn.Module) -> Iterator[list[float]]:
    """Seconds that calls of `module` take in this context, one by one."""
    took: list[float] = []
    forward = module.forward

    @functools.wraps(forward)
    def timed(*args, **kwargs):
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            took.append(time.perf_counter() - start)

    module.forward = timed  # type: ignore[method-assign]
    try:
        yield took
    finally:
        del module.forward


def _runners(shape: Shape) -> dict[str, str]:
    """What runs at this size: an edit at every position leaves nothing to keep in a cache."""
    return {name: runner for name, runner in RUNNERS.items() if name != CACHED or not shape.everywhere}


def competitors(task: Task) -> dict[str, Sweep]:
    """Functions that compute all effects once, by name."""
    made = {LOOP: lambda: hook_loop(task), CACHED: lambda: cached_loop(task), OURS: ours.load(task)}
    return {name: made[name] for name in _runners(task.shape)}


def check(task: Task, effects: dict[str, torch.Tensor], sampled: bool) -> dict:
    """Compare the effects; refuse to time what does not agree.

    With `sampled` the float64 loop, which takes twice the loop's time, runs over two heads a layer only.

    Returns:
        The largest effect, each version's largest difference from the plain loop and its errors against float64, all
        but the first in units of the largest effect.

    Raises:
        AssertionError: a version differs from the plain loop by more than rounding, or ours is more than twice as far
            from float64 as the plain loop.
    """
    found = {name: values.double() for name, values in effects.items()}
    truth = hook_loop(task.wide(), {0, task.shape.heads - 1} if sampled else None)
    cells = torch.isfinite(truth)
    largest = found[LOOP].abs().max().item()
    assert largest > 0, "no head has an effect; nothing would be compared"
    differences, errors = {}, {}
    for name, values in found.items():
        assert values.shape == truth.shape, f"{name}: effects {list(values.shape)}, not {list(truth.shape)}"
        differences[name] = (values - found[LOOP]).abs().max().item() / largest
        distance = (values - truth)[cells]
        errors[name] = {
            "max": distance.abs().max().item() / largest,
            "rms": distance.square().mean().sqrt().item() / largest,
        }
        assert differences[name] <= AGREE[task.shape.dtype], (
            f"{name} and the plain loop differ by {differences[name]:.1e} of the largest effect ({largest:.1e})"
        )
    assert errors[OURS]["max"] <= 2 * errors[LOOP]["max"], (
        f"against float64 our error is {errors[OURS]['max']:.1e} of the largest effect, the plain loop's "
        f"{errors[LOOP]['max']:.1e}: more than twice as large"
    )
    return {"largest_effect": largest, "cells": int(cells.sum()), "difference": differences, "float64": errors}


def matrix_products(task: Task) -> tuple[float, Callable[[], None]]:
    """(operations, function that does them): one block's matrix products, with the model's weights and dtype.

    Over as many rows as a forward has or as all heads of one layer have together, whichever is faster.
    """
    shape, block = task.shape, task.model.model.layers[0]
    layers = [module for module in block.modules() if isinstance(module, torch.nn.Linear)]
    forward = shape.batch * shape.columns
    made = []
    for rows in sorted({forward, shape.heads * (forward if shape.everywhere else shape.batch * shape.targets)}):
        inputs = {width: torch.randn(rows, width, dtype=task.model.dtype) for width in (shape.width, shape.mlp)}
        work = rows * sum(2.0 * layer.weight.numel() for layer in layers)

        @torch.no_grad()
        def run(inputs: dict = inputs, calls: int = 1) -> None:
            for _ in range(calls):
                for layer in layers:
                    torch.nn.functional.linear(inputs[layer.in_features], layer.weight)

        run()
        took = min(seconds(run, 1, _CPU) for _ in range(3))
        calls = max(1, math.ceil(0.05 / took))
        made.append((work / took, work * calls, functools.partial(run, calls=calls)))
    _, work, run = max(made, key=lambda entry: entry[0])
    return work, run


def growth(shape: Shape, runner: str, threads: int) -> dict[str, float]:
    """What one sweep adds to the resident set of a fresh process, and that process's peak, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        build(shape).save(Path(folder))
        found, _ = first_run(Entry(runner, "memory", sys.executable, runner), Path(folder), threads)
    return {"growth_mb": found["growth"] / 1e6, "peak_mb": found["peak"] / 1e6}


def summary(row: dict) -> str:
    """One size for the terminal."""
    if "error" in row:
        return f"{row['name']}: FAILED, {row['error']}"
    error = row["agreement"]["float64"]
    lines = [
        f"{row['name']}: the plan's operations allow {row['flop_ratio']:.1f}x; {row['unavoidable_s']:.3f} s at "
        f"{row['gemm_gflop_s']:.0f} GFLOP/s, measured {row['over_unavoidable']:.2f} of that, "
        f"{row['per_variant_ms']:.2f} ms a variant, {row['overhead_ms']:.2f} of it outside the model's forwards"
    ]
    for name, version in row["versions"].items():
        memory = f", +{version['growth_mb']:.0f} MB" if "growth_mb" in version else ""
        lines.append(
            f"  {name}: {version['median_us'] / 1e6:.3f} s, {version['speedup']:.2f}x{memory}, error against float64 "
            f"{error[name]['max']:.1e} (rms {error[name]['rms']:.1e}) of the largest effect"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
