"""`screen`: an estimate of every head's effect from one forward and one backward a batch (attribution patching).

    estimate[l, h, n] = sum over edited tokens t of  <d metric_n / d z[n, t, l, h],  z'[n, t, l, h] - z[n, t, l, h]>

with the gradient taken in the unedited run and z' what the edit makes of z. It is the first-order term of the effect
that `sweep` computes exactly: right where the metric is nearly linear between z and z', wrong where it is not, e.g.
where a softmax is saturated. `screened_sweep` says how wrong, for the case at hand.

It pays for edits of many positions. Of an edit near the end of the prompt the exact sweep runs only the tokens from
there on, and can be as fast: with 8 layers of 8 heads on a CPU and 128 tokens an estimate takes 6% of the exact sweep's
time for an edit at all positions, but 62% of it at the last prompt token, and 130% at 512 tokens.

With `steps` the gradient is averaged over points on the way from the unedited run to an edited one (integrated
gradients, Sundararajan et al. 2017), at Gauss-Legendre nodes alpha. The way of a single head alone would cost more than
the exact sweep; two others are known:

- `path="layer"`: z + alpha (z' - z) in all heads of one layer, one layer after the other ("IG activations" of Hanna et
  al. 2024; Marks et al. 2024): forwards and backwards `steps` times the number of layers, each from its layer on. The
  estimates of a layer's heads add up to the effect of editing that whole layer.
- `path="joint"`: in all heads of all layers at once, `steps` forwards and backwards. All estimates together add up to
  the effect of adding all z' - z, which are those of the unedited run.

With a head move those that share its path, so more steps are not better by themselves. They help where the gradient of
the unedited run says little, e.g. of a probability near 1, or nothing, of a divergence from the unedited model. Where
all heads together do something else than each alone, they hurt: the joint path most.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, InvalidTypeError, ModelStateError, NonFiniteError
from bkdfast.hf.batch import Batch, batches, complete
from bkdfast.hf.capture import eager
from bkdfast.hf.edits import HEADS, At, Edit
from bkdfast.hf.families import unwrap
from bkdfast.hf.intervene import borrow
from bkdfast.hf.lowering import lower
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.prefix import Recording
from bkdfast.hf.prepare import Prepared, refuse_dropout
from bkdfast.hf.readout import read_logits
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.ops.edit_table import FIRST, EditTable
from bkdfast.ops.patch_heads import patch_heads
from bkdfast.sweep.engine import refuse_misfits
from bkdfast.sweep.metrics import Metric, Scored
from bkdfast.sweep.ranks import Head, ranked
from bkdfast.sweep.variants import Grid, describe_at, grid, spans

PATHS = ("layer", "joint")


@dataclass(frozen=True)
class Screening:
    """Estimated effects of an edit on a metric, head by head. Not a `SweepResult`: nothing here is exact.

    Attributes:
        estimate: `[L, H, N]` float64, estimated change of the metric; NaN where a layer has fewer heads.
        baseline: `[N]` float64, the metric without edits (this one is exact).
        metric: name of the metric.
        edit: name of the edit.
        seconds: wall-clock time.
        facts: how it was made; `"estimate"` says by which method.
    """

    estimate: torch.Tensor
    baseline: torch.Tensor
    metric: str
    edit: str
    seconds: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> torch.Tensor:
        """`[L, H]` mean estimate over samples."""
        return self.estimate.mean(-1)

    @property
    def stderr(self) -> torch.Tensor:
        """`[L, H]` standard error of that mean over samples (0 for one), without the estimate's own error."""
        n = self.estimate.shape[-1]
        return self.estimate.std(-1, correction=1) / n**0.5 if n > 1 else torch.zeros_like(self.mean)

    def top(self, k: int, *, by: str = "increase") -> list[Head]:
        """(layer, head) of the k strongest mean estimates, strongest first; `by` as for `SweepResult.top`."""
        order = ranked(self.mean, by)
        if not 1 <= k <= len(order):
            raise InvalidArgumentError(f"k={k} is out of range: there are {len(order)} heads")
        return order[:k]

    def to_pandas(self):
        """A data frame with one row a head: layer, head, estimate, stderr; largest increase first."""
        import pandas as pd

        mean, stderr = self.mean, self.stderr
        rows = [(*head, float(mean[head]), float(stderr[head])) for head in ranked(mean)]
        return pd.DataFrame(rows, columns=["layer", "head", "estimate", "stderr"])

    def plot(self, path: str | Path | None = None):
        """Heat map of the mean estimate, layers by heads; saved to `path` if given. Returns the matplotlib figure."""
        from bkdfast.report.plots import head_heatmap, save

        figure = head_heatmap(
            self.mean,
            label=f"estimated change of {self.metric}",
            title=f"{self.edit}, head by head (gradient estimate)",
        )
        return save(figure, path)

    def __repr__(self) -> str:
        layers, heads, samples = self.estimate.shape
        layer, head = ranked(self.mean, "size")[0]
        return (
            f"Screening({self.edit} of {layers} x {heads} heads on {samples} samples, {self.metric}: ESTIMATED, "
            f"baseline {self.baseline.mean():.3g}, strongest layer {layer} head {head} "
            f"({self.mean[layer, head]:+.3g}), {self.seconds:.1f} s)"
        )


