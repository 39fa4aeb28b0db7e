"""`patch_heads` against clone and assignment. Floor: the edited cells, read (where kept) and written once."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import bkdfast as bf
from benchmarks.case import Case, backends, compiled
from bkdfast.ops.patch_heads import _op

HEADS, HEAD_DIM, EDITS = 32, 128, 32


def cases(device: torch.device) -> Iterator[Case]:
    """32 edits of one token each in prefills of two sizes (cost must not grow), and in a decode step."""
    for batch, tokens in ((8, 512), (32, 512), (8, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(batch, tokens, dtype, device)


def _case(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    torch.manual_seed(0)
    start = torch.randn(batch, tokens, HEADS * HEAD_DIM, device=device).to(dtype)
    z = start.clone()
    source = torch.randn(EDITS, HEAD_DIM, device=device)
    cells = [(i % batch, 15 * i % tokens, i % HEADS) for i in range(EDITS)]
    rows = [[row, 0, token, token + 1, head, i, 0] for i, (row, token, head) in enumerate(cells)]
    table = bf.EditTable.pack(rows, [[0.0, 1.0]] * EDITS, source, slices=HEADS)
    offset = torch.zeros(1, batch, dtype=torch.int32, device=device)
    index = tuple(torch.tensor(column, device=device) for column in zip(*cells, strict=True))
    values = source.to(dtype)

    def ours(backend):
        return lambda: bf.patch_heads(z, table, offset, backend=backend)

    def clone_and_assign():
        out = start.clone().view(batch, tokens, HEADS, HEAD_DIM)
        out[index] = values
        return out.view(batch, tokens, -1)

    def outputs(version):
        z.copy_(start)
        return (version(),)

    name = f"[{batch}, {tokens}, {HEADS * HEAD_DIM}] {str(dtype)[6:]}, {EDITS} edits of one token"
    plain = {"clone and assign": clone_and_assign, "clone and assign, compiled": compiled(clone_and_assign)}
    moved = EDITS * HEAD_DIM * (4 + dtype.itemsize)
    versions = {backend: ours(backend) for backend in backends(_op, device)}
    goal = 20.0 if (batch, tokens) == (8, 512) else None
    return Case("patch_heads", name, versions, plain, outputs, bytes=moved, goal=goal)
