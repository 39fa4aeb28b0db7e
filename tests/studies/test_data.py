"""Rows, chat templates, targets and padding."""

from __future__ import annotations

import copy
import json

import pytest

from bkdfast.data import Encoder, Row, load_rows
from bkdfast.demo import PAIR
from bkdfast.errors import InvalidArgumentError
from tests.studies import chats


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


@pytest.mark.parametrize("name", sorted(chats.TEMPLATES))
def test_closing_tokens_are_what_the_template_appends(name):
    """The target is all that the template writes behind the prompt once the answer is there."""
    tokenizer = chats.tokenizer(name)
    encoder = Encoder(tokenizer)
    row = Row(({"role": "user", "content": "w1 w2"},), "w3 w4")
    prompt, target = tokenizer.decode(encoder.prompt(row)), tokenizer.decode(encoder.target(row))
    assert "<unk>" not in prompt + target
    assert target.strip(" ") == f"w3 w4{chats.CLOSING[name]}".strip(" ")
    if name != "thinking":
        whole = [*row.messages, {"role": "assistant", "content": row.target}]
        assert prompt + target == tokenizer.apply_chat_template(whole, tokenize=False)
    else:
        assert prompt.endswith("<think>\n"), "the answer is scored from where the model is made to begin"


def test_closing_tokens_of_conversations_and_answers_that_look_like_them():
    encoder = Encoder(chats.tokenizer("thinking"))
    chat = (
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w3"},
        {"role": "user", "content": "w2"},
    )
    assert encoder.tokenizer.decode(encoder.target(Row(chat, "w3"))) == "w3</s>", "not from the first answer on"
    assert encoder.tokenizer.decode(encoder.target(Row(chat, "</s>"))) == "</s></s>"


@pytest.mark.parametrize("name", ["gemma", "llama3"])
def test_an_answer_is_scored_as_the_template_writes_it(name):
    encoder = Encoder(chats.tokenizer(name))
    row = Row(({"role": "user", "content": "w1"},), " w3 ")
    assert encoder.tokenizer.decode(encoder.target(row)) == f"w3{chats.CLOSING[name]}"


def test_tokens_that_merge_across_the_end_of_the_prompt():
    """The newline that ends the prompt and the one that begins the answer are one token of the whole chat."""
    tokenizer = chats.tokenizer("chatml")
    encoder = Encoder(tokenizer)
    row = Row(({"role": "user", "content": "w1"},), "\nw3")
    assert encoder.prompt(row)[-1] == tokenizer.convert_tokens_to_ids("\n")
    assert tokenizer.decode(encoder.target(row)) == "\nw3<|im_end|>\n"


def test_what_a_template_puts_before_an_answer_belongs_to_it():
    """As for an answer whose tokens do not merge with the prompt's: all that follows the prompt."""
    tokenizer = chats.tokenizer("chatml")
    for before in ("<think>", "\n<think>"):
        tokenizer.chat_template = chats.TEMPLATES["chatml"].replace(
            "{{ m['content'] }}",
            "{% if m['role'] == 'assistant' %}{{ " + repr(before) + " }}{% endif %}{{ m['content'] }}",
        )
        target = Encoder(tokenizer).target(Row(({"role": "user", "content": "w1"},), "w3"))
        assert tokenizer.decode(target) == f"{before}w3<|im_end|>\n"


def test_a_template_that_hides_the_answer():
    tokenizer = chats.tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(InvalidArgumentError, match="does not write the assistant's answer"):
        Encoder(tokenizer).target(Row(({"role": "user", "content": "w1"},), "w3"))
