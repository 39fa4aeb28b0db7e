"""Hashes tell any change of weights, data, edit and metric, and nothing else."""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError
from bkdfast.jobs import hashing
from bkdfast.sweep import provenance
from bkdfast.sweep.provenance import data_hash, fingerprint, manifest, weights_hash
from tests.hf import zoo


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.big = torch.nn.Linear(96, 1024)  # more elements than the sample has
        self.small = torch.nn.Linear(3, 3, bias=False).bfloat16()
        self.register_buffer("kept", torch.arange(5.0))
        self.register_buffer("cache", torch.zeros(4), persistent=False)
        self.tied = self.big


@pytest.mark.parametrize("whole", [provenance.WHOLE, 0], ids=["all", "sampled"])
def test_any_one_element_changes_the_hash_of_the_weights(whole):
    model = Net()
    found = weights_hash(model, whole)
    assert found == weights_hash(model, whole) and found["how"] == ("all" if whole else "sampled")
    assert found["tensors"] == 4 and found["bytes"] == 97 * 1024 * 4 + 9 * 2 + 20
    with torch.no_grad():
        for tensor in (model.big.weight, model.big.bias, model.small.weight, model.kept):
            for at in torch.randint(tensor.numel(), (5,)).tolist():
                flat, old = tensor.view(-1), tensor.view(-1)[at].clone()
                flat[at] += 1
                assert weights_hash(model, whole) != found
                flat[at] = old
        model.cache += 1  # written by forwards
        assert weights_hash(model, whole) == found
        model.big.weight.copy_(model.big.weight.flip(0))  # same sum of bits
        assert weights_hash(model, whole) != found


def test_the_sample_is_spread_over_rows_and_columns():
    places = hashing._sample(torch.arange(512 * 4096).view(512, 4096))
    assert len(places.unique()) == hashing.SAMPLE
    assert len((places % 4096).unique()) > 2500 and len((places // 4096).unique()) > 500


def test_the_hash_depends_on_values_not_on_layout():
    one, other = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)
    other.weight.data = one.weight.data.T.contiguous().T
    assert not other.weight.is_contiguous() and weights_hash(one) == weights_hash(other)
    base = torch.cat([torch.zeros(1), one.weight.data.flatten()])
    other.weight.data = base[1:].view(4, 6)  # not aligned to 8 bytes
    assert weights_hash(one, 0) == weights_hash(other, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("whole", [provenance.WHOLE, 0], ids=["all", "sampled"])
def test_the_hash_is_the_same_on_a_gpu(whole):
    model = Net()
    found = weights_hash(model, whole)
    assert weights_hash(model.cuda(), whole) == found


def test_offloaded_weights_are_counted():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).to("meta"))
    assert weights_hash(model)["unhashed"] == 2


def test_data_hash_sees_tokens_masks_and_batches():
    batches = [zoo.batch(rows=3), zoo.batch(rows=2, seed=4)]
    found = data_hash(batches)
    assert found["batches"] == 2 and found["samples"] == 5 and found == data_hash(batches)
    changed = {name: tensor.clone() for name, tensor in batches[1].items()}
    changed["input_ids"][1, 2] += 1
    masked = {name: tensor.clone() for name, tensor in batches[1].items()}
    masked["attention_mask"][0, 0] ^= 1
    for other in ([batches[0], changed], [batches[0], masked], batches[::-1], batches[:1]):
        assert data_hash(other)["hash"] != found["hash"]


@dataclass
class Custom:
    targets: list
    weight: object = None
    name: str = "custom"


def closing_over(value):
    return lambda logits: logits + value


def first(logits, scale=2):
    return logits * scale


def second(logits, scale=3):
    return logits * scale


SAME = [
    (lambda: bf.Zero(at="all")),
    (lambda: bf.Patch(torch.arange(6.0).view(1, 2, 3), at=slice(1, 3))),
    (lambda: bf.metrics.target_prob([[1, 2], [3]])),
    (lambda: Custom(list(range(1000)), np.arange(3))),
    (lambda: {"b": {"x", "y", "z", "w"}, "a": (1.5, float("nan"), None, torch.float32)}),
    (lambda: closing_over(3)),
    (lambda: functools.partial(first, scale=4)),
    (lambda: torch.nn.Linear(1, 1, bias=False).requires_grad_(False).apply(lambda m: m.weight.fill_(2.0))),
]
DIFFERENT = [
    (bf.Zero(at="all"), bf.Zero(at="prompt")),
    (bf.Scale(2.0), bf.Scale(2.5)),
    (bf.Patch(torch.zeros(2, 3)), bf.Mean(torch.zeros(2, 3))),
    (bf.Patch(torch.zeros(2, 3)), bf.Patch(torch.tensor([[0, 0, 0], [0, 0, 1e-30]]))),
    (bf.Patch(torch.zeros(2, 3)), bf.Patch(torch.zeros(3, 2))),
    (bf.Zero(at=torch.tensor([1, 2])), bf.Zero(at=torch.tensor([1, 3]))),
    (bf.metrics.target_prob([[1, 2], [3]]), bf.metrics.target_prob([[1, 2], [4]])),
    (bf.metrics.target_prob([1]), bf.metrics.target_logprob([1])),
    (Custom(list(range(1000))), Custom([*range(999), 0])),
    (Custom([1], torch.zeros(2)), Custom([1], torch.ones(2))),
    (closing_over(3), closing_over(4)),
    (closing_over(torch.zeros(2)), closing_over(torch.ones(2))),
    (first, second),
    (lambda logits: [x * 2 for x in logits], lambda logits: [x * 3 for x in logits]),
    (functools.partial(first, scale=4), functools.partial(first, scale=5)),
    (torch.softmax, torch.log_softmax),
    (1, 2),
    ("a", None),
]


