"""LoRA extraction: what PEFT loads and merges is base + truncated delta, and what is not carried is said."""

import copy
import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file

from bkdfast import cli
from bkdfast.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, NonFiniteError
from bkdfast.svd import delta_svd, extract_lora
from bkdfast.svd.layout import Layout
from bkdfast.svd.source import ModuleSource
from tests.svd.matrices import gpt2, llama

peft = pytest.importorskip("peft")

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BUILD = {"llama": llama, "gpt2": gpt2, "tied": lambda: llama(tied=True)}


def noisy(model, matrices_only=True, only="", seed=7):
    """A fine-tune whose deltas have a few strong directions over full-rank noise."""
    tuned = copy.deepcopy(model)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if not re.search(only, name) or (matrices_only and weight.dim() != 2):
                continue
            weight += 0.03 * torch.randn(weight.shape, generator=g)
            if weight.dim() == 2:
                weight += (
                    0.1 * torch.randn(weight.shape[0], 3, generator=g) @ torch.randn(3, weight.shape[1], generator=g)
                )
    return tuned


def extract(base, tuned, out, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return extract_lora(base, tuned, out, **{"progress": False, **kwargs})


def loaded(base, out):
    """The adapter on a copy of the base, by PEFT; no key of the file is left over or missing."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), out)
    assert not [w for w in said if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    return model


def merge(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(model).double().merge_and_unload().state_dict()


def truncated(delta, rank):
    u, s, vt = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


def close(got, expected, scale):
    """Relative to the delta, and to the rounding of the weights that PEFT keeps in float32."""
    assert float((got - expected).norm()) <= 1e-5 * float(scale)


@pytest.mark.parametrize(
    "kind, rule",
    [
        ("llama", {"rank": 4}),
        ("llama", {"energy": 0.97}),
        ("llama", {"tol": 0.05, "max_rank": 10}),
        ("gpt2", {"rank": 4}),
        ("gpt2", {"energy": 0.985}),
    ],
)
@pytest.mark.parametrize("folders", [False, True], ids=["models", "folders"])
def test_merged_adapter_is_the_truncated_delta(kind, rule, folders, tmp_path):
    base = BUILD[kind]()
    tuned = noisy(base)
    sides = (base, tuned)
    if folders:
        sides = tmp_path / "base", tmp_path / "tuned"
        base.save_pretrained(sides[0], max_shard_size="40KB")
        tuned.save_pretrained(sides[1])
    found = extract(*sides, tmp_path / "adapter", **rule)
    model = loaded(base, tmp_path / "adapter")
    after, before, wanted = merge(model), base.state_dict(), tuned.state_dict()
    ranks = set()
    for name, weight in before.items():
        delta = wanted[name].double() - weight.double()
        change = after[name] - weight.double()
        if name not in found.tensors or found.tensors[name].how == "lost":
            assert not change.any(), name
            continue
        one = found.tensors[name]
        ranks.add(one.rank)
        close(change, truncated(delta, one.rank), delta.norm())
        s = torch.linalg.svdvals(delta)
        shares = s.square().cumsum(0) / s.square().sum()
        assert one.energy == pytest.approx(float(shares[one.rank - 1]), rel=1e-5)
        if "energy" in rule:
            assert one.rank == int((shares < rule["energy"]).sum()) + 1
        elif "tol" in rule:
            assert one.rank == min(10, int((s >= 0.05 * s[0]).sum()))
        else:
            assert one.rank == 4
    assert len(ranks) > 1 or "rank" in rule
    tied = {"transformer.wte.weight"} if kind == "gpt2" else set()  # GPT-2's head is its embedding
    assert set(found.lost) == tied
    matrices = {name for name, weight in base.named_parameters() if weight.dim() == 2}
    assert {name for name, one in found.tensors.items() if one.how == "lora"} == matrices - tied
    adapted = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert adapted == {name.removesuffix(".weight") for name in matrices - tied}


def test_only_what_changed_is_adapted(tmp_path):
    base = llama()
    tuned = noisy(base, only=r"layers\.0\.self_attn\.q_proj|layers\.1\.mlp|embed_tokens")
    found = extract(base, tuned, tmp_path / "a", rank=3)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["embed_tokens", "layers.0.self_attn.q_proj", *sorted(
        f"1.mlp.{x}_proj" for x in ("down", "gate", "up"))] or set(config["target_modules"]) == {
        "embed_tokens", "0.self_attn.q_proj", "1.mlp.down_proj", "1.mlp.gate_proj", "1.mlp.up_proj"}  # fmt: skip
    model = loaded(base, tmp_path / "a")
    hit = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert hit == {name.removesuffix(".weight") for name in found.tensors} and len(hit) == 5
    assert found.unchanged == len(base.state_dict()) - 5


def test_suffixes_hit_exactly_the_chosen_modules():
    base = ModuleSource(llama())
    layout = Layout.of(base, base)
    names = [name for name in base.names if base.shape(name)[1:] and "embed" not in name]
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        chosen = [name for name in names if torch.rand((), generator=g) < 0.4]
        targets = layout.targets(chosen)
        config = peft.LoraConfig(target_modules=targets)
        hit = {
            path
            for path in layout.modules
            if path and peft.tuners.tuners_utils.check_target_module_exists(config, path)
        }
        assert hit == {name.removesuffix(".weight") for name in chosen}
    assert layout.targets([name for name in names if "q_proj" in name]) == ["q_proj"]


def test_a_suffix_that_cannot_tell_becomes_a_pattern():
    net = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3)})})
    source = ModuleSource(net)
    targets = Layout.of(source, source).targets(["a.weight"])
    assert isinstance(targets, str) and re.fullmatch(targets, "a") and not re.fullmatch(targets, "b.a")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied"])
@pytest.mark.parametrize("folders", [False, True], ids=["models", "folders"])
def test_save_rest_carries_everything(kind, folders, tmp_path):
    """Full rank and the rest saved: the merged model is the tuned one, and so is the unmerged one's output."""
    base = BUILD[kind]()
    tuned = noisy(base, matrices_only=False)
    sides = (base, tuned)
    if folders:
        sides = tmp_path / "base", tmp_path / "tuned"
        base.save_pretrained(sides[0])
        tuned.save_pretrained(sides[1])
    found = extract(*sides, tmp_path / "adapter", rank=64, save_rest=True)
    assert found.lost == () and found.energy == pytest.approx(1, abs=1e-6)
    assert {one.how for one in found.tensors.values()} == {"lora", "saved"}
    model = loaded(base, tmp_path / "adapter")
    for name, weight in merge(model).items():
        wanted = tuned.state_dict()[name].double()
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-6)
    tokens = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, tuned(tokens).logits, rtol=0, atol=1e-4)
    again = delta_svd_of(base, tmp_path / "adapter")  # and our own reader understands it
    for name in (name for name, one in found.tensors.items() if one.how == "lora"):
        assert again[name].frobenius == pytest.approx(found.tensors[name].frobenius, rel=1e-6)


