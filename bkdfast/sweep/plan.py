"""What a sweep will do before it does it: what is reused, how many flops that saves, what shares a batch, how long.

A plan is made from shapes alone. Its parts are `Chunk`s (variants that run as one batch) and `Unit`s (chunks of one
batch of samples that share a base run; what a store keeps and a process draws). Both depend on nothing but the
arguments, the model and the machine's size, so a sweep that is continued computes the same batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from bkdfast.hf.prepare import Prepared
from bkdfast.hf.spec import BlockSpec, ModelSpec, submodule
from bkdfast.sweep.layout import Layout
from bkdfast.sweep.variants import Variant

TOKENS = {"cpu": 512, "cuda": 1 << 16}
"""Tokens that fill a batch: more do not make matrix products faster."""
ROOM = 0.5
"""Share of the memory beside the model that a batch's activations may take."""
WORTH = 0.2
"""Share of a row's columns that must stand before the first edit for a shared prefix to be worth its bookkeeping."""
AMORTISED = 10.0
"""A unit's variants cost so many times its base run, where there are enough of them."""


@dataclass(frozen=True)
class Chunk:
    """Variants that run as one batch: all begin at one layer, run from column `start` on, and edit `edited` columns."""

    variants: tuple[Variant, ...]
    start: int
    edited: int

    @property
    def layer(self) -> int:
        """The first layer that runs."""
        return self.variants[0].layer


@dataclass(frozen=True)
class Unit:
    """Chunks of one job that run after one base run."""

    number: int
    job: int
    chunks: tuple[Chunk, ...]
    start: int
    flops: float


@dataclass
class Costs:
    """Flops of a model's parts, a token: multiply-adds count two."""

    blocks: list[float]
    mlps: list[float]
    scores: list[float]
    head: float

    @classmethod
    def of(cls, model: torch.nn.Module, spec: ModelSpec) -> Costs:
        """Read off the weights' shapes; of an expert layer, the share that a token passes."""
        blocks, mlps = [], []
        for block in spec.blocks:
            whole = _weights(submodule(model, block.block), model)
            blocks.append(2.0 * whole)
            mlps.append(2.0 * _weights(submodule(model, _around(block)), model) if block.mlp_output else 0.0)
        head = 0.0 if spec.unembedding is None else 2.0 * _weights(submodule(model, spec.unembedding), model)
        return cls(blocks, mlps, [4.0 * block.heads * block.head_dim for block in spec.blocks], head)

    def tokens(self, first: int, start: int, stop: int) -> float:
        """Of columns [start, stop) in blocks `first` and later, attention to all earlier columns included."""
        seen = (start + stop) / 2
        return (stop - start) * sum(b + s * seen for b, s in zip(self.blocks[first:], self.scores[first:], strict=True))


def _weights(module: torch.nn.Module, model: torch.nn.Module) -> float:
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    used = getattr(text, "num_experts_per_tok", None) or 1
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or used
    matrices = [p for p in module.parameters() if p.dim() > 1]
    return sum(p.numel() * (used / experts if p.dim() > 2 else 1.0) for p in matrices)


def _around(block: BlockSpec) -> str:
    path = block.mlp or (block.down_proj or "").rpartition(".")[0]
    return path if path and path != block.block else block.down_proj or block.block


@dataclass
class Job:
    """A batch of samples under metrics that read the same inputs."""

    number: int
    first: int
    layout: Layout
    shared: bool
    """Variants may run over a shared prefix."""


@dataclass
class Plan:
    """How a sweep will run. Printing it says what matters.

    Attributes:
        units: in running order.
        flops: floating-point operations of the units, base runs included.
        loop_flops: those of one full forward for each variant and batch, plus one without edits.
        suffix: (columns that variants run, columns of a full forward), averaged over cells.
        memory: bytes held beyond the model: what a base run leaves, and one chunk's activations.
        chunk: most variants that share a batch.
        rate: measured flops a second of a matrix product of the chunk's shape; None: not measured.
        notes: what a user should know.
    """

    what: str
    reuse: list[str]
    units: list[Unit]
    flops: float
    loop_flops: float
    suffix: tuple[float, float]
    memory: float
    chunk: int
    rate: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """Least time at the measured rate."""
        return None if self.rate is None else self.flops / self.rate

    def __str__(self) -> str:
        ran, full = self.suffix
        lines = [
            self.what,
            f"  reused   {'; '.join(self.reuse) or 'nothing'}",
            f"  tokens   {ran:.0f} of {full:.0f} columns run for a variant" if ran < full else "",
            f"  flops    {_si(self.flops)} instead of {_si(self.loop_flops)}: {self.loop_flops / self.flops:.1f}x "
            "fewer than a full forward for each variant",
            f"  batch    up to {self.chunk} variants together; {len(self.units)} units of work",
            f"  memory   about {_si(self.memory, 'B')} beyond the model",
        ]
        if self.seconds is not None:
            lines.append(
                f"  time     at least {duration(self.seconds)} at the {_si(self.rate or 0.0)}/s of a matrix product"
            )
        lines += [f"  note     {note}" for note in self.notes]
        return "\n".join(line for line in lines if line)


