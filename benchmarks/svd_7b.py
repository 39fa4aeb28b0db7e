"""Singular vectors of a 7B model's deltas on a GPU: `python -m benchmarks.svd_7b` (part of `bash benchmarks/gpu.sh`).

All o_proj and down_proj of Llama-2-7B's shape, a random bf16 pair made on the device: what was added to the base falls
off by a tenth over k singular values and is rounded like a stored model. k = 20 triplets of every weight, equal shapes
together, next to `torch.svd_lowrank` (with the delta formed, one weight after the other, as people write it) and, for
one weight of each shape, `torch.linalg.svd`; the rest of that one is reckoned. The true angle of a few weights is
checked before anything is timed. Writes benchmarks/results/svd-7b-<gpu>.json after every step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.run import RESULTS, machine, slug
from benchmarks.svd import Pair, angle
from benchmarks.sweep_7b import timed
from bkdfast.svd.batched import batched_triplets
from bkdfast.svd.krylov import Triplets

TOLERANCE = 1e-4
_ROUNDS = 5


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--mlp", type=int, default=11008)
    parser.add_argument("--rank", type=int, default=20)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    facts = machine(device)
    out = options.out or RESULTS / f"svd-7b-{slug(facts['name'])}.json"
    found: dict = {"machine": facts, "options": {k: str(v) for k, v in vars(options).items() if k != "out"}}

    def keep(**more: object) -> None:
        found.update(more)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(", ".join(f"{name} {value}" for name, value in more.items()))

    k = options.rank
    groups = [
        [weights(options.width, columns, k, seed, device) for seed in range(layer, 2 * options.layers, 2)]
        for layer, columns in enumerate((options.width, options.mlp))
    ]
    nbytes = sum(w0.nbytes + w1.nbytes for group in groups for w0, w1 in group)

    def ours() -> list[list[Triplets]]:
        return [
            batched_triplets(
                *zip(*group, strict=True), rank=k, tolerance=TOLERANCE, seeds=range(len(group)),
                ignore_below=[0.0] * len(group),
            )
            for group in groups
        ]  # fmt: skip

    def lowrank() -> list[list[tuple[Tensor, Tensor]]]:
        found = []
        for group in groups:
            found.append([])
            for w0, w1 in group:
                u, _, v = torch.svd_lowrank(w1.float() - w0.float(), q=2 * k, niter=2)
                found[-1].append((u[:, :k], v[:, :k]))
        return found

    mine, theirs = ours(), lowrank()  # warm
    true = [truth(*group[0], k) for group in groups]
    keep(
        true_angle=max(angle(pair, (made[0].u, made[0].v)) for pair, made in zip(true, mine, strict=True)),
        bound=max(float(one.angles.subspace.max()) for made in mine for one in made),
        lowrank_angle=max(
            angle(pair, (made[0][0].cpu(), made[0][1].cpu())) for pair, made in zip(true, theirs, strict=True)
        ),
    )
    if not found["true_angle"] <= found["bound"]:
        raise SystemExit("the true angle is above its bound: nothing is timed")
    passes = sum(one.passes * (w0.nbytes + w1.nbytes) for group, made in zip(groups, mine, strict=True)
                 for (w0, w1), one in zip(group, made, strict=True))  # fmt: skip
    seconds = statistics.median(timed(device, ours) for _ in range(_ROUNDS))
    buffer = torch.empty(min(nbytes, 1 << 30) // 4, device=device)
    copy = statistics.median(timed(device, lambda: buffer.clone()) for _ in range(_ROUNDS))
    rate = 2 * buffer.nbytes / copy
    keep(
        weights=sum(map(len, groups)), nbytes=nbytes, passes=sorted({one.passes for made in mine for one in made}),
        seconds=seconds, copy_bytes_per_second=rate, share_of_copy_rate=passes / seconds / rate,
    )  # fmt: skip
    if device.type == "cuda":
        keep(peak_bytes=torch.cuda.max_memory_allocated(device) - nbytes)
    other = statistics.median(timed(device, lowrank) for _ in range(3))
    keep(lowrank_seconds=other, speedup_over_lowrank=other / seconds)
    full = sum(len(group) * timed(device, lambda pair=group[0]: full_svd(*pair)) for group in groups)
    keep(full_svd_seconds=full, speedup_over_full_svd=full / seconds)


def weights(m: int, n: int, k: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A base and a tuned weight `[m, n]`, bf16."""
    generator = torch.Generator(device).manual_seed(seed)
    draw = dict(device=device, generator=generator)
    s = 2.0 * 10.0 ** (-torch.arange(3.0 * k, device=device) / k)
    u, v = (torch.linalg.qr(torch.randn(side, len(s), **draw))[0] for side in (m, n))
    w0 = (0.02 * torch.randn(m, n, **draw)).bfloat16()
    return w0, (w0.float() + (u * s) @ v.T).bfloat16()


def full_svd(w0: Tensor, w1: Tensor) -> None:
    """What a script without this library does."""
    torch.linalg.svd(w1.float() - w0.float(), full_matrices=False)


def truth(w0: Tensor, w1: Tensor, k: int) -> Pair:
    """The leading singular vectors, from the Gram matrix in float64."""
    delta = w1.double() - w0.double()
    values, vectors = torch.linalg.eigh(delta @ delta.T)
    left = vectors[:, -k:].flip(1)
    return Pair(w0, w1, left.cpu(), (delta.T @ left / values[-k:].flip(0).sqrt()).cpu())


if __name__ == "__main__":
    main()
