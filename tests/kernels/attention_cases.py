"""Small cases of `prefix_attention` for kernels that run on any device; see `cases.py`."""

from collections.abc import Callable, Sequence

import torch

from bkdfast.ops import prefix_attention
from tests.kernels.cases import BF16, FP16, FP32, FP64, NAN, move, ulp

# name: V, B, H, Hkv, S, P, Dh, kind of mask, softcap, sinks
ATTENTIONS: dict[str, tuple] = {
    "suffixes of three variants": (3, 2, 4, 2, 5, 7, 16, "causal", 0.0, False),
    "one token": (4, 3, 4, 4, 1, 9, 8, "causal", 0.0, False),
    "one variant": (1, 3, 2, 1, 6, 20, 24, "causal", 0.0, False),
    "many short variants": (23, 1, 4, 2, 3, 17, 16, "causal", 0.0, False),
    "one key-value head": (5, 2, 8, 1, 4, 11, 16, "causal", 0.0, False),
    "no prefix": (3, 2, 4, 2, 5, 0, 16, "causal", 0.0, False),
    "a prefix of one": (3, 2, 4, 2, 5, 1, 16, "causal", 0.0, False),
    "a prefix of several tiles": (5, 2, 2, 1, 9, 150, 32, "causal", 0.0, False),
    "a suffix of several tiles": (2, 2, 2, 1, 70, 33, 16, "causal", 0.0, False),
    "head_dim 80": (3, 2, 2, 1, 5, 21, 80, "causal", 0.0, False),
    "head_dim 48": (3, 2, 2, 2, 5, 21, 48, "padded", 0.0, False),
    "head_dim 5": (3, 2, 3, 3, 5, 21, 5, "causal", 0.0, False),
    "left padding": (3, 4, 4, 2, 5, 7, 16, "padded", 0.0, False),
    "sliding window": (3, 2, 4, 2, 9, 40, 16, "window", 0.0, False),
    "any mask": (3, 3, 4, 2, 13, 37, 16, "random", 0.0, False),
    "nothing seen": (2, 2, 2, 1, 3, 5, 8, "nothing", 0.0, False),
    "nothing but the sink": (2, 2, 2, 1, 3, 5, 8, "nothing", 0.0, True),
    "softcap": (3, 2, 4, 2, 5, 19, 16, "causal", 2.0, False),
    "softcap of 50": (3, 2, 4, 2, 5, 19, 16, "causal", 50.0, False),
    "sinks": (3, 2, 4, 2, 5, 19, 16, "padded", 0.0, True),
    "softcap and sinks": (5, 3, 4, 2, 8, 21, 24, "window", 3.0, True),
    "no variants": (0, 2, 2, 1, 3, 5, 8, "causal", 0.0, False),
    "no tokens": (2, 2, 2, 1, 0, 5, 8, "causal", 0.0, False),
    "no rows": (2, 0, 2, 1, 3, 5, 8, "causal", 0.0, False),
}
ATTENTION_LAYOUTS: dict[str, Callable] = {
    "contiguous": lambda x: x,
    "heads inside": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "rows of a wider tensor": lambda x: torch.cat([x, torch.full_like(x, NAN)], -1)[..., : x.shape[-1]],
    "a part of a longer cache": lambda x: torch.cat([torch.full_like(x, NAN), x, x], 2)[
        :, :, x.shape[2] : 2 * x.shape[2]
    ],
    "batch innermost of the rows": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
}


def seen_keys(kind: str, batch: int, length: int, past: int, g: torch.Generator) -> torch.Tensor:
    """[B, S, P + S]: query i stands at column P + i."""
    query, key = past + torch.arange(length)[:, None], torch.arange(past + length)
    causal = (key <= query).expand(batch, -1, -1)
    if kind == "padded":  # row b misses its first columns, the last row all of its prefix and its first query too
        first = torch.arange(batch) * (past + 1) // max(batch - 1, 1)
        return causal & (key >= first[:, None, None])
    if kind == "window":
        return causal & (key > query - 6) & (key >= torch.arange(batch)[:, None, None])
    if kind == "random":
        return torch.rand(batch, length, past + length, generator=g) < 0.4
    return causal & (kind != "nothing")


