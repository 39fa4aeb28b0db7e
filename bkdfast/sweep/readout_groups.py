"""Which metrics of one sweep can be read off the same run.

Metrics that append different targets need runs of their own. In a causal model a metric whose inputs are the beginning
of another's (the prompt alone, a shorter target) reads the same numbers from the longer run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf.positions import prompt_ends
from bkdfast.sweep.metrics.base import Metric, Scored


@dataclass(frozen=True)
class ReadGroup:
    """Metrics that share a run.

    Attributes:
        batch: the inputs that they share, `[B, T']`.
        members: numbers of the metrics, ascending.
        scored: what each of them reads, `batch` being the shared one.
    """

    batch: dict[str, torch.Tensor]
    members: tuple[int, ...]
    scored: tuple[Scored, ...]


def check_metrics(given: Metric | Sequence[Metric]) -> list[Metric]:
    """One metric or several as a list.

    Raises:
        InvalidArgumentError: no metric, or two of one name.
        InvalidTypeError: something else.
    """
    listed = [given] if isinstance(given, Metric) or not isinstance(given, Iterable) else list(given)
    metrics = [one for one in listed if isinstance(one, Metric)]
    if len(metrics) < len(listed):
        wrong = next(one for one in listed if not isinstance(one, Metric))
        raise InvalidTypeError(
            f"metric={wrong!r} is not a metric; call one of bkdfast.metrics: target_prob(targets), loss(), ..."
        )
    if not metrics:
        raise InvalidArgumentError("metric is an empty list; give at least one metric")
    names = [metric.name for metric in metrics]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InvalidArgumentError(
                f"metrics {names.index(name)} and {i} are both called {name!r}; results are found by name: pass name="
            )
    return metrics


def read_groups(scored: Sequence[Scored], *, causal: bool) -> list[ReadGroup]:
    """Put metrics together that can be read off one run.

    Args:
        scored: what each metric's `extend` returned for one batch of prompts.
        causal: attention looks back only, and nothing else depends on a row's length (dynamic rotary frequencies
            do); otherwise only equal inputs are shared.

    Returns:
        Groups in the order of their first metrics; every metric is in one.
    """
    longest_first = sorted(range(len(scored)), key=lambda i: -_tokens(scored[i]))  # stable: ties in the order given
    hosts: list[list[int]] = []
    for i in longest_first:
        for host in hosts:
            if _begins(scored[i].batch, scored[host[0]].batch, causal):
                host.append(i)
                break
        else:
            hosts.append([i])
    groups = []
    for host in sorted(hosts, key=min):
        batch, members = scored[host[0]].batch, tuple(sorted(host))
        groups.append(ReadGroup(batch, members, tuple(replace(scored[i], batch=batch) for i in members)))
    return groups


def _tokens(scored: Scored) -> int:
    return int(_mask(scored.batch).sum())


def _mask(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask != 0


def _begins(short: dict[str, torch.Tensor], long: dict[str, torch.Tensor], causal: bool) -> bool:
    """Every row of `short` is a row of `long` up to some token (without `causal`: to its last)."""
    rest_short, rest_long = (
        {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask") and not _default(k, v)}
        for batch in (short, long)
    )
    if rest_short.keys() != rest_long.keys() or not all(_equal(v, rest_long[k]) for k, v in rest_short.items()):
        return False
    mask, other = _mask(short), _mask(long)
    width = mask.shape[1]
    if width > other.shape[1] or len(mask) != len(other):
        return False
    # Up to the row's last token: what follows in `short` is padding.
    inside = torch.arange(width, device=mask.device) <= prompt_ends(short)[1][:, None]
    same = (mask == other[:, :width]) & ((short["input_ids"] == long["input_ids"][:, :width]) | ~mask)
    return bool(same[inside].all()) and (causal or int(mask.sum()) == int(other.sum()))


def _default(key: str, value: object) -> bool:
    """Teacher forcing leaves token types of zero out; a model takes them for given."""
    return key == "token_type_ids" and isinstance(value, torch.Tensor) and not value.any()


def _equal(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return a is b or (not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b)
