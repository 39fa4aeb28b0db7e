"""The base run of a batch, and variants that start from what it left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from bkdfast.errors import ModelStateError, NonFiniteError
from bkdfast.hf.batch import call
from bkdfast.hf.lowering import HEADS as HEADS_KEY
from bkdfast.hf.lowering import Tables, lower
from bkdfast.hf.prefix import ATTENTION, MLP, RESIDUAL, Output, Recording
from bkdfast.hf.prepare import Prepared
from bkdfast.hf.readout import read_logits
from bkdfast.hf.shared_prefix import KERNEL, PrefixCache, Stopped, attending
from bkdfast.hf.spec import submodule
from bkdfast.ops.edit_table import COLUMN, FIRST, ORIGIN, ROW, START, STOP, EditTable
from bkdfast.ops.patch_heads import patch_heads
from bkdfast.sweep.layout import Layout
from bkdfast.sweep.metrics import Metric
from bkdfast.sweep.projection import RUN, edited_projection, has_hooks, projection_mode
from bkdfast.sweep.variants import HEADS, Grid, Variant


class _Chunk(NamedTuple):
    """Logits `[c, vocab]` of `copies` times `cells [U, 2]` (row, column), from the `first` of those `copies * U` on."""

    cells: torch.Tensor
    copies: int
    first: int
    logits: torch.Tensor


@dataclass
class BaseRun:
    """One unedited forward of a batch, recorded; `scores` runs variants from it.

    Args:
        model: the model, eager.
        state: its hooks, for edits in blocks after the first edited one.
        grid: the sweep's variants.
        metrics: metrics that read this layout.
        layout: the batch.
        start: P, the column from which variants run; the columns before it run once. 0: no shared prefix.
        join: how variants share a prefix (`bkdfast.hf.shared_prefix.joining`).
        furthest: the last column from which some variant runs.
        layers: layers that variants begin at.
    """

    model: torch.nn.Module
    state: Prepared
    grid: Grid
    metrics: Sequence[Metric]
    layout: Layout
    start: int
    join: str | None
    furthest: int
    layers: Sequence[int]
    states: list[Any] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        spec, layout = self.state.spec, self.layout
        self.recording = Recording(spec, self.model)
        self.cache = PrefixCache(spec.layers, layout.rows, self.join) if self.join else None
        self.values = [read.new_zeros(read.numel(), dtype=torch.float64) for read in layout.reads]
        self.states = [None] * len(self.metrics)
        self._kept: list[_Chunk] = []
        self.state.write(Tables({}))
        if self.start:
            self._run_prefix()
        if self.cache is not None:
            self.cache.keep = self.furthest > self.start
        site = self.grid.site
        with self.recording.record(self.layers, z=site == HEADS, attention=site != RESIDUAL, mlp=site == MLP):
            self._take(self.start)
        self._begin()
        if self.cache is not None:
            self.cache.keep = False
            self.cache.clean(layout.inputs["attention_mask"] != 0)
            if self.start:
                self._check_served(spec.layers)

    def _run_prefix(self) -> None:
        """Fill the cache with columns [0, P); in the last layer only its keys and values, unless a metric looks."""
        assert self.cache is not None
        self.cache.keep = True
        if len(self.layout.cells(0, self.start)):
            self._take(0, self.start)
        else:
            self.cache.stop_at = self.state.spec.layers - 1
            with contextlib.suppress(Stopped), self._attending(0):
                call(self.model, self._inputs(1, 0, self.start))
            self.cache.stop_at = None
        self.cache.length, self.cache.served = self.start, 0

    def _check_served(self, *layers: int) -> None:
        """Raise if attention that ran over a prefix was not ours in so many layers."""
        if self.cache is not None and self.join == KERNEL and self.cache.served not in layers:
            raise ModelStateError(
                f"{self.state.spec.family} called the attention interface {self.cache.served} times in {layers[0]} "
                "layers; its prefix cannot be shared: pass share_prefix=False"
            )

    def _attending(self, start: int) -> contextlib.AbstractContextManager:
        """Columns from `start` on run inside this context; the first ones with the model's own attention.

        Not in float64: there HuggingFace's eager attention has NaN in rows that begin with padding, as shifted ones do.
        """
        if self.cache is None or not (start or self.state.dtype == torch.float64):
            return contextlib.nullcontext()
        return attending(self.model, self.cache)

    # One forward, and what the metrics make of it.

    def _inputs(self, copies: int, start: int, stop: int | None) -> dict[str, Any]:
        """Model inputs of columns [start, stop) for `copies` copies of the batch; the mask reaches back to column 0."""
        given = self.layout.inputs
        inputs: dict[str, Any] = {}
        for name, value in given.items():
            if isinstance(value, torch.Tensor) and value.dim() and len(value) == self.layout.rows:
                if value.dim() > 1 and value.shape[1] == self.layout.width:
                    value = value[:, : stop or self.layout.width] if name == "attention_mask" else value[:, start:stop]
                value = value.repeat(copies, *[1] * (value.dim() - 1))
            inputs[name] = value
        if self.cache is not None and (start or self.cache.keep):
            inputs |= {"past_key_values": self.cache, "use_cache": True}
        return inputs

    def _run(
        self, copies: int, start: int, stop: int | None = None, cells: torch.Tensor | None = None
    ) -> Iterator[_Chunk]:
        """Run columns [start, stop) of the model and yield the logits that metrics read there, or at some of them."""
        cells = self.layout.cells(start, stop) if cells is None else cells
        if not len(cells):
            return
        rows = torch.arange(copies, device=cells.device).repeat_interleave(len(cells)) * self.layout.rows
        row, column = cells.repeat(copies, 1).unbind(1)
        inputs = self._inputs(copies, start, stop)
        with self._attending(start):
            # A metric of whole rows gets them in one piece.
            whole = len(cells) if any(metric.whole_rows for metric in self.metrics) else 1
            reader = read_logits(self.model, self.state.spec, inputs, rows + row, column - start, multiple=whole)
            for piece, logits in reader:
                yield _Chunk(cells, copies, piece.start, logits.to(cells.device))

    def _take(self, start: int, stop: int | None = None) -> None:
        """Run the base over columns [start, stop) and keep the metrics' values; for some, the logits."""
        keep = any(metric.needs_base for metric in self.metrics)
        for chunk in self._run(1, start, stop):
            if keep:
                self._kept.append(chunk)
            for m, metric in enumerate(self.metrics):
                if not metric.needs_base:
                    self._evaluate(m, self.values[m], chunk)

    def _begin(self) -> None:
        """Hand the base's logits to the metrics that compare with them."""
        for m, metric in enumerate(self.metrics):
            if metric.needs_base:
                shape = self.layout.reads[m].numel(), self._kept[0].logits.shape[-1]
                whole = self._kept[0].logits.new_zeros(shape)
                for chunk in self._kept:
                    at, place = self._places(m, chunk)
                    whole[place] = chunk.logits[at]
                self.states[m] = metric.begin(whole, self.layout.scored[m])
                for chunk in self._kept:
                    self._evaluate(m, self.values[m], chunk)
        self._kept.clear()

    def _places(self, m: int, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """What metric m reads of a chunk: (its row of logits, v * B * n + b * n + j)."""
        read, weight, width = self.layout.reads[m], self.layout.scored[m].weight, self.layout.width
        rows = torch.arange(len(read), device=read.device)[:, None]
        mine = (rows * width + read).flatten()
        cells = chunk.cells[:, 0] * width + chunk.cells[:, 1]  # sorted
        found = torch.searchsorted(cells, mine).clamp(max=len(cells) - 1)
        place = ((cells[found] == mine) & (weight.flatten() > 0)).nonzero()[:, 0]
        copy = torch.arange(chunk.copies, device=read.device)[:, None]
        at = (copy * len(cells) + found[place]).flatten() - chunk.first
        place = (copy * len(mine) + place).flatten()
        inside = (at >= 0) & (at < len(chunk.logits))
        return (at, place) if inside.all() else (at[inside], place[inside])

    def _evaluate(self, m: int, values: torch.Tensor, chunk: _Chunk) -> None:
        """Put what metric m makes of a chunk into `values [V * B * n]`."""
        at, place = self._places(m, chunk)
        if not len(at):
            return
        same = len(at) == len(chunk.logits) and torch.equal(at, torch.arange(len(at), device=at.device))
        logits = chunk.logits if same else chunk.logits[at]
        index = place % self.layout.reads[m].numel()
        metric, scored = self.metrics[m], self.layout.scored[m]
        if metric.whole_rows:
            n = scored.read.shape[1]
            touched, which = torch.unique(place // n, return_inverse=True)
            rows = logits.new_zeros(len(touched), n, logits.shape[-1])
            rows[which, place % n] = logits
            found = metric.score_rows(rows, scored, touched % len(scored.read))
            values.view(-1, n)[touched] = found.to(values)[:, None]  # reduce() takes the mean over columns
        else:
            values[place] = metric.token(logits, index, scored, self.states[m]).to(values)

    @property
    def baseline(self) -> torch.Tensor:
        """`[M, B]` float64 on the host: every metric of the unedited batch."""
        return torch.stack(
            [
                metric.reduce(values.view(scored.weight.shape), scored.weight).double()
                for metric, values, scored in zip(self.metrics, self.values, self.layout.scored, strict=True)
            ]
        ).cpu()

    def check_finite(self, first: int) -> None:
        """Raise where a metric is NaN without any edit; `first` is the number of this batch's first sample."""
        for metric, values in zip(self.metrics, self.baseline, strict=True):
            if not torch.isfinite(values).all():
                row = int((~torch.isfinite(values)).int().argmax())
                raise NonFiniteError(
                    f"the {metric.name} of sample {first + row} is {values[row].item()} without any edit; check the "
                    "weights (NaN?) and the dtype"
                )

    # Variants.

    def scores(self, variants: Sequence[Variant], start: int) -> torch.Tensor:
        """`[V, M, B]` float64: the metrics of variants that begin at one layer, run from column `start` on."""
        copies, layer = len(variants), variants[0].layer
        if self.cache is not None:
            self.cache.length, self.cache.served = start, 0
        tables = self._tables(variants)
        values = [base.repeat(copies) for base in self.values]
        cells = self._changed_cells(tables.tables[HEADS_KEY, layer], start)
        try:
            with self._resumed(variants, layer, start, tables):
                for chunk in self._run(copies, start, cells=cells):
                    for m in range(len(self.metrics)):
                        self._evaluate(m, values[m], chunk)
        finally:
            self.state.write(Tables({}))
        if start and len(cells):
            after = self.state.spec.layers - layer - 1
            self._check_served(after, after + 1)  # in the edited block too, where it runs whole
        found = [
            metric.reduce(value.view(-1, scored.weight.shape[1]), scored.weight.repeat(copies, 1)).double()
            for metric, value, scored in zip(self.metrics, values, self.layout.scored, strict=True)
        ]
        return torch.stack(found).view(len(self.metrics), copies, self.layout.rows).transpose(0, 1).cpu()

    def _tables(self, variants: Sequence[Variant]) -> Tables:
        edits = [list(variant.edits) for variant in variants]
        spec, layout = self.grid.spec, self.layout
        return lower(
            (),
            spec,
            dtype=self.state.dtype,
            variants=edits,
            batch=layout.rows,
            last=layout.last,
            begin=layout.begin.tolist(),
        )

    @contextlib.contextmanager
    def _resumed(self, variants: Sequence[Variant], layer: int, start: int, tables: Tables) -> Iterator[None]:
        """Forwards inside this context are those of the variants: blocks before `layer` rest, its edits are made."""
        copies, site, record = len(variants), self.grid.site, self.recording
        table = tables.tables[HEADS_KEY, layer]
        device = (record.streams[layer] if site == RESIDUAL else record.attention[layer].value).device
        first = EditTable(table.table.to(device), table.coefficients.to(device), table.source.to(device))
        offset = self._offset(copies, start).to(device)
        skip = start - self.start

        def stream(at: int) -> torch.Tensor | None:
            return record.streams[at - 1][:, skip:].repeat(copies, 1, 1) if at else None

        if site == RESIDUAL:
            edited = patch_heads(record.streams[layer][:, skip:].repeat(copies, 1, 1), first, offset)
            with record.resume(layer + 1, edited):
                yield
            return
        attention = record.attention[layer]
        mode = projection_mode(self.model, self.state.spec, layer)
        projection = submodule(self.model, self.state.spec.blocks[layer].out_proj)
        if site == HEADS and mode == RUN:
            self.state.write(tables)
            with record.resume(layer, stream(layer)):
                yield
            return
        # Attention stood in for as a whole, tokens of the block do not meet: it runs where something was edited.
        columns = self._edited_columns(table, offset, start)
        block = submodule(self.model, self.state.spec.blocks[layer].block)
        partial = columns.stop - columns.start < self.layout.width - start
        alone = partial and attention.module is not projection and not has_hooks(block)
        if not alone:
            columns = slice(0, self.layout.width - start)
        parts = []
        if site == HEADS:
            later = {key: table for key, table in tables.tables.items() if key[1] != layer}
            self.state.write(Tables(later, tables.batch, tables.relative))
            value = edited_projection(
                projection,
                self.state.spec.blocks[layer],
                record.z[layer][:, skip:],
                attention.value[:, skip:],
                [variant.heads(layer) for variant in variants],
                first,
                offset,
                columns,
                mode,
            )
        else:
            value = attention.value[:, skip:][:, columns].repeat(copies, 1, 1)
            if site == ATTENTION:
                value = patch_heads(value, first, offset + columns.start)
            else:
                mlp = record.mlp[layer]
                before = mlp.value.view(self.layout.rows, -1, mlp.value.shape[-1])[:, skip:]  # OPT flattens tokens
                after = patch_heads(before[:, columns].repeat(copies, 1, 1), first, offset + columns.start)
                shape = after.shape if mlp.value.dim() == 3 else (-1, after.shape[-1])
                parts.append(Output(after.view(shape), mlp.module, mlp.count))
        parts.append(Output(value, attention.module, attention.count))
        only = (columns, record.streams[layer][:, skip:].repeat(copies, 1, 1)) if alone else None
        with record.resume(layer, stream(layer), parts, only):
            yield

    def _offset(self, copies: int, start: int) -> torch.Tensor:
        """`[3, R]` int32, positions of column `start`; edits relative to the prompt's end were lowered to its start."""
        begin = self.layout.begin
        offset = torch.zeros(3, copies * len(begin), dtype=torch.int32, device=begin.device)
        offset[FIRST] = (start - begin).repeat(copies)
        offset[COLUMN] = start
        return offset

    def _changed_cells(self, table: EditTable, start: int) -> torch.Tensor:
        """Cells from column `start` on that metrics read and some edit may change; other values are the base's."""
        cells, count = self.layout.cells(start), self.layout.rows
        if not self.state.spec.causal or any(metric.whole_rows for metric in self.metrics):
            return cells
        rows = table.table.long().cpu()
        row = rows[:, ROW] % count
        edited = start + rows[:, START] - self._offset(1, start).cpu()[rows[:, ORIGIN], row]
        first = torch.full((count,), self.layout.width).scatter_reduce_(0, row, edited, "amin")
        return cells[cells[:, 1] >= first.to(cells.device)[cells[:, 0]]]

    def _edited_columns(self, table: EditTable, offset: torch.Tensor, start: int) -> slice:
        """Columns, counted from the first that runs, that some edit may change; on the host."""
        rows = table.table.long().cpu()
        first = offset.cpu()[rows[:, ORIGIN], rows[:, ROW]]
        width = self.layout.width - start
        low = min(max(int((rows[:, START] - first).min()), 0), width - 1)
        high = min(int((rows[:, STOP] - first).max()), width)
        return slice(low, max(high, low + 1))
