"""Leading singular triplets of D = W1 - W0 by block Krylov iteration over `delta_sketch`.

Each pass reads both matrices once and gives Y = D X and Z = D^T D X of one block X. With Q the orthonormal blocks so
far, Y = D Q and Z = D^T D Q, Rayleigh-Ritz on the right takes the SVD Y = U S W^T and V = Q W. Then D v = s u by
construction, and the other residual needs no further read:

    D^T u - s v = (Z w - s^2 Q w) / s

The next block is the part of the newest Z that Q does not span yet. Column j of the stored Z is rounded by about
eps ||D||_F |y_j|, so the residual of triplet i is uncertain by eps ||D||_F |(|y_j| w_ji)_j| / s_i, which is s_1 / s_i
times more than it need be where every column holds a part of the first triplet. Once only that uncertainty is left, one
pass on the Ritz vectors themselves (`_realign`) brings it down to eps ||D||_F, the floor of any method in this
precision.

Matrices with a small side are decomposed directly, in float64, by way of their Gram matrix where it has the digits.

Sources: Halko, Martinsson & Tropp 2011 (SIAM Review 53(2)) for the random start block and oversampling; Musco & Musco
2015 (NeurIPS) for block Krylov.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bkdfast.errors import NonFiniteError
from bkdfast.ops.delta_sketch import DeltaSketch, delta_sketch, sketch_dtype
from bkdfast.svd.certificate import Angles, angles, upper_limits
from bkdfast.svd.numerics import from_squares, full_precision, svd, threads
from bkdfast.svd.tall import Tall

DENSE_SIDE = 256
_OVERSAMPLING = 8
_WIDTH = 16
# Rounding of a column of D X in units of eps ||D||_F: at most 1 in float32 trials of 300 to 4096 columns, doubled.
FLOOR = 2.0
# Directions of the next block with less than this many times the rounding of Z are rounding.
SIGNAL = 4.0
# Residuals are far from converged with so many times their uncertainty to spare: what blocks left out as rounding adds.
_FAR = 2 * SIGNAL
# Share of the first singular value above which squares have all the digits of float32.
_STRONG = 1e-3
# Degree of the certificate's polynomials in an invariant space: higher ones gain little, and lose to rounding.
_DEGREE = 8
# A gap between squared singular values, relative to the larger one, that is worth further passes to certify.
_GAP = 0.05
TINY, HUGE = 1e-12, 1e12  # Frobenius norms that need no scale
_CHECKED = 1 << 22  # elements whose finiteness is checked at a time


@dataclass(frozen=True)
class Triplets:
    """Leading singular triplets of one delta; tensors are on the CPU.

    Attributes:
        u: left singular vectors `[m, k]`, float32 (float64 when both weights are).
        s: singular values `[k]`, float64, descending.
        v: right singular vectors `[n, k]`, u's dtype.
        residual: `||D^T u - s v||` of each triplet `[k]`, float64, rounding included: an upper bound, in units of s.
        frobenius: `||D||_F`.
        changed: number of entries that differ.
        passes: how often both matrices were read.
        converged: every residual is below `tolerance * s` or at the rounding floor, but for what was to be ignored.
        angles: bounds on the vectors' angles, `bkdfast.svd.certificate`.
    """

    u: Tensor
    s: Tensor
    v: Tensor
    residual: Tensor
    frobenius: float
    changed: int
    passes: int
    converged: bool
    angles: Angles


def leading_triplets(
    w0: Tensor,
    w1: Tensor,
    *,
    rank: int,
    tolerance: float = 1e-4,
    max_passes: int = 12,
    seed: int = 0,
    ignore_below: float = 0.0,
    backend: str | None = None,
) -> Triplets:
    """The `rank` leading singular triplets of `w1 - w0`, fewer where the delta's numerical rank is lower.

    Args:
        w0: base weights `[m, n]`, on w1's device.
        w1: tuned weights `[m, n]`.
        rank: number of triplets, at most min(m, n).
        tolerance: stop when every `||D^T u - s v|| <= tolerance * s` (dimensionless); less than the rounding floor
            `2 eps ||D||_F` is not asked for.
        max_passes: reads of both matrices at most.
        seed: of the random start block.
        ignore_below: triplets of smaller singular values are returned as they are found; no pass is spent on them.
        backend: of `delta_sketch`.

    Returns:
        The triplets, each with the sign that makes the largest entry of u positive. Peak memory beside the weights is
        about `8 * passes * width * (m + 2 n)` bytes, with `width` = rank plus oversampling, padded to 16.

    Raises:
        NonFiniteError: the delta has NaN or infinity.
    """
    width, callers = block_width(rank), torch.get_num_threads()
    with full_precision(), threads(1), torch.no_grad():
        if dense(w0.shape[0], w0.shape[1], rank):
            return _dense(w0, w1, rank, backend, callers)
        return _iterate(_Operator(w0, w1, backend, callers), rank, width, tolerance, max_passes, seed, ignore_below)


def unchanged(w: Tensor) -> Triplets:
    """The triplets of a zero delta, found without a pass: both weights are `w` `[m, n]`.

    Raises:
        NonFiniteError: it has NaN or infinity, so that the delta has NaN.
    """
    rows = max(1, _CHECKED // max(1, w.shape[1]))
    if not all(bool(torch.isfinite(part).all()) for part in w.split(rows)):
        raise NonFiniteError("the delta has NaN or infinity")
    return _nothing(w.shape[0], w.shape[1], sketch_dtype(w, w), changed=0, passes=0)


def dense(m: int, n: int, rank: int) -> bool:
    """Whether `leading_triplets` decomposes a matrix `[m, n]` directly."""
    return min(m, n) <= DENSE_SIDE or 4 * block_width(rank) > min(m, n)


def block_width(rank: int) -> int:
    """Columns of a block: rank plus oversampling, padded to 16 (narrow products are slower per column)."""
    return -(-(rank + _OVERSAMPLING) // _WIDTH) * _WIDTH


class _Operator:
    """`delta_sketch` of `scale` times the delta, a power of two that keeps squares in range; results in float64."""

    def __init__(self, w0: Tensor, w1: Tensor, backend: str | None, callers: int) -> None:
        self.w0, self.w1, self.backend, self.callers = w0, w1, backend, callers
        self.dtype = sketch_dtype(w0, w1)
        self.tall = Tall(callers, lapack=self.dtype == torch.float64 or w0.device.type != "cpu")
        self.scale = 1.0
        self.passes = 0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, DeltaSketch]:
        """What the sketch sees of x, orthonormal to its dtype's rounding only; y and z of that; what else it gives."""
        rounded = x.to(self.dtype)
        scaled = rounded if self.scale == 1 else rounded * self.scale
        with threads(self.callers):
            sketch = delta_sketch(self.w0, self.w1, scaled, backend=self.backend)
        self.passes += 1
        z = sketch.z.double()
        return rounded.double(), sketch.y.double(), z if self.scale == 1 else z.mul_(self.scale), sketch

    def first(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, float, int]:
        x, y, z, sketch = self(x)
        frobenius, changed = _norm_and_count(sketch)
        if frobenius > 0 and not TINY < frobenius < HUGE:
            self.scale = 2.0 ** -round(math.log2(frobenius))
            x, y, z, _ = self(x)
        return x, y, z, frobenius, changed


