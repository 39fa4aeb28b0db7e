"""`screened_sweep`: estimate all heads, compute the strongest exactly, and say how far the estimate can be trusted.

The estimate (`bkdfast.sweep.screen`) picks the heads worth an exact run. Exact values of the heads it picked cannot
show what it missed; so a random sample of the others is computed exactly too, and the two are reported apart.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import Batch, batches
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.spec import ModelSpec
from bkdfast.jobs.store import Store
from bkdfast.jobs.units import join, run_units
from bkdfast.sweep.engine import sweep
from bkdfast.sweep.metrics import Metric
from bkdfast.sweep.provenance import manifest
from bkdfast.sweep.ranks import NOT_HERE, Correlation, Head, most_in_population, ranked, spearman
from bkdfast.sweep.result import SweepResult
from bkdfast.sweep.screen import Screening, screen


@dataclass(frozen=True)
class Missed:
    """How many left-out heads belong among the k strongest, judged by the sample of them that was computed.

    Attributes:
        k: a left-out head is missed if its exact effect is stronger than the k-th strongest among the kept heads.
        found: missed heads in the sample.
        sampled: heads in the sample.
        left_out: heads that the screening left out, the sample among them.
        at_most: 95% upper confidence bound on the missed heads among all that were left out.
    """

    k: int
    found: int
    sampled: int
    left_out: int
    at_most: int

    def __str__(self) -> str:
        return (
            f"{self.found} of {self.sampled} sampled heads belong in the top {self.k} "
            f"(of {self.left_out} left out, 95%: at most {self.at_most})"
        )


@dataclass(frozen=True)
class ScreenedSweep:
    """Estimates of all heads, and exact effects of some.

    Attributes:
        screening: the estimates of all heads.
        sweep: the exact effects of the kept and the sampled heads.
        kept: the heads with the strongest estimates, strongest first.
        sampled: heads drawn at random from the others.
        by: what counted as strong: `"increase"`, `"decrease"` or `"size"`.
        seconds: wall-clock time of both.
    """

    screening: Screening
    sweep: SweepResult
    kept: tuple[Head, ...]
    sampled: tuple[Head, ...]
    by: str
    seconds: float

    @property
    def estimate(self) -> torch.Tensor:
        """`[L, H, N]`, estimates of all heads."""
        return self.screening.estimate

    @property
    def exact(self) -> torch.Tensor:
        """`[L, H, N]`, exact effects of the kept and the sampled heads; NaN for all others."""
        return self.sweep.effects

    @property
    def baseline(self) -> torch.Tensor:
        """`[N]`, the metric without edits."""
        return self.sweep.baseline

    def correlation(self, among: str = "sampled") -> Correlation:
        """Spearman's rank correlation of estimated and exact mean effects (of their sizes for `by="size"`).

        Args:
            among: `"kept"` (the strongest estimates: a narrow range), `"sampled"` (a fair picture of the heads that
                were left out), or `"both"` (neither: strong heads are over-represented).
        """
        groups = {"kept": self.kept, "sampled": self.sampled, "both": (*self.kept, *self.sampled)}
        if among not in groups:
            raise InvalidArgumentError(f"among={among!r} is not one of {', '.join(groups)}")
        pairs = (_of(values, groups[among]) for values in (self.screening.mean, self.sweep.mean))
        return spearman(*((pair.abs() if self.by == "size" else pair) for pair in pairs))

    def missed(self, k: int | None = None) -> Missed:
        """What the sample says of heads that the screening left out and should not have.

        Args:
            k: size of the top list in question; None: all heads that were kept.
        """
        k = len(self.kept) if k is None else k
        if not 1 <= k <= len(self.kept):
            raise InvalidArgumentError(f"k={k} is out of range: {len(self.kept)} heads were kept")
        kept, sampled = (self._strength(_of(self.sweep.mean, heads)) for heads in (self.kept, self.sampled))
        found = int((sampled > kept.sort(descending=True).values[k - 1]).sum())
        left_out = int((~self.screening.mean.isnan()).sum()) - len(self.kept)
        return Missed(k, found, len(sampled), left_out, most_in_population(found, len(sampled), left_out))

    def top(self, k: int) -> list[Head]:
        """(layer, head) of the k strongest exact effects, strongest first, among the heads that were computed."""
        order = ranked(self.sweep.mean, self.by)
        if not 1 <= k <= len(order):
            raise InvalidArgumentError(f"k={k} is out of range: {len(order)} heads were computed exactly")
        return order[:k]

    def to_pandas(self):
        """A data frame with one row a head: layer, head, estimate, exact (NaN where not computed), chosen."""
        import pandas as pd

        chosen = dict.fromkeys(self.kept, "kept") | dict.fromkeys(self.sampled, "sampled")
        estimate, exact = self.screening.mean, self.sweep.mean
        rows = [
            (*head, float(estimate[head]), float(exact[head]), chosen.get(head, "left out"))
            for head in ranked(estimate, self.by)
        ]
        return pd.DataFrame(rows, columns=["layer", "head", "estimate", "exact", "chosen"])

    def plot(self, path: str | Path | None = None):
        """Exact against estimated mean effects; saved to `path` if given. Returns the matplotlib figure."""
        from bkdfast.report.curves import estimate_scatter
        from bkdfast.report.plots import save

        return save(estimate_scatter(self), path)

    def _strength(self, values: torch.Tensor) -> torch.Tensor:
        return {"increase": values, "decrease": -values, "size": values.abs()}[self.by]

    def __repr__(self) -> str:
        layer, head = self.top(1)[0]
        return (
            f"ScreenedSweep({self.screening.edit}, {self.screening.metric}: {len(self.kept)} heads kept and "
            f"{len(self.sampled)} sampled of {self.missed().left_out + len(self.kept)}, strongest layer {layer} head "
            f"{head} ({self.sweep.mean[layer, head]:+.3g} exactly); rank correlation of the estimate: kept "
            f"{self.correlation('kept')}, sampled {self.correlation('sampled')}; {self.missed()})"
        )


def screened_sweep(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    edit: Edit,
    metric: Metric,
    at: At | None = None,
    keep: int | float = 32,
    check: int = 16,
    by: str = "size",
    steps: int = 1,
    path: str = "layer",
    seed: int = 0,
    spec: ModelSpec | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> ScreenedSweep:
    """Estimate every head from gradients, then compute exactly the strongest and a random sample of the others.

    Args:
        model: a model of a supported family, in eval mode.
        data: prompts: one tokenised batch or an iterable of them.
        edit: a template without layer and head, as for `sweep`.
        metric: one that has a gradient, see `screen`.
        at: positions of the edit, relative to the prompt; None: those of the template.
        keep: heads computed exactly because their estimate is strong: a number of them, or a share (0.1: a tenth).
        check: heads drawn at random from the others, computed exactly to see what the screening missed; 0: none.
        by: what counts as strong: `"size"`, `"increase"` or `"decrease"`.
        steps: integrated-gradients points of the estimate, see `screen`.
        path: their path, see `screen`.
        seed: of the draw.
        spec: where the heads are, when the family is not known.
        out: a folder to keep finished work in; called again with it, a killed sweep goes on.
        progress: show progress bars.
        **options: other arguments of `sweep`: `variants`, `verify` and so on.

    Raises:
        InvalidArgumentError: `keep`, `check` or `by` out of range, a folder made with another screening; and as for
            `screen` and `sweep`.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> from bkdfast.sweep.screened import screened_sweep
        >>> pair = load_pair()
        >>> batch = pair.tokenizer(["news : the team won", "news : markets fell"], return_tensors="pt", padding=True)
        >>> metric = bf.metrics.target_logprob([5])
        >>> found = screened_sweep(
        ...     pair.tuned, batch, edit=bf.Zero(), metric=metric, keep=8, check=4, progress=False
        ... )
        >>> len(found.kept), len(found.sampled), int(found.exact.isfinite().all(-1).sum())
        (8, 4, 12)
    """
    if taken := sorted(set(options) & set(NOT_HERE)):
        raise InvalidArgumentError(
            f"screened_sweep is of single heads of the whole model; leave out {', '.join(taken)}"
        )
    if check < 0:
        raise InvalidArgumentError(f"check={check}: give the number of heads to sample, 0 for none")
    started = time.perf_counter()
    given = list(batches(data))

    def run() -> Screening:
        return screen(
            model, given, edit=edit, metric=metric, at=at, steps=steps, path=path, spec=spec, progress=progress
        )

    if out is None:
        found = run()
    else:
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        identity = manifest(model, given, edit, [metric], units="screening", dtype=dtype, at=at, steps=steps, path=path)
        found = _kept(Path(out) / "screening", identity, options.get("resume", True), run)
    order = ranked(found.mean, by)
    count = _count(keep, len(order))
    kept, rest = order[:count], order[count:]
    sampled = random.Random(seed).sample(sorted(rest), min(check, len(rest)))
    if out is not None:
        options["out"] = Path(out) / "exact"
    exact = sweep(
        model, given, edit=edit, metric=metric, at=at, heads=sorted([*kept, *sampled]), spec=spec, progress=progress,
        **options,
    )  # fmt: skip
    return ScreenedSweep(found, exact, tuple(kept), tuple(sampled), by, time.perf_counter() - started)


def _of(values: torch.Tensor, heads: Iterable[Head]) -> torch.Tensor:
    """`[n]` float64, entries of `values [L, H]`."""
    return torch.tensor([float(values[head]) for head in heads], dtype=torch.float64)


def _count(keep: int | float, total: int) -> int:
    if isinstance(keep, float) and not keep.is_integer():
        if not 0 < keep < 1:
            raise InvalidArgumentError(f"keep={keep} is neither a number of heads nor a share between 0 and 1")
        return max(round(keep * total), 1)
    if not keep >= 1:
        raise InvalidArgumentError(f"keep={keep}: at least one head has to be kept")
    return min(int(keep), total)


def _kept(out: Path, identity: dict[str, Any], resume: bool, run: Callable[[], Screening]) -> Screening:
    """The screening, kept in `out`: a sweep that goes on, and every process of one, makes the same choice of heads.

    (Gradients are not the same to the last bit in every run on a GPU.)
    """

    def compute(unit: int, *_: Any) -> dict[str, torch.Tensor]:
        made = run()
        told = {"metric": made.metric, "edit": made.edit, "seconds": made.seconds, "facts": made.facts}
        text = torch.tensor(list(json.dumps(told).encode()), dtype=torch.uint8)
        return {"estimate": made.estimate, "baseline": made.baseline, "told": text}

    join()  # before the store's lock, which the processes of one sweep share
    ((_, held),) = run_units(1, compute, Store.open(out, identity, resume=resume), progress=False)
    return Screening(held["estimate"], held["baseline"], **json.loads(bytes(held["told"].tolist())))
