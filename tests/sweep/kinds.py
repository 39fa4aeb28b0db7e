"""The table of the exactness tests: edits x places, in bkdfast's words and as plain changes of one vector."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

import bkdfast as bf
from tests.hf import zoo
from tests.sweep import brute
from tests.sweep.brute import HEADS, Brute, Change

L, H, ROWS, TOKENS = zoo.LAYERS, zoo.HEADS, 3, 9
TARGETS = [[5, 6, 7], [8], [9, 10], [11, 12, 13]]
SAMPLES = len(TARGETS)
FEW = [(0, 1), (1, 3), (2, 0)]
SETS = [[(0, 1)], [(1, 0), (1, 2)], [(0, 0), (2, 3)], [], [(1, 3), (2, 1), (2, 2)], [(0, h) for h in range(H)]]


def data(padding: str | None, batches: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of different size and length, ragged."""
    return [
        zoo.batch(rows=ROWS, tokens=TOKENS, padding=padding),
        zoo.batch(rows=1, tokens=6, padding=padding, seed=9),
    ][:batches]


def draw(*shape: int) -> torch.Tensor:
    """A source, large enough to matter."""
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def _scaled(x, source):
    return -1.5 * x


# name: (entries before [L, H, Dh], edit of a source, new value of a vector from its entry of the source)
KINDS: dict[str, tuple[tuple[int, ...] | None, Any, Any]] = {
    "zero": (None, lambda source: bf.Zero(), lambda x, source: torch.zeros_like(x)),
    "mean": ((), bf.Mean, lambda x, source: source),
    "positional mean": ((1, TOKENS), bf.Mean, lambda x, source: source),
    "resample": ((ROWS,), functools.partial(bf.Resample, seed=3), lambda x, source: source),
    "patch": ((), bf.Patch, lambda x, source: source),
    "patch a token": ((ROWS, TOKENS), bf.Patch, lambda x, source: source),
    "add": ((), functools.partial(bf.Add, scale=-2.0), lambda x, source: x - 2.0 * source),
    "scale": (None, lambda source: bf.Scale(-1.5), _scaled),
}
# name: (arguments of sweep, at of each variant)
GRIDS: dict[str, dict[str, Any]] = {
    "last": dict(at="last_prompt", heads=[*FEW, (2, 2)]),
    "all": dict(at="all", heads=FEW),
    "span": dict(at=slice(2, 5), heads=FEW),
    "backward": dict(at=slice(-3, None), heads=FEW),
    "rows": dict(at=[4, 1, 6], heads=FEW),
    "each": dict(positions=[1, "last_prompt", -3], heads=FEW),
    "sets": dict(at="last_prompt", heads=SETS),
    "sets all": dict(at="all", heads=SETS),
}
BY_TOKEN = ("positional mean", "patch a token")
BY_ROW = ("resample", "patch a token")


@dataclass
class Case:
    """One sweep and what it is in plain words."""

    options: dict[str, Any]
    variants: list[list[Change]]
    batches: int
    index: list[Any] = field(default_factory=list)  # of each variant in effects


def case(kind: str, grid: str, width: int, *, site: str = HEADS) -> Case:
    """`width`: head_dim, or D at the other sites."""
    entries, make, value = KINDS[kind]
    heads = site == HEADS
    shape = (L, H, width) if heads else (L, width)
    given = None if entries is None else draw(*entries, *shape)
    edit = make(given)
    source = edit.source  # Resample draws rows
    options = dict(GRIDS[grid])
    if kind in BY_TOKEN:
        if options.get("at") == "all":
            options["at"] = slice(0, None)
        if "positions" in options:
            options["positions"] = [0, 2, 4]
    spots = options.get("positions", [options.get("at")])
    axis = "positions" in options

    def entry(place):
        if source is None or source.dim() < len(shape):
            return source
        found = source[place.sample if len(source) > 1 else 0] if source.dim() > len(shape) else source
        if kind in BY_TOKEN:
            token = place.token if axis else place.index
            if token >= len(found) or (kind in BY_ROW and place.token >= place.prompt):
                return None  # a row's own source has nothing for its target
            found = found[token]
        return found[place.layer, place.head] if heads else found[place.layer]

    def change(x, place):
        found = entry(place)
        return x if kind in BY_TOKEN and found is None else value(x, found)

    wanted = options.pop("heads", None) if not heads else options.get("heads")
    if not heads:
        places, options["site"] = [[(layer, 0)] for layer in range(L)], site
    elif wanted is None:
        places = [[(layer, head)] for layer in range(L) for head in range(H)]
    else:
        places = [place if isinstance(place, list) else [place] for place in wanted]
    sets = bool(wanted) and isinstance(wanted[0], list)
    variants, index = [], []
    for number, place in enumerate(places):
        for i, at in enumerate(spots):
            variants.append([Change(layer, head, at, change, site) for layer, head in place])
            where = (number,) if sets else place[0] if heads else (place[0][0],)
            index.append((*where, i) if axis else where)
    batches = 1 if kind in BY_ROW or grid == "rows" else 2
    return Case({"edit": edit, **options}, variants, batches, index)


@functools.cache
def model(family: str, dtype: torch.dtype = torch.float32):
    """One model a family for all tests that leave it as it was."""
    built = zoo.build(family, dtype=dtype)
    if family == "mixtral" and dtype == torch.float64:
        built.config._experts_implementation = "eager"
    return built


def head_dim(family: str) -> int:
    """`Dh`: 16 where the config says so, else 48 / 4."""
    return 12 if family in ("gpt2", "gpt_neox", "falcon", "opt", "bert", "distilbert") else 16


def check(
    subject, paths, found_case: Case, padding: str | None, measure, metric, *, tolerance=None, call=None, **options
):
    """The engine's effects are those of the oracle, and far above the tolerance."""
    batches = data(padding, found_case.batches)
    want = Brute(subject, paths, batches, call=call).effects(found_case.variants, measure)
    result = bf.sweep(subject, batches, metric=metric, progress=False, **{**found_case.options, **options})
    found = torch.stack([result.effects[index] for index in found_case.index])
    brute.close(found, want, **(tolerance or {}))


def check_targets(family: str, kind: str, grid: str, padding: str, *, site: str = HEADS, **options) -> None:
    """`check` of a decoder with the targets' log-probability."""
    width = head_dim(family) if site == HEADS else 48
    found = case(kind, grid, width, site=site)
    metric = bf.metrics.target_logprob(TARGETS[: ROWS if found.batches == 1 else None])
    check(model(family), family, found, padding, brute.logprob(TARGETS), metric, **options)
