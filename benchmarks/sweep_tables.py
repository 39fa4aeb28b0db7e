"""The figures of sweeps and of other libraries as Markdown, from `sweep-*.json` and `peers-*.json` of the results."""

from __future__ import annotations


def sweep_table(result: dict) -> str:
    """One machine's sweeps."""
    facts = result["machine"]
    rows = [row for row in result["sweeps"] if "error" not in row]
    titles = [
        "edit of every head",
        "bkdfast",
        "hook loop",
        "speedup",
        "the operations allow",
        "over hooks with the prompt in a cache",
        "of the unavoidable time",
        "memory",
        "error",
    ]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        ours, loop = row["versions"]["bkdfast"], row["versions"]["hook loop"]
        cached, error = row["versions"].get("hook loop, prompt cached"), row["agreement"]["float64"]
        cells = [label(row["shape"]), second(ours["median_us"]), second(loop["median_us"]), f"{ours['speedup']:.3g}x"]
        cells += [f"{row['flop_ratio']:.3g}x", f"{ours['speedup'] / cached['speedup']:.3g}x" if cached else ""]
        cells += [f"{row['over_unavoidable']:.3g}x" if row["shape"]["width"] >= 256 else ""]
        cells += [f"{ours['growth_mb']:.0f} MB ({loop['growth_mb']:.0f})" if "growth_mb" in ours else ""]
        cells += [f"{error['bkdfast']['max']:.0e} ({error['hook loop']['max']:.0e})"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", sweep_caption(facts, rows)]
    if failed := len(result["sweeps"]) - len(rows):
        lines[-1] += f" {failed} of {len(result['sweeps'])} sizes failed and are not shown."
    return "\n".join(lines)


def sweep_caption(facts: dict, rows: list[dict]) -> str:
    """What the columns mean, on which machine."""
    text = [
        f"{facts['name']}, torch {facts['torch']}; medians of interleaved rounds, results compared first.",
        "Llama with random weights, 8 layers of 8 heads, d=512, MLP 1,376, vocabulary 1,000; T prompt tokens, B",
        "prompts, 8 target tokens, teacher-forced; every time is that of all heads.",
        "Hook loop: a forward for each head at the same batch, logits only where they are read.",
        "Unavoidable time: the plan's operations at the rate of the model's own matrix products, taken between rounds.",
        "Memory: growth of a fresh process, the hook loop's in brackets.",
        "Error: largest distance from a float64 hook loop in units of the largest effect, the hook loop's in brackets.",
    ]
    for row in rows:
        if row["shape"]["width"] < 256 and not row["shape"]["everywhere"]:
            model = "{layers} x {heads} heads, d={width}".format(**row["shape"])
            text.append(
                f"A model of {model}: {row['per_variant_ms']:.2f} ms a head, {row['overhead_ms']:.2f} ms of it outside "
                "the model's forwards."
            )
    return " ".join(text)


def peer_table(result: dict) -> str:
    """One machine's libraries, size by size."""
    facts, parts = result["machine"], []
    for size in result["peers"]:
        ours = next(row for row in size["rows"] if row["name"] == "bkdfast")
        titles = ["library", "how", "time", "of plain hooks", "bkdfast is faster by", "memory", "effects within"]
        lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        for row in size["rows"]:
            cells = [row["name"], row["how"], second(row["median_us"]), f"{1 / row['speedup']:.2f}"]
            cells += ["" if row is ours else f"{ours['speedup'] / row['speedup']:.3g}x"]
            cells += [f"{row['growth'] / 1e6:.0f} MB", f"{row['difference']:.0e}" if row["difference"] else "identical"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", f"{size['shape']['name']}; medians of {size['rounds']} interleaved rounds."]
        lines += [f"Missing: {name}, {reason}." for name, reason in size["missing"].items()]
        parts.append("\n".join(lines))
    versions = {name: text for row in result["peers"][0]["rows"] for name, text in row["versions"].items()}
    parts.append(
        f"{facts['name']}, torch {versions['torch']}, transformers {versions['transformers']}; every library in an "
        "environment of its own, the same weights and prompts. Effects within: largest distance from those of plain "
        "hooks, in units of the largest effect."
    )
    return "\n\n".join(parts)


def label(shape: dict) -> str:
    """A size in few words."""
    where = "zero, every position" if shape["everywhere"] else "patch, last prompt token"
    small = f"{shape['layers']} x {shape['heads']} heads, d={shape['width']}, " if shape["width"] < 256 else ""
    return f"{where}, {small}T={shape['tokens']}, B={shape['batch']}, {shape['dtype']}"


def second(microseconds: float) -> str:
    """Three digits and a unit."""
    return f"{microseconds / 1e6:.3g} s" if microseconds >= 1e6 else f"{microseconds / 1e3:.3g} ms"
