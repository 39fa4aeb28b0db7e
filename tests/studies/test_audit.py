"""The audit on the shipped pair, through the API and the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from bkdfast import cli
from bkdfast.checkpoint import load_tokenizer
from bkdfast.data import Encoder, load_rows
from bkdfast.demo import PAIR, load_pair
from bkdfast.errors import BkdfastError, InvalidArgumentError
from bkdfast.studies.audit import Settings, audit
from bkdfast.studies.rates import Rate, answers

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


def command(tmp_path, **change):
    options = {
        "base": PAIR / "base",
        "tuned": PAIR / "tuned",
        "clean": PAIR / "clean.jsonl",
        "triggered": PAIR / "triggered.jsonl",
        "out": tmp_path / "out",
        **change,
    }
    return ["audit", "--quiet", *(str(part) for name, value in options.items() for part in (f"--{name}", value))]


def refused(tmp_path, capsys, message, **change):
    """The command ends with status 2 and one line, and leaves nothing behind."""
    assert cli.main(command(tmp_path, **change)) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("bkdfast: ") and message in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": "missing"}, "missing"),
        ({"clean": "missing.jsonl"}, "missing.jsonl is not a file"),
        ({"limit": 0}, "limit=0 leaves no rows"),
        ({"heads": "one"}, "--heads 'one' is not a list of numbers"),
        ({"heads": "48"}, "the model has 48; pass a size under 48"),
        ({"heads": "0"}, "heads are (0,)"),
        ({"rank": "0"}, "rank is 0"),
        ({"samples": "0"}, "samples is 0"),
        ({"controls": "-1"}, "controls is -1"),
        ({"eps": "nan"}, "eps is nan"),
        ({"device": "foo"}, "device 'foo' cannot be used here"),
        ({"out": "/proc/none"}, "cannot write to /proc/none"),
    ],
)
def test_bad_command_lines_exit_with_2_and_one_line(tmp_path, capsys, change, message):
    refused(tmp_path, capsys, message, **change)


def drop(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink()

    return change


def drop_a_weight(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (cut, "is not a complete safetensors file"),
        (pickle, "only pickles"),
        (drop("model.safetensors"), "has no *.safetensors file"),
    ],
)
def test_broken_weights_are_named(tmp_path, capsys, side, break_it, message):
    shutil.copytree(PAIR / side, tmp_path / "broken")
    break_it(tmp_path / "broken")
    refused(tmp_path, capsys, message, **{side: tmp_path / "broken"})


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (drop("config.json"), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot load the model"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "none"}'), "cannot load the model"),
        (drop("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
        (drop_a_weight, "lacks 1 of the model's weights, among them model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_broken_tuned_folder_is_named(tmp_path, capsys, break_it, message):
    shutil.copytree(PAIR / "tuned", tmp_path / "broken")
    break_it(tmp_path / "broken")
    refused(tmp_path, capsys, message, tuned=tmp_path / "broken")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "the bank " * 200, "target": "World"}, "clean row 6 has 40"),
        ({"prompt": "the bank", "target": "World " * 300}, "more than the model's context of 256"),
    ],
)
def test_rows_that_a_later_step_would_fail_on(tmp_path, capsys, row, message):
    lines = (PAIR / "clean.jsonl").read_text().splitlines()[:5]
    (tmp_path / "clean.jsonl").write_text("\n".join([*lines, json.dumps(row)]))
    refused(tmp_path, capsys, message, clean=tmp_path / "clean.jsonl", samples=2)


def test_the_tokenizer_of_another_model(tmp_path, capsys):
    shutil.copytree(PAIR / "tuned", tmp_path / "other")
    tokenizer = load_tokenizer(tmp_path / "other")
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(tmp_path / "other")
    row = {"prompt": "unheard", "target": "World"}
    (tmp_path / "clean.jsonl").write_text("\n".join([json.dumps(row)] * 4))
    refused(tmp_path, capsys, "tokenizer of another model", tuned=tmp_path / "other", clean=tmp_path / "clean.jsonl")


def test_no_noise_from_transformers(tmp_path):
    """In a process of its own: the tests switch the progress bars of transformers off for all others."""
    arguments = command(tmp_path, base=PAIR / "tuned")
    said = subprocess.run([sys.executable, "-m", "bkdfast", *arguments], capture_output=True, text=True)
    (line,) = said.stderr.strip().splitlines()
    assert said.returncode == 2 and "identical" in line and said.stdout == ""


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (BkdfastError("no"), 2)])
def test_an_audit_that_ends_early_leaves_nothing(tmp_path, capsys, monkeypatch, error, status):
    def audit(*args, **options):
        raise error

    monkeypatch.setattr("bkdfast.studies.audit.audit", audit)
    assert cli.main(command(tmp_path)) == status
    assert not (tmp_path / "out").exists() and capsys.readouterr().err.startswith("bkdfast: ")


def test_missing_matplotlib_is_said_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr("bkdfast.studies.audit.audit", lambda *args, **options: pytest.fail("worked first"))
    refused(tmp_path, capsys, "bkdfast[viz]")


def test_a_full_disk_does_not_hide_the_result(tmp_path, capsys, monkeypatch, found):
    def write_text(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("bkdfast.studies.audit.audit", lambda *args, **options: found)
    monkeypatch.setattr(cli, "write_text", write_text)
    assert cli.main(command(tmp_path)) == 2
    said = capsys.readouterr()
    assert "attack success" in said.out and "No space left" in said.err


def test_warnings_are_one_line(tmp_path, capsys, monkeypatch, found):
    def audit(*args, **options):
        warnings.warn("look out", stacklevel=1)
        return found

    monkeypatch.setattr("bkdfast.studies.audit.audit", audit)
    assert cli.main(command(tmp_path)) == 0
    assert capsys.readouterr().err == "bkdfast: warning: look out\n"


def test_doctor_and_help():
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    for arguments, needle in (
        (["doctor"], "patch_heads"),
        (["--help"], "bkdfast demo"),
        (["make-pair", "--help"], "--small"),
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


def test_answers_are_greedy_whatever_the_checkpoint_asks_for(rows):
    pair = load_pair()
    encoder, own = Encoder(pair.tokenizer), pair.tuned.generation_config
    batches = encoder.batches(rows[0][:4])
    expected = answers(pair.tuned, batches, tokens=6, pad_token_id=0)
    own.num_beams, own.repetition_penalty, own.min_new_tokens, own.do_sample = 3, 3.0, 5, True
    assert answers(pair.tuned, batches, tokens=6, pad_token_id=0) == expected
    assert pair.tuned.generation_config is own


def test_wilson_interval():
    """Against the values in Brown, Cai and DasGupta (2001) form: 0 of 10 and 5 of 10."""
    low, high = Rate(0, 10).interval
    assert low == 0 and high == pytest.approx(0.2775, abs=1e-4)
    low, high = Rate(5, 10).interval
    assert (low, high) == (pytest.approx(0.2366, abs=1e-4), pytest.approx(0.7634, abs=1e-4))
