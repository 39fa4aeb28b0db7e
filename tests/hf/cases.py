"""The table of edits: each in bkdfast's words and as plain changes (`tests.hf.plain`), and their comparison."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

import bkdfast as bf
from tests.hf import zoo
from tests.hf.plain import Change, plain_hooks, rows_of

L, H, B, T = zoo.LAYERS, zoo.HEADS, 3, 11
EFFECT = 1e-2
"""Least change of some logit by an edit; results are compared bit for bit, so any tolerance is far below."""


@dataclass
class Sizes:
    """What a case needs to know of a model."""

    head_dim: int
    neurons: int = 40
    dtype: torch.dtype = torch.float32

    def draw(self, *shape: int) -> torch.Tensor:
        """A source, the same for equal shapes; per-token ones differ at every place."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64).to(
            self.dtype
        )

    @property
    def d(self) -> int:
        return self.head_dim


def zero(old, *_):
    return torch.zeros_like(old)


def constant(source):
    return lambda old, *_: source


def pick(source, pieces):
    """The value from a `[B, T, L, H, ...]` source, T counted from the row's first real token; B, T may be missing."""

    def value(old, where, column, layer, i):
        found = source
        if source.dim() - (old.numel() > 1) >= 3:
            found = found[where.row]
        if source.dim() - (old.numel() > 1) >= 4:
            found = found[column - where.first]
        return found[layer, pieces[i]]

    return value


def patch(source, layers, pieces, **where):
    """Plain changes of a patch from a source with layers in it."""
    return Change(layers, pieces, pick(source, pieces), **where)


def head_patch(s, shape, layer, pieces, *, edit=bf.Patch, at="all", **where):
    source = s.draw(*shape, L, H, s.d)
    given = pieces if pieces != list(range(H)) else None
    rows = {"rows": where["rows"]} if "rows" in where else {}
    return [edit(source, layer, given, at=at, **rows)], [patch(source, [layer], pieces, **where)]


def neuron_patch(s, shape, layer, pieces, *, at="all", **where):
    source = s.draw(*shape, L, s.neurons)
    return (
        [bf.Patch(source, layer, neuron=pieces, at=at)],
        [patch(source, [layer], pieces, neurons=True, **where)],
    )


def zeros(at, when, layer=1, head=2, **rows):
    return lambda s: ([bf.Zero(layer, head, at=at, **rows)], [Change([layer], [head], zero, when=when, **rows)])


def between(start, stop):
    return lambda column, where: start <= column - where.first < stop


def _resample(s):
    edit = bf.Resample(s.draw(B, L, H, s.d), 1, [0, 2], seed=4)
    return [edit], [patch(edit.source, [1], [0, 2])]


def _several(s):
    vector, source = s.draw(s.d), s.draw(B, L, H, s.d)
    edits = [
        bf.Zero(0, [0, 1]),
        bf.Add(vector, 0, 2, at="last_prompt", scale=3.0),
        bf.Patch(source, 2, [1, 3], at=-2),
        bf.Scale(2.5, 2, 0, rows=[1]),
        bf.Scale(-1.0, 1, 2, at=slice(0, 4)),
        bf.Zero(1, 2, at=slice(4, 6)),
    ]
    changes = [
        Change([0], [0, 1], zero),
        Change([0], [2], lambda old, *_: old + 3.0 * vector.to(old.dtype), when=lambda c, w: c == w.last),
        patch(source, [2], [1, 3], when=lambda c, w: c == w.last - 1),
        Change([2], [0], lambda old, *_: 2.5 * old, rows=[1]),
        Change([1], [2], lambda old, *_: -old, when=between(0, 4)),
        Change([1], [2], zero, when=between(4, 6)),
    ]
    return edits, changes


def _several_neurons(s):
    edits = [bf.Zero(0, neuron=[0, 39]), bf.Scale(3.0, 2, neuron=[7, 1]), bf.Zero(0, 1)]
    changes = [
        Change([0], [0, 39], zero, neurons=True),
        Change([2], [7, 1], lambda old, *_: 3.0 * old, neurons=True),
        Change([0], [1], zero),
    ]
    return edits, changes


