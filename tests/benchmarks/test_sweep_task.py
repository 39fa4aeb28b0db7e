"""The task that the sweep benchmarks share: its loops mean what they say, and its operations are counted right."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sweep, sweep_tables
from benchmarks.sweep_task import Shape, Task, build, hook_loop

TINY = Shape(layers=3, heads=4, width=32, mlp=40, vocab=61, batch=2, tokens=7, targets=3)
EVERYWHERE = dataclasses.replace(TINY, everywhere=True)


def by_hand(task: Task) -> torch.Tensor:
    """Effects from complete rows, targets included, and probabilities multiplied up, one sample and head at a time."""
    shape = task.shape
    rows = torch.cat([task.prompts, task.targets], 1)
    effects = torch.zeros(shape.layers, shape.heads, shape.batch)

    def probability(row: torch.Tensor) -> float:
        with torch.no_grad():
            p = task.model(input_ids=row[None]).logits[0].softmax(-1)
        chances = [p[shape.tokens + i - 1, row[shape.tokens + i]] for i in range(shape.targets)]
        return torch.stack(chances).prod().item() ** (1 / shape.targets)

    for layer in range(shape.layers):
        for head in range(shape.heads):

            def change(module, args, layer=layer, head=head):
                z = args[0].unflatten(-1, (shape.heads, shape.head_dim)).clone()
                if shape.everywhere:
                    z[:, :, head] = 0
                else:
                    z[:, shape.tokens - 1, head] = task.source[layer, head]
                return (z.flatten(-2),)

            for i, row in enumerate(rows):
                before = probability(row)
                handle = task.model.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(change)
                effects[layer, head, i] = probability(row) - before
                handle.remove()
    return effects


@pytest.mark.parametrize("shape", [TINY, EVERYWHERE], ids=["last", "everywhere"])
def test_all_competitors_compute_the_task(shape):
    task = build(shape)
    expected = by_hand(task)
    assert expected.abs().amax((1, 2)).min() > 1e-4, "every layer must matter"
    versions = sweep.competitors(task)
    assert set(versions) == {sweep.LOOP, sweep.OURS} | ({sweep.CACHED} if not shape.everywhere else set())
    for name, run in versions.items():
        torch.testing.assert_close(run(), expected, atol=2e-7, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sample_of_heads_leaves_the_others_out():
    task = build(TINY)
    some, all_heads = hook_loop(task, {1}), hook_loop(task)
    assert torch.isnan(some[:, [0, 2, 3]]).all()
    assert torch.equal(some[:, 1], all_heads[:, 1])


def test_float64_is_float64():
    """Norms and source too: the last digits of a float32 run must not be in it."""
    task = build(TINY).wide()
    assert task.source.dtype == torch.float64
    assert hook_loop(task).dtype == torch.float64
    x = torch.randn(3, TINY.width, dtype=torch.float64)
    for norm in (task.model.model.norm, task.model.model.layers[0].input_layernorm):
        expected = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt() * norm.weight
        torch.testing.assert_close(norm(x), expected, atol=1e-14, rtol=1e-14)


def test_check_refuses_what_disagrees_or_is_less_exact():
    task = build(TINY)
    good = {name: run() for name, run in sweep.competitors(task).items()}
    found = sweep.check(task, good, sampled=False)
    assert found["cells"] == good[sweep.LOOP].numel()
    assert 0 < found["float64"][sweep.LOOP]["max"] < 1e-4
    assert sweep.check(task, good, sampled=True)["cells"] == TINY.layers * 2 * TINY.batch
    largest = good[sweep.LOOP].abs().max()
    with pytest.raises(AssertionError, match="prompt cached and the plain loop differ"):
        sweep.check(task, {**good, sweep.CACHED: good[sweep.CACHED] + 0.01 * largest}, sampled=False)
    with pytest.raises(AssertionError, match="more than twice"):
        sweep.check(task, {**good, sweep.OURS: good[sweep.OURS] + 1e-4 * largest}, sampled=False)
    with pytest.raises(AssertionError):
        sweep.check(task, {**good, sweep.OURS: good[sweep.OURS] * torch.nan}, sampled=False)


@pytest.mark.parametrize("long", [0.0, 1e9], ids=["few rounds", "all rounds"])
def test_a_row_of_the_table(long, monkeypatch):
    monkeypatch.setattr(sweep, "_LONG", long)
    monkeypatch.setattr(sweep, "growth", lambda shape, runner, threads: {"growth_mb": 1.0, "peak_mb": 9.0})
    row = sweep.measure(TINY, rounds=4, threads=1)
    assert row["rounds"] == (4 if long else 3)
    assert row["flop_ratio"] == TINY.flops()["loop"] / TINY.flops()["plan"] > 1
    assert row["versions"][sweep.LOOP]["speedup"] == 1
    assert row["unavoidable_s"] > 0 and row["over_unavoidable"] > 0
    failed = {"name": "another size", "shape": vars(TINY), "error": "AssertionError: no"}
    result = json.loads(json.dumps({"machine": {"name": "a machine", "torch": "2"}, "sweeps": [row, failed]}))
    text = sweep_tables.sweep_table(result)
    assert "patch, last prompt token, 3 x 4 heads, d=32, T=7, B=2, float32" in text
    assert "1 MB (1)" in text and "1 of 2 sizes failed" in text
    assert "FAILED" in sweep.summary(failed) and sweep.OURS in sweep.summary(row)


def test_operations_of_a_forward_are_those_torch_counts():
    task, shape = build(TINY), TINY
    counter = FlopCounterMode(display=False)
    task.model.set_attn_implementation("eager")
    with counter, torch.no_grad():
        task.model(input_ids=task.ids, use_cache=False, logits_to_keep=shape.targets)
    # torch counts all pairs of tokens, ours those that attend.
    masked = shape.columns**2 - shape.columns * (shape.columns + 1) / 2
    expected = counter.get_total_flops() - shape.batch * shape.layers * 4 * shape.width * masked
    assert shape.flops()["loop"] == expected * (shape.layers * shape.heads + 1)


@pytest.mark.parametrize("shape", [TINY, EVERYWHERE], ids=["last", "everywhere"])
def test_operations_of_a_variant(shape):
    """Against a list of what has to run, written out block by block."""
    suffix, edited = (shape.columns, shape.columns) if shape.everywhere else (shape.targets, 1)
    head = least = 0
    for layer in range(shape.layers):
        work = least_work = 0
        for block in range(layer, shape.layers):
            mlp = 2 * 3 * shape.width * shape.mlp
            keys = sum(shape.columns - i for i in range(suffix))  # the last token sees all, the one before one less
            rest = suffix * 4 * 2 * shape.width**2 + 2 * 2 * shape.width * keys
            work += suffix * mlp + (rest if block > layer else 0)
            least_work += (suffix if block > layer else edited) * mlp + (rest if block > layer else 0)
        extra = 2 * edited * shape.head_dim * shape.width + 2 * shape.targets * shape.width * shape.vocab
        head += shape.heads * (work + extra)
        least += shape.heads * (least_work + extra)
    flops = shape.flops()
    forward = flops["loop"] / (shape.layers * shape.heads + 1)
    assert flops["plan"] == pytest.approx(forward + shape.batch * head)
    assert flops["least"] == pytest.approx(forward + shape.batch * least)


def test_task_survives_its_folder(tmp_path):
    task = build(TINY)
    task.save(tmp_path)
    again = Task.load(tmp_path)
    assert again.shape == task.shape
    assert torch.equal(hook_loop(again), hook_loop(task))