def delta_svd_of(base, adapter, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return delta_svd(base, adapter, **{"rank": 8, "progress": False, **kwargs})


@pytest.mark.parametrize("kind", ["llama", "tied", "gpt2"])
def test_what_is_lost_is_counted(kind, tmp_path):
    base = BUILD[kind]()
    tuned = noisy(base, matrices_only=False)
    with pytest.warns(UserWarning, match=r"changed tensors, [\d.]+% of the squared norm.*save_rest=True"):
        found = extract_lora(base, tuned, tmp_path / "a", rank=4, progress=False)
    lost = {name for name in found.tensors if name in found.lost}
    named = dict(base.named_parameters())
    shared = {"tied": {"model.embed_tokens.weight"}, "gpt2": {"transformer.wte.weight"}}.get(kind, set())
    assert lost == {name for name, value in named.items() if value.dim() == 1} | shared
    after = dict(tuned.named_parameters())
    squares = {name: float((after[name] - named[name]).detach().double().square().sum()) for name in named}
    assert found.share(lost) == pytest.approx(sum(squares[n] for n in lost) / sum(squares.values()), rel=1e-6)
    assert 0 < found.energy < 1 - found.share(lost) and all(found.tensors[n].note for n in lost)


def test_computed_deltas_are_used(tmp_path, monkeypatch):
    base = llama()
    tuned = noisy(base)
    deltas = delta_svd_of(base, tuned, rank=20)
    by_tol = delta_svd_of(base, tuned, rank=None, tol=0.05)
    capped = delta_svd_of(base, tuned, rank=None, energy=0.9999, max_rank=4)
    assert all("max_rank 4 reached" in delta.note for delta in capped.values())
    expected = extract(base, tuned, tmp_path / "a", rank=4)
    from bkdfast.svd import extract as module

    monkeypatch.setattr(module.Settings, "factor", lambda *a, **k: pytest.fail("computed again"))
    got = extract(base, tuned, tmp_path / "b", rank=4, deltas=deltas)
    assert {n: o.rank for n, o in got.tensors.items()} == {n: o.rank for n, o in expected.tensors.items()}
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in "ab")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-6)
    got = extract(base, tuned, tmp_path / "tol", tol=0.05, deltas=by_tol)
    assert {n: o.rank for n, o in got.tensors.items()} == {n: d.rank for n, d in by_tol.items()}
    for energy, expected in ((0.3, ""), (0.999, "max_rank 4 reached")):
        got = extract(base, tuned, tmp_path / f"of {energy}", energy=energy, max_rank=4, deltas=capped)
        assert {one.note for one in got.tensors.values()} == {expected}
    monkeypatch.undo()
    more = extract(base, tuned, tmp_path / "c", rank=22, deltas=deltas)
    assert more.tensors[O_PROJ].rank == 22
    finer = extract(base, tuned, tmp_path / "finer", tol=0.01, deltas=by_tol)
    assert finer.tensors[O_PROJ].rank > by_tol[O_PROJ].rank
    with pytest.raises(CheckpointError, match="in deltas= and"):
        extract(llama(hidden_size=32), llama(hidden_size=32, seed=1), tmp_path / "d", deltas=deltas)


