"""Edits of attention heads and MLP neurons: what to change, where, at which positions, in which rows.

    Zero      z := 0                          zero ablation
    Mean      z := mean                       mean ablation
    Resample  z := z of another sample        resample ablation
    Patch     z := z of another run           activation patching
    Scale     z := factor * z
    Add       z := z + scale * vector         steering

z is a head's output before the attention output projection, `[Dh]` a token, or one neuron's activation. An edit with
`layer` or `head` left out addresses every layer or head; a sweep takes such a template and fills them in one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError, NonFiniteError

Index = int | Sequence[int] | None
At = str | int | slice | Sequence[int] | torch.Tensor

HEADS, NEURONS = "heads", "neurons"


@dataclass(frozen=True, eq=False)
class Edit:
    """`z := a * z + b * source`; the base of the edits below.

    Args:
        layer: layer or layers; None: every layer.
        head: query head or heads; None: every head.
        neuron: neuron or neurons of the MLP's hidden layer, instead of heads.
        at: positions. `"all"`; `"last_prompt"`; `"prompt"` (the prefill); `"generated"` (decode steps); an int (0 is
            the row's first real token, -1 its last prompt token); a `slice` of such ints, where an open end of a
            non-negative slice includes generated tokens; a list or tensor of one int >= 0 for each row.
        rows: batch row or rows; None: every row.
    """

    layer: Index = None
    head: Index = None
    neuron: Index = None
    at: At = "all"
    rows: Index = None
    a: float = 0.0
    b: float = 0.0
    source: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.head is not None and self.neuron is not None:
            raise InvalidArgumentError("an edit addresses heads or neurons, not both; make two edits")
        if self.b != 0 and self.source is None:
            raise InvalidArgumentError(f"{self!r} adds {self.b} times a source, but has none; give source=")
        if self.source is not None:
            if not isinstance(self.source, torch.Tensor):
                raise InvalidTypeError(f"the source must be a tensor, got {type(self.source).__name__}")
            if not torch.isfinite(self.source).all():
                raise NonFiniteError(f"the source of {self!r} contains NaN or infinity")

    @property
    def site(self) -> str:
        """`"heads"` or `"neurons"`."""
        return HEADS if self.neuron is None else NEURONS

    def to(self, **where: Any) -> Edit:
        """The same edit elsewhere: `edit.to(layer=3, head=1)`."""
        moved = copy.copy(self)
        for name, value in where.items():
            if name not in ("layer", "head", "neuron", "at", "rows"):
                raise InvalidArgumentError(f"an edit has no {name!r}; it has layer, head, neuron, at, rows")
            object.__setattr__(moved, name, value)
        return moved

    def with_source(self, source: torch.Tensor) -> Edit:
        """The same edit with another source."""
        changed = copy.copy(self)
        object.__setattr__(changed, "source", source)
        return changed

    def __repr__(self) -> str:
        where = {"layer": self.layer, "head": self.head, "neuron": self.neuron, "rows": self.rows}
        shown = [f"{name}={value}" for name, value in where.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*shown, f'at={self.at!r}'])})"


class Zero(Edit):
    """Zero ablation, `z := 0`.

    Example:
        >>> Zero(3, 5), Zero(3, [0, 1], at="last_prompt"), Zero(3, neuron=7, rows=0)
        (Zero(layer=3, head=5, at='all'), Zero(layer=3, head=[0, 1], at='last_prompt'), Zero(layer=3, neuron=7, rows=0, at='all'))
    """  # noqa: E501

    def __init__(self, layer: Index = None, head: Index = None, **where: Any) -> None:
        super().__init__(layer, head, **where)


class Patch(Edit):
    """Activation patching, `z := source`.

    Args:
        source: `[Dh]` for one head; `[n, Dh]` for n heads given as a list; `[L, H, Dh]`, as `head_means` returns;
            `[B, L, H, Dh]`, one for each row, as `head_outputs` returns at one position; `[B, T, L, H, Dh]`, also one
            for each token: with `at="all"` of each column, padding included, as `head_outputs(at="all")` returns it;
            else from the first position of `at` on, for T tokens. `[1, ...]` serves all rows. For neurons the same
            without Dh.
        layer: layer or layers; None: every layer.
        head: query head or heads; None: every head.
        **where: `neuron`, `at`, `rows` of `Edit`.
    """

    def __init__(self, source: torch.Tensor, layer: Index = None, head: Index = None, **where: Any) -> None:
        super().__init__(layer, head, b=1.0, source=source, **where)


class Mean(Patch):
    """Mean ablation, `z := mean`; arguments as for `Patch`, the source is a mean over a reference distribution.

    One mean for each position: `Mean(head_means(model, data, at="each"), at=slice(0, None))`; tokens beyond the longest
    row of the reference stay as they are.
    """


class Resample(Patch):
    """Resample ablation: each row gets z of another, randomly chosen sample (Chan et al. 2022, causal scrubbing).

    Args:
        source: `[B, L, H, Dh]` outputs of the B samples of the batch, as `head_outputs` returns; each row gets that of
            another row.
        layer: layer or layers; None: every layer.
        head: query head or heads; None: every head.
        seed: of the draw.
        **where: `neuron`, `at`, `rows` of `Edit`.
    """

    def __init__(
        self, source: torch.Tensor, layer: Index = None, head: Index = None, *, seed: int = 0, **where: Any
    ) -> None:
        if source.shape[0] < 2:
            raise InvalidArgumentError("resample ablation needs the outputs of at least 2 samples")
        # A random cyclic order: no sample is its own replacement.
        order = torch.randperm(len(source), generator=torch.Generator().manual_seed(seed)).to(source.device)
        drawn = torch.empty_like(source)
        drawn[order] = source[order.roll(1)]
        super().__init__(drawn, layer, head, **where)


class Scale(Edit):
    """`z := factor * z`."""

    def __init__(self, factor: float, layer: Index = None, head: Index = None, **where: Any) -> None:
        super().__init__(layer, head, a=float(factor), **where)


class Add(Edit):
    """Steering, `z := z + scale * vector`; shapes of `vector` as for `Patch`."""

    def __init__(
        self, vector: torch.Tensor, layer: Index = None, head: Index = None, *, scale: float = 1.0, **where: Any
    ) -> None:
        super().__init__(layer, head, a=1.0, b=float(scale), source=vector, **where)
