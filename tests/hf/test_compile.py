"""`prepare`, then `torch.compile`: equal to eager, one graph for all edits; the other order is refused."""

import copy
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, ModelStateError
from tests.hf import zoo
from tests.hf.cases import EFFECT, B, H, L, T, logits, sizes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def steps(family):
    """(edits, batch): other edits, other positions, other rows, other padding; always the same shapes."""
    source = torch.randn(B, L, H, sizes(family).d, generator=torch.Generator().manual_seed(3))
    left, right, whole = (zoo.batch(B, T, padding=p, seed=i) for i, p in enumerate(("left", "right", None)))
    return [
        ([bf.Zero(1, 2)], left),
        ([bf.Zero(0, [0, 3], at="last_prompt"), bf.Scale(-2.0, 2, 1, rows=[1])], left),
        ([bf.Patch(source, 1, [2, 0], at=3)], right),
        ([bf.Add(source[0, 0, 0], at=-2, scale=2.0), bf.Zero(0, 0, at=1)], whole),
        ([], left),
    ]


def run(family, backend, close):
    subject = zoo.build(family)
    counter = CompileCounterWithBackend(backend)
    plain = copy.deepcopy(subject)
    bf.prepare(subject)
    compiled = torch.compile(subject, fullgraph=True, backend=counter)
    for edits, batch in steps(family):
        real = batch["attention_mask"] != 0
        unedited = logits(plain, batch)[real]
        with bf.intervene(plain, edits):
            want = logits(plain, batch)[real]
        with bf.intervene(compiled, edits):
            got = logits(compiled, batch)[real]
        close(got, want)
        assert not edits or (got - unedited).abs().max() > EFFECT
    assert counter.frame_count == 1
    close(logits(compiled, batch)[real], unedited)


@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_equals_eager_in_one_graph(family):
    def close(got, want):
        assert torch.equal(got, want)

    run(family, "aot_eager", close)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_inductor(family):
    def close(got, want):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)

    run(family, "inductor", close)


def test_neurons_and_more_edits_than_the_capacity():
    subject = zoo.build("opt")  # flattens tokens before its MLP
    bf.prepare(subject, capacity=2, sources=1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(subject, fullgraph=True, backend=counter)
    batch = zoo.batch()
    for count, graphs in ((2, 1), (2, 1), (20, 2), (3, 2)):
        edit = bf.Patch(torch.randn(L, 40), 1, neuron=list(range(count)), at=-1)
        with bf.intervene(subject, edit):
            want = logits(subject, batch)
            got = logits(compiled, batch)
        assert torch.equal(got, want) and not torch.equal(got, logits(subject, batch))
        assert counter.frame_count <= graphs + 1


@pytest.mark.parametrize("how", ["wrapper", "in place", "forward", "a block"])
def test_compiled_before_prepare_is_refused(how):
    subject = zoo.build("llama")
    given = subject
    if how == "wrapper":
        given = torch.compile(subject, backend="eager")
    elif how == "in place":
        subject.compile(backend="eager")
    elif how == "forward":
        subject.forward = torch.compile(subject.forward, backend="eager")
    else:
        subject.model.layers[1].forward = torch.compile(subject.model.layers[1].forward, backend="eager")
    message = r"compiled but was not prepared.*call bkdfast.prepare\(model\) before torch.compile"
    with pytest.raises(ModelStateError, match=message):
        bf.prepare(given)
    with pytest.raises(ModelStateError, match=message):
        with bf.intervene(given, bf.Zero(0, 0)):
            pass
    with pytest.raises(ModelStateError, match=message):
        bf.patch_many(given, zoo.batch(), [[]])
    assert not any(part._forward_pre_hooks for part in subject.modules())


@pytest.mark.parametrize("how", ["wrapper", "in place", "forward"])
def test_prepared_before_compile_works(how):
    subject, batch = zoo.build("llama"), zoo.batch()
    before = logits(subject, batch)
    handle = bf.prepare(subject)
    assert bf.prepare(subject) is handle
    given = subject
    if how == "wrapper":
        given = torch.compile(subject, backend="aot_eager", fullgraph=True)
        assert bf.prepare(given) is handle
    elif how == "in place":
        subject.compile(backend="aot_eager", fullgraph=True)
    else:
        subject.forward = torch.compile(subject.forward, backend="aot_eager", fullgraph=True)
    assert torch.equal(logits(given, batch), before)
    with bf.intervene(zoo_twin := zoo.build("llama"), bf.Zero(1, 2)):
        want = logits(zoo_twin, batch)
    with bf.intervene(given, bf.Zero(1, 2)):
        assert torch.equal(logits(given, batch), want)
    assert torch.equal(logits(given, batch), before)


def test_a_graph_from_before_prepare_is_not_used_again():
    """Dynamo looks graphs up by code and does not guard on hooks; prepare() has to drop them."""
    subject, batch = zoo.build("llama"), zoo.batch()
    early = torch.compile(subject, backend="aot_eager", fullgraph=True)
    before = logits(early, batch)
    bf.prepare(subject)
    late = torch.compile(subject, backend="aot_eager", fullgraph=True)
    with bf.intervene(subject, bf.Zero(1, 2)):
        want = logits(subject, batch)
    assert not torch.equal(want, before)
    for compiled in (late, early):
        with bf.intervene(compiled, bf.Zero(1, 2)):
            assert torch.equal(logits(compiled, batch), want)


def test_generate_that_compiled_by_itself():
    """With a static cache on an accelerator `generate` compiles the model and keeps the graph."""
    subject, batch = zoo.build("llama"), zoo.batch()
    compiling = CompileConfig(backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    options = dict(max_new_tokens=4, do_sample=False, cache_implementation="static", compile_config=compiling)
    before = subject.generate(**batch, **options)
    edits = bf.Scale(-3.0, at="generated")
    with pytest.raises(ModelStateError, match=r"generate\(\) with a static cache has compiled this model.*prepare"):
        with bf.intervene(subject, edits):
            pass
    bf.prepare(subject)
    with bf.intervene(subject, edits):
        got = subject.generate(**batch, **options)
        want = subject.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, want) and not torch.equal(got, before)


def test_a_context_without_a_forward_warns():
    subject, batch = zoo.build("llama"), zoo.batch()
    with pytest.warns(UserWarning, match="no forward pass reached the edits"):
        with bf.intervene(subject, bf.Zero(0, 0)):
            pass
    handle = bf.prepare(subject)
    compiled = torch.compile(subject, backend="aot_eager")
    logits(compiled, batch)
    handle.remove()
    logits(compiled, batch)  # a graph without hooks
    with pytest.warns(UserWarning, match=r"compiled before bkdfast.prepare\(model\)"):
        with bf.intervene(subject, bf.Zero(0, 0)):
            logits(compiled, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with bf.intervene(subject, bf.Zero(0, 0)):
            logits(subject, batch)
        with bf.intervene(subject, []):
            pass


def test_a_wrong_batch_size_under_compile():
    subject = zoo.build("llama")
    bf.prepare(subject)
    compiled = torch.compile(subject, backend="aot_eager")
    with pytest.raises(InvalidArgumentError, match="made for a batch of 3 rows"):
        with bf.intervene(compiled, bf.Patch(torch.randn(3, L, H, 16), 1, 2)):
            logits(compiled, zoo.batch(5))
