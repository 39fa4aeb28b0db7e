"""The benchmarks of the delta SVD run, and their tables say what they found."""

from __future__ import annotations

import json

import pytest

from benchmarks import svd, svd_7b, svd_disk, svd_tables

pytest.importorskip("scipy", reason="benchmarks compare with it")


def test_methods_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(svd, "shapes", lambda: [svd.Shape(320, 300, 4, "geometric"), svd.Shape(300, 320, 4, "i^-1/2")])
    out = tmp_path / "svd.json"
    svd.main(["--rounds", "2", "--out", str(out)])
    result = json.loads(out.read_text())
    for row in result["deltas"]:
        ours = row["versions"][svd.OURS]
        assert ours["angle"] <= row["bound"] <= 1e-4
        assert {svd.FULL, svd.LOWRANK, "scipy svds, PROPACK"} < set(row["versions"])
    table = svd_tables.svd_table(result)
    assert table.count("\n|") == 1 + sum(len(row["versions"]) for row in result["deltas"])
    assert f"bkdfast, {result['deltas'][0]['passes']} passes" in table


def test_from_disk(tmp_path, monkeypatch):
    for name, value in (("WIDTH", 64), ("MLP", 96), ("KEYS", 32), ("VOCABULARY", 200)):
        monkeypatch.setattr(svd_disk, name, value)
    # A temporary folder may be in memory, where nothing is ever dropped.
    monkeypatch.setattr(svd_disk, "drop", lambda files: None)
    out = tmp_path / "disk.json"
    svd_disk.main(["--layers", "1", "--rounds", "1", "--change", "4", "--folder", str(tmp_path), "--out", str(out)])
    result = json.loads(out.read_text())
    assert set(result["cold"]) == set(result["warm"]) and result["passes"] >= 1
    assert svd_tables.disk_table(result).count("\n|") == 1 + len(result["cold"])
    assert [path.name for path in tmp_path.iterdir()] == ["disk.json"], "the checkpoints are removed"


def test_a_model_on_one_device(tmp_path):
    out = tmp_path / "7b.json"
    sizes = ["--layers", "2", "--width", "300", "--mlp", "400", "--rank", "4"]
    svd_7b.main(["--device", "cpu", *sizes, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["weights"] == 4 and result["true_angle"] <= result["bound"] <= 1e-4
