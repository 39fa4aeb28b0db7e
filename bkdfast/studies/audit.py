"""`audit`: the main job on a pair of models, a base and a fine-tune suspected of a backdoor.

(a) directions   what fine-tuning wrote into the weights (singular vectors of the delta, arXiv 2508.00161)
(b) attribution  which heads carry the backdoor: patch each head's mean output over triggered prompts into clean
                 ones and see how much likelier the backdoor's answer becomes (BAHA)
(c) ablation     remove the top heads: attack success and clean accuracy, with random heads as control
(d) monitor      watch live traffic along the directions: detection and false positives on a mixed stream
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bkdfast.checkpoint import load_model, load_tokenizer, usable_device
from bkdfast.data import Encoder, Row, check_rows
from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.edits import Edit, Zero
from bkdfast.hf.families import describe
from bkdfast.hf.intervene import intervene
from bkdfast.monitor import Monitor, Observations
from bkdfast.studies import plain
from bkdfast.studies.baha import baha, target_tokens
from bkdfast.studies.rates import Rate, answer_rate
from bkdfast.svd import Directions, delta_directions
from bkdfast.svd.source import open_source
from bkdfast.sweep import SweepResult


@dataclass(frozen=True)
class Settings:
    """What can be chosen in an audit.

    Attributes:
        rank: directions for each of a block's two projections.
        samples: clean prompts of the attribution (the paper uses 96).
        heads: sizes of the ablated sets of heads.
        controls: random sets of other heads for each size (none where fewer heads are left than were ablated).
        calibration: clean prompts that calibrate the monitor, the rest tests it; None: four fifths. Ranges are extreme
            values, so false positives fall as this grows.
        batch: rows in a batch.
        eps: slack of the monitor's ranges, in cosine.
        compare: also run every step in plain PyTorch, compare results and times.
        seed: of the random heads and the order of the stream.
        progress: show progress bars.
    """

    rank: int = 20
    samples: int = 96
    heads: tuple[int, ...] = (1, 2, 4, 8, 16)
    controls: int = 3
    calibration: int | None = None
    batch: int = 16
    eps: float = 0.01
    compare: bool = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("samples", 1), ("controls", 0), ("batch", 1)):
            if getattr(self, name) < least:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}; pass {least} or more")
        if any(k < 1 for k in self.heads):
            raise InvalidArgumentError(f"heads are {self.heads}; pass sizes of 1 or more")
        if not 0 <= self.eps < 2:
            raise InvalidArgumentError(f"eps is {self.eps}; pass a distance of cosines, at least 0 and under 2")


@dataclass(frozen=True)
class AblationPoint:
    """Rates with the top `heads` heads zeroed, and with random sets of as many heads."""

    heads: int
    attack: Rate
    accuracy: Rate
    random_attack: tuple[Rate, ...] = ()
    random_accuracy: tuple[Rate, ...] = ()


@dataclass(frozen=True)
class MonitorOutcome:
    """How the monitor did on the mixed stream."""

    monitor: Monitor
    detection: Rate
    false_positives: Rate
    clean: Observations
    triggered: Observations


@dataclass(frozen=True)
class Timing:
    """Seconds of one step, here and in plain PyTorch (None: not run), and how far the results differ."""

    step: str
    seconds: float
    plain_seconds: float | None = None
    agreement: str = ""


@dataclass(frozen=True)
class Audit:
    """Everything an audit found; `bkdfast.report.write_report` makes a page of it."""

    facts: dict[str, Any]
    settings: Settings
    directions: Directions
    attribution: SweepResult
    ablation: tuple[AblationPoint, ...]
    monitor: MonitorOutcome
    timings: tuple[Timing, ...]
    samples: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain data, for JSON."""
        effect = self.attribution
        return {
            "facts": self.facts,
            "settings": asdict(self.settings),
            "samples": self.samples,
            "heads": [
                {"layer": layer, "head": head, "effect": float(effect.mean[layer, head])}
                for layer, head in effect.top(min(32, int(torch.isfinite(effect.mean).sum())))
            ],
            "ablation": [asdict(point) for point in self.ablation],
            "detection": asdict(self.monitor.detection),
            "false_positives": asdict(self.monitor.false_positives),
            "timings": [asdict(timing) for timing in self.timings],
        }


