"""`sweep`: the effect of one edit on every head, exactly, from less work than a forward for each.

For every batch one base run records the residual stream entering each block and the unedited metric. Then, layer by
layer, the heads of that layer run as variants: several in one batch, starting at their layer from the recorded stream
(`bkdfast.hf.prefix`), each row edited by its own row of the edit table, logits computed only where the metric reads.

How many variants share a batch is measured, not assumed: on a CPU large batches can lose, on a GPU they win. The size
doubles while the time per variant falls, and halves when memory runs out.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, NonFiniteError
from bkdfast.hf.batch import Batch, batches, complete
from bkdfast.hf.capture import eager
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.families import FAMILIES, unwrap
from bkdfast.hf.intervene import borrow, repeat_rows
from bkdfast.hf.lowering import Tables, lower
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.prefix import ResidualRecord
from bkdfast.hf.prepare import Prepared, refuse_dropout
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.sweep.metrics import Metric, Scored, logit_diff, target_logprob
from bkdfast.sweep.result import SweepResult
from bkdfast.sweep.verify import check_cells

MAX_VARIANTS = 256


def sweep(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    edit: Edit,
    metric: Metric,
    at: At | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    variants: int | None = None,
    verify: int | None = None,
    spec: ModelSpec | None = None,
    progress: bool = True,
) -> SweepResult:
    """Apply `edit` to one head at a time and measure what it does to `metric`.

    Args:
        model: a model of a supported family, in eval mode.
        data: prompts: one tokenised batch or an iterable of them (`input_ids`, `attention_mask`).
        edit: a template without layer and head, e.g. `Patch(source)` with `source [L, H, Dh]`, or `Zero()`.
        metric: e.g. `bkdfast.metrics.target_prob(targets)`.
        at: positions of the edit, relative to the prompt; None: those of the template.
        heads: (layer, head) pairs; None: every head of the model.
        variants: heads that share a batch; None: measured while running.
        verify: number of random (batch, head) cells to compute again with plain hooks and full forwards; a mismatch
            raises. None: 4 for a model family that is not in the tested list, else 0.
        spec: where the heads are, when the family is not known.
        progress: show a progress bar with the time left.

    Returns:
        `SweepResult` with effects `[L, H, N]`.

    Raises:
        InvalidArgumentError: empty data, heads out of range, sources of the wrong shape, prompt and target longer than
            the context, a template that names a head or rows.
        NonFiniteError: the metric of an unedited sample is NaN (NaN weights or activations).
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
    if edit.layer is not None or edit.head is not None or edit.neuron is not None or edit.rows is not None:
        raise InvalidArgumentError(f"{edit!r}: a sweep fills in layer and head itself; leave layer, head and rows out")
    template = edit if at is None else edit.to(at=at)
    model = unwrap(model)
    refuse_dropout(model)
    started = time.perf_counter()
    with borrow(model, spec) as state, eager(model), torch.no_grad():
        if state.stack:
            raise InvalidArgumentError("sweep cannot run inside intervene(); its baseline would be edited too")
        wanted = _wanted(heads, state.spec)
        if verify is None:
            verify = 0 if state.spec.family in FAMILIES else 4
        checked = [complete(model, batch, state.spec) for batch in batches(data)]
        total = sum(len(batch["input_ids"]) for batch in checked)
        _refuse_misfits(model, state.spec, template, metric, len(checked), total)
        layers, most = state.spec.layers, max(block.heads for block in state.spec.blocks)
        effects = torch.full((layers, most, total), torch.nan)
        baseline = torch.zeros(total)
        size = _Size(variants)
        bar = tqdm(
            total=total * len(wanted),
            desc=f"sweep {state.spec.layers} x {most} heads",
            unit="cell",
            disable=not progress,
        )
        first = 0
        jobs = []
        with bar:
            for batch in checked:
                run = _BatchRun(model, state, template, metric, batch, first)
                rows = slice(first, first + run.rows)
                baseline[rows] = run.baseline
                for layer in sorted({layer for layer, _ in wanted}):
                    mine = [head for at_layer, head in wanted if at_layer == layer]
                    for chunk, scores in run.layer(layer, mine, size):
                        effects[layer, chunk, rows] = scores - run.baseline
                        bar.update(len(chunk) * run.rows)
                jobs.append((run.mask, run.scored))
                first += run.rows
        error = check_cells(model, state, template, metric, jobs, wanted, effects, baseline, verify) if verify else None
    return SweepResult(
        effects,
        baseline,
        metric.name,
        type(edit).__name__,
        time.perf_counter() - started,
        {
            "family": state.spec.family,
            "dtype": str(state.dtype).removeprefix("torch."),
            "at": str(template.at),
            "variants": size.best,
            "verified_cells": verify,
            "largest_error": error,
        },
    )


