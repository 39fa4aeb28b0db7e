"""What is left behind: nothing, after success, failure, nesting and removal; and `patch_many`."""

import copy
import gc
import weakref

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, ModelStateError
from bkdfast.hf.prepare import prepared
from tests.hf import zoo
from tests.hf.cases import EFFECT, B, H, L, T, logits, model, sizes, zero
from tests.hf.plain import Change, plain_hooks, rows_of


def hooks(subject):
    return sum(len(part._forward_pre_hooks) + len(part._forward_hooks) for part in subject.modules())


def tables(handle):
    return {key: table.table.abs().sum().item() for key, table in handle.tables.items()}


class Boom(Exception):
    pass


FAILURES = {
    "in the body": (Boom, bf.Zero(0, 0), lambda subject: (_ for _ in ()).throw(Boom)),
    "in the model": (IndexError, bf.Zero(0, 0), lambda subject: subject(torch.full((1, 2), 999))),
    "wrong batch": (InvalidArgumentError, bf.Patch(torch.zeros(9, L, H, 16), 0, 0), lambda s: s(**zoo.batch())),
    "no such head": (InvalidArgumentError, bf.Zero(0, 99), None),
    "two edits of one cell": (InvalidArgumentError, [bf.Zero(0, 0), bf.Scale(2.0, 0, 0)], None),
    "not an edit": (TypeError, ["zero"], None),
}


@pytest.mark.parametrize("prepare", [False, True])
@pytest.mark.parametrize("name", FAILURES)
def test_nothing_is_left_after_a_failure(name, prepare):
    error, edits, body = FAILURES[name]
    subject, batch = zoo.build("llama"), zoo.batch()
    before = logits(subject, batch)
    handle = bf.prepare(subject) if prepare else None
    installed = hooks(subject)
    assert (installed > 0) == prepare
    for _ in range(2):
        with pytest.raises(error):
            with bf.intervene(subject, edits), torch.no_grad():
                assert body is not None, "the edits were accepted"
                body(subject)
    assert hooks(subject) == installed and prepared(subject) is handle
    if prepare:
        assert not any(tables(handle).values()) and not handle.active and not handle.stack and not handle.running
    assert torch.equal(logits(subject, batch), before)
    with bf.intervene(subject, bf.Zero(1, 2)):
        assert (logits(subject, batch) - before).abs().max() > EFFECT


@pytest.mark.parametrize("prepare", [False, True])
def test_nested_contexts_add_up(prepare):
    subject, batch = zoo.build("llama"), zoo.batch()
    if prepare:
        bf.prepare(subject)
    one, two = bf.Zero(0, 1), bf.Scale(3.0, 2, 0, at=-1)
    single = {}
    for name, edits in (("none", []), ("one", [one]), ("both", [one, two])):
        with plain_edits(subject, edits):
            single[name] = logits(subject, batch)
    assert len({float(value.sum()) for value in single.values()}) == 3
    with bf.intervene(subject, one):
        assert torch.equal(logits(subject, batch), single["one"])
        with bf.intervene(subject, two):
            assert torch.equal(logits(subject, batch), single["both"])
        assert torch.equal(logits(subject, batch), single["one"])
        with pytest.raises(InvalidArgumentError, match="layer 0, heads: edits 0 and 1 address the same cell"):
            with bf.intervene(subject, bf.Scale(2.0, 0, 1)):
                pass
        assert torch.equal(logits(subject, batch), single["one"])
        with pytest.raises(Boom):
            with bf.intervene(subject, two):
                raise Boom
        assert torch.equal(logits(subject, batch), single["one"])
    assert torch.equal(logits(subject, batch), single["none"])
    assert (hooks(subject) > 0) == prepare


def plain_edits(subject, edits):
    known = {
        "Zero": Change([0], [1], zero),
        "Scale": Change([2], [0], lambda old, *_: 3 * old, when=lambda c, w: c == w.last),
    }
    return plain_hooks(subject, "llama", [known[type(edit).__name__] for edit in edits], rows_of(zoo.batch()))


