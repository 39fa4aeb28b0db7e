"""`norm_tap`: a normalisation that also feeds the monitor what it holds in registers anyway.

A block's successor begins with a norm that reads the very activations the monitor reads, and computes the very norm the
cosine divides by. Two forms, which differ in where the activations go:

- `norm_monitor` (prefill): y = norm(x), and `cosine_monitor(x)` in the same pass;
- `norm_tap` (decode): y = norm(x), and `step[layer, n] <- x[n]`; one `cosine_monitor` over `step` serves all blocks.

The norms, with m = mean over D, r(v) = v rounded to x's dtype, and the sums in float32:

    RMS       r(w * r(x / sqrt(m(x^2) + eps)))           Llama and its kin
    RMS_WIDE  r(w * (x / sqrt(m(x^2) + eps)))            OLMo-2
    RMS_ONE   r((1 + w) * (x / sqrt(m(x^2) + eps)))      Gemma
    LAYER     r(w * (x - m(x)) / sqrt(var(x) + eps) + b)  torch.nn.LayerNorm, var with 1/D

They round where the models' own modules round; only the order of a sum differs, so results agree to the last digit or
the one before, and in bfloat16 nearly everywhere bit for bit.

Shapes and dtypes: x `[N, D]` float16, bfloat16 or float32 (float64: the reference and C++; RMS norms then compute in
float32 like the models' modules, LAYER in float64), any strides; weight `[D]` and bias `[D]` (LAYER only, None: 0)
of x's dtype; step `[L, C, D]` of x's dtype with C >= N, or C = 0: nothing is kept. What `norm_monitor` adds is as in
`cosine_monitor`. y is `[N, D]`, contiguous. None of the ops has a gradient.

Floor: what the norm alone moves (x read, y written), plus one row written a token; `norm_monitor` adds K*D read and
2 N K D flops.
"""

from __future__ import annotations

import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops import cosine_monitor as _cosine
from bkdfast.ops._library import Op
from bkdfast.ops.monitor_state import MonitorState

KINDS = RMS, RMS_WIDE, RMS_ONE, LAYER = range(4)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_norm(x, weight, bias, eps, kind) -> None:
    if x.dim() != 2 or tuple(weight.shape) != (x.shape[1],):
        raise InvalidArgumentError(
            f"x must be [N, D] and weight [D], got {tuple(x.shape)} and {tuple(weight.shape)}; flatten x first"
        )
    if kind not in KINDS:
        raise InvalidArgumentError(f"kind {kind} is not RMS (0), RMS_WIDE (1), RMS_ONE (2) or LAYER (3)")
    if bias is not None and (kind != LAYER or bias.shape != weight.shape):
        raise InvalidArgumentError(
            f"bias must be [{x.shape[1]}] and only a LAYER norm has one, got {tuple(bias.shape)} and kind {kind}"
        )
    if x.dtype not in _DTYPES:
        raise InvalidTypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if not eps >= 0:
        raise InvalidArgumentError(f"eps={eps} is negative")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise InvalidTypeError(f"{name} is {tensor.dtype} but x is {x.dtype}; the model's own norm serves that")
        if tensor.device != x.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device} but x is on {x.device}; move it there")
        if not tensor.is_contiguous():
            raise InvalidArgumentError(f"{name} must be contiguous")


def _norm(x, weight, bias, eps, kind) -> torch.Tensor:
    if kind == LAYER:
        wide = x.double() if x.dtype == torch.float64 else x.float()
        centred = wide - wide.mean(1, keepdim=True)
        y = centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + eps) * weight.to(wide.dtype)
        return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)
    wide = x.float()
    unit = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + eps)
    if kind == RMS:
        return weight * unit.to(x.dtype)
    return (unit * (weight if kind == RMS_WIDE else 1 + weight.float())).to(x.dtype)


def _tap_check(x, weight, bias, eps, kind, step, layer) -> None:
    _check_norm(x, weight, bias, eps, kind)
    if step.dim() != 3 or step.dtype != x.dtype or step.device != x.device:
        raise InvalidArgumentError(
            f"step must be [L, C, D] {x.dtype} on {x.device}, got {tuple(step.shape)} {step.dtype} on {step.device}"
        )
    if step.shape[1] == 0:
        return
    if step.shape[1] < x.shape[0] or step.shape[2] != x.shape[1] or not step.is_contiguous():
        raise InvalidArgumentError(
            f"step must be contiguous with room for {tuple(x.shape)} in each block, got {tuple(step.shape)}"
        )
    if not 0 <= layer < step.shape[0]:
        raise InvalidArgumentError(f"block {layer} is out of range, step has {step.shape[0]}")


def _tap_fake(x, weight, bias, eps, kind, step, layer) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _tap_reference(x, weight, bias, eps, kind, step, layer) -> torch.Tensor:
    _tap_check(x, weight, bias, eps, kind, step, layer)
    if step.shape[1]:
        step[layer, : len(x)] = x
    return _norm(x, weight, bias, eps, kind).contiguous()


