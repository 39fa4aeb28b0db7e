"""How much two sets of directions of the residual stream have in common: principal angles between their spans.

With orthonormal bases A [D, j] and B [D, k], the singular values of `A^T B` are the cosines of the principal angles
between the spans, and `||A^T B||_F^2 / min(j, k)` is their mean square: 1 when one span contains the other, 0 when they
are orthogonal, `max(j, k) / D` on average when one of them is random.

Source: Bjorck & Golub 1973, Numerical methods for computing angles between linear subspaces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError
from bkdfast.svd.places import Place, input_first, labels, places
from bkdfast.svd.result import TensorDelta

_SEEN = 1 << 10  # directions of a layer's experts; those of the smallest singular values beyond are left out


def subspace_overlap(a: Tensor, b: Tensor) -> float:
    """Mean squared cosine of the principal angles between two column spans.

    Args:
        a: `[D, j]`, independent columns, of any length and angle.
        b: `[D, k]`, likewise.

    Returns:
        From 0 to 1; NaN where j or k is 0.

    Raises:
        InvalidArgumentError: the widths D differ, or an argument is not a matrix.

    Example:
        >>> basis = torch.eye(5)
        >>> subspace_overlap(basis[:, :2], basis[:, 1:3])
        0.5

    Source: Bjorck & Golub 1973.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[0]:
        raise InvalidArgumentError(f"need two matrices of D rows each, found {tuple(a.shape)} and {tuple(b.shape)}")
    if 0 in (a.shape[1], b.shape[1]):
        return math.nan
    q, r = (torch.linalg.qr(basis.double()).Q for basis in (a, b))
    return min(float((q.T @ r).square().sum()) / min(a.shape[1], b.shape[1], a.shape[0]), 1.0)


def random_overlap(j: int, k: int, width: int) -> float:
    """What `subspace_overlap` is on average for spans of j and k dimensions of which one is uniformly random.

    Args:
        j: dimension of one span.
        k: dimension of the other.
        width: D, of the space.

    Returns:
        `max(j, k) / D`; NaN where j or k is 0.
    """
    return max(j, k) / width if j and k else math.nan


@dataclass(frozen=True)
class Overlap:
    """The overlap of what two groups of weights do to the residual stream.

    Attributes:
        comparison: `"next layer"`: one projection in layers l and l + 1; `"same layer"`: the attention output
            projection and the MLP down projection of a layer.
        first: the projection, e.g. `"self_attn.o_proj"`; named as by `bkdfast.svd.places.labels`.
        second: the other one; of `"next layer"` the same.
        layer: of the first.
        other_layer: of the second.
        side: `"output"` or `"input"` of the projections, whichever is the residual stream.
        factors: the singular vectors that are, of first and second: `"u, u"`, or v for weights stored `[in, out]`.
        rank: number of directions j of the first.
        other_rank: number of directions k of the second.
        width: D.
        overlap: mean squared cosine of the principal angles; NaN where a side has no direction.
        random: what it would be on average for a random span.
    """

    comparison: str
    first: str
    second: str
    layer: int
    other_layer: int
    side: str
    factors: str
    rank: int
    other_rank: int
    width: int
    overlap: float
    random: float


@dataclass(frozen=True)
class Basis:
    """Directions of the residual stream of one projection of a layer, `[D, k]`, and which singular vectors they are."""

    vectors: Tensor
    side: str
    factor: str


def stream_basis(deltas: list[tuple[Place, TensorDelta]], model_type: str | None = None) -> Basis:
    """The residual-stream side of a projection's delta; of several experts the leading directions of all together.

    Experts' deltas count as one matrix, side by side on the stream's side: its k leading singular vectors there, from
    the triplets of each, k the largest rank among them.

    Args:
        deltas: one weight, or the experts of one projection of one layer.
        model_type: of the config; says which side is stored first.

    Raises:
        InvalidArgumentError: the experts' widths differ.
    """
    side = deltas[0][0].side
    factor = "v" if (side == "input") != input_first(deltas[0][0], model_type) else "u"
    sides = [getattr(delta, factor) for _, delta in deltas]
    if len({vectors.shape[0] for vectors in sides}) > 1:
        raise InvalidArgumentError(f"{deltas[0][0].name} and its fellow experts have different widths")
    if len(sides) == 1:
        return Basis(sides[0], side, factor)
    columns = torch.cat([v.double() * delta.s for v, (_, delta) in zip(sides, deltas, strict=True)], 1)
    rank = min(max(v.shape[1] for v in sides), columns.shape[0])
    if columns.shape[1] > _SEEN:
        columns = columns[:, columns.square().sum(0).argsort(descending=True)[:_SEEN]]
    if rank == 0:
        return Basis(columns[:, :0], side, factor)
    return Basis(torch.linalg.svd(columns, full_matrices=False).U[:, :rank], side, factor)


def overlaps(deltas: Mapping[str, TensorDelta], model_type: str | None = None) -> list[Overlap]:
    """Overlaps of neighbouring layers, for each projection, and of attention output and MLP down projection.

    Args:
        deltas: `DeltaSVD`, or any mapping from names to deltas. Names say which layer and projection a weight is
            (`bkdfast.svd.places`); weights outside the blocks are left out.
        model_type: of the config. GPT-2's Conv1D stores `[in, out]`, so there the side that a projection writes to is
            v; None: all are stored `[out, in]`.

    Returns:
        First all pairs of layers l and l + 1, projection by projection, then all layers.

    Source: Bjorck & Golub 1973.
    """
    groups: dict[tuple[str, str], dict[int, list[tuple[Place, TensorDelta]]]] = {}
    for where in sorted(places(deltas), key=lambda p: p.order):
        if where.layer is not None:
            layers = groups.setdefault((where.stack, where.projection), {})
            layers.setdefault(where.layer, []).append((where, deltas[where.name]))
    bases = {
        key: {layer: stream_basis(found, model_type) for layer, found in layers.items()}
        for key, layers in groups.items()
    }
    label = labels(places(deltas))
    part = {key: next(iter(layers.values()))[0][0].part for key, layers in groups.items()}
    found = [
        _compare("next layer", (label[key], layer, layers[layer]), (label[key], layer + 1, layers[layer + 1]))
        for key, layers in bases.items()
        for layer in sorted(layers)
        if layer + 1 in layers and len(layers[layer].vectors) == len(layers[layer + 1].vectors)
    ]
    for a in bases:
        for b in bases:
            if a[0] == b[0] and part[a] == "attention" and part[b] == "mlp":
                found += [
                    _compare("same layer", (label[a], layer, bases[a][layer]), (label[b], layer, bases[b][layer]))
                    for layer in sorted(set(bases[a]) & set(bases[b]))
                    if len(bases[a][layer].vectors) == len(bases[b][layer].vectors)
                ]
    return found


def _compare(comparison: str, a: tuple[str, int, Basis], b: tuple[str, int, Basis]) -> Overlap:
    (first, layer, x), (second, other, y) = a, b
    width, j, k = x.vectors.shape[0], x.vectors.shape[1], y.vectors.shape[1]
    return Overlap(
        comparison, first, second, layer, other, x.side, f"{x.factor}, {y.factor}", j, k, width,
        subspace_overlap(x.vectors, y.vectors), random_overlap(j, k, width),
    )  # fmt: skip