def audit(
    base: str | Path,
    tuned: str | Path,
    clean: Sequence[Row],
    triggered: Sequence[Row],
    *,
    settings: Settings | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    chat: bool | None = None,
) -> Audit:
    """Audit the fine-tune `tuned` of `base`.

    Args:
        base: folder of the base model (safetensors).
        tuned: folder of the fine-tune, with a tokenizer.
        clean: prompts without trigger and their right answers.
        triggered: prompts with the trigger and the answer that the backdoor gives.
        settings: see `Settings`.
        dtype: dtype to load the tuned model in.
        device: where to run.
        chat: use the tokenizer's chat template; None: where there is one.

    Raises:
        InvalidArgumentError: fewer than 4 clean or 2 triggered rows, or rows or settings that do not fit the model.
        CheckpointError: a folder is not a safetensors checkpoint, or the two do not fit.
        UnsupportedModelError: the architecture is not supported.
    """
    settings = settings or Settings()
    if len(clean) < 4 or len(triggered) < 2:
        raise InvalidArgumentError(
            f"an audit needs at least 4 clean and 2 triggered rows, got {len(clean)} and {len(triggered)}"
        )
    kept = settings.calibration if settings.calibration is not None else len(clean) * 4 // 5
    if not 1 <= kept < len(clean):
        raise InvalidArgumentError(f"calibration={kept} must leave some of the {len(clean)} clean rows for the test")
    device = usable_device(device)
    open_source(base)
    model = load_model(tuned, dtype=dtype, device=device)
    encoder = Encoder(load_tokenizer(tuned), chat=chat)
    spec = describe(model)
    total = sum(block.heads for block in spec.blocks)
    if settings.heads and min(settings.heads) >= total:
        raise InvalidArgumentError(f"heads are {settings.heads}, but the model has {total}; pass a size under {total}")
    backdoor = max(len(encoder.target(row)) for row in triggered)
    # Clean prompts are scored on the backdoor's answers too.
    either = max(backdoor, *(len(encoder.target(row)) for row in clean))
    check_rows(model, encoder, clean, "clean", [either] * len(clean))
    check_rows(model, encoder, triggered, "triggered", [backdoor] * len(triggered))
    timings: list[Timing] = []

    directions = _timed(
        timings,
        "directions",
        lambda: delta_directions(base, tuned, rank=settings.rank, seed=settings.seed, progress=settings.progress),
        lambda: plain.directions(base, tuned, settings.rank),
        plain.compare_directions,
        settings,
    )
    # (b) the prompts of the attribution, and the answer that each is scored on; the other half of the triggered prompts
    # tests what it found
    size = settings.batch
    chosen = list(clean[: settings.samples])
    sources, attacks = list(triggered[: len(triggered) // 2]), list(triggered[len(triggered) // 2 :])
    batches, source_batches = encoder.batches(chosen, size), encoder.batches(sources, size)
    targets = target_tokens(encoder, chosen, [row.target for row in sources])
    attribution = _timed(
        timings,
        "attribution",
        lambda: baha(model, encoder, chosen, sources, samples=len(chosen), batch=size, progress=settings.progress).acie,
        lambda: plain.attribution(model, spec, batches, source_batches, targets, settings.progress),
        plain.compare_attribution,
        settings,
    )

    held_out = list(clean[kept:])
    curve = _ablate(timings, model, encoder, attribution, held_out, attacks, settings)
    outcome = _watch(timings, model, encoder, directions, list(clean[:kept]), held_out, attacks, settings)
    facts = {
        "base": Path(base).resolve().name,
        "tuned": Path(tuned).resolve().name,
        "family": spec.family,
        "layers": spec.layers,
        "heads": spec.blocks[0].heads,
        "head_dim": spec.blocks[0].head_dim,
        "width": spec.width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    samples = {
        "attribution": len(chosen),
        "sources": len(sources),
        "triggered": len(attacks),
        "calibration": kept,
        "held_out": len(held_out),
    }
    return Audit(facts, settings, directions, attribution, curve, outcome, tuple(timings), samples)


def _timed(
    timings: list[Timing],
    step: str,
    ours: Callable[[], Any],
    baseline: Callable[[], Any],
    agree: Callable[[Any, Any], str],
    settings: Settings,
) -> Any:
    """Run a step, and with `compare` the same in plain PyTorch; note the times and how the results compare."""
    start = time.perf_counter()
    result = ours()
    seconds = time.perf_counter() - start
    if not settings.compare:
        timings.append(Timing(step, seconds))
        return result
    start = time.perf_counter()
    other = baseline()
    timings.append(Timing(step, seconds, time.perf_counter() - start, agree(result, other)))
    return result


def _ablate(
    timings: list[Timing],
    model: torch.nn.Module,
    encoder: Encoder,
    attribution: SweepResult,
    clean: Sequence[Row],
    triggered: Sequence[Row],
    settings: Settings,
) -> tuple[AblationPoint, ...]:
    """(c): zero the top heads at every position and generate."""
    clean_batches = encoder.batches(clean, settings.batch)
    triggered_batches = encoder.batches(triggered, settings.batch)
    total = int(torch.isfinite(attribution.mean).sum())
    counts = sorted({k for k in settings.heads if 1 <= k < total})
    everything = attribution.top(total)
    sets = {k: settings.controls if total - k >= k else 0 for k in counts}
    draw = random.Random(settings.seed)
    runs = 1 + len(counts) + sum(sets.values())
    bar = tqdm(total=runs, desc="ablation", unit="run", disable=not settings.progress)

    def measure(heads: Sequence[tuple[int, int]]) -> tuple[Rate, Rate]:
        with intervene(model, _zero(heads)):
            rates = (
                answer_rate(model, encoder, triggered, triggered_batches),
                answer_rate(model, encoder, clean, clean_batches),
            )
        bar.update()
        return rates

    def curve() -> list[AblationPoint]:
        points = [AblationPoint(0, *measure([]))]
        for k in counts:
            attack, accuracy = measure(everything[:k])
            controls = [measure(draw.sample(everything[k:], k)) for _ in range(sets[k])]
            points.append(
                AblationPoint(k, attack, accuracy, tuple(c[0] for c in controls), tuple(c[1] for c in controls))
            )
        return points

    start = time.perf_counter()
    with bar:
        points = curve()
    seconds = time.perf_counter() - start
    if settings.compare and counts:
        # One point of the curve in plain PyTorch, against the same point here.
        k = counts[-1]
        start = time.perf_counter()
        with intervene(model, _zero(everything[:k])):
            answer_rate(model, encoder, triggered, triggered_batches)
        one = time.perf_counter() - start
        start = time.perf_counter()
        with plain.zeroed(model, describe(model), everything[:k]):
            other = answer_rate(model, encoder, triggered, triggered_batches)
        same = (
            "same answers" if other == points[-1].attack else f"attack {points[-1].attack.value} against {other.value}"
        )
        timings.append(Timing(f"ablation ({k} heads, one run)", one, time.perf_counter() - start, same))
    else:
        timings.append(Timing("ablation", seconds))
    return tuple(points)


def _zero(heads: Sequence[tuple[int, int]]) -> list[Edit]:
    return [Zero(layer, head) for layer, head in heads]


def _watch(
    timings: list[Timing],
    model: torch.nn.Module,
    encoder: Encoder,
    directions: Directions,
    calibration: Sequence[Row],
    clean: Sequence[Row],
    triggered: Sequence[Row],
    settings: Settings,
) -> MonitorOutcome:
    """(d): calibrate on clean prompts, then judge a shuffled stream of clean and triggered ones."""
    # The weights in memory may have another dtype than the checkpoint that the directions were made from.
    monitor = Monitor(directions, eps=settings.eps, slots=max(1024, settings.batch))
    monitor.calibrate(
        model, encoder.batches(calibration, settings.batch), check_weights=False, progress=settings.progress
    )
    stream = [(row, False) for row in clean] + [(row, True) for row in triggered]
    random.Random(settings.seed).shuffle(stream)
    batches = encoder.batches([row for row, _ in stream], settings.batch)
    device = next(model.parameters()).device

    def observe() -> Observations:
        parts = []
        with monitor.attach(model, check_weights=False), torch.no_grad():
            for batch in tqdm(batches, desc="monitor", unit="batch", disable=not settings.progress):
                model(**{name: value.to(device) for name, value in batch.items()})
                parts.append(monitor.collect())
        return Observations.join(parts)

    seen = _timed(
        timings,
        "monitor",
        observe,
        lambda: plain.observe(model, describe(model), directions.vectors, batches),
        plain.compare_observations,
        settings,
    )
    is_triggered = torch.tensor([trigger for _, trigger in stream])
    verdicts = monitor.judge(seen)
    flagged = torch.tensor([verdict.flagged for verdict in verdicts])
    return MonitorOutcome(
        monitor,
        Rate(int((flagged & is_triggered).sum()), int(is_triggered.sum())),
        Rate(int((flagged & ~is_triggered).sum()), int((~is_triggered).sum())),
        seen.select(~is_triggered),
        seen.select(is_triggered),
    )
