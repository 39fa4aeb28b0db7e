"""Every edit in every family equals a plain hook that clones and assigns, bit for bit."""

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from tests.hf import zoo
from tests.hf.cases import CASES, HEAD_CASES, B, T, check, logits, model, sizes

PADDINGS = ["left", "right", None]
FAMILY_CASES = [(f, c) for f in zoo.CONFIGS for c in CASES if f != "mixtral" or c in HEAD_CASES]


@pytest.mark.parametrize(("family", "case"), FAMILY_CASES)
def test_family(family, case):
    for padding in PADDINGS:
        check(family, case, padding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "bert"])
def test_dtype(family, dtype):
    # Eager attention (Gemma-2) gives NaN on real tokens in float64 when rows are padded on the left.
    paddings = ("right",) if (family, dtype) == ("gemma2", torch.float64) else ("left", "right")
    for case in CASES:
        for padding in paddings:
            check(family, case, padding, dtype)


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_generated_edits_nothing_in_a_prefill(family):
    for padding in PADDINGS:
        batch = zoo.batch(B, T, padding=padding)
        before = logits(model(family), batch)
        with bf.intervene(model(family), bf.Zero(at="generated")):
            real = batch["attention_mask"] != 0
            assert torch.equal(logits(model(family), batch)[real], before[real])


def test_no_edits_change_nothing():
    batch = zoo.batch(B, T)
    before = logits(model("llama"), batch)
    with bf.intervene(model("llama"), []):
        assert torch.equal(logits(model("llama"), batch), before)


def test_the_source_may_be_of_another_dtype():
    source = torch.randn(16)
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        with bf.intervene(model("llama"), bf.Patch(source.to(dtype), 1, 2)):
            got = logits(model("llama"), zoo.batch())
        with bf.intervene(model("llama"), bf.Patch(source.to(dtype).float(), 1, 2)):
            assert torch.equal(got, logits(model("llama"), zoo.batch()))


def test_left_padding_and_none_agree():
    """The same row alone and in a padded batch: positions of edits do not depend on padding."""
    batch = zoo.batch(B, T, padding="left")
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for at in (0, 3, -1, -4, slice(1, 4), "last_prompt", "prompt"):
        edit = bf.Zero([0, 1], [1, 2], at=at)
        with bf.intervene(model("llama"), edit):
            together = logits(model("llama"), batch)
            for row in range(B):
                alone = logits(model("llama"), {"input_ids": batch["input_ids"][row : row + 1, row:]})
                torch.testing.assert_close(together[row, row:], alone[0], atol=1e-4, rtol=1e-4)


def test_masks_of_four_dimensions():
    batch = zoo.batch(B, T, padding="left")
    real = batch["attention_mask"].bool()
    allowed = torch.ones(T, T, dtype=torch.bool).tril() & real[:, None, :] | torch.eye(T, dtype=torch.bool)
    allowed[~real] = False
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[:, None]
    for mask in (allowed[:, None], bias):
        call = {"input_ids": batch["input_ids"], "attention_mask": mask}
        with bf.intervene(model("llama"), bf.Zero(1, 2, at=1)):
            got = logits(model("llama"), call)
        with bf.intervene(model("llama"), bf.Zero(1, 2, at=[1, 1, 1])):
            assert torch.equal(got[real], logits(model("llama"), call)[real])
        with bf.intervene(model("llama"), bf.Zero(1, 2, at=1)):
            torch.testing.assert_close(logits(model("llama"), batch)[real], got[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["positional", "embeddings", "base model"])
def test_other_ways_to_call(how):
    subject, batch = model("llama"), zoo.batch()
    edit = bf.Zero(1, 2, at=2)
    with bf.intervene(subject, edit):
        want = logits(subject, batch)
    with bf.intervene(subject, edit), torch.no_grad():
        if how == "positional":
            got = subject(batch["input_ids"], batch["attention_mask"]).logits
        elif how == "embeddings":
            embedded = subject.get_input_embeddings()(batch["input_ids"])
            got = subject(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
        else:
            got = subject.lm_head(subject.model(**batch).last_hidden_state)
    assert torch.equal(got, want) and not torch.equal(got, logits(subject, batch))


def test_inference_mode():
    with torch.inference_mode(), bf.intervene(model("llama"), bf.Zero(1, 2)):
        got = model("llama")(**zoo.batch()).logits
    with bf.intervene(model("llama"), bf.Zero(1, 2)):
        assert torch.equal(got, logits(model("llama"), zoo.batch()))


@pytest.mark.parametrize("rows", [2, 3, 7])
@pytest.mark.parametrize("shape", ["[B, L, H, Dh]", "[B, L, M]"])
def test_resample_draws_another_sample_for_each_row(rows, shape):
    source = torch.randn(rows, 3, 4, 16) if shape == "[B, L, H, Dh]" else torch.randn(rows, 3, 40)
    drawn = set()
    for seed in range(20):
        edit = bf.Resample(source, 1, seed=seed)
        order = [next(i for i in range(rows) if torch.equal(source[i], edit.source[b])) for b in range(rows)]
        assert sorted(order) == list(range(rows)) and all(i != b for b, i in enumerate(order))
        again = bf.Resample(source, 1, seed=seed)
        assert torch.equal(edit.source, again.source)
        drawn.add(tuple(order))
    assert len(drawn) >= min(rows - 1, 3)


def test_resample_needs_a_sample_for_each_row():
    source = torch.randn(B + 4, 3, 4, sizes("llama").d)
    with pytest.raises(InvalidArgumentError, match=f"made for a batch of {B + 4} rows, but the model got {B}"):
        with bf.intervene(model("llama"), bf.Resample(source, 1, 2)):
            logits(model("llama"), zoo.batch(B))


@pytest.mark.parametrize("padding", ["left", "right"])
def test_outputs_of_every_column_patch_back_to_the_run_they_came_from(padding):
    """`head_outputs(at="all")` and a source of `[B, T, ...]` count the same columns, padding included."""
    subject, batch, other = model("llama"), zoo.batch(B, padding=padding), zoo.batch(B, padding=padding, seed=8)
    with bf.intervene(subject, bf.Patch(bf.head_outputs(subject, other, at="all"), 0)):
        patched = bf.head_outputs(subject, batch, at="all")[:, :, 0]
    assert torch.equal(patched, bf.head_outputs(subject, other, at="all")[:, :, 0])


def test_a_list_of_one_position_is_for_a_batch_of_one():
    with bf.intervene(model("llama"), bf.Zero(1, 2, at=[3])):
        logits(model("llama"), zoo.batch(1))
        with pytest.raises(InvalidArgumentError, match=f"made for a batch of 1 rows, but the model got {B}"):
            logits(model("llama"), zoo.batch(B))
    with pytest.raises(InvalidArgumentError, match=f"positions for 1 rows, but a variant has {B} rows"):
        bf.patch_many(model("llama"), zoo.batch(B), [[bf.Zero(1, 2, at=[3])]])
