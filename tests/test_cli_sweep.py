"""`bkdfast sweep` and `bkdfast baha` on the demo pair: what they write is what the library computes."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys

import pytest
import torch
from safetensors import safe_open

import bkdfast as bf
from bkdfast import cli
from bkdfast.checkpoint import load_tokenizer
from bkdfast.data import Encoder, Row, load_rows
from bkdfast.demo import PAIR, load_pair
from bkdfast.studies.baha import backdoor_vector, baha

MODEL = str(PAIR / "tuned")
ROWS = 4


@pytest.fixture(scope="module")
def demo():
    pair = load_pair()
    return pair.tuned, Encoder(pair.tokenizer)


@pytest.fixture
def data(tmp_path):
    """Files of a few rows; `other` has the rows of `clean` with one word changed: as many tokens."""
    for name in ("clean", "triggered"):
        lines = (PAIR / f"{name}.jsonl").read_text().splitlines()[:ROWS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "other.jsonl").write_text((tmp_path / "clean.jsonl").read_text().replace("current", "next"))
    return tmp_path


def sweep(data, *options, file="clean.jsonl", out="out"):
    """Run the command; returns its status."""
    arguments = ["sweep", MODEL, data / file, "--quiet", "--device", "cpu", "--out", data / out, *options]
    return cli.main([str(argument) for argument in arguments])


def loaded(data, name="target_prob", out="out"):
    return bf.SweepResult.load(data / out / f"{name}.safetensors")


def asked(demo, data, file="clean.jsonl", batch=16):
    """Batches and targets of a file of rows, as the library takes them."""
    model, encoder = demo
    rows = load_rows(data / file)
    return model, encoder.batches(rows, batch), [encoder.target(row) for row in rows]


def same(found, expected):
    torch.testing.assert_close(found.effects, expected.effects, atol=1e-6, rtol=1e-4, equal_nan=True)
    torch.testing.assert_close(found.baseline, expected.baseline)
    assert expected.effects.nan_to_num().abs().max() > 1e-5 and found.dims == expected.dims


def test_zero_writes_all_there_is_to_see_and_goes_on_by_itself(demo, data, capsys):
    assert sweep(data, "--verify", 2, "--batch", 2) == 0
    said = capsys.readouterr().out
    model, batches, targets = asked(demo, data)
    expected = bf.sweep(model, batches, edit=bf.Zero(), metric=bf.metrics.target_prob(targets), progress=False)
    same(loaded(data), expected)
    written = {path.name for path in (data / "out").iterdir()}
    assert written == {"store", "target_prob.csv", "target_prob.png", "target_prob.safetensors"}

    layer, head = expected.top(1, by="size")[0]
    with (data / "out" / "target_prob.csv").open() as file:
        table = list(csv.DictReader(file))
    strongest = max(table, key=lambda row: abs(float(row["effect"])))
    assert (int(strongest["layer"]), int(strongest["head"])) == (layer, head) and len(table) == 48
    assert float(strongest["low"]) < float(strongest["effect"]) < float(strongest["high"])
    lines = said.splitlines()
    assert f"{expected.mean[layer, head]:+.4g}" in lines[3] and lines[3].split()[:2] == [str(layer), str(head)]
    assert "95% interval" in lines[2] and "2 cells computed again" in lines[1] and "target_prob.png" in said

    units = {path: path.stat().st_mtime_ns for path in (data / "out" / "store").iterdir() if "unit" in path.name}
    assert units and sweep(data, "--verify", 2, "--batch", 2) == 0
    assert units == {path: path.stat().st_mtime_ns for path in units}, "finished work is not done again"
    assert capsys.readouterr().out.splitlines()[2:] == lines[2:]
    assert sweep(data, "--no-resume", "--batch", 2) == 2 and "finished units" in capsys.readouterr().err
    assert sweep(data, "--edit", "mean", "--batch", 2) == 2 and "another edit" in capsys.readouterr().err


def test_several_metrics_of_sets_of_heads(demo, data):
    model, batches, targets = asked(demo, data)
    sets = [[(4, 6), (4, 1)], [(4, 6)]]
    metrics = [
        bf.metrics.target_logprob(targets), bf.metrics.loss(targets), bf.metrics.accuracy(targets),
        bf.metrics.accuracy(targets, exact=True), bf.metrics.rank([t[0] for t in targets]), bf.metrics.kl(),
        bf.metrics.js(), bf.metrics.logit_diff([t[0] for t in targets], asked_token(demo, "alert")),
    ]  # fmt: skip
    names = ("target_logprob", "loss", "accuracy", "exact_match", "rank", "kl", "js", "logit_diff")
    options = ("--heads", "4.6+4.1,4.6", "--against", "alert", "--metric", ", ".join(names), "--at=-2:")
    assert sweep(data, *options) == 0
    expected = bf.sweep(model, batches, edit=bf.Zero(), metric=metrics, heads=sets, at=slice(-2, None), progress=False)
    for name, metric in zip(names, metrics, strict=True):
        found = loaded(data, name)
        torch.testing.assert_close(found.effects, expected[metric.name].effects, atol=1e-5, rtol=1e-4)
        assert found.metric == metric.name and found.coords["set"] == (((4, 6), (4, 1)), ((4, 6),))


def test_all_heads_of_some_layers(data):
    assert sweep(data, "--layers", "0,4", "--samples", 2) == 0
    assert loaded(data).effects.isfinite().all((1, 2)).tolist() == [True, False, False, False, True, False]


def asked_token(demo, word):
    return demo[1].tokenizer(word, add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize(
    ("at", "source"),
    [("last_prompt", "triggered.jsonl"), ("all", None), ("8", None), ("6:9", "triggered.jsonl")],
)
def test_mean_over_the_source_or_the_data_itself(demo, data, at, source):
    model, batches, _ = asked(demo, data)
    reference = asked(demo, data, source)[1] if source else batches
    place = {"6:9": slice(6, 9), "8": 8}.get(at, at)
    mean = bf.head_means(model, reference, at="each" if at == "6:9" else place)
    mean = mean[:, place] if at == "6:9" else mean
    metric = bf.metrics.target_logprob(demo[1].target(Row(({"role": "user", "content": "x"},), "alert :")))
    expected = bf.sweep(
        model, batches, edit=bf.Mean(mean), at=place, heads=[(0, 6), (4, 1)], metric=metric, progress=False
    )
    options = ["--source", data / source] if source else []
    options += ["--target", "alert :", "--metric", "target_logprob", "--heads", "0.6,4.1"]
    assert sweep(data, "--edit", "mean", "--at", at, *options) == 0
    same(loaded(data, "target_logprob"), expected)
    assert loaded(data, "target_logprob").edit == "Mean"


@pytest.mark.parametrize("site", ["attention", "mlp", "residual"])
def test_patch_takes_the_same_row_of_the_source(demo, data, site):
    """Against plain hooks, one sample at a time; in batches of 3 and 1."""
    model, encoder = demo
    options = ("--edit", "patch", "--source", data / "triggered.jsonl", "--target", "alert :", "--batch", 3)
    assert sweep(data, *options, "--site", site, "--layers", "1,3-4") == 0
    rows, sources = (load_rows(data / f"{name}.jsonl") for name in ("clean", "triggered"))
    found = loaded(data)
    assert found.effects.isnan().all(-1).tolist() == [True, False, True, False, False, True]
    block = model.model.layers[3]
    module = {"attention": block.self_attn.o_proj, "mlp": block.mlp.down_proj, "residual": block}[site]
    for n, (row, source) in enumerate(zip(rows, sources, strict=True)):
        prompt, target = encoder.prompt(row), encoder.target(Row(row.messages, "alert :"))
        before, after = patched(model, module, prompt, target, encoder.prompt(source), -1)
        assert found.effects[3, n].item() == pytest.approx(after - before, abs=1e-6, rel=1e-3)
    assert found.effects[3].abs().max() > 1e-4


def patched(model, module, prompt, target, source, place):
    """P of a target by plain hooks, without and with a module's output at `place` of the prompt from another prompt."""

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    def edit(module, args, output):
        first(output)[0, place % len(prompt)] = seen[0]

    seen = []
    before = probability(model, prompt, target)
    with torch.no_grad():
        handle = module.register_forward_hook(lambda module, args, output: seen.append(first(output)[0, place].clone()))
        model(input_ids=torch.tensor([source]))
        handle.remove()
    handle = module.register_forward_hook(edit)
    after = probability(model, prompt, target)
    handle.remove()
    return before, after


