"""`delta_norms`: every tensor against float64, whatever its shape and dtype; and `bkdfast diff`."""

import csv
import io
import json
import math
import re

import pytest
import torch
from safetensors.torch import save_file

from bkdfast import cli
from bkdfast.errors import InvalidArgumentError
from bkdfast.svd import delta_norms, delta_svd, norms
from tests.svd.matrices import FP64, gpt2, llama, tune

SHAPES = [(), (7,), (0, 3), (5, 6), (3, 4, 5), (2, 3, 4, 5), (1300, 900)]
DTYPES = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float64, torch.float64), (torch.bfloat16, torch.float64), (torch.int64, torch.int64),
    (torch.bool, torch.bool), (torch.float8_e4m3fn, torch.bfloat16),
]  # fmt: skip


def run(base, tuned, **kwargs):
    return delta_norms(base, tuned, **{"progress": False, **kwargs})


@pytest.mark.parametrize("chunk", [64, 1 << 20])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda pair: "-".join(str(d).removeprefix("torch.") for d in pair))
def test_every_shape_and_dtype_against_float64(dtypes, chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(norms, "_CHUNK", chunk)
    sides: tuple[dict, dict] = ({}, {})
    for i, shape in enumerate(SHAPES if chunk > 64 else SHAPES[:-1]):
        w0 = (5 * torch.randn(shape)).to(dtypes[0])
        w1 = torch.where(torch.rand(shape) < 0.3, 3 * torch.randn(shape), w0.float()).to(dtypes[1])
        sides[0][f"w{i}"], sides[1][f"w{i}"] = w0, w1
    files = [tmp_path / f"{side}.safetensors" for side in ("base", "tuned")]
    for file, tensors in zip(files, sides, strict=True):
        save_file(tensors, file)
    got = run(*files)
    assert list(got) == list(sides[0])
    for name, norm in got.items():
        w0, w1 = sides[0][name].to(FP64), sides[1][name].to(FP64)
        delta = w1 - w0
        assert norm.shape == tuple(w0.shape) and norm.changed == int((delta != 0).sum())
        assert norm.frobenius == pytest.approx(float(delta.square().sum().sqrt()), rel=1e-6)
        assert norm.base == pytest.approx(float(w0.square().sum().sqrt()), rel=1e-12)
        assert norm.largest == pytest.approx(float(delta.abs().max()) if delta.numel() else 0.0, rel=1e-6)
        assert norm.changed_share == pytest.approx(norm.changed / max(1, w0.numel()))


def test_agrees_with_delta_svd_and_with_the_module(tmp_path):
    base = llama()
    tuned = tune(base)
    with torch.no_grad():
        tuned.model.norm.weight += 1
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="70KB")
    got, exact = run(tmp_path / "base", tmp_path / "tuned"), delta_svd(base, tuned, rank=2, progress=False)
    assert set(got) == set(exact) | set(exact.skipped)
    assert {name: got[name].frobenius for name in exact} == pytest.approx({n: d.frobenius for n, d in exact.items()})
    assert {name: got[name].changed for name in exact} == {n: d.changed for n, d in exact.items()}
    assert got["model.norm.weight"].frobenius == pytest.approx(48**0.5) and got["model.norm.weight"].relative == 1
    memory = run(base, tuned)
    assert dict(memory.tensors) == {name: got[name] for name in memory}
    assert got.frobenius == pytest.approx(math.sqrt(sum(n.frobenius**2 for n in got.values())))
    table = got.to_pandas()
    assert table.loc["model.norm.weight", "relative"] == 1 and len(table) == len(got)
    assert got.ranked()[0].relative == table["relative"].max()


def test_each_tensor_is_read_once(tmp_path, monkeypatch):
    from bkdfast.svd.reader import TensorFile

    save_file({"a": torch.ones(30, 40), "b": torch.ones(3, 4, 5)}, tmp_path / "x.safetensors")
    read, inner = [], TensorFile.read
    monkeypatch.setattr(TensorFile, "read", lambda self, name, *more: (read.append(name), inner(self, name, *more))[1])
    got = run(tmp_path / "x.safetensors", tmp_path / "x.safetensors")
    assert sorted(read) == ["a", "a", "b", "b"] and got.unchanged == ("a", "b") and got.frobenius == got.relative == 0


