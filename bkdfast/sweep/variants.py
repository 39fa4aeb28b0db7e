"""Variants of a sweep: which edits each one makes, and where its result goes.

A sweep is a template edit put to many places. `grid` turns what the user asked for (every head, some heads, sets of
heads, layers of another site, positions) into a flat list of variants and the named dimensions they are an array of.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf import lowering
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.prefix import ATTENTION, MLP, RESIDUAL
from bkdfast.hf.spec import ModelSpec
from bkdfast.ops.edit_table import LAST, OPEN

HEADS = "heads"
_LISTS = {"heads": "[(0, 1), (2, 3)]", "layers": "[0, 3]", "positions": "['last_prompt'] or range(8)"}
SITES = (HEADS, ATTENTION, MLP, RESIDUAL)
Head = tuple[int, int]


@dataclass(frozen=True)
class Variant:
    """One set of edits.

    Attributes:
        index: flat index of its result.
        edits: with layer and head filled in; empty: the unedited model.
        layer: of the first edit.
        at: position of all of them.
    """

    index: int
    edits: tuple[Edit, ...]
    layer: int
    at: At

    def heads(self, layer: int) -> list[int]:
        """Heads edited at `layer`."""
        return [edit.head for edit in self.edits if edit.layer == layer]  # type: ignore[misc]


@dataclass(frozen=True)
class Grid:
    """Variants and the array that their results fill.

    Attributes:
        site: `"heads"`, `"attention"`, `"mlp"` or `"residual"`.
        spec: the model as the edits see it: at a site other than heads, a layer is one head as wide as the model.
        variants: in order of layers.
        dims: names of the array's dimensions.
        coords: labels along each.
        shape: of the array; places without a variant stay NaN.
    """

    site: str
    spec: ModelSpec
    template: Edit
    variants: list[Variant]
    dims: tuple[str, ...]
    coords: dict[str, list[Any]]
    shape: tuple[int, ...]


def grid(
    spec: ModelSpec,
    edit: Edit,
    *,
    at: At | None = None,
    site: str = HEADS,
    heads: Sequence[Head] | Sequence[Sequence[Head]] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[At] | None = None,
) -> Grid:
    """The variants of a sweep; arguments as for `sweep`.

    Raises:
        InvalidArgumentError: a template that names layer, head or rows, heads or layers out of range, arguments that do
            not go together.
    """
    if site not in SITES:
        raise InvalidArgumentError(f"site={site!r} is not one of {', '.join(SITES)}")
    if not isinstance(edit, Edit):
        raise InvalidTypeError(f"edit={edit!r} is not an edit; give one, such as Zero() or Patch(source)")
    for name, listed in (("heads", heads), ("layers", layers), ("positions", positions)):
        if listed is not None and (isinstance(listed, str) or not hasattr(listed, "__getitem__")):
            raise InvalidTypeError(f"{name}={listed!r} is not a list; give one, such as {_LISTS[name]}")
    if edit.layer is not None or edit.head is not None or edit.neuron is not None or edit.rows is not None:
        raise InvalidArgumentError(f"{edit!r}: a sweep fills in layer and head itself; leave layer, head and rows out")
    if positions is not None and at is not None:
        raise InvalidArgumentError("give at= (one place for all variants) or positions= (an axis of them), not both")
    if positions is not None and not len(positions):
        raise InvalidArgumentError("positions= is empty; list positions such as range(10) or ['last_prompt', -2]")
    if site == HEADS:
        if layers is not None:
            raise InvalidArgumentError("layers= is for the other sites; give heads=[(layer, head), ...]")
        places, dims, coords, shape = _heads(heads, spec)
    else:
        if heads is not None:
            raise InvalidArgumentError(f"heads= does not go with site={site!r}; give layers=")
        spec.outputs(site)  # every layer has one
        spec, edit = _as_one_head(spec, edit)
        places, dims, coords, shape = _layers(layers, spec)
    spots = [_plain(spot) for spot in ([edit.at if at is None else at] if positions is None else positions)]
    if positions is not None:
        dims, coords, shape = (*dims, "position"), {**coords, "position": spots}, (*shape, len(spots))
    moved = [edit.to(at=spot) if positions is None else _moved(edit, spot) for spot in spots]
    variants = [
        Variant(
            index * len(spots) + i,
            tuple(moved[i].to(layer=layer, head=head) for layer, head in place),
            min((layer for layer, _ in place), default=spec.layers),
            spot,
        )
        for index, place in places
        for i, spot in enumerate(spots)
    ]
    return Grid(site, spec, edit.to(at=spots[0]), variants, dims, coords, shape)


def _plain(spot: At) -> At:
    """A number of NumPy or torch as an int."""
    return spot if isinstance(spot, (str, slice)) or lowering.one_a_row(spot) else operator.index(spot)  # type: ignore[arg-type]


def _moved(edit: Edit, spot: At) -> Edit:
    """The template at one of several positions, with the entries of its source that are for that position."""
    moved, source = edit.to(at=spot), edit.source
    if source is None or source.dim() < 5 or (isinstance(spot, str) and spot == "prompt"):
        return moved
    (origin, start, stop), *others = spans = lowering.positions(spot)
    if origin == LAST or start < 0:
        raise InvalidArgumentError(
            f"position {spot!r} does not count from a row's first token, as the entries of a source with one for each "
            "token do; give such positions, or 'prompt'"
        )
    if start >= source.shape[1] or any(begin >= source.shape[1] for _, begin, _ in others):
        raise InvalidArgumentError(f"position {spot!r} is beyond the {source.shape[1]} tokens that the source is for")
    if not others:
        return moved.with_source(source[:, start:stop])
    if len(source) not in (1, len(spans)):
        raise InvalidArgumentError(f"{spot!r} has {len(spans)} positions, but the source is for {len(source)} rows")
    rows = torch.arange(len(spans)) if len(source) > 1 else torch.zeros(len(spans), dtype=torch.long)
    return moved.with_source(source[rows, [begin for _, begin, _ in spans]][:, None])


def _heads(heads, spec: ModelSpec):
    most = max(block.heads for block in spec.blocks)
    if heads is not None and not len(heads):
        raise InvalidArgumentError("heads= is empty; give (layer, head) pairs or leave it out")
    if heads is not None and not hasattr(heads[0], "__len__"):
        raise InvalidArgumentError(f"heads={heads!r} is not a list of (layer, head) pairs")
    if heads is not None and not _is_pair(heads[0]):
        sets = [[_checked(pair, spec) for pair in group] for group in heads]
        for number, group in enumerate(sets):
            if len(set(group)) < len(group):
                raise InvalidArgumentError(f"set {number} of heads= names a head twice: {group}")
        return list(enumerate(sets)), ("set",), {"set": sets}, (len(sets),)
    if heads is None:
        wanted = [(layer, head) for layer, block in enumerate(spec.blocks) for head in range(block.heads)]
    else:
        wanted = sorted({_checked(pair, spec) for pair in heads})
    places = [(layer * most + head, [(layer, head)]) for layer, head in wanted]
    coords = {"layer": list(range(spec.layers)), "head": list(range(most))}
    return places, ("layer", "head"), coords, (spec.layers, most)


def _layers(layers: Sequence[int] | None, spec: ModelSpec):
    wanted = range(spec.layers) if layers is None else sorted({operator.index(layer) for layer in layers})
    for layer in wanted:
        if not 0 <= layer < spec.layers:
            raise InvalidArgumentError(f"layer {layer} is out of range: the model has {spec.layers} layers")
    if not wanted:
        raise InvalidArgumentError("layers= is empty; list layers or leave it out")
    return [(layer, [(layer, 0)]) for layer in wanted], ("layer",), {"layer": list(range(spec.layers))}, (spec.layers,)


def _is_pair(value: Any) -> bool:
    return len(value) == 2 and all(hasattr(i, "__index__") and not getattr(i, "ndim", 0) for i in value)


def _checked(pair: Head, spec: ModelSpec) -> Head:
    if not _is_pair(pair):
        raise InvalidArgumentError(f"{pair!r} is not a (layer, head) pair")
    layer, head = map(operator.index, pair)
    if not 0 <= layer < spec.layers or not 0 <= head < spec.blocks[layer].heads:
        raise InvalidArgumentError(
            f"head {(layer, head)} is out of range: {spec.layers} layers of {spec.blocks[0].heads} heads"
        )
    return layer, head


def _as_one_head(spec: ModelSpec, edit: Edit) -> tuple[ModelSpec, Edit]:
    """The model with one head as wide as its residual stream in each layer, and a source `[..., L, D]` made to fit."""
    blocks = tuple(dataclasses.replace(block, heads=1, head_dim=spec.width) for block in spec.blocks)
    spec = dataclasses.replace(spec, blocks=blocks)
    source = edit.source
    if source is not None and source.dim() > 1:
        if source.shape[-2:] != (spec.layers, spec.width):
            raise InvalidArgumentError(
                f"the source of {edit!r} has shape {tuple(source.shape)}; at this site it is [D] = [{spec.width}], or "
                f"[L, D] = {[spec.layers, spec.width]} with [B] or [B, T] before it"
            )
        edit = edit.with_source(source.unsqueeze(-2))
    return spec, edit


def spans(at: At, last: Sequence[int], length: Sequence[int]) -> list[tuple[int, int]]:
    """Edited positions [first, stop) of each row, counted from its first real token.

    Args:
        at: position argument of an edit.
        last: position of each row's last prompt token.
        length: number of each row's tokens, targets included.

    Raises:
        InvalidArgumentError: a row does not have the position.
    """
    named = lowering.positions(at)
    if lowering.one_a_row(at) and len(named) != len(last):
        raise InvalidArgumentError(f"at= gives {len(named)} positions for a batch of {len(last)} rows")
    found = []
    for row, (end, tokens) in enumerate(zip(last, length, strict=True)):
        origin, start, stop = named[row if len(named) > 1 else 0]
        if origin == LAST:
            start, stop = (bound if abs(bound) >= OPEN else bound + end for bound in (start, stop))
        if start >= tokens:
            raise InvalidArgumentError(
                f"at={at!r} edits after the last token of row {row}, which has {end + 1} prompt tokens and "
                f"{tokens - end - 1} of its target that the model gets to see; no edit could show"
            )
        if stop <= 0:
            raise InvalidArgumentError(f"at={at!r} is before the first token of row {row}, which has {end + 1} tokens")
        found.append((max(start, 0), min(stop, tokens)))
    return found


def reads_columns(edit: Edit) -> bool:
    """The edit's source has one entry for each column of the batch as it was given, padding included."""
    return edit.source is not None and edit.source.dim() == 5 and isinstance(edit.at, str) and edit.at == "all"


def describe_at(spots: Iterable[At]) -> str:
    """Positions in words."""
    spots = list(spots)
    return str(spots[0]) if len(spots) == 1 else f"{len(spots)} positions"
