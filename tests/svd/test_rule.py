"""How many triplets are kept: a number, a share of the energy or a threshold, on every way to decompose a delta."""

import copy
import warnings

import pytest
import torch

from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.svd import DeltaSVD, delta_plan, delta_svd, krylov
from bkdfast.svd.lora import LowRank, factor_product
from bkdfast.svd.plan import Item
from bkdfast.svd.rule import Rule
from bkdfast.svd.settings import Settings, Weights
from tests.svd.matrices import FP64, llama, pair, sin_theta, tune, with_spectrum

FALLING = 0.9 ** torch.arange(60, dtype=FP64)  # 90% of the energy in 11 values, 99.99% in 44; 22 are over 0.1 s_1


def counted(s, energy=None, tol=None):
    shares = s.square().cumsum(0) / s.square().sum()
    return int((s >= tol * s[0]).sum()) if tol else int((shares < energy).sum()) + 1


def by_pair(m, n):
    def decompose(s, rule, **options):
        w0, w1, exact = pair(with_spectrum(m, n, s))
        return Settings(rule, **options).factor(Weights("w", w0, w1)), exact

    return decompose


def by_lora(s, rule):
    u, vt = (torch.linalg.qr(torch.randn(side, len(s), dtype=FP64))[0] for side in (90, 80))
    product = LowRank(u * s, vt.T)
    return factor_product("w", product, rule), product.left @ product.right


WAYS = {"direct": by_pair(90, 80), "krylov": by_pair(600, 700), "lora": by_lora}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "rule", [{"energy": 0.9}, {"energy": 0.9999}, {"tol": 0.5}, {"tol": 0.1}, {"tol": 0.03}], ids=str
)
def test_the_fewest_triplets_that_meet_the_rule(way, rule):
    found, exact = WAYS[way](FALLING, Rule(**rule))
    u, s, vt = torch.linalg.svd(exact, full_matrices=False)
    k = counted(s[:60], **rule)
    assert found.rank == k and found.note == "" and found.converged
    assert {part.shape[-1] for part in (found.u, found.v, found.residual, found.angle, found.dimension)} == {k}
    torch.testing.assert_close(found.s, s[:k], rtol=1e-5, atol=0)
    assert sin_theta(u[:, :k], found.u) < 1e-3 and sin_theta(vt[:k].T, found.v) < 1e-3
    assert found.frobenius == pytest.approx(exact.norm().item(), rel=1e-6)
    assert all(part.untyped_storage().nbytes() == part.nbytes for part in (found.u, found.v)), "the rest is let go"


@pytest.mark.parametrize("way", WAYS)
def test_at_the_cap(way):
    for rule, note in (
        (Rule(energy=0.99, max_rank=20), "max_rank 20 reached"),
        (Rule(tol=0.01, max_rank=20), "max_rank 20 reached"),
        (Rule(energy=0.9, max_rank=20), ""),
        (Rule(rank=30, max_rank=20), ""),
    ):
        found, _ = WAYS[way](FALLING, rule)
        assert found.rank == (20 if note or rule.rank else 11)
        assert found.note == note and rule.capped(found) is bool(note)


def test_a_threshold_right_behind_the_cap():
    """22 values are above it: only the factors of a LoRA show the one that is not."""
    for way, note in (("lora", ""), ("krylov", "max_rank 22 reached")):
        found, _ = WAYS[way](FALLING, Rule(tol=0.1, max_rank=22))
        assert (found.rank, found.note) == (22, note)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rule", [{"energy": 1.0}, {"energy": 1}, {"tol": 0.01}], ids=str)
def test_at_the_numerical_rank(way, rule):
    found, _ = WAYS[way](torch.tensor([3.0, 2.0, 1.0], dtype=FP64), Rule(**rule))
    assert found.rank == 3 and found.note == ("" if way == "lora" else "numerical rank 3")
    assert found.energy == pytest.approx(1, abs=1e-8)


def test_the_numerical_rank_is_noted_where_it_decides():
    w1 = torch.ones(30, 40)
    assert Settings(Rule(energy=1.0)).factor(Weights("w", torch.zeros(30, 40), w1)).note == "numerical rank 1"
    w1[0] = 2.0  # [2, 1, 1, ...] in every column: still one direction
    w1[:, 0] = torch.arange(30)
    whole = Settings(Rule(tol=1e-6)).factor(Weights("w", torch.zeros(30, 40), w1))
    assert (whole.rank, whole.note) == (2, "numerical rank 2")
    part = Settings(Rule(tol=0.9)).factor(Weights("w", torch.zeros(30, 40), w1))
    assert (part.rank, part.note) == (1, "")


