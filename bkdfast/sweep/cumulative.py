"""`cumulative`: edit the ranked heads together, one more at a time, and see how many of them it takes.

    add      k = 0, 1, ...: the first k heads of the ranking are edited, all others are not     (are they sufficient?)
    remove   k = 0, 1, ...: all heads of the model are edited but the first k of the ranking    (are they necessary?)

Every point is an exact variant of one sweep over sets of heads. Controls take the model's heads in random orders.
`rerank=True` chooses the next head greedily, by its effect together with those chosen before it: heads that do the same
thing rank high one by one, but the second of them adds nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf.batch import Batch, batches
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.families import describe, unwrap
from bkdfast.hf.prepare import prepared
from bkdfast.hf.spec import ModelSpec
from bkdfast.jobs.units import place
from bkdfast.sweep.engine import sweep
from bkdfast.sweep.metrics import Metric
from bkdfast.sweep.ranks import NOT_HERE, Head
from bkdfast.sweep.result import SweepResult

ADD, REMOVE = "add", "remove"


@dataclass(frozen=True)
class CumulativeCurve:
    """Effect of an edit on a metric against the number of heads.

    Attributes:
        direction: `"add"` or `"remove"`.
        sizes: numbers of heads k that were evaluated, S of them, ascending.
        order: the heads in the order in which they were added, or taken out.
        effects: `[S, N]`, metric with the edits minus metric without.
        controls: `[C, S, N]`, the same for C random orders.
        control_orders: those orders.
        full: `[N]`, effect of editing all heads of the model.
        baseline: `[N]`, the metric without edits.
        metric: name of the metric.
        edit: name of the edit.
        seconds: wall-clock time.
        facts: how it was made.
    """

    direction: str
    sizes: tuple[int, ...]
    order: tuple[Head, ...]
    effects: torch.Tensor
    controls: torch.Tensor
    control_orders: tuple[tuple[Head, ...], ...]
    full: torch.Tensor
    baseline: torch.Tensor
    metric: str
    edit: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> torch.Tensor:
        """`[S]` mean effect over samples."""
        return self.effects.mean(-1)

    @property
    def stderr(self) -> torch.Tensor:
        """`[S]` standard error of the mean (0 for one sample)."""
        n = self.effects.shape[-1]
        return self.effects.std(-1, correction=1) / n**0.5 if n > 1 else torch.zeros_like(self.mean)

    @property
    def share(self) -> torch.Tensor:
        """`[S]` share of the full effect that k heads bring about (`add`), or take away (`remove`)."""
        return self._share(self.mean)

    @property
    def control_share(self) -> torch.Tensor:
        """`[C, S]` the same for the random orders."""
        return self._share(self.controls.mean(-1))

    def area(self) -> float:
        """Area under `share` over the sizes scaled to [0, 1]: near 1 if the first head does it all, 0 if none does."""
        return float(self._area(self.share))

    def control_area(self) -> list[float]:
        """The same for each random order."""
        return [float(area) for area in self._area(self.control_share)]

    def heads_needed(self, share: float = 0.9) -> int | None:
        """The smallest number of heads evaluated at which `share` of the full effect is reached; None: at none.

        The curve may fall below that share again with more heads.
        """
        if not 0 < share <= 1:
            raise InvalidArgumentError(f"share={share} is not in (0, 1]")
        reached = (self.share >= share).nonzero()
        return self.sizes[int(reached[0])] if len(reached) else None

    def to_pandas(self):
        """A data frame with one row a size: heads, layer and head added last, effect, stderr, share, the controls."""
        import pandas as pd

        last = [self.order[k - 1] if k else (None, None) for k in self.sizes]
        frame = pd.DataFrame(
            {
                "heads": self.sizes,
                "layer": pd.array([layer for layer, _ in last], dtype="Int64"),
                "head": pd.array([head for _, head in last], dtype="Int64"),
                "effect": self.mean.numpy(),
                "stderr": self.stderr.numpy(),
                "share": self._share(self.mean, strict=False).numpy(),
            }
        )
        for number, control in enumerate(self.controls.mean(-1)):
            frame[f"control_{number}"] = control.numpy()
        return frame

    def plot(self, path: str | Path | None = None, *, others: Sequence[CumulativeCurve] = ()):
        """Effect against number of heads with the controls' band; saved to `path` if given.

        Args:
            path: a `.png` or `.svg` file.
            others: curves to draw beside this one, e.g. the other direction's, or a re-ranked one.

        Returns:
            The matplotlib figure.
        """
        from bkdfast.report.curves import cumulative_curves
        from bkdfast.report.plots import save

        return save(cumulative_curves([self, *others]), path)

    def _share(self, effect: torch.Tensor, *, strict: bool = True) -> torch.Tensor:
        full = self.full.mean()
        if full == 0 and strict:
            raise InvalidArgumentError(
                f"editing all heads of the model does not change the {self.metric}, so nothing can be a share of that"
            )
        return effect / full if self.direction == ADD else 1 - effect / full

    def _area(self, share: torch.Tensor) -> torch.Tensor:
        if len(self.sizes) < 2:
            raise InvalidArgumentError("a curve of one size has no area; give more sizes=")
        x = torch.tensor(self.sizes, dtype=share.dtype)
        return torch.trapezoid(share, (x - x[0]) / (x[-1] - x[0]))

    def __repr__(self) -> str:
        return (
            f"CumulativeCurve({self.edit}, {self.direction} up to {self.sizes[-1]} heads, {self.metric}: "
            f"{self.mean[0]:+.3g} to {self.mean[-1]:+.3g}, all heads edited {self.full.mean():+.3g}, "
            f"{len(self.controls)} controls, {self.seconds:.1f} s)"
        )


def cumulative(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    ranking: Sequence[Head],
    *,
    edit: Edit,
    metric: Metric,
    at: At | None = None,
    direction: str = ADD,
    sizes: Sequence[int] | None = None,
    controls: int = 3,
    seed: int = 0,
    rerank: bool = False,
    keep: int | None = None,
    by: str | None = None,
    spec: ModelSpec | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> CumulativeCurve:
    """Edit the first k ranked heads together (or all but them), for growing k.

    Args:
        model: a model of a supported family, in eval mode.
        data: prompts: one tokenised batch or an iterable of them.
        ranking: (layer, head) pairs, the most important first, e.g. `sweep(...).top(32)`.
        edit: a template without layer and head, as for `sweep`.
        metric: one metric, e.g. `bkdfast.metrics.target_prob(targets)`.
        at: positions of the edit, relative to the prompt; None: those of the template.
        direction: `"add"` edits the first k, `"remove"` all heads of the model but the first k.
        sizes: values of k; None: 0, 1, ... to the length of the ranking.
        controls: random orders of the model's heads to compare with.
        seed: of those orders; the first control of a seed is the same, however many there are.
        rerank: choose each next head greedily, among the best-ranked ones that are left.
        keep: how many of those are tried at each step; None: all. A curve of K heads takes up to K * keep variants.
        by: what the greedy choice wants, `"increase"` or `"decrease"` of the metric; None: the sign of the full effect.
            In the direction `"remove"` it takes out the head without which the edit does least of that.
        spec: where the heads are, when the family is not known.
        out: a folder to keep finished work in; called again with it, a killed run goes on.
        progress: show progress bars.
        **options: other arguments of `sweep`: `variants`, `verify` and so on.

    Returns:
        `CumulativeCurve`.

    Raises:
        InvalidArgumentError: an empty ranking, a head twice or out of range, sizes beyond the ranking; as for `sweep`.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> from bkdfast.sweep.cumulative import cumulative
        >>> pair = load_pair()
        >>> batch = pair.tokenizer("current year 2024 : the team won", return_tensors="pt")
        >>> how = dict(edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
        >>> curve = cumulative(pair.tuned, batch, [(4, 6), (4, 1), (4, 7)], **how)
        >>> curve.sizes, tuple(curve.effects.shape), tuple(curve.controls.shape)
        ((0, 1, 2, 3), (4, 1), (3, 4, 1))
    """
    started = time.perf_counter()
    state = prepared(unwrap(model))
    layout = state.spec if state is not None else describe(unwrap(model), spec)
    whole = [(layer, head) for layer, block in enumerate(layout.blocks) for head in range(block.heads)]
    ranking = _check_ranking(ranking, whole)
    sizes = _check_sizes(sizes, len(ranking))
    if direction not in (ADD, REMOVE):
        raise InvalidArgumentError(f"direction={direction!r} is neither 'add' nor 'remove'")
    if by not in (None, "increase", "decrease"):
        raise InvalidArgumentError(f"by={by!r} is neither 'increase' nor 'decrease'")
    if controls < 0 or (keep is not None and keep < 1):
        raise InvalidArgumentError(f"controls={controls} and keep={keep}: give 0 or more controls, and keep 1 or more")
    if taken := sorted(set(options) & set(NOT_HERE)):
        raise InvalidArgumentError(f"a curve is over sets of heads of the whole model; leave out {', '.join(taken)}")
    if not isinstance(metric, Metric):
        raise InvalidTypeError(
            f"metric must be one metric, got {type(metric).__name__}; make one curve for each of several"
        )
    folder = None if out is None else Path(out)
    given = list(batches(data))

    def run(sets: Sequence[frozenset[Head]], name: str, bar: bool) -> SweepResult:
        heads = [sorted(group) for group in sets]
        kept = None if folder is None else folder / name
        return sweep(
            model, given, edit=edit, metric=metric, at=at, heads=heads, spec=spec, out=kept, progress=bar, **options
        )

    def edited(chosen: Iterable[Head]) -> frozenset[Head]:
        return frozenset(chosen) if direction == ADD else frozenset(whole).difference(chosen)

    draw = random.Random(seed)
    orders = [draw.sample(whole, len(ranking)) for _ in range(controls)]
    lines = orders if rerank else [ranking, *orders]
    sets = [frozenset(whole), *(edited(order[:k]) for order in lines for k in sizes)]
    unique = list(dict.fromkeys(sets))  # the ends of the curves are the same sets
    found = run(unique, "curve", progress)
    index = {group: i for i, group in enumerate(unique)}
    effects = found.effects[[index[group] for group in sets]]
    full, curves = effects[0], effects[1:].view(len(lines), len(sizes), -1)
    if rerank:
        sign = {"increase": 1.0, "decrease": -1.0, None: 1.0 if full.mean() >= 0 else -1.0}[by]
        chosen: list[Head] = []
        steps = [torch.zeros_like(full) if direction == ADD else full]
        for step in tqdm(range(1, sizes[-1] + 1), desc="greedy", unit="head", disable=not progress or place()[0] > 0):
            tried = [head for head in ranking if head not in chosen][:keep]
            here = run([edited([*chosen, head]) for head in tried], f"step-{step:04d}", False)
            strength = sign * here.effects.mean(-1)
            best = int(strength.argmax() if direction == ADD else strength.argmin())
            chosen.append(tried[best])
            steps.append(here.effects[best])
        order, own, others = chosen, torch.stack(steps)[list(sizes)], curves
    else:
        order, own, others = ranking[: sizes[-1]], curves[0], curves[1:]
    facts = {**found.facts, "seed": seed, "rerank": rerank, "candidates": keep, "model_heads": len(whole)}
    seconds = time.perf_counter() - started
    return CumulativeCurve(
        direction,
        sizes,
        tuple(order),
        own,
        others,
        tuple(map(tuple, orders)),
        full,
        found.baseline,
        found.metric,
        found.edit,
        seconds,
        facts,
    )


def _check_ranking(ranking: Sequence[Head], whole: Sequence[Head]) -> list[Head]:
    try:
        found = [(int(layer), int(head)) for layer, head in ranking]
    except TypeError:
        raise InvalidTypeError(
            f"ranking must be a list of (layer, head) pairs such as sweep(...).top(32), got {type(ranking).__name__}"
        ) from None
    if not found:
        raise InvalidArgumentError("ranking is empty; give (layer, head) pairs, the most important first")
    known = set(whole)
    for head in found:
        if head not in known:
            layers = 1 + max(layer for layer, _ in whole)
            raise InvalidArgumentError(
                f"head {head} is out of range: the model has {layers} layers, {len(whole)} heads"
            )
    if len(set(found)) < len(found):
        twice = next(head for i, head in enumerate(found) if head in found[:i])
        raise InvalidArgumentError(f"the ranking names head {twice} twice")
    return found


def _check_sizes(sizes: Sequence[int] | None, most: int) -> tuple[int, ...]:
    if sizes is None:
        return tuple(range(most + 1))
    found = tuple(sorted({int(size) for size in sizes}))
    if not found or found[0] < 0 or found[-1] > most:
        raise InvalidArgumentError(f"sizes={list(sizes)}: give numbers of heads from 0 to {most}, the ranking's length")
    return found
