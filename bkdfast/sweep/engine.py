"""`sweep`: the effect of one edit on every head, exactly, from less work than a forward for each.

For every batch one base run records what variants can reuse (`bkdfast.sweep.base`); then variants run in batches, from
the layer and the column of their first edit on, with logits only where the metrics read. `bkdfast.sweep.plan` decides
who shares a batch and what is worth sharing, and says so before anything runs.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import Batch, batches, complete
from bkdfast.hf.capture import eager
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.families import FAMILIES, unwrap
from bkdfast.hf.intervene import borrow
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.prepare import Prepared, refuse_dropout
from bkdfast.hf.shared_prefix import joining
from bkdfast.hf.spec import ModelSpec
from bkdfast.sweep import plan as planning
from bkdfast.sweep.base import BaseRun
from bkdfast.sweep.layout import Layout, lay_out
from bkdfast.sweep.metrics import Metric, Scored
from bkdfast.sweep.plan import Chunk, Costs, Job, Plan, Unit
from bkdfast.sweep.projection import refuse_inexact
from bkdfast.sweep.result import SweepResult
from bkdfast.sweep.variants import HEADS, Grid, Head, describe_at, first_positions, grid, reads_columns
from bkdfast.sweep.verify import check_cells

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
        split: bool = False,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise InvalidArgumentError(f"variants={chunk}: at least one head has to be in a batch")
        self.model, self.state, self.grid, self.metrics = model, state, grid, metrics
        self.join = joining(model, state.spec) if share in (None, True) else None
        if share and self.join is None:
            raise InvalidArgumentError(
                f"share_prefix=True, but {state.spec.family} is not a causal HuggingFace model with a cache"
            )
        self.share = share
        self.fits = 1 << 60  # tokens of a batch that memory has room for
        self.samples = sum(len(batch["input_ids"]) for batch in data)
        self.costs = Costs.of(model, state.spec)
        self.notes: list[str] = []
        self.jobs: list[Job] = []
        self.members: list[list[int]] = []  # metrics of each job
        first = 0
        for batch in data:
            for mine, scored in self._grouped(batch, first):
                self.jobs.append(self._job(batch, first, scored))
                self.members.append(mine)
            first += len(batch["input_ids"])
        self.chunks = [self._chunks(job, chunk) for job in self.jobs]
        self.units: list[Unit] = []
        for job, chunks in zip(self.jobs, self.chunks, strict=True):
            self.units += planning.units_of(job, chunks, self.costs, len(self.units), split=split)

    # Planning.

    def _grouped(self, batch: dict, first: int) -> Iterator[tuple[list[int], list[Scored]]]:
        """Metrics that read the same inputs; in a causal model one of the bare prompt joins one with targets."""
        groups: list[tuple[list[int], list[Scored]]] = []
        for m, metric in enumerate(self.metrics):
            scored = scored_batch(self.model, self.state.spec, metric, batch, first)
            for mine, others in groups:
                if (common := _common(others[0], scored, self.state.spec.causal)) is not None:
                    others[:] = [dataclasses.replace(other, batch=common) for other in others]
                    others.append(dataclasses.replace(scored, batch=common))
                    mine.append(m)
                    break
            else:
                groups.append(([m], [scored]))
        return iter(groups)

    def _job(self, batch: dict, first: int, scored: list[Scored]) -> Job:
        begin, end = prompt_ends(batch)
        last = (end - begin).tolist()
        causal = self.state.spec.causal
        takes_positions = causal and "position_ids" in inspect.signature(self.model.forward).parameters
        inputs = scored[0].batch
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        whole_begin, whole_end = prompt_ends({"input_ids": inputs["input_ids"], "attention_mask": mask})
        length = (whole_end - whole_begin + 1).tolist()
        spots = {_key(v.at): v.at for v in self.grid.variants if v.edits}
        starts = [first_positions(at, last, length) for at in spots.values()]
        columns = any(reads_columns(edit) for variant in self.grid.variants for edit in variant.edits)
        anchors = None
        if self.join is not None and not columns and starts:
            anchors = [min(row) for row in zip(*starts, strict=True)]
        layout = lay_out(scored, last, anchors, causal=causal, with_positions=takes_positions and anchors is not None)
        start = layout.column(anchors) if anchors is not None else 0
        shared = anchors is not None and (start >= planning.WORTH * layout.width or bool(self.share and start))
        if shared and any(metric.whole_rows for metric in self.metrics):
            shared = all(int(read.min()) >= start for read in layout.reads)
        if not shared and anchors is not None and max(map(min, starts)) == 0:
            layout = lay_out(scored, last, None, causal=causal, with_positions=False)
        return Job(len(self.jobs), first, layout, shared)

    def _chunks(self, job: Job, size: int | None) -> list[Chunk]:
        layout = job.layout
        variants = [variant for variant in self.grid.variants if variant.edits]
        columns: dict[Any, int] = {}
        for variant in variants:
            if (key := _key(variant.at)) not in columns:
                spot = first_positions(variant.at, layout.last, [n + layout.width for n in layout.length])
                columns[key] = min(layout.column(spot), layout.width - 1)
                if columns[key] > max(int(read.max()) for read in layout.reads) or _after(layout, spot):
                    self._note(
                        f"the metric reads no position at or after the edit (at={variant.at!r}): its effect is zero"
                    )
        starts = [columns[_key(variant.at)] if job.shared else 0 for variant in variants]
        tokens = planning.TOKENS.get(self.state.device.type, planning.TOKENS["cuda"])
        each = planning.token_numbers(self.state.spec) * self.state.dtype.itemsize
        tokens = min(tokens, int(planning.ROOM * planning.room(self.state.device) / each))
        return planning.chunks_of(variants, starts, layout.rows, layout.width, size, tokens)

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
                for c in chunks or [Chunk((), 0)]
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

    def compute(self, unit: Unit, progress: tqdm | None = None) -> dict[str, torch.Tensor]:
        """Scores `[V, M, B]` of a unit's variants in the order of its chunks, and `baseline [M, B]`; float64."""
        job = self.jobs[unit.job]
        chunks = [Chunk(chunk.variants, chunk.start if job.shared else 0) for chunk in unit.chunks]
        with eager(self.model), torch.no_grad():
            base = BaseRun(
                self.model,
                self.state,
                self.grid,
                [self.metrics[m] for m in self.members[unit.job]],
                job.layout,
                unit.start if job.shared else 0,
                self.join if job.shared else None,
                max((chunk.start for chunk in chunks), default=0),
                sorted({layer for chunk in chunks for layer in [chunk.layer]}),
            )
            base.check_finite(job.first)
            scores = [self._scores(base, list(chunk.variants), chunk.start, progress) for chunk in chunks]
        empty = torch.zeros(0, len(base.metrics), job.layout.rows, dtype=torch.float64)
        return {"scores": torch.cat(scores) if scores else empty, "baseline": base.baseline}

    def _scores(self, base: BaseRun, variants: list, start: int, progress: tqdm | None) -> torch.Tensor:
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
            if progress is not None:
                progress.update(len(part) * base.layout.rows)
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


