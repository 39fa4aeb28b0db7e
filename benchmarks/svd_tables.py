"""The figures of `benchmarks.svd` and `benchmarks.svd_disk` as Markdown, for `benchmarks.tables`."""

from __future__ import annotations

OURS, FULL = "bkdfast", "torch.linalg.svd"


def svd_table(result: dict) -> str:
    """One machine's figures: a row for each delta and method."""
    facts, rows = result["machine"], result["deltas"]
    lines = [
        "| delta | method | time | bkdfast is faster by | CPU time | true angle | certified |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for name, version in row["versions"].items():
            ours = name == OURS
            cells = [row["name"] * ours, name + f", {row['passes']} passes" * ours, time(version["median_us"])]
            cells += ["" if ours else f"{1 / version['speedup']:.3g}x", f"{version['cpu_s']:.2g} s"]
            cells += [f"{version['angle']:.0e}", f"{row['bound']:.0e}" if ours else ""]
            lines.append(f"| {' | '.join(cells)} |")
    full = [row["versions"][FULL]["cpu_s"] / row["versions"][OURS]["cpu_s"] for row in rows if FULL in row["versions"]]
    passes = "; ".join(
        f"{row['shape']['m']}x{row['shape']['n']} and {row['pass']['width']} columns {time(row['pass']['median_us'])}, "
        f"{row['pass']['of_gemm']:.0%} and {row['pass']['of_copy']:.0%}"
        for row in rows
        if row["shape"]["spectrum"] == "geometric"
    )
    threads = [row["two_threads"] for row in rows]
    lines += [
        "",
        f"{facts['name']}, {facts['isa']}, torch {facts['torch']}; medians of {rows[0]['rounds']} interleaved rounds; "
        "bfloat16 pairs, forming the delta included. Geometric: k singular values fall off tenfold. True angle: the "
        "largest sine between a computed vector and the span of the k true ones, which come from an eigendecomposition "
        "in float64. Certified: the bound that bkdfast reports with its result; the others report none. "
        + (f"A full SVD takes {min(full):,.0f} to {max(full):,.0f} times our CPU time; " if full else "")
        + "mergekit's LoRA extraction computes one for every weight. One pass, in shares of the float32 matrix "
        f"product's rate ({result['ceilings']['gemm_gflop_s']:.0f} GFLOP/s) and of the copy bandwidth "
        f"({result['ceilings']['copy_gb_s']:.0f} GB/s): {passes}. Two threads are {min(threads):.2f} to "
        f"{max(threads):.2f} times as fast as one.",
    ]
    return "\n".join(lines)


def disk_table(result: dict) -> str:
    """One machine's figures from disk: a row for each stage, cold and warm."""
    facts = result["machine"]
    lines = [
        "| from files to | cold | of reading alone | warm | of reading alone |",
        "|---|---|---|---|---|",
    ]
    for name, cold in result["cold"].items():
        warm = result["warm"][name]
        cells = [f"{one['gb_s']:.2f} GB/s, {one['seconds']:.2f} s | {one['of_reading']:.0%}" for one in (cold, warm)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{facts['cpu']}, {facts['cores']} cores, torch {facts['torch']}; two checkpoints of "
        f"{result['bytes'] / 2e9:.1f} GB each, k = {result['rank']}, {result['passes']:.1f} passes on average; medians "
        f"of {result['rounds']} interleaved rounds. Cold: the page cache is dropped before every run.",
    ]
    return "\n".join(lines)


def time(microseconds: float) -> str:
    """Three digits and a unit."""
    value = microseconds / 1e3
    return f"{value / 1e3:.3g} s" if value >= 1e3 else f"{value:.3g} ms"
