"""`delta_directions` against the explicit SVD of each projection's delta, and the artifact it makes."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import save_file

from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, NonFiniteError
from bkdfast.hf.spec import BlockSpec, ModelSpec
from bkdfast.svd import Directions, delta_directions, weights_hash
from bkdfast.svd.artifact import write_artifact
from tests.svd.matrices import gpt2, llama, sin_theta, tune

RANK = 3


def run(base, tuned, **kwargs):
    return delta_directions(base, tuned, **{"rank": RANK, "progress": False, **kwargs})


def projections(model, layer, family):
    """Weights of the two projections as [residual stream, inputs]."""
    if family == "gpt2":
        block = model.transformer.h[layer]
        return block.attn.c_proj.weight.T, block.mlp.c_proj.weight.T
    block = model.model.layers[layer]
    return block.self_attn.o_proj.weight, block.mlp.down_proj.weight


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def family(request):
    base = llama() if request.param == "llama" else gpt2()
    return request.param, base, tune(base)


@pytest.fixture(scope="module")
def models():
    base = llama()
    return base, tune(base)


def test_left_singular_vectors_of_each_projection(family):
    name, base, tuned = family
    got = run(base, tuned)
    width = base.config.hidden_size
    assert got.vectors.shape == (2, 2 * RANK, width) and got.vectors.dtype == torch.float32
    assert got.component == ("out_proj",) * RANK + ("down_proj",) * RANK and got.rank == RANK
    for layer in range(2):
        weights = zip(projections(base, layer, name), projections(tuned, layer, name), strict=True)
        for i, (before, after) in enumerate(weights):
            u, s, _ = torch.linalg.svd(after.detach().double() - before.detach().double())
            rows = slice(i * RANK, (i + 1) * RANK)
            vectors = got.vectors[layer, rows].double()
            assert sin_theta(u[:, :RANK], vectors.T) < 1e-5
            torch.testing.assert_close((vectors @ u[:, :RANK]).abs(), torch.eye(RANK).double(), atol=1e-4, rtol=0)
            torch.testing.assert_close(got.strength[layer, rows].double(), s[:RANK], rtol=1e-6, atol=0)


def test_folders_give_the_same_as_models(family, tmp_path):
    name, base, tuned = family
    base.save_pretrained(tmp_path / "base", max_shard_size="30KB")
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="50KB")
    want = run(base, tuned)
    for pair in ((tmp_path / "base", tmp_path / "tuned"), (base, tmp_path / "tuned"), (tmp_path / "base", tuned)):
        got = run(*pair)
        assert torch.equal(got.vectors, want.vectors) and torch.equal(got.strength, want.strength)
        assert got.metadata == want.metadata
    assert want.metadata["family"] == name


def test_hash_tells_the_tuned_model_from_others(family, tmp_path):
    _, base, tuned = family
    metadata = run(base, tuned).metadata
    tuned.save_pretrained(tmp_path)
    loaded = type(tuned).from_pretrained(tmp_path, dtype=torch.bfloat16)
    for same in (tuned, tmp_path, loaded):
        assert weights_hash(same, metadata["weights"]) == metadata["tuned_hash"]
    assert weights_hash(base, metadata["weights"]) != metadata["tuned_hash"]


def test_published_gpt2_names(tmp_path):
    base = gpt2()
    tuned = tune(base)
    for name, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        state = {key: value.clone() for key, value in model.transformer.state_dict().items()}
        save_file(state, tmp_path / name / "model.safetensors")
    got, want = run(tmp_path / "base", tmp_path / "tuned"), run(base, tuned)
    assert torch.equal(got.vectors, want.vectors) and got.metadata["tuned_hash"] == want.metadata["tuned_hash"]


def test_one_component(models):
    both, one = run(*models), run(*models, components=["down_proj"])
    assert one.vectors.shape == (2, RANK, 48) and one.component == ("down_proj",) * RANK
    assert torch.equal(one.vectors, both.vectors[:, RANK:])


def test_rows_beyond_the_delta_are_zero():
    base = llama()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        down = tuned.model.layers[1].mlp.down_proj.weight
        down += torch.ones(48, 1) @ torch.ones(1, 80)
    got = run(base, tuned)
    assert got.strength[0].eq(0).all() and got.vectors[0].eq(0).all()
    assert got.strength[1, :RANK].eq(0).all() and got.strength[1, RANK] == pytest.approx((48 * 80) ** 0.5, rel=1e-5)
    torch.testing.assert_close(got.vectors[1, RANK], torch.full((48,), 48**-0.5), atol=1e-6, rtol=0)
    assert "strongest 62 in block 1 down_proj" in repr(got) and "empty" in repr(got)


def test_rank_above_the_width(models):
    got = run(*models, rank=60)
    assert got.vectors.shape == (2, 120, 48) and (got.strength[:, 48:60] == 0).all()


class Toy(torch.nn.Module):
    def __init__(self, blocks=2, width=10):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"o": torch.nn.Linear(8, width), "down": torch.nn.Linear(12, width)})
            for _ in range(blocks)
        )


def toy_spec(blocks=2, width=10, experts=(), transposed=False):
    return ModelSpec(
        "toy",
        tuple(
            BlockSpec(f"blocks.{i}", f"blocks.{i}.o", None if i in experts else f"blocks.{i}.down", (), 2, 4, None)
            for i in range(blocks)
        ),
        width,
        transposed=transposed,
    )


def test_hand_written_spec(tmp_path):
    base, tuned = Toy(), Toy()
    got = run(base, tuned, spec=toy_spec())
    u, _, _ = torch.linalg.svd((tuned.blocks[1]["down"].weight - base.blocks[1]["down"].weight).detach().double())
    assert sin_theta(u[:, :RANK], got.vectors[1, RANK:].T) < 1e-5 and got.metadata["family"] == "toy"
    for name, model in (("base", base), ("tuned", tuned)):
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    folders = run(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", spec=toy_spec())
    assert torch.equal(folders.vectors, got.vectors)


def test_mixture_of_experts_is_said_aloud():
    with pytest.warns(UserWarning, match="no block has a single down_proj"):
        got = run(Toy(), Toy(), spec=toy_spec(experts=(0, 1)))
    assert got.component == ("out_proj",) * RANK and got.vectors.shape == (2, RANK, 10)
    with pytest.warns(UserWarning, match=r"blocks \[0\] do not have a single down_proj"):
        some = run(Toy(), Toy(), spec=toy_spec(experts=(0,)))
    assert some.vectors.shape == (2, 2 * RANK, 10)
    assert some.strength[0, RANK:].eq(0).all() and some.strength[1, RANK:].gt(0).all()
    with pytest.raises(InvalidArgumentError, match="no block of family 'toy' has a single down_proj"):
        run(Toy(), Toy(), spec=toy_spec(experts=(0, 1)), components=["down_proj"])


def test_shared_blocks_are_decomposed_once(monkeypatch):
    from bkdfast.svd import batched

    base, tuned = Toy(), Toy()
    for model in (base, tuned):
        model.blocks[1] = model.blocks[0]
    calls, inner = [], batched.leading_triplets
    monkeypatch.setattr(batched, "leading_triplets", lambda *a, **k: (calls.append(1), inner(*a, **k))[1])
    got = run(base, tuned, spec=toy_spec())
    assert len(calls) == 2 and torch.equal(got.vectors[0], got.vectors[1])


def test_wrong_spec_for_a_folder(tmp_path):
    save_file(Toy().state_dict(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"no tensor 'blocks\.2\.o\.weight'"):
        run(tmp_path / "m.safetensors", tmp_path / "m.safetensors", spec=toy_spec(blocks=3))
    with pytest.raises(InvalidArgumentError, match="writes 8 values, but the residual stream"):
        run(tmp_path / "m.safetensors", tmp_path / "m.safetensors", spec=toy_spec(transposed=True))
    with pytest.raises(CheckpointError, match=r"no config\.json.*spec="):
        run(tmp_path / "m.safetensors", tmp_path / "m.safetensors")


def test_identical_models_have_no_directions(models):
    tuned = copy.deepcopy(models[0])
    with torch.no_grad():
        tuned.lm_head.weight += 1  # a change elsewhere does not count
    with pytest.raises(InvalidArgumentError, match="identical in out_proj and down_proj of all 2 blocks"):
        run(models[0], tuned)


def test_bad_inputs(models):
    base, tuned = models
    broken = copy.deepcopy(tuned)
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight has NaN or infinity in the tuned"):
        run(base, broken)
    with pytest.raises(CheckpointError, match=r"\(48, 80\) in the base and \(48, 96\)"):
        run(base, llama(intermediate_size=96))
    with pytest.raises(CheckpointError, match="no tensor 'model.layers.2"):
        run(base, llama(num_hidden_layers=3))
    with pytest.raises(CheckpointError, match=r"has blocks that .* lacks, e.g. model.layers.2"):
        run(llama(num_hidden_layers=3), tuned)
    for components in ((), ("out_proj", "out_proj"), ("q_proj",)):
        with pytest.raises(InvalidArgumentError, match="components must be"):
            run(base, tuned, components=components)
    with pytest.raises(InvalidTypeError, match="components"):
        run(base, tuned, components="out_proj")
    with pytest.raises(InvalidArgumentError, match="rank must be"):
        run(base, tuned, rank=0)


def test_folder_structure_needs_no_weights(models, tmp_path, monkeypatch):
    """The model of a folder is built on the meta device only."""
    from transformers import LlamaForCausalLM

    for name, model in zip(("base", "tuned"), models, strict=True):
        model.save_pretrained(tmp_path / name)
    built, inner = [], LlamaForCausalLM.__init__
    monkeypatch.setattr(LlamaForCausalLM, "__init__", lambda self, config: (inner(self, config), built.append(self))[0])
    run(tmp_path / "base", tmp_path / "tuned")
    assert len(built) == 1 and all(p.is_meta for p in built[0].parameters())


def test_unknown_model_type_of_a_folder(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "abacus", "architectures": ["Abacus"]}))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        run(tmp_path, tmp_path)


def test_save_load_and_move(models, tmp_path):
    got = run(*models)
    got.save(tmp_path / "directions.safetensors")
    back = Directions.load(tmp_path / "directions.safetensors").to("cpu")
    assert torch.equal(back.vectors, got.vectors) and torch.equal(back.strength, got.strength)
    assert (back.component, back.rank, back.metadata) == (got.component, got.rank, got.metadata)
    assert repr(back) == repr(got) and "llama: 2 blocks x 6 directions of width 48" in repr(got)
    assert got.metadata["tuned_hash"][:12] in repr(got)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(models):
    want = run(*models)
    got = run(*models, device="cuda")
    assert got.vectors.device.type == "cpu"
    torch.testing.assert_close(got.strength, want.strength, rtol=1e-5, atol=0)
    moved = got.to("cuda")
    assert moved.vectors.is_cuda and moved.strength.is_cuda


def broken(**changes):
    parts = dict(vectors=torch.eye(4)[None, :2].clone(), strength=torch.ones(1, 2), component=("out_proj",) * 2, rank=2)
    return {**parts, **changes}


@pytest.mark.parametrize(
    "changes, says",
    [
        (dict(vectors=torch.eye(4)[:2]), r"\[L, K, D\]"),
        (dict(vectors=torch.eye(4)[None, :2].double()), "float32"),
        (dict(strength=torch.ones(1, 3)), "strength"),
        (dict(component=("out_proj",)), "component"),
        (dict(rank=1), "rank 1"),
        (dict(vectors=2 * torch.eye(4)[None, :2]), "unit vector"),
        (dict(vectors=torch.full((1, 2, 4), float("nan"))), "NaN"),
        (dict(strength=torch.full((1, 2), float("inf"))), "NaN or infinity"),
        (dict(strength=torch.tensor([[1.0, 0.0]])), "zeros of strength 0"),
        (dict(strength=torch.tensor([[1.0, -1.0]])), "positive strength"),
    ],
)
def test_invalid_directions_are_refused_here_and_on_load(changes, says, tmp_path):
    parts = broken(**changes)
    with pytest.raises(InvalidArgumentError, match=says):
        Directions(**parts)
    metadata = {"component": list(parts["component"]), "rank": parts["rank"], "metadata": {}}
    tensors = {"vectors": parts["vectors"], "strength": parts["strength"]}
    write_artifact(tmp_path / "d.safetensors", "directions", tensors, metadata)
    with pytest.raises(CheckpointError, match=says):
        Directions.load(tmp_path / "d.safetensors")


def test_damaged_or_foreign_artifacts(tmp_path):
    path = tmp_path / "d.safetensors"
    Directions(**broken()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        Directions.load(path)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed or damaged"):
        Directions.load(path)
    write_artifact(path, "delta_svd", {}, {})
    with pytest.raises(CheckpointError, match="holds a delta_svd, not a directions"):
        Directions.load(path)
    write_artifact(path, "directions", {}, {})
    with pytest.raises(CheckpointError, match="not a complete directions file"):
        Directions.load(path)


def test_no_warning_when_all_is_well(models):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(*models)