def chunks_of(
    variants: Sequence[Variant],
    places: Sequence[tuple[int, int]],
    layout: Layout,
    size: int | None,
    tokens: int,
    *,
    shared: bool,
) -> list[Chunk]:
    """Variants of one job into batches: by layer, those with about as much to run together.

    Args:
        variants: with some edit.
        places: columns [first, stop) that each one edits.
        layout: the job's batch.
        size: variants in a batch; None: as many as fill `tokens`.
        tokens: see `TOKENS`.
        shared: columns before the first edited one need not run.
    """
    found = []
    order = sorted(zip(variants, places, strict=True), key=lambda pair: (pair[0].layer, pair[1], pair[0].index))
    while order:
        layer, start = order[0][0].layer, order[0][1][0] if shared else 0
        most = size or max(tokens // (layout.rows * (layout.width - start)), 1)
        same = [pair for pair in order[:most] if pair[0].layer == layer]
        edited = max(stop for _, (_, stop) in same) - min(first for _, (first, _) in same)
        found.append(Chunk(tuple(variant for variant, _ in same), start, edited))
        del order[: len(same)]
    return found


def units_of(job: Job, chunks: Sequence[Chunk], costs: Costs, number: int, *, split: bool) -> list[Unit]:
    """Chunks into units; with `split`, as small as their base run allows (`AMORTISED`)."""
    rows, width = job.layout.rows, job.layout.width
    start = min((chunk.start for chunk in chunks), default=0)
    base = rows * costs.tokens(0, 0, width) + costs.head * len(job.layout.cells(0))
    units: list[Unit] = []
    held: list[Chunk] = []
    spent = 0.0

    def close() -> None:
        nonlocal held, spent
        units.append(Unit(number + len(units), job.number, tuple(held), start, base + spent))
        held, spent = [], 0.0

    for chunk in chunks:
        held.append(chunk)
        spent += chunk_flops(chunk, job.layout, costs)
        if split and spent >= AMORTISED * base:
            close()
    if held or not units:
        close()
    return units


def chunk_flops(chunk: Chunk, layout: Layout, costs: Costs) -> float:
    """Unavoidable flops of a chunk: the edited block's MLP at the edited columns, the blocks after it, logits read."""
    layer, width = chunk.layer, layout.width
    tokens = costs.tokens(layer + 1, chunk.start, width) + chunk.edited * costs.mlps[layer]
    return len(chunk.variants) * (layout.rows * tokens + len(layout.cells(chunk.start)) * costs.head)


def held_bytes(job: Job, chunks: Sequence[Chunk], spec: ModelSpec, costs: Costs, size: int) -> float:
    """Bytes that a base run leaves, and those of the largest chunk's activations; `size` of an element."""
    rows, width = job.layout.rows, job.layout.width
    start = min((chunk.start for chunk in chunks), default=0)
    wide = spec.width + sum(block.heads * block.head_dim for block in spec.blocks) / spec.layers
    stay = rows * spec.layers * ((width - start) * (wide + spec.width) + 2 * width * spec.width)
    tokens = max((len(c.variants) * rows * (width - c.start) for c in chunks), default=0)
    return size * (stay + tokens * token_numbers(spec))


def token_numbers(spec: ModelSpec) -> float:
    """Numbers that one token's activations take in a block, at their most."""
    inner = max(block.neurons or 4 * spec.width for block in spec.blocks)
    return 3.0 * inner + 6.0 * spec.width


def matmul_rate(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    """Flops a second of `[rows, D] x [D, 4 D]`, the best of five."""
    a = torch.randn(rows, width, device=device).to(dtype)
    b = torch.randn(width, 4 * width, device=device).to(dtype)
    best = float("inf")
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 8.0 * rows * width * width / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def batch_tokens(state: Prepared) -> int:
    """Tokens that fill a batch of a model, as far as the device has room for their activations."""
    each = token_numbers(state.spec) * state.dtype.itemsize
    return max(min(TOKENS.get(state.device.type, TOKENS["cuda"]), int(ROOM * room(state.device) / each)), 1)


def room(device: torch.device) -> float:
    """Bytes that the device has beside what torch holds on it; not what others use, which changes from run to run."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory - torch.cuda.memory_allocated(device))
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError):
        return float("inf")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _si(value: float, unit: str = "FLOP") -> str:
    for scale, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
