"""`bkdfast svd` on the demo pair: what it writes is what the library computes."""

from __future__ import annotations

import csv
import re
import shutil

import pytest
import torch

import bkdfast as bf
from bkdfast import cli
from bkdfast.demo import PAIR
from bkdfast.svd.overlap import overlaps

BASE, TUNED = PAIR / "base", PAIR / "tuned"
FILES = {
    "delta_svd.safetensors", "tensors.csv", "overlap.csv", "report.html", "spectra.png", "layers.png", "overlap.png",
}  # fmt: skip


def svd(out, *options, base=BASE, tuned=TUNED):
    """Run the command; returns its status."""
    return cli.main(["svd", str(base), str(tuned), "--quiet", "--out", str(out), *map(str, options)])


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_what_is_written_is_what_the_library_computes(tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert svd(out, "--rank", 6, "--seed", 3, "--tolerance", 1e-3) == 0
    said = capsys.readouterr().out
    expected = bf.delta_svd(BASE, TUNED, rank=6, seed=3, tolerance=1e-3, progress=False)
    assert FILES <= {path.name for path in out.iterdir()}
    found = bf.DeltaSVD.load(out / "delta_svd.safetensors")
    assert set(found) == set(expected) and len(found) == 43 and found.metadata == expected.metadata
    for name, delta in expected.items():
        assert torch.equal(found[name].u, delta.u) and torch.equal(found[name].s, delta.s)
    rows = table(out / "tensors.csv")
    assert {row["name"]: float(row["frobenius"]) for row in rows} == {n: d.frobenius for n, d in expected.items()}
    pairs = overlaps(expected, "llama")
    assert [float(row["overlap"]) for row in table(out / "overlap.csv")] == [
        pytest.approx(pair.overlap) for pair in pairs
    ]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in expected) and page.count("<img ") == 3 and "model type llama" in page
    top = max(expected.values(), key=lambda delta: delta.frobenius)
    assert top.name in said.splitlines()[0] and said.splitlines()[3].split()[:2] == [top.name, f"{top.frobenius:#.4g}"]
    assert "report.html" in said.splitlines()[-1]


@pytest.mark.parametrize("rule", [{"energy": 0.8, "max_rank": 12}, {"tol": 0.3}])
def test_each_tensor_gets_what_the_rule_asks_for(rule, tmp_path, capsys):
    options = [word for name, value in rule.items() for word in ("--" + name.replace("_", "-"), value)]
    pattern = "*.self_attn.o_proj.weight"
    assert svd(tmp_path, *options, "--include", pattern) == 0
    expected = bf.delta_svd(BASE, TUNED, include=pattern, progress=False, **rule)
    ranks = {row["name"]: int(row["rank"]) for row in table(tmp_path / "tensors.csv")}
    assert ranks == {name: delta.rank for name, delta in expected.items()} and len(set(ranks.values())) > 1
    told = ", ".join(f"{name}={value}" for name, value in ({"max_rank": 128} | rule).items() if name != "max_rank")
    assert f"{told}, max_rank={rule.get('max_rank', 128)}" in (tmp_path / "report.html").read_text(encoding="utf-8")
    capsys.readouterr()
    assert svd(tmp_path, *options, "--include", pattern, "--dry-run") == 0
    assert capsys.readouterr().out == f"{bf.delta_plan(BASE, TUNED, include=pattern, **rule)}\n"


def test_two_rules_at_once(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        svd(tmp_path, "--rank", 3, "--energy", 0.5)
    assert stop.value.code == 2 and "--energy: not allowed with argument --rank" in capsys.readouterr().err


def test_patterns_choose_what_is_compared(tmp_path):
    patterns = ("--include", "*.o_proj.weight", "--include", "*.down_proj.weight", "--exclude", "*.layers.[0-3].*")
    assert svd(tmp_path, "--rank", 2, *patterns) == 0
    names = [f"model.layers.{i}.{p}.weight" for i in (4, 5) for p in ("self_attn.o_proj", "mlp.down_proj")]
    assert sorted(row["name"] for row in table(tmp_path / "tensors.csv")) == sorted(names)
    assert len(table(tmp_path / "overlap.csv")) == 4


def test_a_model_compared_with_itself(tmp_path, capsys):
    assert svd(tmp_path, "--rank", 2, "--include", "*proj*", tuned=BASE) == 0
    assert "None of the 42 tensors that were compared differs." in capsys.readouterr().out
    assert not (tmp_path / "spectra.png").exists() and (tmp_path / "report.html").exists()


def test_gpt2_is_taken_as_it_is_stored(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, n_positions=8)
    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    assert svd(out, "--rank", 3, base=tmp_path / "base", tuned=tmp_path / "tuned") == 0
    rows = {row["comparison"]: row for row in table(out / "overlap.csv") if row["first"] == "attn.c_proj"}
    assert rows["same layer"]["second"] == "mlp.c_proj" and rows["next layer"]["factors"] == "v, v"
    assert "as [in, out] (model type gpt2)" in (out / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--rank", 0), "rank must be at least 1"),
        (("--energy", -0.5), "energy must be above 0 and at most 1, found -0.5"),
        (("--tol", 2), "tol must be above 0 and at most 1"),
        (("--energy", 0.5, "--max-rank", 0), "max_rank must be at least 1"),
        (("--tolerance", -1), "tolerance must be positive"),
        (("--include", "*.nothing.*"), "matches no tensor"),
        (("--exclude", "*"), "nothing to compare"),
        (("--include", "*layernorm*"), "nothing to compare: .* is 1-D"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used"),
    ],
)
def test_bad_options_are_said_and_leave_nothing(tmp_path, capsys, options, message):
    out = tmp_path / "out"
    assert svd(out, *options) == 2
    said = capsys.readouterr().err

    assert re.search(message, said) and "Traceback" not in said and not out.exists()


def test_bad_folders(tmp_path, capsys):
    assert svd(tmp_path / "out", base=tmp_path / "none") == 2
    assert "none" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert svd(tmp_path / "file") == 2
    assert "file" in capsys.readouterr().err


def test_a_config_is_not_needed(tmp_path):
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
        shutil.copy(PAIR / side / "model.safetensors", tmp_path / side)
    (tmp_path / "tuned" / "config.json").write_text("no JSON")
    sides = {"base": tmp_path / "base", "tuned": tmp_path / "tuned"}
    assert svd(tmp_path / "out", "--rank", 2, "--include", "*.o_proj.weight", **sides) == 0
    assert "no config was given" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_disk_is_full(tmp_path, capsys, monkeypatch):
    """For the result: finished tensors are kept, and the next run goes on. For the report: what was found is told."""
    from bkdfast import report
    from bkdfast.svd import result

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(result, "write_artifact", full)
        assert svd(tmp_path, "--rank", 2, "--include", "*.o_proj.weight") == 2
    assert "No space left" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(report, "write_delta_report", full)
        assert svd(tmp_path, "--rank", 2, "--include", "*.o_proj.weight") == 2
    said = capsys.readouterr()
    assert "No space left" in said.err and "Fine-tuning changed 6 of 6 tensors" in said.out


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["svd", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "bkdfast svd base/ tuned/ --dry-run" in said and "delta_svd.safetensors" in said
    for option in (
        "--rank",
        "--energy",
        "--tol",
        "--max-rank",
        "--include",
        "--exclude",
        "--tolerance",
        "--seed",
        "--device",
        "--max-memory",
        "--no-resume",
    ):
        assert option in said
