"""Places read off the names of many families, and principal angles against `torch.linalg`."""

import math
from dataclasses import replace

import pytest
import torch

from bkdfast.errors import InvalidArgumentError
from bkdfast.svd.overlap import overlaps, random_overlap, stream_basis, subspace_overlap
from bkdfast.svd.places import input_first, labels, place, places
from tests.report.delta_results import basis, tensor_delta

NAMES = [
    # name, layer, projection, expert, side, part
    ("model.layers.12.self_attn.o_proj.weight", 12, "self_attn.o_proj", None, "output", "attention"),
    ("model.layers.0.self_attn.q_proj.weight", 0, "self_attn.q_proj", None, "input", ""),
    ("model.layers.0.self_attn.qkv_proj.weight", 0, "self_attn.qkv_proj", None, "input", ""),
    ("model.layers.7.mlp.gate_up_proj.weight", 7, "mlp.gate_up_proj", None, "input", ""),
    ("model.layers.7.mlp.down_proj.weight", 7, "mlp.down_proj", None, "output", "mlp"),
    ("base_model.model.model.layers.7.mlp.down_proj.weight", 7, "mlp.down_proj", None, "output", "mlp"),
    ("h.3.mlp.c_proj.weight", 3, "mlp.c_proj", None, "output", "mlp"),
    ("transformer.h.10.attn.c_proj.weight", 10, "attn.c_proj", None, "output", "attention"),
    ("transformer.h.10.attn.c_attn.weight", 10, "attn.c_attn", None, "input", ""),
    ("transformer.h.10.mlp.c_fc.weight", 10, "mlp.c_fc", None, "input", ""),
    ("gpt_neox.layers.3.attention.dense.weight", 3, "attention.dense", None, "output", "attention"),
    ("gpt_neox.layers.3.attention.query_key_value.weight", 3, "attention.query_key_value", None, "input", ""),
    ("gpt_neox.layers.3.mlp.dense_4h_to_h.weight", 3, "mlp.dense_4h_to_h", None, "output", "mlp"),
    ("gpt_neox.layers.3.mlp.dense_h_to_4h.weight", 3, "mlp.dense_h_to_4h", None, "input", ""),
    ("transformer.h.31.self_attention.dense.weight", 31, "self_attention.dense", None, "output", "attention"),
    ("model.decoder.layers.5.self_attn.out_proj.weight", 5, "self_attn.out_proj", None, "output", "attention"),
    ("model.decoder.layers.5.fc1.weight", 5, "fc1", None, "input", ""),
    ("model.decoder.layers.5.fc2.weight", 5, "fc2", None, "output", "mlp"),
    ("bert.encoder.layer.2.attention.self.query.weight", 2, "attention.self.query", None, "input", ""),
    ("bert.encoder.layer.2.attention.output.dense.weight", 2, "attention.output.dense", None, "output", "attention"),
    ("bert.encoder.layer.2.intermediate.dense.weight", 2, "intermediate.dense", None, "input", ""),
    ("bert.encoder.layer.2.output.dense.weight", 2, "output.dense", None, "output", "mlp"),
    ("bert.encoder.layer.2.crossattention.output.dense.weight", 2, "crossattention.output.dense", None, "output", ""),
    ("distilbert.transformer.layer.1.ffn.lin2.weight", 1, "ffn.lin2", None, "output", "mlp"),
    ("model.layers.4.block_sparse_moe.experts.5.w2.weight", 4, "block_sparse_moe.experts.w2", 5, "output", "mlp"),
    ("model.layers.4.block_sparse_moe.experts.5.w1.weight", 4, "block_sparse_moe.experts.w1", 5, "input", ""),
    ("model.layers.4.block_sparse_moe.gate.weight", 4, "block_sparse_moe.gate", None, "input", ""),
    ("model.layers.4.mlp.experts.down_proj[17]", 4, "mlp.experts.down_proj", 17, "output", "mlp"),
    ("model.layers.4.mlp.experts.gate_up_proj[0]", 4, "mlp.experts.gate_up_proj", 0, "input", ""),
    ("model.layers.4.mlp.shared_expert.down_proj.weight", 4, "mlp.shared_expert.down_proj", None, "output", "mlp"),
    ("encoder.block.1.layer.0.SelfAttention.o.weight", 1, "layer.0.SelfAttention.o", None, "output", "attention"),
    ("model.embed_tokens.weight", None, "model.embed_tokens", None, "output", ""),
    ("lm_head.weight", None, "lm_head", None, "output", ""),
    ("wte.weight", None, "wte", None, "output", ""),
    ("classifier.0.weight", None, "classifier.0", None, "output", ""),
    ("layers.3", None, "layers.3", None, "output", ""),
    ("odd[2]", None, "odd", 2, "output", ""),
    ("", None, "", None, "output", ""),
]