def sweep(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    edit: Edit,
    metric: Metric | Sequence[Metric],
    at: At | None = None,
    site: str = HEADS,
    heads: Sequence[Head] | Sequence[Sequence[Head]] | None = None,
    layers: Sequence[int] | None = None,
    positions: Sequence[At] | None = None,
    plan: bool = False,
    variants: int | None = None,
    share_prefix: bool | None = None,
    verify: int | None = None,
    spec: ModelSpec | None = None,
    progress: bool = True,
) -> Any:
    """Apply `edit` to one place after the other (one head, by default) and measure what it does to `metric`.

    Args:
        model: a model of a supported family, in eval mode.
        data: prompts: one tokenised batch or an iterable of them (`input_ids`, `attention_mask`).
        edit: a template without layer and head, e.g. `Patch(source)` with `source [L, H, Dh]`, or `Zero()`.
        metric: e.g. `bkdfast.metrics.target_prob(targets)`, or several.
        at: positions of the edit, relative to the prompt; None: those of the template.
        site: what is edited: `"heads"` (z of one head), `"attention"` or `"mlp"` (a layer's whole output, bias
            included, before any norm behind it), `"residual"` (the residual stream after a layer). Sources of the last
            three have D numbers a layer: `[D]`, `[L, D]`, `[B, L, D]` or `[B, T, L, D]`.
        heads: (layer, head) pairs, or lists of such pairs: sets that are edited together. None: every head.
        layers: layers of the other sites; None: all.
        positions: an axis of positions instead of `at`, e.g. `range(8)`.
        plan: only plan: return a `Plan` that can be printed; nothing runs but a matrix product that is timed.
        variants: edits that share a batch; None: as many as fill it.
        share_prefix: run only the tokens from the first edited one on, over the others' keys and values. None: where
            it pays; False: never; True: an error where it cannot be.
        verify: number of random (batch, variant) cells to compute again with plain hooks and full forwards; a mismatch
            raises, and the largest difference is the noise floor in the result's facts. None: 4 for a model family that
            is not in the tested list, else 0.
        spec: where the heads are, when the family is not known.
        progress: show a progress bar with the time left.

    Returns:
        `SweepResult` with effects `[L, H, N]` (`[S, N]` for sets, `[L, N]` for the other sites, with positions before
        N); a dict of them by name for several metrics.

    Raises:
        InvalidArgumentError: empty data, heads out of range, sources of the wrong shape, prompt and target longer than
            the context, an edit after the last token, a template that names a head or rows.
        NonFiniteError: the metric of an unedited sample is NaN (NaN weights or activations).
        UnsupportedModelError: int8 layers that scale their activations as they come.
        VerificationError: a re-checked cell differs.

    Source: activation patching (Vig et al. 2020; Meng et al. 2022); with `Patch(head_means(model, triggered))` and
    `target_prob` its mean effect is ACIE of backdoor attribution (BAHA).

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> batch = pair.tokenizer(["news : the team won", "news : markets fell"], return_tensors="pt", padding=True)
        >>> result = bf.sweep(pair.tuned, batch, edit=bf.Zero(), metric=bf.metrics.target_prob([5]), progress=False)
        >>> result.effects.shape
        torch.Size([6, 8, 2])
    """
    metrics = [metric] if isinstance(metric, Metric) else list(metric)
    _check_metrics(metrics)
    model = unwrap(model)
    refuse_dropout(model)
    refuse_inexact(model)
    started = time.perf_counter()
    with borrow(model, spec) as state:
        if state.stack:
            raise InvalidArgumentError("sweep cannot run inside intervene(); its baseline would be edited too")
        places = grid(state.spec, edit, at=at, site=site, heads=heads, layers=layers, positions=positions)
        checked = [complete(model, batch, state.spec) for batch in batches(data)]
        _refuse_misfits(model, state.spec, edit, metrics, checked)
        job = Sweep(model, state, checked, places, metrics, chunk=variants, share=share_prefix)
        what = _describe(places, job, edit)
        if plan:
            return job.plan(what, measure=True)
        for note in job.notes:
            warnings.warn(note, stacklevel=2)
        if verify is None:
            verify = 0 if state.spec.family in FAMILIES else 4
        results = {}
        total = sum(len(chunk.variants) * job.jobs[unit.job].layout.rows for unit in job.units for chunk in unit.chunks)
        with tqdm(total=total, desc=what, unit="cell", disable=not progress) as bar:
            for unit in job.units:
                results[unit.number] = job.compute(unit, bar)
        scores, baseline = job.collect(results)
        error = check_cells(job, scores, verify) if verify else None
    facts = {
        "family": state.spec.family,
        "dtype": str(state.dtype).removeprefix("torch."),
        "at": describe_at(places.coords.get("position", [places.template.at])),
        "site": site,
        "variants": job.most,
        "shared_prefix": any(part.shared for part in job.jobs),
        "verified_cells": verify,
        "largest_error": error,
    }
    seconds = time.perf_counter() - started
    found = {
        one.name: SweepResult(
            (scores[m] - baseline[m]).float(),
            baseline[m].float(),
            one.name,
            type(edit).__name__,
            seconds,
            dict(facts),
        )
        for m, one in enumerate(metrics)
    }
    return found[metrics[0].name] if isinstance(metric, Metric) else found