class _Basis:
    """Q, Z = D^T D Q and the left factorisation D Q = P R of the blocks so far, all float64; Q, Z and P in blocks.

    `noise` is the rounding of a column of D X; that of column j of Z is `noise * size[j]`, with `size` = |D q_j|.
    `start` `[w, w]` is the Gaussian start block in terms of the first one; None: it is not in this basis.
    """

    def __init__(self, q: Tensor, y: Tensor, z: Tensor, noise: float, tall: Tall, start: Tensor | None = None) -> None:
        self.noise, self.tall, self.start = noise, tall, start
        self.q, self.z = [q], [z]  # [n, w] each
        p, self.r = tall.qr(y)  # [N, N]
        self.p = [p]  # [m, w] each
        self.size = torch.linalg.vector_norm(self.r, dim=0)  # [N]
        self._rest: tuple[Tensor, Tensor, Tensor] | None = None

    def append(self, q: Tensor, y: Tensor, z: Tensor) -> None:
        # But for rounding y lies in the newest block of P and in the next; then once more, for all of P.
        newest = self.p[-1:]
        first = self.tall.dot(newest, y)
        y, products = self.tall.combine_and_dot(newest, first, y, self.p)
        coefficients = products[: len(self.r)]
        p, r = self.tall.qr(*self.tall.combine_and_dot(self.p, coefficients, y))
        coefficients[-len(first) :] += first
        below = self.r.new_zeros(r.shape[0], self.r.shape[1])
        new = torch.cat((coefficients, r))
        self.r = torch.cat((torch.cat((self.r, below)), new), 1)
        self.size = torch.cat((self.size, torch.linalg.vector_norm(new, dim=0)))
        self.q.append(q)
        self.z.append(z)
        self.p.append(p)
        self._rest = None

    def limits(self, k: int, *, invariant: bool = False) -> Tensor:
        """Upper bounds on the squared singular values, for k vectors; of the start block's basis only.

        `invariant`: what the newest Z adds to Q is only rounding.
        """
        assert self.start is not None
        outside = None if invariant else self.rest()[2]
        blocks = [block.shape[1] for block in self.q]
        return space_limits(self.r, blocks, outside, self.start, self.size, self.noise, max(k, 1))

    @property
    def single(self) -> bool:
        """One block only."""
        return len(self.q) == 1

    @property
    def room(self) -> int:
        """Columns that P may still get: its rows are no more."""
        return max(self.p[0].shape[0] - len(self.r), 0)

    def ritz(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U_R, s, W with R = U_R diag(s) W^T; of U_R, `rank` columns at least."""
        found = None if self.tall.lapack else from_squares(self.r.T @ self.r, rank, _STRONG)
        if found is None:
            return svd(self.r)
        s, w = found
        return self.r @ w[:, :rank] / s[:rank], s, w

    def residual(self, s: Tensor, w: Tensor) -> Tensor:
        """`||D^T u - s v||` of the given Ritz triplets, from the stored Z."""
        parts = self.tall.combine([*self.z, *self.q], torch.cat((w, -w * s.square())))
        return torch.linalg.vector_norm(parts, dim=0) / s

    def uncertainty(self, s: Tensor, w: Tensor) -> Tensor:
        """Of these residuals, by rounding."""
        return self.noise * torch.linalg.vector_norm(self.size[:, None] * w, dim=0) / s

    def beyond(self, s: Tensor, w: Tensor) -> Tensor:
        """The part of these residuals that the newest Z adds to Q: all of it, but for rounding."""
        gram = self.rest()[2]
        return norm_by_gram(gram, w[-len(gram) :]) / s

    def extend(self, operator: _Operator) -> bool:
        """A pass over the next block, unless that is only rounding."""
        x = self.next_block()
        if x.shape[1] == 0:
            return False
        self.append(*operator(x)[:3])
        return True

    def rest(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the newest Z adds to Q `[n, w]`, with some of its rounding along Q; Q^T of it; its Gram matrix."""
        if self._rest is None:
            inside = self.r.T @ self.r[:, -self.q[-1].shape[1] :]  # Q^T Z, but for rounding
            rest, products = self.tall.combine_and_dot(self.q, inside, self.z[-1], self.q)
            self._rest = rest, products[: len(self.r)], products[len(self.r) :]
        return self._rest

    def next_block(self) -> Tensor:
        """An orthonormal basis of what the newest Z adds to Q; without columns where that is only rounding."""
        rest, along, gram = self.rest()
        base, factor, r = self.tall.directions(rest, gram)
        if base is not rest:
            along = self.tall.dot(self.q, base)
        # In units of its own rounding, a weak column counts like a strong one.
        unit = (self.noise * self.size[-len(r) :]).clamp(min=torch.finfo(r.dtype).tiny)
        turn, signal, _ = svd(r / unit)
        factor = factor @ turn[:, : min(int((signal > SIGNAL).sum()), self.room)]
        # Normalising a weak direction magnifies what rounding of the strong ones left in it along Q. Without that it
        # is nearly orthonormal, and Cholesky makes it so.
        block, gram = self.tall.combine_and_dot([base, *self.q], torch.cat((factor, -along @ factor)))
        return self.tall.orthonormal(block, gram)


def _iterate(
    operator: _Operator, rank: int, width: int, tolerance: float, max_passes: int, seed: int, ignore_below: float
) -> Triplets:
    m, n = operator.w0.shape
    x, start = _start_block(n, width, seed, operator)
    x, y, z, frobenius, changed = operator.first(x)
    if frobenius == 0:
        return _nothing(m, n, operator.dtype, changed, operator.passes)
    scale = operator.scale
    eps = torch.finfo(operator.dtype).eps
    floor, ignore_below = FLOOR * eps * frobenius * scale, ignore_below * scale
    basis = _Basis(x, y, z, floor, operator.tall, start)
    limits = basis.r.new_full((1,), math.inf).cpu()
    while True:
        spent = operator.passes >= max_passes
        if operator.passes == 1 and not spent and basis.extend(operator):
            continue
        u, ritz, whole = basis.ritz(rank)
        k = min(rank, int((ritz > floor).sum()))
        s, w = ritz[:k], whole[:, :k]
        wanted, allowed, uncertainty = int((s > ignore_below).sum()), tolerance * s + floor, basis.uncertainty(s, w)
        if not spent and not basis.single:
            # While a residual is far too large, nobody asks for more than the next block.
            far = basis.beyond(s, w) > 2 * allowed + _FAR * uncertainty
            if bool(far[:wanted].any()) and basis.extend(operator):
                continue
        residual = basis.residual(s, w)
        failing = (residual > allowed)[:wanted]
        stuck = bool(failing.any())
        only_rounding = stuck and not basis.single and bool((residual <= uncertainty)[:wanted][failing].all())
        residual = residual + uncertainty
        if spent or not stuck:
            if basis.start is not None:
                limits = basis.limits(k)
            bounds = angles(ritz.cpu(), residual.cpu(), limits, floor, eps)
            hopeful = basis.start is not None and promising(bounds, ritz.cpu(), wanted, len(limits), tolerance, floor)
            if spent or (operator.passes > 1 and not hopeful):
                break
        if not only_rounding and basis.extend(operator):
            continue
        if stuck and not basis.single:
            if basis.start is not None:  # they are of D, and outlive the basis
                limits = basis.limits(k)
            basis = _realign(basis, whole[:, :width], operator)
        else:  # what is left is rounding
            stuck = basis.room == 0
            if basis.start is not None and not stuck:
                limits = basis.limits(k, invariant=True)
            bounds = angles(ritz.cpu(), residual.cpu(), limits, floor, eps)
            break
    left, right = operator.tall.combine(basis.p, u[:, :k]), operator.tall.combine(basis.q, w)
    return Triplets(
        *finish(left, s / scale, right, operator.dtype),
        residual=residual.cpu() / scale,
        frobenius=frobenius,
        changed=changed,
        passes=operator.passes,
        converged=not stuck,
        angles=bounds,
    )


def space_limits(
    r: Tensor, blocks: Sequence[int], outside: Tensor | None, start: Tensor, size: Tensor, noise: float, k: int
) -> Tensor:
    """Upper bounds on the squared singular values, from a Krylov space and its random start block.

    Rounding, and directions left out as rounding, keep `D^T D Q = Q T` + the rest of the newest block from holding; for
    a matrix within `slack` of D^T D it holds exactly, with a block tridiagonal T. The bounds are for that one, as if it
    did not depend on the start block: its singular vectors do where values are closer than `slack`, and there the
    probability is not proven.

    Args:
        r: R of `D Q = P R`, `[N, N]`.
        blocks: widths of the blocks of Q.
        outside: Gram matrix of what the newest Z adds to Q; None: only rounding. Q is an invariant space then, in which
            polynomials of any degree are known.
        start: the Gaussian start block in terms of the first block of Q, `[w, w]`.
        size: norms of the columns of `D Q`, `[N]`.
        noise: rounding of a column of D X.
        k: number of vectors that are asked for, at least 1.
    """
    slack = 2 * (SIGNAL + 1) * noise * float(torch.linalg.vector_norm(size))
    block = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks)).to(r.device)
    theta, w = torch.linalg.eigh((r.T @ r) * ((block[:, None] - block).abs() <= 1))
    theta, w = theta.flip(0).clamp(min=0), w.flip(1)
    rows = w[: len(start)].T @ start
    if outside is None:
        degree = max(len(blocks) - 1, _DEGREE)
        return upper_limits(theta, rows, torch.zeros_like(theta), degree, slack, k)
    missing = norm_by_gram(outside, w[-blocks[-1] :]) / theta.sqrt().clamp(min=slack)
    return upper_limits(theta, rows, missing, len(blocks) - 1, slack, k)


