"""The next pair is read while one is computed, never more than that, and what fails in the thread is not lost."""

import threading

import pytest
import torch
from safetensors.torch import save_file

from bkdfast.errors import CheckpointError
from bkdfast.svd import stream as stream_module
from bkdfast.svd.plan import make_plan
from bkdfast.svd.source import open_source
from bkdfast.svd.stream import Stream, same_bits

NAMES = [f"w{i}" for i in range(5)]


@pytest.fixture
def sources(tmp_path):
    for side in ("base", "tuned"):
        save_file({name: torch.randn(20 - i, 10) for i, name in enumerate(NAMES)}, tmp_path / f"{side}.safetensors")
    return tuple(open_source(tmp_path / f"{side}.safetensors") for side in ("base", "tuned"))


@pytest.fixture
def loads(monkeypatch):
    """(tensor, thread) of every pair that is read."""
    log, inner = [], stream_module.load_pair

    def logged(base, tuned, item, **more):
        log.append((item.name, threading.current_thread() is not threading.main_thread()))
        return inner(base, tuned, item, **more)

    monkeypatch.setattr(stream_module, "load_pair", logged)
    return log


def test_the_next_pair_is_read_ahead_by_a_thread(sources, loads):
    plan = make_plan(*sources)
    with Stream(*sources, plan, plan.order()) as stream:
        for position in plan.order():
            pair = stream.take(position)
            name = plan.items[position].name
            assert torch.equal(pair.w0, sources[0].get(name)) and torch.equal(pair.w1, sources[1].get(name))
            if stream._ahead:
                stream._ahead[1].result()
            assert len(loads) <= position + 2, "one pair ahead, not more"
    assert loads == [("w0", False), *((name, True) for name in NAMES[1:])]


def test_pairs_in_another_order(sources, loads):
    plan = make_plan(*sources)
    with Stream(*sources, plan, [0, 1, 3]) as stream:
        for position in (3, 0, 4, 1):
            assert stream.take(position).w0.shape == plan.items[position].shape


def test_nothing_is_read_ahead_where_two_pairs_do_not_fit(sources, loads):
    plan = make_plan(*sources, work=lambda item: (1000, 50))
    largest = plan.least_memory
    assert largest == 5 * 50 + 2 * 20 * 10 * 4 + 1000
    for limit, ahead in ((largest, False), (plan.peak_memory, True)):
        loads.clear()
        with Stream(*sources, plan, plan.order(), limit=limit) as stream:
            for position in plan.order():
                stream.take(position)
        assert [thread for _, thread in loads] == [False, *[ahead] * 4]


def test_an_error_of_the_thread_is_raised(sources, tmp_path):
    plan = make_plan(*sources)
    with pytest.raises(CheckpointError, match="cannot read w1"), Stream(*sources, plan, plan.order()) as stream:
        pair = stream.take(4)  # nothing follows it
        (tmp_path / "tuned.safetensors").unlink()
        del pair
        sources[0].get("w0")
        stream._next[4] = 1
        stream._ahead = 1, stream._threads.submit(stream._load, 1)
        stream.take(1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bkdfast-read")]


def test_same_bits():
    w = torch.randn(40, 30)
    assert same_bits(w, w.clone()) and same_bits(w.bfloat16()[:, :1].contiguous(), w.bfloat16()[:, :1].contiguous())
    other = w.clone()
    other[39, 29] += 1e-6
    assert not same_bits(w, other) and not same_bits(w, w.double()) and not same_bits(w, w[:39])
    zero = torch.zeros(2)
    assert not same_bits(zero, -zero), "told by the pass, which counts no change"
    nan = torch.full((3,), torch.nan)
    assert same_bits(nan, nan.clone())
    assert same_bits(torch.empty(0, 3), torch.empty(0, 3)) and not same_bits(w.T, w.T)


@pytest.mark.parametrize("chunk", [8, 24, 1 << 24])
def test_same_bits_by_chunks(chunk, monkeypatch):
    monkeypatch.setattr(stream_module, "_CHUNK", chunk)
    for size in (1, 3, 8, 13, 31):
        w = torch.randint(0, 255, (size,), dtype=torch.uint8)
        for at in range(size):
            other = w.clone()
            other[at] ^= 1
            assert same_bits(w, w.clone()) and not same_bits(w, other)


def test_equal_tensors_are_hashed_once(sources, monkeypatch):
    hashed, inner = [], stream_module.tensor_digest
    monkeypatch.setattr(stream_module, "tensor_digest", lambda w: (hashed.append(w), inner(w))[1])
    plan = make_plan(*sources)
    with Stream(sources[0], sources[0], plan, [0]) as stream:
        pair = stream.take(0)
        assert pair.same and len(set(pair.digests)) == 1 and len(hashed) == 1
    with Stream(*sources, plan, [0]) as stream:
        pair = stream.take(0)
        assert not pair.same and pair.digests == (inner(pair.w0), inner(pair.w1)) and len(hashed) == 3
    with Stream(*sources, plan, [0], digest=False) as stream:
        assert stream.take(0).digests == () and len(hashed) == 3


def test_hashing_delays_neither_the_pair_nor_the_next(sources, loads, monkeypatch):
    go, inner = threading.Event(), stream_module.tensor_digest
    monkeypatch.setattr(stream_module, "tensor_digest", lambda w: go.wait(20) and inner(w))
    plan = make_plan(*sources)
    with Stream(*sources, plan, [0, 1]) as stream:
        pairs = [stream.take(0), stream.take(1)]
        assert not any(hashed.done() for pair in pairs for hashed in pair.hashes)
        go.set()
        assert [pair.digests for pair in pairs] == [(inner(pair.w0), inner(pair.w1)) for pair in pairs]