def test_all_of_a_small_matrix_is_no_cap():
    w1 = torch.randn(20, 30)
    found = Settings(Rule(energy=1.0, max_rank=20)).factor(Weights("w", torch.zeros(20, 30), w1))
    assert found.rank == 20 and found.note == ""
    assert (
        Settings(Rule(energy=1.0, max_rank=19)).factor(Weights("w", torch.zeros(20, 30), w1)).note
        == "max_rank 19 reached"
    )


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"tol": 0.1}, {"rank": 2}], ids=str)
def test_of_no_change_nothing_is_kept(rule, same):
    w = torch.randn(30, 20)
    found = Settings(Rule(**rule, max_rank=2)).factor(Weights("w", w, w.clone(), same=same))
    assert found.unchanged and found.rank == 0 and found.note == ""


def test_passes_are_those_of_all_ranks(monkeypatch):
    reads, inner = [], krylov.delta_sketch
    monkeypatch.setattr(krylov, "delta_sketch", lambda w0, w1, x, **kw: (reads.append(1), inner(w0, w1, x, **kw))[1])
    few, _ = WAYS["krylov"](FALLING, Rule(energy=0.9))
    assert few.passes == len(reads) > 1
    many, _ = WAYS["krylov"](FALLING, Rule(energy=0.9999))  # 44, after 16 and 32
    assert many.passes == len(reads) - few.passes > 2 * few.passes
    reads.clear()
    direct, _ = WAYS["direct"](FALLING, Rule(energy=0.9999))
    assert direct.passes == len(reads) == 1, "a direct decomposition has them all at once"


def test_ranks_double_up_to_the_cap():
    assert Rule(energy=0.9).ranks(4000, 5000) == [16, 32, 64, 128]
    assert Rule(tol=0.1, max_rank=40).ranks(4000, 5000) == [16, 32, 40]
    assert Rule(energy=0.9, max_rank=8).ranks(4000, 5000) == [8] and Rule(rank=100).ranks(4000, 5000) == [100]
    assert Rule(energy=0.9).ranks(300, 5000) == [16, 32, 128], "64 columns would be decomposed directly"
    assert Rule(energy=0.9).ranks(200, 5000) == [128] and Rule(energy=0.9).ranks(5000, 50) == [50]


@pytest.mark.parametrize("shape", [(4000, 5000), (300, 300), (200, 5000), (30, 40)], ids=str)
def test_memory_is_planned_for_the_largest_of_all_ranks(shape):
    item = Item("w", "w", "w", 0, None, False, shape, (0, 0))
    rule = Rule(energy=0.9, max_rank=100)
    work, held = Settings(rule).work(item)
    each = [Settings(Rule(rank)).work(item) for rank in rule.ranks(*shape)]
    assert work == max(extra for extra, _ in each) and held == each[-1][1]
    if shape == (300, 300):
        assert work > each[-1][0], "Krylov blocks of rank 32 take more than the direct decomposition at the cap"


def test_plans_are_at_the_cap():
    base = llama()
    plans = [delta_plan(base, base, **rule) for rule in ({"rank": 12}, {"energy": 0.9, "max_rank": 12}, {"tol": 0.9})]
    assert plans[0].peak_memory == plans[1].peak_memory < plans[2].peak_memory
    assert delta_plan(base, base).peak_memory == delta_plan(base, base, rank=20).peak_memory


def test_kept_triplets_have_converged_though_weaker_ones_have_not():
    """Two strong directions over noise, which 4 passes do not resolve."""
    torch.manual_seed(0)
    w1 = (with_spectrum(600, 700, [40.0, 30.0]) + 0.05 * torch.randn(600, 700, dtype=FP64)).float()
    settings = {"max_passes": 4, "tolerance": 1e-4}
    whole = Settings(Rule(16), **settings).factor(Weights("w", torch.zeros(600, 700), w1))
    assert not whole.converged
    kept = Settings(Rule(tol=0.5), **settings).factor(Weights("w", torch.zeros(600, 700), w1))
    assert kept.converged and kept.rank == 2 and kept.passes == whole.passes
    assert torch.equal(kept.u, whole.u[:, :2]) and torch.equal(kept.subspace, whole.subspace[:2])
    some = Settings(Rule(energy=0.1, max_rank=16), **settings).factor(Weights("w", torch.zeros(600, 700), w1))
    assert some.converged is bool((some.residual <= 1e-4 * some.s).all())