def norm_by_gram(gram: Tensor, w: Tensor) -> Tensor:
    """Norms of the columns of `A w`, at most, from `A^T A` `[N, N]` float64: with what cancels in it."""
    lost = torch.finfo(gram.dtype).eps * len(gram) * (gram.diagonal().sqrt() @ w.abs()).square()
    return ((w * (gram @ w)).sum(0).clamp(min=0) + lost).sqrt()


def promising(bounds: Angles, s: Tensor, wanted: int, reach: int, tolerance: float, floor: float) -> bool:
    """Another pass may bring some angle's bound below the tolerance: the gap that it needs is there."""
    for i in range(wanted):
        if min(float(bounds.vector[i]), float(bounds.subspace[i])) <= tolerance:
            continue
        squares = s.square()
        gaps = squares[i] - squares[i + 1 : reach]
        wide = gaps > max(_GAP * float(squares[i]), float(s[i]) * floor / tolerance)
        if bool(wide.any()):
            return True
    return False


def _realign(basis: _Basis, w: Tensor, operator: _Operator) -> _Basis:
    """A fresh basis of Ritz vectors `Q w`: one pass, and every column of Z has the size of its own triplet."""
    x, y, z, _ = operator(operator.tall.qr(operator.tall.combine(basis.q, w))[0])
    return _Basis(x, y, z, basis.noise, operator.tall)


