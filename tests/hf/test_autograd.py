"""Gradients through edits equal those of a plain hook that clones and assigns."""

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import ModelStateError
from tests.hf import zoo
from tests.hf.cases import CASES, HEAD_CASES, B, T, sizes
from tests.hf.plain import plain_hooks, rows_of

FAMILIES = ["llama", "gpt2", "gemma2", "opt", "falcon", "mixtral", "bert"]
CHOSEN = ["zero", "scale", "add", "patch [B, L, H, Dh]", "at -3", "at 1:3", "several", "neurons: several"]


def gradients(subject, batch):
    """A loss, and the input embeddings it is a function of."""
    embedded = subject.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    subject.zero_grad()
    out = subject(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"] != 0
    weight = torch.linspace(-1, 1, out.shape[-1])
    return embedded, (out[real].tanh() * weight).sum()


def collect(subject, embedded):
    found = {name: p.grad for name, p in subject.named_parameters() if p.grad is not None}
    return {"embeddings": embedded.grad, **{name: grad.clone() for name, grad in found.items()}}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_clone_and_assign(family, padding):
    subject, batch = zoo.build(family), zoo.batch(B, T, padding=padding)
    embedded, loss = gradients(subject, batch)
    loss.backward()
    unedited = collect(subject, embedded)
    for case in CHOSEN:
        if family == "mixtral" and case not in HEAD_CASES:
            continue
        edits, changes = CASES[case](sizes(family))
        with plain_hooks(subject, family, changes, rows_of(batch)):
            embedded, loss = gradients(subject, batch)
            loss.backward()
            want = collect(subject, embedded)
        with bf.intervene(subject, edits):
            embedded, loss = gradients(subject, batch)
            loss.backward()
            got = collect(subject, embedded)
        assert got.keys() == want.keys() and len(got) > 10
        for name, expected in want.items():
            scale = expected.abs().max().clamp(min=1.0)
            assert (got[name] - expected).abs().max() <= 1e-5 * scale, f"{case}: gradient of {name}"
        moved = (want["embeddings"] - unedited["embeddings"]).abs().max()
        assert moved > 1e-2 * unedited["embeddings"].abs().max(), f"{case} does not matter to the gradient"


@pytest.mark.parametrize("prepare", [False, True])
def test_backward_after_the_context(prepare):
    """The tables are emptied, or hold other edits, by the time of the backward."""
    subject, batch = zoo.build("llama"), zoo.batch(B, T)
    if prepare:
        bf.prepare(subject)
    edits = [bf.Patch(torch.ones(16), 0, 1), bf.Scale(2.0, 1, 0)]
    with bf.intervene(subject, edits):
        embedded, loss = gradients(subject, batch)
        loss.backward()
        want = collect(subject, embedded)
    with bf.intervene(subject, edits):
        embedded, loss = gradients(subject, batch)
    with bf.intervene(subject, [bf.Patch(torch.zeros(16), 0, 1), bf.Scale(-1.0, 1, 0)]):
        with torch.no_grad():
            subject(**batch)
        loss.backward()
    got = collect(subject, embedded)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_inside_a_nested_context():
    subject, batch = zoo.build("llama"), zoo.batch(B, T)
    with bf.intervene(subject, [bf.Patch(torch.ones(16), 0, 1), bf.Patch(torch.ones(16), 0, 2)]):
        embedded, loss = gradients(subject, batch)
        loss.backward()
        want = embedded.grad
    with bf.intervene(subject, bf.Patch(torch.ones(16), 0, 1)):
        with bf.intervene(subject, bf.Patch(torch.ones(16), 0, 2)):
            embedded, loss = gradients(subject, batch)
        loss.backward()
    assert torch.equal(embedded.grad, want)


def test_only_the_inputs_need_gradients():
    subject, batch = zoo.build("llama").requires_grad_(False), zoo.batch(B, T)
    edits, changes = CASES["several"](sizes("llama"))
    with plain_hooks(subject, "llama", changes, rows_of(batch)):
        embedded, loss = gradients(subject, batch)
        loss.backward()
    want = embedded.grad
    with bf.intervene(subject, edits):
        embedded, loss = gradients(subject, batch)
        loss.backward()
    assert torch.equal(embedded.grad, want)


def test_under_compile(fresh_dynamo):
    subject, batch = zoo.build("llama"), zoo.batch(B, T)
    edits = [bf.Zero(1, 2), bf.Scale(2.0, 0, 1, at=-1)]
    with bf.intervene(subject, edits):
        embedded, loss = gradients(subject, batch)
        loss.backward()
    want = embedded.grad
    bf.prepare(subject)
    compiled = torch.compile(subject, fullgraph=True, backend="aot_eager")
    real = batch["attention_mask"] != 0

    def loss_of(embedded):
        out = compiled(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
        return (out[real].tanh() * torch.linspace(-1, 1, out.shape[-1])).sum()

    embedded = embedded.detach().clone().requires_grad_()
    with bf.intervene(compiled, edits):
        loss_of(embedded).backward()
    torch.testing.assert_close(embedded.grad, want, atol=1e-5, rtol=1e-4)
    with bf.intervene(compiled, edits):
        late = loss_of(embedded)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()  # a compiled graph keeps the tables themselves: an error, never a wrong gradient
    plain, loss = gradients(zoo.build("llama"), batch)
    loss.backward()
    assert (plain.grad - want).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_refused(reentrant):
    """The backward pass runs blocks again: outside the context that would be without the edits, and no error."""
    subject, batch = zoo.build("llama").train(), zoo.batch()
    subject.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ModelStateError, match="gradient checkpointing runs blocks again"):
        with bf.intervene(subject, bf.Zero(1, 2)):
            subject(**batch)
    with bf.intervene(subject, bf.Zero(1, 2)), torch.no_grad():
        subject(**batch)
