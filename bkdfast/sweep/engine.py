"""`sweep`: the effect of one edit on every head, exactly, from less work than a forward for each.

For every batch one base run records what variants can reuse (`bkdfast.sweep.base`); then variants run in batches, from
the layer and the column of their first edit on, with logits only where the metrics read. `bkdfast.sweep.plan` decides
who shares a batch and what is worth sharing, and says so before anything runs.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.batch import Batch, batches, complete
from bkdfast.hf.edits import At, Edit
from bkdfast.hf.families import FAMILIES, unwrap
from bkdfast.hf.intervene import borrow
from bkdfast.hf.lowering import one_a_row
from bkdfast.hf.prepare import refuse_dropout
from bkdfast.hf.spec import ModelSpec, refuse_shared
from bkdfast.jobs import units
from bkdfast.jobs.store import Store
from bkdfast.sweep import plan as planning
from bkdfast.sweep.metrics import Metric
from bkdfast.sweep.projection import refuse_inexact
from bkdfast.sweep.provenance import hash_text, manifest
from bkdfast.sweep.readout_groups import check_metrics
from bkdfast.sweep.result import SweepResult
from bkdfast.sweep.variants import HEADS, Grid, Head, describe_at, grid
from bkdfast.sweep.verify import check_cells

if TYPE_CHECKING:
    from bkdfast.sweep.run import Sweep


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
    out: str | Path | None = None,
    resume: bool = True,
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
        positions: an axis of positions instead of `at`, e.g. `range(8)`. Of a source `[B, T, L, H, Dh]` (or with
            `[1, T, ...]` for all rows) each takes its own entries, counted from a row's first real token, as
            `head_outputs(at="each")` and `site_outputs(at="each")` return them.
        plan: only plan: return a `Plan` that can be printed; nothing runs but a matrix product that is timed.
        variants: edits that share a batch; None: as many as fill it.
        share_prefix: run only the tokens from the first edited one on, over the others' keys and values. None: where
            it pays; False: never; True: an error where it cannot be.
        verify: number of random (batch, variant) cells to compute again with plain hooks and full forwards; a mismatch
            raises, and the largest difference is the `noise_floor` in the result's facts. None: 4 with a `spec` and for
            a model family that is not in the tested list, else 0.
        spec: where the heads are, when the family is not known.
        out: folder that keeps finished units of work. A sweep that was killed continues there with the same call and
            computes nothing twice. Needed for several processes (`torchrun`), which share the work.
        resume: False: refuse a folder that has finished units.
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
        ModelStateError: another sweep is running on the model, in another thread.
        StoreError: `out` cannot be written, or another sweep is using it.

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
    from bkdfast.sweep.run import Sweep  # it imports transformers

    metrics = check_metrics(metric)
    if verify is not None and verify < 0:
        raise InvalidArgumentError(f"verify={verify}: the number of cells to check is 0 or more")
    model = unwrap(model)
    refuse_dropout(model)
    refuse_inexact(model)
    started = time.perf_counter()
    with borrow(model, spec, engine="sweep") as state:
        places = grid(state.spec, edit, at=at, site=site, heads=heads, layers=layers, positions=positions)
        checked = [complete(model, batch, state.spec) for batch in batches(data)]
        refuse_misfits(model, state.spec, places, metrics, checked)
        world = units.join()[1]
        division: dict[str, Any] = {
            "variants": variants,
            "share_prefix": share_prefix,
            "tokens": planning.batch_tokens(state),
        }

        def divided() -> Sweep:
            return Sweep(
                model,
                state,
                checked,
                places,
                metrics,
                chunk=division["variants"],
                share=division["share_prefix"],
                tokens=division["tokens"],
                split=out is not None or world > 1,
            )

        job = divided()
        what = _describe(places, job, edit)
        if plan:
            return job.plan(what, measure=True)
        for note in job.notes:
            warnings.warn(note, stacklevel=2)
        described = manifest(
            model,
            checked,
            edit.to(at=places.template.at),
            metrics,
            units=division,
            dtype=state.dtype,
            whole=None if out is not None else 0,
            spec=hash_text(repr(state.spec)),
            site=site,
            heads=heads,
            layers=layers,
            positions=positions,
        )
        store = None
        if out is not None:
            adopt = ["units"] if variants is None and share_prefix is None else []
            store = Store.open(out, described, resume=resume, adopt=adopt)
            if store.manifest["units"] != division:
                division = store.manifest["units"]
                job = divided()
        if verify is None:
            verify = 0 if state.spec.family in FAMILIES and spec is None else 4
        costs = [unit.flops for unit in job.units]
        run = units.run_units(len(costs), job.compute, store, costs=costs, progress=progress, description=what)
        scores, baseline = job.collect(dict(run))
        checked_cells = check_cells(job, scores, verify) if verify else None
    facts = {
        "family": state.spec.family,
        "dtype": str(state.dtype).removeprefix("torch."),
        "at": describe_at(places.coords.get("position", [places.template.at])),
        "site": site,
        "variants": job.most,
        "shared_prefix": any(part.shared for part in job.jobs),
        "verified_cells": verify,
    }
    seconds = time.perf_counter() - started
    found = {
        one.name: SweepResult(
            (scores[m] - baseline[m]).float(),
            baseline[m].float(),
            one.name,
            type(edit).__name__,
            seconds,
            {
                **facts,
                "largest_error": checked_cells[m].relative if checked_cells else None,
                "noise_floor": checked_cells[m].absolute if checked_cells else None,
            },
            places.dims,
            places.coords,
            described,
        )
        for m, one in enumerate(metrics)
    }
    return found[metrics[0].name] if isinstance(metric, Metric) else found


def _describe(places: Grid, job: Sweep, edit: Edit) -> str:
    shape = " x ".join(f"{size} {dim}s" for size, dim in zip(places.shape, places.dims, strict=True))
    return f"{type(edit).__name__} of {shape} ({places.site}), {job.samples} samples"


def refuse_misfits(
    model: torch.nn.Module, spec: ModelSpec, places: Grid, metrics: Sequence[Metric], data: Sequence[dict]
) -> None:
    """Raise where numbers would come out that do not mean what was asked."""
    refuse_shared(model, spec)
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
    for batch in data:
        if "position_ids" in batch and not _counted(batch):
            raise InvalidArgumentError(
                "the data has position_ids other than the attention mask's; a sweep moves rows and counts anew: leave "
                "them out"
            )
    if len(data) > 1:
        edit = places.template
        what = "a source" if edit.source is not None and edit.source.dim() > 3 and len(edit.source) > 1 else ""
        what = "a position" if any(one_a_row(at) for at in places.coords.get("position", [edit.at])) else what
        if what:
            raise InvalidArgumentError(
                f"{edit!r} has {what} for each row, but there are {len(data)} batches; use sweep_batches, or sweep "
                "them one by one"
            )


def _counted(batch: dict[str, torch.Tensor]) -> bool:
    """The batch's positions are those that its mask gives."""
    given = batch["position_ids"]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).long()
    made = torch.arange(mask.shape[1], device=mask.device).expand_as(mask) if mask[:, 0].all() else mask.cumsum(1) - 1
    return given.shape[-1] == made.shape[1] and given.dim() == 2 and bool(((given == made) | (mask == 0)).all())
