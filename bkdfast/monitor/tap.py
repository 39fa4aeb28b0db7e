"""`Tap`: the in-graph part of the monitor. Each block's output goes through one op that updates fixed accumulators.

A request is a row of a prefill call and keeps its slot through the calls on the same cache that follow. A row of a
filled cache that belongs to no open request (its prefill was not seen, or it was collected since) opens one, which
notes how many tokens came before. Slots are given out by tensor operations at the start of each call, so nothing
depends on Python once the model is compiled or captured.
"""

from __future__ import annotations

from typing import Any

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.positions import Call, real_tokens
from bkdfast.hf.prepare import Hook, Prepared
from bkdfast.hf.spec import submodule
from bkdfast.monitor.fuse import Norm, Replacement, successors
from bkdfast.monitor.ranges import Observations, Ranges
from bkdfast.ops.cosine_monitor import cosine_monitor
from bkdfast.ops.monitor_state import NONE, POSITION, RANGE, SEGMENT, MonitorState
from bkdfast.ops.norm_tap import norm_monitor, norm_tap

_STEP = 64
"""Calls of at most this many tokens are decode steps: one `cosine_monitor` over a buffer serves all blocks."""


class Tap:
    """Accumulators of one monitor on one model.

    Args:
        state: the prepared model.
        directions: `[L, K, D]` float32.
        slots: requests that can be open or uncollected at a time; older ones are overwritten.
        rows: largest batch.
        tokens: most tokens in one call; eager calls beyond it make room, a compiled model is traced again.
        fuse: let the norm that reads a block's output observe it, where its formula is known.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        state: Prepared,
        directions: torch.Tensor,
        *,
        slots: int = 1024,
        rows: int = 1024,
        tokens: int = 1 << 18,
        fuse: bool = True,
    ) -> None:
        model = state.model()
        assert model is not None
        layers, count, _ = directions.shape
        self.state, self.slots = state, slots
        self.padding = _generated_padding(model)
        device = state.device
        # Prompt tokens of slot s go to segment s and range row 0, generated ones to segment slots + s and row 1.
        ranges = torch.tensor([-torch.inf, torch.inf], device=device)[:, None].expand(layers, 2, 2, count)
        self.cosines = MonitorState.create(directions.to(device), 2 * slots, ranges)
        # Tokens of each segment: those that came in, and those that every block has been observed with.
        self.due = torch.zeros(2 * slots, dtype=torch.int64, device=device)
        self.seen = torch.zeros_like(self.due)
        self.unseen = torch.zeros(slots, dtype=torch.int64, device=device)
        self.started = torch.zeros((), dtype=torch.int64, device=device)
        self.collected = torch.zeros_like(self.started)
        self.request = torch.full((rows,), -1, dtype=torch.int64, device=device)  # running number of each row's
        self.tokens = torch.full((3, tokens), -1, dtype=torch.int32, device=device)  # as `pack_tokens` makes them
        self._handles: list[Any] = []
        norms = successors(model, state.spec) if fuse else [None] * layers
        self.step: torch.Tensor | None = None
        # Of this call: its tokens, the blocks that were observed, and those of them that are in the step buffer.
        self.count = self.reached = self.written = 0
        if all(norms) and len({(norm.weight.dtype, norm.weight.device) for norm in norms if norm}) == 1:
            self.step = norms[0].weight.new_zeros(layers, _STEP, directions.shape[2])  # type: ignore[union-attr]
        for layer, (norm, block) in enumerate(zip(norms, state.spec.blocks, strict=True)):
            if norm is None:
                module = submodule(model, block.block)
                self._handles.append(module.register_forward_hook(Hook(self._hook(layer))))
            else:
                self._handles.append(Replacement(norm, self._serve(layer, norm), self._observe(layer), self._watching))
        state.observers.append(self._begin)
        state.enders.append(self._end)

    def _begin(self, call: Call) -> None:
        rows, width = call.tokens.shape[:2]
        self.count, self.reached, self.written = rows * width, 0, 0
        if rows > self.slots:
            raise InvalidArgumentError(
                f"a batch of {rows} rows needs a monitor with at least as many slots; it has {self.slots}"
            )
        self._reserve(rows, rows * width)
        past = torch.as_tensor(call.past, device=self.request.device)
        held = self.request[:rows]
        opens = (past == 0) | (held < self.collected)  # [R]
        if not call.follows:
            opens = torch.ones_like(opens)
        request = torch.where(opens, self.started + opens.cumsum(0) - 1, held)
        self.request[:rows] = request
        self.started += opens.sum()

        slot = request % self.slots
        both, opened = torch.cat([slot, slot + self.slots]), torch.cat([opens, opens])
        kept = self.cosines
        for values, empty in ((kept.low, torch.inf), (kept.high, -torch.inf), (kept.nonfinite, 0), (kept.first, NONE)):
            values[:, both] = values[:, both].masked_fill(opened[:, None] if values.dim() == 3 else opened, empty)
        for tokens in (self.due, self.seen):
            tokens[both] = tokens[both].masked_fill(opened, 0)
        self.unseen[slot] = torch.where(opens, past, self.unseen[slot])

        # Several tokens on a filled cache are a next turn, or a chunk of a prompt.
        generated = (past > 0) & (width == 1)
        valid = torch.where(generated, self._generated(call), self._prompt(call))
        segment = torch.where(generated, slot + self.slots, slot)[:, None].expand(rows, width)
        before = self.unseen[slot] + self.due[slot] + self.due[slot + self.slots]  # tokens of the request so far
        position = before[:, None] + valid.long().cumsum(1) - 1
        now = self.tokens[:, : rows * width]
        now[SEGMENT] = segment.where(valid, -1).flatten()
        now[RANGE] = (segment >= self.slots).flatten()
        now[POSITION] = position.flatten()
        self.due.scatter_add_(0, segment.flatten(), valid.flatten().long())

    @staticmethod
    def _prompt(call: Call) -> torch.Tensor:
        rows, width = call.tokens.shape[:2]
        mask = call.mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and not isinstance(call.past, torch.Tensor):
            mask = mask[:, call.past :] if mask.shape[1] >= call.past + width else None
        return real_tokens(mask, rows, width, call.tokens.device)

    def _generated(self, call: Call) -> torch.Tensor:
        """Decode steps: `generate` feeds padding to rows that have finished."""
        rows, width = call.tokens.shape[:2]
        if call.tokens.dim() == 2 and self.padding is not None:
            return call.tokens != self.padding
        return torch.ones(rows, width, dtype=torch.bool, device=call.tokens.device)

    def _watching(self, count: int) -> bool:
        """Whether what a norm reads now are the `count` tokens of a call: norms are also called on their own."""
        return count == self.count and (self.state.running or torch.compiler.is_compiling())

    def _observe(self, layer: int):
        def observe(x: torch.Tensor) -> None:  # [N, D]
            if self._watching(len(x)):
                self._flush()
                cosine_monitor(x, self.cosines, self.tokens[:, : self.count], layer=layer)
                self._reach()

        return observe

    def _reach(self) -> None:
        """One more block was observed; after the last one the tokens count as seen."""
        self.reached += 1
        if self.reached == len(self.cosines.directions):
            segment = self.tokens[SEGMENT, : self.count]
            self.seen.scatter_add_(0, segment.clamp(min=0).long(), (segment >= 0).long())

    def _end(self) -> None:
        if not torch.compiler.is_compiling():
            self._flush()  # a forward that stopped in between leaves what it showed

    def _hook(self, layer: int):
        observe = self._observe(layer)

        def hook(module: torch.nn.Module, args: tuple, output) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            observe(stream.reshape(-1, stream.shape[-1]))

        return hook

    def _serve(self, layer: int, norm: Norm):
        def serve(x: torch.Tensor) -> torch.Tensor:  # [N, D]
            weight, bias, eps, kind = norm.weight, norm.bias, norm.eps, norm.kind
            # A decode step that came through every block so far goes on in the buffer.
            if self.step is not None and len(x) <= _STEP and self.written == layer:
                y = norm_tap(x, weight, bias, eps=eps, kind=kind, step=self.step, layer=layer)
                self.written += 1
                if self.written == len(self.step):
                    self._flush()
            else:
                self._flush()
                tokens = self.tokens[:, : self.count]
                y = norm_monitor(x, weight, bias, self.cosines, tokens, eps=eps, kind=kind, layer=layer)
            self._reach()
            return y

        return serve

    def _flush(self) -> None:
        """Observe what is in the step buffer."""
        if self.step is not None and self.written:
            count = self.count
            cosine_monitor(self.step[: self.written, :count], self.cosines, self.tokens[:, :count])
            self.written = 0

    @torch.inference_mode(False)
    def _reserve(self, rows: int, tokens: int) -> None:
        room = rows <= len(self.request) and tokens <= self.tokens.shape[1]
        if not room and torch.compiler.is_compiling():
            raise InvalidArgumentError(
                f"a compiled graph cannot make room for {rows} rows and {tokens} tokens (it has {len(self.request)} "
                f"and {self.tokens.shape[1]}); call the model uncompiled once with a batch of that size first"
            )
        if rows > len(self.request):
            grown = self.request.new_full((max(rows, 2 * len(self.request)),), -1)
            grown[: len(self.request)] = self.request
            self.request = grown
        if tokens > self.tokens.shape[1]:
            self.tokens = self.tokens.new_full((3, max(tokens, 2 * self.tokens.shape[1])), -1)

    def judge_with(self, ranges: Ranges, eps: float) -> None:
        """From now on note the first token outside these ranges; a role that was not calibrated is not judged."""
        bounds = torch.stack([ranges.low - eps, ranges.high + eps], 2).permute(1, 0, 2, 3)  # [L, 2, 2, K]
        open_end = torch.tensor([-torch.inf, torch.inf])[:, None]
        judged = (ranges.requests > 0)[None, :, None, None]
        self.cosines.ranges.copy_(bounds.where(judged, open_end))

    def collect(self) -> Observations:
        """Take out the requests that began since the last collection; waits for the device."""
        started, collected = int(self.started), int(self.collected)
        lost = max(started - collected - self.slots, 0)
        first = collected + lost
        index = torch.arange(first, started, device=self.request.device) % self.slots
        both = torch.stack([index, index + self.slots], 1)  # [R, 2]
        self.collected.fill_(started)
        return Observations(
            self.cosines.low[:, both].permute(1, 2, 0, 3).cpu(),
            self.cosines.high[:, both].permute(1, 2, 0, 3).cpu(),
            self.seen[both].cpu(),
            self.cosines.nonfinite[:, both].amax(0).long().cpu(),
            first,
            lost,
            (self.unseen[index] + (self.due - self.seen)[both].sum(1)).cpu(),
            self.cosines.first[:, both].amin((0, 2)).long().cpu(),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for callbacks, ours in ((self.state.observers, self._begin), (self.state.enders, self._end)):
            if ours in callbacks:
                callbacks.remove(ours)


def _generated_padding(model: torch.nn.Module) -> int | None:
    """The token that `generate` feeds to finished rows: padding, or the end token where there is none, by its rule."""
    for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
        for name in ("pad_token_id", "eos_token_id"):
            token = getattr(config, name, None)
            token = token[0] if isinstance(token, list) and token else token
            if isinstance(token, int):
                return token
    return None
