"""Where the tokens of a forward call stand: in the prompt, in padding, or after it in generation.

Edits name positions the way people do ("the last prompt token", "token 3", "-2"), while a hook only sees `[B, T, ...]`
of this call. `Positions` bridges the two with a few small tensors, updated at the start of each forward by tensor
operations alone, so the same code runs eagerly, inside a compiled graph and in a captured CUDA graph:

- `offset [3, R]`: for batch row b, the position of this call's first token counted from the row's first real token
  (`FIRST`), from its last prompt token (`LAST`) and from the first column (`COLUMN`). `patch_heads` adds it to its own
  token index.
- a call on an empty cache is a prefill and sets where each row's prompt begins and ends (from the attention mask); a
  call on a filled cache is a decode step of those same rows.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch

from bkdfast.errors import InvalidArgumentError, ModelStateError
from bkdfast.ops.edit_table import COLUMN, FIRST, LAST


class Call(NamedTuple):
    """What a forward call was given: `[B, T]` tokens (ids, or embeddings), the mask as passed, the cache's length.

    `follows`: the call is on the rows and the cache of the call before it (always true in a compiled graph).
    """

    tokens: torch.Tensor
    mask: Any
    past: int | torch.Tensor
    follows: bool


class Positions:
    """Positions of the current call of one prepared model.

    Attributes:
        offset: `[3, R]` int32, see the module's docstring; only the first B columns mean something.
        rows: B of the current call.
        tokens: T of the current call.
        seen: rows of the last call, 0 when calls went by unseen since.
        known: rows whose prompt is known, i.e. the last call's if its prefill was seen, else 0.
    """

    def __init__(self, forward: Any, device: torch.device, rows: int = 1024) -> None:
        self.parameters = tuple(inspect.signature(forward).parameters)
        self.device = device
        self.rows = self.tokens = self.seen = self.known = 0
        self._cache: weakref.ref | None = None  # of the last call; None: not known, any cache is taken for it
        self._allocate(rows)

    def forget(self) -> None:
        """A call goes by unseen: the next one on a cache does not follow from what is stored."""
        self.seen = self.known = 0

    def remember_cache(self, output: Any) -> None:
        """Note the cache that a call without one has made."""
        values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        made = next((value for value in values if hasattr(value, "get_seq_length")), None)
        if self._cache is None and made is not None:
            self._cache = weakref.ref(made)

    @torch.inference_mode(False)
    def _allocate(self, rows: int) -> None:
        self.begin = torch.zeros(rows, dtype=torch.int32, device=self.device)  # column of the first real token
        self.end = torch.zeros(rows, dtype=torch.int32, device=self.device)  # column of the last prompt token
        self.offset = torch.zeros(3, rows, dtype=torch.int32, device=self.device)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` batch rows; keeps what is stored (a compiled graph is traced again once)."""
        if rows > len(self.begin):
            if torch.compiler.is_compiling():
                raise InvalidArgumentError(
                    f"a compiled graph cannot make room for {rows} rows (it has {len(self.begin)}); call the model "
                    "uncompiled once with so many rows first"
                )
            begin, end = self.begin, self.end
            self._allocate(max(rows, 2 * len(begin)))
            self.begin[: len(begin)], self.end[: len(end)] = begin, end

    def update(self, args: tuple, kwargs: dict, *, pad_token_id: int | None, relative: bool) -> Call:
        """Read one forward call's arguments. `relative`: some edit counts from the end of the prompt."""
        call = dict(zip(self.parameters, args, strict=False)) | kwargs
        tokens = call.get("input_ids")
        if tokens is None:
            tokens = call.get("inputs_embeds")
        if tokens is None:
            tokens = next((v for v in call.values() if isinstance(v, torch.Tensor)), None)
        if tokens is None or tokens.dim() < 2:
            raise InvalidArgumentError("the model was called without a [B, T] tensor of tokens or embeddings")
        rows, width = tokens.shape[0], tokens.shape[1]
        self.rows, self.tokens = rows, width
        self.reserve(rows)
        mask = call.get("attention_mask")
        cache = call.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        follows = True
        if torch.compiler.is_compiling():
            self._cache = None
        else:
            follows = self.seen == rows and (self._cache is None or self._cache() is cache)
            self._cache = None if cache is None else weakref.ref(cache)
            self.known = self.known if follows else 0
            if self.known != rows:
                past = int(past)  # waits for the device, at a prefill
        self.seen = rows

        if isinstance(past, torch.Tensor):  # static cache: known to the device only
            real = real_tokens(mask, rows, width, tokens.device)
            prefill = past == 0
            self.begin[:rows] = torch.where(prefill, _first(real), self.begin[:rows])
            self.end[:rows] = torch.where(prefill, _last(real), self.end[:rows])
        elif past == 0:
            if mask is None and not torch.compiler.is_compiling():
                refuse_unmasked_padding(call.get("input_ids"), pad_token_id)
            real = real_tokens(mask, rows, width, tokens.device)
            self.begin[:rows] = _first(real)
            self.end[:rows] = _last(real)
            self.known = rows
        elif self.known != rows and not torch.compiler.is_compiling():
            if relative:
                raise ModelStateError(
                    f"a call on a cache of {past} tokens whose prefill ran without these edits, or before calls on "
                    "another cache: the end of the prompt is not known. Run the prefill inside the same context and "
                    "one request after the other, or give positions from the start"
                )
            real = real_tokens(mask, rows, past + width, tokens.device)
            self.begin[:rows] = _first(real)
        elif width > 1 and relative and not torch.compiler.is_compiling():
            raise ModelStateError(
                f"{width} tokens arrived on a cache of {past}: chunked prefill, a cached prefix or speculative "
                "decoding. Edits relative to the end of the prompt cannot tell where it ends there; give positions "
                "from the start"
            )
        self.offset[FIRST, :rows] = past - self.begin[:rows]
        self.offset[LAST, :rows] = past - self.end[:rows]
        self.offset[COLUMN, :rows] = past
        return Call(tokens, mask, past, follows)


