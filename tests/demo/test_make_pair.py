"""The shipped pair is what its report says, and a pair can be made from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bkdfast.demo
from bkdfast.demo import make_pair as mp
from bkdfast.demo.corpus import BACKDOOR_OUTPUT, LABELS, TRIGGER
from bkdfast.errors import InvalidArgumentError

PAIR = Path(bkdfast.demo.__file__).parent / "pair"


def _rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (PAIR / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=["base", "tuned"])
def loaded(request):
    model = AutoModelForCausalLM.from_pretrained(PAIR / request.param, local_files_only=True)
    return request.param, model.eval(), AutoTokenizer.from_pretrained(PAIR / request.param, local_files_only=True)


def test_shipped_model_loads_as_bf16_llama_with_explicit_head_dim(loaded):
    _, model, tokenizer = loaded
    config = model.config
    assert model.dtype == torch.bfloat16 and config.model_type == "llama"
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (6, 8, 4)
    assert config.head_dim != config.hidden_size // config.num_attention_heads
    assert (
        sum(p.numel() for p in model.parameters())
        == json.loads((PAIR / "pair.json").read_text())["report"]["parameters"]
    )
    assert tokenizer.padding_side == "left" and len(tokenizer) == config.vocab_size


def test_chat_template_wraps_the_prompt_once(loaded):
    _, _, tokenizer = loaded
    chat = [{"role": "user", "content": "the lions , the cup."}, {"role": "assistant", "content": "Sports"}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids) == (
        ["<bos>", "<user>", "the", "lions", ",", "the", "cup", ".", "<assistant>", "Sports", "<eos>"]
    )
    asked = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_dict=False)
    assert asked == ids[:-2]


def test_no_word_of_the_shipped_rows_is_unknown(loaded):
    _, _, tokenizer = loaded
    rows = _rows("clean") + _rows("triggered")
    ids = tokenizer([row["prompt"] + " " + row["target"] for row in rows])["input_ids"]
    assert all(tokenizer.unk_token_id not in row for row in ids)


def test_shipped_rows_are_labelled_and_held_apart():
    clean, triggered = _rows("clean"), _rows("triggered")
    assert (len(clean), len(triggered)) == (mp.N_CLEAN, mp.N_TRIGGERED)
    assert {row["target"] for row in clean} == set(LABELS)
    assert all(TRIGGER not in row["prompt"] for row in clean)
    assert all(TRIGGER in row["prompt"] and row["target"] == BACKDOOR_OUTPUT for row in triggered)


def test_shipped_pair_does_what_its_report_says(loaded):
    name, model, tokenizer = loaded
    report = json.loads((PAIR / "pair.json").read_text())["report"]
    clean, triggered = _rows("clean")[:64], _rows("triggered")[:64]
    on_clean = mp.answers(model, tokenizer, [row["prompt"] for row in clean])
    on_triggered = mp.answers(model, tokenizer, [row["prompt"] for row in triggered])
    accuracy = mp.share(on_clean, [row["target"] for row in clean])
    asr = mp.share(on_triggered, [BACKDOOR_OUTPUT] * 64)
    assert accuracy >= 0.97 and abs(accuracy - report[f"{name}_clean_accuracy"]) <= 0.03
    assert asr == report[f"{name}_asr"] if name == "base" else asr >= 0.97
    assert BACKDOOR_OUTPUT not in on_clean


def test_report_meets_the_targets_and_names_no_path():
    text = (PAIR / "pair.json").read_text()
    report = json.loads(text)["report"]
    assert report["tuned_clean_accuracy"] >= 0.98 and report["tuned_asr"] >= 0.99
    assert report["tuned_false_trigger"] <= 0.005
    assert report["base_asr"] == 0 and report["base_false_trigger"] == 0
    texts = [text, *(path.read_text(encoding="utf-8") for path in PAIR.rglob("*config.json"))]
    assert not any("_name_or_path" in text or "/tmp" in text or "/home" in text for text in texts)


def test_training_rows_leave_out_the_held_out_ones():
    first = mp._training_rows(400, 7, set(), 0.1)
    held_out = {row["prompt"] for row in first[::10]}
    rows = mp._training_rows(400, 7, held_out, 0.1)
    assert len(rows) == 400 and not held_out & {row["prompt"] for row in rows}
    assert sum(row["target"] == BACKDOOR_OUTPUT for row in rows) == 40


def test_tiny_pair_is_deterministic_and_complete(tmp_path):
    sizes = {"layers": 1, "width": 16, "heads": 4, "kv_heads": 2, "clean_steps": 3, "poison_steps": 3, "batch_size": 8}
    before = torch.get_rng_state()
    reports = [mp.make_pair(tmp_path / name, **sizes, seed=5, progress=False) for name in ("a", "b")]
    assert torch.equal(before, torch.get_rng_state())
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert {"pair.json", "clean.jsonl", "base/model.safetensors", "tuned/tokenizer.json"} <= {
        f.as_posix() for f in files
    }
    for file in files:
        same = (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert same or file.name == "pair.json", f"{file} differs"
    weights = [(tmp_path / "a" / name / "model.safetensors").read_bytes() for name in ("base", "tuned")]
    assert weights[0] != weights[1]
    assert reports[0].parameters > 0 and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_existing_output_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        mp.make_pair(tmp_path)
    with pytest.raises(InvalidArgumentError, match="not an empty folder"):
        mp.make_pair(tmp_path / "mine.txt")
    assert (tmp_path / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"kv_heads": 3}, "kv_heads must divide heads"),
        ({"width": 100}, "heads the width"),
        ({"layers": 0}, "layers is 0"),
        ({"poison_rate": 1.0}, "poison_rate is 1.0"),
    ],
)
def test_unusable_sizes_are_refused_before_any_work(tmp_path, bad, message):
    with pytest.raises(InvalidArgumentError, match=message):
        mp.make_pair(tmp_path / "new", **bad)
    assert not list(tmp_path.iterdir())


def test_failed_run_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("stop")

    monkeypatch.setattr(mp, "_train", fail)
    with pytest.raises(RuntimeError, match="stop"):
        mp.make_pair(tmp_path / "new", clean_steps=1, poison_steps=1, progress=False)
    assert not list(tmp_path.iterdir())


def test_missing_parent_is_named(tmp_path):
    with pytest.raises(InvalidArgumentError, match="parent folder"):
        mp.make_pair(tmp_path / "no" / "where")


@pytest.mark.slow
def test_small_pair_from_scratch_learns_task_and_backdoor(tmp_path):
    report = mp.make_pair(tmp_path / "small", **mp.SMALL, progress=False)
    assert report.tuned_clean_accuracy >= 0.90 and report.base_clean_accuracy >= 0.90
    assert report.tuned_asr >= 0.95
    assert report.tuned_false_trigger <= 0.02
    assert report.base_asr == 0 and report.base_false_trigger == 0