def test_models(tmp_path):
    base = llama()
    tuned = tune(base, rank=6)
    with torch.no_grad():
        tuned.lm_head.weight.copy_(base.lm_head.weight)
    got = delta_svd(base, tuned, energy=0.8, progress=False)
    for name, delta in got.items():
        if name != "lm_head.weight":
            explicit = tuned.state_dict()[name].double() - base.state_dict()[name].double()
            assert delta.rank == counted(torch.linalg.svdvals(explicit), energy=0.8) and delta.energy >= 0.8
    assert got.unchanged == ("lm_head.weight",) and got["lm_head.weight"].rank == 0
    assert len({delta.rank for delta in got.values()}) > 2
    told = {"rank": None, "energy": 0.8, "tol": None, "max_rank": 128}
    got.save(tmp_path / "x.safetensors")
    assert told.items() <= DeltaSVD.load(tmp_path / "x.safetensors").metadata.items()
    plain = delta_svd(base, tuned, rank=5, progress=False)
    assert {"rank": 5, "energy": None, "tol": None, "max_rank": None}.items() <= plain.metadata.items()


def test_the_cap_is_warned_about():
    base = llama()
    tuned = tune(base, rank=6)
    with pytest.warns(UserWarning, match=r"16 tensors reached the cap .* \(energy=0.99, max_rank=2\); the worst, m"):
        got = delta_svd(base, tuned, energy=0.99, max_rank=2, progress=False)
    assert {delta.note for delta in got.values()} == {"max_rank 2 reached"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta_svd(base, tuned, energy=0.99, progress=False)
        delta_svd(base, tuned, rank=4, max_rank=2, progress=False)


def test_adapters():
    peft = pytest.importorskip("peft")
    base = llama()
    wrapped = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    )
    name = "model.layers.1.self_attn.o_proj.weight"

    def run(**rule):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return delta_svd(base, wrapped, include=name, progress=False, **rule)[name]

    s = run(rank=4).s
    for rule in ({"energy": 0.7}, {"energy": 0.95}, {"tol": 0.7}):
        found = run(**rule)
        assert found.rank == counted(s, **rule) and torch.equal(found.s, s[: found.rank])
        assert found.note == "LoRA of rank 4" and found.passes == 0
    assert run(energy=0.95, max_rank=1).note == "LoRA of rank 4; max_rank 1 reached"


def test_limits():
    assert (Rule(rank=3).limit, Rule(rank=8, max_rank=4).limit, Rule(energy=0.5).limit) == (3, 4, 128)
    assert Rule(tol=0.5, max_rank=300).limit == 300
    assert str(Rule(tol=0.5)) == "tol=0.5, max_rank=128" and str(Rule(8, max_rank=4)) == "rank=4"


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        ({"rank": 2, "energy": 0.5}, InvalidArgumentError, "give one of rank, energy and tol, found rank and energy"),
        ({"energy": 0.5, "tol": 0.5}, InvalidArgumentError, "found energy and tol"),
        ({"rank": 0}, InvalidArgumentError, "rank must be at least 1, found 0"),
        ({"rank": 2.0}, InvalidTypeError, "rank must be an integer, found 2.0"),
        ({"energy": -0.1}, InvalidArgumentError, "energy must be above 0 and at most 1, found -0.1"),
        ({"energy": 0}, InvalidArgumentError, "energy must be above 0"),
        ({"energy": 1.001}, InvalidArgumentError, "energy must be above 0 and at most 1, found 1.001"),
        ({"energy": float("nan")}, InvalidArgumentError, "energy must be above 0"),
        ({"energy": "0.9"}, InvalidTypeError, "energy must be a number, found '0.9'"),
        ({"tol": True}, InvalidTypeError, "tol must be a number, found True"),
        ({"tol": 1.5}, InvalidArgumentError, "tol must be above 0 and at most 1, found 1.5"),
        ({"tol": 0.1, "max_rank": 0}, InvalidArgumentError, "max_rank must be at least 1, found 0"),
        ({"tol": 0.1, "max_rank": 2.5}, InvalidTypeError, "max_rank must be an integer"),
    ],
)
@pytest.mark.parametrize("call", [delta_svd, delta_plan])
def test_bad_rules_are_refused_before_anything_is_read(call, rule, error, message):
    with pytest.raises(error, match=message):
        call("nowhere", "nowhere", **rule)


def test_no_rule():
    with pytest.raises(InvalidArgumentError, match="found none"):
        Rule(max_rank=4)
