"""The Triton kernels on the CPU, in Triton's interpreter.

`TRITON_INTERPRET=1 pytest tests/kernels/test_triton_interpreter.py`: Triton reads the variable when it is imported,
hence the process of its own.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 in a process of its own", allow_module_level=True)
pytest.importorskip("triton")

from bkdfast.triton_kernels import (  # noqa: E402
    cosine_monitor,
    delta_sketch,
    norm_tap,
    patch_heads,
    prefix_attention,
)

from tests.kernels import interpreter  # noqa: E402
from tests.kernels.attention_cases import (  # noqa: E402
    ATTENTION_LAYOUTS,
    ATTENTIONS,
    attention,
    check_attention,
    check_poisoned,
)
from tests.kernels.cases import (  # noqa: E402
    ADD,
    BF16,
    EDIT_LAYOUTS,
    EDITS,
    FP16,
    FP32,
    FP64,
    INF,
    INT32,
    MIX,
    NAN,
    NORMS,
    PATCH,
    SKETCH_DTYPES,
    SKETCHES,
    TOKEN_LAYOUTS,
    TOKENS,
    ZERO,
    check_edits,
    check_nan,
    check_norm,
    check_sketch,
    check_tokens,
    edits,
    norm,
    random_edits,
    sketch,
    tiny_norm,
    tokens,
)

interpreter.mend()
DTYPES = [FP32, FP16, BF16, FP64]


class TestPatchHeads:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", EDITS)
    def test_case(self, name, dtype):
        check_edits(patch_heads.launch, edits(*EDITS[name], dtype=dtype), "cpu")

    @pytest.mark.parametrize("layout", EDIT_LAYOUTS)
    @pytest.mark.parametrize("name", ["odd sizes", "neurons", "source per token", "meeting edits"])
    def test_any_strides(self, name, layout):
        z, *rest = edits(*EDITS[name])
        check_edits(patch_heads.launch, (EDIT_LAYOUTS[layout](z), *rest), "cpu")

    @pytest.mark.parametrize("seed", range(200))
    def test_random_tables(self, seed):
        check_edits(patch_heads.launch, random_edits(seed), "cpu")

    def test_a_table_longer_than_a_block_of_the_scan(self, monkeypatch):
        monkeypatch.setattr(patch_heads, "_blocks", lambda width: {"BLOCK_T": 4, "BLOCK_W": 2, "BLOCK_E": 4})
        # Edits 0 and 10 meet in row 0; the ones between are elsewhere.
        rows = [[0, 0, 0, 2, 0, 0, 0]] + [[1, 0, 0, 1, 1, 0, 0]] * 9 + [[-1, 1, 0, 9, 0, 1, 0]]
        check_edits(patch_heads.launch, edits((2, 3, 2, 2), rows, [ADD] * 10 + [MIX]), "cpu")

    def test_fewer_programs_than_tiles(self, monkeypatch):
        monkeypatch.setattr(patch_heads, "_PROGRAMS", 1)  # four parts of an edit
        arguments = edits((3, 70, 1, 64), [[-1, 0, 1, 69, 0, 0, 0], [1, 1, 30, 40, 0, 1, 0]], [ADD, MIX])
        check_edits(patch_heads.launch, arguments, "cpu")

    def test_nan_does_not_spread(self):
        z, table, scale, source, offset = edits(
            (1, 4, 2, 4), [[0, 0, 0, 4, 0, 0, 0], [0, 0, 0, 4, 1, 1, 0]], [ZERO, MIX]
        )
        z[..., :4] = NAN
        source[0] = INF
        check_edits(patch_heads.launch, (z, table, scale, source, offset), "cpu")
        scale[0] = torch.tensor(PATCH)
        source[0], source[1] = 2, NAN
        scale[1, 1] = 0
        check_edits(patch_heads.launch, (z, table, scale, source, offset), "cpu")
        # What an earlier edit of the same cells put there is replaced all the same.
        rows = [[0, 0, 0, 4, 0, 0, 0], [0, 1, 0, 3, 0, 1, 0], [0, 0, 0, 2, 0, 1, 0]]
        z, table, scale, source, offset = edits((1, 4, 2, 4), rows, [PATCH, PATCH, ZERO])
        source[0], source[1] = NAN, -0.0
        check_edits(patch_heads.launch, (z, table, scale, source, offset), "cpu")

    def test_what_is_not_there_is_left_alone(self):
        good = [1, 0, 1, 2, 1, 2, 0]
        bad = [[2, 0, 0, 3, 0, 0, 0], [-2, 0, 0, 3, 0, 0, 0], [0, 2, 0, 3, 0, 0, 0], [0, -1, 0, 3, 0, 0, 0]]
        bad += [[0, 0, 0, 3, 2, 0, 0], [0, 0, 0, 3, -1, 0, 0], [0, 0, 0, 3, 0, 8, 0], [0, 0, 0, 3, 0, -1, 0]]
        bad += [[0, 0, 0, 3, 0, INT32, 1], [0, INT32, 0, 3, 0, 0, 0]]
        z, table, scale, source, offset = edits((2, 3, 2, 4), [*bad, good, *bad], [MIX] * 21)
        want = z.clone()
        patch_heads.launch(want, table[10:11], scale[10:11], source, offset)
        assert (want != z).sum() == 4
        patch_heads.launch(z, table, scale, source, offset)
        assert torch.equal(z, want)

    def test_refuses_what_it_cannot_address(self):
        z, table, scale, source, offset = edits(*EDITS["one cell"])
        with pytest.raises(RuntimeError, match="patch_heads: z is expanded"):
            patch_heads.launch(z[:1].expand(2, -1, -1), table, scale, source, offset)
        with pytest.raises(RuntimeError, match="patch_heads: source must be contiguous"):
            patch_heads.launch(z, table, scale, source[::2], offset)


class TestCosineMonitor:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", TOKENS)
    def test_case(self, name, dtype):
        check_tokens(
            cosine_monitor.launch, tokens(*TOKENS[name], dtype=dtype, special=name.startswith("special")), "cpu"
        )

    @pytest.mark.parametrize("n", [1, 3, 8, 11, 70])
    @pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
    def test_blocks_of_a_step_with_any_strides(self, n, layout):
        x, *rest, _ = tokens(n, 40, 9, 4, 2, "mixed", blocks=2, layers=4, layer=2, seed=1)
        x = TOKEN_LAYOUTS[layout](x)
        rest[1] = torch.stack([rest[1], torch.full_like(rest[1], 9)], -1)[..., 0]  # tokens with gaps
        check_tokens(cosine_monitor.launch, (x, *rest, 2), "cpu")

    @pytest.mark.parametrize("seed", range(60))
    def test_random_segments(self, seed):
        n = (2, 7, 15, 67)[seed % 4]
        kind = ("one", "runs", "mixed")[seed % 3]
        check_tokens(cosine_monitor.launch, tokens(n, 24, 5, 1 + seed % 5, seed % 3, kind, seed=seed), "cpu")

    def test_extremes_of_both_signs_only_widen(self):
        x, *rest = tokens(30, 16, 3, 2, 1, "mixed")
        rest[3].copy_(torch.tensor([-1.0, 1.0])[:, None].expand_as(rest[3]) * 0.05)
        rest[3][:, 1] = torch.tensor([[0.9], [-0.9]])  # low above high: every cosine must widen both
        check_tokens(cosine_monitor.launch, (x, *rest), "cpu")


def _unfused(x, weight, bias, eps, kind):
    return norm_tap.launch(x, weight, bias, eps, kind, x.new_empty(0, 0, 0), 0)


class TestNorm:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("kind, bias", NORMS)
    @pytest.mark.parametrize("n, d", [(3, 64), (5, 37), (1, 1), (0, 8)])
    def test_norm_alone(self, n, d, kind, bias, dtype):
        arguments = norm(n, d, kind, bias, dtype=dtype)
        check_norm(_unfused(*arguments), arguments)

    @pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
    @pytest.mark.parametrize("kind, bias", NORMS)
    def test_tiny_values(self, kind, bias, dtype):
        arguments = tiny_norm(kind, bias, dtype=dtype)
        check_norm(_unfused(*arguments), arguments)

    @pytest.mark.parametrize("kind, bias", NORMS)
    def test_row_longer_than_a_block(self, kind, bias, monkeypatch):
        monkeypatch.setattr(norm_tap, "_row_blocks", lambda d: (32, 1))
        arguments = norm(3, 101, kind, bias)
        step = torch.zeros(2, 4, 101)
        check_norm(norm_tap.launch(*arguments, step, 1), arguments)
        assert torch.equal(step[1, :3], arguments[0]) and not step[0].any() and not step[1, 3].any()

    @pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_tap_keeps_the_rows(self, layout, dtype):
        x, *rest = norm(5, 24, 0, False, dtype=dtype)
        x[1, 2] = NAN
        x = TOKEN_LAYOUTS[layout](x)
        step = torch.full((3, 7, 24), 5.0, dtype=dtype)
        check_norm(norm_tap.launch(x, *rest, step, 2), (x, *rest))
        torch.testing.assert_close(step[2, :5], x, rtol=0, atol=0, equal_nan=True)
        assert (step[:2] == 5).all() and (step[2, 5:] == 5).all()

    @pytest.mark.parametrize("fuse", [True, False], ids=["fused", "two kernels"])
    @pytest.mark.parametrize("kind, bias", NORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_norm_monitor(self, dtype, kind, bias, fuse, monkeypatch):
        monkeypatch.setattr(norm_tap, "FUSE_FROM", 1 if fuse else 1 << 30)
        _, weight, shift, eps, _ = norm(1, 70, kind, bias, dtype=dtype)
        self.check_monitor(tokens(40, 70, 20, 3, 2, "runs", dtype=dtype), weight, shift, eps, kind)

    @pytest.mark.parametrize("name", TOKENS)
    def test_norm_monitor_case(self, name, monkeypatch):
        monkeypatch.setattr(norm_tap, "FUSE_FROM", 1)
        arguments = tokens(*TOKENS[name], special=name.startswith("special"))
        self.check_monitor(arguments, torch.ones(arguments[0].shape[1]), None, 1e-6, 0)

    @pytest.mark.parametrize("layout", TOKEN_LAYOUTS)
    def test_norm_monitor_any_strides(self, layout, monkeypatch):
        monkeypatch.setattr(norm_tap, "FUSE_FROM", 1)
        x, *rest = tokens(35, 20, 5, 3, 2, "mixed")
        self.check_monitor((TOKEN_LAYOUTS[layout](x), *rest), torch.ones(20), None, 1e-6, 3)

    @staticmethod
    def check_monitor(arguments, weight, bias, eps, kind):
        def launch(x, *rest):
            y = norm_tap.launch_norm_monitor(x, weight, bias, eps, kind, *rest)
            check_norm(y, (x, weight, bias, eps, kind))

        check_tokens(launch, arguments, "cpu")


class TestDeltaSketch:
    @pytest.mark.parametrize("dtypes", SKETCH_DTYPES, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d))
    @pytest.mark.parametrize("name", SKETCHES)
    def test_case(self, name, dtypes):
        check_sketch(delta_sketch.launch, sketch(*SKETCHES[name], dtypes), "cpu")

    @pytest.mark.parametrize("programs", [1, 2, 3])
    def test_a_program_adds_its_panels(self, programs, monkeypatch):
        monkeypatch.setattr(delta_sketch, "_PROGRAMS", programs)
        check_sketch(delta_sketch.launch, sketch(150, 40, 5), "cpu")

    def test_workspace_bounds_the_programs(self, monkeypatch):
        monkeypatch.setattr(delta_sketch, "_WORKSPACE", 1)
        check_sketch(delta_sketch.launch, sketch(70, 20, 3), "cpu")

    def test_strides(self):
        w0, w1, _ = sketch(24, 18, 1)
        x = torch.randn(24, 6)[:, ::2]
        check_sketch(delta_sketch.launch, (w0.T, w1.T, x), "cpu")
        check_sketch(delta_sketch.launch, (w0.T, w1.T.contiguous(), x), "cpu")
        check_sketch(delta_sketch.launch, (w0[::2, 3:], w1[::2, 3:], torch.randn(15, 2)), "cpu")
        check_sketch(delta_sketch.launch, (w0[:1].expand(5, 18), w1[:5], torch.randn(2, 18).T), "cpu")

    def test_no_change_is_exactly_zero(self):
        w0, _, x = sketch(40, 20, 4, (BF16, BF16))
        y, z, square, changed = check_sketch(delta_sketch.launch, (w0, w0.float(), x), "cpu")
        assert changed == 0 and square == 0 and not y.any() and not z.any()
        assert delta_sketch.launch(torch.zeros(2, 2), -torch.zeros(2, 2), torch.eye(2))[3] == 0

    def test_squares_of_tiny_deltas_do_not_vanish(self):
        square = delta_sketch.launch(torch.zeros(10, 10), torch.full((10, 10), 1e-25), torch.eye(10))[2]
        assert square.item() == pytest.approx(1e-48, rel=1e-6, abs=0)

    def test_double_minus_single_is_taken_in_double(self):
        w1 = torch.full((4, 4), 1 + 1e-10, dtype=FP64)
        _, _, square, changed = delta_sketch.launch(torch.ones(4, 4), w1, torch.eye(4))
        assert changed == 16 and square.item() == pytest.approx(16e-20, rel=1e-6, abs=0)

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("side", ["base", "tuned", "both"])
    def test_non_finite_spreads_as_it_should(self, value, side):
        w0, w1, x = sketch(40, 20, 3)
        for name, weight in (("base", w0), ("tuned", w1)):
            if side in (name, "both"):
                weight[4, 5] = value
        check_sketch(delta_sketch.launch, (w0, w1, x), "cpu")


def test_nan_directions_and_ranges():
    check_nan(cosine_monitor.launch, "cpu")


@pytest.fixture
def wide(monkeypatch):
    """The interpreter's tl.dot cannot multiply bfloat16."""
    operands = prefix_attention._OPERANDS
    monkeypatch.setitem(operands, BF16, operands[FP32])


