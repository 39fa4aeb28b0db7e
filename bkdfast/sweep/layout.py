"""How a batch lies in memory: rows shifted so that what is edited first stands in one column for all of them.

Then every row has the same columns before it (the shared prefix) and after it (the suffix that variants run), whatever
the prompts' lengths and the side they were padded on. Columns behind the last one that a metric reads are cut off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from bkdfast.hf.positions import prompt_ends
from bkdfast.sweep.metrics import Scored


@dataclass
class Layout:
    """A batch as it is run.

    Attributes:
        inputs: what the model is called with, `[B, T']` each; `attention_mask` always, `position_ids` where known.
        begin: `[B]` column of each row's first real token.
        last: position of each row's last prompt token, counted from its first real token.
        length: number of each row's tokens up to the last that is read.
        scored: each metric's own view of the batch, as `extend` returned it.
        reads: for each metric, `[B, n]` columns that it reads.
    """

    inputs: dict[str, torch.Tensor]
    begin: torch.Tensor
    last: list[int]
    length: list[int]
    scored: list[Scored]
    reads: list[torch.Tensor]
    _cells: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def rows(self) -> int:
        """B."""
        return len(self.begin)

    @property
    def width(self) -> int:
        """T'."""
        return self.inputs["input_ids"].shape[1]

    def column(self, position: Sequence[int], pick: Callable[[Iterable[int]], int] = min) -> int:
        """First (or another) column in which some row has its `position`, counted from its first real token."""
        return pick(int(begin) + place for begin, place in zip(self.begin.tolist(), position, strict=True))

    def cells(self, start: int, stop: int | None = None) -> torch.Tensor:
        """`[U, 2]` (row, column) pairs, each once, that some metric reads in columns [start, stop)."""
        key = start, stop or self.width
        if key not in self._cells:
            found = []
            for read, scored in zip(self.reads, self.scored, strict=True):
                row, j = ((read >= key[0]) & (read < key[1]) & (scored.weight > 0)).nonzero(as_tuple=True)
                found.append(torch.stack([row, read[row, j]], 1))
            self._cells[key] = torch.unique(torch.cat(found), dim=0)
        return self._cells[key]


def lay_out(scored: Sequence[Scored], last: Sequence[int], anchors: Sequence[int] | None, *, trim: bool) -> Layout:
    """Shift rows such that position `anchors[b]` of row b is in the same column for all (None: leave them), and trim.

    Args:
        scored: a completed batch (the same in all of them) with what each metric reads.
        last: position of each row's last prompt token.
        anchors: positions from each row's first real token; the model takes `position_ids`.
        trim: columns after the last one read may go.
    """
    batch = dict(scored[0].batch)
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    batch["attention_mask"] = mask
    begin, end = prompt_ends({"input_ids": ids, "attention_mask": mask})
    width = ids.shape[1]
    shift = torch.zeros_like(begin)
    if anchors is not None:
        column = begin + torch.tensor(anchors, device=begin.device)
        shift = (column - begin).max() - column  # the row that has most before its anchor begins in column 0
        width = int((end + shift).max()) + 1
    reads = [part.read + shift[:, None] for part in scored]
    if trim:
        used = [torch.where(part.weight > 0, read, -1).max() for part, read in zip(scored, reads, strict=True)]
        width = min(width, int(max(used)) + 1)
    if anchors is not None and "position_ids" not in batch:
        batch["position_ids"] = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if anchors is not None or width < ids.shape[1]:
        batch = {
            name: _shifted(value, shift, width)
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[:2] == ids.shape
            else value
            for name, value in batch.items()
        }
    begin = begin + shift
    length = (torch.minimum(end + shift, torch.tensor(width - 1, device=end.device)) - begin + 1).tolist()
    return Layout(batch, begin, list(last), length, list(scored), [read.clamp(0, width - 1) for read in reads])


def _shifted(value: torch.Tensor, shift: torch.Tensor, width: int) -> torch.Tensor:
    """Row b of the result is row b of `value [B, T, ...]`, `shift[b]` columns further right, zero where it had none."""
    source = torch.arange(width, device=value.device)[None] - shift[:, None]
    inside = (source >= 0) & (source < value.shape[1])
    index = source.clamp(0, value.shape[1] - 1)
    rows = torch.arange(len(value), device=value.device)[:, None]
    found = value[rows, index]
    return found * inside.view(*inside.shape, *[1] * (value.dim() - 2)).to(value.dtype)
