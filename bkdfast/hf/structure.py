"""Guess the spec of an unknown HuggingFace family from its structure, then prove it by a probe run.

The guess is only names and shapes. The probe run checks what the engines rely on: every output projection is called
once a forward, in layer order, on `[B, T, heads * head_dim]`; a block returns the residual stream `[B, T, D]`; editing
z at one token changes that token's output, and earlier ones only where attention looks ahead.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from bkdfast.errors import UnsupportedModelError
from bkdfast.hf.batch import takes
from bkdfast.hf.families import HOW_TO_ADD, Family, base_path, block_spec, embeddings
from bkdfast.hf.spec import ModelSpec, device_of, in_features, submodule

_OUT = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo", "proj", "linear_out")
_DOWN = ("down_proj", "fc2", "c_proj", "dense_4h_to_h", "lin2", "w2", "fc_out", "wo", "proj", "dense")


def guess(model: torch.nn.Module, inner: torch.nn.Module, prefix: str, config) -> ModelSpec:
    """A spec for an unknown family, checked by a probe run; raises `UnsupportedModelError` with what went wrong."""
    kind = config.model_type
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        raise UnsupportedModelError(f"{kind}: its config has no num_attention_heads and hidden_size; {HOW_TO_ADD}")
    path, blocks = _blocks(inner, kind)
    line = _family(blocks[0], width, kind)
    spec = ModelSpec(
        family=kind,
        blocks=tuple(
            block_spec(block, ".".join(p for p in (prefix, path, str(i)) if p), line, heads)
            for i, block in enumerate(blocks)
        ),
        width=width,
        entry=".".join(p for p in (prefix, base_path(inner)) if p),
        transposed=hasattr(submodule(blocks[0], line.out_proj), "nf"),
        **embeddings(inner, prefix),
    ).check(model)
    return _probe(model, inner, spec)


def _blocks(inner: torch.nn.Module, kind: str) -> tuple[str, list[torch.nn.Module]]:
    """The module list of like blocks that holds the most parameters."""
    candidates = [
        (sum(p.numel() for p in module.parameters()), path, list(module))
        for path, module in inner.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len({type(block) for block in module}) == 1
    ]
    if not candidates:
        raise UnsupportedModelError(f"{kind}: no list of like blocks found; {HOW_TO_ADD}")
    _, path, blocks = max(candidates, key=lambda found: found[0])
    return path, blocks


def _family(block: torch.nn.Module, width: int, kind: str) -> Family:
    attention = [name for name, m in block.named_modules() if name and "attention" in type(m).__name__.lower()]
    linear = {
        name: module
        for name, module in block.named_modules()
        if in_features(module) is not None and _out_features(module) == width
    }
    inside = [n for n in linear if any(n.startswith(a + ".") for a in attention) and n.rsplit(".", 1)[-1] in _OUT]
    outside = [
        n
        for n in linear
        if not any(n.startswith(a + ".") for a in attention) and n.rsplit(".", 1)[-1] in _DOWN and "expert" not in n
    ]
    if not inside:
        raise UnsupportedModelError(f"{kind}: no attention output projection found in {list(linear)}; {HOW_TO_ADD}")
    # The whole MLP, where experts share the work: what holds weights beside attention and norms.
    others = [
        name
        for name, module in block.named_children()
        if not any(a.split(".")[0] == name for a in attention) and any(p.dim() > 1 for p in module.parameters())
    ]
    norms = tuple(name for name, module in block.named_modules() if "norm" in type(module).__name__.lower())
    mlp = others[0] if len(others) == 1 else None
    return Family("", inside[-1], outside[-1] if outside else None, norms, None, pre_norm=False, mlp=mlp)


def _out_features(module: torch.nn.Module) -> int | None:
    return getattr(module, "out_features", getattr(module, "nf", None))


def _probe(model: torch.nn.Module, inner: Any, spec: ModelSpec) -> ModelSpec:
    """Run 2 x 5 tokens through the model and compare what happens with what the spec claims."""

    def refuse(what: str) -> NoReturn:
        raise UnsupportedModelError(
            f"{spec.family}: the structure was guessed, but the probe run says: {what}; {HOW_TO_ADD}"
        )

    device = device_of(inner)
    if device.type == "meta":
        refuse("there are no weights (meta device) to run it with")
    tokens = torch.arange(10, device=device).reshape(2, 5) % inner.config.get_text_config().vocab_size
    calls: list[int] = []
    shapes: dict[int, tuple] = {}
    edit: dict[str, int] = {}

    def watch(layer):
        def hook(module, args):
            calls.append(layer)
            shapes[layer] = tuple(args[0].shape)
            if edit.get("layer") == layer:
                z = args[0].clone()
                z[:, edit["token"]] += 1.0
                return (z, *args[1:])
            return None

        return hook

    streams: list[tuple] = []

    def stream(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        streams.append(tuple(getattr(first, "shape", (type(first).__name__,))))

    handles = [submodule(model, b.out_proj).register_forward_pre_hook(watch(i)) for i, b in enumerate(spec.blocks)]
    handles += [submodule(model, b.block).register_forward_hook(stream) for b in spec.blocks]
    try:
        with torch.no_grad():
            try:
                base = inner(tokens)[0]
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                refuse(f"the model does not run on token ids alone ({type(error).__name__}: {error})")
            if calls != list(range(spec.layers)):
                refuse(f"the output projections ran in the order {calls}, not once each in layer order")
            for layer, block in enumerate(spec.blocks):
                if shapes[layer] != (2, 5, block.heads * block.head_dim):
                    refuse(f"the input of {block.out_proj} is {shapes[layer]}, not [B, T, heads * head_dim]")
            if set(streams) != {(2, 5, spec.width)}:
                refuse(f"blocks return {sorted(set(streams))}, not the residual stream [B, T, {spec.width}]")
            edit.update(layer=0, token=3)
            moved = (inner(tokens)[0] - base).abs().amax(-1)
            edit.clear()
            counted = base
            if takes(inner, "position_ids"):
                counted = inner(tokens, position_ids=torch.arange(5, device=device).expand(2, 5))[0]
    finally:
        for handle in handles:
            handle.remove()
    if not (moved[:, 3] > 0).all():
        refuse("editing z at a token does not change that token's output")
    # Not zero: mixture-of-experts layers compute a token in another order when another token changes its expert.
    causal = bool(moved[:, :3].max() < 1e-3 * moved[:, 3].min())
    if causal and not torch.allclose(counted, base, atol=1e-3 * float(base.abs().max())):
        # Rows that begin with padding get them from us.
        refuse("position_ids 0, 1, 2, ... are not those that the model takes by itself")
    return spec if causal else ModelSpec(**{**spec.__dict__, "causal": False})
