"""Metrics of given tokens: probability, log-probability, loss, accuracy, logit difference and rank.

Each reads single entries of a logits row and its normaliser. Logits of half precision are normalised in float32, those
of float64 in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.sweep.metrics.base import Metric, Scored, accumulation, log_probs, pick
from bkdfast.sweep.metrics.inputs import PerSample, Targets, Tokens, append, last_prompt, prompt_tokens

Token = int | str | Sequence[int] | Sequence[str] | torch.Tensor


class _OfTokens(Metric):
    """A metric of targets that follow the prompt, or (no targets) of the prompt's own tokens."""

    def __init__(
        self, targets: Tokens | Sequence[Tokens] | None, tokenizer: Any = None, *, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.targets = None if targets is None else Targets(targets, tokenizer)
        self.needs_causal = targets is None

    @property
    def samples(self) -> int | None:
        """Number of samples that it has targets for; None: any."""
        return None if self.targets is None else self.targets.samples

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """Append each row's target to its prompt, or read the prompt itself; see `Metric`."""
        if self.targets is None:
            return prompt_tokens(batch, scored_by_next=True)
        return append(batch, self.targets.rows(first, len(batch["input_ids"])))

    def asked(self, vocab: int, index: torch.Tensor, scored: Scored) -> torch.Tensor:
        """`[C]`, the tokens that `index` asks for, all in the vocabulary (of the prompt's own: see `pick`)."""
        if self.targets is not None:
            self.check_vocabulary(self.targets.highest, vocab)
        return scored.tokens.flatten()[index]

    def logprob(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored) -> torch.Tensor:
        """`[C]`, log-probability of the token that follows each read column."""
        return pick(log_probs(logits), self.asked(logits.shape[-1], index, scored))


class target_logprob(_OfTokens):  # noqa: N801  named as it is called
    """Mean log-probability of the target's tokens, teacher-forced, in nats: `1/n sum_i ln p(t_i | prompt, t_<i)`.

    Args:
        targets: one target for all samples, or one for each: token ids (append the closing tokens that count), or
            strings with `tokenizer`.
        tokenizer: encodes string targets (without special tokens).
        name: what tables call it, where one sweep has several.

    Raises:
        InvalidArgumentError: an empty target, a negative token; when scoring: a token that is not in the vocabulary.
        InvalidTypeError: string targets without a tokenizer, tokens that are not integers.

    Example:
        >>> import torch
        >>> metric = target_logprob([3, 1])
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> metric.score(torch.zeros(1, 2, 4), scored).exp()
        tensor([0.2500])
    """

    name = "target log-probability"

    def __init__(self, targets: Tokens | Sequence[Tokens], tokenizer: Any = None, *, name: str | None = None) -> None:
        super().__init__(targets, tokenizer, name=name)

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """Log-probability of each token; see `Metric`."""
        return self.logprob(logits, index, scored)


class target_prob(target_logprob):  # noqa: N801
    """Length-normalised target probability, `(prod_i p_i)^(1/n)`, teacher-forced; computed in log space.

    The metric of backdoor attribution (BAHA): ACIE is its mean change over samples. The published code multiplies the
    probabilities, which underflows (150 tokens at 0.5 are 0 in float32). Arguments and errors as for `target_logprob`.
    """

    name = "target probability"

    def reduce(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Geometric mean over the target's tokens; see `Metric`."""
        return super().reduce(values, weight).exp()


class loss(_OfTokens):  # noqa: N801
    """Cross-entropy per token in nats: of targets, or of the prompt's own tokens (next-token loss).

    `-1/n sum_i ln p(t_i | everything before)`. Without targets, t is the prompt from its second token on, so a prompt
    needs two; this is what a language model is trained on, and refused for attention that looks ahead.

    Args:
        targets: as for `target_logprob`; None: the prompt's own tokens.
        tokenizer: encodes string targets.
        name: what tables call it.

    Raises:
        InvalidArgumentError: as for `target_logprob`; a prompt of one token and no targets.
        InvalidTypeError: as for `target_logprob`.

    Example:
        >>> import torch
        >>> metric = loss()
        >>> scored = metric.extend({"input_ids": torch.tensor([[3, 1, 2]])}, 0)
        >>> scored.read.tolist(), scored.tokens.tolist()
        ([[0, 1]], [[1, 2]])
        >>> metric.score(torch.zeros(1, 2, 4), scored)  # ln 4
        tensor([1.3863])
    """

    name = "loss"

    def __init__(
        self, targets: Tokens | Sequence[Tokens] | None = None, tokenizer: Any = None, *, name: str | None = None
    ) -> None:
        super().__init__(targets, tokenizer, name=name)

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """Cross-entropy of each token; see `Metric`."""
        return -self.logprob(logits, index, scored)


class accuracy(_OfTokens):  # noqa: N801
    """Share of tokens that greedy decoding gets right, `1/n sum_i [argmax = t_i]`, teacher-forced.

    With `exact`, 1 where all tokens of a sample are right (then greedy decoding writes exactly the target), else 0.
    Of tied logits the one with the lowest id counts, as in `torch.argmax`; half precision does tie.

    Args:
        targets: as for `target_logprob`; None: the prompt's own tokens, as for `loss`.
        tokenizer: encodes string targets.
        exact: all tokens or nothing.
        name: what tables call it.

    Raises:
        InvalidArgumentError: as for `loss`.
        InvalidTypeError: as for `target_logprob`.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]])
        >>> scored = accuracy([1, 2]).extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> accuracy([1, 2]).score(logits, scored), accuracy([1, 2], exact=True).score(logits, scored)
        (tensor([0.5000]), tensor([0.]))
    """

    discrete = True
    name = "accuracy"

    def __init__(
        self,
        targets: Tokens | Sequence[Tokens] | None = None,
        tokenizer: Any = None,
        *,
        exact: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(targets, tokenizer, name=name or ("exact match" if exact else None))
        self.exact = exact

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """1 for each token that is the argmax, else 0 (NaN for NaN logits); see `Metric`."""
        best, where = logits.max(-1)
        right = (where == self.asked(logits.shape[-1], index, scored)).to(accumulation(logits.dtype))
        return right.where(~best.isnan(), torch.nan)

    def reduce(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Share of right tokens, or whether all are right; see `Metric`."""
        if self.exact:
            return values.where(weight != 0, 1.0).prod(1)
        return super().reduce(values, weight)


class logit_diff(Metric):  # noqa: N801
    """Logit of one token minus logit of another at the last prompt token.

    Args:
        right: a token id (or a string of one token, with `tokenizer`) for all samples, or one for each.
        wrong: likewise.
        tokenizer: encodes strings (without special tokens).
        name: what tables call it.

    Raises:
        InvalidArgumentError: an empty list, a string of several tokens, lists of different length; when scoring: a
            token that is not in the vocabulary.
        InvalidTypeError: strings without a tokenizer, tokens that are not integers.

    Source: the metric of activation patching in Wang et al. 2022, "Interpretability in the Wild".

    Example:
        >>> import torch
        >>> metric = logit_diff(2, 0)
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> metric.score(torch.tensor([[[1.0, 0.0, 4.0]]]), scored)
        tensor([3.])
    """

    name = "logit difference"

    def __init__(self, right: Token, wrong: Token, tokenizer: Any = None, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.right, self.wrong = PerSample(right, tokenizer), PerSample(wrong, tokenizer)
        given = {s for s in (self.right.samples, self.wrong.samples) if s is not None}
        if len(given) > 1:
            raise InvalidArgumentError(
                f"{self.name}: {self.right.samples} right tokens but {self.wrong.samples} wrong ones; give one of each "
                "for every sample, or one for all"
            )

    @property
    def samples(self) -> int | None:
        """Number of samples that it has tokens for; None: any."""
        return self.right.samples or self.wrong.samples

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """The prompts as they are, `tokens [B, 1, 2]` right and wrong; see `Metric`."""
        rows = len(batch["input_ids"])
        return last_prompt(batch, list(zip(self.right.rows(first, rows), self.wrong.rows(first, rows), strict=True)))

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """The difference; see `Metric`."""
        self.check_vocabulary(max(self.right.highest, self.wrong.highest), logits.shape[-1])
        both = logits.gather(-1, scored.tokens.flatten(0, 1)[index]).to(accumulation(logits.dtype))
        return both[:, 0] - both[:, 1]


class rank(Metric):  # noqa: N801
    """Rank of a token among the vocabulary at the last prompt token: 0 for the highest logit.

    The number of tokens with a higher logit, or with the same logit and a lower id: 0 exactly where the token is the
    argmax. Half precision does tie; a constant row gives every token its id.

    Args:
        token: a token id (or a string of one token, with `tokenizer`) for all samples, or one for each.
        tokenizer: encodes strings (without special tokens).
        name: what tables call it.

    Raises:
        InvalidArgumentError: an empty list, a string of several tokens; when scoring: a token that is not in the
            vocabulary.
        InvalidTypeError: strings without a tokenizer, tokens that are not integers.

    Example:
        >>> import torch
        >>> metric = rank(2)
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> metric.score(torch.tensor([[[7.0, 5.0, 5.0, 1.0]]]), scored)
        tensor([2.])
    """

    discrete = True
    name = "rank"

    def __init__(self, token: Token, tokenizer: Any = None, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.tokens = PerSample(token, tokenizer)

    @property
    def samples(self) -> int | None:
        """Number of samples that it has tokens for; None: any."""
        return self.tokens.samples

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """The prompts as they are; see `Metric`."""
        return last_prompt(batch, self.tokens.rows(first, len(batch["input_ids"])))

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """The rank (NaN for NaN logits); see `Metric`."""
        vocab = logits.shape[-1]
        self.check_vocabulary(self.tokens.highest, vocab)
        asked = scored.tokens.flatten()[index][:, None]  # [C, 1]
        own = logits.gather(-1, asked)
        lower = torch.arange(vocab, device=logits.device) < asked
        ahead = ((logits > own) | ((logits == own) & lower)).sum(-1).to(accumulation(logits.dtype))
        return ahead.where(~logits.amax(-1).isnan(), torch.nan)
