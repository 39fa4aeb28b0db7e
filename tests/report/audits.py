"""Small audits made of numbers, without a model."""

import torch

from bkdfast.monitor import Monitor, Observations
from bkdfast.monitor.ranges import Ranges
from bkdfast.studies.audit import AblationPoint, Audit, MonitorOutcome, Settings, Timing
from bkdfast.studies.rates import Rate
from bkdfast.svd import Directions
from bkdfast.sweep import SweepResult

TOP = (2, 3)  # layer and head of the largest effect


def make_audit(
    *,
    layers=4,
    heads=6,
    attack=(200, 198, 90, 4),
    accuracy=(199, 199, 199, 198),
    random=(199, 198, 197),
    total=200,
    triggered_excess=0.3,
    effect=0.4,
    names=("tuned", "base"),
    metric="target probability",
    compare=True,
    rank=3,
    n_clean=50,
    n_triggered=30,
):
    """An audit; `attack` and `accuracy` are the hits of `total` with 0, 1, 2, 4, ... heads zeroed."""
    g = torch.Generator().manual_seed(0)
    counts = (0, *(2**i for i in range(len(attack) - 1)))
    controls = tuple(Rate(hits, total) for hits in random)
    ablation = tuple(
        AblationPoint(k, Rate(a, total), Rate(c, total), controls if k else (), controls if k else ())
        for k, a, c in zip(counts, attack, accuracy, strict=True)
    )
    effects = 0.02 * torch.randn(layers, heads, 20, generator=g)
    effects[TOP] += effect
    effects[0, 1] = torch.nan
    vectors = torch.randn(layers, 2 * rank, 16, generator=g)
    strength = torch.rand(layers, 2 * rank, generator=g).sort(-1, descending=True).values + 0.1
    directions = Directions(
        vectors / vectors.norm(dim=-1, keepdim=True), strength, ("out_proj",) * rank + ("down_proj",) * rank, rank
    )
    monitor = Monitor(directions)
    clean, triggered = observe(n_clean, layers, 2 * rank, g), observe(n_triggered, layers, 2 * rank, g)
    triggered.high[:, 0, 1, 2 * rank - 2] += triggered_excess
    monitor.ranges = Ranges.of(observe(n_clean, layers, 2 * rank, g))
    return Audit(
        facts={
            "tuned": names[0],
            "base": names[1],
            "family": "llama",
            "layers": layers,
            "heads": heads,
            "head_dim": 8,
            "width": 16,
            "parameters": 1_234_567,
            "dtype": "float32",
            "device": "cpu",
            "threads": 1,
            "torch": "2.13",
        },
        settings=Settings(rank=rank),
        directions=directions,
        attribution=SweepResult(effects, torch.full((20,), 0.1), metric, "Patch", 1.0, {"at": "last_prompt"}),
        ablation=ablation,
        monitor=MonitorOutcome(
            monitor, flagged(monitor, triggered), flagged(monitor, clean), clean=clean, triggered=triggered
        ),
        timings=tuple(
            Timing(step, 1.5, 12.0 if compare else None, "same numbers" if compare else "")
            for step in ("directions", "attribution", "ablation", "monitor")
        ),
        samples={"attribution": 20, "triggered": 30, "calibration": 50, "held_out": 50},
    )


def observe(count, layers, directions, generator):
    """Prompts whose cosines lie within [-0.2, 0.2]; nothing was generated."""
    low, high = (torch.full((count, 2, layers, directions), end) for end in (torch.inf, -torch.inf))
    first, second = 0.2 * torch.rand(2, count, layers, directions, generator=generator)
    low[:, 0], high[:, 0] = -first, second
    tokens = torch.tensor([[9, 0]]).repeat(count, 1)
    return Observations(low, high, tokens, torch.zeros_like(tokens))


def flagged(monitor, seen):
    return Rate(sum(verdict.flagged for verdict in monitor.judge(seen)), len(seen))
