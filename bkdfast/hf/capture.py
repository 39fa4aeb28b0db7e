"""Per-head outputs of a model at chosen positions, streamed over batches: sources for patching and mean ablation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from bkdfast.errors import InvalidArgumentError, NonFiniteError
from bkdfast.hf.batch import Batch, batches, complete, count
from bkdfast.hf.edits import At
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
        at: a position (`"last_prompt"`, an int, one int a row), or `"all"` for every column of one batch.
        spec: where the heads are, when the family is not known.
        progress: show a progress bar over batches.

    Returns:
        `[N, L, H, Dh]` for one position a row; `[N, T, L, H, Dh]` for `"all"`. In the model's dtype, on its device.

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
    found: list[torch.Tensor] = []
    for z, mask in _stream(model, data, spec, progress):
        if found and isinstance(at, str) and at == "all":
            raise InvalidArgumentError('at="all" keeps every token, so it takes one batch; give a position for several')
        found.append(z if isinstance(at, str) and at == "all" else _pick(z, mask, at))
    return torch.cat(found)


def head_means(
    model: torch.nn.Module,
    data: Batch | Iterable[Batch],
    *,
    at: At = "last_prompt",
    spec: ModelSpec | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Mean z of every head over rows (and tokens, for `at="all"`: over real tokens only).

    Arguments and errors as for `head_outputs`. Sums are float64, so the result does not depend on the batch size beyond
    the model's own rounding; one batch is in memory at a time.

    Returns:
        `[L, H, Dh]` float32 (float64 for a float64 model): the source of `Mean`, or of `Patch` in backdoor attribution.
    """
    total: torch.Tensor | None = None
    count = 0
    for z, mask in _stream(model, data, spec, progress):
        picked = z[mask] if isinstance(at, str) and at == "all" else _pick(z, mask, at)
        part = picked.sum(0, dtype=torch.float64)
        total = part if total is None else total + part
        count += len(picked)
    assert total is not None  # _stream refuses empty data
    return (total / count).to(torch.float64 if z.dtype == torch.float64 else torch.float32)


def _stream(
    model: torch.nn.Module, data: Batch | Iterable[Batch], spec: ModelSpec | None, progress: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(z `[B, T, L, H, Dh]`, real tokens `[B, T]` bool) of each batch."""
    model = unwrap(model)
    refuse_dropout(model)
    state = prepared(model)
    spec = state.spec if state is not None else describe(model, spec)
    shapes = {(block.heads, block.head_dim) for block in spec.blocks}
    if len(shapes) > 1:
        raise InvalidArgumentError(f"layers differ in (heads, head_dim): {sorted(shapes)}; they do not fit one tensor")
    heads, head_dim = shapes.pop()
    for batch in tqdm(batches(data), desc="head outputs", unit="batch", total=count(data), disable=not progress):
        batch = complete(model, batch, spec)
        rows, width = batch["input_ids"].shape
        with record_projection_inputs(model, spec) as z, torch.no_grad(), eager(model):
            model(**batch)
        stacked = torch.stack([z[layer].view(rows, width, heads, head_dim) for layer in range(spec.layers)], 2)
        mask = batch.get("attention_mask")
        real = torch.ones(rows, width, dtype=torch.bool, device=stacked.device) if mask is None else mask != 0
        _refuse_non_finite(stacked, real)
        yield stacked, real


@contextlib.contextmanager
def record_projection_inputs(model: torch.nn.Module, spec: ModelSpec) -> Iterator[dict[int, torch.Tensor]]:
    """Record a copy of each layer's z `[B, T, H * Dh]` while a forward runs inside the context."""
    found: dict[int, torch.Tensor] = {}

    def recorder(layer: int):
        def hook(module: torch.nn.Module, args: tuple) -> None:
            found[layer] = args[0].detach().clone()

        return hook

    handles = [
        submodule(model, block.out_proj).register_forward_pre_hook(recorder(layer))
        for layer, block in enumerate(spec.blocks)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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


def _refuse_non_finite(z: torch.Tensor, real: torch.Tensor) -> None:
    bad = ~torch.isfinite(z).all(-1) & real[:, :, None, None]
    if bad.any():
        row, token, layer, head = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"the output of layer {layer}, head {head} is NaN or infinite at row {row}, column {token}; "
            "check the weights (NaN?) and the dtype (overflow in float16?)"
        )
