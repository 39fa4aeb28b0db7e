"""Layer prefix: rerun a model from block l on, from the residual stream of an earlier run.

A variant whose first edit is at layer l equals the base run up to there. The model's OWN forward runs, with the blocks
before l short-circuited and the stored residual stream put in at l, so masks, rotary embeddings, soft caps and the head
stay the model's business. (Calling the blocks again with recorded arguments does not work in general: caches in them
have been changed, position tensors need their own expansion, some families return tuples.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from bkdfast.errors import UnsupportedModelError
from bkdfast.hf.spec import ModelSpec, submodule


class ResidualRecord:
    """The residual stream entering each block in a base run, and how each block returns its output."""

    def __init__(self, model: torch.nn.Module, spec: ModelSpec) -> None:
        self._blocks = [submodule(model, block.block) for block in spec.blocks]
        self._paths = [block.block for block in spec.blocks]
        self.streams: dict[int, torch.Tensor] = {}
        self._outputs: dict[int, int | None] = {}

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record the forward that runs inside this context."""

        def entering(layer):
            def hook(module, args, kwargs):
                self.streams[layer] = _hidden(args, kwargs, self._paths[layer])[0].detach().clone()

            return hook

        def leaving(layer):
            def hook(module, args, output):
                self._outputs[layer] = len(output) if isinstance(output, tuple) else None

            return hook

        handles = [
            handle
            for layer, block in enumerate(self._blocks)
            for handle in (
                block.register_forward_pre_hook(entering(layer), with_kwargs=True),
                block.register_forward_hook(leaving(layer)),
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def resume(self, layer: int, copies: int) -> Iterator[None]:
        """Forwards inside this context start at `layer`, with `copies` stacked copies of the recorded batch."""
        stream = self.streams[layer].repeat(copies, 1, 1)

        def passing(count):
            def forward(*args, **kwargs):
                hidden = _hidden(args, kwargs, "a block")[0]
                return hidden if count is None else (hidden, *[None] * (count - 1))

            return forward

        def entering(module, args, kwargs):
            _, name = _hidden(args, kwargs, self._paths[layer])
            if name is None:
                return (stream, *args[1:]), kwargs
            return args, {**kwargs, name: stream}

        skipped = self._blocks[:layer]
        own = [block.__dict__.get("forward") for block in skipped]
        handle = self._blocks[layer].register_forward_pre_hook(entering, with_kwargs=True)
        try:
            for i, block in enumerate(skipped):
                block.forward = passing(self._outputs[i])
            yield
        finally:
            handle.remove()
            for block, forward in zip(skipped, own, strict=True):
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.forward = forward


def _hidden(args: tuple, kwargs: dict, path: str) -> tuple[torch.Tensor, str | None]:
    """The residual stream among a block's arguments, and its keyword (None: the first positional)."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0], None
    for name in ("hidden_states", "hidden_state", "x"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name], name
    raise UnsupportedModelError(f"{path} is not called with the residual stream as its first argument")
