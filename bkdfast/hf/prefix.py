"""Layer prefix: rerun a model from inside block l on, from what an earlier run left there.

A variant whose first edit is at layer l equals the base run up to there. The model's OWN forward runs, with the blocks
before l and the edited part of block l stood in for by recorded outputs, so masks, rotary embeddings, soft caps and the
head stay the model's business. (Calling the blocks again with recorded arguments does not work in general: caches in
them have been changed, position tensors need their own expansion, some families return tuples.)
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bkdfast.errors import UnsupportedModelError
from bkdfast.hf.spec import ModelSpec, submodule

ATTENTION, MLP, RESIDUAL = "attention", "mlp", "residual"


@dataclass
class Output:
    """Output of one part of a block: `value [B, T, D]`, and the module that can be stood in for.

    `module` is the outermost one that returns just this (all of attention, not only its projection), `count` the length
    of the tuple it returns (None: no tuple).
    """

    value: torch.Tensor
    module: torch.nn.Module
    count: int | None = None


@dataclass
class Recording:
    """What one forward leaves for its variants.

    Attributes:
        spec: the model.
        streams: residual stream `[B, T, D]` after each block.
        z: per-head outputs `[B, T, H * Dh]`, the input of each attention output projection.
        attention: output of each attention output projection.
        mlp: output of each MLP.
    """

    spec: ModelSpec
    model: torch.nn.Module
    streams: dict[int, torch.Tensor] = field(default_factory=dict)
    z: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, Output] = field(default_factory=dict)
    mlp: dict[int, Output] = field(default_factory=dict)
    _returns: dict[int, int | None] = field(default_factory=dict)

    @contextlib.contextmanager
    def record(
        self, layers: Iterable[int], *, z: bool = False, attention: bool = False, mlp: bool = False
    ) -> Iterator[None]:
        """Record the forward that runs inside this context.

        Args:
            layers: layers to be edited later on; the streams that lead to them are kept.
            z: keep the inputs of their attention output projections.
            attention: keep the outputs of those.
            mlp: keep the outputs of their MLPs.
        """
        handles = []

        def watch(path: str, hook: Callable) -> None:
            handles.append(submodule(self.model, path).register_forward_hook(hook))

        wanted = set(layers)
        try:
            for layer, block in enumerate(self.spec.blocks):
                watch(block.block, self._stream(layer, layer + 1 in wanted or layer in wanted))
                if attention and layer in wanted:
                    watch(block.out_proj, self._projection(self.attention, layer, z))
                    self._around(watch, self.attention, layer, block.out_proj)
                if mlp and layer in wanted and (path := block.mlp_output) is not None:
                    watch(path, self._projection(self.mlp, layer, False))
                    self._around(watch, self.mlp, layer, path)
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stream(self, layer: int, keep: bool) -> Callable:
        def hook(module, args, output):
            self._returns[layer] = len(output) if isinstance(output, tuple) else None
            if keep:
                self.streams[layer] = first(output).detach()

        return hook

    def _projection(self, found: dict[int, Output], layer: int, z: bool) -> Callable:
        def hook(module, args, output):
            count = len(output) if isinstance(output, tuple) else None
            # A copy: Falcon adds the attention's output to the MLP's in place, and hooks of the user's may do the like.
            found[layer] = Output(first(output).detach().clone(), module, count)
            if z:
                self.z[layer] = args[0].detach().clone()

        return hook

    def _around(self, watch: Callable, found: dict[int, Output], layer: int, path: str) -> None:
        """The module around a projection stands in for it where it returns the same (no residual or norm inside)."""
        outer = path.rpartition(".")[0]
        if outer in ("", self.spec.blocks[layer].block):
            return
        around = submodule(self.model, outer)
        if around._forward_hooks or around._forward_pre_hooks:
            return  # of the user's: what they do may depend on the edit

        def hook(module, args, output):
            seen = found[layer]
            if first(output).shape == seen.value.shape and torch.equal(first(output), seen.value):
                found[layer] = Output(seen.value, module, len(output) if isinstance(output, tuple) else None)

        watch(outer, hook)

    @contextlib.contextmanager
    def resume(
        self,
        layer: int,
        stream: torch.Tensor | None,
        parts: Iterable[Output] = (),
        columns: tuple[slice, torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """Forwards inside this context begin at `layer`.

        Args:
            layer: the first block that runs; the number of layers: none does.
            stream: residual stream `[R, T, D]` that enters it; None for layer 0: the embeddings do.
            parts: outputs `[R, T, D]` to stand in for parts of that block.
            columns: with attention stood in for, no token of that block looks at another: it runs these columns only
                (`parts` have no more), and its output `[R, T, D]` elsewhere is the tensor, which is written into.
        """
        with contextlib.ExitStack() as stack:
            for i in range(layer):
                block = submodule(self.model, self.spec.blocks[i].block)
                last = stream if i == layer - 1 else None
                stack.enter_context(stub(block, _passing(last, self._returns[i])))
            if columns is not None:
                block = submodule(self.model, self.spec.blocks[layer].block)
                stack.enter_context(stub(block, _in_columns(block.forward, *columns)))
            for part in parts:
                stack.enter_context(stub(part.module, _passing(part.value, part.count)))
            yield


def _passing(value: torch.Tensor | None, count: int | None) -> Callable:
    """A forward that returns `value` (None: the stream it gets) the way the module does."""

    def forward(*args, **kwargs):
        found = _hidden(args, kwargs) if value is None else value
        return found if count is None else (found, *[None] * (count - 1))

    return forward


def _in_columns(forward: Callable, columns: slice, whole: torch.Tensor) -> Callable:
    """A block's forward that runs some columns of the stream and puts its output into `whole`."""

    def partial(*args, **kwargs):
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0][:, columns], *args[1:])
        else:
            hidden = _hidden(args, kwargs)
            kwargs = {name: hidden[:, columns] if value is hidden else value for name, value in kwargs.items()}
        output = forward(*args, **kwargs)
        whole[:, columns] = first(output)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole

    return partial


@contextlib.contextmanager
def stub(module: torch.nn.Module, forward: Callable) -> Iterator[None]:
    """Within this context `module` runs `forward` instead of its own and of its hooks: what they did was recorded."""
    own = module.__dict__.get("forward")
    hooks = module._forward_pre_hooks, module._forward_hooks
    module.forward = forward
    module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        module._forward_pre_hooks, module._forward_hooks = hooks
        if own is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = own


def first(output: Any) -> torch.Tensor:
    """A module's output, or the first of the tuple or HuggingFace output that it returns."""
    return output if isinstance(output, torch.Tensor) else output[0]


def _hidden(args: tuple, kwargs: dict) -> torch.Tensor:
    """The residual stream among a block's arguments."""
    if args and isinstance(args[0], torch.Tensor):
        return args[0]
    for name in ("hidden_states", "hidden_state", "x"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name]
    raise UnsupportedModelError("a block is not called with the residual stream as its first argument")
