"""Put the op figures into README.md: `python -m benchmarks.tables`, from `benchmarks/results/*.json`."""

from __future__ import annotations

import argparse
import json

from benchmarks.run import RESULTS, ROOT

BEGIN, END = "<!-- op figures: made by `make bench`, do not edit -->", "<!-- end of op figures -->"


def main() -> None:
    """Command line."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    text = "\n\n".join(table(result) for result in results if "cases" in result)
    readme = ROOT / "README.md"
    head, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise SystemExit("README.md has lost its markers for the op figures")
    readme.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}", encoding="utf-8")


def table(result: dict) -> str:
    """One machine's figures as Markdown."""
    facts, limits = result["machine"], result["ceilings"]
    lines = ["| op | case | bkdfast | best plain PyTorch | speedup | of the floor |", "|---|---|---|---|---|---|"]
    for case in result["cases"]:
        plain = case["versions"][case["best_plain"]]
        for name, version in case["versions"].items():
            if version["ours"]:
                lines.append(
                    f"| `{case['op']}` | {case['name']} | {duration(version['median_us'])} ({name}) "
                    f"| {duration(plain['median_us'])} ({case['best_plain']}) "
                    f"| {version['speedup']:.3g}x | {case['floor_us'] / version['median_us']:.0%} |"
                )
    units = facts.get("driver") and f"driver {facts['driver']}, " or f"{facts['isa']}, "
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
    return "\n".join(lines)


def duration(microseconds: float) -> str:
    """Three digits and a unit."""
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


if __name__ == "__main__":
    main()
