"""`delta_svd`: every weight of two models, from memory and from folders, and the saved result."""

import copy
import os
import warnings

import pytest
import torch
from safetensors.torch import save_file

from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, NonFiniteError
from bkdfast.svd import DeltaSVD, TensorDelta, delta_svd
from tests.svd.matrices import FP64, gpt2, llama, sin_theta, tune

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def run(base, tuned, **kwargs):
    return delta_svd(base, tuned, **{"rank": 4, "progress": False, **kwargs})


def same(a: DeltaSVD, b: DeltaSVD) -> bool:
    parts = ("u", "s", "v", "residual")
    return set(a) == set(b) and all(torch.equal(getattr(a[n], p), getattr(b[n], p)) for n in a for p in parts)


@pytest.fixture(scope="module")
def models():
    base = llama()
    return base, tune(base)


@pytest.fixture(scope="module")
def result(models):
    return run(*models)


def test_every_matrix_against_the_explicit_svd(models, result):
    before, after = models[0].state_dict(), models[1].state_dict()
    assert set(result) == {name for name, weight in before.items() if weight.dim() == 2}
    for name, delta in result.items():
        explicit = after[name].double() - before[name].double()
        u, s, vt = torch.linalg.svd(explicit, full_matrices=False)
        assert delta.name == name and delta.shape == tuple(explicit.shape)
        assert delta.changed == (explicit != 0).sum() and delta.converged
        torch.testing.assert_close(delta.s[:3], s[:3], rtol=1e-6, atol=0)
        assert sin_theta(u[:, :3], delta.u[:, :3]) < 1e-5 and sin_theta(vt[:3].T, delta.v[:, :3]) < 1e-5
        assert delta.energy == pytest.approx(1, abs=1e-6)  # a rank-3 change
        assert delta.frobenius == pytest.approx(explicit.norm().item(), rel=1e-6)


def test_skipped_and_unchanged_are_listed(models):
    base, tuned = models[0], copy.deepcopy(models[1])
    with torch.no_grad():
        tuned.model.layers[1].self_attn.o_proj.weight.copy_(base.model.layers[1].self_attn.o_proj.weight)
    got = run(base, tuned)
    assert got.skipped["model.norm.weight"] == "1-D" and "model.norm.weight" not in got
    assert got.unchanged == (O_PROJ,) and got[O_PROJ].rank == 0 and got[O_PROJ].energy == 0
    assert got[O_PROJ].u.shape == (48, 0) and not got["lm_head.weight"].unchanged
    assert "1 unchanged" in repr(got) and "largest delta" in repr(got)


def test_identical_models_are_all_unchanged(models):
    got = run(models[0], models[0])
    assert got.unchanged == tuple(got) and len(got) > 10


