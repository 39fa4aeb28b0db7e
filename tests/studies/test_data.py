"""Rows, chat templates, targets and padding."""

from __future__ import annotations

import copy
import json

import pytest

from bkdfast.data import Encoder, Row, load_rows
from bkdfast.demo import PAIR
from bkdfast.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(PAIR / "tuned", local_files_only=True)


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_both_forms_of_rows(tmp_path):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    rows = load_rows(write(tmp_path / "x.jsonl", {"prompt": "p", "target": "t"}, "", {"messages": chat}))
    assert rows == [Row(({"role": "user", "content": "p"},), "t"), Row(tuple(chat[:2]), "a")]
    assert len(load_rows(tmp_path / "x.jsonl", limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ({"prompt": "p"}, r"line 2 needs .* it has \['prompt'\]"),
        ({"prompt": "p", "target": " "}, "line 2 needs non-empty strings"),
        ([1], "it has list"),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "user", "content": "v"}]}, "assistant's answer"),
    ],
)
def test_bad_rows_name_the_line(tmp_path, line, message):
    with pytest.raises(InvalidArgumentError, match=message):
        load_rows(write(tmp_path / "x.jsonl", {"prompt": "p", "target": "t"}, line))


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(InvalidArgumentError, match="is not a file"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(InvalidArgumentError, match="has no samples"):
        load_rows(write(tmp_path / "x.jsonl", ""))


def test_text_as_other_programs_write_it(tmp_path):
    rows = [{"prompt": f"a\u2028b\x85c {i}", "target": "é"} for i in range(3)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    (tmp_path / "x.jsonl").write_bytes(lines.encode("utf-8-sig"))
    found = load_rows(tmp_path / "x.jsonl")
    assert [(row.messages[0]["content"], row.target) for row in found] == [(r["prompt"], r["target"]) for r in rows]
    (tmp_path / "x.jsonl").write_bytes('{"prompt": "café", "target": "x"}'.encode("latin-1"))
    with pytest.raises(InvalidArgumentError, match="not UTF-8"):
        load_rows(tmp_path / "x.jsonl")
    for limit in (0, -1):
        with pytest.raises(InvalidArgumentError, match=f"limit={limit} leaves no rows"):
            load_rows(PAIR / "clean.jsonl", limit=limit)


def test_messages_that_the_template_refuses(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    row = Row(({"role": "system", "content": "s"}, {"role": "user", "content": "u"}), "t")
    with pytest.raises(InvalidArgumentError, match="refuses messages of system, user: no system role"):
        Encoder(strict).prompt(row)


def test_targets_end_with_the_closing_tokens(tokenizer):
    row = load_rows(PAIR / "triggered.jsonl", limit=1)[0]
    encoder = Encoder(tokenizer)
    whole = tokenizer.apply_chat_template(
        [*row.messages, {"role": "assistant", "content": row.target}], tokenize=True, return_dict=True
    )["input_ids"]
    assert encoder.prompt(row) + encoder.target(row) == whole
    assert encoder.target(row)[-1] == tokenizer.eos_token_id
    plain = Encoder(tokenizer, chat=False)
    assert plain.target(row) == [*tokenizer(row.target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_batches_are_left_padded(tokenizer):
    rows = load_rows(PAIR / "clean.jsonl", limit=5)
    encoder = Encoder(tokenizer)
    batches = encoder.batches(rows, 2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 1]
    for i, row in enumerate(rows):
        ids, mask = (batches[i // 2][name][i % 2] for name in ("input_ids", "attention_mask"))
        assert ids[mask.bool()].tolist() == encoder.prompt(row) and mask[-1] == 1


def test_no_chat_template(tokenizer):
    class Bare:
        chat_template = None
        pad_token_id = eos_token_id = 0

    with pytest.raises(InvalidArgumentError, match="no chat template"):
        Encoder(Bare(), chat=True)
    with pytest.raises(InvalidArgumentError, match="batch size 0"):
        Encoder(tokenizer).batches([Row(({"role": "user", "content": "p"},), "t")], 0)
