"""Token suffix: run only the tokens from some column on, over keys and values that all variants of a row share.

In a causal model nothing before the first edited position changes. A base run fills a `PrefixCache`; a variant's
forward then gets the remaining tokens, explicit positions and that cache, whose `update` hands back the suffix only.
The attention function registered here joins the shared prefix (`prefix_attention`); it is copied for no variant. Masks
are the model's own: padding, causality and sliding windows arrive as one boolean mask.

Families that do not call HuggingFace's `AttentionInterface` (Falcon, BLOOM, GPT-J) get prefix and suffix as one tensor
from `update`, one layer at a time, and run their own attention on it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from bkdfast.errors import UnsupportedModelError
from bkdfast.hf.batch import takes
from bkdfast.hf.spec import ModelSpec, submodule
from bkdfast.ops.prefix_attention import prefix_attention

NAME = "bkdfast_prefix"
KERNEL, COPY = "shared", "copied"
_CURRENT: ContextVar[PrefixCache] = ContextVar("prefix cache of the running forward")


class Stopped(Exception):
    """A base run has filled the last layer's keys and values; what follows in it is not needed."""


class PrefixCache(Cache):
    """Keys and values of a base run, layer by layer, read by many forwards of the tokens after them.

    Args:
        layers: number of layers.
        rows: B, rows of the base run; a forward has a multiple of it.
        join: `KERNEL` or `COPY`, see `joining`.

    Attributes:
        length: P, number of columns that stand before the tokens of the next forward.
        keep: forwards add their own keys and values.
        stop_at: layer whose `update` ends the forward with `Stopped`; None: none.
        served: calls of the attention function.
    """

    def __init__(self, layers: int, rows: int, join: str) -> None:
        self.length, self.keep, self.served = 0, False, 0
        self.stop_at: int | None = None
        self.rows, self.join = rows, join
        self.configs: list[Any] | None = None  # of the model's modules, once `attending` has looked
        self._pieces: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(layers)]
        super().__init__(layers=[_Layer(self) for _ in range(layers)])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[R, Hkv, T, Dh]` that the layer attends to, beside the prefix where it is shared."""
        found = key_states, value_states
        if self.length and self.join == COPY:
            old, copies = self.prefix(layer_idx), (len(key_states) // self.rows, 1, 1, 1)
            found = torch.cat([old[0].repeat(copies), found[0]], 2), torch.cat([old[1].repeat(copies), found[1]], 2)
        if self.keep:
            self._pieces[layer_idx].append((key_states, value_states))
        if layer_idx == self.stop_at:
            raise Stopped
        return found

    def prefix(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[B, Hkv, P, Dh]` before the suffix."""
        pieces = self._pieces[layer]
        if self.length > pieces[0][0].shape[2]:
            keys, values = (torch.cat(part, 2) for part in zip(*pieces, strict=True))
            self._pieces[layer] = pieces = [(keys, values)]
        keys, values = pieces[0]
        return keys[:, :, : self.length], values[:, :, : self.length]

    def clean(self, real: torch.Tensor) -> None:
        """Zero what padding left behind (a row whose prefix is all padding may hold NaN); `real [B, T]` bool."""
        for pieces in self._pieces:
            first = 0
            for keys, values in pieces:
                padding = ~real[:, None, first : first + keys.shape[2], None].to(keys.device)
                keys.masked_fill_(padding, 0)
                values.masked_fill_(padding, 0)
                first += keys.shape[2]


class _Layer(CacheLayerMixin):
    """Answers the questions that models ask when they build masks and positions."""

    def __init__(self, cache: PrefixCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """`PrefixCache.update` is called instead."""
        raise NotImplementedError

    def get_seq_length(self) -> int:
        """P."""
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of the keys, and the column of the first."""
        return self.cache.length + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def joining(model: torch.nn.Module, spec: ModelSpec) -> str | None:
    """How variants can share a prefix: `KERNEL`, `COPY` (layer by layer), or None (they cannot)."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not takes(model, "past_key_values"):
        return None
    if any(part.training and getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        return None  # HuggingFace takes the cache away from such layers
    if not spec.causal or any(_layer_index(model, block.out_proj) is None for block in spec.blocks):
        return None
    return KERNEL if getattr(inner, "_supports_attention_backend", False) else COPY


def depends_on_length(model: torch.nn.Module, width: int) -> bool:
    """Rotary frequencies of a row of `width` tokens differ from those of a shorter one (LongRoPE, dynamic NTK)."""
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if config is not None else None
    rope = getattr(text, "rope_parameters", None) or {}
    for part in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if part.get("rope_type") in ("dynamic", "longrope"):
            trained = part.get("original_max_position_embeddings") or getattr(
                text, "original_max_position_embeddings", None
            )
            if width > (trained or text.max_position_embeddings):  # type: ignore[union-attr]
                return True
    return False


def _layer_index(model: torch.nn.Module, path: str) -> int | None:
    """Index under which the attention around an output projection keeps its keys and values."""
    while path:
        path = path.rpartition(".")[0]
        if (index := getattr(submodule(model, path), "layer_idx", None)) is not None:
            return index
    return None


@contextlib.contextmanager
def attending(model: torch.nn.Module, cache: PrefixCache) -> Iterator[None]:
    """Forwards inside this context, given `cache` as past_key_values, attend to its prefix too."""
    if cache.join == COPY:
        yield
        return
    if cache.configs is None:
        cache.configs = list({id(c): c for m in model.modules() if (c := vars(m).get("config")) is not None}.values())
    before = [(config, config._attn_implementation) for config in cache.configs]
    token = _CURRENT.set(cache)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield
    finally:
        _CURRENT.reset(token)
        for config, implementation in before:
            config._attn_implementation = implementation


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """HuggingFace's attention function over the current cache's prefix and the forward's own keys and values."""
    cache = _CURRENT.get()
    if attention_mask is None or attention_mask.dtype != torch.bool or options.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} calls attention with a mask or a position bias that a shared prefix does not "
            "know; pass share_prefix=False"
        )
    keys, values = (
        cache.prefix(module.layer_idx) if cache.length else (key[: cache.rows, :, :0], value[: cache.rows, :, :0])
    )
    cache.served += 1
    found = prefix_attention(
        query,
        key,
        value,
        keys,
        values,
        attention_mask[: cache.rows, 0].to(query.device),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.to(torch.promote_types(query.dtype, torch.float32)),
    )
    return found, None


def _mask(*, batch_size: int, attention_mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor | None:
    """The model's boolean mask `[B, 1, S, P + S]`, for the rows of one variant: those of the others are the same."""
    rows = _CURRENT.get().rows
    options["allow_is_causal_skip"] = False
    return sdpa_mask(rows, attention_mask=None if attention_mask is None else attention_mask[:rows], **options)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