@pytest.mark.usefixtures("wide")
class TestPrefixAttention:
    @pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
    @pytest.mark.parametrize("name", ATTENTIONS)
    def test_case(self, name, dtype):
        check_attention(prefix_attention.launch, attention(*ATTENTIONS[name], dtype=dtype), "cpu", rounded=True)

    @pytest.mark.parametrize("dtype", [FP16, FP64], ids=str)
    @pytest.mark.parametrize("name", ["suffixes of three variants", "head_dim 80", "left padding", "softcap and sinks"])
    def test_other_dtypes(self, name, dtype):
        check_attention(prefix_attention.launch, attention(*ATTENTIONS[name], dtype=dtype), "cpu", rounded=True)

    @pytest.mark.parametrize("layout", ATTENTION_LAYOUTS)
    def test_any_strides(self, layout):
        *tensors, mask, scale, softcap, sinks = attention(*ATTENTIONS["suffixes of three variants"])
        tensors = [ATTENTION_LAYOUTS[layout](x) for x in tensors]
        wide = torch.cat([mask, ~mask], 2)[..., : mask.shape[2]]
        check_attention(prefix_attention.launch, (*tensors, wide, scale, softcap, sinks), "cpu")
        shared = mask[:1].expand(mask.shape)
        check_attention(prefix_attention.launch, (*tensors, shared, scale, softcap, sinks), "cpu")

    @pytest.mark.filterwarnings("ignore:invalid value")
    @pytest.mark.parametrize("value", [NAN, INF])
    def test_what_is_not_seen_does_not_reach(self, value):
        check_poisoned(prefix_attention.launch, "cpu", value, ["left padding", "sliding window"])

    def test_offsets_beyond_32_bits(self):
        memory = torch.empty(2_600_000_000, dtype=FP16)  # never touched but at the entries
        q, k, v, prefix_k, *rest = attention(3, 1, 2, 1, 2, 3, 8, "causal", 0.0, False, dtype=FP16)
        want = prefix_attention.launch(q, k, v, prefix_k, *rest)
        for moved in range(3):
            tensors = [q, k, v]
            far = memory.as_strided(tensors[moved].shape, (1_290_000_000, 16, 8, 1))
            tensors[moved] = far.copy_(tensors[moved])
            assert torch.equal(prefix_attention.launch(*tensors, prefix_k, *rest), want)
        prefix_v, *rest = rest
        far = memory.as_strided(prefix_k.shape, (8, 8, 1_290_000_000, 1))
        assert torch.equal(prefix_attention.launch(q, k, v, far.copy_(prefix_k), prefix_v, *rest), want)
        assert torch.equal(prefix_attention.launch(q, k, v, prefix_k, far.copy_(prefix_v), *rest), want)

    def test_refuses_what_it_cannot_address(self):
        q, *rest = attention(*ATTENTIONS["one token"])
        with pytest.raises(RuntimeError, match="prefix_attention: q's last dimension must be contiguous"):
            prefix_attention.launch(torch.stack([q, q], -1)[..., 0], *rest)
