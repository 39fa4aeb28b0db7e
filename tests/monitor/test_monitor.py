"""The monitor against hooks and loops: extremes per request, ranges, verdicts, generation, artifacts."""

from __future__ import annotations

import math

import pytest
import torch

import bkdfast as bf
from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, ModelStateError, NonFiniteError
from bkdfast.monitor import Observations, Ranges
from bkdfast.monitor.ranges import judge
from tests.hf import zoo


def directions_for(layers=zoo.LAYERS, count=4, width=48, seed=0, **metadata) -> bf.Directions:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.nn.functional.normalize(torch.randn(layers, count, width, generator=generator), dim=-1)
    return bf.Directions(vectors, torch.ones(layers, count), ("out_proj",) * count, count, metadata)


def residual_streams(model, batch):
    """Each block's output by plain hooks: `[L, B, T, D]` float64."""
    spec, found = bf.hf.describe(model), {}

    def keep(layer):
        def hook(module, args, output):
            found[layer] = (output[0] if isinstance(output, tuple) else output).detach().double()

        return hook

    handles = [model.get_submodule(b.block).register_forward_hook(keep(i)) for i, b in enumerate(spec.blocks)]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return torch.stack([found[layer].view(*batch["input_ids"].shape, -1) for layer in range(spec.layers)])


def extremes(streams, mask, directions):
    """(low, high) `[B, L, K]` over the real tokens of each row, the obvious way."""
    low, high = [], []
    for row in range(mask.shape[0]):
        tokens = streams[:, row, mask[row].bool()]  # [L, t, D]
        cosine = torch.einsum("ltd,lkd->ltk", tokens, directions.vectors.double()) / tokens.norm(dim=-1, keepdim=True)
        low.append(cosine.amin(1))
        high.append(cosine.amax(1))
    return torch.stack(low), torch.stack(high)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", zoo.CONFIGS)
def test_extremes_of_each_request(family, padding):
    model, batch, directions = zoo.build(family), zoo.batch(padding=padding), directions_for()
    low, high = extremes(residual_streams(model, batch), batch["attention_mask"], directions)
    monitor = bf.Monitor(directions)
    with monitor.attach(model), torch.no_grad():
        model(**batch)
        model(**zoo.batch(rows=1, tokens=4, padding=padding, seed=7))
    seen = monitor.collect()
    assert seen.tokens[:, 0].tolist() == [11, 10, 9, 4] and not seen.tokens[:, 1].any()
    torch.testing.assert_close(seen.low[:3, 0].double(), low, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen.high[:3, 0].double(), high, atol=1e-5, rtol=0)
    assert (high - low).mean() > 0.05


@pytest.mark.parametrize("padding", ["left", "right"])
def test_generated_tokens_are_kept_apart(padding):
    """Greedy generation with a cache, against one forward over the finished rows without a cache."""
    model, directions = zoo.build("llama"), directions_for()
    batch = zoo.batch(padding="left") if padding == "left" else zoo.batch(padding=None)
    monitor = bf.Monitor(directions)
    with monitor.attach(model):
        out = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)
    seen = monitor.collect()
    fed = out[:, :-1]  # the last token is never fed back
    prompt = batch["input_ids"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(out), fed.shape[1] - prompt, dtype=torch.long)], 1)
    full = {"input_ids": fed, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    streams = residual_streams(model, full)
    for role, part in ((0, slice(0, prompt)), (1, slice(prompt, None))):
        chosen = torch.zeros_like(mask)
        chosen[:, part] = mask[:, part]
        chosen &= ~((fed == 0) & (torch.arange(fed.shape[1]) >= prompt))  # a generated padding token is not observed
        low, high = extremes(streams, chosen, directions)
        assert seen.tokens[:, role].tolist() == chosen.sum(1).tolist()
        torch.testing.assert_close(seen.low[:, role].double(), low, atol=1e-5, rtol=0)
        torch.testing.assert_close(seen.high[:, role].double(), high, atol=1e-5, rtol=0)


def test_static_cache_gives_the_same():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    seen = []
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        with monitor.attach(model):
            model.generate(**batch, max_new_tokens=4, do_sample=False, **options)
        seen.append(monitor.collect())
    assert seen[0].tokens.tolist() == seen[1].tokens.tolist()
    torch.testing.assert_close(seen[0].low, seen[1].low, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].high, seen[1].high, atol=1e-5, rtol=0)