def _dense(w0: Tensor, w1: Tensor, rank: int, backend: str | None, callers: int) -> Triplets:
    (m, n), dtype = w0.shape, sketch_dtype(w0, w1)
    frobenius, changed = _norm_and_count(delta_sketch(w0, w1, w0.new_empty((n, 0), dtype=dtype), backend=backend))
    if frobenius == 0:
        return _nothing(m, n, dtype, changed, passes=1)
    delta = w1.double() - w0.double()
    u, s, v = _decomposed(delta, rank, callers, exact=dtype == torch.float64 or delta.device.type != "cpu")
    values = s.cpu()
    k = min(rank, int((s > FLOOR * torch.finfo(dtype).eps * frobenius).sum()))
    u, s, v = u[:, :k], s[:k], v[:, :k]
    residual = torch.linalg.vector_norm(delta.T @ u - s * v, dim=0)
    rounding = FLOOR * torch.finfo(dtype).eps * frobenius  # of the returned u and v
    return Triplets(
        *finish(u, s, v, dtype),
        residual=(residual + rounding).cpu(),
        frobenius=frobenius,
        changed=changed,
        passes=1,
        converged=True,
        angles=angles(values, (residual + rounding).cpu(), known_limits(values), rounding, torch.finfo(dtype).eps),
    )


