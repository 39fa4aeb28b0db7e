"""`prefix_attention`: attention of many variants' short suffixes over keys and values that all variants share.

Row r = v * B + b holds variant v of batch row b. Query i of head h sees the P prefix keys of batch row b, stored once,
and the S suffix keys of its own row, as far as `mask[b, i]` says:

    a_j         = scale * <q_i, k_j>, or softcap * tanh(scale * <q_i, k_j> / softcap)    seen keys j of the P + S
    out[r, i, h] = sum_j exp(a_j) v_j / (sum_j exp(a_j) + exp(sink_h))                   the sink only where given

The mask carries causality, padding and sliding windows. A query that sees no key has output 0. What a query does not
see does not reach its output, NaN and infinity included; one that sees a value with a component that is not finite has
output NaN.

Shapes and dtypes: q `[R, H, S, Dh]`, k and v `[R, Hkv, S, Dh]` with R = V * B and H a multiple of Hkv (query head h
reads head h // (H / Hkv)); prefix_k and prefix_v `[B, Hkv, P, Dh]`, P may be 0; all of one dtype, float16, bfloat16,
float32 or float64, any strides (copied where the last dimension is not contiguous); mask `[B, S, P + S]` bool; sinks
`[H]`. out `[R, S, H, Dh]`, contiguous, q's dtype. Sums, softmax included, in float32, in float64 for float64. The
reference's products obey `torch.set_float32_matmul_precision`. No gradient.

Floor: 4 R H S (P + S) Dh flops (those of seen keys), q and out moved once, the prefix read once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops._library import Op
from bkdfast.ops.norm_tap import forward_gradient

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise InvalidArgumentError(
            "q must be [R, H, S, Dh], k and v [R, Hkv, S, Dh]; "
            f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    rows, heads, length, width = q.shape
    if k.shape[0] != rows or k.shape[2:] != q.shape[2:] or k.shape[1] == 0 or heads % k.shape[1]:
        raise InvalidArgumentError(
            f"k and v must be [{rows}, Hkv, {length}, {width}] like q, with Hkv dividing q's {heads} heads; "
            f"found {tuple(k.shape)}"
        )
    if prefix_k.dim() != 4 or prefix_k.shape != prefix_v.shape or prefix_k.shape[1::2] != k.shape[1::2]:
        raise InvalidArgumentError(
            f"prefix_k and prefix_v must be [B, {k.shape[1]}, P, {width}]; "
            f"found {tuple(prefix_k.shape)} and {tuple(prefix_v.shape)}"
        )
    batch, past = prefix_k.shape[0], prefix_k.shape[2]
    if rows % batch if batch else rows:
        raise InvalidArgumentError(
            f"q has {rows} rows, which are not whole variants of the prefix's {batch}; row r is variant r // {batch}"
        )
    if mask.dtype != torch.bool:
        raise InvalidTypeError(f"mask must be bool, True where a query sees a key; found {mask.dtype}")
    if tuple(mask.shape) != (batch, length, past + length):
        raise InvalidArgumentError(
            f"mask must be [B, S, P + S] = {(batch, length, past + length)}, found {tuple(mask.shape)}"
        )
    if sinks is not None and tuple(sinks.shape) != (heads,):
        raise InvalidArgumentError(f"sinks must be [H] = {(heads,)}, found {tuple(sinks.shape)}")
    if not (math.isfinite(scale) and math.isfinite(softcap) and softcap >= 0):
        raise InvalidArgumentError(f"scale must be finite and softcap at least 0, found {scale} and {softcap}")
    if q.dtype not in _DTYPES:
        raise InvalidTypeError(f"q must be float16, bfloat16, float32 or float64, found {q.dtype}")
    if sinks is not None and sinks.dtype != _accumulator(q.dtype):
        raise InvalidTypeError(f"sinks must be {_accumulator(q.dtype)} for q of {q.dtype}, found {sinks.dtype}")
    others = {"k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    for name, tensor in others.items():
        if tensor.dtype != q.dtype:
            raise InvalidTypeError(f"{name} is {tensor.dtype} but q is {q.dtype}; cast it")
    for name, tensor in {**others, "mask": mask, "sinks": sinks}.items():
        if tensor is not None and tensor.device != q.device:
            raise InvalidArgumentError(f"{name} is on {tensor.device} but q is on {q.device}; move it there")


def _fake(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks) -> Tensor:
    rows, heads, length, width = q.shape
    return q.new_empty((rows, length, heads, width))


def _reference(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks) -> Tensor:
    _check(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks)
    (rows, heads, length, width), (batch, shared, past, _) = q.shape, prefix_k.shape
    dtype, wide = q.dtype, _accumulator(q.dtype)
    if q.numel() == 0:
        return q.new_empty((rows, length, heads, width))
    with torch.autocast(q.device.type, enabled=False):
        q = q.to(wide).unflatten(1, (shared, -1)).unflatten(0, (-1, batch))  # [V, B, Hkv, G, S, Dh]
        k, v = (x.to(wide).unflatten(0, (-1, batch)) for x in (k, v))  # [V, B, Hkv, S, Dh]
        prefix_k, prefix_v = prefix_k.to(wide), prefix_v.to(wide)
        shared_logits = torch.einsum("vbngsd,bnpd->vbngsp", q, prefix_k)
        logits = scale * torch.cat([shared_logits, torch.einsum("vbngsd,vbntd->vbngst", q, k)], -1)
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        # 0 * x is NaN where x is not finite. Such a value's weight is NaN, and 0 for who does not see it.
        lost = torch.cat([(0 * prefix_v).sum(-1).expand(len(v), -1, -1, -1), (0 * v).sum(-1)], -1)  # [V, B, Hkv, P + S]
        logits = (logits + lost[:, :, :, None, None]).masked_fill(~mask[:, None, None], -math.inf)
        v, prefix_v = v.nan_to_num(0, 0, 0), prefix_v.nan_to_num(0, 0, 0)
        sink = q.new_full((heads,), -math.inf) if sinks is None else sinks
        sink = sink.view(shared, -1, 1, 1)
        peak = torch.maximum(logits.amax(-1, keepdim=True), sink)
        peak = peak.masked_fill(peak == -math.inf, 0)
        weights = torch.exp(logits - peak)
        total = weights.sum(-1, keepdim=True) + torch.exp(sink - peak)
        weights = weights / total.masked_fill(total == 0, 1)
        out = torch.einsum("vbngsp,bnpd->vbngsd", weights[..., :past], prefix_v)
        out += torch.einsum("vbngst,vbntd->vbngsd", weights[..., past:], v)
    out = out.flatten(2, 3).flatten(0, 1)  # [R, H, S, Dh]
    return out.transpose(1, 2).to(dtype).contiguous()


OP = Op(
    "prefix_attention(Tensor q, Tensor k, Tensor v, Tensor prefix_k, Tensor prefix_v, Tensor mask, float scale, "
    "float softcap, Tensor? sinks) -> Tensor",
    check=_check,
    fake=_fake,
    reference=_reference,
    triton="prefix_attention",
)


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    mask: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of R = V * B rows over a prefix that the V variants of a batch row share, and over their own suffix.

    Args:
        q: `[R, H, S, Dh]` queries of the suffix, variant-major: row r is variant r // B of batch row r % B; float16,
            bfloat16, float32 or float64.
        k: `[R, Hkv, S, Dh]` keys of the suffix, q's dtype, like all that follow.
        v: `[R, Hkv, S, Dh]` values of the suffix.
        prefix_k: `[B, Hkv, P, Dh]` keys of the prefix; P may be 0.
        prefix_v: `[B, Hkv, P, Dh]` values of the prefix.
        mask: `[B, S, P + S]` bool, True where a query sees a key.
        scale: factor of the logits, commonly 1 / sqrt(Dh).
        softcap: bound of the logits, `softcap * tanh(logits / softcap)`; 0: none.
        sinks: `[H]`, one more logit per head, without a value; None: none.
        backend: `"cpp"`, `"triton"` or `"reference"`; None: the fastest that is there.

    Returns:
        `[R, S, H, Dh]`, contiguous, q's dtype.

    Raises:
        InvalidArgumentError: shapes or devices do not fit, or a gradient is asked for (the op has none).
        InvalidTypeError: a dtype does not fit.
        BackendError: the backend cannot serve here.

    Example:
        >>> import torch
        >>> prefix = torch.zeros(1, 1, 3, 2)  # three keys, all alike to these queries
        >>> own = torch.zeros(2, 1, 1, 2)  # two variants of one batch row, one token each
        >>> out = prefix_attention(own, own, own + 4, prefix, prefix, torch.ones(1, 1, 4, dtype=torch.bool), scale=1.0)
        >>> out[:, 0, 0].tolist()  # a quarter of each variant's own value
        [[1.0, 1.0], [1.0, 1.0]]
    """
    tensors = (q, k, v, prefix_k, prefix_v)
    wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*tensors, sinks))
    if wanted or forward_gradient():
        raise InvalidArgumentError("prefix_attention has no gradient; call it under torch.no_grad()")
    if sinks is not None and q.dtype in _DTYPES:
        sinks = sinks.to(_accumulator(q.dtype)).contiguous()
    _check(*tensors, mask, scale, softcap, sinks)
    arguments = [x if x.stride(-1) == 1 else x.contiguous() for x in (*tensors, mask)]
    return OP.resolve(backend, q.device)(*arguments, scale, softcap, sinks)
