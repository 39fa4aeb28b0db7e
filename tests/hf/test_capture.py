"""head_outputs and head_means against plain hooks, sample by sample without padding."""

from __future__ import annotations

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, NonFiniteError
from tests.hf import zoo


def one_by_one(model, batch):
    """z of every sample alone: list of `[tokens, L, H, Dh]`."""
    spec, found = bf.hf.describe(model), []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        kept = {}
        handles = [
            model.get_submodule(block.out_proj).register_forward_pre_hook(
                lambda m, a, layer=layer, kept=kept: kept.__setitem__(layer, a[0][0].clone())
            )
            for layer, block in enumerate(spec.blocks)
        ]
        with torch.no_grad():
            model(input_ids=ids[mask.bool()][None])
        for handle in handles:
            handle.remove()
        heads, dim = spec.blocks[0].heads, spec.blocks[0].head_dim
        found.append(torch.stack([kept[layer].unflatten(-1, (heads, dim)) for layer in range(spec.layers)], 1))
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_positions(family, padding):
    if family in zoo.ENCODERS and padding == "left":
        pytest.skip("an encoder with absolute positions sees left padding as positions, by its own definition")
    model, batch = zoo.build(family), zoo.batch(padding=padding)
    alone = one_by_one(model, batch)
    for at, pick in (("last_prompt", -1), (-2, -2), (0, 0), (3, 3)):
        found = bf.head_outputs(model, batch, at=at)
        torch.testing.assert_close(found, torch.stack([z[pick] for z in alone]), atol=2e-5, rtol=1e-4)
    assert (bf.head_outputs(model, batch, at=0) - bf.head_outputs(model, batch, at=3)).abs().max() > 0.1


def test_one_position_a_row_and_all_positions():
    model, batch = zoo.build("llama"), zoo.batch(padding="right")
    alone = one_by_one(model, batch)
    found = bf.head_outputs(model, batch, at=[2, 5, 7])
    torch.testing.assert_close(found, torch.stack([z[i] for z, i in zip(alone, (2, 5, 7), strict=True)]))
    every = bf.head_outputs(model, batch, at="all")
    assert every.shape == (3, 11, zoo.LAYERS, zoo.HEADS, 16)
    torch.testing.assert_close(every[2, :9], alone[2], atol=2e-5, rtol=1e-4)


def test_means_stream_over_batches_of_different_size():
    model = zoo.build("llama")
    batches = [zoo.batch(rows=3), zoo.batch(rows=2, tokens=7, seed=4), zoo.batch(rows=1, tokens=5, seed=5)]
    alone = [z for batch in batches for z in one_by_one(model, batch)]
    last = torch.stack([z[-1] for z in alone]).mean(0)
    torch.testing.assert_close(bf.head_means(model, iter(batches)), last, atol=2e-5, rtol=1e-4)
    tokens = torch.cat(alone).mean(0)
    torch.testing.assert_close(bf.head_means(model, batches, at="all"), tokens, atol=2e-5, rtol=1e-4)


def test_inside_intervene_the_edited_outputs_are_seen():
    model, batch = zoo.build("llama"), zoo.batch()
    with bf.intervene(model, bf.Zero(1, 2)):
        found = bf.head_outputs(model, batch)
    assert (found[:, 1, 2] == 0).all() and (found[:, 1, 1] != 0).any()


def test_a_model_compiled_in_place_is_still_read():
    model, batch = zoo.build("llama"), zoo.batch()
    expected = bf.head_outputs(model, batch)
    model.compile(backend="eager")
    with torch.no_grad():
        model(**batch)
    assert torch.equal(bf.head_outputs(model, batch), expected)


def test_nan_activations_are_named():
    model = zoo.build("llama")
    model.model.layers[1].self_attn.v_proj.weight.data[20] = torch.nan  # key-value head 1: query heads 2 and 3
    with pytest.raises(NonFiniteError, match="layer 1, head 2"):
        bf.head_means(model, zoo.batch())


@pytest.mark.parametrize(
    ("data", "at", "message"),
    [
        ([], "last_prompt", "no data"),
        ({"input_ids": zoo.batch()["input_ids"]}, "last_prompt", "row 1 is padded on the left .* no attention_mask"),
        (zoo.batch(), 10, "position 10 is outside row 1, which has 10 tokens"),
        (zoo.batch(), -11, "outside row 1"),
        (zoo.batch(), [1, 2], "2 positions for a batch of 3 rows"),
        (zoo.batch(), [1], "1 positions for a batch of 3 rows"),
        (zoo.batch(), "prompt", "not one position a row"),
        ([zoo.batch(), zoo.batch()], "all", "takes one batch"),
    ],
)
def test_bad_input(data, at, message):
    with pytest.raises(InvalidArgumentError, match=message):
        bf.head_outputs(zoo.build("llama"), data, at=at)
