"""Edits during `generate` with a cache: against a loop without cache, and against plain hooks inside `generate`."""

import contextlib

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import ModelStateError
from tests.hf import zoo
from tests.hf.cases import EFFECT, H, check, model, zero
from tests.hf.plain import Change, plain_hooks, rows_of

NEW = 5
ROWS, TOKENS = 3, 11
# position: whether a column of the sequence is edited
POSITIONS = {
    "all": ("all", lambda c, w: True),
    "prompt": ("prompt", lambda c, w: c <= w.last),
    "generated": ("generated", lambda c, w: c > w.last),
    "last_prompt": ("last_prompt", lambda c, w: c == w.last),
    "3": (3, lambda c, w: c == w.first + 3),
    "-2": (-2, lambda c, w: c == w.last - 1),
    "4:": (slice(4, None), lambda c, w: c >= w.first + 4),
}


def edits(name):
    at, _ = POSITIONS[name]
    return [bf.Zero(1, [0, 2], at=at), bf.Scale(2.0, 0, 1, at=at)]


def changes(name):
    _, when = POSITIONS[name]
    return [Change([1], [0, 2], zero, when=when), Change([0], [1], lambda old, *_: 2 * old, when=when)]


def generate(subject, batch, **options):
    """Greedy tokens `[B, NEW]` and logits `[B, NEW, vocab]`."""
    found = subject.generate(
        **batch,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    return found.sequences[:, -NEW:], torch.stack(found.logits, 1)


def without_cache(subject, family, batch, at):
    """The whole sequence again at each step, with plain hooks at absolute columns."""
    ids, mask, found = batch["input_ids"], batch["attention_mask"], []
    where = rows_of(batch)
    for _ in range(NEW):
        call = dict(input_ids=ids, attention_mask=mask, use_cache=False)
        if family != "opt":  # derives them from the mask itself
            call["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        hooks = plain_hooks(subject, family, changes(at), where) if at is not None else contextlib.nullcontext()
        with hooks, torch.no_grad():
            step = subject(**call).logits[:, -1]
        found.append(step)
        allowed = step.index_fill(1, torch.tensor([2]), -torch.inf)  # no end of sequence
        ids = torch.cat([ids, allowed.argmax(1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -NEW:], torch.stack(found, 1)


def close(got, want, plain):
    """Same tokens and logits; and the edit matters."""
    assert (want[1] - plain[1]).abs().max() > EFFECT
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_cached_decode_equals_full_forwards(family, padding):
    subject, batch = model(family), zoo.batch(ROWS, TOKENS, padding=padding)
    unedited = without_cache(subject, family, batch, None)
    for at in POSITIONS:
        want = without_cache(subject, family, batch, at)
        with bf.intervene(subject, edits(at)):
            got = generate(subject, batch)
        close(got, want, unedited)


@pytest.mark.parametrize("padding", ["left", "right", None])
@pytest.mark.parametrize("family", zoo.DECODERS)
def test_equals_plain_hooks_in_generate(family, padding):
    subject, batch = model(family), zoo.batch(ROWS, TOKENS, padding=padding)
    unedited = generate(subject, batch)
    for at in POSITIONS:
        with plain_hooks(subject, family, changes(at), rows_of(batch)):
            want = generate(subject, batch)
        with bf.intervene(subject, edits(at)):
            got = generate(subject, batch)
        assert (want[1] - unedited[1]).abs().max() > EFFECT
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]), f"{at}, {padding}"


@pytest.mark.parametrize("padding", ["left", None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
def test_static_cache(family, padding):
    subject, batch = model(family), zoo.batch(ROWS, TOKENS, padding=padding)
    unedited = without_cache(subject, family, batch, None)
    for at in POSITIONS:
        want = without_cache(subject, family, batch, at)
        for _ in range(2):  # HuggingFace keeps the cache of the first call and resets it
            with bf.intervene(subject, edits(at)):
                got = generate(subject, batch, cache_implementation="static")
            close(got, want, unedited)


@pytest.mark.parametrize("padding", ["left", None])
def test_compiled_and_prepared(padding, fresh_dynamo):
    subject, batch = zoo.build("llama"), zoo.batch(ROWS, TOKENS, padding=padding)
    unedited = without_cache(subject, "llama", batch, None)
    want = {at: without_cache(subject, "llama", batch, at) for at in POSITIONS}
    bf.prepare(subject)
    subject.forward = torch.compile(subject.forward, backend="aot_eager")
    for at in POSITIONS:
        with bf.intervene(subject, edits(at)):
            close(generate(subject, batch, cache_implementation="static"), want[at], unedited)
    assert torch.allclose(generate(subject, batch, cache_implementation="static")[1], unedited[1], atol=2e-4)


def test_each_row_has_its_own_edits():
    subject, batch = model("llama"), zoo.batch(ROWS, TOKENS)
    source = torch.randn(ROWS, zoo.LAYERS, H, 16)
    with bf.intervene(subject, bf.Patch(source, 1, 2, at="generated")):
        got = generate(subject, batch)
    for row in range(ROWS):
        with bf.intervene(subject, bf.Patch(source[row], 1, 2, at="generated")):
            alone = generate(subject, {name: value[row : row + 1] for name, value in batch.items()})
        torch.testing.assert_close(got[1][row], alone[1][0], atol=2e-4, rtol=1e-4)


def test_several_prompts_in_one_context():
    """The second prompt has another length and other padding; nothing of the first may be left."""
    subject = model("llama")
    first, second = zoo.batch(3, 11), zoo.batch(2, 6, seed=5)
    for at in ("generated", "last_prompt", "-2"):
        with bf.intervene(subject, edits(at)):
            generate(subject, first)
            got = generate(subject, second)
        close(got, without_cache(subject, "llama", second, at), without_cache(subject, "llama", second, None))


def test_beams_and_samples_of_one_prompt():
    subject, batch = model("llama"), zoo.batch(ROWS, TOKENS)
    options = dict(max_new_tokens=NEW, num_beams=3, do_sample=False, eos_token_id=None)
    beams = rows_of({"attention_mask": batch["attention_mask"].repeat_interleave(3, 0)})
    with plain_hooks(subject, "llama", changes("generated"), beams):
        want = subject.generate(**batch, **options)
    with bf.intervene(subject, edits("generated")):
        got = subject.generate(**batch, **options)
    assert torch.equal(got, want) and not torch.equal(got, subject.generate(**batch, **options))


def decode(subject, batch, cache):
    mask = torch.cat([batch["attention_mask"], torch.ones(ROWS, 1, dtype=torch.long)], 1)
    step = dict(input_ids=torch.full((ROWS, 1), 9), attention_mask=mask, past_key_values=cache)
    with torch.no_grad():
        return subject(**step, position_ids=mask.sum(1, keepdim=True) - 1).logits


def test_a_prefill_outside_the_context():
    """The end of the prompt was not seen: positions from it are refused, positions from the start are right."""
    batch = zoo.batch(ROWS, TOKENS)
    for prepared in (False, True):
        subject = zoo.build("llama")
        if prepared:
            bf.prepare(subject)

        def prefill(subject=subject):
            with torch.no_grad():
                return subject(**batch, use_cache=True).past_key_values

        cache = prefill()
        for at in ("generated", -1, "last_prompt", "prompt"):
            with pytest.raises(ModelStateError, match="cache of 11 tokens whose prefill ran without these edits"):
                with bf.intervene(subject, bf.Zero(1, 2, at=at)):
                    decode(subject, batch, cache)


def test_a_prefill_outside_the_context_positions_from_the_start():
    batch, subject = zoo.batch(ROWS, TOKENS), model("llama")

    def run(edit):
        with torch.no_grad():
            cache = subject(**batch, use_cache=True).past_key_values
        if edit is None:
            return decode(subject, batch, cache)
        with bf.intervene(subject, edit):
            return decode(subject, batch, cache)

    unedited, every, tenth = run(None), run(bf.Zero(1, 2)), run(bf.Zero(1, 2, at=10))
    # The decoded token is number 11 of row 0, 10 of row 1 and 9 of row 2.
    assert torch.equal(tenth[[0, 2]], unedited[[0, 2]]) and torch.equal(tenth[1], every[1])
    assert (every - unedited).abs().amax((1, 2)).min() > EFFECT


def test_a_chunk_on_a_filled_cache():
    """Chunked prefill: exact where an edit counts from the start, refused where it counts from the end."""
    subject, batch = model("llama"), zoo.batch(ROWS, TOKENS, padding=None)
    ids = batch["input_ids"]

    def chunks():
        with torch.no_grad():
            cache = subject(input_ids=ids[:, :6], use_cache=True).past_key_values
            return subject(input_ids=ids[:, 6:], past_key_values=cache).logits

    for at in (7, slice(4, 9), slice(6, None)):
        with bf.intervene(subject, bf.Zero(1, 2, at=at)), torch.no_grad():
            whole = subject(**batch).logits[:, 6:]
            torch.testing.assert_close(chunks(), whole, atol=2e-4, rtol=1e-4)
        assert (whole - chunks()).abs().max() > EFFECT
    with pytest.raises(ModelStateError, match="5 tokens arrived on a cache of 6.*positions from the start"):
        with bf.intervene(subject, bf.Zero(1, 2, at="last_prompt")):
            chunks()
    check("llama", "zero", "left")  # and nothing of it is left behind


def test_generate_without_a_cache():
    """Each step looks like a prompt of its own: refused where that matters, right where it does not."""
    subject, batch = model("llama"), zoo.batch(ROWS, TOKENS)
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    for at in ("last_prompt", "generated", "prompt", -2):
        with pytest.raises(ModelStateError, match="without a cache.*pass use_cache=True"):
            with bf.intervene(subject, bf.Zero(1, 2, at=at)):
                subject.generate(**batch, **options, use_cache=False)
    with bf.intervene(subject, bf.Zero(1, 2, at=3)):
        assert torch.equal(subject.generate(**batch, **options, use_cache=False), subject.generate(**batch, **options))
    with bf.intervene(subject, bf.Zero(1, 2, at="last_prompt")), torch.no_grad():
        for tokens in (5, 6, 7):  # prompts that extend each other, in plain calls
            subject(input_ids=batch["input_ids"][:1, :tokens], use_cache=False)


def test_two_caches_in_turns():
    """A decode step on another cache than the last call's does not get the last prompt's positions."""
    subject = model("llama")
    batches = [zoo.batch(1, tokens, padding=None, seed=tokens) for tokens in (5, 9)]

    def step(at, between):
        with bf.intervene(subject, bf.Zero(1, 2, at=at)), torch.no_grad():
            cache = subject(**batches[0], use_cache=True).past_key_values
            if between:
                subject(**batches[1], use_cache=True)
            call = dict(input_ids=torch.full((1, 1), 9), attention_mask=torch.ones(1, 6), past_key_values=cache)
            return subject(**call).logits

    assert torch.equal(step(5, between=True), step(5, between=False))
    with pytest.raises(ModelStateError, match="before calls on another cache"):
        step("generated", between=True)
    check("llama", "zero", "left")
