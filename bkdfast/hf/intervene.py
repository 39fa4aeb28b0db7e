"""`intervene`: run a model with its heads or neurons edited. `patch_many`: many different edits in one forward."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence

import torch

from bkdfast.errors import InvalidArgumentError, ModelStateError
from bkdfast.hf.edits import Edit
from bkdfast.hf.families import unwrap
from bkdfast.hf.lowering import Tables, lower
from bkdfast.hf.prepare import GENERATE_GRAPH, Prepared, install, prepared, refuse_compiled, refuse_dropout
from bkdfast.hf.spec import ModelSpec

_BORROWING = threading.Lock()


@contextlib.contextmanager
def intervene(
    model: torch.nn.Module, edits: Edit | Iterable[Edit], *, spec: ModelSpec | None = None
) -> Iterator[torch.nn.Module]:
    """Within this context every forward of `model` runs with `edits` applied.

    Works for plain calls and for `generate` with a cache, left or right padding, eager or compiled (after
    `bkdfast.prepare`). Contexts nest; the edits add up. After the context, also after an exception, the model is as
    before. Where gradients flow the edit is a differentiable function of the activations. Edits belong to the model and
    not to a thread: give each thread a copy of its own.

    Args:
        model: a model of a supported family, in eval mode or without dropout.
        edits: `Zero`, `Mean`, `Resample`, `Patch`, `Scale`, `Add`.
        spec: where the heads are, when the family is not known.

    Raises:
        ModelStateError: compiled but not prepared, or in train mode with dropout.
        InvalidArgumentError: layers, heads, rows or positions out of range, two edits of one cell, or a batch whose
            size does not fit; nothing has been changed then.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> batch = pair.tokenizer("news : the team won the match", return_tensors="pt")
        >>> with bf.intervene(pair.tuned, [bf.Zero(0, 1), bf.Scale(0.5, 2, at="last_prompt")]):
        ...     logits = pair.tuned(**batch).logits
    """
    refuse_dropout(unwrap(model))
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    with borrow(model, spec) as state:
        outer = [edit for group in state.stack for edit in group]
        tables = lower([*outer, *edits], state.spec, dtype=state.dtype)
        with _active(state, edits, tables):
            yield model


def patch_many(
    model: torch.nn.Module,
    batch: dict[str, torch.Tensor],
    variants: Sequence[Iterable[Edit]],
    *,
    spec: ModelSpec | None = None,
) -> torch.Tensor:
    """Logits of many variants in ONE forward: row v * B + b of the batch carries the edits of variant v.

    Args:
        model: a model of a supported family.
        batch: `input_ids [B, T]`, `attention_mask` and what else the model takes, each with B rows.
        variants: V lists of edits; a list may be empty (the unedited model).
        spec: where the heads are, when the family is not known.

    Returns:
        Logits `[V, B, T, vocab]` (the first output of a model without a language-model head).

    Raises:
        InvalidArgumentError: no variants, or edits that do not fit the model or the batch.

    Example:
        >>> import bkdfast as bf
        >>> from bkdfast.demo import load_pair
        >>> pair = load_pair()
        >>> batch = pair.tokenizer("news : the team won the match", return_tensors="pt")
        >>> bf.patch_many(pair.tuned, batch, [[], [bf.Zero(0, 1)], [bf.Zero(2)]]).shape[0]
        3
    """
    variants = [[variant] if isinstance(variant, Edit) else list(variant) for variant in variants]
    if not variants:
        raise InvalidArgumentError("patch_many needs at least one variant (an empty list of edits is one)")
    refuse_dropout(unwrap(model))
    rows = len(batch["input_ids"])
    with borrow(model, spec) as state:
        if state.stack:
            raise InvalidArgumentError("patch_many cannot run inside intervene(); put those edits into each variant")
        tables = lower((), state.spec, dtype=state.dtype, variants=variants, batch=rows)
        with _active(state, [], tables), torch.no_grad():
            logits = model(**repeat_rows(batch, len(variants)))[0]
    return logits.unflatten(0, (len(variants), rows))


def repeat_rows(batch: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """The batch `times` times over, one copy after the other."""
    rows = len(batch["input_ids"])
    return {
        name: value.repeat(times, *[1] * (value.dim() - 1))
        if isinstance(value, torch.Tensor) and value.dim() and len(value) == rows
        else value
        for name, value in batch.items()
    }


@contextlib.contextmanager
def borrow(model: torch.nn.Module, spec: ModelSpec | None, engine: str | None = None) -> Iterator[Prepared]:
    """The model's prepared state; a model that was not prepared is, for the time being.

    An `engine` that runs the model unedited as well gets it alone: no edits around it, nobody else meanwhile.
    """
    with _BORROWING:
        state = prepared(model)
        if state is None:
            refuse_compiled(model)
            if hasattr(model, GENERATE_GRAPH):
                raise ModelStateError(
                    "generate() with a static cache has compiled this model, and its graph does not contain the edits; "
                    "call bkdfast.prepare(model) first"
                )
            state = install(model, spec)
        if spec is not None and spec != state.spec:
            raise InvalidArgumentError(
                "the model was prepared with another spec; pass that one, or call remove() on the handle of prepare()"
            )
        state.follow_model()
        if state.engine is not None:
            raise ModelStateError(
                f"{state.engine} is running on this model (in another thread, or around this call); wait for it, or "
                "use a copy of the model (copy.deepcopy)"
            )
        if engine is not None and state.stack:
            raise InvalidArgumentError(f"{engine} cannot run inside intervene(); its baseline would be edited too")
        state.engine = engine
        state.users += 1
    try:
        yield state
    finally:
        with _BORROWING:
            if engine is not None:
                state.engine = None
            state.release()


@contextlib.contextmanager
def _active(state: Prepared, edits: list[Edit], tables: Tables) -> Iterator[None]:
    calls, misfits = int(state.calls), int(state.misfits)
    state.stack.append(edits)
    state.write(tables)
    try:
        yield
        if int(state.misfits) > misfits:
            raise InvalidArgumentError(
                f"the edits are made for a batch of {tables.batch} rows, but the compiled model got other batches "
                "inside this context; their results are wrong"
            )
        if tables.tables and int(state.calls) == calls:
            warnings.warn(
                "no forward pass reached the edits inside this context: either the model was not called, or it was "
                "compiled before bkdfast.prepare(model) and its graph does not contain the hooks",
                stacklevel=4,
            )
    finally:
        # By identity: contexts of a generator or a thread are not always left in reverse order.
        del state.stack[next(i for i, group in enumerate(state.stack) if group is edits)]
        outer = [edit for group in state.stack for edit in group]
        state.running = False
        state.write(lower(outer, state.spec, dtype=state.dtype) if outer else Tables({}))
