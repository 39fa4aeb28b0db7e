"""Small `DeltaSVD` made of numbers, without a model."""

import torch

from bkdfast.svd import DeltaSVD, TensorDelta


def basis(rows, columns, seed):
    """Orthonormal columns, uniformly random."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64)).Q


def tensor_delta(name, rows, columns, rank, seed, scale=1.0, rest=0.5, **fields):
    """A delta of falling singular values, with a share of its energy in what the triplets leave."""
    k = rank
    s = scale * torch.arange(1, k + 1, dtype=torch.float64) ** -0.7
    fields = {
        "residual": 1e-6 * s,
        "angle": torch.full((k,), 2e-4, dtype=torch.float64),
        "subspace": torch.full((k,), 1e-5, dtype=torch.float64),
        "dimension": torch.arange(1, k + 1),
        "frobenius": float((s.square().sum() * (1 + rest)).sqrt()),
        "changed": rows * columns // 2 if k else 0,
        "passes": 3,
        **fields,
    }
    return TensorDelta(name, (rows, columns), basis(rows, k, seed), s, basis(columns, k, seed + 500), **fields)


LLAMA = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48),
}  # fmt: skip


def make_result(layers=4, rank=4, projections=LLAMA, template="model.layers.{}.{}.weight", extra=(), **fields):
    """A result over a model's projections, named in the order of a checkpoint: sorted as text."""
    named = [(template.format(i, p), shape) for i in range(layers) for p, shape in projections.items()]
    named += [(name, (40, 32)) for name in extra]
    deltas = {
        name: tensor_delta(name, *shape, rank, seed, scale=0.3 + seed % 11 / 10, **fields)
        for seed, (name, shape) in enumerate(sorted(named))
    }
    return DeltaSVD(deltas, metadata={"base": "base", "tuned": "tuned", "rank": rank, "tolerance": 1e-4, "seed": 0})