def test_large_matrices_take_the_krylov_path(tmp_path):
    base = torch.nn.Linear(600, 700, bias=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.weight += 0.1 * torch.randn(700, 5) @ torch.randn(5, 600)
    got = run(base, tuned, rank=5)["weight"]
    assert got.passes > 1 and got.converged
    u, s, _ = torch.linalg.svd(tuned.weight.detach().double() - base.weight.detach().double())
    assert sin_theta(u[:, :5], got.u) < 1e-5
    torch.testing.assert_close(got.s, s[:5], rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_models_and_differently_sharded_folders_agree(tied, tmp_path):
    base = llama(tied=tied)
    tuned = tune(base)
    base.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="70KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) != len(list((tmp_path / "tuned").glob("*.safetensors")))
    reference = run(base, tuned)
    for pair in (
        (tmp_path / "base", str(tmp_path / "tuned")),
        (base, tmp_path / "tuned"),
        (tmp_path / "base", tuned),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = run(*pair)
        assert same(got, reference) and not got.only_in_base and not got.only_in_tuned
        assert set(got.skipped) == set(reference.skipped)
    assert reference.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
    assert ("lm_head.weight" in reference) is not tied


def test_hash_of_what_was_read(models, tmp_path):
    models[0].save_pretrained(tmp_path / "base")
    name = "*.o_proj.weight"
    a, b = run(*models, include=name), run(tmp_path / "base", models[1], include=name)
    assert a.metadata["base_hash"] == b.metadata["base_hash"] != a.metadata["tuned_hash"]
    assert a.metadata["seed"] == 0 and "torch" in a.metadata["versions"]


def test_mixed_dtypes(models):
    base, tuned = models[0], copy.deepcopy(models[1]).to(torch.bfloat16)
    delta = run(base, tuned)[O_PROJ]
    explicit = tuned.state_dict()[O_PROJ].double() - base.state_dict()[O_PROJ].double()
    torch.testing.assert_close(delta.s, torch.linalg.svdvals(explicit)[:4], rtol=1e-6, atol=0)


def test_include_and_exclude(models):
    assert set(run(*models, include="*.o_proj.weight")) == {O_PROJ, O_PROJ.replace("1", "0")}
    both = run(*models, include=["*.o_proj.weight", "lm_head*"], exclude="model.layers.0.*")
    assert set(both) == {O_PROJ, "lm_head.weight"} and both.skipped == {}
    with pytest.raises(InvalidArgumentError, match=r"'\*\.O_proj\*' matches no tensor"):
        run(*models, include="*.O_proj*")
    with pytest.raises(InvalidTypeError, match="include"):
        run(*models, include=[3])


def test_rank_is_clipped_with_a_note(models):
    got = run(*models, rank=40, include="*k_proj.weight")["model.layers.0.self_attn.k_proj.weight"]
    assert got.shape == (24, 48) and "rank clipped to 24" in got.note


def test_numerical_rank_is_noted():
    base = torch.nn.Linear(30, 20, bias=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        base.weight.zero_()
        tuned.weight.copy_(torch.ones(20, 1) @ torch.ones(1, 30))
    got = run(base, tuned)["weight"]
    assert got.rank == 1 and got.note == "numerical rank 1" and got.s[0] == pytest.approx(600**0.5)


def test_conv1d_is_taken_as_stored():
    base = gpt2()
    got = run(base, tune(base))
    assert got["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    assert got.tied == {"lm_head.weight": "transformer.wte.weight"}


def test_published_gpt2_names_match_the_modules(tmp_path):
    base = gpt2()
    tuned = tune(base)
    state = {name: value.clone() for name, value in base.transformer.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(tmp_path, tuned)
    assert same(got, run(base, tuned)) and not got.only_in_base and not got.only_in_tuned
    assert got["transformer.h.0.mlp.c_fc.weight"].note.startswith("compared with h.0.mlp.c_fc.weight")


def test_only_on_one_side_is_listed_and_warned(tmp_path):
    save_file({"a": torch.ones(3, 3), "b": torch.ones(3, 3)}, tmp_path / "base.safetensors")
    save_file({"a": torch.eye(3), "c": torch.ones(3, 3)}, tmp_path / "tuned.safetensors")
    with pytest.warns(UserWarning) as caught:
        got = run(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert got.only_in_base == ("b",) and got.only_in_tuned == ("c",) and set(got) == {"a"}
    said = " | ".join(str(w.message) for w in caught)
    assert "base model only and not compared: b" in said and "tuned model only and not compared: c" in said
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", include="a").only_in_base == ()


def test_untied_head_is_compared_with_the_tied_one(tmp_path):
    base, tuned = llama(tied=True), llama(tied=False)
    tuned.load_state_dict(base.state_dict())
    with torch.no_grad():
        tuned.lm_head.weight[0, 0] += 1
    got = run(base, tuned)
    assert got["lm_head.weight"].changed == 1 and got["model.embed_tokens.weight"].unchanged and got.tied == {}


def test_nothing_in_common(models):
    with pytest.raises(CheckpointError, match="no tensor name is in both"):
        run(models[0], torch.nn.Linear(3, 3))


def test_shape_mismatch_names_both_shapes(models):
    with pytest.raises(CheckpointError, match=r"up_proj.*\(80, 48\).*\(96, 48\)"):
        run(models[0], llama(intermediate_size=96), include="*up_proj*")
    assert len(run(models[0], llama(intermediate_size=96), exclude="*.mlp.*")) == 10


@pytest.mark.parametrize("folders", [False, True])
def test_resized_vocabulary_is_compared_on_common_rows(models, tmp_path, folders):
    base, tuned = models[0], tune(models[0])
    tuned.resize_token_embeddings(72, mean_resizing=False)
    expected = tuned.lm_head.weight[:64] - base.lm_head.weight
    if folders:
        base.save_pretrained(tmp_path / "base")
        tuned.save_pretrained(tmp_path / "tuned")
        base, tuned = tmp_path / "base", tmp_path / "tuned"
    with pytest.warns(UserWarning, match="64 tokens in the base and 72 in the tuned.*lm_head.weight"):
        got = run(base, tuned)["lm_head.weight"]
    torch.testing.assert_close(got.s[0].float(), torch.linalg.matrix_norm(expected.detach(), 2))
    assert got.shape == (64, 48) and "64 common rows of 64 and 72" in got.note
    with pytest.warns(UserWarning, match="72 tokens in the base"):
        assert run(tuned, base)["lm_head.weight"].shape == (64, 48)


def test_rows_that_are_no_tokens_are_not_cut(tmp_path):
    for name, rows in (("base", 64), ("tuned", 72)):
        save_file({"w": torch.ones(rows, 3)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"\(64, 3\).*\(72, 3\)"):
        run(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")


def test_integer_matrices_are_skipped_with_the_reason(tmp_path):
    save_file({"a": torch.ones(3, 3), "q": torch.ones(3, 3).byte()}, tmp_path / "m.safetensors")
    got = run(tmp_path / "m.safetensors", tmp_path / "m.safetensors")
    assert set(got) == {"a"} and "uint8" in got.skipped["q"] and "dequantise" in got.skipped["q"]


@pytest.mark.parametrize("side", ["base", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_is_refused_by_name(models, side, value):
    base, tuned = (copy.deepcopy(model) for model in models)
    with torch.no_grad():
        (base if side == "base" else tuned).get_submodule(O_PROJ.removesuffix(".weight")).weight[1, 2] = value
    with pytest.raises(NonFiniteError, match=rf"{O_PROJ} has NaN or infinity in the {side} weights"):
        run(base, tuned)
    assert O_PROJ not in run(base, tuned, exclude=O_PROJ)


@pytest.mark.parametrize(
    "kwargs, error, says",
    [
        (dict(rank=0), InvalidArgumentError, "rank must be at least 1, found 0"),
        (dict(rank=2.0), InvalidTypeError, "rank must be an integer"),
        (dict(rank=True), InvalidTypeError, "rank must be an integer"),
        (dict(tolerance=0), InvalidArgumentError, "tolerance must be positive"),
        (dict(tolerance=float("nan")), InvalidArgumentError, "tolerance must be positive"),
        (dict(max_passes=1), InvalidArgumentError, "max_passes must be at least 2"),
        (dict(seed="x"), InvalidTypeError, "seed must be an integer"),
    ],
)
def test_bad_options(models, kwargs, error, says):
    with pytest.raises(error, match=says):
        run(*models, **kwargs)


def test_what_did_not_converge_is_warned_about():
    base, tuned = torch.nn.Linear(600, 700, bias=False), torch.nn.Linear(600, 700, bias=False)
    with pytest.warns(UserWarning, match=r"1 tensors did not reach tolerance=1e-05; .* in weight"):
        got = run(base, tuned, tolerance=1e-5, max_passes=3)
    assert not got["weight"].converged and got["weight"].passes == 3


def test_same_seed_same_bits_and_tensors_do_not_share_a_start():
    base = torch.nn.ModuleDict({name: torch.nn.Linear(600, 700, bias=False) for name in "ab"})
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        change = torch.randn(700, 40) @ torch.randn(40, 600)
        for name in "ab":
            base[name].weight.zero_()
            tuned[name].weight.copy_(change)
    a, b, c = run(base, tuned), run(base, tuned), run(base, tuned, seed=1)
    assert same(a, b) and not same(a, c)
    assert not torch.equal(a["a.weight"].u, a["b.weight"].u) and sin_theta(a["a.weight"].u, a["b.weight"].u) < 1e-3
    assert same(DeltaSVD({"a.weight": a["a.weight"]}), run(base, tuned, include="a.*"))


def test_progress_goes_to_stderr_or_nowhere(models, capsys):
    run(*models, include="lm_head*", progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "delta SVD" in err
    run(*models, include="lm_head*", progress=False)
    assert capsys.readouterr() == ("", "")


def test_to_pandas(result):
    pytest.importorskip("pandas")
    table = result.to_pandas()
    assert list(table.index) == list(result)
    row = table.loc[O_PROJ]
    assert (
        row["rows"] == 48
        and row["largest_s"] == result[O_PROJ].s[0]
        and row["changed_share"] == pytest.approx(1, abs=0.01)
    )
    assert DeltaSVD({}).to_pandas().empty


def test_save_and_load(models, result, tmp_path):
    with torch.no_grad():
        tuned = copy.deepcopy(models[1])
        tuned.lm_head.weight.copy_(models[0].lm_head.weight)
    got = run(models[0], tuned)
    got.save(tmp_path / "delta.safetensors")
    back = DeltaSVD.load(tmp_path / "delta.safetensors")
    assert same(got, back) and list(got) == list(back) and back.unchanged == ("lm_head.weight",)
    for name, delta in got.items():
        for part in ("shape", "frobenius", "changed", "passes", "converged", "note", "energy"):
            assert getattr(delta, part) == getattr(back[name], part)
    assert (back.skipped, back.tied, back.metadata) == (got.skipped, got.tied, got.metadata)
    assert os.listdir(tmp_path) == ["delta.safetensors"]


def entry(name="w"):
    one = torch.ones(1, dtype=FP64)
    bounds = dict(residual=0 * one, angle=0 * one, subspace=0 * one, dimension=one.long())
    return TensorDelta(
        name, (2, 3), torch.ones(2, 1), one, torch.ones(3, 1), **bounds, frobenius=1.0, changed=6, passes=2
    )


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    from bkdfast.svd import artifact

    path = tmp_path / "delta.safetensors"
    DeltaSVD({"old": entry("old")}).save(path)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(artifact, "save_file", half)
    with pytest.raises(OSError, match="disk full"):
        DeltaSVD({"new": entry("new")}).save(path)
    monkeypatch.undo()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("read-only")))
    with pytest.raises(OSError, match="read-only"):
        DeltaSVD({"new": entry("new")}).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]


def test_save_into_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        DeltaSVD({}).save(tmp_path / "none" / "delta.safetensors")


def test_damaged_files_are_refused(result, tmp_path):
    path = tmp_path / "delta.safetensors"
    result.save(path)
    whole = path.read_bytes()
    for damaged, says in (
        (whole[:-1], "not a complete safetensors file"),
        (whole[:100], "not a complete safetensors file"),
        (whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], "changed or damaged"),
        (whole.replace(b'\\"seed\\": 0', b'\\"seed\\": 1'), "changed or damaged"),
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=says):
            DeltaSVD.load(path)
    with pytest.raises(CheckpointError, match="no file"):
        DeltaSVD.load(tmp_path / "none")
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match="not one that bkdfast wrote"):
        DeltaSVD.load(path)
