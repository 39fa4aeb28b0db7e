"""The attention output projection of edited heads, without a second attention.

With the base run's projection output o (bias included) known, that of edited per-head outputs z' is

    o' = o + (z' - z) W_O[heads]

one `baddbmm` for all variants (DESIGN: low-rank update at the edited block). A projection that is more than a plain
matrix (LoRA, quantised, offloaded weights) is called on z' instead; one with hooks of the user's runs where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bkdfast.errors import UnsupportedModelError
from bkdfast.hf.prepare import Hook
from bkdfast.hf.spec import BlockSpec, ModelSpec, submodule
from bkdfast.ops.edit_table import EditTable
from bkdfast.ops.patch_heads import patch_heads

UPDATE, CALL, RUN = "update", "call", "run"


def projection_mode(model: torch.nn.Module, spec: ModelSpec, layer: int) -> str:
    """`UPDATE` for a plain matrix, `CALL` for another projection, `RUN` where hooks of the user's are on it."""
    from transformers.pytorch_utils import Conv1D

    module = submodule(model, spec.blocks[layer].out_proj)
    if has_hooks(module):
        return RUN
    weight = getattr(module, "weight", None)
    plain = type(module) in (torch.nn.Linear, Conv1D) and "forward" not in vars(module)
    if plain and type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.device.type != "meta":
        return UPDATE
    return CALL


def has_hooks(module: torch.nn.Module) -> bool:
    """Hooks of the user's are on a module or inside it."""
    return any(
        not isinstance(hook, Hook)
        for part in module.modules()
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values())
    )


def refuse_inexact(model: torch.nn.Module) -> None:
    """Raise where a token's result depends on the other tokens of its batch: variants would disturb each other.

    Raises:
        UnsupportedModelError: int8 layers that scale their activations as they come.
    """
    for path, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        weight = f"{type(getattr(module, 'weight', None)).__name__} {getattr(module, 'weight', None).__class__.__mro__}"
        if "quantized.dynamic" in kind or "Linear8bitLt" in kind or "DynamicActivation" in weight:
            raise UnsupportedModelError(
                f"{path} is {type(module).__name__}: int8 with activations scaled batch by batch, so a token's result "
                "depends on its neighbours and a sweep cannot be exact; load the model in a floating-point dtype or "
                "with weight-only quantisation"
            )


def edited_projection(
    projection: torch.nn.Module,
    block: BlockSpec,
    z: torch.Tensor,
    output: torch.Tensor,
    heads: Sequence[Sequence[int]],
    table: EditTable,
    offset: torch.Tensor,
    columns: slice,
    mode: str,
) -> torch.Tensor:
    """Projection output `[V * B, E, D]` of V variants at E columns.

    Args:
        projection: the output projection.
        block: sizes of its block.
        z: `[B, S, H * Dh]` per-head outputs of the base run.
        output: `[B, S, D]` its projection output.
        heads: heads that each variant edits.
        table: edits of `V * B` rows.
        offset: `[3, V * B]`, see `patch_heads`; position of the first column of `z`.
        columns: the columns that are wanted.
        mode: `UPDATE` or `CALL`.
    """
    from transformers.pytorch_utils import Conv1D

    copies, rows = len(heads), len(z)
    old, shifted = z[:, columns], offset + columns.start
    new = patch_heads(old.repeat(copies, 1, 1), table, shifted)
    count = len(heads[0])
    if mode == CALL or any(len(group) != count for group in heads) or 2 * count > block.heads:
        return projection(new)
    index = torch.tensor(heads, device=z.device)  # [V, k]
    width = old.shape[1]
    shape = (copies, rows * width, count, block.head_dim)
    place = index[:, None, :, None].expand(shape)
    change = new.view(copies, rows * width, block.heads, block.head_dim).gather(2, place)
    change -= old.reshape(1, rows * width, block.heads, block.head_dim).expand(copies, -1, -1, -1).gather(2, place)
    matrix = projection.get_parameter("weight")
    weight = (matrix if isinstance(projection, Conv1D) else matrix.T).unflatten(0, (block.heads, -1))  # [H, Dh, D]
    base = output[:, columns].reshape(1, rows * width, -1).expand(copies, -1, -1)
    updated = torch.baddbmm(base, change.flatten(2), weight[index].flatten(1, 2))
    return updated.view(copies * rows, width, -1)