HEAD_CASES = {
    "zero": zeros("all", lambda c, w: True),
    "zero, list of heads": lambda s: ([bf.Zero(0, [0, 3])], [Change([0], [0, 3], zero)]),
    "zero, a whole layer": lambda s: ([bf.Zero(2)], [Change([2], range(H), zero)]),
    "zero, a head of every layer": lambda s: ([bf.Zero(head=1)], [Change(range(L), [1], zero)]),
    "zero, list of layers": lambda s: ([bf.Zero([0, 2], 3)], [Change([0, 2], [3], zero)]),
    "scale": lambda s: ([bf.Scale(-1.5, 0, 1)], [Change([0], [1], lambda old, *_: -1.5 * old)]),
    "add": lambda s: (
        [bf.Add(s.draw(s.d), 1, 3, scale=2.5)],
        [Change([1], [3], lambda old, *_: old + 2.5 * s.draw(s.d).to(old.dtype))],
    ),
    "mean": lambda s: head_patch(s, (), 1, [0, 1], edit=bf.Mean),
    "patch [Dh]": lambda s: ([bf.Patch(s.draw(s.d), 1, [3, 0])], [Change([1], [3, 0], constant(s.draw(s.d)))]),
    "patch [n, Dh]": lambda s: (
        [bf.Patch(s.draw(2, s.d), 1, [3, 0])],
        [Change([1], [3, 0], lambda old, where, column, layer, i: s.draw(2, s.d)[i])],
    ),
    "patch [L, H, Dh]": lambda s: head_patch(s, (), 2, list(range(H))),
    "patch [L, H, Dh], every layer": lambda s: (
        [bf.Patch(s.draw(L, H, s.d), head=[2])],
        [patch(s.draw(L, H, s.d), range(L), [2])],
    ),
    "patch [B, L, H, Dh]": lambda s: head_patch(s, (B,), 1, [2, 1]),
    "patch [B, L, H, Dh], rows": lambda s: head_patch(s, (B,), 1, [2], rows=[2, 0]),
    "patch [B, L, H, Dh], last": lambda s: head_patch(
        s, (B,), 1, [2, 1], at="last_prompt", when=lambda c, w: c == w.last
    ),
    "patch [B, T, L, H, Dh]": lambda s: head_patch(
        s, (B, T), 1, [1, 3], at=slice(0, None), when=lambda c, w: c >= w.first
    ),
    "patch [B, 3, L, H, Dh]": lambda s: head_patch(s, (B, 3), 0, [0], at=slice(0, None), when=between(0, 3)),
    "patch [B, 1, L, H, Dh]": lambda s: head_patch(s, (B, 1), 0, [0], at=slice(0, None), when=between(0, 1)),
    "resample": _resample,
    "at last_prompt": zeros("last_prompt", lambda c, w: c == w.last),
    "at prompt": zeros("prompt", lambda c, w: c <= w.last),
    "at 0": zeros(0, lambda c, w: c == w.first),
    "at 4": zeros(4, lambda c, w: c == w.first + 4),
    "at -1": zeros(-1, lambda c, w: c == w.last),
    "at -3": zeros(-3, lambda c, w: c == w.last - 2),
    "at 1:3": zeros(slice(1, 3), between(1, 3)),
    "at 3:": zeros(slice(3, None), lambda c, w: c >= w.first + 3),
    "at :2": zeros(slice(None, 2), between(0, 2)),
    "at -4:-1": zeros(slice(-4, -1), lambda c, w: w.last - 3 <= c < w.last),
    "at -3:": zeros(slice(-3, None), lambda c, w: w.last - 2 <= c <= w.last),
    "at :-2": zeros(slice(None, -2), lambda c, w: c < w.last - 1),
    "at a position each": zeros([2, 0, 5], lambda c, w: c == w.first + [2, 0, 5][w.row]),
    "at a position each, rows": zeros([2, 0, 5], lambda c, w: c == w.first + [2, 0, 5][w.row], rows=[2]),
    "one row": zeros("all", lambda c, w: True, rows=[1]),
    "two rows": zeros(-2, lambda c, w: c == w.last - 1, rows=[2, 0]),
    "several": _several,
}
NEURON_CASES = {
    "neurons: zero": lambda s: ([bf.Zero(1, neuron=list(range(9)))], [Change([1], range(9), zero, neurons=True)]),
    "neurons: patch scalar": lambda s: (
        [bf.Patch(torch.tensor(4.0), 0, neuron=5, at=-1)],
        [Change([0], [5], constant(torch.tensor([4.0])), when=lambda c, w: c == w.last, neurons=True)],
    ),
    "neurons: patch [n]": lambda s: (
        [bf.Patch(3 * s.draw(3), 1, neuron=[8, 2, 11])],
        [Change([1], [8, 2, 11], lambda old, where, column, layer, i: (3 * s.draw(3))[i], neurons=True)],
    ),
    "neurons: patch [L, M]": lambda s: neuron_patch(s, (), 1, [1, 30]),
    "neurons: patch [B, L, M]": lambda s: neuron_patch(s, (B,), 2, [39, 0, 3]),
    "neurons: patch [B, T, L, M]": lambda s: neuron_patch(
        s, (B, T), 0, [4, 6], at=slice(0, None), when=lambda c, w: c >= w.first
    ),
    "neurons: several": _several_neurons,
}
CASES = HEAD_CASES | NEURON_CASES


@functools.cache
def model(family: str, dtype: torch.dtype = torch.float32, attention: str | None = None) -> torch.nn.Module:
    """One model a family for all tests that leave it as it was."""
    return zoo.build(family, dtype=dtype, attention=attention)


def sizes(family: str, dtype: torch.dtype = torch.float32) -> Sizes:
    explicit = family in ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral")
    return Sizes(16 if explicit else 12, dtype=dtype)


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def check(family: str, case: str, padding: str | None, dtype: torch.dtype = torch.float32) -> None:
    """bkdfast's result equals the plain hooks' bit for bit, and both are far from the unedited model."""
    subject, batch = model(family, dtype), zoo.batch(B, T, padding=padding)
    edits, changes = CASES[case](sizes(family, dtype))
    with plain_hooks(subject, family, changes, rows_of(batch)):
        want = logits(subject, batch)
    with bf.intervene(subject, edits):
        got = logits(subject, batch)
    real = batch["attention_mask"] != 0
    assert torch.isfinite(want[real]).all()
    effect = (want - logits(subject, batch))[real].abs().max()
    assert effect > EFFECT, f"{case}: the edit moves no logit by more than {effect}"
    assert torch.equal(got[real], want[real]), f"{case}: off by {(got - want)[real].abs().max()}"
