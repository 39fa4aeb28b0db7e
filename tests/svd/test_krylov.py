"""`leading_triplets` against `torch.linalg.svd` of the explicit delta in float64."""

import pytest
import torch

from bkdfast.errors import NonFiniteError
from bkdfast.ops import tall_products
from bkdfast.svd import krylov
from bkdfast.svd.krylov import leading_triplets
from bkdfast.svd.numerics import from_squares, svd
from bkdfast.svd.tall import Tall
from tests.svd.matrices import FP64, pair, sin_theta, with_spectrum

BF16, FP32 = torch.bfloat16, torch.float32
ORACLE = 1e-14  # rounding of the float64 oracle itself
SHAPES = [(700, 500), (500, 700), (300, 1200)]


def powers(base, count):
    return base ** torch.arange(count, dtype=FP64)


def harmonic(count, power=-0.5):
    return torch.arange(1, count + 1, dtype=FP64) ** power


def check(w0, w1, delta, rank, **kwargs):
    """Every promise of the result that holds for any spectrum; returns the result and the true SVD."""
    got = leading_triplets(w0, w1, rank=rank, **kwargs)
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    k, eps = len(got.s), torch.finfo(got.u.dtype).eps
    norm = torch.linalg.matrix_norm(delta).item()
    assert got.frobenius == pytest.approx(norm, rel=1e-6)
    assert got.changed == (delta != 0).sum().item()
    assert got.u.shape == (delta.shape[0], k) and got.v.shape == (delta.shape[1], k) and got.residual.shape == (k,)
    assert (got.s[:-1] >= got.s[1:]).all() and (got.s > 0).all()
    eye = torch.eye(k, dtype=FP64)
    for side in (got.u, got.v):
        assert (side.double().T @ side.double() - eye).abs().max() < 8 * eps + ORACLE
        assert side.device.type == "cpu" and side.is_contiguous()
    left = torch.linalg.vector_norm(delta @ got.v.double() - got.s * got.u.double(), dim=0)
    right = torch.linalg.vector_norm(delta.T @ got.u.double() - got.s * got.v.double(), dim=0)
    assert (left <= (2 * eps + ORACLE) * norm).all(), "D v = s u holds by construction"
    assert (right <= got.residual + ORACLE * norm).all(), "the reported residual is an upper bound"
    assert (got.u.gather(0, got.u.abs().argmax(0, keepdim=True)) > 0).all()
    return got, (u[:, :k], s, vt[:k].T)


def check_converged(w0, w1, delta, rank, tolerance=1e-4, **kwargs):
    got, (u, s, v) = check(w0, w1, delta, rank, tolerance=tolerance, **kwargs)
    k, eps = len(got.s), torch.finfo(got.u.dtype).eps
    norm = torch.linalg.matrix_norm(delta).item()
    assert got.converged
    assert ((got.s - s[:k]).abs() <= 4 * tolerance**2 * s[:k] + (2 * eps + ORACLE) * norm).all()
    # Residuals over the gap bound the subspace: Stewart & Sun, theorem V.4.4 (with s_{k+1} = 0 when there is none).
    gap = (s[k - 1] - (s[k] if k < len(s) else 0)).item()
    bound = 2 * torch.linalg.vector_norm(got.residual).item() / gap
    assert sin_theta(u, got.u) <= bound and sin_theta(v, got.v) <= bound
    return got, max(sin_theta(u, got.u), sin_theta(v, got.v))


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32)], ids=["float32", "mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_easy_spectrum(shape, dtypes):
    got, angle = check_converged(*pair(with_spectrum(*shape, powers(0.7, min(shape))), dtypes), rank=8)
    assert len(got.s) == 8 and angle < 2e-5 and 2 <= got.passes <= 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [8, 20])
def test_hard_spectrum(shape, rank):
    got, angle = check_converged(*pair(with_spectrum(*shape, harmonic(min(shape)))), rank=rank)
    assert len(got.s) == rank and angle < 5e-4


