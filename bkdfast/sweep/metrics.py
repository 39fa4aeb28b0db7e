"""Metrics: one number a sample from logits, read only where the metric looks.

A metric first turns prompts into what the model must see (`extend`: for teacher forcing the target tokens follow the
prompt) and says which columns of the logits it reads; then it scores those logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf.positions import prompt_ends

Tokens = Sequence[int] | torch.Tensor | str


@dataclass(frozen=True)
class Scored:
    """A batch ready for a metric.

    Attributes:
        batch: model inputs `[B, T']`, prompts followed by what the metric needs to see.
        read: `[B, n]` int64, columns of the logits that the metric reads.
        tokens: `[B, n]` int64, the token each of them predicts (0 where `weight` is 0).
        weight: `[B, n]` float32, 0 for padding of shorter targets.
    """

    batch: dict[str, torch.Tensor]
    read: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor


class Metric(Protocol):
    """What a sweep needs of a metric."""

    name: str

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """Inputs for a batch whose first row is sample number `first` of the data."""
        ...

    def score(self, logits: torch.Tensor, scored: Scored) -> torch.Tensor:
        """`[R]` float32 from `[R, n, vocab]` logits, where R is a multiple of the rows of `scored`."""
        ...


class target_logprob:  # noqa: N801  named as it is called
    """Mean log-probability of the target's tokens, teacher-forced, in nats.

    Args:
        targets: one target for all samples, or one for each: token ids (append the closing tokens that count), or
            strings with `tokenizer`.
        tokenizer: encodes string targets (without special tokens).

    Raises:
        InvalidArgumentError: an empty target.
        InvalidTypeError: string targets without a tokenizer.
    """

    name = "target log-probability"

    def __init__(self, targets: Tokens | Sequence[Tokens], tokenizer: Any = None) -> None:
        self.shared, self.targets = _encode(targets, tokenizer)

    @property
    def samples(self) -> int | None:
        """Number of samples that it has targets for; None: any."""
        return None if self.shared else len(self.targets)

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """Append each row's target to its prompt; see `Metric`."""
        rows = len(batch["input_ids"])
        if not self.shared and first + rows > len(self.targets):
            raise InvalidArgumentError(
                f"{len(self.targets)} targets, but the data has more than {first + rows - 1} samples"
            )
        targets = self.targets * rows if self.shared else self.targets[first : first + rows]
        return _append(batch, targets)

    def score(self, logits: torch.Tensor, scored: Scored) -> torch.Tensor:
        """Mean over the target's tokens; see `Metric`."""
        copies = len(logits) // len(scored.tokens)
        tokens, weight = scored.tokens.repeat(copies, 1), scored.weight.repeat(copies, 1)
        logprob = logits.float().log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
        return (logprob * weight).sum(1) / weight.sum(1)


class target_prob(target_logprob):  # noqa: N801
    """Length-normalised target probability, `(prod_i p_i)^(1/n)`, teacher-forced; computed in log space.

    The metric of backdoor attribution (BAHA): ACIE is its mean change over samples. Arguments as for `target_logprob`.
    """

    name = "target probability"

    def score(self, logits: torch.Tensor, scored: Scored) -> torch.Tensor:
        """Geometric mean over the target's tokens; see `Metric`."""
        return super().score(logits, scored).exp()


class logit_diff:  # noqa: N801
    """Logit of one token minus logit of another at the last prompt token.

    Args:
        right: token id, or one for each sample.
        wrong: likewise.
    """

    name = "logit difference"

    def __init__(self, right: int | Sequence[int], wrong: int | Sequence[int]) -> None:
        self.right, self.wrong = ([t] if isinstance(t, int) else [int(i) for i in t] for t in (right, wrong))
        if not self.right or not self.wrong:
            raise InvalidArgumentError("logit_diff needs at least one token on each side")

    @property
    def samples(self) -> int | None:
        """Number of samples that it has tokens for; None: any."""
        most = max(len(self.right), len(self.wrong))
        return None if most == 1 else most

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """The prompts as they are; see `Metric`."""
        rows = len(batch["input_ids"])
        pair = [t * rows if len(t) == 1 else t[first : first + rows] for t in (self.right, self.wrong)]
        if any(len(t) != rows for t in pair):
            raise InvalidArgumentError(f"logit_diff has too few tokens for samples {first} to {first + rows - 1}")
        read = prompt_ends(batch)[1][:, None].expand(rows, 2)
        tokens = torch.tensor(pair, device=read.device).T
        return Scored(dict(batch), read, tokens, torch.ones_like(tokens, dtype=torch.float32))

    def score(self, logits: torch.Tensor, scored: Scored) -> torch.Tensor:
        """See `Metric`."""
        tokens = scored.tokens.repeat(len(logits) // len(scored.tokens), 1)
        picked = logits.float().gather(-1, tokens[..., None]).squeeze(-1)
        return picked[:, 0] - picked[:, 1]


def _encode(targets: Tokens | Sequence[Tokens], tokenizer: Any) -> tuple[bool, list[list[int]]]:
    """(one target for all samples, the targets as token ids)."""
    if isinstance(targets, torch.Tensor):
        targets = targets.tolist()
    shared = isinstance(targets, str) or (len(targets) > 0 and isinstance(targets[0], int))
    encoded = []
    for i, target in enumerate([targets] if shared else targets):
        if isinstance(target, str):
            if tokenizer is None:
                raise InvalidTypeError("targets are strings: pass tokenizer= or give token ids")
            target = tokenizer(target, add_special_tokens=False)["input_ids"]
        ids = [int(token) for token in target]
        if not ids:
            raise InvalidArgumentError(f"target {i} is empty; a target needs at least one token")
        encoded.append(ids)
    if not encoded:
        raise InvalidArgumentError("no targets were given")
    return shared, encoded


def _append(batch: dict[str, torch.Tensor], targets: list[list[int]]) -> Scored:
    """Put each row's target right after its prompt, whichever side the prompt is padded on."""
    types = batch.get("token_type_ids")
    ignored = {"token_type_ids"} if types is not None and not types.any() else set()  # all zero is the default
    if odd := sorted(set(batch) - {"input_ids", "attention_mask", *ignored}):
        raise InvalidArgumentError(f"teacher forcing extends input_ids and attention_mask; it cannot extend {odd}")
    ids = batch["input_ids"]
    begin, end = (x.tolist() for x in prompt_ends(batch))
    rows, longest = len(ids), max(len(target) for target in targets)
    width = max(end[row] + 1 + len(target) for row, target in enumerate(targets))
    new, mask = ids.new_zeros(rows, width), torch.zeros(rows, width, dtype=torch.long, device=ids.device)
    read, tokens = (torch.zeros(rows, longest, dtype=torch.long, device=ids.device) for _ in range(2))
    weight = torch.zeros(rows, longest, device=ids.device)
    for row, target in enumerate(targets):
        n, start = len(target), end[row] + 1
        new[row, :start] = ids[row, :start]
        new[row, start : start + n] = torch.tensor(target, device=ids.device)
        mask[row, begin[row] : start + n] = 1
        read[row, :n] = torch.arange(start - 1, start + n - 1, device=ids.device)
        tokens[row, :n] = new[row, start : start + n]
        weight[row, :n] = 1
    return Scored({"input_ids": new, "attention_mask": mask}, read, tokens, weight)
