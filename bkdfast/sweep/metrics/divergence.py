"""Distances of the whole next-token distribution from a reference: Kullback-Leibler and Jensen-Shannon divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, NonFiniteError
from bkdfast.hf.batch import call, complete
from bkdfast.hf.families import describe, unwrap
from bkdfast.hf.prepare import refuse_dropout
from bkdfast.hf.spec import submodule
from bkdfast.sweep.metrics.base import Metric, Scored, log_probs
from bkdfast.sweep.metrics.inputs import Tokens, extend, reading


class _Divergence(Metric):
    """A metric that compares distributions with those of a reference run at the same inputs."""

    needs_base = True

    def __init__(
        self,
        over: str = "last_prompt",
        *,
        targets: Tokens | Sequence[Tokens] | None = None,
        tokenizer: Any = None,
        reference: torch.nn.Module | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.over, self.targets = reading(over, targets, tokenizer)
        self.reference = reference

    @property
    def samples(self) -> int | None:
        """Number of samples that it has targets for; None: any."""
        return None if self.targets is None else self.targets.samples

    def extend(self, batch: dict[str, torch.Tensor], first: int) -> Scored:
        """The prompts, followed by targets where those are read; see `Metric`."""
        return extend(self.over, self.targets, batch, first)

    def begin(self, logits: torch.Tensor, scored: Scored) -> torch.Tensor:
        """Keep the reference's logits `[B * n, vocab]`; see `Metric`.

        Raises:
            InvalidArgumentError: the reference model has another vocabulary.
            NonFiniteError: NaN or +infinity in the reference's logits.
        """
        who = "unedited model"
        if self.reference is not None:
            who = "reference model"
            wanted = logits.shape
            logits = _logits_at(self.reference, scored).flatten(0, 1).to(logits.device)
            if logits.shape != wanted:
                raise InvalidArgumentError(
                    f"{self.name}: the reference model has a vocabulary of {logits.shape[-1]} tokens, this one of "
                    f"{wanted[-1]}; distributions over different tokens cannot be compared"
                )
        bad = ~torch.isfinite(logits.amax(-1)) & (scored.weight.flatten().to(logits.device) != 0)
        if bad.any():
            row, j = divmod(int(bad.int().argmax()), scored.read.shape[1])
            raise NonFiniteError(
                f"{self.name}: the {who}'s logits of row {row} of the batch, column {int(scored.read[row, j])}, are "
                "not finite (NaN or infinite); check the weights and the dtype"
            )
        return logits.detach()

    def token(self, logits: torch.Tensor, index: torch.Tensor, scored: Scored, state: Any) -> torch.Tensor:
        """The divergence at each read column; see `Metric`."""
        return self.between(log_probs(state[index]), log_probs(logits))

    def between(self, reference: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        """`[C]` from log-probabilities `[C, vocab]`."""
        raise NotImplementedError


class kl(_Divergence):  # noqa: N801
    """Kullback-Leibler divergence of the edited model's next-token distribution from a reference's, in nats.

    `KL(P || Q) = sum_v P_v (ln P_v - ln Q_v)` with P the reference and Q the edited model; `reverse=True` exchanges
    them. Mean over the read columns. Of the unedited model from itself it is 0, so effects are the divergences
    themselves. Summed as `P (x + e^-x - 1)` with x = ln P - ln Q, which is never negative and keeps small divergences
    that rounding drowns in the plain sum.

    Args:
        over: which columns: `"last_prompt"`, `"prompt"` (every prompt token) or `"target"` (where the target's tokens
            are predicted, teacher-forced).
        targets: for `over="target"`, as for `target_logprob`.
        tokenizer: encodes string targets.
        reference: another model of the same vocabulary, run on the same inputs; None: the unedited model.
        reverse: KL(edited || reference) in place of KL(reference || edited).
        name: what tables call it.

    Raises:
        InvalidArgumentError: `over` is none of the three, targets missing or not read, another vocabulary.
        NonFiniteError: NaN in the reference's logits.

    Memory: keeps B * n * vocab logits of the reference, in their dtype.

    Source: Kullback and Leibler 1951; as a patching metric: Conmy et al. 2023 (ACDC).

    Example:
        >>> import torch
        >>> metric = kl()
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> state = metric.begin(torch.zeros(1, 2), scored)  # unedited: one half each
        >>> metric.score(torch.tensor([[[0.75, 0.25]]]).log(), scored, state)  # ln(4 / 3) / 2
        tensor([0.1438])
    """

    name = "KL divergence"

    def __init__(
        self,
        over: str = "last_prompt",
        *,
        targets: Tokens | Sequence[Tokens] | None = None,
        tokenizer: Any = None,
        reference: torch.nn.Module | None = None,
        reverse: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(over, targets=targets, tokenizer=tokenizer, reference=reference, name=name)
        self.reverse = reverse

    def between(self, reference: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        """KL(reference || edited), or the reverse."""
        return _kl(ours, reference) if self.reverse else _kl(reference, ours)


class js(_Divergence):  # noqa: N801
    """Jensen-Shannon divergence of the edited model's next-token distribution and a reference's, in nats.

    `JS(P, Q) = (KL(P || M) + KL(Q || M)) / 2` with `M = (P + Q) / 2`: symmetric, finite, at most ln 2. Mean over the
    read columns. Arguments, errors and memory as for `kl`, without `reverse`.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy".

    Example:
        >>> import torch
        >>> metric = js()
        >>> scored = metric.extend({"input_ids": torch.ones(1, 5, dtype=torch.long)}, 0)
        >>> state = metric.begin(torch.tensor([[0.0, -torch.inf]]), scored)
        >>> metric.score(torch.tensor([[[-torch.inf, 0.0]]]), scored, state)  # nothing in common: ln 2
        tensor([0.6931])
    """

    name = "JS divergence"

    def between(self, reference: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
        """JS of the two."""
        middle = torch.logaddexp(reference, ours) - math.log(2)
        return (_kl(reference, middle) + _kl(ours, middle)) / 2


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`[C]`, KL(P || Q) of log-probabilities `[C, vocab]`."""
    x = p - q
    # P and Q both sum to 1, so the terms -P + Q add nothing; with them every term is >= 0. For large |x| they do not
    # cancel and e^-x may overflow. Tokens that P excludes (-inf) contribute Q alone, those that only Q excludes inf.
    near = p.exp() * (x + torch.expm1(-x.clamp(-1, 1)))
    far = torch.where(p == -torch.inf, 0.0, p.exp() * x) - p.exp() + q.exp()
    return torch.where(x.abs() < 0.5, near, far).sum(-1)


def _logits_at(model: torch.nn.Module, scored: Scored) -> torch.Tensor:
    """Logits `[B, n, vocab]` of another model at the read columns."""
    model = unwrap(model)
    refuse_dropout(model)
    spec = describe(model)
    batch = complete(model, {k: v for k, v in scored.batch.items() if k != "position_ids"}, spec)
    read = scored.read.to(batch["input_ids"].device)
    rows = torch.arange(len(read), device=read.device)[:, None]
    with torch.no_grad():
        if spec.unembedding is None:
            return call(model, batch)[rows, read]
        handle = submodule(model, spec.unembedding).register_forward_pre_hook(
            lambda module, args: (args[0][rows.to(args[0].device), read.to(args[0].device)], *args[1:])
        )
        try:
            return call(model, batch)
        finally:
            handle.remove()