def screen(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    edit: Edit,
    metric: Metric,
    at: At | None = None,
    steps: int = 1,
    path: str = "layer",
    spec: ModelSpec | None = None,
    progress: bool = True,
) -> Screening:
    """Estimate what `edit` would do to `metric`, for every head, from gradients.

    Memory: that of a forward and backward of one batch in training, without the weights' gradients: the activations of
    all blocks. Smaller batches need less. float16 models lose small gradients; load them as bfloat16 or float32.

    Args:
        model: a model of a supported family, in eval mode. Its weights get no gradient; `.grad` stays as it is.
        data: prompts: one tokenised batch or an iterable of them.
        edit: a template without layer and head, as for `sweep`.
        metric: one that has a gradient: `target_logprob`, `target_prob`, `loss`, `logit_diff`, a function of yours of
            differentiable operations; `kl` and `js` with `steps` or with a reference model.
        at: positions of the edit, relative to the prompt; None: those of the template.
        steps: 1: the gradient of the unedited run (attribution patching); more: integrated gradients with so many
            points, see `bkdfast.sweep.screen`.
        path: `"layer"` or `"joint"`, for `steps > 1`.
        spec: where the heads are, when the family is not known.
        progress: show a progress bar.

    Returns:
        `Screening` with estimates `[L, H, N]`.

    Raises:
        InvalidArgumentError: a metric without gradient (accuracy, rank), or with a zero one (divergence from the
            unedited model); and as for `sweep`.
        ModelStateError: gradient checkpointing, or an operation of the model that passes no gradient on.
        NonFiniteError: the metric or a gradient is NaN or infinite.

    Source: Nanda 2023, "Attribution patching"; Syed et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv 2403.17806.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> from bkdfast.sweep.screen import screen
        >>> pair = load_pair()
        >>> batch = pair.tokenizer(["news : the team won", "news : markets fell"], return_tensors="pt", padding=True)
        >>> found = screen(pair.tuned, batch, edit=bf.Zero(), metric=bf.metrics.target_logprob([5]), progress=False)
        >>> found.estimate.shape, found.facts["estimate"]
        (torch.Size([6, 8, 2]), 'attribution patching: gradient of the unedited run')
    """
    _check_arguments(metric, steps, path)
    model = unwrap(model)
    refuse_dropout(model)
    _refuse_checkpointing(model)
    started = time.perf_counter()
    with borrow(model, spec, engine="screen") as state:
        places = grid(state.spec, edit, at=at)
        checked = [complete(model, batch, state.spec) for batch in batches(data)]
        refuse_misfits(model, state.spec, places, [metric], checked)
        parts, baseline, first = [], [], 0
        layers = range(state.spec.layers)
        groups = [[layer] for layer in layers] if path == "layer" and steps > 1 else [list(layers)]
        runs = 1 + len(groups) * steps if steps > 1 else 1
        with (
            tqdm(total=runs * len(checked), desc="screen (estimate)", unit="run", disable=not progress) as bar,
            eager(model),
            _frozen(model),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            for batch in checked:
                run = _Run(model, state, metric, batch, first, bar)
                values, found = run.estimate(places, groups, steps)
                baseline.append(values)
                parts.append(found)
                first += len(batch["input_ids"])
    method = "attribution patching: gradient of the unedited run"
    if steps > 1:
        method = f"integrated gradients: {steps} points, {path} path"
    facts = {
        "estimate": method,
        "family": state.spec.family,
        "dtype": str(state.dtype).removeprefix("torch."),
        "at": describe_at([places.template.at]),
        "backward_passes": (runs - 1 or 1) * len(checked),
    }
    seconds = time.perf_counter() - started
    return Screening(torch.cat(parts, -1), torch.cat(baseline), metric.name, type(edit).__name__, seconds, facts)


class _Run:
    """One batch: forwards with head outputs moved, and the metric's gradients there."""

    def __init__(
        self, model: torch.nn.Module, state: Prepared, metric: Metric, batch: dict, first: int, bar: tqdm
    ) -> None:
        from bkdfast.sweep.run import completed, extend  # it imports transformers

        self.model, self.state, self.spec, self.metric, self.bar = model, state, state.spec, metric, bar
        self.first = first
        begin, end = prompt_ends(batch)
        self.last = (end - begin).tolist()
        scored = completed(model, state.spec, extend(metric, batch, first, state.spec))
        # A batch made in inference mode cannot enter a graph.
        inputs = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in scored.batch.items()}
        self.scored = Scored(inputs, scored.read.clone(), scored.tokens.clone(), scored.weight.clone())
        ids = inputs["input_ids"]
        self.real = inputs.get("attention_mask", torch.ones_like(ids)) != 0  # [B, T]
        self.begin, end = prompt_ends({"input_ids": ids, "attention_mask": self.real})
        self.length = (end - self.begin + 1).tolist()
        self.reference: Any = None
        self.recording = Recording(state.spec, model)

    def estimate(self, places: Grid, groups: Sequence[Sequence[int]], steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Baseline `[B]` and estimates `[L, H, B]` on the host; `groups` of layers move together."""
        spans(places.template.at, self.last, self.length)  # raises where a row has no such position
        layers = range(self.spec.layers)
        with self.recording.record(layers) if len(groups) > 1 else contextlib.nullcontext():
            values, z, slopes = self.at(layers, begin=True)
        self._check(values, steps)
        found = torch.full((*places.shape, len(self.last)), torch.nan, dtype=torch.float64)
        if steps == 1:
            for layer in layers:
                change = self._change(layer, z[layer], places)
                found[layer, : self.spec.blocks[layer].heads] = self._product(layer, slopes[layer], change)
        else:
            del slopes
            nodes, weights = np.polynomial.legendre.leggauss(steps)
            changes = {layer: self._change(layer, z.pop(layer), places) for layer in layers}
            for layer in layers:
                found[layer, : self.spec.blocks[layer].heads] = 0
            for group in groups:
                for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
                    moved = {layer: (1 + node) / 2 * changes[layer] for layer in group}
                    slopes = self.at(group, moved)[2]
                    for layer in group:
                        part = self._product(layer, slopes[layer], changes[layer])
                        found[layer, : self.spec.blocks[layer].heads] += weight / 2 * part
        for layer in layers:
            bad = ~torch.isfinite(found[layer, : self.spec.blocks[layer].heads])
            if not bad.any():
                continue
            head, row = bad.nonzero()[0].tolist()
            raise NonFiniteError(
                f"the gradient of the {self.metric.name} of sample {self.first + row} with respect to layer {layer}, "
                f"head {head} is not finite, though the metric is; check the dtype (overflow in float16?)"
            )
        return values.double().cpu(), found

    def at(
        self, layers: Sequence[int], moved: dict[int, torch.Tensor] | None = None, *, begin: bool = False
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """The metric `[B]`, z and its gradient in `layers`, with `moved[layer]` added to z.

        `begin`: this is the unedited run that the metric may want to compare with.
        """
        z: dict[int, torch.Tensor] = {}

        def tap(layer: int):
            def hook(module: torch.nn.Module, args: tuple):
                # The graph begins at the first of the layers: nothing before it needs a gradient.
                here = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
                z[layer] = here if moved is None else here + moved[layer]
                return (z[layer], *args[1:])

            return hook

        with contextlib.ExitStack() as stack:
            for layer in layers:
                projection = submodule(self.model, self.spec.blocks[layer].out_proj)
                stack.callback(projection.register_forward_pre_hook(tap(layer)).remove)
            if layers[0] > 0:  # the blocks before it would run as they did
                stack.enter_context(self.recording.resume(layers[0], self.recording.streams[layers[0] - 1]))
            try:
                values = self._score(begin)
                slopes = torch.autograd.grad(values.sum(), [z[i] for i in layers], materialize_grads=True)
            except torch.OutOfMemoryError:
                rows, width = self.real.shape
                raise torch.OutOfMemoryError(
                    f"the backward pass of a batch of {rows} rows and {width} tokens does not fit into memory"
                    + (f"; batches of {rows // 2} rows need about half of it" if rows > 1 else "; use shorter prompts")
                ) from None
        self.bar.update()
        return values.detach(), {i: z[i].detach() for i in layers}, dict(zip(layers, slopes, strict=True))

    def _score(self, begin: bool) -> torch.Tensor:
        rows, n = self.scored.read.shape
        row = torch.arange(rows, device=self.scored.read.device).repeat_interleave(n)
        chunks = read_logits(self.model, self.spec, self.scored.batch, row, self.scored.read.flatten())
        logits = torch.cat([chunk for _, chunk in chunks])  # [B * n, vocab]
        if not logits.requires_grad:
            raise ModelStateError(
                "no gradient flows from the heads to the logits: some operation of the model has none (a quantised "
                "kernel?); load the weights in a floating-point dtype"
            )
        if begin and self.metric.needs_base:
            with torch.no_grad():
                self.reference = self.metric.begin(logits.detach(), self.scored)
        values = self.metric.score(logits.view(rows, n, -1), self.scored, self.reference)
        if not values.requires_grad:
            raise InvalidArgumentError(
                f"{self.metric.name} has no gradient, so nothing can be estimated from it; screen with target_logprob "
                "or logit_diff, or run the exact sweep"
            )
        return values

    def _check(self, values: torch.Tensor, steps: int) -> None:
        if not torch.isfinite(values).all():
            row = int((~torch.isfinite(values)).int().argmax())
            raise NonFiniteError(
                f"the {self.metric.name} of sample {self.first + row} is {values[row].item()} without any edit; check "
                "the weights (NaN?) and the dtype"
            )
        if steps == 1 and self.metric.needs_base and float(values.abs().max()) < 1e-6:
            raise InvalidArgumentError(
                f"{self.metric.name} from the unedited model is least at the unedited model itself: its gradient is "
                "zero there, and so would every estimate be; pass steps=5, or screen with logit_diff or target_logprob"
            )

    def _product(self, layer: int, slope: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        """`[H, B]` float64 on the host: gradient times change, summed over head_dim and real tokens."""
        wide = torch.promote_types(slope.dtype, torch.float32)
        block = self.spec.blocks[layer]
        cells = (slope.to(wide) * change.to(wide)).view(*self.real.shape, block.heads, block.head_dim)
        cells = cells.where(self.real.to(cells.device)[:, :, None, None], 0.0)  # padding may hold anything, NaN too
        return cells.sum((1, 3), dtype=torch.float64).T.cpu()

    @torch.no_grad()
    def _change(self, layer: int, z: torch.Tensor, places: Grid) -> torch.Tensor:
        """Change z' - z `[B, T, H * Dh]` that the edit makes in each head of a layer, were it the only one edited."""
        edits = [edit for variant in places.variants if variant.layer == layer for edit in variant.edits]
        tables = lower((), self.spec, dtype=self.state.dtype, variants=[edits], batch=len(self.last), last=self.last)
        held = tables.tables[HEADS, layer]
        table = EditTable(held.table.to(z.device), held.coefficients.to(z.device), held.source.to(z.device))
        offset = torch.zeros(3, len(self.last), dtype=torch.int32, device=z.device)
        offset[FIRST] = -self.begin.to(z.device)
        return patch_heads(z.clone(), table, offset) - z


@contextlib.contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Within this context no parameter needs a gradient, so that the inputs of projections are not kept for one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelStateError(
            "the model was loaded under torch.inference_mode(), where tensors cannot enter a graph; load it outside"
        )
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _check_arguments(metric: Any, steps: int, path: str) -> None:
    if not isinstance(metric, Metric):
        raise InvalidTypeError(
            f"metric must be one metric such as bkdfast.metrics.logit_diff(...), got {type(metric).__name__}; screen "
            "several one by one, each needs a backward pass of its own"
        )
    if steps < 1:
        raise InvalidArgumentError(f"steps={steps}: at least one gradient is needed")
    if path not in PATHS:
        raise InvalidArgumentError(f"path={path!r} is not one of {', '.join(PATHS)}")


def _refuse_checkpointing(model: torch.nn.Module) -> None:
    if model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise ModelStateError(
            "gradient checkpointing runs blocks again in the backward pass, where head outputs would be taken for new "
            "ones; call model.eval() or model.gradient_checkpointing_disable()"
        )
