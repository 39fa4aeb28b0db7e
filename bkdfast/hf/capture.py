"""Outputs of a model's heads, attention, MLPs and blocks at chosen positions, streamed over batches.

They are the sources of patching and mean ablation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, NonFiniteError
from bkdfast.hf.batch import Batch, batches, call, complete, count
from bkdfast.hf.edits import HEADS, At
from bkdfast.hf.families import describe, unwrap
from bkdfast.hf.lowering import one_a_row, positions
from bkdfast.hf.positions import prompt_ends
from bkdfast.hf.prepare import prepared, refuse_dropout
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.ops.edit_table import FIRST


def head_outputs(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    at: At = "last_prompt",
    spec: ModelSpec | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Per-head outputs z, before the attention output projection.

    Args:
        model: a model of a supported family, in eval mode.
        data: one tokenised batch or an iterable of them.
        at: a position (`"last_prompt"`, an int, one int a row); `"each"` for every token, counted from the row's first
            real one (0 after its last); `"all"` for every column of one batch.
        spec: where the heads are, when the family is not known.
        progress: show a progress bar over batches.

    Returns:
        `[N, L, H, Dh]` for one position a row; `[N, T, L, H, Dh]` for `"each"` and `"all"`. In the model's dtype, on
        its device.

    Raises:
        InvalidArgumentError: no data, a position outside a row, or layers with different numbers of heads.
        NonFiniteError: a head's output is NaN or infinite at a real token; the message names it.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> batch = pair.tokenizer(["news : the team won", "news : markets fell"], return_tensors="pt", padding=True)
        >>> bf.head_outputs(pair.tuned, batch, at="last_prompt").shape
        torch.Size([2, 6, 8, 32])
    """
    return _outputs(_stream(model, data, spec, progress, HEADS), at)


