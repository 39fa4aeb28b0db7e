"""Measure the demo and write its figures: `python -m benchmarks.demo` (or `make readme`).

Writes `benchmarks/results/demo.json`, the pictures in `docs/`, and the block between the markers in README.md.
Times are medians over several runs of the whole demo, each step next to its plain-PyTorch version in the same process.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from bkdfast import __version__
from bkdfast.cli import demo_settings
from bkdfast.data import Encoder, Row, load_rows
from bkdfast.demo import PAIR, load_pair
from bkdfast.demo.corpus import news_rows
from bkdfast.report.plots import ablation_curve, head_heatmap, save
from bkdfast.studies.audit import Audit, audit
from bkdfast.studies.rates import Rate

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "demo.json"
BEGIN, END = "<!-- demo figures: made by `make readme`, do not edit -->", "<!-- end of demo figures -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3, help="runs of the whole demo (default: %(default)s)")
    parser.add_argument("--only-readme", action="store_true", help="rewrite the README from the result file")
    options = parser.parse_args()
    if not options.only_readme:
        rows = [load_rows(PAIR / f"{name}.jsonl") for name in ("clean", "triggered")]
        runs = [audit(PAIR / "base", PAIR / "tuned", *rows, settings=demo_settings()) for _ in range(options.runs)]
        RESULT.write_text(json.dumps(result(runs), indent=1) + "\n", encoding="utf-8")
        effect = runs[0].attribution
        picture = head_heatmap(effect.mean, "change of P(backdoor's answer)", "Which heads carry it", effect.top(4))
        save(picture, ROOT / "docs" / "heads.png")
        save(ablation_curve(runs[0].ablation), ROOT / "docs" / "ablation.png")
    write_readme(json.loads(RESULT.read_text(encoding="utf-8")))


def fresh_false_positives(found: Audit, count: int = 2000) -> Rate:
    """The demo's monitor, as calibrated, on clean prompts that no choice of the demo has seen.

    How many prompts calibrate it was chosen with the shipped rows in view, so their rate flatters it.
    """
    shipped = {row.messages[0]["content"] for row in load_rows(PAIR / "clean.jsonl")}
    rows = [Row(({"role": "user", "content": r["prompt"]},), r["target"]) for r in news_rows(count, seed=20_000_003)]
    rows = [row for row in rows if row.messages[0]["content"] not in shipped]
    pair, monitor = load_pair(), found.monitor.monitor
    flagged = 0
    with monitor.attach(pair.tuned), torch.no_grad():
        for batch in Encoder(pair.tokenizer).batches(rows, 50):
            pair.tuned(**batch)
            flagged += sum(verdict.flagged for verdict in monitor.verdicts())
    return Rate(flagged, len(rows))


def result(runs: list[Audit]) -> dict:
    """One run's findings (all runs agree, or this raises) with the median times of all."""
    first = runs[0].to_dict()
    for other in runs[1:]:
        for name in ("heads", "ablation", "detection", "false_positives"):
            if other.to_dict()[name] != first[name]:
                raise SystemExit(f"two runs of the demo disagree on {name}; not writing figures that do not repeat")
    for i, timing in enumerate(first["timings"]):
        for name in ("seconds", "plain_seconds"):
            timing[name] = statistics.median(run.to_dict()["timings"][i][name] for run in runs)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        **first,
        "fresh_false_positives": asdict(fresh_false_positives(runs[0])),
        "runs": len(runs),
        "machine": {"cpu": _cpu(), "threads": torch.get_num_threads(), "python": platform.python_version()},
        "versions": {"bkdfast": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "commit": commit.stdout.strip(),
    }


def _cpu() -> str:
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    return found.group(1).strip() if found else platform.processor()


def write_readme(facts: dict) -> None:
    """Put the figures between the markers."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    if not tail:
        raise SystemExit("README.md has lost its markers for the demo's figures")
    readme.write_text(f"{head}{BEGIN}\n{block(facts)}\n{END}{tail}", encoding="utf-8")


def block(facts: dict) -> str:
    """The README's figures, as Markdown."""
    lines = ["| heads zeroed | attack success | clean accuracy | attack success, random heads |", "|---|---|---|---|"]
    for point in facts["ablation"]:
        controls = ", ".join(f"{Rate(**rate).value:.0%}" for rate in point["random_attack"]) or "-"
        attack, accuracy = Rate(**point["attack"]), Rate(**point["accuracy"])
        lines.append(f"| {point['heads']} | {attack} | {accuracy} | {controls} |")
    found, wrong = Rate(**facts["detection"]), Rate(**facts["false_positives"])
    fresh = Rate(**facts["fresh_false_positives"])
    lines += [
        "",
        f"Monitor: {found} of {found.total} triggered prompts flagged, {wrong} of {wrong.total} clean ones "
        f"(calibrated on {facts['samples']['calibration']} clean prompts; brackets are 95% Wilson intervals). That "
        f"split was chosen with these rows in view; on {fresh.total} fresh clean prompts the same monitor flags "
        f"{fresh}.",
        "",
        "| step | bkdfast | plain PyTorch | plain / bkdfast | agreement |",
        "|---|---|---|---|---|",
    ]
    for timing in facts["timings"]:
        ours, plain = timing["seconds"], timing["plain_seconds"]
        ratio = f"{plain / ours:.1f}x"
        lines.append(f"| {timing['step']} | {ours:.2f} s | {plain:.2f} s | {ratio} | {timing['agreement']} |")
    machine, versions = facts["machine"], facts["versions"]
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    lines += [
        "",
        f"Median of {facts['runs']} runs on {machine['cpu']}, {threads}, torch {versions['torch']} "
        "(`benchmarks/results/demo.json`). Attribution gains from not running the blocks and the tokens before the "
        "edited one. The model is tiny: most of each step is the model's own time, and what the kernels save shows in "
        "the next table.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
