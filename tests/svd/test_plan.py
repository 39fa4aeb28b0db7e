"""What is compared, in which pieces and at what cost, from headers only; what cannot be compared is refused by name."""

import json

import pytest
import torch
from safetensors.torch import save_file

import bkdfast as bf
from bkdfast.errors import CheckpointError, InvalidArgumentError
from bkdfast.svd import delta_directions, delta_norms, delta_plan, delta_svd
from bkdfast.svd.plan import DeltaPlan, memory_limit, show_bytes
from bkdfast.svd.reader import TensorFile
from tests.svd.matrices import FP64, gpt2, llama, sin_theta, tune, with_spectrum

COMMIT = "0123456789" * 4
STACK = "model.layers.0.mlp.experts.gate_up_proj"


def run(base, tuned, **kwargs):
    return delta_svd(base, tuned, **{"rank": 4, "progress": False, **kwargs})


def save(folder, side, tensors, config=None):
    (folder / side).mkdir(exist_ok=True)
    save_file(tensors, folder / side / "model.safetensors")
    if config is not None:
        (folder / side / "config.json").write_text(json.dumps(config))
    return folder / side


@pytest.fixture
def stacked(tmp_path):
    """Three experts [40, 32] a side; the last one is not changed."""
    base = torch.randn(3, 40, 32)
    tuned = base.clone()
    for e in range(2):
        tuned[e] += with_spectrum(40, 32, [3.0, 1.0], seed=e).float()
    norm = {"norm.weight": torch.ones(5), "conv": torch.ones(6, 5, 4)}
    return tuple(save(tmp_path, side, {STACK: w, **norm}) for side, w in (("base", base), ("tuned", tuned)))


def test_experts_are_compared_one_by_one(stacked, monkeypatch):
    read, inner = [], TensorFile._fill
    monkeypatch.setattr(
        TensorFile, "_fill", lambda self, name, view, at: (read.append(len(view)), inner(self, name, view, at))[1]
    )
    got = run(*stacked)
    assert list(got) == [f"{STACK}[{e}]" for e in range(3)]
    assert read == [40 * 32 * 4] * 6, "one expert of one side at a time"
    for e in range(2):
        delta = got[f"{STACK}[{e}]"]
        torch.testing.assert_close(delta.s[:2], torch.tensor([3.0, 1.0], dtype=FP64), rtol=1e-5, atol=0)
        assert delta.shape == (40, 32) and delta.note.startswith("one of 3 stacked matrices")
    assert got.unchanged == (f"{STACK}[2]",) and got[f"{STACK}[2]"].passes == 0
    assert got.skipped == {"norm.weight": "1-D", "conv": "3-D, and too narrow for a stack of matrices"}
    assert "3 of 40 x 32" in str(delta_plan(*stacked))


def test_experts_of_a_model_in_memory():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=40, num_hidden_layers=1, num_local_experts=3, **sizes))
    stacks = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    assert stacks, "this version of transformers stacks them"
    tuned = tune(model)
    with torch.no_grad():
        tuned.get_parameter(stacks[0])[1] += with_spectrum(*tuned.get_parameter(stacks[0]).shape[1:], [2.0]).float()
    got = run(model, tuned)
    assert f"{stacks[0]}[2]" in got.unchanged and got[f"{stacks[0]}[1]"].s[0] == pytest.approx(2.0, rel=1e-5)


def test_a_fused_projection_is_one_matrix():
    base = gpt2()
    tuned = tune(base)
    name = "transformer.h.0.attn.c_attn.weight"
    delta = run(base, tuned)[name]
    explicit = tuned.state_dict()[name].double() - base.state_dict()[name].double()
    assert delta.shape == (32, 96)
    assert sin_theta(torch.linalg.svd(explicit)[0][:, :3], delta.u[:, :3]) < 1e-5


