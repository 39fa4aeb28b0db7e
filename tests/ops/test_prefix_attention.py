"""`prefix_attention` against a float64 loop and against plain attention, over backends, masks, layouts and dtypes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bkdfast.errors import BackendError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops.prefix_attention import OP, prefix_attention
from tests.kernels.attention_cases import (
    ATTENTION_LAYOUTS,
    ATTENTIONS,
    POISONED,
    attention,
    check_attention,
    check_poisoned,
)
from tests.kernels.cases import BF16, FP16, FP32, FP64, INF, NAN

BACKENDS = ["cpp", "reference"]


def resolved(name):
    status = OP.backends()[name]
    if status != "available":
        pytest.skip(status)
    return OP.resolve(name)


@pytest.fixture(params=BACKENDS)
def serve(request):
    return resolved(request.param)


def call(arguments, **changes):
    """The public function."""
    *tensors, scale, softcap, sinks = arguments
    return prefix_attention(*tensors, **{"scale": scale, "softcap": softcap, "sinks": sinks, **changes})


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP64], ids=str)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_case(name, dtype, serve):
    check_attention(serve, attention(*ATTENTIONS[name], dtype=dtype), "cpu")


LONG = [  # more keys than the C++ kernel weighs at a time, ending in the prefix, with it, in the suffix; more rows
    (2, 2, 2, 1, 3, 1100, 16, "padded", 0.0, True),
    (2, 1, 2, 2, 40, 512, 16, "causal", 0.0, False),
    (1, 2, 1, 1, 70, 500, 16, "random", 0.0, False),
    (1, 1, 1, 1, 600, 10, 16, "causal", 0.0, True),
    (1, 2, 1, 1, 590, 30, 16, "window", 0.0, False),
    (70, 1, 3, 1, 5, 90, 40, "window", 0.0, False),
]


@pytest.mark.parametrize("size", LONG, ids=str)
def test_many_keys_and_rows(size, serve):
    check_attention(serve, attention(*size), "cpu")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("layout", ATTENTION_LAYOUTS)
def test_any_strides(layout, dtype, serve):
    *tensors, mask, scale, softcap, sinks = attention(*ATTENTIONS["any mask"], dtype=dtype)
    tensors = [ATTENTION_LAYOUTS[layout](x) for x in tensors]
    wide = torch.cat([mask, ~mask], 2)[..., : mask.shape[2]]
    check_attention(serve, (*tensors, wide, scale, softcap, sinks), "cpu")
    shared = mask[:1].expand(mask.shape)
    check_attention(serve, (*tensors, shared, scale, softcap, sinks), "cpu")


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_that_only_the_function_takes(backend):
    resolved(backend)
    *tensors, mask, scale, softcap, sinks = attention(*ATTENTIONS["softcap and sinks"])
    want = prefix_attention(*tensors, mask, scale=scale, softcap=softcap, sinks=sinks, backend=backend)
    apart = [torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0] for x in tensors]
    sinks = torch.stack([sinks, sinks], -1)[:, 0].double()
    got = prefix_attention(*apart, mask.mT.contiguous().mT, scale=scale, softcap=softcap, sinks=sinks, backend=backend)
    assert torch.equal(got, want)


def test_offsets_beyond_32_bits(serve):
    """Rows, and keys of the prefix, 2**31 elements apart and more."""
    memory = torch.empty(2_600_000_000, dtype=BF16)  # never touched but at the entries
    q, k, v, prefix_k, *rest = attention(3, 1, 2, 1, 2, 3, 8, "causal", 0.0, False, dtype=BF16)
    want = serve(q, k, v, prefix_k, *rest)
    for moved in range(3):
        tensors = [q, k, v]
        far = memory.as_strided(tensors[moved].shape, (1_290_000_000, 16, 8, 1))
        tensors[moved] = far.copy_(tensors[moved])
        assert torch.equal(serve(*tensors, prefix_k, *rest), want)
    prefix_v, *rest = rest
    far = memory.as_strided(prefix_k.shape, (8, 8, 1_290_000_000, 1))
    assert torch.equal(serve(q, k, v, far.copy_(prefix_k), prefix_v, *rest), want)
    assert torch.equal(serve(q, k, v, prefix_k, far.copy_(prefix_v), *rest), want)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_seen_does_not_reach(value, serve):
    check_poisoned(serve, "cpu", value, POISONED if value is NAN else POISONED[:1])


def test_a_query_that_sees_nothing_gives_zero(serve):
    for name in ("nothing seen", "nothing but the sink"):
        q, k, v, *rest = attention(*ATTENTIONS[name])
        assert not serve(q * NAN, k * NAN, v * NAN, *rest).any()


sizes = st.tuples(
    st.integers(1, 6), st.integers(1, 3), st.sampled_from([(1, 1), (3, 3), (4, 2), (6, 1)]), st.integers(1, 20),
    st.integers(0, 70), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**31),
)  # fmt: skip


def drawn(variants, batch, heads, length, past, width, density, seed):
    """Arguments in float64 whose mask has that share of seen keys, at least one a query."""
    q, k, v, prefix_k, prefix_v, mask, *rest = attention(
        variants, batch, *heads, length, past, width, "causal", 0.0, False, dtype=FP64, seed=seed
    )
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(mask.shape, generator=g) < density
    mask.scatter_(2, torch.randint(0, past + length, (batch, length, 1), generator=g), True)
    return q, k, v, prefix_k, prefix_v, mask, *rest


@pytest.mark.parametrize("backend", BACKENDS)
@given(sizes)
def test_equals_plain_attention_over_a_copied_prefix(backend, size):
    serve = resolved(backend)
    q, k, v, prefix_k, prefix_v, mask, scale, *rest = drawn(*size)
    variants = size[0]
    want = torch.nn.functional.scaled_dot_product_attention(
        q,
        torch.cat([prefix_k.repeat(variants, 1, 1, 1), k], 2),
        torch.cat([prefix_v.repeat(variants, 1, 1, 1), v], 2),
        mask.repeat(variants, 1, 1)[:, None],
        scale=scale,
        enable_gqa=True,
    )
    got = serve(q, k, v, prefix_k, prefix_v, mask, scale, *rest)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
@given(sizes)
def test_variants_do_not_know_each_other(backend, size):
    serve = resolved(backend)
    q, k, v, prefix_k, prefix_v, *rest = drawn(*size)
    order = torch.randperm(size[0])
    batch = size[1]

    def rows(x):
        return x.unflatten(0, (-1, batch))[order].flatten(0, 1)

    got = serve(rows(q), rows(k), rows(v), prefix_k, prefix_v, *rest)
    want = rows(serve(q, k, v, prefix_k, prefix_v, *rest))
    torch.testing.assert_close(got, want, rtol=1e-12 if backend == "reference" else 0, atol=1e-14)


@pytest.mark.parametrize("size", [(40, 2, 4, 2, 9, 70, 40), (2, 1, 2, 2, 90, 70, 16)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(size):
    serve = resolved("cpp")
    arguments = attention(*size, "causal", 0.0, True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(serve(*arguments))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_the_kernel_serves_by_itself():
    resolved("cpp")
    arguments = attention(*ATTENTIONS["softcap and sinks"])
    assert torch.equal(call(arguments), call(arguments, backend="cpp"))


def test_what_a_call_leaves_in_memory_does_not_reach_the_next(serve):
    poison = [x * NAN if torch.is_tensor(x) and x.is_floating_point() else x for x in attention(*ATTENTIONS["sinks"])]
    for width in (1, 7, 16, 17):
        arguments = attention(3, 2, 4, 2, 5, 19, width, "padded", 0.0, True)
        for _ in range(3):
            serve(*poison)
        assert serve(*arguments).isfinite().all()


@pytest.mark.parametrize("name", ["left padding", "softcap and sinks", "no prefix", "no tokens"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=str)
def test_opcheck(name, dtype):
    q, *rest = attention(*ATTENTIONS[name], dtype=dtype)
    q = ATTENTION_LAYOUTS["heads inside"](q)
    torch.library.opcheck(torch.ops.bkdfast.prefix_attention.default, (q, *rest))


def test_compiles_into_one_graph(fresh_dynamo):
    def block(q, k, v, prefix_k, prefix_v, mask, sinks):
        heads = [x.unflatten(2, (-1, 16)).transpose(1, 2) for x in (q, k, v)]
        out = prefix_attention(*heads, prefix_k, prefix_v, mask, scale=0.25, softcap=3.0, sinks=sinks)
        return out.flatten(2) * 2

    arguments = attention(3, 2, 4, 2, 5, 19, 16, "padded", 3.0, True)
    inputs = [x.transpose(1, 2).flatten(2) for x in arguments[:3]] + [*arguments[3:6], arguments[8]]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), block(*inputs))


def test_autocast_does_not_reach_the_products(serve):
    arguments = attention(*ATTENTIONS["sinks"])
    with torch.autocast("cpu", torch.bfloat16):
        found = serve(*arguments)
    assert torch.equal(found, serve(*arguments))


Q, K, PAST, MASK = torch.ones(4, 4, 3, 8), torch.ones(4, 2, 3, 8), torch.ones(2, 2, 5, 8), torch.ones(2, 3, 8) > 0


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"q": Q[0]}, InvalidArgumentError, r"q must be \[R, H, S, Dh\].* found \(4, 3, 8\)"),
        ({"v": K[:, :1]}, InvalidArgumentError, r"\(4, 2, 3, 8\) and \(4, 1, 3, 8\)"),
        ({"k": K[:, :, :2], "v": K[:, :, :2]}, InvalidArgumentError, r"must be \[4, Hkv, 3, 8\] like q"),
        ({"q": torch.ones(4, 3, 3, 8)}, InvalidArgumentError, "dividing q's 3 heads"),
        ({"prefix_v": PAST[:, :, :4]}, InvalidArgumentError, r"found \(2, 2, 5, 8\) and \(2, 2, 4, 8\)"),
        ({"prefix_k": PAST[..., :4], "prefix_v": PAST[..., :4]}, InvalidArgumentError, r"\[B, 2, P, 8\]"),
        ({"q": Q[:3], "k": K[:3], "v": K[:3]}, InvalidArgumentError, "3 rows, which are not whole variants of .* 2"),
        ({"mask": MASK[..., 1:]}, InvalidArgumentError, r"\(2, 3, 8\), found \(2, 3, 7\)"),
        ({"mask": MASK.float()}, InvalidTypeError, "mask must be bool.* found torch.float32"),
        ({"sinks": torch.ones(2)}, InvalidArgumentError, r"sinks must be \[H\] = \(4,\), found \(2,\)"),
        ({"softcap": -1.0}, InvalidArgumentError, "softcap at least 0, found 1.0 and -1.0"),
        ({"scale": NAN}, InvalidArgumentError, "scale must be finite"),
        ({"k": K.half()}, InvalidTypeError, "k is torch.float16 but q is torch.float32; cast it"),
        ({"q": Q.int()}, InvalidTypeError, "q must be .* found torch.int32"),
        ({"prefix_k": PAST.to("meta")}, InvalidArgumentError, "prefix_k is on meta but q is on cpu"),
        ({"q": Q.clone().requires_grad_()}, InvalidArgumentError, "no gradient"),
        ({"backend": "abacus"}, BackendError, "not one of"),
        ({"backend": "triton"}, BackendError, "triton"),
    ],
)  # fmt: skip
def test_bad_arguments(changes, error, says):
    good = {"q": Q, "k": K, "v": K, "prefix_k": PAST, "prefix_v": PAST, "mask": MASK, "scale": 1.0}
    with pytest.raises(error, match=says):
        prefix_attention(**good | changes)


def test_parameters_are_fine_without_grad_mode():
    with torch.no_grad():
        out = prefix_attention(Q.clone().requires_grad_(), K, K, PAST, PAST, MASK, scale=1.0)
    assert (out == 1).all()