def test_bfloat16_pair_finds_what_was_written_above_the_rounding():
    w0, w1, delta = pair(with_spectrum(700, 500, torch.linspace(2, 1, 8)), (BF16, BF16))
    got, angle = check_converged(w0, w1, delta, rank=8)
    assert len(got.s) == 8 and angle < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_exact_low_rank_is_cut_at_its_rank(shape):
    """Both factors are right, though v lags u by half a step."""
    delta = with_spectrum(*shape, torch.linspace(2, 1, 8))
    got, angle = check_converged(*pair(delta, scale=0.0), rank=20)
    assert len(got.s) == 8 and angle < 2e-6 and got.passes <= 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_graded_spectrum_below_what_the_first_residual_can_see(shape):
    """s_8 / s_1 = 3e-4: the residual from the stored Z is rounding there; only a re-aligned pass can tell."""
    delta = with_spectrum(*shape, 10.0 ** (-torch.arange(8, dtype=FP64) / 2))
    got, angle = check_converged(*pair(delta, scale=0.0), rank=8)
    assert len(got.s) == 8 and angle < 5e-4
    assert (got.residual <= 1e-4 * got.s + 8 * torch.finfo(FP32).eps * got.frobenius).all()


def test_graded_spectrum_needs_the_realigned_pass(monkeypatch):
    delta = with_spectrum(700, 500, 10.0 ** (-torch.arange(8, dtype=FP64) / 2))
    w0, w1, _ = pair(delta, scale=0.0)
    monkeypatch.setattr(krylov, "_realign", lambda *_: pytest.fail("re-aligned"))
    with pytest.raises(pytest.fail.Exception, match="re-aligned"):
        leading_triplets(w0, w1, rank=8)


def test_huge_dynamic_range():
    delta = with_spectrum(700, 500, 10.0 ** -torch.linspace(0, 30, 500, dtype=FP64))
    got, angle = check_converged(*pair(delta, scale=0.0), rank=20)
    assert len(got.s) == 20 and angle < 1e-4


@pytest.mark.parametrize("unit", [1e-25, 1e-15, 1e15, 1e25])
def test_any_unit(unit):
    """Z = D^T D X overflows or vanishes in float32 unless it is scaled."""
    delta = with_spectrum(700, 500, powers(0.7, 500)) * unit
    got, angle = check_converged(*pair(delta, scale=0.0), rank=8)
    assert len(got.s) == 8 and angle < 2e-5


def test_flat_spectrum_has_no_wrong_answer():
    got, _ = check(*pair(with_spectrum(700, 500, torch.ones(500))), rank=8)
    assert got.converged and torch.allclose(got.s, torch.ones(8, dtype=FP64), rtol=1e-5)


def test_dense_bulk_is_reported_as_not_converged():
    """A delta of noise has no gap at any rank: the residual says so, the singular values are good all the same."""
    got, (_, s, _) = check(*pair(1e-3 * torch.randn(700, 1200, dtype=FP64)), rank=20, max_passes=4)
    assert not got.converged and got.passes == 4
    assert (got.residual > 1e-3 * got.s).any()
    assert ((got.s - s[:20]).abs() < 0.05 * s[:20]).all()


def test_float64_weights_give_float64_accuracy():
    w0, w1, delta = pair(with_spectrum(700, 500, powers(0.7, 500)), (FP64, FP64))
    got, angle = check_converged(w0, w1, delta, rank=8, tolerance=1e-9)
    assert got.u.dtype == FP64 and angle < 1e-8


def test_one_float64_side_is_computed_in_float32():
    got, angle = check_converged(*pair(with_spectrum(700, 500, powers(0.7, 500)), (FP32, FP64)), rank=8)
    assert got.u.dtype == FP32 and angle < 2e-5


@pytest.mark.parametrize("shape", [(40, 30), (256, 2000), (2000, 3), (1, 500), (500, 1)], ids=str)
@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, BF16), (FP64, FP64)], ids=str)
def test_small_sides_are_dense_and_exact(shape, dtypes):
    rank = min(20, *shape)
    got, angle = check_converged(*pair(torch.randn(shape, dtype=FP64), dtypes), rank=rank)
    assert got.passes == 1 and len(got.s) == rank and angle < 1e-5