@pytest.mark.parametrize(("name", "layer", "projection", "expert", "side", "part"), NAMES)
def test_places_of_the_families(name, layer, projection, expert, side, part):
    found = place(name)
    assert (found.layer, found.projection, found.expert, found.side, found.part) == (
        layer, projection, expert, side, part,
    )  # fmt: skip
    assert (found.stack == "") == (layer is None)


def test_names_are_put_in_the_order_of_the_model():
    names = [f"model.layers.{i}.{p}.weight" for i in (10, 9, 2) for p in ("mlp.down_proj", "self_attn.o_proj")]
    names += ["lm_head.weight", "model.layers.2.self_attn.q_proj.weight"]
    assert [p.name for p in places(names)] == [
        "model.layers.2.self_attn.q_proj.weight",
        *(f"model.layers.{i}.{p}.weight" for i in (2, 9, 10) for p in ("self_attn.o_proj", "mlp.down_proj")),
        "lm_head.weight",
    ]


@pytest.mark.parametrize(
    ("stacks", "names"),
    [
        (("model.layers",), ("",)),
        (("encoder.block", "decoder.block"), ("encoder: ", "decoder: ")),
        (
            ("model.language_model.layers", "model.vision_tower.x.encoder.layers"),
            ("language_model: ", "vision_tower: "),
        ),
        (("model.layers", "model.mtp.layers"), ("layers: ", "mtp: ")),
        (("model.layers", "model.h"), ("layers: ", "h: ")),
        (("a.x.layers", "a.x.y.layers", "b.layers"), ("a.x.layers: ", "a.x.y.layers: ", "b.layers: ")),
        (("layers", "text.layers"), ("layers: ", "text: ")),
    ],
)
def test_several_lists_of_blocks_are_told_apart(stacks, names):
    found = [place(f"{stack}.{i}.fc2.weight") for stack in stacks for i in range(2)]
    assert labels([*found, place("lm_head")]) == {(s, "fc2"): f"{n}fc2" for s, n in zip(stacks, names, strict=True)}


def test_which_models_store_the_input_side_first():
    assert input_first(place("h.3.mlp.c_proj.weight"), "gpt2") and not input_first(place("wte.weight"), "gpt2")
    assert not input_first(place("h.3.mlp.c_proj.weight"), None)
    assert not input_first(place("model.layers.1.mlp.down_proj.weight"), "llama")
    assert input_first(place("model.layers.1.mlp.experts.down_proj[3]"), "gpt_oss")
    assert not input_first(place("model.layers.1.self_attn.o_proj.weight"), "gpt_oss")


@pytest.mark.parametrize(("j", "k"), [(1, 1), (3, 3), (2, 5), (5, 2), (16, 4)])
def test_the_overlap_is_the_mean_squared_cosine_of_the_principal_angles(j, k):
    g = torch.Generator().manual_seed(j + 10 * k)
    a, b = torch.randn(16, j, generator=g).double(), torch.randn(16, k, generator=g).double()
    # Independently: eigenvalues of a product of orthogonal projections, from pseudo-inverses.
    projections = [m @ torch.linalg.pinv(m) for m in (a, b)]
    cosines = torch.linalg.svdvals(projections[0] @ projections[1])[: min(j, k)]
    assert subspace_overlap(a, b) == pytest.approx(float(cosines.square().mean()), rel=1e-10)
    assert subspace_overlap(a, a @ torch.randn(j, j, generator=g).double()) == pytest.approx(1)
    assert subspace_overlap(b, a) == pytest.approx(subspace_overlap(a, b), rel=1e-10)


