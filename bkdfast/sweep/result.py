"""`SweepResult`: one effect per layer, head and sample, with the baseline it is measured from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError


@dataclass(frozen=True)
class SweepResult:
    """Effects of an edit on a metric, head by head.

    Attributes:
        effects: `[L, H, N]` float32, metric with the edit minus metric without; NaN where the sweep left a head out.
        baseline: `[N]` float32, the metric without edits.
        metric: name of the metric.
        edit: name of the edit.
        seconds: wall-clock time of the sweep.
        facts: how it was run (model type, dtype, position, variants per batch, largest re-checked error).
    """

    effects: torch.Tensor
    baseline: torch.Tensor
    metric: str
    edit: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> torch.Tensor:
        """`[L, H]` mean effect over samples (for `Patch` and `target_prob`: ACIE)."""
        return self.effects.mean(-1)

    @property
    def stderr(self) -> torch.Tensor:
        """`[L, H]` standard error of the mean (0 for one sample)."""
        n = self.effects.shape[-1]
        return self.effects.std(-1, correction=1) / n**0.5 if n > 1 else torch.zeros_like(self.mean)

    def top(self, k: int, *, by: str = "increase") -> list[tuple[int, int]]:
        """(layer, head) of the k strongest mean effects, strongest first.

        Args:
            k: how many, at most all heads swept.
            by: `"increase"` (largest first), `"decrease"` (most negative first) or `"size"` (largest absolute first).
        """
        keys = {"increase": self.mean, "decrease": -self.mean, "size": self.mean.abs()}
        if by not in keys:
            raise InvalidArgumentError(f"by={by!r} is not one of {sorted(keys)}")
        swept = int(torch.isfinite(self.mean).sum())
        if not 1 <= k <= swept:
            raise InvalidArgumentError(f"k={k} is out of range: the sweep has {swept} heads")
        order = keys[by].nan_to_num(nan=-torch.inf).flatten().argsort(descending=True, stable=True)[:k]
        heads = self.mean.shape[1]
        return [(int(i) // heads, int(i) % heads) for i in order]

    def to_pandas(self):
        """A data frame with one row a head: layer, head, effect, stderr; strongest increase first."""
        import pandas as pd

        layer, head = torch.meshgrid(*(torch.arange(n) for n in self.mean.shape), indexing="ij")
        frame = pd.DataFrame(
            {
                "layer": layer.flatten().numpy(),
                "head": head.flatten().numpy(),
                "effect": self.mean.flatten().numpy(),
                "stderr": self.stderr.flatten().numpy(),
            }
        )
        return frame.dropna(subset="effect").sort_values("effect", ascending=False, ignore_index=True)

    def plot(self, path: str | Path | None = None):
        """Heat map of the mean effect, layers by heads; saved to `path` if given. Returns the matplotlib figure."""
        from bkdfast.report.plots import head_heatmap, save

        figure = head_heatmap(self.mean, label=f"change of {self.metric}", title=f"{self.edit}, head by head")
        return save(figure, path)

    def __repr__(self) -> str:
        layers, heads, samples = self.effects.shape
        layer, head = self.top(1, by="size")[0]
        return (
            f"SweepResult({self.edit} of {layers} x {heads} heads on {samples} samples, {self.metric}: "
            f"baseline {self.baseline.mean():.3g}, strongest layer {layer} head {head} "
            f"({self.mean[layer, head]:+.3g}), {self.seconds:.1f} s)"
        )
