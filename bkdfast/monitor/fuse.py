"""Norms that feed the monitor: `norm_tap` in place of the norm that reads a block's output.

A block's output goes into its successor's first norm (`BlockSpec.input_norm`, or the final norm), so that norm is where
the monitor's work costs least. A norm is taken over only if it computes one of `norm_tap`'s formulas on a trial input,
and it goes on computing itself where `Norm.serves` says so. What no norm shows in a call is not called seen.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.ops.norm_tap import KINDS, LAYER, forward_gradient, norm_tap

_TRIAL_ROWS = 8


@dataclass(frozen=True)
class Norm:
    """A module whose formula is known: `norm_tap(x, module.weight, bias, eps=eps, kind=kind)`."""

    module: torch.nn.Module
    kind: int
    eps: float
    training: bool

    @property
    def weight(self) -> torch.Tensor:
        """`[D]`."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """`[D]` for a LayerNorm with bias."""
        return self.module.bias if self.kind == LAYER else None  # type: ignore[return-value]

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the op may stand in for the module: same dtype and mode, nothing to differentiate, no autocast."""
        tensors = (x, self.weight, self.bias)
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        return (
            x.dtype == self.weight.dtype
            and self.module.training == self.training
            and not gradient
            and not forward_gradient()
            and not torch.is_autocast_enabled(x.device.type)
        )


def successors(model: torch.nn.Module, spec: ModelSpec) -> list[Norm | None]:
    """For each block the norm that reads its output; None where there is none of a known formula."""
    paths = [block.input_norm for block in spec.blocks[1:]] + [spec.final_norm]
    found = [recognise(submodule(model, path), spec.width) if path else None for path in paths]
    # A module that stands in several places could not tell which block it follows.
    places = {path for block in spec.blocks for path in (*block.norms, block.input_norm)} | {spec.final_norm}
    uses = Counter(id(submodule(model, path)) for path in places if path)
    return [norm if norm and uses[id(norm.module)] == 1 else None for norm in found]


@torch.no_grad()
def recognise(module: torch.nn.Module, width: int) -> Norm | None:
    """The formula of a norm, found by comparing it with `norm_tap` on a trial input; None when it is none of them."""
    weight = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), None
    )
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != (width,) or not weight.is_floating_point():
        return None
    if not isinstance(eps, float) or weight.is_meta:
        return None
    # Somebody else's forward, hooks that change what the norm reads, an adapter around it: not ours to replace.
    if not _own_forward(module) or module._forward_pre_hooks or hasattr(module, "base_layer"):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_ROWS, width, generator=generator) + 0.25  # LayerNorm takes the mean out
    x *= torch.logspace(-3, 4, _TRIAL_ROWS)[:, None]  # eps counts in the first rows; the last are massive activations
    x[1::2, 0] *= 30  # fits float16 in the last row but one
    x = x.clamp(-6e4, 6e4).to(weight.device, weight.dtype)
    try:
        expected = type(module).forward(module, x)
    except Exception:  # noqa: BLE001  a forward that wants something else is not one of the formulas
        return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    for kind in KINDS:
        found = norm_tap(x, weight, bias if kind == LAYER else None, eps=eps, kind=kind, backend="reference")
        near = torch.finfo(x.dtype).eps * (4 * expected.abs() + 0.5 * expected.abs().amax(1, keepdim=True))
        if ((found - expected).abs() <= near).all() and (x.itemsize > 2 or (found == expected).float().mean() > 0.99):
            return Norm(module, kind, eps, module.training)
    return None


def _own_forward(module: torch.nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


class Replacement:
    """Takes a norm's `forward` over until `remove`.

    Args:
        norm: the module and its formula.
        serve: `serve(x [N, D]) -> y [N, D]`, instead of the module where `norm.serves(x)`.
        observe: called with `[N, D]` where the module serves itself.
        watching: whether N tokens here and now are the model's own call.
    """

    def __init__(
        self,
        norm: Norm,
        serve: Callable[[torch.Tensor], torch.Tensor],
        observe: Callable[[torch.Tensor], None],
        watching: Callable[[int], bool],
    ) -> None:
        self.norm, self._serve, self._observe, self._watching = norm, serve, observe, watching
        self._active = True
        norm.module.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, *args, **kwargs):
        """The module's forward."""
        module = self.norm.module
        if self._active and len(args) == 1 and isinstance(args[0], torch.Tensor):
            x = args[0].reshape(-1, args[0].shape[-1])
            if not kwargs and self._watching(len(x)) and self.norm.serves(x):
                return self._serve(x).view(args[0].shape)
            self._observe(x)
        return type(module).forward(module, *args, **kwargs)

    def remove(self) -> None:
        """Give the module its own forward back; does nothing more where somebody has wrapped this one meanwhile."""
        self._active = False
        if self.norm.module.__dict__.get("forward") is self:
            del self.norm.module.forward

    def __deepcopy__(self, memo: dict) -> types.MethodType:
        # A copy of the model is not monitored: its norm gets its own forward.
        return types.MethodType(type(self.norm.module).forward, memo[id(self.norm.module)])
