"""What must not change a sweep's result, and broken engines that must not pass its tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bkdfast as bf
from bkdfast.hf import shared_prefix
from bkdfast.ops.edit_table import START, STOP, EditTable
from bkdfast.sweep import base as base_run
from bkdfast.sweep import layout as layouts
from tests.hf import zoo
from tests.sweep import kinds

LENGTHS = st.lists(st.integers(3, 9), min_size=1, max_size=4)
PLACES = st.sampled_from(["last_prompt", "all", -2, 1, slice(1, 3), slice(-3, -1)])
SIDES = st.sampled_from(["left", "right"])
FAMILIES = st.sampled_from(["llama", "gpt2", "gemma2", "falcon"])


def rows_of(lengths, side, extra=0):
    """A padded batch of prompts that are drawn by their number, so that equal numbers are equal prompts."""
    width = max(lengths) + extra
    ids, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        prompt = torch.randint(3, zoo.VOCAB, (length,), generator=torch.Generator().manual_seed(100 * row + length))
        own = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, own], mask[row, own] = prompt, 1
    return {"input_ids": ids, "attention_mask": mask}


def targets_of(rows):
    return [[5 + row] * (1 + row % 3) for row in range(rows)]


def effects(family, data, at, targets, *, site="heads", **options):
    """`[variants, N]`."""
    model = kinds.model(family)
    heads, shape = ({"heads": kinds.FEW}, (zoo.HEADS, kinds.head_dim(family))) if site == "heads" else ({}, (48,))
    edit, metric = bf.Patch(kinds.draw(zoo.LAYERS, *shape)), bf.metrics.target_logprob(targets)
    result = bf.sweep(model, data, edit=edit, at=at, metric=metric, site=site, progress=False, **heads, **options)
    found = result.effects.flatten(0, -2)
    assert found.nan_to_num().abs().max() > 1e-3
    return found


def same(a, b):
    torch.testing.assert_close(a, b, atol=3e-5, rtol=2e-4, equal_nan=True)


def permuted(batch, order):
    return {name: value[order] for name, value in batch.items()}


@settings(max_examples=12)
@given(FAMILIES, LENGTHS, PLACES, st.randoms(use_true_random=False))
def test_order_of_samples(family, lengths, at, random):
    batch, targets = rows_of(lengths, "left"), targets_of(len(lengths))
    order = random.sample(range(len(lengths)), len(lengths))
    moved = effects(family, permuted(batch, order), at, [targets[i] for i in order])
    same(moved, effects(family, batch, at, targets)[:, order])


@settings(max_examples=12)
@given(FAMILIES, st.lists(st.integers(3, 9), min_size=2, max_size=4), PLACES, st.integers(1, 3))
def test_division_into_batches(family, lengths, at, first):
    batch, targets = rows_of(lengths, "right"), targets_of(len(lengths))
    first = min(first, len(lengths) - 1)
    parts = [permuted(batch, slice(0, first)), permuted(batch, slice(first, None))]
    same(effects(family, parts, at, targets), effects(family, batch, at, targets))


@settings(max_examples=8)
@given(FAMILIES, LENGTHS, PLACES)
def test_a_sample_twice(family, lengths, at):
    batch, targets = rows_of(lengths, "left"), targets_of(len(lengths))
    twice = permuted(batch, [0, *range(len(lengths))])
    found = effects(family, twice, at, [targets[0], *targets])
    same(found[:, 0], found[:, 1])
    same(found[:, 1:], effects(family, batch, at, targets))


@settings(max_examples=16)
@given(FAMILIES, LENGTHS, PLACES, SIDES, st.integers(0, 4), SIDES)
def test_padding(family, lengths, at, side, extra, other):
    targets = targets_of(len(lengths))
    same(
        effects(family, rows_of(lengths, side, extra), at, targets),
        effects(family, rows_of(lengths, other), at, targets),
    )


@settings(max_examples=16)
@given(
    FAMILIES, LENGTHS, PLACES, st.sampled_from(["heads", "attention", "mlp", "residual"]), st.integers(1, 4),
    st.sampled_from([None, False]),
)  # fmt: skip
def test_size_of_chunks_and_shared_prefix(family, lengths, at, site, size, share):
    batch, targets = rows_of(lengths, "left"), targets_of(len(lengths))
    options = dict(site=site)
    plain = effects(family, batch, at, targets, variants=1, share_prefix=False, **options)
    same(effects(family, batch, at, targets, variants=size, share_prefix=share, **options), plain)
    same(effects(family, batch, at, targets, **options), plain)


@settings(max_examples=10)
@given(
    FAMILIES, st.lists(st.integers(5, 9), min_size=1, max_size=4), st.permutations([0, 3, "last_prompt", slice(1, 4)])
)
def test_positions_one_by_one(family, lengths, spots):
    """An axis of positions is the sweeps of each."""
    batch, targets = rows_of(lengths, "right"), targets_of(len(lengths))
    model, metric = kinds.model(family), bf.metrics.target_logprob(targets)
    options = dict(edit=bf.Zero(), metric=metric, heads=kinds.FEW, progress=False)
    axis = bf.sweep(model, batch, positions=spots, **options).effects
    for i, at in enumerate(spots):
        same(axis[:, :, i], bf.sweep(model, batch, at=at, **options).effects)


# Broken engines.


def changed_table(change):
    def broken(z, table, offset):
        rows = table.table.clone()
        change(rows)
        return PATCH(z, EditTable(rows, table.coefficients, table.source), offset)

    return broken


def _late(rows):
    rows[:, START] += 1
    rows[:, STOP] += 1


PATCH = base_run.patch_heads


def edits_dropped(patch):
    def unedited(projection, block, z, output, heads, table, offset, columns, mode):
        return output[:, columns].repeat(len(heads), 1, 1)

    patch.setattr(base_run, "edited_projection", unedited)


def _lowered(patch, change):
    right = base_run.lower

    def lower(edits, spec, *, variants, **options):
        return right(edits, spec, variants=[[change(edit, spec) for edit in v] for v in variants], **options)

    patch.setattr(base_run, "lower", lower)


def wrong_head_written(patch):
    _lowered(patch, lambda edit, spec: edit.to(head=(edit.head + 1) % zoo.HEADS))


def one_token_early(patch):
    right = base_run.lower
    patch.setattr(
        base_run, "lower", lambda *args, last, **options: right(*args, last=[end - 1 for end in last], **options)
    )


def one_token_late(patch):
    right = base_run.BaseRun._offset

    def offset(self, copies, start):
        return right(self, copies, start) - 1

    patch.setattr(base_run.BaseRun, "_offset", offset)


def wrong_layer_resumed(patch):
    right = base_run.Recording.resume

    def resume(self, layer, stream, *args, **options):
        if layer and layer - 1 in self.streams and stream is not None:
            earlier = self.streams[min(self.streams)]
            copies = len(stream) // len(earlier)
            stream = earlier[:, -stream.shape[1] :].repeat(copies, 1, 1)
        return right(self, layer, stream, *args, **options)

    patch.setattr(base_run.Recording, "resume", resume)


def prefix_not_masked(patch):
    """Padding before a row's prompt is seen."""
    right = shared_prefix._mask

    def mask(**options):
        given = options.get("attention_mask")
        return right(**{**options, "attention_mask": None if given is None else torch.ones_like(given)})

    shared_prefix.AttentionMaskInterface.register(shared_prefix.NAME, mask)
    patch.callbacks.append(lambda: shared_prefix.AttentionMaskInterface.register(shared_prefix.NAME, right))


