"""`SweepResult`: one effect per variant and sample, with the baseline it is measured from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from bkdfast.errors import InvalidArgumentError, StoreError, optional
from bkdfast.jobs.store import write_whole

if TYPE_CHECKING:
    import pandas
    import xarray

HEAD_GRID = ("layer", "head")
_DIMS = {"layer", "head", "position", "set"}
_FORMAT = 1


@dataclass(frozen=True)
class SweepResult:
    """Effects of an edit on a metric, variant by variant.

    Attributes:
        effects: `[*dims, N]` float32, metric with the edit minus metric without; NaN where a variant was left out.
        baseline: `[N]` float32, the metric without edits.
        metric: name of the metric.
        edit: name of the edit.
        seconds: wall-clock time of the sweep.
        facts: how it was run (model type, dtype, position, variants per batch, largest re-checked error).
        dims: what the variants are: `("layer", "head")`, `("set",)`, `("layer",)`, and each with a `"position"` more.
        coords: labels along each of them: numbers of layers and heads; for a set its (layer, head) pairs; for a
            position a number or a text. Left out: 0, 1, 2, ...
        provenance: what the numbers came from (`bkdfast.sweep.provenance.manifest`).
    """

    effects: torch.Tensor
    baseline: torch.Tensor
    metric: str
    edit: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    dims: tuple[str, ...] = HEAD_GRID
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = tuple(self.effects.shape)
        if unknown := sorted(set(self.dims) - _DIMS):
            raise InvalidArgumentError(f"dims are {self.dims}; {unknown[0]!r} is not one of {sorted(_DIMS)}")
        if len(shape) != len(self.dims) + 1 or tuple(self.baseline.shape) != shape[-1:]:
            raise InvalidArgumentError(
                f"effects are {shape} and baseline {tuple(self.baseline.shape)}; they must be "
                f"[{', '.join([*self.dims, 'sample'])}] and [sample]"
            )
        labels = {}
        for name, size in zip(self.dims, shape, strict=False):
            given = self.coords.get(name, range(size))
            if len(given) != size:
                raise InvalidArgumentError(f"coords has {len(given)} labels for {name}, but effects {size}")
            labels[name] = tuple(_label(name, value, i) for i, value in enumerate(given))
        object.__setattr__(self, "dims", tuple(self.dims))
        object.__setattr__(self, "coords", labels)

    @property
    def mean(self) -> torch.Tensor:
        """`[*dims]` mean effect over samples (for `Patch` and `target_prob`: ACIE)."""
        return self.effects.mean(-1)

    @property
    def stderr(self) -> torch.Tensor:
        """`[*dims]` standard error of the mean (0 for one sample)."""
        n = self.effects.shape[-1]
        return self.effects.std(-1, correction=1) / n**0.5 if n > 1 else torch.zeros_like(self.mean)

    def top(self, k: int, *, by: str = "increase", ties: float | None = None) -> list[Any]:
        """The k strongest mean effects, strongest first: (layer, head) pairs, or whatever labels the variants have.

        Args:
            k: how many, at most all variants swept.
            by: `"increase"` (largest first), `"decrease"` (most negative first) or `"size"` (largest absolute first).
            ties: add all variants whose mean effect differs from the k-th one's by this at most, e.g. the sweep's noise
                floor, or 0; None: of equal ones the first are taken.

        Returns:
            For one dim its labels (a set is a tuple of (layer, head) pairs), for several a tuple of labels each.
        """
        keys = {"increase": self.mean, "decrease": -self.mean, "size": self.mean.abs()}
        if by not in keys:
            raise InvalidArgumentError(f"by={by!r} is not one of {sorted(keys)}")
        swept = int((~self.mean.isnan()).sum())
        if not 1 <= k <= swept:
            what = "heads" if self.dims == HEAD_GRID else "variants"
            raise InvalidArgumentError(f"k={k} is out of range: the sweep has {swept} {what}")
        if ties is not None:
            from bkdfast.sweep.statistics import top_with_ties

            return [self._labels(cell) for cell in top_with_ties(self.mean, k, by=by, floor=ties).cells]
        key = keys[by].flatten()
        place = (~key.isnan()).nonzero()[:, 0]
        order = place[key[place].argsort(descending=True, stable=True)[:k]]
        return [self._labels(cell) for cell in zip(*np.unravel_index(order.numpy(), self.mean.shape), strict=True)]

    def recovery(
        self, reference: torch.Tensor | float, *, per_sample: bool = False, floor: float | None = None
    ) -> torch.Tensor:
        """Share of the way from the baseline to `reference` that each variant goes: 0 none of it, 1 all.

        Args:
            reference: `[N]` or one number, the metric of the run that the edit is to restore (the clean run where the
                sweep patches a corrupted one).
            per_sample: a ratio for each sample, `[*dims, N]`; else that of the means over samples, `[*dims]`.
            floor: see `bkdfast.sweep.statistics.normalised_recovery`.
        """
        from bkdfast.sweep.statistics import normalised_recovery

        base = self.baseline.double()
        clean = torch.as_tensor(reference, dtype=torch.float64)
        clean = clean.expand_as(base) if clean.dim() == 0 else clean
        return normalised_recovery(self.effects + base, base, clean, per_sample=per_sample, floor=floor)

    def confidence(self, level: float = 0.95, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Low and high ends, `[*dims]` each, of a bootstrap confidence interval of the mean effect over samples.

        Args:
            level: share of such intervals that hold the true mean.
            **options: `method`, `denominator`, `resamples`, `seed` of `bkdfast.sweep.statistics.bootstrap_interval`.
        """
        from bkdfast.sweep.statistics import bootstrap_interval

        return bootstrap_interval(self.effects, level=level, **options)

    def pvalues(self, correction: str | None = "holm", *, resamples: int | None = None, **options: Any) -> torch.Tensor:
        """`[*dims]` p-values of a sign-flip permutation test that the mean effect is zero.

        Args:
            correction: for the number of variants: `"holm"` (chance of even one false one), `"bh"` (share of false
                ones); None: as they are.
            resamples: random patterns of signs; None: 9,999, or 40 a variant, so that corrected values can be small.
            **options: `alternative`, `seed` of `bkdfast.sweep.statistics.sign_flip_pvalues`.
        """
        from bkdfast.sweep.statistics import adjust_pvalues, sign_flip_pvalues

        if resamples is None:
            resamples = max(9_999, 40 * int((~self.mean.isnan()).sum()))
        found = sign_flip_pvalues(self.effects, resamples=resamples, **options)
        return found if correction is None else adjust_pvalues(found, method=correction)

    def to_pandas(self, *, samples: bool = False, statistics: bool = False) -> pandas.DataFrame:
        """A data frame with one row a variant: its labels, effect, stderr; strongest increase first.

        Args:
            samples: one row a variant and sample instead, in their order: labels, sample, effect, baseline.
            statistics: also `low` and `high`, the ends of `confidence()`, and `p`, of `pvalues()`; of two samples or
                more.

        Variants that were not swept are left out. A set is named as in `3.1+4.6`: layer 3 head 1 and layer 4 head 6.
        """
        pd = optional("pandas", "a data frame", "studies")
        index = (~self.mean.isnan()).nonzero()
        columns: dict[str, Any] = {
            name: [_plain(self.coords[name][i]) for i in index[:, dim].tolist()] for dim, name in enumerate(self.dims)
        }
        at = tuple(index.T)
        if not samples:
            columns |= {"effect": self.mean[at].numpy(), "stderr": self.stderr[at].numpy()}
            if statistics:
                low, high = self.confidence()
                columns |= {"low": low[at].numpy(), "high": high[at].numpy(), "p": self.pvalues()[at].numpy()}
            return pd.DataFrame(columns).sort_values("effect", ascending=False, ignore_index=True, kind="stable")
        n = self.effects.shape[-1]
        columns = {name: [label for label in labels for _ in range(n)] for name, labels in columns.items()}
        columns["sample"] = torch.arange(n).repeat(len(index)).numpy()
        columns["effect"] = self.effects[at].flatten().numpy()
        columns["baseline"] = self.baseline.repeat(len(index)).numpy()
        return pd.DataFrame(columns)

    def to_xarray(self) -> xarray.Dataset:
        """A dataset of `effect [*dims, sample]` and `baseline [sample]`, with the rest in its attributes."""
        xr = optional("xarray", "an xarray dataset", "studies")
        labels: dict[str, list[Any]] = {name: [_plain(label) for label in self.coords[name]] for name in self.dims}
        for name, values in labels.items():
            if any(isinstance(value, str) for value in values):  # a coordinate has one type
                labels[name] = [str(value) for value in values]
        return xr.Dataset(
            {
                "effect": ((*self.dims, "sample"), self.effects.numpy()),
                "baseline": (("sample",), self.baseline.numpy()),
            },
            {**labels, "sample": range(len(self.baseline))},
            {
                "metric": self.metric,
                "edit": self.edit,
                "seconds": self.seconds,
                "facts": json.dumps(self.facts, default=str),
                "provenance": json.dumps(self.provenance, default=str),
            },
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result to a `.safetensors` file, whole or not at all; everything but the tensors is JSON in it.

        Raises:
            InvalidArgumentError: another suffix, or the folder does not exist.
            StoreError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InvalidArgumentError(f"cannot save to {path.name}: results are .safetensors files")
        if not path.parent.is_dir():
            raise InvalidArgumentError(f"cannot save {path}: there is no folder {path.parent}; create it first")
        told = {name: getattr(self, name) for name in ("metric", "edit", "seconds", "facts", "dims", "coords")}
        text = json.dumps({"format": _FORMAT, **told, "provenance": self.provenance}, default=str)
        tensors = {"effects": self.effects.contiguous(), "baseline": self.baseline.contiguous()}
        try:
            write_whole(path, save(tensors, metadata={"bkdfast.sweep": text}))
        except OSError as error:
            raise StoreError(
                f"cannot write {path}: {error.strerror or error}; the result is still in memory"
            ) from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SweepResult:
        """Read a result that `save` wrote.

        Raises:
            InvalidArgumentError: the file is not there, is damaged, or is not a result.
        """
        try:
            data = Path(path).read_bytes()
            tensors: Any = load(data)
            metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
            told = json.loads(metadata["bkdfast.sweep"])
            written = told.pop("format")
            if written != _FORMAT:
                raise InvalidArgumentError(
                    f"{path} has format {written}, and this version reads {_FORMAT}; it was saved by another version "
                    "of bkdfast"
                )
            return cls(**tensors, **{**told, "dims": tuple(told["dims"])})
        except OSError as error:
            raise InvalidArgumentError(f"cannot read {path}: {error.strerror or error}") from error
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InvalidArgumentError(
                f"{path} is not a saved sweep result, or is damaged ({error}); save one with SweepResult.save"
            ) from error

    def plot(self, path: str | Path | None = None, *, tokens: Sequence[str] | None = None):
        """Draw the mean effects; saved to `path` if given. Returns the matplotlib figure.

        A heat map of layers by heads; a map of layers (or of the strongest heads) by positions; a line over layers;
        a line over the number of heads for sets that grow, bars for other sets.

        Args:
            path: a `.png` or `.svg` file.
            tokens: what stands at each position, to label them.
        """
        from bkdfast.report.plots import save as save_figure
        from bkdfast.report.sweeps import result_figure

        return save_figure(result_figure(self, tokens), path)

    def _labels(self, cell: Sequence[int]) -> Any:
        labels = tuple(self.coords[name][int(i)] for name, i in zip(self.dims, cell, strict=True))
        return labels[0] if len(labels) == 1 else labels

    def __repr__(self) -> str:
        *sizes, samples = self.effects.shape
        names = {"layer": "layers", "head": "heads", "position": "positions", "set": "head sets"}
        what = " x ".join(f"{size} {names[name]}" for size, name in zip(sizes, self.dims, strict=True))
        if self.dims == HEAD_GRID:
            what = f"{sizes[0]} x {sizes[1]} heads"
        strongest = "none swept"
        if torch.isfinite(self.mean).any():
            flat = int(self.mean.abs().nan_to_num(nan=-1.0).argmax())
            cell = np.unravel_index(flat, tuple(sizes))
            where = " ".join(
                f"{name} {_plain(self.coords[name][int(i)])}" for name, i in zip(self.dims, cell, strict=True)
            )
            strongest = f"strongest {where} ({self.mean.flatten()[flat]:+.3g})"
        return (
            f"SweepResult({self.edit} of {what} on {samples} samples, {self.metric}: "
            f"baseline {self.baseline.mean():.3g}, {strongest}, {self.seconds:.1f} s)"
        )


def set_name(heads: Sequence[tuple[int, int]]) -> str:
    """A set of heads in tables and figures: `3.1+4.6`."""
    return "+".join(f"{layer}.{head}" for layer, head in heads) or "none"


def _label(dim: str, value: Any, number: int) -> Any:
    """A label that is the same after a detour through JSON."""
    if dim == "set" and not isinstance(value, (int, str)):
        return tuple((int(layer), int(head)) for layer, head in value)
    if isinstance(value, str):
        return value
    if isinstance(value, slice):
        return ":".join("" if end is None else str(end) for end in (value.start, value.stop))
    try:
        return int(value)
    except (TypeError, ValueError):  # a position for each row
        return f"rows {number}"


def _plain(label: Any) -> int | str:
    return set_name(label) if isinstance(label, tuple) else label
