"""What a request is: caches filled unseen, several turns, chunks, copies of the model, compiled batches of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

import bkdfast as bf
from bkdfast.errors import InvalidArgumentError, ModelStateError
from tests.hf import zoo
from tests.monitor.test_monitor import directions_for

GREEDY = dict(do_sample=False, eos_token_id=None)


def calibrated(model) -> bf.Monitor:
    """A monitor that flags nothing."""
    monitor = bf.Monitor(directions_for(), eps=1.99)
    return monitor.calibrate(model, zoo.batch(), generate=3, progress=False)


@pytest.mark.parametrize("judged_between", [False, True])
def test_two_turns_on_one_cache(judged_between):
    """A second turn is never lost: it continues its request, or opens one that is not called clean."""
    model, batch = zoo.build("llama"), zoo.batch(rows=2, padding=None)
    monitor, verdicts = calibrated(model), []
    with monitor.attach(model):
        turn = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
        if judged_between:
            verdicts += monitor.verdicts()
        ids = torch.cat([turn.sequences, zoo.batch(rows=2, tokens=4, padding=None, seed=3)["input_ids"]], 1)
        again = dict(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=turn.past_key_values)
        model.generate(**again, max_new_tokens=3, **GREEDY)
    verdicts += monitor.verdicts()
    if judged_between:
        assert [v.status for v in verdicts] == ["clean", "clean", "incomplete", "incomplete"]
        assert verdicts[2].tokens == {"prompt": 5, "generated": 2}
        assert "13 tokens were not observed (in the cache before" in verdicts[2].reason
    else:
        assert [v.status for v in verdicts] == ["clean", "clean"]
        assert verdicts[0].tokens == {"prompt": 16, "generated": 4}


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_filled_unseen_is_not_taken_for_the_last_request(static):
    model, batch = zoo.build("llama"), zoo.batch(rows=2, padding=None)
    monitor = calibrated(model)
    cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache)
    step = dict(attention_mask=torch.ones(2, 12), past_key_values=cache)
    with monitor.attach(model), torch.no_grad():
        model(**zoo.batch(rows=2, padding=None, seed=4))
        model(input_ids=torch.full((2, 1), 9), **step)
        model(input_ids=torch.full((2, 1), 9), **{**step, "attention_mask": torch.ones(2, 13)})
    verdicts = monitor.verdicts()
    assert [v.status for v in verdicts] == ["clean"] * 2 + ["incomplete"] * 2
    assert [v.tokens["generated"] for v in verdicts] == [0, 0, 2, 2]


def test_chunked_prefill_is_the_prompt():
    model, seen = zoo.build("llama"), []
    for options in ({}, {"prefill_chunk_size": 4}):
        monitor = bf.Monitor(directions_for())
        with monitor.attach(model):
            model.generate(**zoo.batch(), max_new_tokens=3, **GREEDY, **options)
        seen.append(monitor.collect())
    assert seen[0].tokens.tolist() == seen[1].tokens.tolist() == [[11, 2], [10, 2], [9, 2]]
    torch.testing.assert_close(seen[1].low, seen[0].low, atol=1e-5, rtol=0)


def test_finished_rows_without_a_padding_token():
    """`generate` then feeds the end token to finished rows; it is no token of theirs."""
    model, batch = zoo.build("llama"), zoo.batch(padding=None)
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    free = model.generate(**batch, max_new_tokens=6, **GREEDY)
    model.generation_config.eos_token_id = int(free[1, 12])
    monitor = bf.Monitor(directions_for())
    with monitor.attach(model):
        out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    fed = (out[:, 11:-1] != model.generation_config.eos_token_id).sum(1)
    assert monitor.collect().tokens[:, 1].tolist() == fed.tolist() and fed[1] == 1


def test_generate_without_a_cache_is_refused():
    model, monitor = zoo.build("llama"), bf.Monitor(directions_for())
    with pytest.raises(ModelStateError, match="without a cache"), monitor.attach(model):
        model.generate(**zoo.batch(), max_new_tokens=3, use_cache=False, **GREEDY)


def test_a_copy_of_the_model_is_not_observed():
    model, batch = zoo.build("llama"), zoo.batch()
    monitors = [bf.Monitor(directions_for()) for _ in range(2)]
    for monitor in monitors:
        with monitor.attach(model), torch.no_grad():
            other = copy.deepcopy(model)
            other.model.embed_tokens.weight.normal_()
            model(**batch)
            if monitor is monitors[1]:
                other(**batch)
    alone, beside = (monitor.collect() for monitor in monitors)
    assert len(beside) == 3 and torch.equal(alone.low, beside.low)


def test_attached_inside_intervene_leaves_nothing_behind():
    model = zoo.build("llama")
    with bf.intervene(model, bf.Zero(1, 2)), torch.no_grad():
        with bf.Monitor(directions_for()).attach(model):
            model(**zoo.batch())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_inference_mode_then_not():
    model, monitor = zoo.build("llama"), bf.Monitor(directions_for())
    with torch.inference_mode(), monitor.attach(model):
        model(**zoo.batch())
    with monitor.attach(model):
        with torch.inference_mode():
            model(**zoo.batch())
        with torch.no_grad():
            model(**zoo.batch())
    assert len(monitor.collect()) == 9


def test_compiled_with_batches_of_any_size(fresh_dynamo):
    model, sizes = zoo.build("llama"), ((3, 11), (2, 7), (70, 4))
    results = []
    for compiled in (False, True):
        monitor = bf.Monitor(directions_for(), slots=128)
        with monitor.attach(model), torch.no_grad():
            call = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            for rows, tokens in sizes:
                call(**zoo.batch(rows, tokens, padding=None))
            results.append(monitor.collect())
    assert len(results[1]) == 75
    torch.testing.assert_close(results[1].low, results[0].low, atol=1e-6, rtol=0)


def test_more_rows_than_slots():
    with pytest.raises(InvalidArgumentError, match="at least as many slots; it has 2"):
        model = zoo.build("llama")
        with bf.Monitor(directions_for(), slots=2).attach(model), torch.no_grad():
            model(**zoo.batch())
