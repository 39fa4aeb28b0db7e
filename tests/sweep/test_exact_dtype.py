"""Errors against float64 are at most twice those of the plain hook loop in the same dtype on the same batch."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

import bkdfast as bf
from bkdfast.hf.batch import complete
from bkdfast.sweep import base as base_run
from tests.hf import zoo
from tests.hf.plain import PATHS
from tests.sweep import brute, kinds
from tests.sweep.brute import Brute, Place, tokens_of

TARGETS = [[5, 6, 7], [8], [9, 10], [11, 12, 13, 14]]
CASES = (("patch", "last"), ("zero", "all"), ("patch", "each"), ("zero", "sets"))
SEEDS = 3


def hook_loop(model, family, batch, variants) -> torch.Tensor:
    """Effects `[V, B]`: one forward of the whole batch for every variant, and one without edits."""
    scored = bf.metrics.target_logprob(TARGETS).extend(batch, 0)
    inputs = complete(model, scored.batch, bf.hf.describe(model))
    blocks = model.get_submodule(PATHS[family][0])
    lengths = batch["attention_mask"].sum(1).tolist()
    first = batch["attention_mask"].argmax(1).tolist()
    rows = torch.arange(len(lengths))[:, None]

    def score() -> torch.Tensor:
        found = brute.logprobs(model(**inputs).logits)[rows, scored.read]
        picked = found.gather(-1, scored.tokens[..., None])[..., 0].double()
        return (picked * scored.weight).sum(1) / scored.weight.sum(1)

    def editing(change):
        def hook(module, args):
            z = args[0].clone()
            width = z.shape[-1] // zoo.HEADS
            own = slice(change.head * width, (change.head + 1) * width)
            for row, length in enumerate(lengths):
                total = z.shape[1] - first[row]
                for i, token in enumerate(tokens_of(change.at, length, total, row)):
                    place = Place(row, change.layer, change.head, token, i, length)
                    cell = z[row, first[row] + token, own].clone()
                    z[row, first[row] + token, own] = change.value(cell, place).to(z.dtype)
            return (z, *args[1:])

        return hook

    found = []
    with torch.no_grad():
        base = score()
        for changes in variants:
            with contextlib.ExitStack() as stack:
                for change in changes:
                    projection = blocks[change.layer].get_submodule(PATHS[family][1])
                    stack.enter_context(projection.register_forward_pre_hook(editing(change)))
                found.append(score() - base)
    return torch.stack(found)


def errors(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Errors of the engine and of the hook loop against float64, and the effects; all cells of all cases and seeds."""
    ours, loops, effects = [], [], []
    for seed in range(SEEDS):
        model = zoo.build(family, seed=seed).to(dtype)
        exact = copy.deepcopy(model).double()
        batch = zoo.batch(rows=4, tokens=16, padding=("left", "right")[seed % 2], seed=seed + 20)
        for kind, grid in CASES:
            case = kinds.case(kind, grid, kinds.head_dim(family))
            if case.options["edit"].source is not None:  # its own rounding is not the engine's
                case.options["edit"].source.copy_(case.options["edit"].source.to(dtype))
            want = Brute(exact, family, [batch]).effects(case.variants, brute.logprob(TARGETS))
            metric = bf.metrics.target_logprob(TARGETS)
            result = bf.sweep(model, batch, metric=metric, progress=False, **case.options)
            found = torch.stack([result.effects[index] for index in case.index])
            ours.append((found - want).flatten())
            loops.append((hook_loop(model, family, batch, case.variants) - want).flatten())
            effects.append(want.flatten())
    return torch.cat(ours), torch.cat(loops), torch.cat(effects)


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_worse_than_hooks(family, dtype):
    ours, loop, effects = errors(family, dtype)
    ratios = {"rms": rms(ours) / rms(loop), "max": (ours.abs().max() / loop.abs().max()).item()}
    print(f"{family}, {dtype}: error of the sweep / of the hook loop: {ratios}")
    assert rms(effects) > 15 * rms(loop), "effects must be far above rounding"
    assert ratios["rms"] <= 2 and ratios["max"] <= 2, ratios


def test_a_coarse_update_is_noticed(monkeypatch):
    """An engine that rounds the edited projection to half precision is far worse than hooks."""
    right = base_run.edited_projection
    monkeypatch.setattr(base_run, "edited_projection", lambda *args: right(*args).half().float())
    monkeypatch.setattr("tests.sweep.test_exact_dtype.SEEDS", 1)
    ours, loop, _ = errors("llama", torch.float32)
    assert rms(ours) > 10 * rms(loop)