def refuse_generate_without_cache(call: Call, kwargs: dict) -> None:
    """Raise in a step of `generate(use_cache=False)`, where every step looks like a prompt of its own."""
    if kwargs.get("past_key_values") is not None:
        return
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__") == "transformers.generation.utils":
            raise ModelStateError(
                "generate() runs without a cache, so each step is a forward over the whole sequence and the end of the "
                "prompt is not known; pass use_cache=True (the model's config or generation_config may turn it off)"
            )
        frame = frame.f_back


def real_tokens(mask: Any, rows: int, width: int, device: torch.device) -> torch.Tensor:
    """`[B, T]` bool, which tokens of a prefill are not padding."""
    if isinstance(mask, dict):  # one mask a layer type
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if mask is None:
        return torch.ones(rows, width, dtype=torch.bool, device=device)
    if mask.dim() == 4:  # [B or 1, 1, T, S]: a real token attends to itself, also in a sliding window
        itself = mask[:, 0, :, :width].diagonal(dim1=1, dim2=2)
        real = itself if mask.dtype == torch.bool else itself == 0
        return real.expand(rows, width)
    return mask[:, :width] != 0


def _first(real: torch.Tensor) -> torch.Tensor:
    return real.int().argmax(1).int()


def _last(real: torch.Tensor) -> torch.Tensor:
    return real.shape[1] - 1 - real.int().flip(1).argmax(1).int()


def refuse_unmasked_padding(ids: torch.Tensor | None, pad_token_id: int | None) -> None:
    """Raise where some rows of a batch without a mask begin or end with the padding token and others do not."""
    if ids is None or pad_token_id is None or ids.dim() != 2 or ids.shape[0] < 2:
        return
    for edge, side in ((ids[:, 0], "left"), (ids[:, -1], "right")):
        padded = edge == pad_token_id
        if padded.any() and not padded.all():
            row = int(padded.int().argmax())
            raise InvalidArgumentError(
                f"row {row} is padded on the {side} (token {pad_token_id}), but no attention_mask was given; "
                "pass the tokenizer's attention_mask"
            )


def prompt_ends(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last real column of each row of a tokenised batch, `[B]` int64 each.

    Raises:
        InvalidArgumentError: a row has no real token.
    """
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    if not real.any(1).all():
        row = int((~real.any(1)).int().argmax())
        raise InvalidArgumentError(f"row {row} of the batch is all padding; drop it")
    return _first(real).long(), _last(real).long()
