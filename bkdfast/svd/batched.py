"""`leading_triplets` of many pairs of one shape at once, for a GPU, where one pair's small algebra is all launches.

Every step is one launch for the whole batch (`delta_sketch`: one for each pair, none of which is waited for). Between
passes the host is not asked anything: blocks keep their width and are orthonormalised by shifted CholeskyQR3 (Fukaya et
al. 2020, SIAM J. Sci. Comput. 42(1)), whose success is checked later. After `_FIRST` passes, and then after each, what
the host needs of all pairs comes over in one piece: matrices of the size of the Krylov space. It judges them as
`bkdfast.svd.krylov` does, and the pairs that need more passes go on.

A pair for which that is not good enough goes to `leading_triplets`: a delta that is zero, not finite, of extreme size
or of low rank, or residuals that only a realignment brings down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bkdfast.errors import InvalidArgumentError
from bkdfast.ops.delta_sketch import delta_sketch, sketch_dtype
from bkdfast.svd.certificate import angles
from bkdfast.svd.krylov import (
    FLOOR,
    HUGE,
    SIGNAL,
    TINY,
    Triplets,
    block_width,
    dense,
    leading_triplets,
    norm_by_gram,
    promising,
    signed,
    space_limits,
)
from bkdfast.svd.numerics import full_precision, svd, threads

_FIRST = 3  # passes before the host looks; fewer are enough for hardly any delta
_SKEWED = 16.0  # times the rounding of Q's entries: what is not orthonormal to that has broken down


def batched_triplets(
    w0: Sequence[Tensor],
    w1: Sequence[Tensor],
    *,
    rank: int,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    seeds: Sequence[int],
    ignore_below: Sequence[float],
    backend: str | None = None,
) -> list[Triplets]:
    """The `rank` leading singular triplets of each `w1[i] - w0[i]`, as `leading_triplets` gives them, up to rounding.

    Args:
        w0: B base weights `[m, n]`, on one device.
        w1: B tuned weights `[m, n]`, on that device.
        rank: number of triplets, at most min(m, n).
        tolerance: as of `leading_triplets`.
        max_passes: reads of both matrices of a pair at most. Three are made before the first look.
        seeds: of the B random start blocks.
        ignore_below: for each pair, triplets of smaller singular values cost no pass.
        backend: of `delta_sketch`.

    Returns:
        The triplets of each pair, on the CPU. Peak device memory beside the weights is about
        `40 * passes * width * (m + n)` bytes a pair.

    Raises:
        InvalidArgumentError: shapes, dtypes or devices differ between pairs.
        NonFiniteError: a delta has NaN or infinity.
    """
    if not w0:
        return []
    if len({(tuple(w.shape), w.dtype, w.device) for w in w0}) > 1 or len({(w.shape, w.dtype) for w in w1}) > 1:
        raise InvalidArgumentError("the pairs of a batch must have one shape, one dtype on each side and one device")

    def alone(i: int) -> Triplets:
        return leading_triplets(
            w0[i],
            w1[i],
            rank=rank,
            tolerance=tolerance,
            max_passes=max_passes,
            seed=seeds[i],
            ignore_below=ignore_below[i],
            backend=backend,
        )

    m, n = w0[0].shape
    if len(w0) == 1 or dense(m, n, rank):
        return [alone(i) for i in range(len(w0))]
    found: dict[int, Triplets] = {}
    with full_precision(), threads(1), torch.no_grad():
        batch = _Batch(w0, w1, block_width(rank), seeds, backend)
        while batch.members:
            batch.step()
            if batch.passes < min(_FIRST, max_passes):
                continue
            spent, more, done = batch.passes >= max_passes, [], []
            views = [view.judge(rank, tolerance, ignore_below[view.pair], spent) for view in batch.views()]
            for place, view in enumerate(views):
                if view.verdict == "done":
                    done.append(place)
                elif view.verdict == "more":
                    more.append(place)
            found |= batch.triplets(done, [views[place] for place in done])
            batch.keep(more)
    return [found[i] if i in found else alone(i) for i in range(len(w0))]


@dataclass(frozen=True)
class _View:
    """What the host sees of one pair: float64 on the CPU, N columns of the space, w of a block."""

    pair: int
    passes: int
    dtype: torch.dtype
    r: Tensor  # [N, N], D Q = P R
    inside: Tensor  # Q^T Z [N, N]
    outside: Tensor  # Gram matrix of Z - Q Q^T Z [N, N]
    start: Tensor  # [w, w]
    size: Tensor  # norms of the columns of D Q [N]
    frobenius: float
    changed: int
    skewed: float  # how far Q and P are from orthonormal
    verdict: str = ""  # "done", "more", "alone"
    left: Tensor | None = None  # [N, k]: U = P left
    right: Tensor | None = None  # [N, k]: V = Q right
    triplets: Triplets | None = None  # but for u and v

    def judge(self, rank: int, tolerance: float, ignore_below: float, spent: bool) -> _View:
        """Whether this pair is done, after as many passes as it has had."""
        eps, width = torch.finfo(self.dtype).eps, len(self.start)
        if not TINY < self.frobenius < HUGE or not self.skewed <= max(_SKEWED * eps, 1e-12):
            return replace(self, verdict="alone")
        floor = FLOOR * eps * self.frobenius
        left, ritz, right = svd(self.r)
        k = min(rank, int((ritz > floor).sum()))
        if k < rank:
            return replace(self, verdict="alone")
        s, w = ritz[:k], right[:, :k]
        inside = torch.linalg.vector_norm(self.inside @ w - w * s.square(), dim=0)
        residual = torch.hypot(inside, norm_by_gram(self.outside, w)) / s
        uncertainty = floor * torch.linalg.vector_norm(self.size[:, None] * w, dim=0) / s
        failing = (residual > tolerance * s + floor) & (s > ignore_below)
        if bool(failing.any()) and not spent:
            realign = bool((residual <= uncertainty)[failing].all())
            return replace(self, verdict="alone" if realign else "more")
        newest = self.outside[-width:, -width:]
        exhausted = bool((newest.diagonal().sqrt() <= SIGNAL * floor * self.size[-width:]).all())
        blocks = [width] * self.passes
        limits = space_limits(self.r, blocks, None if exhausted else newest, self.start, self.size, floor, k)
        bounds = angles(ritz, residual + uncertainty, limits, floor, eps)
        wanted = int((s > ignore_below).sum())
        more = not spent and not exhausted and promising(bounds, ritz, wanted, len(limits), tolerance, floor)
        none = torch.empty(0)
        return replace(
            self,
            verdict="more" if more else "done",
            left=left[:, :k],
            right=w,
            triplets=Triplets(
                none, s, none, residual + uncertainty, self.frobenius, self.changed, self.passes,
                not bool(failing.any()), bounds,
            ),
        )  # fmt: skip


class _Batch:
    """The Krylov spaces of B pairs: Q, Z = D^T D Q and D Q = P R, float64 on the pairs' device."""

    def __init__(
        self, w0: Sequence[Tensor], w1: Sequence[Tensor], width: int, seeds: Sequence[int], backend: str | None
    ) -> None:
        self.w0, self.w1, self.width, self.backend = w0, w1, width, backend
        self.members, self.passes = list(range(len(w0))), 0
        (m, n), device = w0[0].shape, w0[0].device
        self.dtype = sketch_dtype(w0[0], w1[0])
        # Of a CPU generator, as in `leading_triplets`.
        gaussian = [torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x, self.start = _cholesky_qr(torch.stack(gaussian).to(device, torch.float64))
        self.x = x.to(self.dtype)  # [B, n, w]
        empty = torch.empty(len(w0), 0, 0, dtype=torch.float64, device=device)
        self.r, self.size = empty, empty.new_empty(len(w0), 0)
        self.q, self.z, self.p = (empty.new_empty(len(w0), side, 0) for side in (n, n, m))
        self.frobenius, self.changed = empty.new_empty(len(w0)), empty.new_empty(len(w0))

    def step(self) -> None:
        """The next block of every pair, and a pass over it; nothing waits for the device."""
        if self.passes:
            self.x = self._next_block()
        sketches = [
            delta_sketch(self.w0[pair], self.w1[pair], x, backend=self.backend)
            for pair, x in zip(self.members, self.x, strict=True)
        ]
        y = torch.stack([sketch.y for sketch in sketches]).double()
        z = torch.stack([sketch.z for sketch in sketches]).double()
        if self.passes == 0:
            self.frobenius = torch.stack([sketch.frobenius_sq for sketch in sketches]).sqrt()
            self.changed = torch.stack([sketch.changed for sketch in sketches])
        rest, coefficients = _project_out(y, self.p)
        p, r = _cholesky_qr(rest)
        below = r.new_zeros(len(r), self.width, self.r.shape[2])
        self.r = torch.cat((torch.cat((self.r, coefficients), 2), torch.cat((below, r), 2)), 1)
        self.p = torch.cat((self.p, p), 2)
        self.q, self.z = torch.cat((self.q, self.x.double()), 2), torch.cat((self.z, z), 2)
        self.size = torch.cat((self.size, torch.linalg.vector_norm(y, dim=1)), 1)
        self.passes += 1

    def _next_block(self) -> Tensor:
        """An orthonormal basis of what the newest Z adds to Q, `[B, n, w]`."""
        newest = slice(-self.width, None)
        # In units of its own rounding, a weak column counts like a strong one.
        added, _ = _project_out(self.z[:, :, newest] / self.size[:, None, newest], self.q)
        block, _ = _cholesky_qr(added)
        block, _ = _cholesky_qr(_project_out(block, self.q)[0])
        return block.to(self.dtype)

    def views(self) -> list[_View]:
        """What the host needs of every pair: the only transfer."""
        inside = self.q.mT @ self.z
        beyond = self.z - self.q @ inside
        gaps = [
            (basis.mT @ basis - torch.eye(basis.shape[2], device=basis.device)).abs().amax((1, 2))
            for basis in (self.q, self.p)
        ]
        scalars = torch.stack((self.frobenius, self.changed.double(), torch.maximum(*gaps)), 1)
        parts = (self.r, inside, beyond.mT @ beyond, self.start, self.size, scalars)
        host = torch.cat([part.reshape(len(self.members), -1) for part in parts], 1).cpu()
        found = []
        for pair, row in zip(self.members, host, strict=True):
            pieces = row.split([part[0].numel() for part in parts])
            r, inside_, outside, start, size, told = (
                piece.view(part.shape[1:]) for piece, part in zip(pieces, parts, strict=True)
            )
            frobenius, changed, skewed = told.tolist()
            number = int(changed) if math.isfinite(frobenius) else 0
            found.append(
                _View(pair, self.passes, self.dtype, r, inside_, outside, start, size, frobenius, number, skewed)
            )
        return found

    def triplets(self, places: list[int], views: list[_View]) -> dict[int, Triplets]:
        """The singular vectors of some pairs, one transfer for all of them."""
        if not places:
            return {}
        at = torch.tensor(places, device=self.q.device)
        left = torch.stack([view.left for view in views if view.left is not None]).to(self.q.device)
        right = torch.stack([view.right for view in views if view.right is not None]).to(self.q.device)
        u, v = signed(self.p[at] @ left, self.q[at] @ right)
        u, v = u.to(self.dtype).cpu(), v.to(self.dtype).cpu()
        return {
            view.pair: replace(view.triplets, u=one, v=other)
            for view, one, other in zip(views, u, v, strict=True)
            if view.triplets is not None
        }

    def keep(self, places: list[int]) -> None:
        """Go on with some of the pairs."""
        self.members = [self.members[place] for place in places]
        at = torch.tensor(places, dtype=torch.int64, device=self.q.device)
        for name in ("x", "start", "q", "z", "p", "r", "size", "frobenius", "changed"):
            setattr(self, name, getattr(self, name)[at])


def _cholesky_qr(x: Tensor) -> tuple[Tensor, Tensor]:
    """Q and R of `[B, n, w]` without waiting for the device; where it breaks down, Q is not orthonormal or is NaN."""
    total = None
    for shift in (1e-13, 0.0, 0.0):
        size = torch.linalg.vector_norm(x, dim=1).clamp(min=torch.finfo(x.dtype).tiny)
        x = x / size[:, None]
        gram = x.mT @ x + shift * x.shape[2] * torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        upper = torch.linalg.cholesky_ex(gram, upper=True).L
        x = torch.linalg.solve_triangular(upper, x, upper=True, left=False)
        upper = upper * size[:, None]
        total = upper if total is None else upper @ total
    assert total is not None
    return x, total


def _project_out(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """`x - B B^T x` of `[..., n, w]`, twice (Gram-Schmidt is accurate then), and the coefficients."""
    first = basis.mT @ x
    x = x - basis @ first
    second = basis.mT @ x
    return x - basis @ second, first + second
