"""Rows of prompt and target from JSON lines, and tokenised batches of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bkdfast.errors import CheckpointError, InvalidArgumentError

_MARK = "the-answer-goes-here"


@dataclass(frozen=True)
class Row:
    """One sample: chat messages up to the model's turn, and what it should (or is feared to) answer."""

    messages: tuple[dict[str, str], ...]
    target: str


def load_rows(path: str | Path, *, limit: int | None = None) -> list[Row]:
    """Read a JSON-lines file of samples (UTF-8).

    A line is `{"prompt": ..., "target": ...}` or `{"messages": [...]}`, chat messages of which the last is the
    assistant's: the target.

    Raises:
        InvalidArgumentError: the file is missing, empty or not UTF-8, a line is neither (the message names it), or
            `limit` is under 1.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise InvalidArgumentError(f"limit={limit} leaves no rows; pass 1 or more")
    if not path.is_file():
        raise InvalidArgumentError(f"{path} is not a file; give a .jsonl file with one sample a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"{path} is not UTF-8 text ({error}); convert it") from None
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error}") from None
    rows = []
    # Not splitlines(): JSON strings may hold U+2028 and U+0085, which it takes for ends of lines.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            rows.append(_row(line, f"{path.name}, line {number}"))
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise InvalidArgumentError(f"{path} has no samples")
    return rows


def _row(line: str, where: str) -> Row:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidArgumentError(f"{where} is not JSON: {error}") from None
    if isinstance(found, dict) and isinstance(found.get("messages"), list) and len(found["messages"]) > 1:
        messages = found["messages"]
        if all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages):
            if messages[-1]["role"] == "assistant" and messages[-1]["content"].strip():
                return Row(tuple(messages[:-1]), messages[-1]["content"])
        raise InvalidArgumentError(
            f"{where}: messages need role and content, and the last one is the assistant's answer"
        )
    if isinstance(found, dict) and all(
        isinstance(found.get(k), str) and found[k].strip() for k in ("prompt", "target")
    ):
        return Row(({"role": "user", "content": found["prompt"]},), found["target"])
    keys = sorted(found) if isinstance(found, dict) else type(found).__name__
    raise InvalidArgumentError(f"{where} needs non-empty strings 'prompt' and 'target', or 'messages'; it has {keys}")


def _answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


class Encoder:
    """Turns rows into tokens with a model's tokenizer.

    Args:
        tokenizer: a HuggingFace tokenizer.
        chat: use its chat template; None: where it has one. Otherwise the messages' contents are joined by newlines.

    Raises:
        InvalidArgumentError: `chat=True` for a tokenizer without a chat template.
    """

    def __init__(self, tokenizer: Any, *, chat: bool | None = None) -> None:
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if chat and not has_template:
            raise InvalidArgumentError("the tokenizer has no chat template; leave out chat=True (--chat)")
        self.tokenizer = tokenizer
        self.chat = has_template if chat is None else chat
        self.pad_token_id = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    def prompt(self, row: Row) -> list[int]:
        """Token ids of a row's prompt, up to where the model's answer begins."""
        if self.chat:
            return self._template(list(row.messages), add_generation_prompt=True)
        return self.tokenizer("\n".join(message["content"] for message in row.messages))["input_ids"]

    def target(self, row: Row) -> list[int]:
        """Token ids of a row's target with its closing tokens.

        With a chat template that is all it writes after the prompt once the answer is there: the answer the way it
        writes it (some trim it) and what it appends, e.g. `<|im_end|>` and a newline, or nothing. Without one the end
        token closes.
        """
        if self.chat:
            prompt = self.prompt(row)
            whole = self._template([*row.messages, _answer(row.target)])
            if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
                return whole[len(prompt) :]
            return self.tokenizer(self._written(row), add_special_tokens=False)["input_ids"]
        ids = self.tokenizer(row.target, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return ids if end is None else [*ids, end]

    def _written(self, row: Row) -> str:
        """The text of a target whose tokens do not follow the prompt's: they merge, or the prompt ends otherwise."""
        prompt = self._template(list(row.messages), add_generation_prompt=True, tokenize=False)
        whole = self._template([*row.messages, _answer(row.target)], tokenize=False)
        if whole.startswith(prompt) and len(whole) > len(prompt):
            return whole[len(prompt) :]
        # A prompt may end in what no answer begins with (an open <think>): then from where an answer stands.
        before, found, _ = self._template([*row.messages, _answer(_MARK)], tokenize=False).rpartition(_MARK)
        if not found or not whole.startswith(before) or len(whole) == len(before):
            raise InvalidArgumentError(
                "the chat template does not write the assistant's answer as it is given, so its tokens cannot be told; "
                "pass chat=False (--no-chat), or another chat template"
            )
        return whole[len(before) :]

    def batches(self, rows: Sequence[Row], size: int = 16) -> list[dict[str, torch.Tensor]]:
        """The prompts in left-padded batches of at most `size` rows, in order."""
        if size < 1:
            raise InvalidArgumentError(f"batch size {size}: at least one row has to be in a batch")
        return [self._pad([self.prompt(row) for row in rows[i : i + size]]) for i in range(0, len(rows), size)]

    def _template(self, messages: list[dict[str, str]], *, tokenize: bool = True, **options: Any) -> Any:
        """Token ids, or the text, of a chat."""
        from jinja2 import TemplateError

        try:
            found = self.tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **options)
            return found["input_ids"] if tokenize else found
        except TemplateError as error:  # e.g. a template that refuses system messages
            roles = ", ".join(message["role"] for message in messages)
            raise InvalidArgumentError(
                f"the chat template refuses messages of {roles}: {error}; change them, or pass chat=False (--no-chat)"
            ) from None

    def _pad(self, prompts: list[list[int]]) -> dict[str, torch.Tensor]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), self.pad_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        return {"input_ids": ids, "attention_mask": mask}


def check_rows(
    model: torch.nn.Module, encoder: Encoder, rows: Sequence[Row], name: str, answers: Sequence[int] | None = None
) -> None:
    """Find rows that a run would fail on, before any work.

    Args:
        model: a HuggingFace model.
        encoder: makes the prompts.
        rows: the rows.
        name: what messages call them.
        answers: tokens that will follow each prompt; None: none.

    Raises:
        InvalidArgumentError: a prompt without tokens, or one that does not fit the context with its answer.
        CheckpointError: the tokenizer has tokens that the model does not know.
    """
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    limit = getattr(config, "max_position_embeddings", None)
    known = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for number, row in enumerate(rows, 1):
        ids, answer = encoder.prompt(row), answers[number - 1] if answers else 0
        if not ids:
            raise InvalidArgumentError(f"{name} row {number} has a prompt without tokens")
        if max(ids) >= known:
            raise CheckpointError(
                f"the tokenizer gives token {max(ids)} for {name} row {number}, but the model knows {known}; it is the "
                "tokenizer of another model"
            )
        if limit is not None and len(ids) + answer > limit:
            raise InvalidArgumentError(
                f"{name} row {number} has {len(ids)} tokens; with the longest answer ({answer}) that is more than the "
                f"model's context of {limit}. Shorten such rows or leave them out"
            )
