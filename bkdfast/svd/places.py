"""Where a weight sits in a transformer, read off its name: layer, projection, expert, and what it does to the stream.

Names only: no model is built, so that results of any model can be sorted. A name that has no layer number is not an
error; embeddings and heads are like that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# What fine-tuning adds to the output of these lands in the residual stream.
_WRITERS = re.compile(
    r"(^|\.)(o_proj|out_proj|out_lin|c_proj|o|wo|dense_4h_to_h|down_proj|fc2|fc_out|lin2|w2|linear_out|proj|output_linear"
    r"|(attention|self_attention|output)\.dense)$"
)
# These read it (through a norm).
_READERS = re.compile(
    r"(^|\.)([qkv]_proj|qkv_proj|qkv|Wqkv|W_pack|in_proj|q_a_proj|kv_a_proj_with_mqa|[qkv]_lin|[qkv]|query|key|value"
    r"|query_key_value|c_attn|c_fc|gate_proj|up_proj|gate_up_proj|fc1|fc_in|lin1|w1|w3|wi|wi_0|wi_1|dense_h_to_4h"
    r"|intermediate\.dense|gate|router|input_linear)$"
)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CROSS = re.compile(r"cross|encoder_attn|EncDec", re.IGNORECASE)
_CONTAINERS = ("layers", "layer", "h", "blocks", "block", "encoder_layers", "decoder_layers")
# As the data flows: q, k, v, output; gate, up, down.
_FLOW = (
    r"(^|\.)(q|q_proj|q_lin|query|q_a_proj)$", r"(^|\.)(k|k_proj|k_lin|key)$", r"(^|\.)(v|v_proj|v_lin|value)$",
    r"qkv|query_key_value|c_attn|Wqkv|W_pack|kv_a|q_b|kv_b|in_proj", r"(^|\.)(gate|router)$",
    r"gate_proj|w1$|wi_0$|gate_up", r"up_proj|w3$|wi_1$", r"c_fc|fc1|fc_in|lin1|h_to_4h|intermediate|wi$",
)  # fmt: skip
_EXPERT_TYPES = ("gpt_oss", "llama4", "llama4_text")


@dataclass(frozen=True)
class Place:
    """Where a weight sits.

    Attributes:
        name: the tensor's name.
        layer: number of the block, from 0; None for a weight outside the blocks.
        projection: path inside the block without expert number and `.weight`, e.g. `"self_attn.o_proj"`; for a weight
            outside the blocks all of the name.
        expert: number of the expert; None where there is none.
        stack: path of the list of blocks, e.g. `"model.layers"`; "" outside the blocks.
    """

    name: str
    layer: int | None
    projection: str
    expert: int | None = None
    stack: str = ""

    @property
    def side(self) -> str:
        """The side of the matrix that is the residual stream: `"input"` of what reads it, else `"output"`."""
        return "input" if _READERS.search(self.projection) else "output"

    @property
    def part(self) -> str:
        """`"attention"` or `"mlp"` for an output or down projection, which write to the stream; "" for any other."""
        if self.layer is None or not _WRITERS.search(self.projection) or _CROSS.search(self.projection):
            return ""
        return "attention" if _ATTENTION.search(self.projection) else "mlp"

    @property
    def order(self) -> tuple:
        """Sorts projections as data flows through a block: attention before the MLP, inputs before outputs."""
        mlp = not _ATTENTION.search(self.projection)
        flow = next((i for i, pattern in enumerate(_FLOW) if re.search(pattern, self.projection)), len(_FLOW))
        return self.stack, mlp, flow, self.projection


def place(name: str) -> Place:
    """Where the weight of that name sits.

    Args:
        name: as in a state dict, e.g. `"model.layers.12.self_attn.o_proj.weight"`; `"name[5]"` is matrix 5 of a stack
            of experts.

    Returns:
        Its `Place`; the first number after a list of blocks (`layers`, `h`, `blocks`, ...) is the layer.

    Example:
        >>> place("transformer.h.3.mlp.c_proj.weight").layer, place("h.3.mlp.c_proj.weight").projection
        (3, 'mlp.c_proj')
        >>> place("model.layers.2.block_sparse_moe.experts.5.w2.weight").expert
        5
    """
    path, expert = name, None
    if stacked := re.fullmatch(r"(.+)\[(\d+)\](.*)", path):
        path, expert = stacked[1] + stacked[3], int(stacked[2])
    parts = path.removesuffix(".weight").split(".")
    numbered = [i for i, part in enumerate(parts[:-1]) if part.isdecimal() and i and parts[i - 1] in _CONTAINERS]
    if not numbered:
        return Place(name, None, ".".join(parts), expert)
    at = numbered[0]
    inside = parts[at + 1 :]
    for i, part in enumerate(inside):
        if part.isdecimal() and i and inside[i - 1] == "experts":
            expert = int(part)
            del inside[i]
            break
    return Place(name, int(parts[at]), ".".join(inside), expert, ".".join(parts[:at]))


def places(names: Iterable[str]) -> list[Place]:
    """The places of some names in reading order: by layer (as a number), projection and expert; the others last."""
    found = [place(name) for name in names]
    return sorted(
        found, key=lambda p: (p.layer is None, p.stack, p.layer or 0, p.order, -1 if p.expert is None else p.expert)
    )


def labels(found: Iterable[Place]) -> dict[tuple[str, str], str]:
    """What to call each projection of the blocks, by (stack, projection).

    Its path; where the model has several lists of blocks, such as a vision tower's, after the part of theirs that tells
    them apart: `"vision_tower: self_attn.o_proj"`.
    """
    keys = dict.fromkeys((p.stack, p.projection) for p in found if p.layer is not None)
    stacks = {stack: stack.split(".") for stack, _ in keys}
    if len(stacks) < 2:
        return {key: key[1] for key in keys}
    shared = 0
    while len({tuple(parts[: shared + 1]) for parts in stacks.values()}) == 1:
        shared += 1
    short = {stack: (parts[shared:-1] or parts[-1:])[0] for stack, parts in stacks.items()}
    if len(set(short.values())) < len(short):
        short = {stack: stack for stack in short}
    return {(stack, projection): f"{short[stack]}: {projection}" for stack, projection in keys}


def input_first(where: Place, model_type: str | None) -> bool:
    """Whether a model of that type stores the weight as `[in, out]` (GPT-2's Conv1D, some stacked experts).

    Args:
        where: of the weight.
        model_type: `model_type` of the config; None: not known, so `[out, in]` as `nn.Linear` stores it.
    """
    from bkdfast.hf.families import FAMILIES

    if model_type in _EXPERT_TYPES:
        return where.expert is not None
    family = FAMILIES.get(model_type or "")
    return family is not None and family.transposed and where.layer is not None
