"""The op against a float64 loop over tokens."""

from __future__ import annotations

import math

import pytest
import torch

from bkdfast.errors import BackendError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops.cosine_monitor import cosine_monitor

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-6}


def oracle(x, directions, segment, slots):
    low = torch.full((slots, len(directions)), math.inf, dtype=torch.float64)
    high = -low.clone()
    nonfinite = torch.zeros(slots, dtype=torch.int32)
    for token, s in zip(x.double(), segment.tolist(), strict=True):
        if s < 0:
            continue
        if not torch.isfinite(token).all():
            nonfinite[s] += 1
            continue
        norm = token.norm()
        cosine = directions.double() @ token / norm if norm > 0 else torch.zeros(len(directions), dtype=torch.float64)
        low[s], high[s] = torch.minimum(low[s], cosine), torch.maximum(high[s], cosine)
    return low, high, nonfinite


def state(slots, count):
    return torch.full((slots, count), math.inf), torch.full((slots, count), -math.inf), torch.zeros(slots).int()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("n", "d", "k", "slots"), [(1, 1, 1, 1), (37, 19, 5, 4), (64, 128, 40, 3), (0, 8, 2, 2), (5, 8, 0, 2)]
)
def test_against_a_loop(n, d, k, slots, dtype):
    x = torch.randn(n, d).to(dtype)
    if n > 4:
        x[1] = 0  # zero norm: cosine 0
        x[2, 0], x[3, 0] = math.nan, math.inf
        x[4] *= 1e3
    directions = torch.nn.functional.normalize(torch.randn(k, d), dim=1)
    segment = torch.randint(-1, slots, (n,)).int()
    low, high, nonfinite = state(slots, k)
    half = n // 2  # streaming: two calls equal one
    cosine_monitor(x[:half], directions, segment[:half], low, high, nonfinite)
    cosine_monitor(x[half:], directions, segment[half:], low, high, nonfinite)
    expected = oracle(x, directions, segment, slots)
    torch.testing.assert_close(low.double(), expected[0], atol=TOLERANCE[dtype], rtol=0)
    torch.testing.assert_close(high.double(), expected[1], atol=TOLERANCE[dtype], rtol=0)
    assert torch.equal(nonfinite, expected[2])


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e37])
def test_norms_that_would_overflow_or_underflow(scale):
    x = torch.tensor([[3.0, 4.0]]) * scale
    low, high, nonfinite = state(1, 2)
    cosine_monitor(x, torch.eye(2), torch.zeros(1).int(), low, high, nonfinite)
    torch.testing.assert_close(high[0], torch.tensor([0.6, 0.8]))
    assert not nonfinite.any()


def test_opcheck_and_one_graph():
    args = (torch.randn(6, 8), torch.eye(8)[:3].contiguous(), torch.zeros(6).int(), *state(2, 3))
    torch.library.opcheck(torch.ops.bkdfast.cosine_monitor.default, args)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, low, high, nonfinite):
        cosine_monitor(x * 2, args[1], args[2], low, high, nonfinite)
        return high + 1

    low, high, nonfinite = state(2, 3)
    out = run(args[0], low, high, nonfinite)
    expected = oracle(args[0], args[1], args[2], 2)
    torch.testing.assert_close(high.double(), expected[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(out, high + 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(x=torch.randn(4, 7)), InvalidArgumentError, r"\(4, 7\)"),
        (dict(x=torch.ones(4, 8, dtype=torch.int32)), InvalidTypeError, "floating point"),
        (dict(directions=torch.eye(8).half()), InvalidTypeError, "float16"),
        (dict(segment=torch.zeros(4)), InvalidArgumentError, "int32"),
        (dict(segment=torch.zeros(5).int()), InvalidArgumentError, r"\[4\]"),
        (dict(low=torch.zeros(3, 8)), InvalidArgumentError, r"\(3, 8\)"),
        (dict(high=torch.zeros(2, 8).double()), InvalidTypeError, "float64"),
        (dict(backend="cuda"), BackendError, "cuda"),
        (dict(backend="cpp"), BackendError, "no C..? kernel|not built"),
    ],
)
def test_bad_input(change, error, message):
    low, high, nonfinite = state(2, 8)
    args = dict(
        x=torch.randn(4, 8),
        directions=torch.eye(8),
        segment=torch.zeros(4).int(),
        low=low,
        high=high,
        nonfinite=nonfinite,
    )
    with pytest.raises(error, match=message):
        cosine_monitor(**{**args, **change})


def test_autocast_does_not_reach_the_cosines():
    x, directions = torch.randn(7, 33), torch.nn.functional.normalize(torch.randn(3, 33), dim=-1)
    found = []
    for enabled in (False, True):
        low, high, nonfinite = state(1, 3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cosine_monitor(x, directions, torch.zeros(7, dtype=torch.int32), low, high, nonfinite)
        found.append(low)
    assert torch.equal(*found)