def _decomposed(delta: Tensor, rank: int, callers: int, *, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U, s, V of a matrix with a small side; of U and V, `rank` columns at least. `exact`: by an SVD."""
    if exact or min(delta.shape) > DENSE_SIDE:  # from there on, a Gram matrix takes more memory
        return svd(delta)
    upright, tall = delta.shape[0] > delta.shape[1], Tall(callers)
    x = (delta if upright else delta.T).contiguous()
    found = from_squares(tall.dot([x], x), rank, _STRONG)
    if found is None:
        return svd(delta)
    s, right = found[0], found[1][:, :rank]
    left = tall.combine([x], right / s[:rank])
    return (left, s, right) if upright else (right, s, left)


def known_limits(s: Tensor) -> Tensor:
    """What `upper_limits` bounds, where all singular values `[N]` are known: `[N + 1]`."""
    return torch.cat((s.new_full((1,), math.inf), s[1:].square(), s.new_zeros(1)))


def _norm_and_count(sketch: DeltaSketch) -> tuple[float, int]:
    squared = sketch.frobenius_sq.item()
    if not math.isfinite(squared):
        raise NonFiniteError("the delta has NaN or infinity")
    return math.sqrt(squared), int(sketch.changed.item())


def _nothing(m: int, n: int, dtype: torch.dtype, changed: int, passes: int) -> Triplets:
    empty = torch.empty(0, dtype=torch.float64)
    u, v = torch.empty(m, 0, dtype=dtype), torch.empty(n, 0, dtype=dtype)
    nothing = Angles(empty.clone(), empty.clone(), torch.empty(0, dtype=torch.int64))
    return Triplets(u, empty, v, empty.clone(), 0.0, changed, passes, True, nothing)


def finish(u: Tensor, s: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Fix the signs and round, on the CPU."""
    u, v = signed(u, v)
    return u.to("cpu", dtype).contiguous(), s.cpu(), v.to("cpu", dtype).contiguous()


def signed(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors `[..., m, k]` and `[..., n, k]` with the signs that make the largest |u_i| positive."""
    if u.shape[-1] == 0:
        return u, v
    sign = u.gather(-2, u.abs().argmax(-2, keepdim=True)).sign()  # [..., 1, k]
    return u * sign, v * sign


def _start_block(n: int, width: int, seed: int, operator: _Operator) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of a Gaussian block, and the block in terms of it."""
    # A CPU generator: the same block on every device.
    gaussian = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return operator.tall.qr(gaussian.to(operator.w0.device, torch.float64))
