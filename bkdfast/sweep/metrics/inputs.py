"""What the model must see for a metric: prompts as they are, or prompts followed by targets (teacher forcing).

Columns are those of the batch as given, so nothing moves: a target starts right after the last real token of its
prompt, whichever side the prompt is padded on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf.positions import prompt_ends
from bkdfast.sweep.metrics.base import Scored

Tokens = Sequence[int] | torch.Tensor | str
READS = ("last_prompt", "prompt", "target")


class Targets:
    """Token ids of one target for all samples, or of one for each.

    Args:
        targets: token ids or a string (for all samples), or a list of those.
        tokenizer: encodes strings, without special tokens.

    Raises:
        InvalidArgumentError: no target, an empty one, a negative token.
        InvalidTypeError: strings without a tokenizer, tokens that are not integers.
    """

    def __init__(self, targets: Tokens | Sequence[Tokens], tokenizer: Any = None) -> None:
        if isinstance(targets, torch.Tensor):
            targets = targets.tolist()
        shared = isinstance(targets, str) or (len(targets) > 0 and _is_integer(targets[0]))
        self.ids = [_encode(target, i, tokenizer) for i, target in enumerate([targets] if shared else targets)]
        if not self.ids:
            raise InvalidArgumentError("no targets were given")
        self.samples = None if shared else len(self.ids)
        self.highest = max(max(ids) for ids in self.ids)

    def rows(self, first: int, count: int) -> list[list[int]]:
        """The targets of samples first to first + count - 1."""
        if self.samples is None:
            return self.ids * count
        if first + count > self.samples:
            raise InvalidArgumentError(
                f"{self.samples} targets, but the data has more than {first + count - 1} samples"
            )
        return self.ids[first : first + count]


class PerSample:
    """One token for all samples, or one for each; arguments and errors as for `Targets`."""

    def __init__(self, tokens: int | str | Sequence[int | str] | torch.Tensor, tokenizer: Any = None) -> None:
        if isinstance(tokens, torch.Tensor):
            tokens = tokens.tolist()
        listed = list(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else [tokens]
        self.ids = []
        for i, token in enumerate(listed):
            ids = _encode(token if isinstance(token, str) else [token], i, tokenizer)
            if len(ids) > 1:
                raise InvalidArgumentError(f"{token!r} is {len(ids)} tokens, {ids}; one token is compared: give its id")
            self.ids.append(ids[0])
        if not self.ids:
            raise InvalidArgumentError("an empty list of tokens; give one token, or one for each sample")
        self.samples = len(self.ids) if len(self.ids) > 1 else None
        self.highest = max(self.ids)

    def rows(self, first: int, count: int) -> list[int]:
        """The tokens of samples first to first + count - 1."""
        if self.samples is None:
            return self.ids * count
        if first + count > self.samples:
            raise InvalidArgumentError(f"{self.samples} tokens, but the data has more than {first + count - 1} samples")
        return self.ids[first : first + count]


def _is_integer(value: Any) -> bool:
    if isinstance(value, torch.Tensor) and value.dim():  # one element would do for operator.index
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def _encode(target: Any, number: int, tokenizer: Any) -> list[int]:
    if isinstance(target, str):
        if tokenizer is None:
            raise InvalidTypeError(f"target {number} is a string, {target!r}: pass tokenizer= or give token ids")
        target = tokenizer(target, add_special_tokens=False)["input_ids"]
    try:
        ids = list(target)
    except TypeError:
        raise InvalidTypeError(
            f"target {number} is {target!r}; expected token ids, or a string and tokenizer="
        ) from None
    if wrong := [token for token in ids if not _is_integer(token)]:
        raise InvalidTypeError(f"target {number} has {wrong[0]!r} where a token id (an integer) was expected")
    ids = [operator.index(token) for token in ids]
    if not ids:
        raise InvalidArgumentError(f"target {number} is empty; a target needs at least one token")
    if min(ids) < 0:
        raise InvalidArgumentError(
            f"target {number} has the token id {min(ids)}; leave out masked positions (labels of -100)"
        )
    return ids


def reading(
    over: str, targets: Tokens | Sequence[Tokens] | None, tokenizer: Any, word: str = "over"
) -> tuple[str, Targets | None]:
    """Check which columns are to be read; the argument is called `word`."""
    if over not in READS:
        raise InvalidArgumentError(f"{word}={over!r} is not one of {', '.join(map(repr, READS))}")
    if (over == "target") != (targets is not None):
        raise InvalidArgumentError(
            f"{word}={over!r} reads "
            + ("the targets' tokens: pass targets=" if targets is None else f"no targets; pass {word}='target'")
        )
    return over, None if targets is None else Targets(targets, tokenizer)


def extend(over: str, targets: Targets | None, batch: dict[str, torch.Tensor], first: int) -> Scored:
    """A batch read at the columns that `reading` has checked."""
    if targets is not None:
        return append(batch, targets.rows(first, len(batch["input_ids"])))
    return last_prompt(batch) if over == "last_prompt" else prompt_tokens(batch)


def last_prompt(batch: dict[str, torch.Tensor], tokens: Sequence | None = None) -> Scored:
    """The prompts, read at their last token; `tokens [B]` or `[B, k]` are what is asked there."""
    read = prompt_ends(batch)[1][:, None]
    asked = torch.zeros_like(read) if tokens is None else torch.tensor(tokens, device=read.device)[:, None]
    return Scored(dict(batch), read, asked, torch.ones(read.shape, device=read.device))


def prompt_tokens(batch: dict[str, torch.Tensor], *, scored_by_next: bool = False) -> Scored:
    """The prompts, read at every real token; `tokens` is the token that follows (0 after the last).

    Args:
        batch: the prompts.
        scored_by_next: leave out the last token, whose successor is not known.

    Raises:
        InvalidArgumentError: with `scored_by_next`, a prompt of one token.
    """
    begin, end = prompt_ends(batch)
    count = end - begin + (0 if scored_by_next else 1)  # [B]
    if not count.all():
        row = int((count == 0).int().argmax())
        raise InvalidArgumentError(
            f"row {row} of the batch is one token: there is no next token to predict in it; give targets or longer "
            "prompts"
        )
    ids = batch["input_ids"]
    steps = torch.arange(int(count.max()), device=ids.device)[None, :]
    inside = steps < count[:, None]
    read = torch.where(inside, begin[:, None] + steps, end[:, None])
    after = (read + 1).clamp(max=ids.shape[1] - 1)
    following = ids.gather(1, after)
    if (mask := batch.get("attention_mask")) is not None:  # it may have holes
        inside &= mask.gather(1, read) != 0
        if scored_by_next:
            inside &= mask.gather(1, after) != 0
    tokens = following.where(inside & (read < end[:, None]), 0).long()
    return Scored(dict(batch), read, tokens, inside.float())


def append(batch: dict[str, torch.Tensor], targets: Sequence[Sequence[int]]) -> Scored:
    """Put each row's target right after its prompt, read where its tokens are predicted.

    Raises:
        InvalidArgumentError: the batch has inputs other than ids and mask, which cannot be made longer.
    """
    types = batch.get("token_type_ids")
    ignored = {"token_type_ids"} if types is not None and not types.any() else set()  # all zero is the default
    if odd := sorted(set(batch) - {"input_ids", "attention_mask", *ignored}):
        raise InvalidArgumentError(f"teacher forcing extends input_ids and attention_mask; it cannot extend {odd}")
    ids, given = batch["input_ids"], batch.get("attention_mask")
    ends = prompt_ends(batch)[1].tolist()
    rows, longest = len(ids), max(len(target) for target in targets)
    width = max(end + 1 + len(target) for end, target in zip(ends, targets, strict=True))
    new = ids.new_zeros(rows, width)
    mask = torch.zeros(rows, width, dtype=torch.long, device=ids.device)
    read, tokens = (torch.zeros(rows, longest, dtype=torch.long, device=ids.device) for _ in range(2))
    weight = torch.zeros(rows, longest, device=ids.device)
    for row, target in enumerate(targets):
        n, start = len(target), ends[row] + 1
        new[row, :start] = ids[row, :start]
        new[row, start : start + n] = torch.tensor(target, device=ids.device)
        mask[row, :start] = 1 if given is None else given[row, :start] != 0
        mask[row, start : start + n] = 1
        # Rows with a shorter target read their last prompt token again: padding columns may hold NaN.
        read[row] = start - 1
        read[row, :n] = torch.arange(start - 1, start + n - 1, device=ids.device)
        tokens[row, :n] = new[row, start : start + n]
        weight[row, :n] = 1
    return Scored({"input_ids": new, "attention_mask": mask}, read, tokens, weight)
