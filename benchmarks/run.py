"""Time every op next to plain PyTorch: `python -m benchmarks.run` (or `make bench`).

The versions of a case take turns, round after round, so that a slow moment of the machine meets all of them; a ratio is
the median over rounds of the ratio within a round. Before anything is timed the outputs are compared. Two ceilings are
measured first, copy bandwidth and the matrix product's rate; a case's floor is the larger of the times in which they
allow its bytes and its operations.

On a GPU a version is timed twice: call by call, which on small tensors is the time to issue it, and as replays of a
CUDA graph of many calls, which is the time its kernels take. What cannot be captured, because it waits for the GPU,
has only the first.

The file is written after every case. A case that fails is a row with its error; the run goes on, and its exit status
is 1. Writes `benchmarks/results/<machine>.json`; `python -m benchmarks.tables` puts the results into README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.case import Case
from benchmarks.cases import all_cases
from benchmarks.overhead import overheads
from bkdfast import __version__
from bkdfast.ops._library import EXTENSION

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_SAMPLE = 0.01  # seconds that one sample of one version lasts at least
_CAPTURED = 20  # calls in one CUDA graph
_L2_BYTES = 50e6  # of a large GPU: a case that moves less finds its data there


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--rounds", type=int, default=15, help="times every version gets its turn (default: %(default)s)"
    )
    parser.add_argument("--ops", nargs="*", help="only these files of benchmarks/cases")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<machine>.json)")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if EXTENSION.reason is not None:
        sys.exit(f"nothing compiled to measure: {EXTENSION.reason}")

    facts = machine(device)
    limits = ceilings(device)
    print(f"{facts['name']}: copy {limits['copy_gb_s']:.0f} GB/s, matrix product {limits['gemm_gflop_s']:.0f} GFLOP/s")
    overhead = overheads(device)
    print("call overhead: " + ", ".join(f"{op} {took:.1f} us" for op, took in overhead.items()))
    out = options.out or RESULTS / f"{slug(facts['name'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    result = {"machine": facts, "ceilings": limits, "rounds": options.rounds, "overhead_us": overhead, "cases": rows}
    for case in tqdm(all_cases(device, set(options.ops) if options.ops else None), desc="cases", unit="case"):
        try:
            case.check()
            rows.append(measure(case, device, options.rounds, limits))
        except Exception as error:  # the other cases are still worth having
            rows.append({"op": case.op, "name": case.name, "error": f"{type(error).__name__}: {error}"})
        tqdm.write(summary(rows[-1]))
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {out}")
    if failed := sum("error" in row for row in rows):
        sys.exit(f"{failed} of {len(rows)} cases failed")


def measure(case: Case, device: torch.device, rounds: int, limits: dict[str, float]) -> dict:
    """Times of all versions of one case, and what they say."""
    versions = case.versions
    calls = {name: calls_for(version, device) for name, version in versions.items()}
    graphs = {name: graph for name, version in versions.items() if (graph := captured(version, device))}
    replays = {name: calls_for(graph, device) for name, graph in graphs.items()}
    samples: dict[str, list[float]] = {name: [] for name in versions}
    replayed: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, version in versions.items():
            samples[name].append(seconds(version, calls[name], device))
        for name, graph in graphs.items():
            replayed[name].append(seconds(graph, replays[name], device) / _CAPTURED)
    floor = max(case.bytes / (limits["copy_gb_s"] * 1e9), case.flops / (limits["gemm_gflop_s"] * 1e9))
    best, figures = compare(samples, list(case.plain))
    row: dict = {
        "op": case.op,
        "name": case.name,
        "goal": case.goal,
        "rival": case.rival,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor_us": floor * 1e6,
        "from_l2": device.type == "cuda" and case.bytes < _L2_BYTES,
        "best_plain": best,
        "versions": {name: {"ours": name in case.ours, **figure} for name, figure in figures.items()},
    }
    if device.type == "cuda":
        row["best_plain_graph"], figures = compare(replayed, [name for name in case.plain if name in graphs])
        for name, figure in figures.items():
            row["versions"][name] |= {
                "graph_us": figure["median_us"],
                "graph_spread": figure["spread"],
                "graph_speedup": figure["speedup"],
            }
    return row


def compare(samples: dict[str, list[float]], plain: list[str]) -> tuple[str | None, dict[str, dict]]:
    """The fastest of `plain` (None: there is none), and every version's median, spread and speedup over it."""
    median = {name: statistics.median(values) for name, values in samples.items()}
    best = min(plain, key=median.__getitem__, default=None)
    return best, {
        name: {
            "median_us": median[name] * 1e6,
            "spread": spread(values),
            "speedup": best and statistics.median(p / v for p, v in zip(samples[best], values, strict=True)),
        }
        for name, values in samples.items()
    }