def test_prepare_inside_a_context_stays():
    subject, batch = zoo.build("llama"), zoo.batch()
    with bf.intervene(subject, bf.Zero(0, 0)):
        handle = bf.prepare(subject)
        logits(subject, batch)
    assert prepared(subject) is handle and hooks(subject) > 0
    handle.remove()
    assert prepared(subject) is None and hooks(subject) == 0
    handle.remove()


def test_a_prepared_model_can_be_freed():
    subject = zoo.build("llama")
    bf.prepare(subject)
    with bf.intervene(subject, bf.Zero(0, 0)):
        logits(subject, zoo.batch())
    gone = weakref.ref(subject)
    del subject
    gc.collect()
    assert gone() is None


def test_hooks_of_the_user_stay_and_see_the_edited_z():
    subject, batch, seen = zoo.build("llama"), zoo.batch(), []
    projection = subject.model.layers[1].self_attn.o_proj
    with bf.intervene(subject, bf.Zero(1, 2)):
        handle = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        logits(subject, batch)
    assert len(seen) == 1 and (seen[0][:, :, 32:48] == 0).all() and seen[0].abs().sum() > 0
    logits(subject, batch)
    assert len(seen) == 2 and (seen[1][:, :, 32:48] != 0).any()
    handle.remove()


def test_a_part_of_a_prepared_model_called_on_its_own():
    subject = zoo.build("llama")
    with pytest.raises(ModelStateError, match="a part of the prepared model"), bf.intervene(subject, bf.Zero(1, 2)):
        subject.model.layers[1].self_attn.o_proj(torch.zeros(1, 2, 64))


def variants(s):
    """A variant for each kind of edit, and the same as plain changes."""
    source = s.draw(B, L, H, s.d)
    yield [], []
    yield [bf.Zero(0, 1)], [Change([0], [1], zero)]
    yield [bf.Zero(2, at=-1)], [Change([2], range(H), zero, when=lambda c, w: c == w.last)]
    yield (
        [bf.Scale(-2.0, 1, [0, 3], at=2)],
        [Change([1], [0, 3], lambda old, *_: -2 * old, when=lambda c, w: c == w.first + 2)],
    )
    yield [bf.Patch(source, 1, 2)], [Change([1], [2], lambda old, w, *_: source[w.row, 1, 2])]
    yield [bf.Patch(source, 1, 2, rows=[2])], [Change([1], [2], lambda old, w, *_: source[w.row, 1, 2], rows=[2])]
    yield [bf.Zero(0, 1, rows=1), bf.Zero(1, 0)], [Change([0], [1], zero, rows=[1]), Change([1], [0], zero)]
    yield (
        [bf.Zero(1, 1, at=[4, 0, 6])],
        [Change([1], [1], zero, when=lambda c, w: c == w.first + [4, 0, 6][w.row])],
    )


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_patch_many_equals_one_by_one_in_one_forward(family, padding):
    subject, batch, calls = model(family), zoo.batch(B, T, padding=padding), []
    both = list(variants(sizes(family)))
    handle = subject.register_forward_pre_hook(lambda *_: calls.append(1))
    got = bf.patch_many(subject, batch, [edits for edits, _ in both])
    handle.remove()
    assert calls == [1] and got.shape == (len(both), B, T, zoo.VOCAB) and not got.requires_grad
    real = batch["attention_mask"] != 0
    unedited = logits(subject, batch)[real]
    for (edits, changes), found in zip(both, got, strict=True):
        with plain_hooks(subject, family, changes, rows_of(batch)):
            want = logits(subject, batch)[real]
        torch.testing.assert_close(found[real], want, atol=2e-4, rtol=1e-4)
        assert not edits or (want - unedited).abs().max() > EFFECT
    assert hooks(subject) == 0


