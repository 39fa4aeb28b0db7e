"""Logits where a metric looks, and only there: never `[rows, tokens, vocab]`, and in chunks where even that is much."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import call
from bkdfast.hf.prefix import stub
from bkdfast.hf.spec import ModelSpec, submodule

LIMIT = 1 << 26
"""Most logits held at a time."""


def read_logits(
    model: torch.nn.Module,
    spec: ModelSpec,
    inputs: dict[str, Any],
    rows: torch.Tensor,
    columns: torch.Tensor,
    *,
    multiple: int = 1,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Run `model(**inputs)` and yield its logits at (row, column) pairs, a chunk of pairs at a time.

    Args:
        model: the model; its own head makes the logits (soft caps and scales included).
        spec: where its unembedding is.
        inputs: what the model is called with, `input_ids [R, T]` among it.
        rows: `[C]` int64.
        columns: `[C]` int64.
        multiple: a chunk is a multiple of so many pairs.

    Yields:
        Slice of the pairs, and their logits `[c, vocab]`.

    Raises:
        InvalidArgumentError: the model's output is not one row of logits a token.
    """
    shape = inputs["input_ids"].shape
    if spec.unembedding is None:
        yield slice(0, len(rows)), _pick(call(model, inputs), shape, rows, columns)
        return
    head = submodule(model, spec.unembedding)
    vocab = getattr(head, "out_features", None) or 1
    size = max(LIMIT // vocab // multiple, 1) * multiple
    whole = len(rows) <= size or not spec.entry
    entry = submodule(model, spec.entry)
    found: dict[str, Any] = {}

    def gather(module: torch.nn.Module, args: tuple):
        hidden = found["hidden"] = _pick(args[0], shape, rows, columns)
        return (hidden[None] if whole else hidden[None, :1], *args[1:])

    def keep(module: torch.nn.Module, args: tuple, output: Any) -> None:
        found["output"] = output

    with _hooks(head.register_forward_pre_hook(gather), entry.register_forward_hook(keep)):
        logits = call(model, inputs)[0]
    if whole:
        yield slice(0, len(rows)), logits
        return
    # The rest of the model stays away: only its head runs, on one chunk of the residual stream after the other.
    output = found["output"]
    for start in range(0, len(rows), size):
        piece = slice(start, min(start + size, len(rows)))
        hidden = found["hidden"][None, piece]
        made = (hidden, *output[1:]) if isinstance(output, tuple) else type(output)(hidden)
        with stub(entry, lambda *args, made=made, **kwargs: made):
            logits = call(model, inputs)[0]
        yield piece, logits


def _pick(hidden: torch.Tensor, shape: torch.Size, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if hidden.dim() != 3 or hidden.shape[:2] != shape:
        raise InvalidArgumentError(
            f"the metric reads logits of every token, {[*shape, 'vocab']}, but this model returns "
            f"{tuple(hidden.shape)}; it needs a head that scores each token, and no logits_to_keep"
        )
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]


@contextlib.contextmanager
def _hooks(*handles) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