def test_rank_close_to_the_sides_is_dense():
    got, _ = check_converged(*pair(torch.randn(300, 300, dtype=FP64)), rank=300)
    assert got.passes == 1 and len(got.s) == 300


@pytest.mark.parametrize("shape", [(700, 500), (20, 30), (0, 30), (30, 0)], ids=str)
def test_zero_delta_takes_one_pass(shape):
    w = torch.randn(shape)
    got = leading_triplets(w, w.clone(), rank=4)
    assert got.passes == 1 and got.changed == 0 and got.frobenius == 0 and got.converged
    assert got.u.shape == (shape[0], 0) and got.v.shape == (shape[1], 0) and got.s.shape == got.residual.shape == (0,)


def test_one_changed_entry_of_a_large_matrix():
    w0 = torch.randn(700, 500)
    w1 = w0.clone()
    w1[123, 45] += 2
    got, angle = check_converged(w0, w1, w1.double() - w0.double(), rank=20)
    assert got.changed == 1 and len(got.s) == 1 and got.u[123, 0] == pytest.approx(1) and angle < 1e-6


@pytest.mark.parametrize("shape", [(700, 500), (20, 30)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_refused(shape, value):
    w0, w1 = torch.zeros(shape), torch.ones(shape)
    w1[3, 4] = value
    with pytest.raises(NonFiniteError):
        leading_triplets(w0, w1, rank=4)


def test_max_passes_is_kept():
    delta = with_spectrum(700, 500, harmonic(500))
    for passes in (2, 3):
        assert leading_triplets(*pair(delta)[:2], rank=8, max_passes=passes).passes == passes


def test_tolerance_buys_passes():
    w0, w1, _ = pair(with_spectrum(700, 500, harmonic(500)))
    loose = leading_triplets(w0, w1, rank=8, tolerance=1e-1)
    tight = leading_triplets(w0, w1, rank=8, tolerance=1e-5)
    assert loose.passes < tight.passes and loose.angles.subspace.max() > tight.angles.subspace.max()


def test_same_seed_same_bits_whatever_the_threads():
    """Of the kernels: sums of theirs do not depend on threads, and LAPACK runs on one.

    The vendor's matrix product does not promise it, so without them closeness is what is asked for.
    """
    w0, w1, _ = pair(with_spectrum(2000, 1500, harmonic(1500)))  # not so small that one thread does all of it
    before = torch.get_num_threads()
    try:
        runs = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            runs.append(leading_triplets(w0, w1, rank=60))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    kernels = tall_products.DOT.serving("cpu") == "cpp"
    for a, b in ((0, 1), (2, 3), *([(0, 2)] if kernels else [])):
        assert all(torch.equal(getattr(runs[a], part), getattr(runs[b], part)) for part in ("u", "s", "v", "residual"))
    torch.testing.assert_close(runs[0].u, runs[2].u, atol=1e-5, rtol=0)
    other = leading_triplets(w0, w1, rank=60, seed=1)
    assert not torch.equal(other.u, runs[0].u) and sin_theta(other.u, runs[0].u) < 1e-3


def test_reduced_matmul_precision_of_the_caller_is_suspended(monkeypatch):
    w0, w1, _ = pair(with_spectrum(700, 500, powers(0.7, 500)))
    seen, inner = [], krylov.delta_sketch
    record = lambda *args, **kwargs: (seen.append(torch.get_float32_matmul_precision()), inner(*args, **kwargs))[1]  # noqa: E731
    monkeypatch.setattr(krylov, "delta_sketch", record)
    torch.set_float32_matmul_precision("medium")
    try:
        leading_triplets(w0, w1, rank=8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {"highest"}


def test_transposed_views():
    w0, w1, delta = pair(with_spectrum(700, 500, powers(0.7, 500)))
    check_converged(w0.T, w1.T, delta.T, rank=8)


def test_next_block_is_orthogonal_to_the_basis_however_little_a_direction_adds():
    """Unmended, rounding of the strongest new direction would be a part of the weakest, and vectors come up twice."""
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(400, 16, dtype=FP64, generator=g))[0]
    y = torch.randn(500, 16, dtype=FP64, generator=g)
    sizes = 10.0 ** -torch.linspace(0, 13, 16, dtype=FP64)
    new = torch.linalg.qr(torch.randn(400, 16, dtype=FP64, generator=g))[0] * sizes
    z = q @ (y.T @ y) + new @ torch.randn(16, 16, dtype=FP64, generator=g)
    block = krylov._Basis(q.contiguous(), y, z, noise=1e-19, tall=Tall()).next_block()
    assert block.shape[1] == 16
    assert (q.T @ block).abs().max() < 1e-14
    assert (block.T @ block - torch.eye(16)).abs().max() < 1e-14


@pytest.mark.parametrize("unit", [1e-80, 1e80])
def test_any_unit_in_float64(unit):
    """Squares of singular values leave the range of float64, unless the delta is scaled throughout."""
    delta = with_spectrum(400, 300, powers(0.8, 300)) * unit
    found = leading_triplets(torch.zeros_like(delta), delta, rank=6)
    want = leading_triplets(torch.zeros_like(delta), delta / unit, rank=6)
    torch.testing.assert_close(found.s / unit, want.s)
    assert found.frobenius == pytest.approx(unit * want.frobenius)
    assert (found.residual / found.s).tolist() == pytest.approx((want.residual / want.s).tolist(), rel=1)
    assert found.angles.subspace.tolist() == pytest.approx(want.angles.subspace.tolist(), rel=1)


def test_lapack_gives_up_on_some_matrices(monkeypatch):
    """With repeated singular values; it then gets other forms of the same matrix."""
    torch.manual_seed(0)
    x, inner, calls = torch.randn(5, 7, dtype=FP64), torch.linalg.svd, []

    def fails(matrix, **options):
        calls.append(tuple(matrix.shape))
        if len(calls) < 3:
            raise torch.linalg.LinAlgError("failed to converge")
        return inner(matrix, **options)

    monkeypatch.setattr(torch.linalg, "svd", fails)
    u, s, v = svd(x)
    torch.testing.assert_close((u * s) @ v.T, x)
    assert calls == [(7, 5), (5, 7), (5, 5)]
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    with pytest.raises(torch.linalg.LinAlgError):
        svd(x)


def test_squares_serve_where_they_have_the_digits(monkeypatch):
    torch.manual_seed(0)
    x = torch.linalg.qr(torch.randn(9, 4, dtype=FP64))[0] * torch.tensor([1.0, 0.5, 2e-3, 1e-5], dtype=FP64)
    s, v = from_squares(x.T @ x, 3, 1e-3)
    torch.testing.assert_close(s[:3], torch.linalg.svdvals(x)[:3])
    torch.testing.assert_close(torch.linalg.vector_norm(x @ v, dim=0)[:3], s[:3])
    assert from_squares(x.T @ x, 4, 1e-3) is None  # the fourth is too weak
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: (_ for _ in ()).throw(torch.linalg.LinAlgError("no")))
    assert from_squares(x.T @ x, 3, 1e-3) is None


@pytest.mark.parametrize("shape", [(200, 900), (900, 200), (250, 250)], ids=str)
def test_small_sides_by_squares_and_by_svd(shape, monkeypatch):
    """Where squares serve, and where not: the same triplets."""
    w0, w1 = (weight.bfloat16() for weight in torch.randn(2, *shape))
    by_squares = leading_triplets(w0, w1, rank=5)
    monkeypatch.setattr(krylov, "from_squares", lambda *_: None)
    by_svd = leading_triplets(w0, w1, rank=5)
    torch.testing.assert_close(by_squares.s, by_svd.s)
    torch.testing.assert_close(by_squares.u, by_svd.u, atol=1e-5, rtol=0)
    torch.testing.assert_close(by_squares.v, by_svd.v, atol=1e-5, rtol=0)


def test_a_block_that_is_not_independent_becomes_orthonormal_all_the_same():
    torch.manual_seed(0)
    x = torch.randn(50, 3, dtype=FP64)
    x[:, 2] = x[:, 0] + 1e-12 * x[:, 2]
    q = Tall().orthonormal(x, x.T @ x)
    torch.testing.assert_close(q.T @ q, torch.eye(3, dtype=FP64))
