"""Norms that feed the monitor: `norm_tap` in place of the norm that reads a block's output.

A block's output goes into its successor's first norm (`BlockSpec.input_norm`, or the final norm), so that norm is where
the monitor's work costs least. A norm is taken over only if it computes one of `norm_tap`'s formulas on a trial input;
where it has more to do (another dtype, gradients, autocast), it goes on doing that itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.ops.norm_tap import KINDS, LAYER, norm_tap

_TRIAL_ROWS = 8


@dataclass(frozen=True)
class Norm:
    """A module whose formula is known: `norm_tap(x, module.weight, bias, eps=eps, kind=kind)`."""

    module: torch.nn.Module
    kind: int
    eps: float

    @property
    def weight(self) -> torch.Tensor:
        """`[D]`."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        """`[D]` for a LayerNorm with bias."""
        return self.module.bias if self.kind == LAYER else None  # type: ignore[return-value]

    def serves(self, x: torch.Tensor) -> bool:
        """Whether the op may stand in for the module here."""
        gradient = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        return x.dtype == self.weight.dtype and not gradient and not torch.is_autocast_enabled(x.device.type)


def successors(model: torch.nn.Module, spec: ModelSpec) -> list[Norm | None]:
    """For each block the norm that reads its output; None where there is none of a known formula."""
    paths = [block.input_norm for block in spec.blocks[1:]] + [spec.final_norm]
    found = [recognise(submodule(model, path), spec.width) if path else None for path in paths]
    modules = [norm.module for norm in found if norm]
    # A module that stands in several places could not tell which block it follows.
    return [norm if norm and sum(norm.module is other for other in modules) == 1 else None for norm in found]


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
    if not isinstance(eps, float) or weight.is_meta or "forward" in module.__dict__:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_TRIAL_ROWS, width, generator=generator) + 0.25  # LayerNorm takes the mean out
    x *= torch.logspace(-3, 1, _TRIAL_ROWS)[:, None]  # eps counts in the first rows, not in the last
    x = x.to(weight.device, weight.dtype)
    expected = type(module).forward(module, x)
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    for kind in KINDS:
        found = norm_tap(x, weight, bias if kind == LAYER else None, eps=eps, kind=kind, backend="reference")
        near = torch.isclose(found, expected, rtol=4 * torch.finfo(x.dtype).eps, atol=1e-6)
        if near.all() and (x.itemsize > 2 or (found == expected).float().mean() > 0.99):
            return Norm(module, kind, eps)
    return None


class Replacement:
    """Takes a norm's `forward` over until `remove`.

    Args:
        norm: the module and its formula.
        serve: `serve(x [N, D]) -> y [N, D]`, instead of the module where `norm.serves(x)`.
        observe: called with `[N, D]` where the module serves itself.
    """

    def __init__(
        self,
        norm: Norm,
        serve: Callable[[torch.Tensor], torch.Tensor],
        observe: Callable[[torch.Tensor], None],
    ) -> None:
        self.norm, self._serve, self._observe = norm, serve, observe
        norm.module.forward = self  # type: ignore[method-assign, assignment]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The module's forward."""
        x = hidden.reshape(-1, hidden.shape[-1])
        if self.norm.serves(hidden):
            return self._serve(x).view(hidden.shape)
        self._observe(x)
        return type(self.norm.module).forward(self.norm.module, hidden)

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self.norm.module.__dict__.get("forward") is self:
            del self.norm.module.forward

    def __deepcopy__(self, memo: dict) -> types.MethodType:
        # A copy of the model is not monitored: its norm gets its own forward.
        return types.MethodType(type(self.norm.module).forward, memo[id(self.norm.module)])