@pytest.mark.parametrize("number", range(len(SAME)))
def test_equal_things_have_equal_fingerprints(number):
    one, other = SAME[number](), SAME[number]()
    assert json.loads(json.dumps(fingerprint(one))) == fingerprint(other)


@pytest.mark.parametrize("number", range(len(DIFFERENT)))
def test_different_things_have_different_fingerprints(number):
    one, other = DIFFERENT[number]
    assert fingerprint(one) != fingerprint(other)


def test_fingerprints_do_not_depend_on_the_process():
    program = (
        "import json; from tests.sweep.test_provenance import SAME, fingerprint;"
        "print(json.dumps([fingerprint(make()) for make in SAME]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert json.loads(run.stdout) == [fingerprint(make()) for make in SAME], run.stderr


def test_objects_that_contain_themselves_end():
    one = Custom([1])
    one.weight = {"self": one, "list": [one, one]}
    assert len(json.dumps(fingerprint(one))) < 10_000


def test_manifest_of_a_sweep():
    model, batch = zoo.build("llama"), zoo.batch()

    def make(model=model, batch=batch, edit=None, targets=(5,)):
        return manifest(
            model, [batch], edit or bf.Zero(), [bf.metrics.target_prob(targets)], units=[[0]], dtype=torch.float32,
            site="heads",
        )  # fmt: skip

    found = make()
    assert json.loads(json.dumps(found)) == found == make()
    assert found["config"]["model_type"] == "llama" and found["config"]["num_hidden_layers"] == zoo.LAYERS
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["devices"] == ["cpu"]
    assert found["site"] == "heads" and found["dtype"] == "float32" and found["data"]["samples"] == 3
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight[0, 0] += 1e-6
    assert make()["weights"]["hash"] != found["weights"]["hash"]
    assert make(edit=bf.Scale(2.0))["edit"] != found["edit"]
    assert make(targets=[6])["metrics"] != found["metrics"]
    with torch.no_grad(), bf.intervene(model, bf.Zero(1, 1)):  # hooks and their tables are not weights
        model(**batch)
        assert make()["weights"] == make()["weights"]
    prepared = make()["weights"]
    bf.prepare(model)
    assert make()["weights"] == prepared


def _hook(module, args, output):
    return output + 0.5 if isinstance(output, torch.Tensor) else (output[0] + 0.5, *output[1:])


@pytest.mark.filterwarnings("ignore:hooks of yours", "ignore:autocast is on")
@pytest.mark.parametrize("change", ["adapter off", "spec", "autocast", "hook"])
def test_a_store_is_for_one_state_of_the_model(change, tmp_path):
    """None of these changes weights or config, and each of them the numbers."""
    peft = pytest.importorskip("peft")
    model = zoo.build("llama")
    if change == "adapter off":
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)).eval()
    options = dict(edit=bf.Zero(), metric=bf.metrics.logit_diff(5, 6), at="last_prompt", verify=0, progress=False)
    first = bf.sweep(model, zoo.batch(), out=tmp_path / "store", **options)
    with contextlib.ExitStack() as stack:
        if change == "adapter off":
            stack.enter_context(model.disable_adapter())
        elif change == "spec":
            spec = bf.hf.describe(model)
            blocks = tuple(dataclasses.replace(block, heads=8, head_dim=8) for block in spec.blocks)
            options["spec"] = dataclasses.replace(spec, blocks=blocks)
        elif change == "autocast":
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        else:
            model.model.layers[1].register_forward_hook(_hook)
        fresh = bf.sweep(model, zoo.batch(), **options)
        assert fresh.effects.shape != first.effects.shape or not torch.equal(fresh.effects, first.effects)
        with pytest.raises(InvalidArgumentError, match="another|other"):
            bf.sweep(model, zoo.batch(), out=tmp_path / "store", **options)
    if change != "hook":
        options.pop("spec", None)
        assert torch.equal(bf.sweep(model, zoo.batch(), out=tmp_path / "store", **options).effects, first.effects)