def prefix_of_another_row(patch):
    right = shared_prefix.PrefixCache.prefix

    def prefix(self, layer):
        return tuple(part.roll(1, 0) for part in right(self, layer))

    patch.setattr(shared_prefix.PrefixCache, "prefix", prefix)


def prefix_of_the_first_layer(patch):
    right = shared_prefix.PrefixCache.prefix
    patch.setattr(shared_prefix.PrefixCache, "prefix", lambda self, layer: right(self, 0))


def sinks_and_caps_forgotten(patch):
    right = shared_prefix.prefix_attention

    def attention(*args, **options):
        return right(*args, **{**options, "softcap": 0.0, "sinks": None})

    patch.setattr(shared_prefix, "prefix_attention", attention)


def positions_off_by_one(patch):
    """Of the suffix, as if a row began one token later."""
    right = base_run.BaseRun._inputs

    def inputs(self, copies, start, stop):
        found = right(self, copies, start, stop)
        if start and "position_ids" in found:
            found["position_ids"] = found["position_ids"] + 1
        return found

    patch.setattr(base_run.BaseRun, "_inputs", inputs)


def rows_not_aligned(patch):
    right = layouts._shifted
    patch.setattr(layouts, "_shifted", lambda value, shift, width: right(value, torch.zeros_like(shift), width))