class _BatchRun:
    """One batch: its base run, and its variants layer by layer."""

    def __init__(
        self, model: torch.nn.Module, state: Prepared, template: Edit, metric: Metric, batch: dict, first: int
    ) -> None:
        self.model, self.state, self.metric = model, state, metric
        self.rows = len(batch["input_ids"])
        begin, end = prompt_ends(batch)
        self.mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        self.last = (end - begin).tolist()
        self.template = template
        self.scored = scored_batch(model, state.spec, metric, batch, first)
        self.record = ResidualRecord(model, state.spec)
        state.write(Tables({}))
        with self.record.record():
            self.baseline = self.run(1)[0]
        if not torch.isfinite(self.baseline).all():
            row = int((~torch.isfinite(self.baseline)).int().argmax())
            raise NonFiniteError(
                f"the {metric.name} of sample {first + row} is {self.baseline[row].item()} without any edit; "
                "check the weights (NaN?) and the dtype"
            )

    def run(self, copies: int) -> torch.Tensor:
        """The metric `[copies, B]` of `copies` stacked copies of the batch, with the edits now in the tables."""
        read, width = self.scored.read.repeat(copies, 1), self.scored.batch["input_ids"].shape[1]
        with read_columns(self.model, self.state.spec, read, width) as gather:
            logits = gather(self.model(**repeat_rows(self.scored.batch, copies)))
        return self.metric.score(logits, self.scored).view(copies, self.rows).cpu()

    def layer(self, layer: int, heads: list[int], size: _Size) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Chunks of heads of one layer with their scores `[chunk, B]`."""
        done = 0
        while done < len(heads):
            chunk = heads[done : done + size.now]
            variants = [[self.template.to(layer=layer, head=head)] for head in chunk]
            tables = lower(
                (), self.state.spec, dtype=self.state.dtype, variants=variants, batch=self.rows, last=self.last
            )
            started = time.perf_counter()
            try:
                self.state.write(tables)
                with self.record.resume(layer, len(chunk)):
                    scores = self.run(len(chunk))
            except torch.OutOfMemoryError:
                size.halve(self.rows)
                continue
            finally:
                self.state.write(Tables({}))
            depth = self.state.spec.layers - layer
            size.measured(len(chunk), (time.perf_counter() - started) / (len(chunk) * self.rows * depth))
            yield chunk, scores
            done += len(chunk)


class _Size:
    """How many variants share a batch: fixed, or doubled while the time per variant and layer keeps falling."""

    def __init__(self, fixed: int | None) -> None:
        if fixed is not None and fixed < 1:
            raise InvalidArgumentError(f"variants={fixed}: at least one head has to be in a batch")
        self.now = self.best = fixed or 1
        self.searching = fixed is None
        self.limit = fixed or MAX_VARIANTS
        self.times: dict[int, list[float]] = {}

    def measured(self, count: int, seconds: float) -> None:
        """Take note of a time; count may be smaller than `now` at the end of a layer."""
        if not self.searching or count != self.now:
            return
        # The first run of a size also pays for warm-up and allocation.
        times = self.times.setdefault(count, [])
        times.append(seconds)
        if len(times) < 2:
            return
        fastest = {size: min(seen) for size, seen in self.times.items()}
        self.best = min(fastest, key=fastest.__getitem__)
        if self.best == self.now and self.now * 2 <= self.limit:
            self.now *= 2
        else:
            self.now, self.searching = self.best, False

    def halve(self, rows: int) -> None:
        """Memory ran out at the current size."""
        if self.now == 1:
            raise torch.OutOfMemoryError(
                f"one variant of a batch of {rows} rows does not fit into memory; use smaller batches"
            )
        self.limit = self.now = self.best = max(self.now // 2, 1)
        self.searching = False


def scored_batch(model: torch.nn.Module, spec: ModelSpec, metric: Metric, batch: dict, first: int) -> Scored:
    """The metric's inputs, completed and on the model's device."""
    scored = metric.extend({k: v for k, v in batch.items() if k != "position_ids"}, first)
    if not spec.causal and scored.batch["input_ids"].shape != batch["input_ids"].shape:
        raise InvalidArgumentError(
            f"{metric.name} appends the target to the prompt, but in {spec.family} attention looks ahead: the model "
            "would see the tokens it is scored on; use logit_diff"
        )
    full = complete(model, scored.batch, spec)
    device = full["input_ids"].device
    return Scored(full, scored.read.to(device), scored.tokens.to(device), scored.weight.to(device))


@contextlib.contextmanager
def read_columns(model: torch.nn.Module, spec: ModelSpec, read: torch.Tensor, width: int) -> Iterator:
    """Compute logits only at columns `read [R, n]` of `width`; yields a function from output to `[R, n, vocab]`."""
    rows = torch.arange(len(read), device=read.device)[:, None]

    def gather(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.dim() != 3 or hidden.shape[:2] != (len(read), width):
            raise InvalidArgumentError(
                f"the metric reads logits of every token, [{len(read)}, {width}, vocab], but this model returns "
                f"{tuple(hidden.shape)}; it needs a head that scores each token, and no logits_to_keep"
            )
        return hidden[rows, read]

    if spec.unembedding is None:
        yield lambda output: gather(output[0])
        return

    def hook(module: torch.nn.Module, args: tuple):
        return (gather(args[0]), *args[1:])

    handle = submodule(model, spec.unembedding).register_forward_pre_hook(hook)
    try:
        yield lambda output: output[0]
    finally:
        handle.remove()


def _refuse_misfits(
    model: torch.nn.Module, spec: ModelSpec, template: Edit, metric: Metric, batches: int, total: int
) -> None:
    """Raise where numbers would come out that do not mean what was asked."""
    samples = getattr(metric, "samples", None)
    if samples is not None and samples != total:
        raise InvalidArgumentError(f"the metric has targets for {samples} samples, but the data has {total}")
    if batches > 1 and template.source is not None and template.source.dim() > 3:
        raise InvalidArgumentError(
            f"{template!r} has a source for each row, but there are {batches} batches; sweep them one by one"
        )
    token_metric = isinstance(metric, (target_logprob, logit_diff))
    if token_metric and spec.unembedding is None and model is getattr(model, "base_model", None):
        raise InvalidArgumentError(
            f"{type(model).__name__} has no head: its output is the residual stream, not logits of tokens; load the "
            "model with its head (AutoModelForCausalLM)"
        )


def _wanted(heads: Sequence[tuple[int, int]] | None, spec: ModelSpec) -> list[tuple[int, int]]:
    if heads is None:
        return [(layer, head) for layer, block in enumerate(spec.blocks) for head in range(block.heads)]
    wanted = sorted({(int(layer), int(head)) for layer, head in heads})
    if not wanted:
        raise InvalidArgumentError("heads= is empty; give (layer, head) pairs or leave it out")
    for layer, head in wanted:
        if not 0 <= layer < spec.layers or not 0 <= head < spec.blocks[layer].heads:
            raise InvalidArgumentError(
                f"head {(layer, head)} is out of range: {spec.layers} layers of {spec.blocks[0].heads} heads"
            )
    return wanted
