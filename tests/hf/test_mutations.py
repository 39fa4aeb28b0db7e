"""The comparison of the family tests goes red for a broken engine. Without this they might compare nothing."""

import pytest
import torch

import bkdfast.hf.prepare as engine
from bkdfast import EditTable
from bkdfast.hf.positions import Positions
from bkdfast.ops.edit_table import ORIGIN, ROW, SLICE, SOURCE, START, STOP, STRIDE
from tests.hf import zoo
from tests.hf.cases import HEAD_CASES, NEURON_CASES, check

PATCH = engine.patch_heads
KEEP = torch.tensor([1.0, 0.0])


def table_with(change):
    """`patch_heads` on a table changed by `change(table, slices)`."""

    def broken(z, edits, offset):
        table = edits.table.clone()
        live = table[:, START] < table[:, STOP]
        changed = table.clone()
        change(changed, z.shape[2] // edits.source.shape[1])
        table[live] = changed[live]
        return PATCH(z, EditTable(table, edits.coefficients, edits.source), offset)

    return broken


def shift(by):
    def change(table, slices):
        for column in (START, STOP):
            table[:, column] += torch.where(table[:, column].abs() < 1 << 30, by, 0)

    return table_with(change)


def column(which, value):
    def change(table, slices):
        table[:, which] = value(table[:, which], slices)

    return table_with(change)


POSITIONED = [name for name in HEAD_CASES if name.startswith("at ")]
PER_ROW = ["patch [B, L, H, Dh]", "patch [B, T, L, H, Dh]", "neurons: patch [B, L, M]"]
# name: (broken engine, cases that must go red)
MUTATIONS = {
    "dropped": (lambda z, edits, offset: z, [*HEAD_CASES, *NEURON_CASES]),
    # A prompt that ends with the row has no later token to edit by mistake.
    "one token late": (shift(1), [name for name in POSITIONED if name != "at prompt"]),
    "one token early": (shift(-1), POSITIONED),
    "wrong head": (column(SLICE, lambda c, n: (c + 1) % n), ["zero", "scale", "add", "mean", *POSITIONED]),
    "every row": (column(ROW, lambda c, n: 0 * c - 1), ["one row", "two rows", "at a position each, rows"]),
    "first row only": (column(ROW, lambda c, n: c.clamp(min=0)), ["zero", "at -1", "mean"]),
    "next source row": (column(SOURCE, lambda c, n: c + 1), ["patch [n, Dh]", *PER_ROW]),
    "one source for all tokens": (column(STRIDE, lambda c, n: 0 * c), ["patch [B, T, L, H, Dh]"]),
    "wrong origin": (column(ORIGIN, lambda c, n: 1 - c), [name for name in POSITIONED if "prompt" not in name]),
    "no addition": (
        lambda z, edits, offset: PATCH(z, EditTable(edits.table, edits.coefficients * KEEP, edits.source), offset),
        ["add", "mean", *PER_ROW],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_broken_engine_goes_red(mutation, monkeypatch):
    broken, cases = MUTATIONS[mutation]
    survived = []
    for case in cases:
        check("llama", case, "left")
        monkeypatch.setattr(engine, "patch_heads", broken)
        try:
            check("llama", case, "left")
        except AssertionError as error:
            assert "off by" in str(error)
        else:
            survived.append(case)
        monkeypatch.setattr(engine, "patch_heads", PATCH)
    assert not survived, f"{mutation}: not noticed by {survived}"


@pytest.mark.parametrize("family", zoo.CONFIGS)
@pytest.mark.parametrize("mutation", ["dropped", "one token late", "wrong head"])
def test_in_every_family(family, mutation, monkeypatch):
    monkeypatch.setattr(engine, "patch_heads", MUTATIONS[mutation][0])
    for padding in ("left", "right", None):
        for case in ("at last_prompt", "at 4"):
            with pytest.raises(AssertionError, match="off by"):
                check(family, case, padding)


@pytest.mark.parametrize(("field", "padding", "case"), [("begin", "left", "at 1:3"), ("end", "right", "at -1")])
def test_padding_ignored(field, padding, case, monkeypatch):
    """Positions counted from the padded row's edge instead of from its real tokens."""
    update = Positions.update

    def careless(self, args, kwargs, **options):
        mask = torch.ones_like(kwargs["attention_mask"])
        return update(self, args, {**kwargs, "attention_mask": mask}, **options)

    monkeypatch.setattr(Positions, "update", careless)
    check("llama", case, None)
    with pytest.raises(AssertionError, match="off by"):
        check("llama", case, padding)


def test_a_layer_off_by_one(monkeypatch):
    """Hooks that read the table of the layer before."""
    editor = engine.Prepared._editor
    monkeypatch.setattr(engine.Prepared, "_editor", lambda self, site, layer: editor(self, site, (layer - 1) % 3))
    for case in ("zero", "mean", "at -1"):
        with pytest.raises(AssertionError, match="off by"):
            check("llama", case, "left")
