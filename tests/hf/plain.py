"""The oracle of these tests: plain PyTorch hooks that clone and assign. They know nothing of bkdfast.

Paths are written out here a second time on purpose, and positions are columns of the padded batch, counted by the
oracle itself over the calls of a `generate`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tests.hf import zoo

_LLAMA = ("model.layers", "self_attn.o_proj", "mlp.down_proj")
PATHS = dict.fromkeys(
    ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "olmo2", "mixtral"), _LLAMA
) | {
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
    "falcon": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("model.decoder.layers", "self_attn.out_proj", "fc2"),
    "bert": ("bert.encoder.layer", "attention.output.dense", "output.dense"),
    "distilbert": ("distilbert.transformer.layer", "attention.out_lin", "ffn.lin2"),
}


@dataclass
class Where:
    """One row of a batch: the columns of its first real and of its last prompt token."""

    row: int
    first: int
    last: int


@dataclass
class Change:
    """`z[row, column, piece] = value(...)` wherever the conditions hold.

    Attributes:
        layers: layers, in the oracle's own counting.
        pieces: heads, or neurons.
        value: `(old [W], where, column, layer, index in pieces) -> new [W]`, in float32 (float64 for float64).
        when: `(column, where) -> bool`.
        rows: rows, None for all.
        neurons: the pieces are neurons.
    """

    layers: Sequence[int]
    pieces: Sequence[int]
    value: Callable
    when: Callable[[int, Where], bool] = lambda column, where: True
    rows: Sequence[int] | None = None
    neurons: bool = False


def rows_of(batch) -> list[Where]:
    mask = batch["attention_mask"].tolist()
    return [
        Where(row, line.index(1), len(line) - 1 - line[::-1].index(1)) for row, line in enumerate(mask)
    ]  # fmt: skip


def projections(model, family, neurons):
    blocks, attention, mlp = PATHS[family]
    return [block.get_submodule(mlp if neurons else attention) for block in model.get_submodule(blocks)]


@contextlib.contextmanager
def plain_hooks(model, family, changes: Sequence[Change], where: list[Where]):
    """Forwards inside this context run with `changes`; each call's columns follow those of the calls before it."""
    seen = {"past": 0, "rows": 0, "tokens": 0}

    def entering(module, args, kwargs):
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        seen.update(past=seen["past"] + seen["tokens"], rows=tokens.shape[0], tokens=tokens.shape[1])

    def editing(layer, neurons):
        def hook(module, args):
            z = args[0].clone().view(seen["rows"], seen["tokens"], -1)
            width = 1 if neurons else z.shape[2] // zoo.HEADS
            wide = torch.float64 if z.dtype == torch.float64 else torch.float32
            for change in changes:
                if layer not in change.layers or change.neurons != neurons:
                    continue
                for at in where:
                    if change.rows is not None and at.row not in change.rows:
                        continue
                    for t in range(seen["tokens"]):
                        if not change.when(seen["past"] + t, at):
                            continue
                        for i, piece in enumerate(change.pieces):
                            cell = slice(piece * width, (piece + 1) * width)
                            old = z[at.row, t, cell].clone().to(wide)
                            z[at.row, t, cell] = change.value(old, at, seen["past"] + t, layer, i).to(z.dtype)
            return (z.view(args[0].shape), *args[1:])

        return hook

    handles = [model.register_forward_pre_hook(entering, with_kwargs=True)]
    for neurons in {change.neurons for change in changes}:
        for layer, projection in enumerate(projections(model, family, neurons)):
            if any(layer in change.layers for change in changes):
                handles.append(projection.register_forward_pre_hook(editing(layer, neurons)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def restart(batch, width: int):
    """The batch's rows for a run that sees the whole sequence of `width` columns at each call."""
    return rows_of({"attention_mask": batch["attention_mask"][:, :width]})