def test_survives_compile():
    """Attached, then compiled in one graph: same observations as eager, over several calls without a new trace."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    model, monitor = zoo.build("llama"), bf.Monitor(directions_for())
    batches = [zoo.batch(seed=seed) for seed in (1, 2, 3)]
    counter = CompileCounterWithBackend("aot_eager")
    results = []
    for compiled in (False, True):
        with monitor.attach(model), torch.no_grad():
            call = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
            for batch in batches:
                call(**batch)
            results.append(monitor.collect())
    assert counter.frame_count == 1
    assert len(results[1]) == 9 and results[1].tokens[:, 0].tolist() == [11, 10, 9] * 3
    torch.testing.assert_close(results[1].low, results[0].low, atol=1e-6, rtol=0)
    torch.testing.assert_close(results[1].high, results[0].high, atol=1e-6, rtol=0)


def test_calibrate_then_clean_traffic_is_clean_and_other_traffic_is_flagged():
    model, batches = zoo.build("llama"), [zoo.batch(seed=seed) for seed in range(4)]
    # One direction of block 1 is what head 2 writes when its output is all ones.
    directions = directions_for()
    written = model.model.layers[1].self_attn.o_proj.weight[:, 32:48].detach().sum(1)
    directions.vectors[1, 3] = written / written.norm()
    monitor = bf.Monitor(directions).calibrate(model, batches, progress=False)
    assert monitor.ranges.requests.tolist() == [12, 0]
    with monitor.attach(model), torch.no_grad():
        model(**batches[0])
        with bf.intervene(model, bf.Add(torch.full((16,), 30.0), 1, 2, rows=1)):
            model(**batches[0])
    verdicts = monitor.verdicts()
    assert [v.status for v in verdicts[:3]] == ["clean"] * 3 and all(v.excess < 1e-5 for v in verdicts[:3])
    assert [v.flagged for v in verdicts[3:]] == [False, True, False]
    assert (verdicts[4].layer, verdicts[4].direction) == (1, 3) and "outside its range" in verdicts[4].reason
    assert monitor.verdicts() == [], "each request is judged once"


def test_generated_tokens_without_a_range_are_not_called_clean():
    model, batch = zoo.build("llama"), zoo.batch()
    monitor = bf.Monitor(directions_for()).calibrate(model, batch, progress=False)
    with monitor.attach(model):
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert {v.status for v in monitor.verdicts()} == {"incomplete"}
    monitor.calibrate(model, batch, generate=3, progress=False)
    with monitor.attach(model):
        model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert {v.status for v in monitor.verdicts()} == {"clean"}


def test_nan_activations_are_flagged_and_stay_out_of_the_ranges():
    model, batch = zoo.build("llama"), zoo.batch()
    monitor = bf.Monitor(directions_for()).calibrate(model, batch, progress=False)
    model.model.embed_tokens.weight.data[batch["input_ids"][0, 0]] = math.nan  # a token of row 0 only
    rows_with_it = (batch["input_ids"] == batch["input_ids"][0, 0]).any(1)
    with monitor.attach(model), torch.no_grad():
        model(**batch)
    seen = monitor.collect()
    assert torch.isfinite(seen.low[~rows_with_it, 0]).all()
    verdicts = monitor.judge(seen)
    assert [v.flagged for v in verdicts] == rows_with_it.tolist() and "NaN" in verdicts[0].reason
    with pytest.raises(NonFiniteError, match="clean request 0 has NaN"):
        monitor.calibrate(model, batch, progress=False)
    assert monitor.ranges is not None, "the earlier ranges are kept"


def test_lost_requests_are_reported():
    model, batch = zoo.build("llama"), zoo.batch(padding=None)
    monitor = bf.Monitor(directions_for(), slots=4).calibrate(model, batch, progress=False)
    with monitor.attach(model), torch.no_grad():
        for _ in range(3):
            model(**batch)
        with pytest.warns(UserWarning, match="5 requests were overwritten"):
            verdicts = monitor.verdicts()
    assert [v.request for v in verdicts] == [5, 6, 7, 8]


def test_save_and_load(tmp_path):
    model, batch = zoo.build("llama"), zoo.batch()
    monitor = bf.Monitor(directions_for(family="llama"), eps=0.02).calibrate(model, batch, progress=False)
    monitor.save(tmp_path / "monitor.safetensors")
    loaded = bf.Monitor.load(tmp_path / "monitor.safetensors")
    assert loaded.eps == 0.02 and torch.equal(loaded.ranges.low, monitor.ranges.low)
    assert torch.equal(loaded.directions.vectors, monitor.directions.vectors)
    with loaded.attach(model), torch.no_grad():
        model(**batch)
    assert {v.status for v in loaded.verdicts()} == {"clean"}
    (tmp_path / "monitor.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError):
        bf.Monitor.load(tmp_path / "monitor.safetensors")
    monitor.directions.save(tmp_path / "directions.safetensors")
    with pytest.raises(CheckpointError, match="directions"):
        bf.Monitor.load(tmp_path / "directions.safetensors")


def test_nothing_left_behind_after_an_exception():
    model, batch, monitor = zoo.build("llama"), zoo.batch(), bf.Monitor(directions_for())
    with pytest.raises(KeyError), monitor.attach(model):
        with torch.no_grad():
            model(**batch)
        raise KeyError("user code")
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert len(monitor.collect()) == 3, "what was seen until then is kept"


def test_ranges_merge_exactly():
    parts = [torch.randn(5, 2, 3, 4) for _ in range(2)]
    seen = [Observations(p - 1, p, torch.ones(5, 2).long(), torch.zeros(5, 2).long()) for p in parts]
    merged = Ranges.of(seen[0]).merge(Ranges.of(seen[1]))
    both = Observations(torch.cat(parts) - 1, torch.cat(parts), torch.ones(10, 2).long(), torch.zeros(10, 2).long())
    assert torch.equal(merged.low, Ranges.of(both).low) and torch.equal(merged.high, Ranges.of(both).high)


def test_the_edge_of_a_range():
    ranges = Ranges(torch.zeros(2, 1, 1), torch.full((2, 1, 1), 0.5), torch.tensor([1, 0]))
    for high, status in ((0.5, "clean"), (0.509, "clean"), (0.511, "flagged")):
        seen = Observations(
            torch.zeros(1, 2, 1, 1), torch.full((1, 2, 1, 1), high), torch.tensor([[3, 0]]), torch.zeros(1, 2).long()
        )
        assert judge(ranges, seen, 0.01)[0].status == status


def test_bad_input():
    model, batch, directions = zoo.build("llama"), zoo.batch(), directions_for()
    with pytest.raises(InvalidTypeError, match="needs Directions"):
        bf.Monitor(directions.vectors)
    with pytest.raises(InvalidArgumentError, match="eps=3"):
        bf.Monitor(directions, eps=3)
    with pytest.raises(ModelStateError, match=r"call calibrate\(model, clean_data\)"):
        bf.Monitor(directions).verdicts()
    with pytest.raises(InvalidArgumentError, match="no data"):
        bf.Monitor(directions).calibrate(model, [], progress=False)
    with pytest.raises(InvalidArgumentError, match="2 blocks of width 48, the model has 3 of 48"):
        bf.Monitor(directions_for(layers=2)).calibrate(model, batch, progress=False)
    with pytest.raises(ModelStateError, match="compiled"), bf.Monitor(directions).attach(torch.compile(model)):
        pass
    monitor = bf.Monitor(directions)
    with monitor.attach(model), pytest.raises(ModelStateError, match="attached already"):
        model(**batch)
        with monitor.attach(model):
            pass
    with pytest.warns(UserWarning, match="no forward pass"), monitor.attach(model):
        pass


def test_directions_for_other_weights_are_refused(tmp_path):
    base, tuned = zoo.build("llama", seed=0), zoo.build("llama", seed=1)
    directions = bf.delta_directions(base, tuned, rank=2, progress=False)
    bf.Monitor(directions).calibrate(tuned, zoo.batch(), progress=False)
    with pytest.raises(InvalidArgumentError, match="made for other weights"):
        bf.Monitor(directions).calibrate(base, zoo.batch(), progress=False)
    bf.Monitor(directions).calibrate(base, zoo.batch(), check_weights=False, progress=False)