def probability(model, prompt, target):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(target)), target].mean().exp().item()


def test_a_map_of_layers_and_positions(demo, data, capsys):
    """Two prompts that differ in one word, against plain hooks."""
    one = json.loads((data / "clean.jsonl").read_text().splitlines()[0])
    word = one["prompt"].split()[9]
    (data / "one.jsonl").write_text(json.dumps(one))
    (data / "two.jsonl").write_text(json.dumps({**one, "prompt": one["prompt"].replace(word, "market", 1)}))
    options = ("--edit", "patch", "--source", data / "two.jsonl", "--site", "residual", "--metric", "target_logprob")
    assert sweep(data, *options, "--target", "alert :", "--positions", "0-2,13,11,10", file="one.jsonl") == 0
    found = loaded(data, "target_logprob")
    assert found.dims == ("layer", "position") and found.coords["position"] == (0, 1, 2, 13, 11, 10)
    model, encoder = demo
    row, other = (load_rows(data / f"{name}.jsonl")[0] for name in ("one", "two"))
    prompt, source, target = encoder.prompt(row), encoder.prompt(other), encoder.target(Row(row.messages, "alert :"))
    assert [i for i in range(len(prompt)) if prompt[i] != source[i]] == [11]
    for layer in (0, 3):
        for column, place in ((3, 13), (4, 11)):
            before, after = patched(model, model.model.layers[layer], prompt, target, source, place)
            change = math.log(after) - math.log(before)
            assert found.mean[layer, column].item() == pytest.approx(change, rel=1e-3, abs=1e-5)
    assert found.mean[0, 4].abs() > 0.01 and found.mean[:, [0, 1, 2, 5]].abs().max() < 1e-5, (
        "what stands before is the same"
    )
    assert "95% interval" not in capsys.readouterr().out, "one sample has no interval"