def test_what_is_the_same_byte_for_byte_costs_no_pass(tmp_path, monkeypatch):
    from bkdfast.svd import batched

    w = torch.randn(300, 400)
    base = save(tmp_path, "base", {"a": w, "zero": torch.zeros(300, 400), "mixed": w.clone()})
    tuned = save(tmp_path, "tuned", {"a": w, "zero": -torch.zeros(300, 400), "mixed": w.double()})
    passes, inner = [], batched.leading_triplets
    monkeypatch.setattr(batched, "leading_triplets", lambda *args, **kw: (passes.append(1), inner(*args, **kw))[1])
    got = run(base, tuned)
    assert got.unchanged == ("a", "mixed", "zero") and [got[name].passes for name in got] == [0, 1, 1]
    assert len(passes) == 2, "other bytes of the same values are found by the first pass"
    assert got["a"].u.shape == (300, 0) and got["a"].v.shape == (400, 0)


def test_nan_on_both_sides_is_refused_too(tmp_path):
    w = torch.randn(30, 40)
    w[3, 4] = torch.nan
    base = save(tmp_path, "base", {"w": w})
    with pytest.raises(bf.BkdfastError, match="w has NaN or infinity in the base and tuned weights"):
        run(base, save(tmp_path, "tuned", {"w": w}))


def test_a_plan_reads_headers_only(stacked, tmp_path, monkeypatch):
    base = save(tmp_path, "base", {"a": torch.ones(64, 48).bfloat16(), "n": torch.ones(3), "b": torch.ones(2, 2)})
    tuned = save(tmp_path, "tuned", {"a": torch.ones(64, 48), "n": torch.ones(3), "c": torch.ones(2, 2)})
    monkeypatch.setattr(TensorFile, "read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.warns(UserWarning, match="model only"):
        plan = delta_plan(base, tuned, rank=4)
    assert isinstance(plan, DeltaPlan)
    assert plan.nbytes == 64 * 48 * 6 and plan.items[0].nbytes == (64 * 48 * 2, 64 * 48 * 4)
    assert plan.least_memory > plan.nbytes and plan.peak_memory == plan.least_memory
    assert plan.labels == (str(base), str(tuned))
    text = str(plan)
    for part in ("a", "64 x 48", "6.14 kB", "12.3 kB", "18.4 kB to read", "1-D: n", "only in the base (1):\n  b"):
        assert part in text, part
    assert "only in the tuned model (1):\n  c" in text


def test_plans_tell_tied_and_resized():
    base = llama(tied=True)
    tuned = llama(tied=True)
    tuned.resize_token_embeddings(72, mean_resizing=False)
    with pytest.warns(UserWarning, match="common rows"):
        plan = delta_plan(base, tuned)
    assert "lm_head.weight: the same as model.embed_tokens.weight" in str(plan)
    assert "64 tokens in the base and 72 in the tuned model" in str(plan)
    item = next(item for item in plan.items if "embed" in item.name)
    assert item.shape == (64, 48) and item.nbytes == (64 * 48 * 4,) * 2


def test_only_the_common_rows_are_read(tmp_path, monkeypatch):
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 1}
    base = save(tmp_path, "base", {"embed": torch.randn(40, 8)}, config | {"vocab_size": 40})
    tuned = save(tmp_path, "tuned", {"embed": torch.randn(56, 8)}, config | {"vocab_size": 56})
    sizes, inner = [], TensorFile._fill
    monkeypatch.setattr(
        TensorFile, "_fill", lambda self, name, view, at: (sizes.append(len(view)), inner(self, name, view, at))[1]
    )
    with pytest.warns(UserWarning, match="common rows"):
        run(base, tuned)
    assert sizes == [40 * 8 * 4] * 2


