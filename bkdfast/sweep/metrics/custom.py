"""A user's function of logits as a metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.sweep.metrics.base import Metric, Scored, accumulation
from bkdfast.sweep.metrics.inputs import Tokens, extend, reading


class custom(Metric):  # noqa: N801
    """A metric from a function: logits `[R, n, vocab]` of some rows in, one number a row `[R]` out.

    The function sees float32 logits (float64 of a float64 model) at the columns read, some rows at a time, in any
    order, rows of many edits mixed; so it must treat each row by itself. It never sees padding: rows that read a
    different number of columns come in separate calls.

    Args:
        function: `function(logits) -> values`, or with `per_sample` `function(logits, sample) -> values`.
        read: which columns: `"last_prompt"` (n = 1), `"prompt"` (every prompt token) or `"target"` (where the
            target's tokens are predicted, teacher-forced).
        targets: for `read="target"`, as for `target_logprob`.
        tokenizer: encodes string targets.
        per_sample: also give the function `sample [R]` int64, each row's sample number in the data, to look up what
            it knows of it.
        name: what tables call it; None: the function's name.

    Raises:
        InvalidArgumentError: `read` is none of the three, targets missing or not read; when scoring: the function
            returns another shape.
        InvalidTypeError: `function` cannot be called, or returns no tensor.

    Example:
        >>> import torch
        >>> def entropy(logits):
        ...     return torch.distributions.Categorical(logits=logits[:, -1]).entropy()
        >>> metric = custom(entropy)
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> metric.name, metric.score(torch.zeros(1, 1, 4), scored)
        ('entropy', tensor([1.3863]))
    """

    whole_rows = True
    needs_head = False

    def __init__(
        self,
        function: Callable[..., torch.Tensor],
        read: str = "last_prompt",
        *,
        targets: Tokens | Sequence[Tokens] | None = None,
        tokenizer: Any = None,
        per_sample: bool = False,
        name: str | None = None,
    ) -> None:
        if not callable(function):
            raise InvalidTypeError(f"custom needs a function of logits [R, n, vocab], got {type(function).__name__}")
        called = getattr(function, "__name__", type(function).__name__)
        super().__init__(name=name or ("custom" if called == "<lambda>" else called))
        self.function, self.per_sample = function, per_sample
        self.read, self.targets = reading(read, targets, tokenizer, "read")

    @property
    def samples(self) -> int | None:
        """Number of samples that it has targets for; None: any."""
        return None if self.targets is None else self.targets.samples

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """The prompts, followed by targets where those are read; `tokens` holds sample numbers. See `Metric`."""
        scored = extend(self.read, self.targets, batch, first)
        sample = torch.arange(first, first + len(scored.read), device=scored.read.device)
        return replace(scored, tokens=sample[:, None].expand_as(scored.read).contiguous())

    def score_rows(self, logits: torch.Tensor, scored: Scored, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The function on rows of equal length; see `Metric`."""
        if rows is None:
            rows = torch.arange(len(logits), device=logits.device) % len(scored.read)
        length = (scored.weight != 0).sum(1).to(logits.device)[rows]  # [R]
        sample = scored.tokens[:, 0].to(logits.device)[rows]
        dtype = accumulation(logits.dtype)
        values = torch.empty(len(logits), dtype=dtype, device=logits.device)
        for n in length.unique().tolist():
            mine = length == n
            part = logits[mine, :n].to(dtype)
            found = self.function(part, sample[mine]) if self.per_sample else self.function(part)
            if not isinstance(found, torch.Tensor):
                raise InvalidTypeError(
                    f"the function of metric {self.name!r} returned {type(found).__name__}; expected a tensor [R]"
                )
            if found.shape != (len(part),):
                raise InvalidArgumentError(
                    f"the function of metric {self.name!r} returned shape {tuple(found.shape)} for logits of shape "
                    f"{tuple(part.shape)}; expected one number a row, ({len(part)},)"
                )
            values[mine] = found.to(values)
        return values
