"""Bad input is refused before anything runs, with a message that names the thing."""

import numpy as np
import pytest
import torch
import transformers as hf

import bkdfast as bf
from bkdfast.errors import (
    BkdfastError,
    InvalidArgumentError,
    InvalidTypeError,
    ModelStateError,
    NonFiniteError,
    UnsupportedModelError,
)
from tests.hf import zoo
from tests.hf.cases import B, H, L, T, logits, model

NAN = float("nan")
# name: (edits, error, message), for a model of 3 layers, 4 heads of 16, 40 neurons
EDITS = {
    "layer": (
        lambda: bf.Zero(3, 0),
        InvalidArgumentError,
        r"layer 3 is out of range: the model has 3 layers \(0 to 2\)",
    ),
    "negative layer": (lambda: bf.Zero(-1, 0), InvalidArgumentError, "layer -1 is out of range"),
    "head": (lambda: bf.Zero(1, 4), InvalidArgumentError, r"head 4 is out of range: layer 1 has 4 heads \(0 to 3\)"),
    "a mask of heads": (lambda: bf.Zero(1, torch.tensor([True, False])), InvalidTypeError, "are a mask; give indices"),
    "one of several heads": (lambda: bf.Zero(1, [0, 7]), InvalidArgumentError, "head 7 is out of range"),
    "a head twice": (lambda: bf.Zero(1, [2, 2]), InvalidArgumentError, r"heads \[2, 2\] name one head twice"),
    "neuron": (
        lambda: bf.Zero(0, neuron=40),
        InvalidArgumentError,
        "neuron 40 is out of range: layer 0 has 40 neurons",
    ),
    "heads and neurons": (lambda: bf.Zero(0, 1, neuron=2), InvalidArgumentError, "heads or neurons, not both"),
    "a float head": (lambda: bf.Zero(0, 1.5), TypeError, "float"),
    "negative row": (lambda: bf.Zero(0, 1, rows=-1), InvalidArgumentError, "row -1 is out of range"),
    "row": (lambda: bf.Zero(0, 1, rows=3), InvalidArgumentError, "an edit addresses row 3, .* a batch of 3 rows"),
    "row of a per-row source": (
        lambda: bf.Patch(torch.zeros(B, L, H, 16), 0, 1, rows=3),
        InvalidArgumentError,
        "row 3 is out of range.*3 rows",
    ),
    "batch of a per-row source": (
        lambda: bf.Patch(torch.zeros(5, L, H, 16), 0, 1),
        InvalidArgumentError,
        "made for a batch of 5 rows.*got 3",
    ),
    "batch of positions": (lambda: bf.Zero(0, 1, at=[1, 2]), InvalidArgumentError, "made for a batch of 2 rows.*got 3"),
    "two batch sizes": (
        lambda: [bf.Zero(0, 1, at=[1, 2]), bf.Zero(1, 1, at=[1, 2, 3])],
        InvalidArgumentError,
        r"batches of different sizes: \[2, 3\] rows",
    ),
    "no positions": (
        lambda: bf.Zero(0, 1, at=[]),
        InvalidArgumentError,
        r"at=\[\]: positions for each row must be given",
    ),
    "negative positions": (lambda: bf.Zero(0, 1, at=[1, -1, 2]), InvalidArgumentError, "must be given, and count from"),
    "a named position": (
        lambda: bf.Zero(0, 1, at="last"),
        InvalidArgumentError,
        "at='last' is not one of.*last_prompt",
    ),
    "a float position": (lambda: bf.Zero(0, 1, at=1.5), InvalidTypeError, "at=1.5 is not one of"),
    "an empty slice": (lambda: bf.Zero(0, 1, at=slice(4, 4)), InvalidArgumentError, r"at=slice\(4, 4, None\) is empty"),
    "a backward slice": (lambda: bf.Zero(0, 1, at=slice(-1, -3)), InvalidArgumentError, "is empty"),
    "a mixed slice": (
        lambda: bf.Zero(0, 1, at=slice(2, -1)),
        InvalidArgumentError,
        "both ends must count from the same",
    ),
    "a step": (lambda: bf.Zero(0, 1, at=slice(0, 4, 2)), InvalidArgumentError, "a step is not supported"),
    "one cell twice": (
        lambda: [bf.Zero(1, 2, at=slice(0, 4)), bf.Scale(2.0, 1, 2, at=3)],
        InvalidArgumentError,
        "layer 1, heads: edits 0 and 1 address the same cell: slice 2",
    ),
    "all and one position": (
        lambda: [bf.Zero(1, 2), bf.Scale(2.0, 1, at=-1)],
        InvalidArgumentError,
        "layer 1, heads: .*same cell: slice 2",
    ),
    "one neuron twice": (
        lambda: [bf.Zero(1, neuron=[3, 7]), bf.Scale(2.0, 1, neuron=7)],
        InvalidArgumentError,
        "layer 1, neurons: .*same cell: slice 7",
    ),
    "NaN source": (
        lambda: bf.Patch(torch.full((16,), NAN), 0, 1),
        NonFiniteError,
        r"source of Patch\(layer=0.*head=1.*NaN",
    ),
    "infinite source": (lambda: bf.Add(torch.full((16,), torch.inf), 0, 1), NonFiniteError, r"source of Add\("),
    "NaN factor": (lambda: bf.Scale(NAN, 0, 1), InvalidArgumentError, "layer 0, heads: .*coefficients.*not finite"),
    "huge factor": (lambda: bf.Scale(1e39, 0, 1), InvalidArgumentError, "coefficients.*not finite"),
    "source of numbers": (lambda: bf.Patch([1.0] * 16, 0, 1), InvalidTypeError, "source must be a tensor, got list"),
    "no source": (lambda: bf.Edit(0, 1, b=1.0), InvalidArgumentError, "adds 1.0 times a source, but has none"),
    "head_dim": (
        lambda: bf.Patch(torch.zeros(12), 0, 1),
        InvalidArgumentError,
        r"of Patch\(layer=0, head=1, at='all'\) has shape \(12,\); layer 0 needs \[Dh\] of width 16.*\(3, 4, 16\)",
    ),
    "number of heads": (
        lambda: bf.Patch(torch.zeros(3, 16), 0, [0, 1]),
        InvalidArgumentError,
        r"shape \(3, 16\).*each of the 2 heads",
    ),
    "number of layers": (lambda: bf.Patch(torch.zeros(2, 4, 16), 0, 1), InvalidArgumentError, r"shape \(2, 4, 16\)"),
    "too many dimensions": (lambda: bf.Patch(torch.zeros(1, 1, 1, 3, 4, 16), 0), InvalidArgumentError, "has shape"),
    "width of neurons": (
        lambda: bf.Patch(torch.zeros(3, 41), 0, neuron=1),
        InvalidArgumentError,
        r"shape \(3, 41\).*a scalar.*\(3, 40, 1\)",
    ),
    "tokens without a first": (
        lambda: bf.Patch(torch.zeros(B, 2, L, H, 16), 0, 1, at="prompt"),
        InvalidArgumentError,
        r"needs a first position.*slice\(0, None\)",
    ),
    "one token without a first": (
        lambda: bf.Patch(torch.zeros(B, 1, L, H, 16), 0, 1, at="prompt"),
        InvalidArgumentError,
        "needs a first position",
    ),
    "one sample": (lambda: bf.Resample(torch.zeros(1, L, H, 16), 0), InvalidArgumentError, "at least 2 samples"),
    "not an edit": (lambda: [bf.Zero(0, 1), "zero"], InvalidTypeError, "expected an edit.*got str"),
    "an unknown place": (lambda: bf.Zero(0, 1).to(token=3), InvalidArgumentError, "an edit has no 'token'"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits(name):
    make, error, message = EDITS[name]
    subject, batch = model("llama"), zoo.batch(B, T)
    before = logits(subject, batch)
    with pytest.raises(error, match=message) as raised:
        with bf.intervene(subject, make()):
            logits(subject, batch)
    assert isinstance(raised.value, BkdfastError) or name == "a float head"
    assert torch.equal(logits(subject, batch), before)
    assert not any(part._forward_pre_hooks for part in subject.modules())


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor], ids=["int", "numpy", "0-d tensor"])
def test_numbers_of_any_library(kind):
    subject, batch = model("llama"), zoo.batch(B, T)
    before = logits(subject, batch)
    edit = bf.Zero(kind(1), kind(2), at=kind(-2), rows=kind(1))
    with bf.intervene(subject, edit):
        got = logits(subject, batch)
    with bf.intervene(subject, bf.Zero([1], [2], at=-2, rows=[1])):
        assert torch.equal(got, logits(subject, batch)) and not torch.equal(got, before)
    for many in (np.array, torch.tensor, tuple, list):
        with bf.intervene(subject, bf.Zero(many([1]), many([2]), at=many([3, 1, 0]), rows=many([1, 2]))):
            several = logits(subject, batch)
        with bf.intervene(subject, [bf.Zero(1, 2, at=1, rows=1), bf.Zero(1, 2, at=0, rows=2)]):
            assert torch.equal(several, logits(subject, batch))


