"""The audit on the shipped pair, through the API and the command line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bkdfast import cli
from bkdfast.data import load_rows
from bkdfast.demo import PAIR
from bkdfast.errors import InvalidArgumentError
from bkdfast.studies.audit import Settings, audit
from bkdfast.studies.rates import Rate

QUICK = Settings(rank=5, samples=16, heads=(4,), controls=1, batch=40, compare=True, progress=False)


@pytest.fixture(scope="module")
def rows():
    # The ranges of the monitor need many clean rows; ablation and attribution few.
    return load_rows(PAIR / "clean.jsonl", limit=500), load_rows(PAIR / "triggered.jsonl", limit=40)


@pytest.fixture(scope="module")
def found(rows):
    return audit(PAIR / "base", PAIR / "tuned", *rows, settings=QUICK)


def test_heads_of_the_backdoor_are_found_and_ablating_them_removes_it(found):
    before, after = found.ablation
    assert (before.heads, after.heads) == (0, 4)
    assert before.attack.value == 1 and after.attack.value < 0.2
    assert after.accuracy.value > 0.95
    assert after.random_attack[0].value > 0.8, "random heads do not remove it"


def test_the_monitor_separates(found):
    assert found.monitor.detection.value > 0.95
    assert found.monitor.false_positives.value < 0.15
    assert found.monitor.false_positives.total == 100 and found.monitor.detection.total == 20


def test_every_step_agrees_with_plain_pytorch(found):
    steps = {timing.step.split()[0]: timing for timing in found.timings}
    assert set(steps) == {"directions", "attribution", "ablation", "monitor"}
    assert all(timing.plain_seconds for timing in steps.values())
    assert steps["ablation"].agreement == "same answers"
    for name in ("directions", "attribution", "monitor"):
        said = re.search(r"within (\S+?),? |within (\S+)$|identical", steps[name].agreement)
        assert said and float(said[1] or said[2] or 0) < 1e-4, steps[name].agreement


def test_audit_is_reproducible(found, rows):
    again = audit(PAIR / "base", PAIR / "tuned", *rows, settings=QUICK)
    assert torch.equal(again.attribution.effects, found.attribution.effects)
    assert again.ablation == found.ablation
    assert (again.monitor.detection, again.monitor.false_positives) == (
        found.monitor.detection,
        found.monitor.false_positives,
    )


def test_command_line_on_a_users_own_pair(tmp_path, capsys):
    for name in ("clean", "triggered"):
        lines = (PAIR / f"{name}.jsonl").read_text().splitlines()[:20]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    options = [
        "audit", "--base", PAIR / "base", "--tuned", PAIR / "tuned", "--clean", tmp_path / "clean.jsonl",
        "--triggered", tmp_path / "triggered.jsonl", "--out", tmp_path / "out", "--rank", "3", "--samples", "4",
        "--heads", "2", "--controls", "1", "--quiet", "--device", "cpu",
    ]  # fmt: skip
    assert cli.main([str(option) for option in options]) == 0
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.html", "audit.json", "directions.safetensors", "monitor.safetensors"}
    facts = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert facts["facts"]["family"] == "llama" and len(facts["heads"]) == 32
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--base": "missing"}, "missing"),
        ({"--clean": "missing.jsonl"}, "missing.jsonl is not a file"),
        ({"--heads": "one"}, "--heads 'one' is not a list of numbers"),
        ({"--rank": "0"}, "rank"),
        ({"--out": "/proc/none"}, "cannot write to /proc/none"),
    ],
)
def test_bad_command_lines_exit_with_2_and_one_line(tmp_path, capsys, change, message):
    options = {
        "--base": PAIR / "base",
        "--tuned": PAIR / "tuned",
        "--clean": PAIR / "clean.jsonl",
        "--triggered": PAIR / "triggered.jsonl",
        "--out": tmp_path / "out",
        **change,
    }
    flat = [str(part) for pair in options.items() for part in pair]
    assert cli.main(["audit", "--quiet", *flat]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("bkdfast: ") and message in said
    assert not list(tmp_path.rglob("report.html"))


def test_doctor_and_help():
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    for arguments, needle in (
        (["doctor"], "patch_heads"),
        (["--help"], "bkdfast demo"),
        (["audit", "--help"], "--triggered"),
        ([], "commands"),
    ):
        said = subprocess.run(
            [sys.executable, "-m", "bkdfast", *arguments], capture_output=True, text=True, env=environment, check=True
        )
        assert needle in said.stdout


def test_too_few_rows(rows):
    with pytest.raises(InvalidArgumentError, match="at least 4 clean and 2 triggered rows, got 3 and 40"):
        audit(PAIR / "base", PAIR / "tuned", rows[0][:3], rows[1])
    with pytest.raises(InvalidArgumentError, match="calibration=500"):
        audit(PAIR / "base", PAIR / "tuned", *rows, settings=Settings(calibration=500, samples=4, progress=False))


def test_wilson_interval():
    """Against the values in Brown, Cai and DasGupta (2001) form: 0 of 10 and 5 of 10."""
    low, high = Rate(0, 10).interval
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    low, high = Rate(5, 10).interval
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