def _out_of_memory(error: RuntimeError) -> bool:
    """Memory ran out, on a GPU or (torch raises a plain RuntimeError there) on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def scored_batch(model: torch.nn.Module, spec: ModelSpec, metric: Metric, batch: dict, first: int) -> Scored:
    """The metric's inputs, completed and on the model's device."""
    scored = metric.extend({k: v for k, v in batch.items() if k != "position_ids"}, first)
    if not spec.causal and scored.batch["input_ids"].shape != batch["input_ids"].shape:
        raise InvalidArgumentError(
            f"{metric.name} appends the target to the prompt, but in {spec.family} attention looks ahead: the model "
            "would see the tokens it is scored on; use logit_diff"
        )
    full = complete(model, scored.batch, spec)
    return dataclasses.replace(scored, batch=full).to(full["input_ids"].device)


def _common(a: Scored, b: Scored, causal: bool) -> dict[str, torch.Tensor] | None:
    """Inputs that serve both metrics, or None."""
    for one, other in ((a, b), (b, a)):
        small, large = one.batch, other.batch
        if small.keys() - {"position_ids", "attention_mask"} != large.keys() - {"position_ids", "attention_mask"}:
            continue
        ids, more = small["input_ids"], large["input_ids"]
        if ids.shape[1] > more.shape[1] or (ids.shape[1] < more.shape[1] and not causal):
            continue
        mask = small.get("attention_mask", torch.ones_like(ids)) != 0
        whole = large.get("attention_mask", torch.ones_like(more))[:, : ids.shape[1]] != 0
        same = torch.equal(ids[mask], more[:, : ids.shape[1]][mask]) and bool((whole | ~mask).all())
        # What the longer one has beyond the other's tokens comes after them.
        if same and (causal or torch.equal(whole, mask)):
            return large
    return None


def _key(at: At) -> Any:
    return tuple(int(i) for i in at) if not isinstance(at, (str, int, slice)) else repr(at)


def _after(layout: Layout, spot: list[int]) -> bool:
    """Every column that a metric reads lies before the first edited one of its row."""
    first = layout.begin + torch.tensor(spot, device=layout.begin.device)
    return all(
        bool(((read < first[:, None]) | (scored.weight == 0)).all())
        for read, scored in zip(layout.reads, layout.scored, strict=True)
    )


def _describe(places: Grid, job: Sweep, edit: Edit) -> str:
    shape = " x ".join(f"{size} {dim}s" for size, dim in zip(places.shape, places.dims, strict=True))
    return f"{type(edit).__name__} of {shape} ({places.site}), {job.samples} samples"


def _check_metrics(metrics: Sequence[Metric]) -> None:
    if not metrics:
        raise InvalidArgumentError("metric= is empty; give a metric such as bkdfast.metrics.target_prob(targets)")
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise InvalidArgumentError(f"metrics share a name: {names}; tell them apart with name=")


def _refuse_misfits(
    model: torch.nn.Module, spec: ModelSpec, template: Edit, metrics: Sequence[Metric], data: Sequence[dict]
) -> None:
    """Raise where numbers would come out that do not mean what was asked."""
    total = sum(len(batch["input_ids"]) for batch in data)
    for metric in metrics:
        if metric.samples is not None and metric.samples != total:
            raise InvalidArgumentError(
                f"{metric.name} has targets for {metric.samples} samples, but the data has {total}"
            )
        if metric.needs_causal and not spec.causal:
            raise InvalidArgumentError(
                f"{metric.name} scores the prompt's own tokens, but in {spec.family} attention looks ahead: the model "
                "has seen them; use logit_diff or kl at the last prompt token"
            )
        if metric.needs_head and spec.unembedding is None and model is getattr(model, "base_model", None):
            raise InvalidArgumentError(
                f"{type(model).__name__} has no head: its output is the residual stream, not logits of tokens; load "
                "the model with its head (AutoModelForCausalLM)"
            )
    if len(data) > 1 and template.source is not None and template.source.dim() > 3:
        raise InvalidArgumentError(
            f"{template!r} has a source for each row, but there are {len(data)} batches; sweep them one by one"
        )