def test_max_memory(tmp_path):
    sides = [
        save(tmp_path, side, {f"w{i}": torch.randn(300, 300 + i) for i in range(3)} | {"small": torch.randn(20, 30)})
        for side in ("base", "tuned")
    ]
    plan = delta_plan(*sides, rank=4)
    assert plan.least_memory < plan.peak_memory
    with pytest.raises(InvalidArgumentError) as caught:
        run(*sides, max_memory=plan.least_memory - 1)
    text = str(caught.value)
    assert "not enough for w2 [300, 302]" in text and "3 of 4 tensors fit" in text and "max_memory='" in text
    for limit in (plan.least_memory, plan.peak_memory, "1GB"):
        assert len(run(*sides, max_memory=limit)) == 4
    with pytest.raises(InvalidArgumentError, match="not enough for"):
        delta_norms(*sides, max_memory="10kB", progress=False)


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        (None, None),
        (5000, 5000),
        ("2GB", 2 * 10**9),
        ("1.5 GiB", 3 << 29),
        ("500mb", 5 * 10**8),
        ("70", 70),
        ("3k", 3000),
    ],
)
def test_sizes(given, limit):
    assert memory_limit(given) == limit


@pytest.mark.parametrize("given", [0, -3, "much", "2PB", "", True, "0GB"])
def test_sizes_that_are_none(given):
    with pytest.raises(InvalidArgumentError, match="neither a number of bytes nor a size such as '2GB'"):
        memory_limit(given)


def test_shown_sizes():
    assert [show_bytes(n) for n in (0, 999, 1000, 1234567, 99_999_999, 10**9, 123 * 10**12)] == [
        "0 B", "999 B", "1 kB", "1.23 MB", "100 MB", "1 GB", "123 TB",
    ]  # fmt: skip


QUANTISED = {
    "config": ({"w": torch.ones(4, 4)}, {"quantization_config": {"quant_method": "gptq"}}, "gptq"),
    "fp8": (
        {"m.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "m.weight_scale_inv": torch.ones(1)},
        None,
        "m.weight",
    ),
    "int8": ({"m.weight": torch.ones(4, 4).char(), "m.SCB": torch.ones(4)}, None, r"m\.weight is int8.*m\.SCB"),
    "gptq": ({"m.qweight": torch.ones(4, 4).int(), "m.scales": torch.ones(4)}, None, r"m\.qweight is int32"),
    "mxfp4": ({"m.down_blocks": torch.ones(4, 4).byte(), "m.down_scales": torch.ones(4)}, None, r"m\.down_blocks"),
}


COMPARE = {
    "svd": run,
    "norms": lambda *sides: delta_norms(*sides, progress=False),
    "directions": lambda *sides: delta_directions(*sides, progress=False),
}


@pytest.mark.parametrize("compare", COMPARE.values(), ids=COMPARE)
@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("side", ["base", "tuned"])
def test_quantised_checkpoints_are_refused_by_name(tmp_path, kind, side, compare):
    tensors, config, message = QUANTISED[kind]
    plain = {"w": torch.ones(4, 4)}
    sides = [save(tmp_path, s, *((tensors, config) if s == side else (plain,))) for s in ("base", "tuned")]
    with pytest.raises(CheckpointError, match=f"the {side}.* is quantised.*{message}.*dequantise"):
        compare(*sides)


def test_models_of_the_local_hub_cache(tmp_path, monkeypatch):
    import huggingface_hub.constants

    base = llama()
    root = tmp_path / "models--some--base"
    base.save_pretrained(root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    tune(base).save_pretrained(tmp_path / "tuned")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    one = run("some/base", "tuned", include="*o_proj*")
    for same in ("some/base@main", f"some/base@{COMMIT}"):
        assert run(same, "tuned", include="*o_proj*").metadata["base_hash"] == one.metadata["base_hash"]
    for missing, how in (("some/other", "hf download some/other "), ("some/base@v2", "some/base --revision v2")):
        with pytest.raises(CheckpointError, match=f"there is no folder {missing}, and no model.*cache.*{how}"):
            run(missing, "tuned")
