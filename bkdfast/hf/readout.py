"""Logits where a metric looks, and only there: never `[rows, tokens, vocab]`, and in chunks where even that is much."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import call
from bkdfast.hf.prefix import first, stub
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
    if not spec.entry:  # a module of the user's: its unembedding gets all rows at once
        picked = lambda module, args: (_pick(args[0], shape, rows, columns)[None], *args[1:])  # noqa: E731
        with head.register_forward_pre_hook(picked):
            logits = call(model, inputs)[0]
        yield slice(0, len(rows)), logits
        return
    entry = submodule(model, spec.entry)
    kept: list[Any] = []

    def gather(module: torch.nn.Module, args: tuple, output: Any) -> Any:
        kept[:] = [output, _pick(first(output), shape, rows, columns)[None]]
        return _with_first(output, kept[1][:, :size])

    # What comes after `entry` (in BERT more than the unembedding) treats every token by itself.
    with entry.register_forward_hook(gather):
        logits = call(model, inputs)[0]
    output, hidden = kept
    yield slice(0, min(size, len(rows))), logits
    for start in range(size, len(rows), size):
        made = _with_first(output, hidden[:, start : start + size])
        with stub(entry, lambda *args, made=made, **kwargs: made):
            logits = call(model, inputs)[0]
        yield slice(start, min(start + size, len(rows))), logits


def _with_first(output: Any, value: torch.Tensor) -> Any:
    """A module's output with another first entry."""
    if isinstance(output, torch.Tensor):
        return value
    if isinstance(output, tuple):
        return (value, *output[1:])
    return type(output)(**{**output, next(iter(output)): value})


def _pick(hidden: torch.Tensor, shape: torch.Size, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    if hidden.dim() != 3 or hidden.shape[:2] != shape:
        raise InvalidArgumentError(
            f"the metric reads logits of every token, {[*shape, 'vocab']}, but this model returns "
            f"{tuple(hidden.shape)}; it needs a head that scores each token, and no logits_to_keep"
        )
    return hidden[rows.to(hidden.device), columns.to(hidden.device)]
