"""LoRA adapters as the tuned side: exact triplets from the factors, against PEFT's own merge; refusals by name."""

import copy
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from bkdfast.errors import CheckpointError, InvalidArgumentError, NonFiniteError
from bkdfast.svd import DeltaSVD, delta_directions, delta_svd, weights_hash
from bkdfast.svd.lora import LowRank, factor_product
from bkdfast.svd.rule import Rule
from bkdfast.svd.source import FolderSource, ModuleSource
from tests.svd.matrices import FP64, gpt2, llama, sin_theta, with_spectrum

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

O_PROJ = "model.layers.1.self_attn.o_proj.weight"
BUILD = {"llama": llama, "gpt2": gpt2, "tied": lambda: llama(tied=True)}


def adapted(model, seed=3, adapters=("default",), **config):
    """A copy of the model in a `PeftModel` with random factors (and modules_to_save moved)."""
    model = copy.deepcopy(model)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **config}), adapters[0]
        )
        for name in adapters[1:]:
            wrapped.add_adapter(name, peft.LoraConfig(**{"r": 3, "init_lora_weights": False, **config}))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if ".lora_" in name:
                value.normal_(std=0.3)
            elif ".modules_to_save." in name:
                value.add_(0.1 * torch.randn_like(value))
    return wrapped.eval()


