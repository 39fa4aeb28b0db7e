"""`Tap`: the in-graph part of the monitor. Each block's output goes through one op that updates fixed accumulators.

A request is a row of a prefill call and keeps its slot through the decode steps that follow. Slots are given out by
tensor operations at the start of each call, so nothing depends on Python once the model is compiled or captured.
"""

from __future__ import annotations

import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.hf.positions import Call, real_tokens
from bkdfast.hf.prepare import Prepared
from bkdfast.hf.spec import submodule
from bkdfast.monitor.ranges import Observations
from bkdfast.ops.cosine_monitor import cosine_monitor

PROMPT, GENERATED = 0, 1


class Tap:
    """Accumulators of one monitor on one model.

    Args:
        state: the prepared model.
        directions: `[L, K, D]` float32.
        slots: requests that can be open or uncollected at a time; older ones are overwritten.
        rows: largest batch.
        tokens: most tokens in one call; eager calls beyond it make room, a compiled model is traced again.
    """

    def __init__(
        self, state: Prepared, directions: torch.Tensor, *, slots: int = 1024, rows: int = 64, tokens: int = 8192
    ) -> None:
        model = state.model()
        assert model is not None
        layers, count, _ = directions.shape
        self.state, self.slots = state, slots
        self.pad_token_id = state.pad_token_id
        self.directions = directions.to(state.device)
        device = state.device
        # Prompt tokens of slot s go to segment s, generated ones to segment slots + s.
        self.low = torch.full((layers, 2 * slots, count), torch.inf, device=device)
        self.high = torch.full((layers, 2 * slots, count), -torch.inf, device=device)
        self.nonfinite = torch.zeros(layers, 2 * slots, dtype=torch.int32, device=device)
        self.seen = torch.zeros(2 * slots, dtype=torch.int64, device=device)
        self.started = torch.zeros((), dtype=torch.int64, device=device)
        self.slot = torch.zeros(rows, dtype=torch.int32, device=device)
        self.segment = torch.full((tokens,), -1, dtype=torch.int32, device=device)
        self.collected = 0
        state.observers.append(self._begin)
        self._handles = [
            submodule(model, block.block).register_forward_hook(self._observe(layer))
            for layer, block in enumerate(state.spec.blocks)
        ]

    def _begin(self, call: Call) -> None:
        rows, width = call.tokens.shape[:2]
        if not torch.compiler.is_compiling():
            if rows > self.slots:
                raise InvalidArgumentError(f"a batch of {rows} rows needs a monitor with at least as many slots")
            self._reserve(rows, rows * width)
        prefill = torch.as_tensor(call.past == 0, device=self.slot.device)
        new = ((self.started + torch.arange(rows, device=self.slot.device)) % self.slots).int()
        slot = torch.where(prefill, new, self.slot[:rows])
        self.slot[:rows] = slot
        self.started += rows * prefill

        both = torch.cat([slot, slot + self.slots]).long()
        for held, empty in ((self.low, torch.inf), (self.high, -torch.inf), (self.nonfinite, 0)):
            kept = held[:, both]
            held[:, both] = torch.where(prefill, torch.full_like(kept, empty), kept)
        self.seen[both] = torch.where(prefill, torch.zeros_like(both), self.seen[both])

        valid = torch.where(prefill, self._prompt(call), self._generated(call))
        segment = torch.where(prefill, slot, slot + self.slots)[:, None].expand(rows, width)
        self.segment[: rows * width] = segment.where(valid, -1).flatten()
        self.seen.scatter_add_(0, segment.flatten().long(), valid.flatten().long())

    @staticmethod
    def _prompt(call: Call) -> torch.Tensor:
        rows, width = call.tokens.shape[:2]
        return real_tokens(call.mask, rows, width, call.tokens.device)

    def _generated(self, call: Call) -> torch.Tensor:
        """Decode steps: `generate` feeds padding to rows that have finished."""
        rows, width = call.tokens.shape[:2]
        if call.tokens.dim() == 2 and self.pad_token_id is not None:
            return call.tokens != self.pad_token_id
        return torch.ones(rows, width, dtype=torch.bool, device=call.tokens.device)

    def _observe(self, layer: int):
        def hook(module: torch.nn.Module, args: tuple, output) -> None:
            stream = output[0] if isinstance(output, tuple) else output
            tokens = stream.reshape(-1, stream.shape[-1])
            cosine_monitor(
                tokens,
                self.directions[layer],
                self.segment[: tokens.shape[0]],
                self.low[layer],
                self.high[layer],
                self.nonfinite[layer],
            )

        return hook

    def _reserve(self, rows: int, tokens: int) -> None:
        if rows > len(self.slot):
            grown = self.slot.new_zeros(max(rows, 2 * len(self.slot)))
            grown[: len(self.slot)] = self.slot
            self.slot = grown
        if tokens > len(self.segment):
            self.segment = self.segment.new_full((max(tokens, 2 * len(self.segment)),), -1)

    def collect(self) -> Observations:
        """Take out the requests that began since the last collection; waits for the device."""
        started = int(self.started)
        lost = max(started - self.collected - self.slots, 0)
        first = self.collected + lost
        index = torch.arange(first, started, device=self.slot.device) % self.slots
        both = torch.stack([index, index + self.slots], 1)  # [R, 2]
        self.collected = started
        return Observations(
            self.low[:, both].permute(1, 2, 0, 3).cpu(),
            self.high[:, both].permute(1, 2, 0, 3).cpu(),
            self.seen[both].cpu(),
            self.nonfinite[:, both].amax(0).long().cpu(),
            first,
            lost,
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._begin in self.state.observers:
            self.state.observers.remove(self._begin)
