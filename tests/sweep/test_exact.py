"""Sweeps of heads are exact: every family x where edits are made x edits, against `tests.sweep.brute`."""

from __future__ import annotations

import itertools

import pytest
import torch

import bkdfast as bf
from tests.hf import zoo
from tests.sweep import brute, kinds

DENSE = ("llama",)  # every kind of edit at every place
QUARTER = ("gpt2", "gemma2", "falcon", "mixtral")  # every kind at every fourth place


def covering() -> list[tuple[str, str, str, str]]:
    """Every family meets every place and every kind of edit; padding alternates."""
    found, names, grids = [], list(kinds.KINDS), list(kinds.GRIDS)
    for number, family in enumerate(zoo.DECODERS):
        step = 1 if family in DENSE else 4 if family in QUARTER else len(names)
        for i, grid in enumerate(grids):
            chosen = [name for j, name in enumerate(names) if (number + i + j) % step == 0]
            found += [(family, name, grid, ("left", "right")[(i + j) % 2]) for j, name in enumerate(chosen)]
    return found


def every() -> list[tuple[str, str, str, str]]:
    """What the covering set leaves out."""
    done = set(covering())
    whole = itertools.product(zoo.DECODERS, kinds.KINDS, kinds.GRIDS, ("left", "right"))
    return [case for case in whole if case not in done]


@pytest.mark.parametrize(("family", "kind", "grid", "padding"), covering())
def test_heads(family, kind, grid, padding):
    kinds.check_targets(family, kind, grid, padding)


@pytest.mark.slow
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_heads_in_every_combination(family):
    for _, kind, grid, padding in (case for case in every() if case[0] == family):
        try:
            kinds.check_targets(family, kind, grid, padding)
        except AssertionError as error:
            raise AssertionError(f"{kind}, {grid}, padding on the {padding}: {error}") from error


@pytest.mark.parametrize("family", zoo.ENCODERS)
@pytest.mark.parametrize(("kind", "grid"), list(zip(kinds.KINDS, kinds.GRIDS, strict=True)))
def test_heads_of_encoders(family, kind, grid):
    """No shared prefix there; but blocks before the edited one rest. Padding on the right: on the left it is seen."""
    case = kinds.case(kind, grid, kinds.head_dim(family))
    kinds.check(kinds.model(family), family, case, "right", brute.logit_diff(5, 6), bf.metrics.logit_diff(5, 6))


@pytest.mark.parametrize("family", zoo.ENCODERS)
def test_encoders_with_padding_on_the_left(family):
    """An encoder with absolute positions sees that padding, by its own definition: plain hooks on the same batch."""
    result = bf.sweep(
        kinds.model(family),
        kinds.data("left"),
        edit=bf.Zero(),
        metric=bf.metrics.logit_diff(5, 6),
        verify=24,
        progress=False,
    )
    assert result.facts["largest_error"] < 1e-5 and result.effects.abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "falcon", "bert"])
def test_heads_in_float64(family):
    """To the digits of the result, which is stored in single precision; Gemma2's own softmax is in single precision."""
    tolerance = dict(rtol=1e-7, atol=1e-9) if family != "gemma2" else {}
    subject = kinds.model(family, torch.float64)
    for kind, grid in (("patch", "each"), ("add", "last"), ("zero", "sets all")):
        case = kinds.case(kind, grid, kinds.head_dim(family))
        measure, metric = brute.logit_diff(5, 6), bf.metrics.logit_diff(5, 6)
        kinds.check(subject, family, case, "right", measure, metric, tolerance=tolerance)