def test_patch_many_of_single_edits_and_prepared():
    subject, batch = zoo.build("llama"), zoo.batch()
    bf.prepare(subject)
    got = bf.patch_many(subject, batch, [bf.Zero(0, head) for head in range(H)])
    for head in range(H):
        with bf.intervene(subject, bf.Zero(0, head)):
            torch.testing.assert_close(got[head], logits(subject, batch), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ([], "at least one variant"),
        ([[bf.Zero(0, 0), bf.Scale(2.0, 0, 0)]], "address the same cell"),
        ([[bf.Zero(0, 0)], [bf.Zero(0, 9)]], "head 9 is out of range"),
        ([[bf.Patch(torch.zeros(4, L, H, 16), 0, 0)]], "a source for 4 rows, but a variant has 3 rows"),
        ([[bf.Zero(0, 0, at=[1, 2])]], "positions for 2 rows, but a variant has 3 rows"),
        ([[bf.Zero(0, 0, rows=3)]], "row 3 is out of range: the batch has 3 rows"),
    ],
)
def test_patch_many_refuses(variants, message):
    with pytest.raises(InvalidArgumentError, match=message):
        bf.patch_many(model("llama"), zoo.batch(), variants)
    assert hooks(model("llama")) == 0


def test_patch_many_inside_a_context_is_refused():
    with pytest.warns(UserWarning), bf.intervene(model("llama"), bf.Zero(0, 0)):
        with pytest.raises(InvalidArgumentError, match=r"cannot run inside intervene\(\)"):
            bf.patch_many(model("llama"), zoo.batch(), [[]])


def test_a_deep_copy_is_a_plain_model():
    """Neither edits nor hooks of the original reach a copy; it can be edited by itself."""
    subject, batch = zoo.build("llama"), zoo.batch()
    clean = logits(subject, batch)
    with bf.intervene(subject, bf.Zero(1, 2)):
        copies = [copy.deepcopy(subject)]
        logits(subject, batch)
    bf.prepare(subject)
    copies.append(copy.deepcopy(subject))
    with bf.intervene(subject, bf.Zero(1, 2, rows=2)):
        edited = logits(subject, batch)
        for one in copies:
            assert torch.equal(logits(one, batch), clean)
            logits(one, zoo.batch(rows=1))
    for one in copies:
        with bf.intervene(one, bf.Zero(1, 2, rows=2)):
            assert torch.equal(logits(one, batch), edited) and not torch.equal(edited, clean)


def test_contexts_left_in_another_order():
    """As when one of two generators is abandoned: what is still open stays in force."""
    for prepare in (False, True):
        subject, batch = zoo.build("llama"), zoo.batch()
        if prepare:
            bf.prepare(subject)
        installed, clean = hooks(subject), logits(subject, batch)
        with bf.intervene(subject, bf.Zero(1, 2)):
            second_alone = logits(subject, batch)
        first, second = bf.intervene(subject, bf.Zero(0, 0)), bf.intervene(subject, bf.Zero(1, 2))
        first.__enter__()
        second.__enter__()
        logits(subject, batch)
        first.__exit__(None, None, None)
        assert torch.equal(logits(subject, batch), second_alone) and not torch.equal(second_alone, clean)
        second.__exit__(None, None, None)
        assert torch.equal(logits(subject, batch), clean) and hooks(subject) == installed


def test_cast_after_prepare():
    """Half precision follows; to and from float64 the tables no longer fit, which is said."""
    subject, batch = zoo.build("llama"), zoo.batch()
    handle = bf.prepare(subject)
    subject.to(torch.bfloat16)
    with bf.intervene(subject, bf.Zero(1, 2)):
        found = logits(subject, batch)
    with plain_hooks(subject, "llama", [Change([1], [2], zero)], rows_of(batch)):
        assert torch.equal(found, logits(subject, batch)) and handle.dtype == torch.bfloat16
    subject.double()
    with pytest.raises(ModelStateError, match="prepared as torch.bfloat16 on cpu and is now torch.float64"):
        with bf.intervene(subject, bf.Zero(1, 2)):
            pass


def test_prepared_and_grown_in_inference_mode():
    """The buffers made there are used outside of it later."""
    subject, batch = zoo.build("llama"), zoo.batch()
    with torch.inference_mode():
        handle = bf.prepare(subject, capacity=1)
        handle.positions.reserve(5000)
        with bf.intervene(subject, bf.Zero(1, [2, 3])):
            subject(**batch)
    with bf.intervene(subject, bf.Zero(1, 2)):
        found = logits(subject, batch)
    with plain_hooks(subject, "llama", [Change([1], [2], zero)], rows_of(batch)):
        assert torch.equal(found, logits(subject, batch))