def attention(
    variants, batch, heads, shared, length, past, width, kind, softcap, sinks, *, dtype=FP32, seed=0
) -> tuple:
    """Arguments of `prefix_attention`, with logits of a few units."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(*size, generator=g, dtype=FP64)

    rows, wide = variants * batch, FP64 if dtype == FP64 else FP32
    q = draw(rows, heads, length, width)
    k, v = draw(rows, shared, length, width), draw(rows, shared, length, width)
    prefix_k, prefix_v = draw(batch, shared, past, width), draw(batch, shared, past, width)
    mask = seen_keys(kind, batch, length, past, g)
    sink = 2 * draw(heads).to(wide) if sinks else None
    return *(x.to(dtype) for x in (q, k, v, prefix_k, prefix_v)), mask, 1.5 / width**0.5, softcap, sink


def attention_truth(q, k, v, prefix_k, prefix_v, mask, scale, softcap, sinks) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [R, S, H, Dh] by a float64 loop over rows, heads and queries, and its error in units of epsilon."""
    (rows, heads, length, width), shared, batch = q.shape, k.shape[1], prefix_k.shape[0]
    out = torch.zeros(rows, length, heads, width, dtype=FP64)
    bound = torch.zeros_like(out)
    for r in range(rows):
        for h in range(heads):
            n = h * shared // heads
            keys = torch.cat([prefix_k[r % batch, n], k[r, n]]).double()
            values = torch.cat([prefix_v[r % batch, n], v[r, n]]).double()
            for i in range(length):
                seen = mask[r % batch, i]
                if not seen.any():
                    continue
                logits = scale * (keys[seen] @ q[r, h, i].double())
                size = 1 + scale * (keys[seen].abs() @ q[r, h, i].double().abs()).max()
                if softcap:
                    logits = softcap * torch.tanh(logits / softcap)
                if sinks is not None:
                    logits = torch.cat([logits, sinks[h : h + 1].double()])
                weights = torch.softmax(logits, 0)[: int(seen.sum()), None]
                out[r, i, h] = (weights * values[seen]).sum(0)
                out[r, i, h] += 0 * values[seen].sum()  # NaN where one is not finite
                bound[r, i, h] = size * (weights * values[seen].abs()).sum(0)
    return out, bound


def check_attention(launch: Callable, arguments: tuple, device: str, *, rounded: bool = False) -> torch.Tensor:
    """Against float64: a few epsilon of the sums' dtype, and the output's rounding.

    `rounded`: the weights are rounded to 16-bit inputs' dtype, as the models' own attention does, before the values
    are summed.
    """
    moved = [move(x, device) if isinstance(x, torch.Tensor) else x for x in arguments]
    got = launch(*moved)
    for was, now in zip(arguments, moved, strict=True):
        if isinstance(was, torch.Tensor):
            torch.testing.assert_close(now.cpu(), was, rtol=0, atol=0, equal_nan=True)
    q = arguments[0]
    want, bound = attention_truth(*arguments)
    assert got.is_contiguous() and got.dtype == q.dtype and got.shape == want.shape
    got = got.cpu().double()
    assert torch.equal(got.isnan(), want.isnan()), "NaN where there should be none, or none where there should be"
    limit = 4 * torch.finfo(prefix_attention._accumulator(q.dtype)).eps * bound
    if q.dtype in (FP16, BF16):
        limit = limit + 0.5 * ulp(want, q.dtype) + (torch.finfo(q.dtype).eps / 2 * bound if rounded else 0)
    over = (got - want).abs() > limit + 1e-300
    assert not over.any(), f"off by {((got - want).abs() / limit)[over].max():.1f} times the tolerance"
    return got


def unseen_poisoned(name: str, part: int, value: float, **options) -> tuple[tuple, tuple, torch.Tensor]:
    """Arguments of a case, the same with `value` in some keys (part 0) or values (1), and who sees none of those.

    In every other row the last token of the suffix, in all rows key 2 of the prefix; [B, S].
    """
    clean = attention(*ATTENTIONS[name], **options)
    tensors = [x.clone() for x in clean[:5]]
    tensors[1 + part][::2, :, -1, 3] = value
    tensors[3 + part][:, :, 2, 2] = value
    return clean, (*tensors, *clean[5:]), ~clean[5][:, :, 2] & ~clean[5][:, :, -1]


POISONED = ("left padding", "sliding window", "any mask", "softcap and sinks")


def check_poisoned(launch: Callable, device: str, value: float, names: Sequence[str] = POISONED, **options) -> None:
    """Padding, later tokens, keys behind a window and any others: what is not seen does not change a bit."""
    for name in names:
        for part in (0, 1):
            clean, poisoned, spared = unseen_poisoned(name, part, value, **options)
            want = check_attention(launch, clean, device, rounded=True)
            got = check_attention(launch, poisoned, device, rounded=True)
            assert spared.any() and (got.isnan().any() or part == 0)  # a softcap bounds infinite logits
            here = spared.repeat(len(got) // len(spared), 1)
            torch.testing.assert_close(got[here], want[here], rtol=0, atol=0)