def test_large_matrices_double_their_rank(tmp_path):
    base = torch.nn.Sequential(torch.nn.Linear(600, 520, bias=False))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight += torch.randn(520, 40) @ torch.randn(40, 600)
    base, tuned = base.requires_grad_(False), tuned.requires_grad_(False)
    found = extract(base, tuned, tmp_path / "a", energy=0.999)
    delta = (tuned[0].weight - base[0].weight).detach().double()
    shares = torch.linalg.svdvals(delta).square().cumsum(0) / delta.square().sum()
    assert found.tensors["0.weight"].rank == int((shares < 0.999).sum()) + 1 > 32
    with pytest.warns(UserWarning, match=r"reached the cap before.*\(energy=0.999, max_rank=24\)"):
        short = extract_lora(base, tuned, tmp_path / "b", energy=0.999, max_rank=24, progress=False)
    assert short.tensors["0.weight"].rank == 24 and "max_rank" in short.tensors["0.weight"].note
    merged = merge(loaded(base, tmp_path / "a"))["0.weight"] - base[0].weight.double()
    close(merged, truncated(delta, found.tensors["0.weight"].rank), delta.norm())


def test_an_adapter_is_brought_to_a_lower_rank(tmp_path):
    base = llama()
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=8, target_modules=["o_proj"]))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.normal_(std=0.3)
    found = extract(base, wrapped, tmp_path / "a", rank=2)
    assert {one.rank for one in found.tensors.values()} == {2} and len(found.tensors) == 2
    before = base.state_dict()[O_PROJ].double()
    delta = merge(wrapped)[O_PROJ] - before
    close(merge(loaded(base, tmp_path / "a"))[O_PROJ] - before, truncated(delta, 2), delta.norm())


def test_published_names_without_the_prefix(tmp_path):
    from safetensors.torch import save_file

    base = gpt2()
    tuned = noisy(base, only="c_proj|c_fc")
    for side, model in (("base", base), ("tuned", tuned)):
        model.save_pretrained(tmp_path / side)
        state = {n.removeprefix("transformer."): v.clone() for n, v in model.transformer.state_dict().items()}
        save_file(state, tmp_path / side / "model.safetensors")
    found = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "a", rank=40)
    assert len(found.tensors) == 6 and "h.0.attn.c_proj.weight" in found.tensors
    after = merge(loaded(base, tmp_path / "a"))
    for name, weight in tuned.state_dict().items():
        torch.testing.assert_close(after[name], weight.double(), rtol=0, atol=1e-5)


def test_dtype_of_the_adapter(tmp_path):
    base = llama().bfloat16()
    tuned = noisy(base)
    for dtype, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        extract(base, tuned, tmp_path / str(expected), dtype=dtype, rank=3)
        tensors = load_file(tmp_path / str(expected) / "adapter_model.safetensors")
        assert {value.dtype for value in tensors.values()} == {expected}


def test_include_and_table(tmp_path):
    base = llama()
    found = extract(base, noisy(base), tmp_path / "a", include="*.o_proj.weight", rank=2)
    assert set(found.tensors) == {O_PROJ, O_PROJ.replace("1", "0")}
    table = found.to_pandas()
    assert list(table["rank"]) == [2, 2] and 0 < table.loc[O_PROJ, "energy"] < 1 and "2 LoRAs" in repr(found)


