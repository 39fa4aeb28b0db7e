"""`Sweep`: a sweep that has been checked, divided into units of work, and can run them one by one."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import complete, takes
from bkdfast.hf.capture import eager
from bkdfast.hf.edits import At
from bkdfast.hf.lowering import lower
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.prepare import Prepared
from bkdfast.hf.shared_prefix import depends_on_length, joining
from bkdfast.hf.spec import ModelSpec
from bkdfast.sweep import plan as planning
from bkdfast.sweep.base import BaseRun
from bkdfast.sweep.layout import Layout, lay_out
from bkdfast.sweep.metrics import Metric, Scored
from bkdfast.sweep.plan import Chunk, Costs, Job, Plan, Unit
from bkdfast.sweep.projection import has_hooks
from bkdfast.sweep.readout_groups import read_groups
from bkdfast.sweep.variants import HEADS, Grid, reads_columns, spans

log = logging.getLogger(__name__)


class Sweep:
    """A sweep that has been checked and planned, and can run unit by unit.

    Args:
        model: the model, unwrapped.
        state: its hooks.
        data: batches of prompts.
        grid: the variants.
        metrics: what is measured.
        chunk: variants in a batch; None: as the plan finds.
        share: variants may run over a shared prefix; None: where it pays.
        tokens: tokens that fill a batch; None: as this device has.
        split: units as small as is sensible, for a store or several processes.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        state: Prepared,
        data: Sequence[dict[str, torch.Tensor]],
        grid: Grid,
        metrics: Sequence[Metric],
        *,
        chunk: int | None = None,
        share: bool | None = None,
        tokens: int | None = None,
        split: bool = False,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise InvalidArgumentError(f"variants={chunk}: at least one head has to be in a batch")
        self.model, self.state, self.grid, self.metrics = model, state, grid, metrics
        self.notes: list[str] = []
        self.join = joining(model, state.spec) if share in (None, True) else None
        if share is None and self.join is not None and torch.is_autocast_enabled(state.device.type):
            self.join = None
            self._note("autocast is on: keys and queries differ in dtype, so no prefix is shared")
        if share is None and self.join is not None and has_hooks(model):
            self.join = None
            self._note(
                "hooks of yours are on the model and get whole rows: no prefix is shared (share_prefix=True: it is)"
            )
        if share and self.join is None:
            raise InvalidArgumentError(
                f"share_prefix=True, but {state.spec.family} is not a causal HuggingFace model with a cache"
            )
        self.share = share
        self.tokens = planning.batch_tokens(state) if tokens is None else tokens
        self.fits = 1 << 60  # tokens of a batch that memory has room for
        self.samples = sum(len(batch["input_ids"]) for batch in data)
        self.costs = Costs.of(model, state.spec)
        self.jobs: list[Job] = []
        self.members: list[tuple[int, ...]] = []  # metrics of each job
        first = 0
        for batch in data:
            for mine, scored in self._grouped(batch, first):
                self.jobs.append(self._job(batch, first, scored))
                self.members.append(mine)
            first += len(batch["input_ids"])
        self._check_edits()
        if share and not any(job.shared for job in self.jobs):
            raise InvalidArgumentError(
                "share_prefix=True, but the first edited token is a prompt's first, or the edit or a metric looks at "
                "the tokens before it; leave share_prefix out"
            )
        self.chunks = [self._chunks(job, chunk) for job in self.jobs]
        self.units: list[Unit] = []
        for job, chunks in zip(self.jobs, self.chunks, strict=True):
            self.units += planning.units_of(job, chunks, self.costs, len(self.units), split=split)

    # Planning.

    def _check_edits(self) -> None:
        """Raise where the template does not fit the model or the batches, before anything runs.

        One variant of each position tells.
        """
        blocks, layout = self.grid.spec.blocks, self.jobs[0].layout
        variants = [variant for variant in self.grid.variants if variant.edits]
        kinds = {(blocks[v.layer].heads, blocks[v.layer].head_dim, _key(v.at)): v for v in variants}
        for variant in kinds.values():
            lower(
                (),
                self.grid.spec,
                dtype=self.state.dtype,
                variants=[variant.edits],
                batch=layout.rows,
                last=layout.last,
                begin=layout.begin.tolist(),
            )

    def _grouped(self, batch: dict, first: int) -> Iterator[tuple[tuple[int, ...], list[Scored]]]:
        """Metrics that share a run, and what each reads: completed, on the model's device."""
        spec = self.state.spec
        extended = [extend(metric, batch, first, spec) for metric in self.metrics]
        longest = max(scored.batch["input_ids"].shape[1] for scored in extended)
        causal = spec.causal and not depends_on_length(self.model, longest)
        for group in read_groups(extended, causal=causal):
            yield group.members, [completed(self.model, spec, part) for part in group.scored]

    def _job(self, batch: dict, first: int, scored: list[Scored]) -> Job:
        begin, end = prompt_ends(batch)
        last = (end - begin).tolist()
        width = scored[0].batch["input_ids"].shape[1]
        causal = self.state.spec.causal and not depends_on_length(self.model, width)
        inputs = scored[0].batch
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        whole_begin, whole_end = prompt_ends({"input_ids": inputs["input_ids"], "attention_mask": mask})
        length = (whole_end - whole_begin + 1).tolist()
        spots = {_key(v.at): v.at for v in self.grid.variants if v.edits}
        starts = [[first for first, _ in spans(at, last, length)] for at in spots.values()]
        columns = any(reads_columns(edit) for variant in self.grid.variants for edit in variant.edits)
        anchors = None
        if causal and self.join is not None and not columns and starts:
            anchors = [min(row) for row in zip(*starts, strict=True)]
        # Rows of a model that counts positions by itself stay where they are; OPT does so, and counts no holes.
        known = "position_ids" in inputs or bool((mask != 0).sum(1).eq(whole_end - whole_begin + 1).all())
        moved = anchors if known and takes(self.model, "position_ids") else None
        layout = lay_out(scored, last, moved, trim=causal)
        start = layout.column(anchors) if anchors is not None else 0
        before = [layout.column(row) for row in starts] if anchors is not None else [0]  # columns, of each position
        worth = sum(before) >= planning.WORTH * layout.width * len(before)
        shared = anchors is not None and (worth or bool(self.share and max(before)))
        if shared and any(metric.whole_rows for metric in self.metrics):
            shared = all(int(read.min()) >= start for read in layout.reads)
        if not shared and anchors is not None and max(map(min, starts)) == 0:
            layout = lay_out(scored, last, None, trim=causal)
        return Job(len(self.jobs), first, layout, shared)

    def _chunks(self, job: Job, size: int | None) -> list[Chunk]:
        layout = job.layout
        variants = [variant for variant in self.grid.variants if variant.edits]
        whole = [
            int(read.min())
            for m, read in zip(self.members[job.number], layout.reads, strict=True)
            if self.metrics[m].whole_rows
        ]  # a metric of whole rows needs a variant's logits from its first column on
        columns: dict[Any, tuple[int, int]] = {}
        for variant in variants:
            if (key := _key(variant.at)) not in columns:
                # Checked before; what is cut off behind the last column read cannot show.
                rows = spans(variant.at, layout.last, [layout.width + end for end in layout.last])
                first, stop = ([bounds[i] for bounds in rows] for i in (0, 1))
                start = min(layout.column(first), layout.width - 1, *whole)
                columns[key] = start, max(min(layout.column(stop, max), layout.width), start + 1)
                if _after(layout, first):
                    self._note(
                        f"the metric reads no position at or after the edit (at={variant.at!r}): its effect is zero"
                    )
        places = [columns[_key(variant.at)] for variant in variants]
        return planning.chunks_of(variants, places, layout, size, self.tokens, shared=job.shared)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def plan(self, what: str, *, measure: bool) -> Plan:
        """The plan; with `measure`, with the rate of a matrix product of the largest batch's shape."""
        flops = sum(unit.flops for unit in self.units)
        loop = cells = ran = full = memory = 0.0
        for job, chunks in zip(self.jobs, self.chunks, strict=True):
            layout = job.layout
            forward = layout.rows * self.costs.tokens(0, 0, layout.width) + len(layout.cells(0)) * self.costs.head
            count = sum(len(chunk.variants) for chunk in chunks)
            loop += (count + 1) * forward
            cells += count
            ran += sum(len(chunk.variants) * (layout.width - chunk.start) for chunk in chunks)
            full += count * layout.width
            memory = max(
                memory, planning.held_bytes(job, chunks, self.state.spec, self.costs, self.state.dtype.itemsize)
            )
        reuse = ["blocks before the edited one"] if self.state.spec.layers > 1 else []
        if any(job.shared for job in self.jobs):
            how = "shared" if self.join == "shared" else "copied layer by layer"
            reuse.append(f"tokens before the edit (keys and values {how})")
        if self.grid.site == HEADS:
            reuse.append("attention of the edited block")
        rate = None
        if measure:
            tokens = max(
                len(c.variants) * job.layout.rows * (job.layout.width - c.start)
                for job, chunks in zip(self.jobs, self.chunks, strict=True)
                for c in chunks or [Chunk((), 0, 0)]
            )
            rate = planning.matmul_rate(max(tokens, 1), self.state.spec.width, self.state.dtype, self.state.device)
        return Plan(
            what,
            reuse,
            self.units,
            flops,
            max(loop, flops),
            (ran / max(cells, 1), full / max(cells, 1)),
            memory,
            self.most,
            rate,
            list(self.notes),
        )

    @property
    def most(self) -> int:
        """Most variants that share a batch."""
        return max((len(chunk.variants) for unit in self.units for chunk in unit.chunks), default=0)

    # Running.

    def compute(self, number: int, advance: Callable[[float], None] = lambda work: None) -> dict[str, torch.Tensor]:
        """Scores `[V, M, B]` of a unit's variants in the order of its chunks, and `baseline [M, B]`; float64.

        `advance` is told the flops of what is done, as it goes on.
        """
        unit = self.units[number]
        job = self.jobs[unit.job]
        with eager(self.model), torch.no_grad():
            base = BaseRun(
                self.model,
                self.state,
                self.grid,
                [self.metrics[m] for m in self.members[unit.job]],
                job.layout,
                unit.start,
                self.join if job.shared else None,
                max((chunk.start for chunk in unit.chunks), default=0),
                sorted({chunk.layer for chunk in unit.chunks}),
            )
            base.check_finite(job.first)
            scores = []
            for chunk in unit.chunks:
                work = planning.chunk_flops(chunk, job.layout, self.costs) / len(chunk.variants)
                scores.append(self._scores(base, list(chunk.variants), chunk.start, partial(_advance, advance, work)))
        empty = torch.zeros(0, len(base.metrics), job.layout.rows, dtype=torch.float64)
        return {"scores": torch.cat(scores) if scores else empty, "baseline": base.baseline}

    def _scores(self, base: BaseRun, variants: list, start: int, advance: Callable[[float], None]) -> torch.Tensor:
        """Scores of a chunk; in smaller pieces where memory ran out before."""
        tokens = base.layout.rows * (base.layout.width - start)
        most = max(self.fits // tokens, 1)
        found = []
        while variants:
            part = variants[:most]
            try:
                found.append(base.scores(part, start))
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(part) == 1:
                    raise torch.OutOfMemoryError(self._too_large(base.layout, start)) from None
                most = len(part) // 2
                self.fits = most * tokens
                log.warning("out of memory with %d variants in a batch; going on with %d", len(part), most)
                continue
            del variants[:most]
            advance(len(part))
        return torch.cat(found)

    def _too_large(self, layout: Layout, start: int) -> str:
        rows = layout.rows
        return f"one variant of a batch of {rows} rows and {layout.width - start} tokens does not fit into memory" + (
            f"; batches of {max(rows // 2, 1)} rows need about half of it" if rows > 1 else "; use shorter prompts"
        )

    def collect(self, results: dict[int, dict[str, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """All units' results as scores `[M, *shape, N]` (NaN where there is no variant) and baseline `[M, N]`."""
        count = 1
        for size in self.grid.shape:
            count *= size
        scores = torch.full((len(self.metrics), count, self.samples), torch.nan, dtype=torch.float64)
        baseline = torch.full((len(self.metrics), self.samples), torch.nan, dtype=torch.float64)
        empty = [variant.index for variant in self.grid.variants if not variant.edits]
        for unit in self.units:
            job, found = self.jobs[unit.job], results[unit.number]
            rows = torch.arange(job.first, job.first + job.layout.rows)
            mine = self.members[unit.job]
            index = [variant.index for chunk in unit.chunks for variant in chunk.variants]
            for i, m in enumerate(mine):
                baseline[m, rows] = found["baseline"][i]
                if index:
                    scores[m, torch.tensor(index)[:, None], rows] = found["scores"][:, i]
                if empty:
                    scores[m, torch.tensor(empty)[:, None], rows] = found["baseline"][i]
        return scores.view(len(self.metrics), *self.grid.shape, self.samples), baseline


def _out_of_memory(error: RuntimeError) -> bool:
    """Memory ran out, on a GPU or (torch raises a plain RuntimeError there) on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def extend(metric: Metric, batch: dict[str, torch.Tensor], first: int, spec: ModelSpec) -> Scored:
    """What a metric must see of a batch of prompts whose first row is sample `first`.

    Raises:
        InvalidArgumentError: it appends tokens, and attention looks ahead.
    """
    scored = metric.extend({name: value for name, value in batch.items() if name != "position_ids"}, first)
    if not spec.causal and scored.batch["input_ids"].shape != batch["input_ids"].shape:
        raise InvalidArgumentError(
            f"{metric.name} appends the target to the prompt, but in {spec.family} attention looks ahead: the model "
            "would see the tokens it is scored on; use logit_diff"
        )
    return scored


def completed(model: torch.nn.Module, spec: ModelSpec, scored: Scored) -> Scored:
    """With all that the model takes, on its device."""
    full = complete(model, scored.batch, spec)
    return dataclasses.replace(scored, batch=full).to(full["input_ids"].device)


def _key(at: At) -> Any:
    return tuple(int(i) for i in at) if not isinstance(at, (str, int, slice)) else repr(at)


def _after(layout: Layout, spot: list[int]) -> bool:
    """Every column that a metric reads lies before the first edited one of its row."""
    first = layout.begin + torch.tensor(spot, device=layout.begin.device)
    return all(
        bool(((read < first[:, None]) | (scored.weight == 0)).all())
        for read, scored in zip(layout.reads, layout.scored, strict=True)
    )


def _advance(advance: Callable[[float], None], work: float, variants: int) -> None:
    advance(work * variants)
