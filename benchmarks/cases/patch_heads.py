"""`patch_heads` against assignment in place, and on a clone as hooks do it. Floor: the edited cells."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import bkdfast as bf
from benchmarks.case import Case, backends, compiled
from bkdfast.ops.patch_heads import _op

HEADS, HEAD_DIM, EDITS = 32, 128, 32


def cases(device: torch.device) -> Iterator[Case]:
    """32 edits of one token in prefills of two sizes (cost must not grow) and in a decode step; four kinds at once."""
    for batch, tokens in ((8, 512), (32, 512), (8, 1)):
        for dtype in (torch.float32, torch.bfloat16):
            yield _case(batch, tokens, dtype, device)
    for dtype in (torch.float32, torch.bfloat16):
        yield _mixed(8, 512, dtype, device)


def _mixed(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Zero, scale, add and patch spans of 16 tokens, one each in every row: what one table does in one call."""
    torch.manual_seed(0)
    start = torch.randn(batch, tokens, HEADS * HEAD_DIM, device=device).to(dtype)
    z, offset = start.clone(), torch.zeros(1, batch, dtype=torch.int32, device=device)
    source = torch.randn(2 * batch, HEAD_DIM, device=device)
    kinds = [(0.0, 0.0), (0.5, 0.0), (1.0, 2.0), (0.0, 1.0)]
    rows = [
        [i, 0, 20 * i + 100 * kind, 20 * i + 100 * kind + 16, 3 * kind, max(kind - 2, 0) * batch + i, 0]
        for kind in range(4)
        for i in range(batch)
    ]
    table = bf.EditTable.pack(rows, [kinds[n // batch] for n in range(4 * batch)], source, slices=HEADS)
    row = torch.arange(batch, device=device)[:, None].expand(batch, 16)
    token = [(20 * row + 100 * kind) + torch.arange(16, device=device) for kind in range(4)]
    added, patched = (part[:, None].expand(batch, 16, HEAD_DIM) for part in source.split(batch))
    double, value = (2.0 * added), patched.to(dtype)

    def in_place():
        heads = z.view(batch, tokens, HEADS, HEAD_DIM)
        heads[row, token[0], 0] = 0
        heads[row, token[1], 3] *= 0.5
        heads[row, token[2], 6] = (heads[row, token[2], 6] + double).to(dtype)
        heads[row, token[3], 9] = value
        return z

    def ours(backend):
        return lambda: bf.patch_heads(z, table, offset, backend=backend)

    def outputs(version):
        z.copy_(start)
        return (version(),)

    return Case(
        "patch_heads",
        f"[{batch}, {tokens}, {HEADS * HEAD_DIM}] {str(dtype)[6:]}, zero, scale, add and patch of 16 tokens a row",
        {backend: ours(backend) for backend in backends(_op, device)},
        {"in place, one statement each": in_place, "in place, compiled": compiled(in_place)},
        outputs,
        bytes=4.0 * batch * 16 * HEAD_DIM * 1.5 * dtype.itemsize,
    )


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

    def assign_in_place():
        z.view(batch, tokens, HEADS, HEAD_DIM)[index] = values
        return z

    def outputs(version):
        z.copy_(start)
        return (version(),)

    name = f"[{batch}, {tokens}, {HEADS * HEAD_DIM}] {str(dtype)[6:]}, {EDITS} edits of one token"
    plain = {
        "clone and assign": clone_and_assign,
        "clone and assign, compiled": compiled(clone_and_assign),
        "assign in place": assign_in_place,
    }
    moved = EDITS * HEAD_DIM * (4 + dtype.itemsize)
    versions = {backend: ours(backend) for backend in backends(_op, device)}
    goal = 20.0 if (batch, tokens) == (8, 512) else None
    return Case("patch_heads", name, versions, plain, outputs, bytes=moved, goal=goal, rival="clone and assign")