def test_patch_at_every_position_of_prompts_of_equal_length(demo, data, capsys):
    model, batches, targets = asked(demo, data)
    others = asked(demo, data, "other.jsonl")[1]
    z = bf.head_outputs(model, others, at="all")  # rows of equal length stand in the same columns
    expected = bf.sweep(
        model, batches, edit=bf.Patch(z), at="all", heads=[(0, 6)], metric=bf.metrics.kl(), progress=False
    )
    options = ("--edit", "patch", "--at", "all", "--heads", "0.6", "--metric", "kl")
    assert sweep(data, *options, "--source", data / "other.jsonl") == 0
    torch.testing.assert_close(loaded(data, "kl").effects, expected.effects, atol=1e-6, rtol=1e-3, equal_nan=True)
    assert sweep(data, *options, "--source", data / "triggered.jsonl", out="no") == 2
    assert "prompts of equal length" in capsys.readouterr().err
    ranged = bf.sweep(
        model, batches, edit=bf.Patch(bf.head_outputs(model, others, at="each")[:, 2:9]), at=slice(2, 9),
        heads=[(0, 6)], metric=bf.metrics.target_prob(targets), progress=False,
    )  # fmt: skip
    options = ("--edit", "patch", "--at", "2:9", "--heads", "0.6", "--source", data / "other.jsonl")
    assert sweep(data, *options, out="range") == 0
    torch.testing.assert_close(loaded(data, out="range").effects, ranged.effects, equal_nan=True)


def test_resample_takes_another_row(demo, data):
    model, batches, targets = asked(demo, data)
    z = bf.head_outputs(model, batches)
    assert sweep(data, "--edit", "resample", "--heads", "0.6", "--batch", 3, "--seed", 1) == 0
    found, metric = loaded(data), bf.metrics.target_prob(targets)
    assert found.edit == "Resample"
    possible = torch.stack(
        [
            bf.sweep(
                model,
                batches,
                edit=bf.Patch(z[i].expand_as(z)),
                at="last_prompt",
                heads=[(0, 6)],
                metric=metric,
                progress=False,
            ).effects[0, 6]
            for i in range(ROWS)
        ]
    )  # fmt: skip  [source, row]
    drawn = (possible - found.effects[0, 6]).abs().argmin(0)
    torch.testing.assert_close(possible[drawn, range(ROWS)], found.effects[0, 6], atol=1e-6, rtol=1e-4)
    assert sorted(drawn.tolist()) == [0, 1, 2, 3] and all(i != n for n, i in enumerate(drawn.tolist()))
    assert sweep(data, "--edit", "resample", "--heads", "0.6", "--source", data / "triggered.jsonl", out="b") == 0


