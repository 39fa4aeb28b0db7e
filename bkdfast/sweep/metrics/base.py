"""What every metric has in common: `Scored`, a batch ready for a metric, and the base class `Metric`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError

CHUNK_ELEMENTS = 1 << 22
"""Logits that `Metric.score` works on at a time (16 MB in float32), so that its temporaries stay small."""


@dataclass(frozen=True)
class Scored:
    """A batch ready for a metric.

    Attributes:
        batch: model inputs `[B, T']`, prompts followed by what the metric needs to see.
        read: `[B, n]` int64, columns of the logits that the metric reads; never a padding column.
        tokens: `[B, n]` int64, the token each of them predicts (0 where `weight` is 0), or `[B, n, ...]` where a
            metric needs more than one.
        weight: `[B, n]` float32, 0 where a row reads fewer than n columns (always at its end).
    """

    batch: dict[str, torch.Tensor]
    read: torch.Tensor
    tokens: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device | str) -> Scored:
        """The same on `device`."""
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.batch.items()}
        return replace(
            self,
            batch=batch,
            read=self.read.to(device),
            tokens=self.tokens.to(device),
            weight=self.weight.to(device),
        )


class Metric:
    """Base class of metrics: subclass it and write `extend` and `token`.

    A sweep calls `extend` once a batch and `begin` once a base run; then `token` on chunks of the logits at the read
    columns, with rows of many variants mixed, and `reduce` on the values of a variant's row.

    Attributes:
        name: what tables and plots call it; unique within one sweep (every metric takes `name=`).
        needs_base: `begin` wants the unedited model's logits.
        needs_causal: it scores the prompt's own tokens, which attention that looks ahead has seen.
        needs_head: it reads logits of vocabulary tokens; a model without a language-model head will not do.
        discrete: values are counts or ranks, which rounding can move by a whole step.
        whole_rows: `score_rows` takes the place of `token` and `reduce`.
    """

    name: str = "metric"
    needs_base: bool = False
    needs_causal: bool = False
    needs_head: bool = True
    discrete: bool = False
    whole_rows: bool = False

    def __init__(self, *, name: str | None = None) -> None:
        if name is not None:
            self.name = name

    @property
    def samples(self) -> int | None:
        """Number of samples that it has targets for; None: any."""
        return None

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """Inputs for a batch of prompts whose first row is sample number `first` of the data."""
        raise NotImplementedError

    def begin(self, logits: torch.Tensor, scored: Scored) -> Any:
        """State for one batch from the unedited model's logits `[B * n, vocab]`, row b * n + j for `read[b, j]`.

        Called only where `needs_base`. It may keep the tensor, which the caller must not change afterwards.
        """
        return None

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """Values `[C]` of the read columns `index [C]` (b * n + j; any order, repeats allowed).

        Args:
            logits: `[C, vocab]` of any float dtype; not changed.
            index: `[C]` int64, which read column each row of logits belongs to.
            scored: the batch.
            state: what `begin` returned.

        Returns:
            `[C]` float32, float64 for float64 logits.
        """
        raise NotImplementedError

    def reduce(self, values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """One number a row, `[R]`, from values and weights `[R, n]`: here the weighted mean."""
        # where: a column of no weight may hold anything, NaN too
        return (values.where(weight != 0, 0.0) * weight).sum(1) / weight.sum(1)

    def score(self, logits: torch.Tensor, scored: Scored, state: Any = None) -> torch.Tensor:
        """All at once: `[R]` from logits `[R, n, vocab]` at the read columns.

        Args:
            logits: R is a multiple of the batch's rows B: copies of the batch, one after the other.
            scored: the batch.
            state: what `begin` returned, for metrics that compare with the unedited model.

        Raises:
            InvalidArgumentError: logits of another shape, a target token that the vocabulary does not have, no `state`
                where it is needed.
        """
        rows, n = scored.read.shape
        if logits.dim() != 3 or logits.shape[1] != n or not len(logits) or len(logits) % rows:
            raise InvalidArgumentError(
                f"{self.name}: logits have shape {tuple(logits.shape)}; expected [R, {n}, vocab] with R a multiple of "
                f"the batch's {rows} rows"
            )
        scored = scored.to(logits.device)
        if self.whole_rows:
            return self.score_rows(logits, scored)
        if self.needs_base and state is None:
            raise InvalidArgumentError(
                f"{self.name} compares with the unedited model: pass state=metric.begin(base_logits, scored)"
            )
        flat = logits.flatten(0, 1)
        index = torch.arange(len(flat), device=flat.device) % (rows * n)
        step = max(1, CHUNK_ELEMENTS // max(flat.shape[1], 1))
        parts = [self.token(flat[i : i + step], index[i : i + step], scored, state) for i in range(0, len(flat), step)]
        return self.reduce(torch.cat(parts).view(-1, n), scored.weight.repeat(len(logits) // rows, 1))

    def score_rows(self, logits: torch.Tensor, scored: Scored, rows: torch.Tensor | None = None) -> torch.Tensor:
        """`[R]` from whole rows of logits `[R, n, vocab]`, for metrics with `whole_rows`.

        Args:
            logits: at the read columns.
            scored: the batch.
            rows: `[R]` int64, the batch row each belongs to; None: copies of the batch, one after the other.
        """
        raise NotImplementedError

    def check_vocabulary(self, highest: int, vocab: int) -> None:
        """Raise if the highest token that the metric asks for is not in the vocabulary."""
        if highest >= vocab:
            raise InvalidArgumentError(
                f"{self.name} has token {highest} in its targets, but the model's vocabulary has {vocab} tokens; were "
                "they encoded with another model's tokenizer?"
            )


def log_probs(logits: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of logits `[..., vocab]`, in float32 (float64 stays)."""
    return logits.log_softmax(-1, dtype=accumulation(logits.dtype))


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype that metrics of logits of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pick(values: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`[C]`, entry `tokens[c]` of each row of values `[C, vocab]`; NaN where there is no such token."""
    vocab = values.shape[-1]
    # Without the clamp a prompt token that the unembedding lacks would end the process's CUDA context.
    found = values.gather(-1, tokens.clamp(max=vocab - 1)[:, None]).squeeze(-1)
    return found.where(tokens < vocab, torch.nan)
