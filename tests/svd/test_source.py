"""Modules and folders are one thing to the engine; what is wrong with a folder is said by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

from bkdfast.errors import CheckpointError, InvalidTypeError
from bkdfast.svd import weights_hash
from bkdfast.svd.names import match_names, tensor_digest
from bkdfast.svd.source import FolderSource, ModuleSource, open_source
from tests.svd.matrices import gpt2, llama


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture
def sharded(model, tmp_path):
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    return tmp_path / "sharded"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_folder_equals_module(model, sharded):
    assert len(shards(sharded)) > 2
    module, folder = open_source(model), open_source(str(sharded))
    assert set(module.names) == set(folder.names)
    for name in module.names:
        assert module.shape(name) == folder.shape(name) and module.dtype(name) == folder.dtype(name)
        assert torch.equal(module.get(name), folder.get(name)) and not module.get(name).requires_grad
    assert folder.config.hidden_size == 48 and module.config is model.config


def test_single_file_and_unindexed_files(model, tmp_path):
    model.save_pretrained(tmp_path / "one")
    by_file = FolderSource(tmp_path / "one" / "model.safetensors")
    assert by_file.names == FolderSource(tmp_path / "one").names and by_file.config.hidden_size == 48
    (tmp_path / "two").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "two" / "x.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "two" / "y.safetensors")
    two = FolderSource(tmp_path / "two")
    assert two.names == ("a", "b") and two.shape("b") == (3,) and two.config is None


def test_tensors_are_read_one_at_a_time(sharded, monkeypatch):
    from bkdfast.svd.reader import TensorFile

    source, read, inner = FolderSource(sharded), [], TensorFile._fill
    monkeypatch.setattr(
        TensorFile, "_fill", lambda self, name, view, at: (read.append(len(view)), inner(self, name, view, at))[1]
    )
    source.get("model.norm.weight")
    source.get("lm_head.weight", 3, 5)
    assert read == [48 * 4, 2 * 48 * 4]


def test_tied_names_have_one_canonical_name():
    source = ModuleSource(llama(tied=True))
    assert source.canonical("lm_head.weight") == source.canonical("model.embed_tokens.weight")
    untied = ModuleSource(llama())
    assert untied.canonical("lm_head.weight") == "lm_head.weight"


def test_compiled_module_keeps_its_names(model):
    assert ModuleSource(torch.compile(model)).names == ModuleSource(model).names


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no folder .*nowhere.*snapshot_download"):
        open_source(tmp_path / "nowhere")


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file$"):
        open_source(tmp_path)


@pytest.mark.parametrize("pickle", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_with_the_way_out(pickle, tmp_path):
    (tmp_path / pickle).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(CheckpointError, match=rf"{pickle}.*runs code.*save_pretrained"):
        open_source(tmp_path)


def test_missing_shard_is_named(sharded):
    gone = shards(sharded)[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"not there: {gone.name}"):
        open_source(sharded)


@pytest.mark.parametrize("keep", [0, 4, 300, -1], ids=["empty", "no header", "half a header", "one byte short"])
def test_truncated_file_is_named(sharded, keep):
    file = shards(sharded)[0]
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=f"{file.name} is not a complete safetensors file"):
        open_source(sharded)


def test_garbage_file_is_named(sharded):
    shards(sharded)[2].write_bytes(b"\xff" * 1000)
    with pytest.raises(CheckpointError, match=shards(sharded)[2].name):
        open_source(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": '])
def test_bad_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="not a valid index"):
        open_source(sharded)


def test_index_that_names_the_wrong_shard(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = content["weight_map"]["model.embed_tokens.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in .*, but it is not there"):
        open_source(sharded)


def test_same_name_twice_without_an_index(tmp_path):
    for file in ("x", "y"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in both x\.safetensors and y\.safetensors"):
        open_source(tmp_path)


def test_two_indices(sharded):
    text = (sharded / "model.safetensors.index.json").read_text()
    for name in ("a", "b"):
        (sharded / f"{name}.safetensors.index.json").write_text(text)
    assert FolderSource(sharded).names  # model.safetensors.index.json is the one that counts
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="several indices"):
        open_source(sharded)


def test_unmerged_adapters(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="PEFT adapter.*as the tuned side"):
        open_source(tmp_path)
    module = torch.nn.Module()
    module.q = torch.nn.Module()
    module.q.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match="LoRA adapter.*merge_and_unload"):
        open_source(module)


def test_unreadable_config(sharded):
    (sharded / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        _ = open_source(sharded).config


def test_wrong_type():
    with pytest.raises(InvalidTypeError, match="found dict"):
        open_source({})


def test_meta_tensor():
    with torch.device("meta"):
        source = open_source(torch.nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        source.get("weight")


@pytest.mark.parametrize(
    "wanted, available, found",
    [
        (["a.w", "b.w"], ["b.w", "a.w"], {"a.w": "a.w", "b.w": "b.w"}),
        (["t.h.0.w"], ["h.0.w"], {"t.h.0.w": "h.0.w"}),
        (["h.0.w"], ["t.h.0.w"], {"h.0.w": "t.h.0.w"}),
        (["x.y.w", "y.w"], ["y.w"], {"y.w": "y.w"}),  # y.w already has its own
        (["h.0.w"], ["s.h.0.w", "t.h.0.w"], {}),  # ambiguous
        (["s.h.0.w", "t.h.0.w"], ["h.0.w"], {}),
        (["a.weight"], ["weight"], {}),  # one word says too little
        (["a.w"], ["b.w"], {}),
    ],
)
def test_match_names(wanted, available, found):
    assert match_names(wanted, available) == found


def test_hash_is_the_same_for_folder_and_loaded_model(model, sharded):
    from transformers import AutoModelForCausalLM

    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
    hashes = {weights_hash(sharded, names), weights_hash(model, names)}
    for dtype in (torch.float32, torch.bfloat16):
        hashes.add(weights_hash(AutoModelForCausalLM.from_pretrained(sharded, dtype=dtype), names))
    assert len(hashes) == 1 and len(hashes.pop()) == 64


def test_hash_sees_one_value_the_order_and_the_shape(model):
    names = [f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2)]
    other = llama()
    assert weights_hash(other, names) == weights_hash(model, names) != weights_hash(model, names[::-1])
    with torch.no_grad():
        other.model.layers[1].self_attn.o_proj.weight[47, 47] += 0.01
    assert weights_hash(other, names) != weights_hash(model, names)
    assert tensor_digest(torch.ones(2, 3)) != tensor_digest(torch.ones(3, 2))


def test_digest_does_not_depend_on_chunks_or_strides(monkeypatch):
    from bkdfast.svd import names

    w = torch.randn(50, 7)
    whole = tensor_digest(w)
    monkeypatch.setattr(names, "_HASH_CHUNK", 32)
    assert tensor_digest(w) == whole == tensor_digest(w.T.contiguous().T)
    for odd in (torch.tensor(3.0), torch.empty(0, 4), torch.arange(5), torch.ones(2, 3, 4)):
        assert len(tensor_digest(odd)) == 32


def test_hash_through_a_dropped_prefix(tmp_path):
    model = gpt2()
    names = ["transformer.h.0.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight"]
    state = {name.removeprefix("transformer."): value.clone() for name, value in model.transformer.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert weights_hash(tmp_path, names) == weights_hash(model, names)
    with pytest.raises(CheckpointError, match=r"no tensor 'transformer\.h\.9"):
        weights_hash(tmp_path, ["transformer.h.9.attn.c_proj.weight"])