TAP = Op(
    "norm_tap(Tensor x, Tensor weight, Tensor? bias, float eps, int kind, Tensor(a!) step, int layer) -> Tensor",
    check=_tap_check,
    fake=_tap_fake,
    reference=_tap_reference,
    triton="norm_tap",
)


def _monitor_check(x, weight, bias, eps, kind, directions, tokens, ranges, extremes, counts, layer) -> None:
    _check_norm(x, weight, bias, eps, kind)
    _cosine.check(x, directions, tokens, ranges, extremes, counts, layer)


def _monitor_fake(x, weight, bias, eps, kind, directions, tokens, ranges, extremes, counts, layer) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _monitor_reference(x, weight, bias, eps, kind, directions, tokens, ranges, extremes, counts, layer):
    _check_norm(x, weight, bias, eps, kind)
    _cosine.OP.reference(x, directions, tokens, ranges, extremes, counts, layer)
    return _norm(x, weight, bias, eps, kind).contiguous()


MONITOR = Op(
    "norm_monitor(Tensor x, Tensor weight, Tensor? bias, float eps, int kind, Tensor directions, Tensor tokens, "
    "Tensor ranges, Tensor(a!) extremes, Tensor(b!) counts, int layer) -> Tensor",
    check=_monitor_check,
    fake=_monitor_fake,
    reference=_monitor_reference,
    triton="norm_tap",
)


def norm_tap(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    eps: float,
    kind: int,
    step: torch.Tensor | None = None,
    layer: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """The norm of x; x itself is also kept in `step[layer, :N]`.

    Args:
        x: `[N, D]` residual stream.
        weight: `[D]`, x's dtype.
        bias: `[D]`, x's dtype, for a LAYER norm; None: none.
        eps: as the model's norm has it.
        kind: `RMS`, `RMS_WIDE`, `RMS_ONE` or `LAYER`; see the module's docstring.
        step: `[L, C, D]`, x's dtype, C >= N; None: the norm alone.
        layer: block of `step`.
        backend: `"cpp"`, `"cuda"`, `"triton"` or `"reference"`; None: the fastest that is there.

    Returns:
        y `[N, D]`.

    Raises:
        InvalidArgumentError: shapes, strides or devices do not fit, or a gradient is asked for (the op has none).
        InvalidTypeError: a dtype does not fit.
        BackendError: the backend cannot serve here.

    Example:
        >>> import torch
        >>> norm_tap(torch.tensor([[3.0, 4.0]]), torch.ones(2), eps=0.0, kind=RMS)
        tensor([[0.8485, 1.1314]])
    """
    _refuse_gradient(x, weight, bias)
    step = x.new_empty(0, 0, 0) if step is None else step
    arguments = (x, weight, bias, eps, kind, step, layer)
    try:
        return TAP.resolve(backend, x.device)(*arguments)
    except RuntimeError:
        _tap_check(*arguments)  # what a compiled kernel refuses, in our exceptions
        raise


def norm_monitor(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    state: MonitorState,
    tokens: torch.Tensor,
    *,
    eps: float,
    kind: int,
    layer: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """The norm of x, and `cosine_monitor(x, state, tokens, layer=layer)` in the same pass.

    Args:
        x: `[N, D]` residual stream after block `layer`.
        weight: as in `norm_tap`; also `bias`, `eps`, `kind` and `backend`.
        bias: see `weight`.
        state: as in `cosine_monitor`.
        tokens: as in `cosine_monitor`.
        eps: see `weight`.
        kind: see `weight`.
        layer: index of x's block in the state.
        backend: see `weight`.

    Returns:
        y `[N, D]`.

    Raises:
        InvalidArgumentError: shapes, strides or devices do not fit, or a gradient is asked for (the op has none).
        InvalidTypeError: a dtype does not fit.
        BackendError: the backend cannot serve here.
    """
    _refuse_gradient(x, weight, bias)
    norm = (x, weight, bias, eps, kind)
    monitor = (state.directions, tokens, state.ranges, state.extremes, state.counts, layer)
    try:
        return MONITOR.resolve(backend, x.device)(*norm, *monitor)
    except RuntimeError:
        _monitor_check(*norm, *monitor)  # what a compiled kernel refuses, in our exceptions
        raise


def forward_gradient() -> bool:
    """Forward-mode differentiation is on: its tangents would be lost without a word."""
    return torch.autograd.forward_ad._current_level >= 0


def _refuse_gradient(*tensors: torch.Tensor | None) -> None:
    if (
        forward_gradient()
        or torch.is_grad_enabled()
        and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    ):
        raise InvalidArgumentError("norm_tap has no gradient; call it under torch.no_grad(), or use the model's norm")
