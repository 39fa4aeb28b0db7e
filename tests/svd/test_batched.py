"""Many pairs at once give what each gives alone, and none waits for the host between passes."""

from __future__ import annotations

import copy

import pytest
import torch

from bkdfast.errors import InvalidArgumentError, NonFiniteError
from bkdfast.svd import batched, delta, delta_svd
from bkdfast.svd.batched import batched_triplets
from bkdfast.svd.krylov import leading_triplets
from bkdfast.svd.settings import Settings
from tests.svd.matrices import FP64, pair, sin_theta, with_spectrum

M, N, RANK = 300, 420, 6
SPECTRA = {
    "harmonic": torch.arange(1, M + 1, dtype=FP64) ** -0.5,
    "geometric": 10.0 ** (-torch.arange(M, dtype=FP64) / 8),
    "flat": torch.ones(M, dtype=FP64),
    "low rank": torch.cat((torch.linspace(2, 1, 4, dtype=FP64), torch.zeros(M - 4, dtype=FP64))),
    "rank just above": torch.cat((0.9 ** torch.arange(10, dtype=FP64), torch.zeros(M - 10, dtype=FP64))),
    "zero": torch.zeros(M, dtype=FP64),
    "tiny": 1e-20 * 0.7 ** torch.arange(M, dtype=FP64),
    "plateau": torch.cat((torch.full((3,), 2.0, dtype=FP64), torch.linspace(0.5, 0, M - 3, dtype=FP64))),
}


def made(dtypes, kinds=SPECTRA):
    pairs = [pair(with_spectrum(M, N, SPECTRA[kind], seed=i), dtypes) for i, kind in enumerate(kinds)]
    return [p[0] for p in pairs], [p[1] for p in pairs], [p[2] for p in pairs]


def run(w0, w1, **options):
    options = {"rank": RANK, "seeds": range(len(w0)), "ignore_below": [0.0] * len(w0), **options}
    return batched_triplets(w0, w1, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_as_alone(dtype):
    w0, w1, deltas = made((dtype, dtype))
    for i, found in enumerate(run(w0, w1)):
        alone = leading_triplets(w0[i], w1[i], rank=RANK, seed=i)
        assert (found.changed, found.converged) == (alone.changed, alone.converged)
        assert found.passes in (alone.passes, max(alone.passes, 3)), "the first look is after three"
        assert found.frobenius == pytest.approx(alone.frobenius, rel=1e-12)
        assert found.u.dtype == alone.u.dtype
        torch.testing.assert_close(found.s, alone.s, rtol=1e-6, atol=0)
        u, v = found.u.double(), found.v.double()
        true = torch.linalg.vector_norm(deltas[i].T @ u - found.s * v, dim=0)
        rounded = 4 * torch.finfo(found.u.dtype).eps * found.frobenius  # u and v are
        assert (true <= found.residual + rounded).all()
        assert ((found.angles.subspace <= 1e-4) == (alone.angles.subspace <= 1e-4)).all()
        u, _, vt = torch.linalg.svd(deltas[i], full_matrices=False)
        for k, bound in zip(found.angles.dimension.tolist(), found.angles.subspace.tolist(), strict=True):
            if k and k <= len(found.s):
                assert sin_theta(u[:, :k], found.u[:, :k]) <= bound * k**0.5 + 1e-13
                assert sin_theta(vt[:k].T, found.v[:, :k]) <= bound * k**0.5 + 1e-13


def test_a_pair_that_needs_more_passes_goes_on_without_the_others(monkeypatch):
    widths = []
    original = batched._Batch.step
    monkeypatch.setattr(batched._Batch, "step", lambda self: widths.append(len(self.members)) or original(self))
    w0, w1, _ = made((torch.float32, torch.float32), ["geometric", "harmonic", "geometric"])
    found = run(w0, w1)
    assert widths[:3] == [3, 3, 3] and widths[3:] and set(widths[3:]) == {1}
    assert [one.passes for one in found] == [3, len(widths), 3]


def test_stops_at_max_passes():
    w0, w1, _ = made((torch.float32, torch.float32), ["harmonic"] * 2)
    assert [(found.passes, found.converged) for found in run(w0, w1, max_passes=2)] == [(2, False)] * 2


def test_triplets_to_be_ignored_cost_no_pass():
    w0, w1, _ = made((torch.float32, torch.float32), ["harmonic"] * 2)
    first, second = run(w0, w1, ignore_below=[10.0, 0.0])
    assert first.passes < second.passes


def test_small_matrices_are_decomposed_directly():
    w0, w1 = [torch.zeros(20, 30)] * 2, [torch.randn(20, 30), torch.randn(20, 30)]
    for found, tuned in zip(run(w0, w1), w1, strict=True):
        torch.testing.assert_close(found.s, torch.linalg.svdvals(tuned.double())[:RANK])


def test_nothing():
    assert run([], []) == []


def test_refusals():
    w0, w1, _ = made((torch.float32, torch.float32), ["harmonic", "flat"])
    with pytest.raises(InvalidArgumentError, match="one shape"):
        run([w0[0], w0[1][:, 1:]], [w1[0], w1[1][:, 1:]])
    w1[1][3, 5] = float("nan")
    with pytest.raises(NonFiniteError):
        run(w0, w1)


def test_the_host_is_asked_nothing_between_passes(monkeypatch):
    """Every way from a tensor to the host, counted while blocks are made."""
    w0, w1, _ = made((torch.float32, torch.float32), ["harmonic", "geometric"])
    batch = batched._Batch(w0, w1, 16, range(2), "reference")

    def refuse(*args, **options):
        raise AssertionError("waits for the device")

    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    for _ in range(4):
        batch.step()
    monkeypatch.undo()
    assert batch.q.shape == (2, N, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_not_waited_for_between_passes():
    w0, w1, _ = made((torch.bfloat16, torch.bfloat16), ["harmonic", "geometric"])
    batch = batched._Batch([w.cuda() for w in w0], [w.cuda() for w in w1], 16, range(2), None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            batch.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.9}])