def test_random_subspaces_overlap_as_said():
    pairs = [(basis(64, 4, seed), basis(64, 6, seed + 1000)) for seed in range(200)]
    found = torch.tensor([subspace_overlap(a, b) for a, b in pairs])
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - random_overlap(4, 6, 64)) < 4 * error
    assert random_overlap(4, 6, 64) == 6 / 64


def test_nothing_to_compare_and_wrong_widths():
    assert math.isnan(subspace_overlap(torch.zeros(8, 0), torch.eye(8))) and math.isnan(random_overlap(0, 3, 8))
    assert subspace_overlap(torch.eye(4)[:, :1], torch.eye(4)[:, 1:]) == 0
    with pytest.raises(InvalidArgumentError, match="D rows"):
        subspace_overlap(torch.eye(4), torch.eye(5))


def block(layer, **deltas):
    return {f"model.layers.{layer}.{name.replace('__', '.')}.weight": delta for name, delta in deltas.items()}


def test_which_weights_are_compared_on_which_side():
    writer, other, reader = (tensor_delta("", 24, 40, 3, seed) for seed in (1, 2, 3))
    reader = replace(reader, shape=(40, 24), u=reader.v, v=reader.u)
    deltas = {
        **block(0, self_attn__o_proj=writer, mlp__down_proj=other, mlp__up_proj=reader),
        **block(1, self_attn__o_proj=other, mlp__up_proj=reader),
        **block(3, self_attn__o_proj=other),
        "lm_head.weight": writer,
    }
    deltas = {name: replace(delta, name=name) for name, delta in deltas.items()}
    found = overlaps(deltas)
    assert [(o.comparison, o.first, o.second, o.layer, o.other_layer, o.side, o.factors) for o in found] == [
        ("next layer", "self_attn.o_proj", "self_attn.o_proj", 0, 1, "output", "u, u"),
        ("next layer", "mlp.up_proj", "mlp.up_proj", 0, 1, "input", "v, v"),
        ("same layer", "self_attn.o_proj", "mlp.down_proj", 0, 0, "output", "u, u"),
    ]
    assert found[0].overlap == pytest.approx(subspace_overlap(writer.u, other.u))
    assert found[1].overlap == pytest.approx(1) and found[2].overlap == pytest.approx(found[0].overlap)
    assert {(o.rank, o.other_rank, o.width, o.random) for o in found} == {(3, 3, 24, 3 / 24)}


def test_conv1d_writes_with_its_right_singular_vectors():
    a, b = tensor_delta("h.0.attn.c_proj.weight", 24, 24, 3, 1), tensor_delta("h.1.attn.c_proj.weight", 24, 24, 3, 2)
    deltas = {a.name: a, b.name: b}
    (conv,), (linear,) = overlaps(deltas, "gpt2"), overlaps(deltas)
    assert conv.factors == "v, v" and conv.overlap == pytest.approx(subspace_overlap(a.v, b.v))
    assert linear.factors == "u, u" and linear.overlap == pytest.approx(subspace_overlap(a.u, b.u))
    assert conv.side == linear.side == "output"


def test_experts_count_as_one_matrix():
    experts = [tensor_delta(f"model.layers.0.mlp.experts.down_proj[{e}]", 24, 40, 3, e) for e in range(4)]
    side = stream_basis([(place(delta.name), delta) for delta in experts])
    whole = torch.cat([delta.u.double() @ (delta.s[:, None] * delta.v.double().T) for delta in experts], 1)
    truth = torch.linalg.svd(whole).U[:, :3]
    assert side.vectors.shape == (24, 3) and subspace_overlap(side.vectors, truth) == pytest.approx(1, abs=1e-9)


def test_a_layer_without_change_has_no_overlap():
    a, b = (tensor_delta(f"model.layers.{i}.mlp.down_proj.weight", 24, 40, 3 * i, i) for i in range(2))
    (found,) = overlaps({a.name: a, b.name: b})
    assert math.isnan(found.overlap) and math.isnan(found.random) and (found.rank, found.other_rank) == (0, 3)