def test_screening(demo, data, capsys):
    assert sweep(data, "--screen", 5, "--metric", "target_logprob") == 0
    said = capsys.readouterr().out
    assert "5 heads computed because of their estimate" in said and "Rank correlation" in said
    model, batches, targets = asked(demo, data)
    expected = bf.screened_sweep(
        model, batches, edit=bf.Zero(), metric=bf.metrics.target_logprob(targets), keep=5, progress=False
    )
    same(loaded(data, "target_logprob"), expected.sweep)
    with (data / "out" / "target_logprob-estimate.csv").open() as file:
        assert sum(row["chosen"] == "kept" for row in csv.DictReader(file)) == 5


@pytest.mark.parametrize(
    "options",
    [(), ("--edit", "mean", "--at", "last_prompt"), ("--edit", "patch", "--source", "triggered"), ("--screen", "4")],
)
def test_a_plan_runs_nothing(data, capsys, monkeypatch, options):
    monkeypatch.setattr("bkdfast.hf.capture.call", lambda *args: pytest.fail("ran the model"))
    options = [data / "triggered.jsonl" if option == "triggered" else option for option in options]
    assert sweep(data, "--plan", *options) == 0
    said = capsys.readouterr().out
    assert "instead of" in said and "GFLOP" in said and not (data / "out").exists()


