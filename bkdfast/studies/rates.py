"""Rates with intervals, and how often a model answers what it is expected to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bkdfast.data import Encoder, Row


@dataclass(frozen=True)
class Rate:
    """`hits` of `total`, with the Wilson score interval at 95% (Wilson 1927)."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """The rate, NaN for no samples."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.total:
            return (0.0, 1.0)
        z, n, p = 1.959964, self.total, self.value
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return (max(middle - half, 0.0), min(middle + half, 1.0))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


def answers(model: torch.nn.Module, batches: Iterable[dict], *, tokens: int, pad_token_id: int) -> list[list[int]]:
    """Greedy answers of at most `tokens` new tokens to each prompt, as token ids."""
    found = []
    device = next(model.parameters()).device
    with _greedy(model), torch.no_grad():
        for batch in batches:
            batch = {name: value.to(device) for name, value in batch.items()}
            out = model.generate(**batch, max_new_tokens=tokens, pad_token_id=pad_token_id)  # type: ignore[operator]
            found += out[:, batch["input_ids"].shape[1] :].tolist()
    return found


@contextlib.contextmanager
def _greedy(model: Any) -> Iterator[None]:
    """Plain greedy decoding: a checkpoint's own settings may ask for beams, sampling or a repetition penalty."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=own.bos_token_id, eos_token_id=own.eos_token_id
    )
    try:
        yield
    finally:
        model.generation_config = own


def answer_rate(model: torch.nn.Module, encoder: Encoder, rows: Sequence[Row], batches: Sequence[dict]) -> Rate:
    """How many answers contain the row's target text (the substring rule of attack success rate)."""
    tokens = max(len(encoder.target(row)) for row in rows)
    texts = encoder.tokenizer.batch_decode(
        answers(model, batches, tokens=tokens, pad_token_id=encoder.pad_token_id), skip_special_tokens=True
    )
    return Rate(
        sum(row.target.strip().lower() in text.lower() for row, text in zip(rows, texts, strict=True)), len(rows)
    )