def test_train_mode_with_dropout():
    subject = zoo.build("gpt2").train()
    message = r"train mode and transformer.drop has dropout \(p=0.1\).*model.eval\(\)"
    with pytest.raises(ModelStateError, match=message), bf.intervene(subject, bf.Zero(0, 0)):
        pass
    with pytest.raises(ModelStateError, match=message):
        bf.patch_many(subject, zoo.batch(), [[]])
    config = zoo.CONFIGS["llama"]()
    config.attention_dropout = 0.2
    with pytest.raises(ModelStateError, match=r"self_attn has dropout \(attention_dropout=0.2\)"):
        with bf.intervene(hf.LlamaForCausalLM(config).train(), bf.Zero(0, 0)):
            pass


def test_train_mode_without_dropout_is_fine():
    subject, batch = zoo.build("llama").train(), zoo.batch()
    with bf.intervene(subject, bf.Zero(0, 0)):
        got = logits(subject, batch)
    with bf.intervene(subject.eval(), bf.Zero(0, 0)):
        assert torch.equal(got, logits(subject, batch))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_a_mask(side):
    batch = {"input_ids": zoo.batch(B, T, padding=side)["input_ids"]}
    with pytest.raises(InvalidArgumentError, match=rf"row 1 is padded on the {side} \(token 0\).*attention_mask"):
        with bf.intervene(model("llama"), bf.Zero(0, 0)):
            logits(model("llama"), batch)
    whole = {"input_ids": zoo.batch(B, T, padding=None)["input_ids"]}
    with bf.intervene(model("llama"), bf.Zero(0, 0)):
        logits(model("llama"), whole)


def test_neurons_of_a_mixture_of_experts():
    with pytest.raises(InvalidArgumentError, match="layer 0 of mixtral has no single MLP down projection.*no neurons"):
        with bf.intervene(model("mixtral"), bf.Zero(neuron=0)):
            pass


def test_not_a_known_model():
    with pytest.raises(UnsupportedModelError, match="Linear is not a HuggingFace model"):
        with bf.intervene(torch.nn.Linear(2, 2), bf.Zero(0, 0)):
            pass


def test_a_call_without_tokens():
    with pytest.raises(InvalidArgumentError, match=r"without a \[B, T\] tensor"):
        with bf.intervene(model("llama"), bf.Zero(0, 0)):
            model("llama")(use_cache=False)