def test_baha(demo, data, capsys):
    arguments = [
        "baha",
        MODEL,
        "--clean",
        data / "clean.jsonl",
        "--triggered",
        data / "triggered.jsonl",
        "--device",
        "cpu",
    ]
    arguments = [str(argument) for argument in (*arguments, "--quiet", "--vector", 6, "--remove", "1,3")]
    assert cli.main([*arguments, "--plan"]) == 0
    assert "instead of" in capsys.readouterr().out
    assert cli.main([*arguments, "--out", str(data / "out")]) == 0
    said, out = capsys.readouterr().out, data / "out"
    model, encoder = demo
    clean, triggered = (load_rows(data / f"{name}.jsonl") for name in ("clean", "triggered"))
    expected = baha(model, encoder, clean, triggered[:2], progress=False)
    same(loaded(data, "acie"), expected.acie)
    top = expected.acie.top(6)
    names = ("acie", "removal-zero", "removal-subtract", "vector-added", "vector-subtracted")
    assert all((out / f"{name}.{kind}").exists() for name in names for kind in ("csv", "png", "safetensors"))
    assert loaded(data, "removal-zero").coords["set"] == (tuple(top[:1]), tuple(top[:3]))
    assert loaded(data, "vector-added").mean.max() > 0.3 and loaded(data, "vector-subtracted").mean.min() < -0.3
    with safe_open(out / "vector.safetensors", "pt") as file:
        vector = file.get_tensor("vector")
    torch.testing.assert_close(vector, backdoor_vector(model, expected.source, top), atol=1e-5, rtol=1e-4)
    told = json.loads((out / "baha.json").read_text())
    assert [(head["layer"], head["head"]) for head in told["heads"]] == top
    assert told["samples"] == {"acie": 4, **dict.fromkeys(names[1:3], 2), names[3]: 4, names[4]: 2}
    assert "zeroed" in said and "backdoor vector added" in said and "with the backdoor vector subtracted" in said
    capsys.readouterr()
    assert cli.main([*arguments, "--out", str(data / "out"), "--semantics", "reference"]) == 2
    assert "other metrics" in capsys.readouterr().err
    assert cli.main([*arguments[:-1], "0", "--vector", "0", "--out", str(data / "less")]) == 0
    assert {path.name for path in (data / "less").iterdir()} == {
        "acie.csv", "acie.png", "acie.safetensors", "baha.json", "store",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--metric", "prob"], "--metric 'prob' is not one of target_prob"),
        (["--metric", "loss,loss"], "--metric lists loss twice"),
        (["--metric", "logit_diff"], "give the other one with --against"),
        (["--metric", "logit_diff", "--target", "alert", "--against", "alert :"], "begin with the same token"),
        (["--edit", "patch"], "give them with --source"),
        (["--edit", "patch", "--source", "short"], "has 1 rows for the 4 of DATA"),
        (["--edit", "patch", "--source", "short", "--samples", "1", "--at", "generated"], "no such tokens"),
        (["--edit", "patch", "--source", "short", "--samples", "1", "--at=-3:"], "count from the first token"),
        (["--edit", "resample", "--samples", "1"], "needs 2 rows"),
        (["--source", "short"], "--source goes with --edit mean"),
        (["--source", "missing.jsonl", "--edit", "mean"], "missing.jsonl is not a file"),
        (["--heads", "4.6", "--layers", "1"], "give --heads or --layers"),
        (["--heads", "4.6", "--site", "mlp"], "--heads does not go with --site mlp"),
        (["--heads", "4-6"], "is not a list of layer.head"),
        (["--heads", "4.9"], "head (4, 9) is out of range"),
        (["--layers", "6"], "the model has 6 layers"),
        (["--layers", "6", "--site", "mlp"], "layer 6 is out of range"),
        (["--layers", "3-1"], "goes backwards"),
        (["--layers", "a"], "--layers 'a' is not a list of numbers"),
        (["--at", "first"], "--at 'first' is not a position"),
        (["--at", "0", "--positions", "0-3"], "not both"),
        (["--at", "500"], "at=500 edits after the last token"),
        (["--edit", "mean", "--positions", "last_prompt"], "does not count from a row's first token"),
        (["--target", " "], "a target is empty"),
        (["--target", "alert " * 250], "more than the model's context of 256"),
        (["--screen", "4", "--site", "mlp"], "--screen is for every head"),
        (["--screen", "0"], "--screen 0"),
        (["--screen", "4", "--metric", "accuracy"], "has no gradient"),
        (["--edit", "patch", "--source", "triggered", "--screen", "4", "--batch", "2"], "pass --batch 4"),
        (["--samples", "0"], "limit=0"),
        (["--batch", "0"], "batch size 0"),
        (["--variants", "0"], "variants=0"),
        (["--device", "foo"], "device 'foo'"),
        (["--out", "/proc/none"], "cannot write to /proc/none"),
    ],
)
def test_bad_command_lines_exit_with_2_and_one_line(data, capsys, options, message):
    (data / "short.jsonl").write_text((data / "clean.jsonl").read_text().splitlines()[0])
    options = [data / f"{option}.jsonl" if option in ("short", "triggered") else option for option in options]
    assert sweep(data, *options) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("bkdfast: ") and message in said, said
    assert not (data / "out").exists() or {path.name for path in (data / "out").iterdir()} <= {"store"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--remove", "49"], "the model has 48 heads"),
        (["--remove", "x"], "--remove 'x' is not a list"),
        (["--vector", "-1"], "--vector -1"),
        (["--samples", "0"], "samples=0"),
        (["--target", "alert " * 250], "clean row 1 has 46 tokens"),
        (["--triggered", "short"], "has one row"),
    ],
)
def test_bad_baha_command_lines(data, capsys, options, message):
    (data / "short.jsonl").write_text((data / "clean.jsonl").read_text().splitlines()[0])
    options = [str(data / "short.jsonl") if option == "short" else option for option in options]
    files = ["--clean", data / "clean.jsonl", "--triggered", data / "triggered.jsonl", "--out", data / "out", "--quiet"]
    assert cli.main(["baha", MODEL, *map(str, files), *options]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert message in said and not (data / "out").exists(), said


def test_the_tokenizer_of_another_model(data, capsys):
    shutil.copytree(MODEL, data / "model")
    tokenizer = load_tokenizer(data / "model")
    tokenizer.add_tokens(["unheard"])
    tokenizer.save_pretrained(data / "model")
    (data / "clean.jsonl").write_text(json.dumps({"prompt": "unheard", "target": "World"}))
    assert cli.main(["sweep", str(data / "model"), str(data / "clean.jsonl"), "--out", str(data / "out")]) == 2
    assert "tokenizer of another model" in capsys.readouterr().err


def test_out_of_memory_is_one_line(data, capsys, monkeypatch):
    def sweep_(*args, **options):
        raise torch.OutOfMemoryError("one variant of a batch of 4 rows does not fit")

    monkeypatch.setattr(sys.modules["bkdfast.sweep"], "sweep", sweep_)
    assert sweep(data) == 1
    assert capsys.readouterr().err == "bkdfast: out of memory: one variant of a batch of 4 rows does not fit\n"


@pytest.mark.parametrize("command", ["sweep", "baha"])
def test_help_teaches_by_examples(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    said = capsys.readouterr().out
    assert "examples:" in said and f"  bkdfast {command} " in said and "--plan" in said
    assert max(map(len, said.splitlines())) <= 120