def test_tied_is_compared_once():
    base = gpt2()
    assert run(base, tune(base)).tied == {"lm_head.weight": "transformer.wte.weight"}


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_told_and_the_rest_goes_on(tmp_path, side, value):
    sides = {name: {"a": torch.randn(30, 40), "b": torch.randn(4)} for name in ("base", "tuned")}
    sides[side]["a"][3, 4] = value
    for name, tensors in sides.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    got = run(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert math.isnan(got["a"].frobenius) and got["a"].note == f"NaN or infinity in the {side} weights"
    assert got["b"].frobenius > 0 and got.ranked()[0].name == "a"


def test_a_zero_base_is_no_division_by_zero(tmp_path):
    save_file({"a": torch.zeros(3), "b": torch.zeros(3)}, tmp_path / "base.safetensors")
    save_file({"a": torch.zeros(3), "b": torch.ones(3)}, tmp_path / "tuned.safetensors")
    got = run(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert got["a"].relative == 0 and got["b"].relative == math.inf and got.relative == 0


@pytest.fixture
def folders(tmp_path):
    base = llama()
    tuned = tune(base)
    base.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.model.layers[1].self_attn.o_proj.weight += 1
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    del state["model.norm.weight"]
    (tmp_path / "tuned").mkdir()
    save_file(state | {"extra.bias": torch.ones(3)}, tmp_path / "tuned" / "model.safetensors")
    return str(tmp_path / "base"), str(tmp_path / "tuned")


def test_the_command(folders, tmp_path, capsys):
    assert cli.main(["diff", *folders, "--quiet", "--top", "3", "--out", str(tmp_path / "diff.csv")]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[1].startswith("model.layers.1.self_attn.o_proj.weight  48 x 48") and "100.00%" in lines[1]
    shares = [float(re.findall(r"([\d.]+)%", line)[0]) for line in lines[1:4]]
    assert shares == sorted(shares, reverse=True) and lines[4] == "... and 13 more"
    assert "20 tensors compared, 4 of them unchanged" in out and "% of the base" in out
    assert "only in the base: model.norm.weight" in out and "only in the tuned model: extra.bias" in out
    assert "warning" in err
    with open(tmp_path / "diff.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    exact = run(*folders)
    assert len(rows) == 20 and rows[0]["name"] == "model.layers.1.self_attn.o_proj.weight"
    assert all(float(row["frobenius"]) == exact[row["name"]].frobenius for row in rows), "in full precision"
    assert io.StringIO(exact.to_csv()).readline().startswith("name,shape,dtype,frobenius,relative,")


def test_patterns_of_the_command(folders, capsys):
    patterns = ["--include", "*o_proj*", "--include", "lm_head*", "--exclude", "*layers.0*"]
    assert cli.main(["diff", *folders, "--quiet", *patterns]) == 0
    assert "2 tensors compared" in capsys.readouterr().out
    assert cli.main(["diff", folders[0], folders[0], "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("no tensor differs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "nowhere"], "there is no folder nowhere"),
        (["{base}", "{tuned}", "--include", "x*"], "matches no tensor"),
        (["{base}", "{tuned}", "--out", "none/x.csv"], "there is no folder none"),
        (["{base}", "{tuned}", "--max-memory", "1kB"], "max_memory=1 kB is not enough"),
        (["{base}", "{tuned}", "--top", "-1"], "--top is -1"),
    ],
)
def test_bad_input_of_the_command(folders, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"base": folders[0], "tuned": folders[1]}
    assert cli.main(["diff", "--quiet", *(argument.format(**names) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err


def test_quantised_is_refused_by_the_command(folders, capsys):
    from pathlib import Path

    config = Path(folders[0]) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "awq"}}))
    assert cli.main(["diff", *folders, "--quiet"]) == 2
    assert "is quantised (quantization_config of config.json: awq)" in capsys.readouterr().err


def test_max_memory_is_checked_first(folders):
    with pytest.raises(InvalidArgumentError, match="neither a number of bytes"):
        run(*folders, max_memory="lots")