def captured(function: Callable[[], object], device: torch.device) -> Callable[[], object] | None:
    """Replays a CUDA graph of `_CAPTURED` calls; None where there is none. `function` has run before."""
    if device.type == "cpu":
        return None
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    try:
        # A wait for the GPU is found before the capture: one that fails leaves the random generator capturing.
        torch.cuda.set_sync_debug_mode("error")
        with torch.cuda.stream(side):
            function()
            function()
        here.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CAPTURED):
                function()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_stream(here)  # a failed capture leaves its own
    return graph.replay


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, in units of the median; 0 of one value."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / (2 * middle)


def seconds(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Time of one call, over `calls` of them."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def calls_for(function: Callable[[], object], device: torch.device) -> int:
    """How many calls make a sample long enough; warms up."""
    for _ in range(3):
        function()
    return max(1, round(_SAMPLE / max(seconds(function, 3, device), 1e-7)))


def ceilings(device: torch.device) -> dict[str, float]:
    """Copy bandwidth (reads and writes counted) and rate of a square float32 matrix product, on random data."""
    size = (1 << 26) if device.type == "cpu" else (1 << 28)  # several times the last cache
    source, target = torch.randn(size, device=device), torch.empty(size, device=device).fill_(1.0)
    side = 2048 if device.type == "cpu" else 8192
    a, b = torch.randn(side, side, device=device), torch.randn(side, side, device=device)
    found = {}
    for name, work, run in (
        ("copy_gb_s", 2.0 * 4 * size, lambda: target.copy_(source)),
        ("gemm_gflop_s", 2.0 * side**3, lambda: torch.mm(a, b)),
    ):
        run()
        found[name] = work / statistics.median(seconds(run, 1, device) for _ in range(9)) / 1e9
    if device.type == "cuda":
        half, other = a.bfloat16(), b.bfloat16()
        torch.mm(half, other)
        took = statistics.median(seconds(lambda: torch.mm(half, other), 3, device) for _ in range(9))
        found["bf16_gemm_gflop_s"] = 2.0 * side**3 / took / 1e9
    return found


def machine(device: torch.device) -> dict:
    """What a figure depends on."""
    facts = {
        "cpu": cpu_name(),
        "isa": EXTENSION.cpu_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bkdfast": __version__,
        "commit": commit(),
    }
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        facts |= {"gpu": properties.name, "driver": driver, "cuda": torch.version.cuda}
        facts |= {"triton": triton.__version__, "name": properties.name}
    else:
        facts["name"] = f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return facts


def commit() -> str:
    """The commit of the sources, with a + where they differ from it; "unknown" outside a repository."""
    changed = output("git", "status", "--porcelain", "--", "*.py", "csrc")
    return (output("git", "rev-parse", "--short", "HEAD") or "unknown") + ("+" if changed else "")


def output(*command: str) -> str:
    """What a program prints; nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    """Name of the processor."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found.group(1).strip() if found else platform.processor()


def slug(name: str) -> str:
    """A file name for a machine."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def shown(row: dict, name: str) -> tuple[float, float, float, str]:
    """Time in microseconds, speedup, and the plain version it is over with its time: of graphs where both have one."""
    version, plain = row["versions"][name], row["best_plain"]
    if version.get("graph_speedup"):
        plain = row["best_plain_graph"]
        return version["graph_us"], version["graph_speedup"], row["versions"][plain]["graph_us"], plain
    return version["median_us"], version["speedup"], row["versions"][plain]["median_us"], plain


def summary(row: dict) -> str:
    """One line for the terminal."""
    if "error" in row:
        return f"{row['op']} {row['name']}: FAILED, {row['error']}"
    parts = []
    for name, version in row["versions"].items():
        if version["ours"]:
            took, speedup, beside, plain = shown(row, name)
            issued = f" (call by call {version['median_us']:.1f} us)" if "graph_us" in version else ""
            part = f"{name} {took:.1f} us{issued}, {speedup:.2f}x, {row['floor_us'] / took:.0%} of the floor"
            parts.append(f"{part}, {plain} {beside:.1f} us")
    return f"{row['op']} {row['name']}: " + "; ".join(parts)


if __name__ == "__main__":
    with torch.no_grad():
        main()