def test_stacked_experts(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=3)).eval()
    tuned = noisy(base, matrices_only=False)
    found = extract(base, tuned, tmp_path / "a", rank=2)
    experts = {name for name, value in base.named_parameters() if value.dim() == 3}
    assert len(experts) == 4 and experts <= set(found.lost) and found.tensors[min(experts)].note == "3-D"
    assert found.share(experts) > 0.05
    loaded(base, tmp_path / "a")
    whole = extract(base, tuned, tmp_path / "b", rank=64, save_rest=True)
    merged, left = merge(loaded(base, tmp_path / "b")), set(whole.lost)
    for name, value in tuned.state_dict().items():
        if name not in left:
            torch.testing.assert_close(merged[name], value.double(), rtol=0, atol=1e-5)
    assert not left


# Refusals


def test_nothing_to_extract(tmp_path):
    base = llama()
    with pytest.raises(InvalidArgumentError, match="are identical; there is nothing"):
        extract(base, copy.deepcopy(base), tmp_path / "a")
    with pytest.raises(InvalidArgumentError, match="differ only in what a LoRA cannot carry: model.norm.weight"):
        extract(base, noisy(base, matrices_only=False, only="^model.norm"), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(tmp_path):
    base = llama()
    tuned = noisy(base, only="o_proj")
    extract(base, tuned, tmp_path / "a", rank=1)
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(InvalidArgumentError, match="not empty"):
        extract(base, tuned, tmp_path / "a", rank=2)
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert extract(base, tuned, tmp_path / "empty", rank=1).path == tmp_path / "empty"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "empty"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    from bkdfast.svd import layout

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(layout, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        extract(llama(), noisy(llama(), only="o_proj"), tmp_path / "a", rank=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "rule, error, message",
    [
        ({"rank": 0}, InvalidArgumentError, "rank must be at least 1"),
        ({"rank": 2.0}, InvalidTypeError, "rank must be an integer"),
        ({"rank": 2, "energy": 0.5}, InvalidArgumentError, "rank and energy"),
        ({"energy": 1.5}, InvalidArgumentError, "energy must be above 0 and at most 1"),
        ({"energy": -0.1}, InvalidArgumentError, "energy must be above 0"),
        ({"tol": float("nan")}, InvalidArgumentError, "tol must be"),
        ({"tol": 0.1, "max_rank": 0}, InvalidArgumentError, "max_rank must be at least 1"),
        ({"dtype": torch.int8}, InvalidTypeError, "floating-point"),
        ({"include": "*.nothing"}, InvalidArgumentError, "matches no tensor"),
    ],
)
def test_bad_options(rule, error, message, tmp_path):
    base = llama()
    with pytest.raises(error, match=message):
        extract(base, base, tmp_path / "a", **rule)
    assert list(tmp_path.iterdir()) == []


def test_nan_and_folders_without_config(tmp_path):
    base = llama()
    tuned = noisy(base, only="o_proj|norm", matrices_only=False)
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="no config.json"):
        extract(tmp_path / "base", tuned, tmp_path / "a")
    with torch.no_grad():
        tuned.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="model.norm.weight has NaN"):
        extract(base, tuned, tmp_path / "a")


# Command line


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = llama()
    base.save_pretrained(folder / "base")
    noisy(base, matrices_only=False).save_pretrained(folder / "tuned")
    return folder


def command(pair, out, *options):
    arguments = ["extract-lora", pair / "base", pair / "tuned", "--quiet", "--out", out, *options]
    return cli.main([str(argument) for argument in arguments])


def test_command(pair, tmp_path, capsys):
    assert command(pair, tmp_path / "a", "--energy", 0.97, "--max-rank", 6, "--exclude", "lm_head*") == 0
    said = capsys.readouterr()
    assert "written to" in said.out and "% of theirs" in said.out and "5 tensors lost" in said.out
    assert "are not in the adapter" in said.err and "save_rest" in said.err
    expected = extract(pair / "base", pair / "tuned", tmp_path / "b", energy=0.97, max_rank=6, exclude="lm_head*")
    assert f"{expected.energy:.1%} of the" in said.out
    a, b = ((tmp_path / side / "adapter_model.safetensors").read_bytes() for side in "ab")
    assert a == b
    loaded(llama(), tmp_path / "a")


def test_command_with_rest_and_bad_input(pair, tmp_path, capsys):
    assert command(pair, tmp_path / "a", "--rank", 2, "--save-rest", "--dtype", "bfloat16") == 0
    said = capsys.readouterr()
    assert "5 tensors saved whole" in said.out and "not in the adapter" not in said.err
    assert command(pair, tmp_path / "a") == 2 and "not empty" in capsys.readouterr().err
    assert command(pair, tmp_path / "b", "--energy", 2) == 2 and "at most 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert command(pair, tmp_path / "file" / "x", "--rank", 1) == 2 and "cannot write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command(pair, tmp_path / "b", "--energy", 0.5, "--rank", 2)