def test_delta_svd_takes_equal_weights_on_a_gpu_together(monkeypatch, tmp_path, rule):
    """On the CPU, which passes for a GPU here: in batches of at most three, whatever is finished already."""
    base = torch.nn.ModuleDict({f"{i}": torch.nn.Linear(300 + 50 * (i == 4), 320, bias=False) for i in range(6)})
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for i in (0, 1, 2, 4, 5):
            tuned[f"{i}"].weight += 0.1 * torch.randn(320, 3) @ torch.randn(3, base[f"{i}"].in_features)
    alone = delta_svd(base, tuned, progress=False, **rule)
    widths = []
    original = batched._Batch.step
    monkeypatch.setattr(batched._Batch, "step", lambda self: widths.append(len(self.members)) or original(self))
    monkeypatch.setattr(delta, "_on_gpu", lambda source, name: source.get(name).device)
    monkeypatch.setattr(Settings, "batch_work", lambda self, item: delta._BATCH_BYTES // 3)
    together = delta_svd(base, tuned, progress=False, out=tmp_path, **rule)
    assert max(widths) == 3 and list(together) == list(alone)
    for name, found in together.items():
        torch.testing.assert_close(found.s, alone[name].s)
        torch.testing.assert_close(found.u, alone[name].u, atol=1e-5, rtol=0)
        assert (found.note, found.changed, found.shape) == (alone[name].note, alone[name].changed, alone[name].shape)
    next(tmp_path.glob("unit-*1*")).unlink()
    again = delta_svd(base, tuned, progress=False, out=tmp_path, **rule)
    assert all(torch.equal(again[name].u, together[name].u) for name in again)
    with torch.no_grad():
        tuned["2"].weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"2\.weight has NaN or infinity in the tuned weights"):
        delta_svd(base, tuned, progress=False, **rule)
