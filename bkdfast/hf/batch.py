"""Tokenised batches: one or many, checked, with positions that do not depend on padding."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.hf.families import unwrap
from bkdfast.hf.positions import prompt_ends, refuse_unmasked_padding
from bkdfast.hf.spec import ModelSpec, device_of

Batch = Mapping[str, torch.Tensor]


def batches(data: Batch | Iterable[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    """One batch or many, as an iterator of checked dicts.

    Raises:
        InvalidTypeError: not a mapping with `input_ids`.
        InvalidArgumentError: no batch at all, an empty batch, an attention mask of another shape (one of each pair of
            tokens), or a row without a real token.
    """
    empty = True
    for batch in [data] if isinstance(data, Mapping) else data:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise InvalidTypeError(
                "expected tokenised batches: dicts with input_ids [B, T] and attention_mask, as "
                f"tokenizer(texts, return_tensors='pt', padding=True) returns; got {type(batch).__name__}"
            )
        ids = batch["input_ids"]
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or 0 in ids.shape:
            raise InvalidArgumentError(
                f"input_ids must be a non-empty tensor [B, T], got {tuple(getattr(ids, 'shape', ()))}; "
                "tokenise with return_tensors='pt' and padding=True"
            )
        mask = batch.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise InvalidArgumentError(
                f"attention_mask {tuple(mask.shape)} must have the shape of input_ids {tuple(ids.shape)}: 1 where a "
                "token is, 0 for padding"
            )
        batch = {name: value for name, value in batch.items() if name != "labels"}  # they would buy a loss
        prompt_ends(batch)
        empty = False
        yield batch
    if empty:
        raise InvalidArgumentError("no data: the list of batches is empty")


def count(data: Batch | Iterable[Batch]) -> int | None:
    """Number of batches, for a progress bar; None where only iterating tells."""
    if isinstance(data, Mapping):
        return 1
    return len(data) if isinstance(data, Sized) else None


def complete(model: torch.nn.Module, batch: dict[str, torch.Tensor], spec: ModelSpec) -> dict[str, torch.Tensor]:
    """The batch on the model's device, with `position_ids` from the attention mask where rows start with padding.

    A causal model called without `position_ids` counts padding as positions; `generate` does not. With them, a row's
    result does not depend on its neighbours' lengths.

    Raises:
        InvalidArgumentError: the batch is longer than the model's context, or has padding but no attention mask.
    """
    model = unwrap(model)
    device = device_of(model)
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    config = getattr(model, "config", None)
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None) if config else None
    width = batch["input_ids"].shape[1]
    if limit is not None and width > limit:
        raise InvalidArgumentError(f"{width} tokens (prompt and target) do not fit the model's context of {limit}")
    mask = batch.get("attention_mask")
    if mask is None:
        refuse_unmasked_padding(batch["input_ids"], getattr(config, "pad_token_id", None))
    elif not takes(model, "attention_mask") and not mask[:, : 1 if spec.causal else None].all():
        row = int((mask[:, : 1 if spec.causal else None] == 0).any(1).int().argmax())
        raise InvalidArgumentError(
            f"row {row} has padding{' on the left' * spec.causal}, but {type(model).__name__} takes no "
            "attention_mask and would see it; " + ("pad on the right" if spec.causal else "give prompts of one length")
        )
    if spec.causal and mask is not None and "position_ids" not in batch and not mask[:, 0].all():
        if takes(model, "position_ids"):
            batch["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
    return batch


def takes(model: torch.nn.Module, name: str) -> bool:
    """`model` can be called with the argument `name`; a wrapper with `**kwargs` (PEFT) hands it to the model inside."""
    from transformers import PreTrainedModel

    kind: Any = type(model)
    parameters, passes = _parameters(kind)
    if name in parameters or isinstance(model, PreTrainedModel) or not passes:
        return name in parameters
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    return inner is not None and takes(inner, name)


@functools.cache
def _parameters(kind: Any) -> tuple[frozenset[str], bool]:
    """Names of the arguments of a module's `forward`, and whether it has `**kwargs`."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return frozenset(p.name for p in parameters), any(p.kind == p.VAR_KEYWORD for p in parameters)


def call(model: torch.nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    """First output of a model (the logits) for a completed batch.

    A module that is not from HuggingFace gets of it what its `forward` takes, the tokens as first argument.
    """
    unnamed = [name for name in ("input_ids", "attention_mask") if not takes(model, name)]
    inputs = {name: value for name, value in batch.items() if name not in unnamed}
    if takes(model, "output_router_logits"):  # the first output would be a loss
        inputs["output_router_logits"] = False
    if "past_key_values" not in inputs and takes(model, "use_cache"):
        inputs["use_cache"] = False  # keys and values that nobody reads
    output = model(batch["input_ids"], **inputs) if "input_ids" in unnamed else model(**inputs)
    return output if isinstance(output, torch.Tensor) else output[0]