def logits_of_the_next_column(patch):
    right = base_run.read_logits

    def read(model, spec, inputs, rows, columns, **options):
        last = inputs["input_ids"].shape[1] - 1
        return right(model, spec, inputs, rows, (columns + 1).clamp(max=last), **options)

    patch.setattr(base_run, "read_logits", read)


def update_without_the_base(patch):
    """z' W in the place of o + (z' - z) W: without the bias of the projection."""
    right = base_run.edited_projection

    def edited(projection, block, z, *args):
        class Bare(torch.nn.Module):
            def forward(self, x):
                return projection(x) - projection(torch.zeros_like(x))

        return right(Bare(), block, z, *args[:-1], "call")

    patch.setattr(base_run, "edited_projection", edited)


def variants_mixed_up(patch):
    """The first row of each variant gets the second one's edits."""
    right = base_run.BaseRun._tables
    patch.setattr(base_run.BaseRun, "_tables", lambda self, variants: right(self, [*variants[1:], variants[0]]))


EVERY = ("llama", "gpt2")
# name: (families, kind, grid, padding) that must notice
MUTATIONS = {
    edits_dropped: (EVERY, "patch", "last", "left"),
    wrong_head_written: (EVERY, "patch", "last", "left"),
    one_token_early: (EVERY, "patch", "last", "left"),
    one_token_late: (EVERY, "patch", "span", "right"),
    wrong_layer_resumed: (EVERY, "patch", "last", "left"),
    prefix_not_masked: ((*EVERY, "gemma2"), "patch", "last", "left"),
    prefix_of_another_row: ((*EVERY, "falcon"), "patch", "last", "left"),
    prefix_of_the_first_layer: ((*EVERY, "falcon"), "patch", "last", "left"),
    sinks_and_caps_forgotten: (("gemma2",), "patch", "last", "left"),
    positions_off_by_one: ((*EVERY, "opt"), "patch", "last", "left"),
    rows_not_aligned: (EVERY, "patch", "last", "right"),
    logits_of_the_next_column: ((*EVERY, "falcon"), "patch", "last", "left"),
    update_without_the_base: (("llama", "gpt2"), "patch", "last", "left"),
    variants_mixed_up: ((*EVERY, "falcon"), "patch", "last", "left"),
}


class Patches(pytest.MonkeyPatch):
    """A monkeypatch that also calls back what it cannot undo itself."""

    def __init__(self):
        super().__init__()
        self.callbacks = []

    def undo(self):
        super().undo()
        for callback in self.callbacks:
            callback()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_broken_engine_goes_red(mutation):
    families, kind, grid, padding = MUTATIONS[mutation]
    survived = []
    for family in families:
        kinds.check_targets(family, kind, grid, padding)
        patch = Patches()
        mutation(patch)
        try:
            kinds.check_targets(family, kind, grid, padding)
        except AssertionError as error:
            assert "not close" in str(error)
        else:
            survived.append(family)
        finally:
            patch.undo()
    assert not survived, f"{mutation.__name__} was not noticed by {survived}"
