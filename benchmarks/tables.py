"""Put the figures into README.md: `python -m benchmarks.tables`, from `benchmarks/results/*.json`."""

from __future__ import annotations

import argparse
import json

from benchmarks.run import RESULTS, ROOT, shown
from benchmarks.svd_tables import disk_table, svd_table
from benchmarks.sweep_tables import peer_table, sweep_table


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for key, what, target, render in (
        ("cases", "op", "bench", table),
        ("sweeps", "sweep", "bench-sweep", sweep_table),
        ("peers", "peer", "bench-peers", peer_table),
        ("deltas", "delta", "bench-svd", svd_table),
        ("cold", "disk", "bench-svd", disk_table),
    ):
        tables = [render(result) for result in results if key in result]
        if tables:
            text = placed(text, what, target, "\n\n".join(tables))
    readme.write_text(text, encoding="utf-8")


def placed(readme: str, what: str, target: str, text: str) -> str:
    """The README with `text` between the markers of these figures."""
    begin, end = f"<!-- {what} figures: made by `make {target}`, do not edit -->", f"<!-- end of {what} figures -->"
    head, _, rest = readme.partition(begin)
    _, _, tail = rest.partition(end)
    if not tail:
        raise SystemExit(f"README.md has lost its markers for the {what} figures: {begin} and {end}")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def table(result: dict) -> str:
    """One machine's figures as Markdown."""
    facts, limits = result["machine"], result["ceilings"]
    cases = [case for case in result["cases"] if "error" not in case]
    failed, gpu = len(result["cases"]) - len(cases), "gpu" in facts
    titles = [
        "op",
        "case",
        "bkdfast",
        *["call by call"] * gpu,
        "best plain PyTorch",
        "speedup",
        "speedup over what people write",
        "of the floor",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for case in cases:
        for name, version in case["versions"].items():
            if not version["ours"]:
                continue
            took, speedup, beside, plain = shown(case, name)
            cells = [f"`{case['op']}`", case["name"] + ", from L2" * case.get("from_l2", False)]
            cells += [f"{duration(took)} ({name})", *[duration(version["median_us"])] * gpu]
            cells += [f"{duration(beside)} ({plain})", f"{speedup:.3g}x", rival(case, took)]
            cells += [f"{case['floor_us'] / took:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    units = f"driver {facts['driver']}, " if gpu else f"{facts['isa']}, "
    lines += [
        "",
        f"{facts['name']}, {units}torch {facts['torch']}; medians of {result['rounds']} interleaved rounds. Floor: the "
        f"larger of bytes over the measured copy bandwidth ({limits['copy_gb_s']:.0f} GB/s) and operations over the "
        f"measured float32 matrix product ({limits['gemm_gflop_s']:.0f} GFLOP/s). Over 100% where the data stay in "
        "a cache, or where our kernel computes faster than that matrix product does. A call on a tiny tensor, through "
        "the public Python function: "
        + ", ".join(f"`{op}` {took:.1f} us" for op, took in result["overhead_us"].items())
        + ".",
    ]
    if gpu:
        lines[-1] += (
            ' Times are of kernels, from replays of a CUDA graph of 20 calls; in "call by call" the host issues each '
            'one, and a version that cannot be captured has only that. "From L2": the case moves less than the cache '
            f"holds. The bfloat16 matrix product reaches {limits['bf16_gemm_gflop_s']:.0f} GFLOP/s."
        )
    if failed:
        lines[-1] += f" {failed} of {len(result['cases'])} cases failed and are not shown."
    return "\n".join(lines)


def rival(case: dict, took: float) -> str:
    """Speedup over the version that people write, where it is not the fastest one."""
    name = case.get("rival")
    if name is None or name == case["best_plain"]:
        return ""
    ratio = case["versions"][name]["median_us"] / took
    return f"{ratio:,.0f}x ({name})" if ratio >= 1000 else f"{ratio:.3g}x ({name})"


def duration(microseconds: float) -> str:
    """Three digits and a unit."""
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


if __name__ == "__main__":
    main()