def site_outputs(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    site: str,
    at: At = "last_prompt",
    spec: ModelSpec | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """What `sweep(site=...)` edits: `[N, L, D]` outputs of every layer's attention or MLP, or its residual stream.

    Args:
        model: a model of a supported family, in eval mode.
        data: one tokenised batch or an iterable of them.
        site: `"attention"`, `"mlp"` or `"residual"`, as for `sweep`.
        at: as for `head_outputs`; `"each"` and `"all"` give `[N, T, L, D]`.
        spec: where the layers are, when the family is not known.
        progress: show a progress bar over batches.

    Raises:
        InvalidArgumentError: another site, or one that a layer does not have; else as for `head_outputs`.
        NonFiniteError: as for `head_outputs`.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> batch = pair.tokenizer(["news : the team won", "news : markets fell"], return_tensors="pt", padding=True)
        >>> bf.site_outputs(pair.tuned, batch, site="residual").shape
        torch.Size([2, 6, 128])
    """
    return _outputs(_stream(model, data, spec, progress, site), at)


def head_means(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    at: At = "last_prompt",
    spec: ModelSpec | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Mean z of every head over rows.

    Arguments and errors as for `head_outputs`, but `"all"` is the mean over all real tokens as well, of any number of
    batches. Sums are float64, so the result does not depend on the batch size beyond the model's own rounding; one
    batch is in memory at a time.

    Returns:
        `[L, H, Dh]` float32 (float64 for a float64 model): the source of `Mean`, or of `Patch` in backdoor attribution.
        For `"each"` `[1, T, L, H, Dh]`: at each position, counted from a row's first real token, the mean over the rows
        that have it; T is the length of the longest row.
    """
    return _means(_stream(model, data, spec, progress, HEADS), at)


def site_means(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    site: str,
    at: At = "last_prompt",
    spec: ModelSpec | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Mean of `site_outputs` over rows, `[L, D]`, or `[1, T, L, D]` for `at="each"`; otherwise as `head_means`."""
    return _means(_stream(model, data, spec, progress, site), at)


def _outputs(stream: Iterable[tuple[torch.Tensor, torch.Tensor]], at: At) -> torch.Tensor:
    found: list[torch.Tensor] = []
    for values, mask in stream:
        if found and _is(at, "all"):
            raise InvalidArgumentError('at="all" keeps every token, so it takes one batch; give a position for several')
        if _is(at, "each"):
            values = _from_first(values, mask)[0]
        found.append(values if _is(at, "all") or _is(at, "each") else _pick(values, mask, at))
    if _is(at, "each"):
        longest = max(part.shape[1] for part in found)
        found = [
            torch.cat([part, part.new_zeros(len(part), longest - part.shape[1], *part.shape[2:])], 1) for part in found
        ]
    return torch.cat(found)


def _means(stream: Iterable[tuple[torch.Tensor, torch.Tensor]], at: At) -> torch.Tensor:
    total, count = torch.zeros(()), torch.zeros(())
    for values, mask in stream:
        if _is(at, "each"):
            values, real = _from_first(values, mask)
            part, rows = values.sum(0, dtype=torch.float64), real.sum(0, dtype=torch.float64)  # [T, ...], [T]
            rows = rows.view(-1, *[1] * (part.dim() - 1))
        else:
            picked = values[mask] if _is(at, "all") else _pick(values, mask, at)
            part, rows = picked.sum(0, dtype=torch.float64), torch.tensor(float(len(picked)), device=values.device)
        total, count = _add(total, part), _add(count, rows)
    mean = (total / count).to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    return mean[None] if _is(at, "each") else mean


def _add(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sum of two tensors of which one may have more entries at the end of the first dimension."""
    if a.shape == b.shape or not a.dim():
        return a.to(b.device) + b
    a, b = (a, b) if len(a) >= len(b) else (b, a)
    return torch.cat([a[: len(b)] + b, a[len(b) :]])


def _is(at: At, name: str) -> bool:
    return isinstance(at, str) and at == name


def _from_first(values: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[B, T, ...]` counted from each row's first real token, 0 after its last; and where they are, `[B, T]`."""
    begin, end = prompt_ends({"input_ids": mask, "attention_mask": mask})
    column = begin[:, None] + torch.arange(int((end - begin).max()) + 1, device=begin.device)
    inside = column <= end[:, None]
    rows = torch.arange(len(values), device=values.device)[:, None]
    found = values[rows, column.clamp(max=values.shape[1] - 1).to(values.device)]
    inside = inside.to(values.device)
    return found.masked_fill(~inside.view(*inside.shape, *[1] * (values.dim() - 2)), 0), inside


def _stream(
    model: torch.nn.Module, data: Batch | Iterable[Batch], spec: ModelSpec | None, progress: bool, site: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(values `[B, T, L, H, Dh]` or `[B, T, L, D]`, real tokens `[B, T]` bool) of each batch."""
    model = unwrap(model)
    refuse_dropout(model)
    state = prepared(model)
    spec = state.spec if state is not None else describe(model, spec)
    shapes = {(block.heads, block.head_dim) for block in spec.blocks}
    if site == HEADS and len(shapes) > 1:
        raise InvalidArgumentError(f"layers differ in (heads, head_dim): {sorted(shapes)}; they do not fit one tensor")
    each = shapes.pop() if site == HEADS else (-1,)
    for batch in tqdm(batches(data), desc=f"{site} outputs", unit="batch", total=count(data), disable=not progress):
        batch = complete(model, batch, spec)
        rows, width = batch["input_ids"].shape
        with record(model, spec, site) as found, torch.no_grad(), eager(model):
            call(model, batch)
        stacked = torch.stack([found[layer].view(rows, width, *each) for layer in range(spec.layers)], 2)
        mask = batch.get("attention_mask")
        real = torch.ones(rows, width, dtype=torch.bool, device=stacked.device) if mask is None else mask != 0
        _refuse_non_finite(stacked, real, site)
        yield stacked, real


@contextlib.contextmanager
def record(model: torch.nn.Module, spec: ModelSpec, site: str) -> Iterator[dict[int, torch.Tensor]]:
    """Record a copy of each layer's z `[B, T, H * Dh]` or output `[B, T, D]` of the forward inside the context."""
    found: dict[int, torch.Tensor] = {}

    def z(layer: int):
        def hook(module: torch.nn.Module, args: tuple) -> None:
            found[layer] = args[0].detach().clone()

        return hook

    def output(layer: int):
        def hook(module: torch.nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
            found[layer] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    with contextlib.ExitStack() as stack:
        if site == HEADS:
            for layer, block in enumerate(spec.blocks):
                stack.enter_context(submodule(model, block.out_proj).register_forward_pre_hook(z(layer)))
        else:
            for layer, path in enumerate(spec.outputs(site)):
                stack.enter_context(submodule(model, path).register_forward_hook(output(layer)))
        yield found


@contextlib.contextmanager
def eager(model: torch.nn.Module) -> Iterator[None]:
    """Call the model's own modules, not a graph of `model.compile()`, which new hooks cannot enter."""
    compiled = {part: part._compiled_call_impl for part in model.modules() if part._compiled_call_impl is not None}
    for part in compiled:
        part._compiled_call_impl = None
    try:
        yield
    finally:
        for part, call in compiled.items():
            part._compiled_call_impl = call


def columns(mask: torch.Tensor, at: At) -> torch.Tensor:
    """The column of one position a row, `[B]`; raises where a row does not have it."""
    begin, end = prompt_ends({"input_ids": mask, "attention_mask": mask})
    spans = positions(at)
    if any(stop - start != 1 for _, start, stop in spans):
        raise InvalidArgumentError(f"at={at!r} is not one position a row; give 'last_prompt', an int or one int a row")
    if one_a_row(at) and len(spans) != len(mask):
        raise InvalidArgumentError(f"at= gives {len(spans)} positions for a batch of {len(mask)} rows")
    spans = spans * len(mask) if len(spans) == 1 else spans
    found = torch.stack(
        [(begin if origin == FIRST else end)[row] + start for row, (origin, start, _) in enumerate(spans)]
    )
    for row, column in enumerate(found.tolist()):
        if not begin[row] <= column <= end[row]:
            raise InvalidArgumentError(
                f"position {at!r} is outside row {row}, which has {int(end[row] - begin[row]) + 1} tokens"
            )
    return found


def _pick(z: torch.Tensor, mask: torch.Tensor, at: At) -> torch.Tensor:
    return z[torch.arange(len(z), device=z.device), columns(mask, at).to(z.device)]


def _refuse_non_finite(values: torch.Tensor, real: torch.Tensor, site: str) -> None:
    bad = ~torch.isfinite(values).all(-1)  # [B, T, L, H] or [B, T, L]
    bad &= real.view(*real.shape, *[1] * (bad.dim() - 2))
    if bad.any():
        row, token, layer, *head = bad.nonzero()[0].tolist()
        what = f"layer {layer}, head {head[0]}" if head else f"the {site} of layer {layer}"
        raise NonFiniteError(
            f"the output of {what} is NaN or infinite at row {row}, column {token}; check the weights (NaN?) and the "
            "dtype (overflow in float16?)"
        )