def merged(wrapped):
    """The merged model's weights in float64, by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return copy.deepcopy(wrapped).double().merge_and_unload().state_dict()


def run(base, tuned, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return delta_svd(base, tuned, **{"rank": 8, "progress": False, **kwargs})


def check(base, after, result):
    """Every result against the SVD of the explicit difference, and nothing that differs is missing."""
    before = base.state_dict()
    for name, weight in before.items():
        if weight.dim() != 2 or (name not in result and ModuleSource(base).canonical(name) != name):
            continue  # tied: the first name counts
        explicit = after[name] - before[name].double()
        u, s, vt = torch.linalg.svd(explicit, full_matrices=False)
        delta = result[name]
        k = delta.rank
        assert delta.name == name and delta.shape == tuple(explicit.shape) and delta.converged
        assert delta.frobenius == pytest.approx(explicit.norm().item(), rel=1e-6, abs=1e-9)
        if explicit.norm() < 1e-9:
            assert delta.unchanged and k == 0
            continue
        assert delta.changed >= (explicit != 0).sum() * (delta.passes == 0)
        torch.testing.assert_close(delta.s, s[:k], rtol=1e-6, atol=0)
        assert k == min(8, (s > 1e-6 * s[0]).sum())
        assert sin_theta(u[:, :k], delta.u) < 1e-5 and sin_theta(vt[:k].T, delta.v) < 1e-5
        assert torch.all(delta.u.gather(0, delta.u.abs().argmax(0, keepdim=True)) > 0)
        for i in range(k):  # the bounds hold, one by one
            assert sin_theta(u[:, i : i + 1], delta.u[:, i : i + 1]) <= delta.angle[i] + 1e-9


CASES = {
    "plain": ("llama", {"target_modules": ["q_proj", "o_proj", "down_proj"], "lora_alpha": 16}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "rslora": ("llama", {"target_modules": ["v_proj", "o_proj"], "use_rslora": True, "lora_alpha": 7}),
    "patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "o_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.o_proj": 6},
            "alpha_pattern": {"layers.0.mlp.up_proj": 32, "o_proj": 1},
        },
    ),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d and linear": ("gpt2", {"target_modules": ["c_proj", "wte"], "modules_to_save": ["lm_head"]}),
    "modules_to_save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied head": ("tied", {"target_modules": ["lm_head", "q_proj"]}),
    "tied both": ("tied", {"target_modules": ["lm_head", "embed_tokens"]}),
    "tied modules_to_save": (
        "tied",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_against_peft(case, tmp_path):
    kind, config = CASES[case]
    base = BUILD[kind]()
    wrapped = adapted(base, **config)
    base.save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(tmp_path / "adapter")
    after = merged(wrapped)
    for pair in (
        (base, tmp_path / "adapter"),
        (tmp_path / "base", tmp_path / "adapter"),
        (base, wrapped),
        (wrapped.get_base_model(), wrapped),  # PEFT changes the model that it is given
    ):
        result = run(*pair)
        check(base, after, result)
        assert "adapter" in result.metadata["tuned"] or "PeftModel" in result.metadata["tuned"]
    if "modules_to_save" not in config:
        assert all(delta.passes == 0 for delta in result.values())


def test_one_lora_of_embedding_and_head_counts_once(tmp_path):
    """PEFT ties the factors; its merge adds them to the shared weight twice, which the unmerged model does not."""
    base = llama(tied=True)
    wrapped = adapted(base, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    layer = wrapped.get_base_model().model.embed_tokens
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    expected = ((b.double() @ a.double()).T * layer.scaling["default"]).norm().item()
    wrapped.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    for pair in ((base, wrapped), (tmp_path / "base", tmp_path / "adapter")):
        delta = run(*pair)["model.embed_tokens.weight"]
        assert delta.frobenius == pytest.approx(expected) and delta.note.startswith("LoRA of rank 4; rank clipped")
    head = wrapped.get_base_model().lm_head.lora_A["default"]
    head.weight = torch.nn.Parameter(2 * head.weight.detach())
    both = run(base, wrapped)["model.embed_tokens.weight"]
    assert both.frobenius == pytest.approx(3 * expected, rel=1e-6) and "added as by merging" in both.note


def test_a_shared_weight_is_noted(tmp_path):
    base = llama(tied=True)
    base.save_pretrained(tmp_path / "base")
    wrapped = adapted(base, target_modules=["embed_tokens", "o_proj"])
    for side in (base, tmp_path / "base"):
        result = run(side, wrapped)
        assert "of model.embed_tokens only; once merged" in result["model.embed_tokens.weight"].note
        assert "merged" not in result[O_PROJ].note
    untied = llama()
    alone = run(untied, adapted(untied, target_modules=["embed_tokens"]))["model.embed_tokens.weight"]
    assert "merged" not in alone.note


def test_adapters_that_transformers_holds(tmp_path):
    base = llama()
    model = copy.deepcopy(base)
    model.add_adapter(peft.LoraConfig(r=3, target_modules=["o_proj", "q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    expected = merged(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))
    for tuned in (model, tmp_path, torch.compile(model)):
        result = run(base, tuned)
        check(base, expected, result)
        assert result[O_PROJ].rank == 3


def test_published_names_without_the_prefix(tmp_path):
    base = gpt2()
    wrapped = adapted(base, target_modules=["c_proj", "c_attn"])
    wrapped.save_pretrained(tmp_path / "adapter")
    base.save_pretrained(tmp_path / "base")
    state = {n.removeprefix("transformer."): v.clone() for n, v in base.transformer.state_dict().items()}
    save_file(state, tmp_path / "base" / "model.safetensors")
    expected = run(base, wrapped)
    got = run(tmp_path / "base", tmp_path / "adapter")
    for name in ("h.0.attn.c_proj.weight", "h.1.mlp.c_proj.weight"):
        assert torch.equal(got[name].u, expected[f"transformer.{name}"].u) and got[name].rank == 4


def test_two_modules_are_not_taken_for_one_weight():
    class Net(torch.nn.Module):
        def __init__(self, *names):
            super().__init__()
            for name in names:
                self.add_module(name, torch.nn.ModuleDict({"h": torch.nn.ModuleDict({"w": torch.nn.Linear(3, 3)})}))

    wrapped = adapted(Net("a", "b"), target_modules=["w"], r=1)
    with pytest.raises(CheckpointError, match="adapts a.h.w.weight, which"):
        run(torch.nn.ModuleDict({"h": torch.nn.ModuleDict({"w": torch.nn.Linear(3, 3)})}), wrapped)


def test_no_base_weight_is_read(tmp_path, monkeypatch):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    adapted(base, target_modules=["o_proj", "q_proj"]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(FolderSource, "get", lambda self, name: pytest.fail(f"{name} was read"))
    monkeypatch.setattr(ModuleSource, "get", lambda self, name: pytest.fail(f"{name} was read"))
    result = run(tmp_path / "base", tmp_path / "adapter")
    assert result[O_PROJ].note == "LoRA of rank 4; rank clipped to 4, that of the LoRA" and result[O_PROJ].rank == 4
    assert result["lm_head.weight"].unchanged and len(result.unchanged) == len(result) - 4


def test_several_active_adapters_add_up():
    base = llama()
    wrapped = adapted(base, adapters=("a", "b"), target_modules=["o_proj", "q_proj"])
    single = run(base, wrapped)
    check(base, merged(wrapped), single)
    wrapped.base_model.set_adapter(["a", "b"])
    both = run(base, wrapped)
    check(base, merged(wrapped), both)
    assert single[O_PROJ].rank == 4 and both[O_PROJ].rank == 7 and "rank 7" in both[O_PROJ].note


def test_scaling_of_a_loaded_model_counts():
    base = llama()
    wrapped = adapted(base, target_modules=["o_proj"])
    before = run(base, wrapped)[O_PROJ]
    for module in wrapped.modules():
        if hasattr(module, "lora_A"):
            module.scale_layer(3.0)
    torch.testing.assert_close(run(base, wrapped)[O_PROJ].s, 3 * before.s)


def test_half_precision_and_double(tmp_path):
    base = llama().bfloat16()
    wrapped = adapted(base, target_modules=["o_proj"])
    after = {name: value.double() for name, value in merged(wrapped).items()}
    check(base, after, run(base, wrapped))
    double = run(copy.deepcopy(base).double(), wrapped)[O_PROJ]
    assert double.u.dtype == FP64 and run(base, wrapped)[O_PROJ].u.dtype == torch.float32
    assert float((double.residual / double.s).max()) < 1e-12


def test_new_adapter_changes_nothing():
    base = llama()
    fresh = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, target_modules=["o_proj"]))
    result = run(base, fresh)
    assert result.unchanged == tuple(result) and result[O_PROJ].rank == 0 and result[O_PROJ].frobenius == 0


def test_include_rank_and_saving(tmp_path):
    base = llama()
    wrapped = adapted(base, target_modules=["o_proj", "q_proj"])
    result = run(base, wrapped, include="*.o_proj.weight", rank=2)
    assert set(result) == {O_PROJ, O_PROJ.replace("1", "0")} and result[O_PROJ].rank == 2
    assert 0 < result[O_PROJ].energy < 1 and result[O_PROJ].note == "LoRA of rank 4"
    result.save(tmp_path / "x.safetensors")
    again = DeltaSVD.load(tmp_path / "x.safetensors")
    assert torch.equal(again[O_PROJ].u, result[O_PROJ].u) and again.metadata == result.metadata
    other = run(base, adapted(base, seed=4, target_modules=["o_proj", "q_proj"]), rank=2)
    assert other.metadata["tuned_hash"] != run(base, wrapped, rank=2).metadata["tuned_hash"]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_directions_are_those_of_the_merged_model(kind, tmp_path):
    base = BUILD[kind]()
    wrapped = adapted(base, target_modules=["o_proj", "down_proj"] if kind == "llama" else ["c_proj"])
    wrapped.save_pretrained(tmp_path)
    unloaded = copy.deepcopy(wrapped).merge_and_unload()
    expected = delta_directions(base, unloaded, rank=3, progress=False)
    for tuned in (wrapped, tmp_path):
        got = delta_directions(base, tuned, rank=3, progress=False)
        torch.testing.assert_close(got.strength, expected.strength, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got.vectors, expected.vectors, rtol=0, atol=1e-4)
        assert got.metadata["tuned_hash"] == weights_hash(unloaded, got.metadata["weights"])


def test_factor_product_against_the_explicit_svd():
    m, n = 90, 70
    for spectrum in ([3.0, 1.0, 1e-3], [2.0, 2.0, 1.0], [1.0, 1e-9], [5.0]):
        delta = with_spectrum(m, n, spectrum)
        u, s, vt = torch.linalg.svd(delta)
        k = len(spectrum)
        mix = torch.randn(k, k + 2, dtype=FP64)
        product = LowRank(u[:, :k] * s[:k] @ mix, torch.linalg.pinv(mix) @ vt[:k])
        got = factor_product("w", product, Rule(20), FP64)
        assert got.rank == k and f"clipped to {k}" in got.note
        torch.testing.assert_close(got.s, s[:k], rtol=1e-6, atol=0)
        assert sin_theta(got.u, u[:, :k]) < 1e-6 and got.frobenius == pytest.approx(delta.norm().item())
        torch.testing.assert_close((got.u * got.s) @ got.v.T, delta, atol=1e-14, rtol=0)
        assert bool((got.angle[:2] == 1).all()) == (spectrum[:2] == [2.0, 2.0])


def test_changed_counts_what_can_differ():
    left, right = torch.zeros(6, 2, dtype=FP64), torch.zeros(2, 5, dtype=FP64)
    left[1:3], right[:, :4] = torch.randn(2, 2), torch.randn(2, 4)
    assert factor_product("w", LowRank(left, right), Rule(2)).changed == 2 * 4


# Refusals


@pytest.fixture
def folder(tmp_path):
    adapted(llama(), target_modules=["o_proj", "q_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def configure(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "LOHA"}, "type LOHA, not LORA.*merge_and_unload"),
        ({"peft_type": "LOKR"}, "type LOKR"),
        ({"peft_type": "ADALORA"}, "type ADALORA"),
        ({"use_dora": True}, "DoRA.*merge_and_unload"),
        ({"lora_bias": True}, "lora_bias.*merge_and_unload"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters.*merge_and_unload"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "aLoRA"),
        ({"trainable_token_indices": [1]}, "trained token rows"),
        ({"layer_replication": [[0, 2]]}, "replicated layers"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "loftq"}, "changes the base"),
        ({"lora_alpha": None}, "no lora_alpha for model.layers"),
        ({"r": 5}, "rank 5, but its factors have rank 4"),
    ],
)
def test_refused_config(folder, changes, message):
    with pytest.raises(CheckpointError, match=message):
        run(llama(), configure(folder, **changes))


def test_refused_models():
    base = llama()
    for config, message in (
        (peft.LoHaConfig(target_modules=["o_proj"]), "LoHa|LOHA"),
        (peft.LoraConfig(target_modules=["o_proj"], use_dora=True), "DoRA"),
        (peft.LoraConfig(target_modules=["o_proj"], init_lora_weights="pissa"), "changes the base"),
        (peft.IA3Config(target_modules=["o_proj"], feedforward_modules=[]), "IA3"),
        (peft.AdaLoraConfig(target_modules=["o_proj"], total_step=10), "ADALORA"),
        (peft.LoraConfig(target_modules=["o_proj"], trainable_token_indices=[1]), "token"),
    ):
        wrapped = peft.get_peft_model(copy.deepcopy(base), config)
        with pytest.raises(CheckpointError, match=message):
            run(base, wrapped)


def test_refused_layers_without_a_config():
    for config, message in (({"use_dora": True}, "variant"), ({"lora_bias": True}, "bias of its own")):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"], **config), model)
        for module in model.modules():
            vars(module).pop("peft_config", None)
        with pytest.raises(CheckpointError, match=message):
            run(torch.nn.Sequential(torch.nn.Linear(4, 4)), model)


def test_merged_and_disabled_adapters_are_refused():
    base = llama()
    wrapped = adapted(base, target_modules=["o_proj"])
    wrapped.merge_adapter()
    with pytest.raises(CheckpointError, match="merged into .*o_proj; call unmerge_adapter"):
        run(base, wrapped)
    with pytest.raises(CheckpointError, match="unmerge_adapter"):
        run(wrapped.get_base_model(), adapted(base, target_modules=["o_proj"]))
    wrapped.unmerge_adapter()
    with wrapped.disable_adapter(), pytest.raises(CheckpointError, match="disabled"):
        run(base, wrapped)


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(change(tensors), folder / "adapter_model.safetensors")
    return folder


KEY = "base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: {k: v for k, v in t.items() if k != KEY}, "lora_B, not both A and B"),
        (
            lambda t: {**t, KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(48)},
            "no factor of a plain",
        ),
        (lambda t: {**t, KEY.replace("lora_A.weight", "lora_B.bias"): torch.ones(48)}, "lora_B.bias is no factor"),
        (lambda t: {**t, KEY: torch.ones(3, 48)}, "do not fit each other"),
        (lambda t: {**t, KEY: torch.ones(4, 40)}, "40 inputs to 48 outputs, but .* is .48, 48."),
        (lambda t: {**t, KEY: torch.ones(4, 48, 1, 1)}, "4-D, of a convolution"),
        (lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}, "layers.7.* which LlamaFor.* lacks"),
        (lambda t: {**t, KEY.replace("lora_A", "lora_A.x"): torch.ones(4, 48)}, "adapters None, x in one file"),
    ],
)
def test_refused_tensors(folder, change, message):
    with pytest.raises(CheckpointError, match=message):
        run(llama(), rewrite(folder, change))


def test_adapter_name_in_the_keys(folder):
    expected = run(llama(), folder)
    rewrite(folder, lambda t: {k.replace(".weight", ".default.weight"): v for k, v in t.items()})
    assert torch.equal(run(llama(), folder)[O_PROJ].s, expected[O_PROJ].s)
    rewrite(folder, lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    assert torch.equal(run(llama(), folder)[O_PROJ].s, expected[O_PROJ].s)


def test_pickles_nan_and_damage(folder):
    rewrite(folder, lambda t: {**t, KEY: t[KEY] * float("nan")})
    with pytest.raises(NonFiniteError, match=f"{O_PROJ} has NaN"):
        run(llama(), folder)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        run(llama(), folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin.*runs code.*save_pretrained"):
        run(llama(), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="adapter_config.json is not valid JSON"):
        run(llama(), folder)


def test_wrong_base(folder):
    with pytest.raises(CheckpointError, match="use the model that the adapter was trained on"):
        run(llama(hidden_size=32), folder)
    with pytest.raises(CheckpointError, match="as the tuned side"):
        run(folder, llama())


def test_changed_copy_of_the_embedding_is_refused(tmp_path):
    base = llama()
    wrapped = adapted(base, target_modules=["embed_tokens"])
    with torch.no_grad():
        wrapped.get_base_model().model.embed_tokens.base_layer.weight[0, 0] += 1
    wrapped.save_pretrained(tmp_path, save_embedding_layers=True)
    with pytest.raises(CheckpointError, match="own copy of model.embed_tokens.weight"):
        run(base, tmp_path)


def test_directions_of_an_adapter_elsewhere(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if "q_proj" in k})
    with pytest.raises(InvalidArgumentError, match="does the adapter leave them"):
        delta_directions(llama(), folder, rank=2, progress=False)
