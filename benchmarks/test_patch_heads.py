"""`patch_heads` and what one would write without it: clone the activations, assign the cells.

    python -m pytest benchmarks --benchmark-only

Results are compared before anything is timed. Floor: the edited cells, read and written once.
"""

from __future__ import annotations

import pytest
import torch

import bkdfast as bf

B, T, HEADS, HEAD_DIM, EDITS = 8, 512, 32, 128, 32


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def case(request):
    torch.manual_seed(0)
    z = torch.randn(B, T, HEADS * HEAD_DIM).to(request.param)
    source = torch.randn(EDITS, HEAD_DIM)
    cells = [(i % B, 15 * i % T, i % HEADS) for i in range(EDITS)]
    rows = [[row, 0, token, token + 1, head, i, 0] for i, (row, token, head) in enumerate(cells)]
    return z, source, cells, bf.EditTable.pack(rows, [[0.0, 1.0]] * EDITS, source, slices=HEADS)


def clone_and_assign(z, source, index):
    rows, tokens, heads = index
    out = z.clone().view(B, T, HEADS, HEAD_DIM)
    out[rows, tokens, heads] = source
    return out.view(B, T, -1)


def test_bkdfast(benchmark, case):
    z, source, cells, table = case
    offset = torch.zeros(1, B, dtype=torch.int32)
    index = tuple(torch.tensor(column) for column in zip(*cells, strict=True))
    assert torch.equal(bf.patch_heads(z.clone(), table, offset), clone_and_assign(z, source.to(z.dtype), index))
    benchmark(bf.patch_heads, z, table, offset)


def test_plain_pytorch(benchmark, case):
    z, source, cells, _ = case
    index = tuple(torch.tensor(column) for column in zip(*cells, strict=True))
    benchmark(clone_and_assign, z, source.to(z.dtype), index)
