"""`patch_heads` against a float64 oracle that edits one cell at a time, over tables, layouts, dtypes and backends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkdfast import BkdfastError, EditTable, patch_heads
from bkdfast.errors import InvalidArgumentError, InvalidTypeError
from bkdfast.ops.edit_table import OPEN
from bkdfast.ops.patch_heads import _op

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = [FP16, BF16, FP32, FP64]
BACKENDS = ["cpp", "reference"]
INT32 = 2**31 - 1
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=BACKENDS)
def backend(request):
    if _op.backends()[request.param] != "available":
        pytest.skip(_op.backends()[request.param])
    return request.param


def oracle(z, table, coefficients, source, offset):
    """(result, error bound, edited cells), all `[B, T, S*W]`; the bound is one rounding a term and a store."""
    eps = torch.finfo(z.dtype).eps
    width = source.shape[1]
    value, bound = z.double().tolist(), torch.zeros(z.shape, dtype=FP64).tolist()
    edited = torch.zeros(z.shape, dtype=torch.bool)
    for (row, origin, start, stop, piece, entry, stride), (a, b) in zip(
        table.tolist(), coefficients.double().tolist(), strict=True
    ):
        for i in range(z.shape[0] if start < stop else 0):
            for t in range(z.shape[1]):
                position = t + int(offset[origin, i])
                if row not in (-1, i) or not start <= position < stop:
                    continue
                for w in range(width):
                    c = piece * width + w
                    kept = 0.0 if a == 0 else a * value[i][t][c]
                    added = 0.0 if b == 0 else b * float(source[entry + stride * (position - start), w])
                    value[i][t][c] = kept + added
                    bound[i][t][c] = abs(a) * bound[i][t][c] + eps * (abs(kept) + abs(added))
                    edited[i, t, c] = True
    return torch.tensor(value, dtype=FP64).view(z.shape), torch.tensor(bound, dtype=FP64).view(z.shape), edited


def bits(z):
    return z.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[z.element_size()])


def check(z, table, coefficients, source, offset, backend):
    """Run the op on a copy of z with the same strides and compare it with the oracle; returns the result."""
    want, bound, edited = oracle(z, table, coefficients, source, offset)
    got = torch.empty_strided(z.shape, z.stride(), dtype=z.dtype).copy_(z)
    edits = EditTable(table, coefficients, source)
    before = [t.clone() for t in (table, coefficients, source, offset)]
    assert patch_heads(got, edits, offset, backend=backend) is got
    assert torch.equal(bits(got)[~edited], bits(z)[~edited]), "a cell outside the edits changed"
    error = (got.double() - want).abs()
    assert ((error <= bound) | (got.double() == want))[edited].all(), f"off by {error[edited].max()}"
    for was, now in zip(before, (table, coefficients, source, offset), strict=True):
        assert torch.equal(bits(was), bits(now)), "an input changed"
    return got


def make(shape, rows, coefficients, *, sources=8, offset=None, dtype=FP32, seed=0):
    """z and the op's arguments; |z| and |source| are in [1, 2): a wrong or missing edit is far outside any bound."""
    b, t, s, w = shape
    g = torch.Generator().manual_seed(seed)
    accumulate = FP64 if dtype == FP64 else FP32

    def draw(*size):
        signs = torch.randint(0, 2, size, generator=g) * 2 - 1
        return signs * (1 + torch.rand(size, generator=g, dtype=FP64))

    z = draw(b, t, s * w).to(dtype)
    table = torch.tensor(rows, dtype=torch.int32).view(-1, 7)
    ab = torch.tensor(coefficients, dtype=accumulate).view(-1, 2)
    first = torch.zeros(2, b, dtype=torch.int32) if offset is None else torch.tensor(offset, dtype=torch.int32)
    return z, table, ab, draw(sources, w).to(accumulate), first


ZERO, PATCH, ADD, SCALE, MIX = (0.0, 0.0), (0.0, 1.0), (1.0, 0.75), (-0.5, 0.0), (0.3, -1.7)
# name: (B, T, S, W), rows of the table, coefficients, offset, edited cells of z / W
CASES = {
    "one cell": ((2, 5, 3, 4), [[1, 0, 2, 3, 1, 3, 0]], [ZERO], None, 1),
    "odd sizes": ((3, 7, 5, 13), [[2, 0, 1, 6, 4, 7, 0], [0, 0, 0, 7, 0, 1, 0]], [PATCH, MIX], None, 12),
    "one token": ((4, 1, 3, 5), [[-1, 0, 0, 1, 2, 3, 0]], [ADD], None, 4),
    "one head": ((2, 4, 1, 6), [[-1, 0, 1, 3, 0, 2, 0]], [MIX], None, 4),
    "one row": ((1, 3, 2, 2), [[0, 0, 0, 3, 1, 0, 0]], [SCALE], None, 3),
    "neurons": ((2, 3, 9, 1), [[-1, 0, 0, 3, 8, 1, 0], [1, 0, 0, 2, 0, 4, 0]], [PATCH, ADD], None, 8),
    "wide": ((2, 3, 2, 129), [[0, 0, 0, 3, 1, 0, 1], [1, 0, 1, 3, 1, 4, 1]], [PATCH, MIX], None, 5),
    "all rows": ((3, 4, 2, 4), [[-1, 0, -OPEN, OPEN, 1, 5, 0]], [PATCH], None, 12),
    "open start": ((2, 6, 2, 4), [[-1, 1, -OPEN, 1, 0, 0, 0]], [ZERO], [[0, 0], [-2, -5]], 9),
    "open end": ((2, 6, 2, 4), [[-1, 1, 1, OPEN, 0, 0, 0]], [SCALE], [[0, 0], [-2, -5]], 3),
    "source per token": ((2, 6, 2, 4), [[0, 0, 1, 6, 1, 2, 1], [1, 0, 0, 4, 0, 4, 1]], [PATCH, MIX], None, 9),
    "decode": ((3, 1, 2, 4), [[-1, 0, 4, 6, 0, 2, 1], [1, 1, 1, OPEN, 1, 0, 0]], [PATCH, ADD],
               [[4, 5, 9], [1, 1, 1]], 3),
    "chunk": ((2, 3, 2, 4), [[-1, 0, 2, 8, 1, 0, 1]], [MIX], [[1, 7], [0, 0]], 3),
    "left padding": ((2, 5, 2, 4), [[-1, 0, 0, 2, 0, 3, 1]], [ADD], [[0, -3], [0, 0]], 4),
    "beside the call": ((2, 3, 2, 4), [[-1, 0, 3, 9, 0, 0, 0], [-1, 0, -9, 0, 1, 0, 0]], [ZERO, ZERO], None, 0),
    "empty spans": ((2, 3, 2, 4), [[0, 0, 2, 2, 0, 0, 0], [9, 9, 0, 0, 9, 99, 9]], [PATCH, PATCH], None, 0),
    "no edits": ((2, 3, 2, 4), [], [], None, 0),
    "no rows": ((0, 3, 2, 4), [[-1, 0, 0, 3, 0, 0, 0]], [PATCH], None, 0),
    "no tokens": ((2, 0, 2, 4), [[-1, 0, 0, 3, 0, 0, 0], [1, 0, 0, 3, 0, 0, 0]], [PATCH, ZERO], None, 0),
    "far offsets": ((2, 3, 2, 4), [[-1, 0, -OPEN, OPEN, 0, 1, 0], [-1, 1, 0, 3, 1, 0, 0]], [PATCH, ZERO],
                    [[-INT32, INT32], [-INT32, INT32]], 0),
    "meeting edits": ((2, 4, 2, 4), [[-1, 0, 0, 4, 0, 1, 0], [0, 1, 0, 2, 0, 2, 0], [0, 0, 1, 3, 0, 3, 1]],
                      [ADD, MIX, (2.0, 1.0)], [[0, 0], [-1, -1]], 8),
    "unread source": ((2, 3, 2, 4), [[-1, 0, 0, 3, 0, 999, 0], [0, 0, 0, 3, 1, -7, 1]], [SCALE, ZERO], None, 9),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_case(name, dtype, backend):
    shape, rows, coefficients, offset, cells = CASES[name]
    z, *arguments = make(shape, rows, coefficients, offset=offset, dtype=dtype)
    got = check(z, *arguments, backend)
    if name != "meeting edits":  # by the table above, not by the oracle
        changed = (got != z).unflatten(2, (shape[2], shape[3])).any(-1)
        assert changed.sum() == cells


LAYOUTS = {
    "batch and tokens swapped": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "head dimension first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "every other cell": lambda z: torch.stack([z, torch.full_like(z, 7)], -1).flatten(2)[..., ::2],
    "a part of a wider tensor": lambda z: torch.cat([torch.full_like(z, 7), z, torch.full_like(z, 7)], 2)[
        ..., z.shape[2] : 2 * z.shape[2]
    ],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["odd sizes", "neurons", "source per token", "meeting edits"])
def test_any_strides(name, layout, dtype, backend):
    shape, rows, coefficients, offset, _ = CASES[name]
    z, *arguments = make(shape, rows, coefficients, offset=offset, dtype=dtype)
    strided = LAYOUTS[layout](z)
    assert not strided.is_contiguous() and torch.equal(strided, z)
    surroundings = strided._base.clone()
    got = check(strided, *arguments, backend)
    assert torch.equal(got, check(z, *arguments, backend))
    # In place on the view itself: nothing of the base outside the view may move.
    patch_heads(strided, EditTable(*arguments[:3]), arguments[3], backend=backend)
    assert torch.equal(strided, got)
    strided.copy_(z)
    assert torch.equal(strided._base, surroundings)


def test_memory_beside_z(backend):
    z, table, ab, source, offset = make((2, 3, 2, 4), *CASES["source per token"][1:3])
    want = check(z, table, ab, source, offset, backend)
    for begin in (0, z.numel()):  # the source ends where z begins; z ends where the source begins
        memory = torch.cat([z.flatten(), source.flatten(), z.flatten()])
        inside = memory[begin and source.numel() + z.numel() :][: z.numel()].view(z.shape).copy_(z)
        patch_heads(inside, EditTable(table, ab, memory[z.numel() : -z.numel()].view(8, 4)), offset, backend=backend)
        assert torch.equal(inside, want)
    one = torch.zeros(40).as_strided((1, 3, 8), (1, 8, 1)).copy_(z[:1])  # of a single row the stride says nothing
    patch_heads(one, EditTable(table[:1], ab[:1], source), offset, backend=backend)
    assert torch.equal(one, want[:1])


@pytest.mark.parametrize("layout", ["expanded over rows", "every other row", "origins inside"])
def test_any_strides_of_the_offset(layout, backend):
    shape, rows, coefficients, offset, _ = CASES["decode"]
    z, table, ab, source, first = make(shape, rows, coefficients, offset=offset)
    strided = {
        "expanded over rows": first[:, :1].expand(2, 3),
        "every other row": torch.stack([first, torch.full_like(first, 99)], -1).flatten(1)[:, ::2],
        "origins inside": first.T.contiguous().T,
    }[layout]
    assert not strided.is_contiguous()
    check(z, table, ab, source, strided, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_reference_bit_for_bit(name, dtype):
    if _op.backends()["cpp"] != "available":
        pytest.skip(_op.backends()["cpp"])
    shape, rows, coefficients, offset, _ = CASES[name]
    z, table, ab, source, first = make(shape, rows, coefficients, offset=offset, dtype=dtype)
    z.view(-1)[::3] *= 0.0  # both signs of zero
    source[::2] *= -0.0
    edits = EditTable(table, ab, source)
    one, other = (patch_heads(z.clone(), edits, first, backend=b) for b in BACKENDS)
    assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_read_does_not_spread(dtype, backend):
    z, table, ab, source, offset = make((2, 3, 3, 4), [[-1, 0, 0, 3, s, s, 0] for s in range(3)], [ZERO, PATCH, SCALE])
    z[:, :, :8], source[2] = NAN, INF
    source[0, 1] = NAN
    z, ab, source = z.to(dtype), ab.to(FP64 if dtype == FP64 else FP32), source.to(FP64 if dtype == FP64 else FP32)
    got = check(z, table, ab, source, offset, backend)
    assert (got[:, :, :4] == 0).all() and torch.isfinite(got).all()
    z[0, 1, 8], source[1, 2] = NAN, INF  # while what is read arrives
    got = patch_heads(z, EditTable(table, ab, source), offset, backend=backend)
    assert got[0, 1, 8].isnan() and (got[:, :, 6] == INF).all() and got.isnan().sum() == 1


MUTATIONS = {
    "dropped": lambda table: table[:-1],
    "one token late": lambda table: table + torch.tensor([0, 0, 1, 1, 0, 0, 0]),
    "one token early": lambda table: table - torch.tensor([0, 0, 1, 1, 0, 0, 0]),
    "one token short": lambda table: table - torch.tensor([0, 0, 0, 1, 0, 0, 0]),
    "wrong head": lambda table: table * torch.tensor([1, 1, 1, 1, 0, 1, 1]),
    "wrong source": lambda table: table + torch.tensor([0, 0, 0, 0, 0, 1, 0]),
    "wrong row": lambda table: table * torch.tensor([0, 1, 1, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees_a_broken_engine(mutation, dtype, monkeypatch):
    z, table, ab, source, offset = make((2, 6, 3, 5), [[1, 0, 2, 5, 2, 1, 1]], [MIX], dtype=dtype)
    check(z, table, ab, source, offset, "reference")
    broken = _op.reference

    def engine(z, table, ab, source, offset):
        table = MUTATIONS[mutation](table).to(torch.int32)
        broken(z, table, ab[: len(table)], source, offset)

    monkeypatch.setattr(_op, "reference", engine)
    with pytest.raises(AssertionError):
        check(z, table, ab, source, offset, "reference")


def random_table(data):
    small = st.integers
    b, t, s, w = (data.draw(small(0, 3)), data.draw(small(0, 4)), data.draw(small(1, 3)), data.draw(small(1, 3)))
    bound = st.one_of(small(-4, 8), st.sampled_from([-OPEN, OPEN]))
    rows, coefficients, sources = [], [], 16
    for _ in range(data.draw(small(0, 5))):
        start, stop = data.draw(bound), data.draw(bound)
        stride = 0 if start == -OPEN else data.draw(small(0, 1))
        row = data.draw(small(-1, b - 1)) if b else -1
        rows.append(
            [row, data.draw(small(0, 1)), start, stop, data.draw(small(0, s - 1)), data.draw(small(0, 2)), stride]
        )
        coefficients.append(data.draw(st.sampled_from([ZERO, PATCH, ADD, SCALE, MIX])))
    offset = [[data.draw(small(-3, 6)) for _ in range(b)] for _ in range(2)]
    return (b, t, s, w), rows, coefficients, sources, offset


@settings(max_examples=400)
@given(data=st.data())
def test_random_tables(data):
    shape, rows, coefficients, sources, offset = random_table(data)
    dtype = data.draw(st.sampled_from(DTYPES))
    arguments = make(shape, rows, coefficients, sources=sources, offset=offset, dtype=dtype)
    for name in BACKENDS:
        if _op.backends()[name] == "available":
            check(*arguments, name)


def test_thousands_of_random_tables(backend):
    g = torch.Generator().manual_seed(5)
    changed = 0
    for seed in range(1500):
        start = torch.randint(-3, 7, (4,), generator=g)
        rows = torch.stack(
            [
                torch.randint(-1, 2, (4,), generator=g),
                torch.randint(0, 2, (4,), generator=g),
                start,
                start + torch.randint(0, 5, (4,), generator=g),
                torch.randint(0, 2, (4,), generator=g),
                torch.randint(0, 3, (4,), generator=g),
                torch.randint(0, 2, (4,), generator=g),
            ],
            1,
        ).tolist()
        coefficients = (torch.randint(-2, 3, (4, 2), generator=g) / 2).tolist()
        offset = torch.randint(-2, 5, (2, 2), generator=g).tolist()
        arguments = make((2, 3, 2, 2), rows, coefficients, offset=offset, dtype=DTYPES[seed % 4], seed=seed)
        changed += not torch.equal(check(*arguments, backend), arguments[0])
    assert changed > 1000, "most tables must edit something"


def test_result_does_not_depend_on_threads():
    rows = [[i, 0, -OPEN, OPEN, s, s, 0] for i in range(16) for s in range(8)]
    rows += [[-1, 0, 5, 500, s, 8 + s, 0] for s in range(8)]  # meets all of the above
    z, table, ab, source, offset = make((16, 640, 8, 16), rows, [MIX] * len(rows), sources=16)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(patch_heads(z.clone(), EditTable(table, ab, source), offset))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert (results[0] != z).all()


@pytest.mark.parametrize("stride", [(2**31, 1024, 1), (8, 2**30 + 16, 1)], ids=["rows", "tokens"])
def test_offsets_beyond_32_bits(stride, backend):
    try:
        storage = torch.empty(2**31 + 4096, dtype=BF16)  # 4.3 GB of addresses, of which a few pages are touched
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    shape = (2, 2, 2, 4) if stride[0] == 2**31 else (1, 3, 2, 4)
    rows = [[shape[0] - 1, 0, shape[1] - 1, shape[1], 1, 3, 0], [-1, 0, 0, 1, 0, 2, 0]]
    z, table, ab, source, offset = make(shape, rows, [PATCH, ADD], dtype=BF16)
    far = storage.as_strided(z.shape, stride).copy_(z)
    patch_heads(far, EditTable(table, ab, source), offset, backend=backend)
    assert torch.equal(far, check(z, table, ab, source, offset, backend)) and not torch.equal(far, z)


OUT_OF_RANGE = {
    "row too high": ([2, 0, 0, 1, 0, 0, 0], "row 2.*2 rows"),
    "row below -1": ([-2, 0, 0, 1, 0, 0, 0], "row -2"),
    "origin": ([0, 2, 0, 1, 0, 0, 0], "origin 2.*2 origins"),
    "slice": ([0, 0, 0, 1, 3, 0, 0], "slice 3.*3 slices"),
    "slice below 0": ([0, 0, 0, 1, -1, 0, 0], "slice -1"),
    "source": ([0, 0, 0, 1, 0, 8, 0], "source row 8 of 8"),
    "source below 0": ([0, 0, 0, 1, 0, -1, 0], "source row -1 of 8"),
    "source of the last token": ([-1, 0, 0, OPEN, 0, 6, 1], "source row 9 of 8"),
    "stride": ([0, 0, 0, 2, 0, 0, 3], "stride 3.*not 0.*or 1"),
    "stride below 0": ([0, 0, 0, 4, 0, 1, -1], "stride -1"),  # its last source row is in range for a maximum
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("functional", [False, True], ids=["in place", "autograd"])
def test_out_of_range_edits_raise(name, backend, threads, functional):
    row, message = OUT_OF_RANGE[name]
    torch.set_num_threads(threads)
    z, table, ab, source, offset = make((2, 4, 3, 4), [[0, 0, 0, 1, 1, 0, 0], row], [PATCH, PATCH])
    with pytest.raises(InvalidArgumentError, match=f"edit 1.*{message}"):
        edits = EditTable(table, ab, source)
        patch_heads(z.requires_grad_(functional), edits, offset, backend=None if functional else backend)


def test_wrong_source_on_a_parallel_call_raises():
    torch.set_num_threads(2)
    z, table, ab, source, offset = make((16, 2048, 4, 16), [[-1, 0, 0, OPEN, 0, 0, 1]], [PATCH])
    before = z.clone()
    with pytest.raises(InvalidArgumentError, match="edit 0 reads source row 2047 of 8"):
        patch_heads(z, EditTable(table, ab, source), offset)
    assert torch.equal(z, before)


SHARED = torch.zeros(2, 3, 8)
BAD = {
    "z of 2 dimensions": (dict(z=torch.zeros(2, 8)), InvalidArgumentError, r"z must be \[B, T, S\*W\].*\(2, 8\)"),
    "integer z": (dict(z=torch.zeros(2, 3, 8, dtype=torch.int32)), InvalidTypeError, "z must be float16.*int32"),
    "complex z": (dict(z=torch.zeros(2, 3, 8, dtype=torch.complex64)), InvalidTypeError, "z must be.*complex64"),
    "table of 6 columns": (dict(table=torch.zeros(1, 6, dtype=torch.int32)), InvalidArgumentError, r"table .*\(1, 6\)"),
    "int64 table": (dict(table=torch.zeros(1, 7, dtype=torch.int64)), InvalidArgumentError, "table.*int64"),
    "too few coefficients": (dict(ab=torch.zeros(0, 2)), InvalidArgumentError, r"coefficients must be \[1, 2\]"),
    "float64 coefficients": (dict(ab=torch.zeros(1, 2, dtype=FP64)), InvalidTypeError, "torch.float32.*float64"),
    "bfloat16 source": (dict(source=torch.zeros(1, 4, dtype=BF16)), InvalidTypeError, "and source.*bfloat16"),
    "float32 source, float64 z": (dict(z=torch.zeros(2, 3, 8, dtype=FP64)), InvalidTypeError, "must be torch.float64"),
    "width not dividing": (dict(source=torch.zeros(1, 3)), InvalidArgumentError, r"source .* dividing .* 8.*\(1, 3\)"),
    "width 0": (dict(source=torch.zeros(1, 0)), InvalidArgumentError, r"source must be \[rows, W\].*\(1, 0\)"),
    "short offset": (dict(offset=torch.zeros(1, 1, dtype=torch.int32)), InvalidArgumentError, r"offset must be.*>=2"),
    "int64 offset": (dict(offset=torch.zeros(1, 2, dtype=torch.int64)), InvalidArgumentError, "offset must be.*int64"),
    "other device": (dict(source=torch.zeros(1, 4, device="meta")), InvalidArgumentError, "source is on meta.*on cpu"),
    "expanded z": (dict(z=torch.zeros(1, 3, 8).expand(2, 3, 8)), InvalidArgumentError, "z is expanded"),
    "rows over rows": (dict(z=torch.zeros(99).as_strided((2, 3, 8), (16, 8, 1))), InvalidArgumentError, "overlaps"),
    "cells over tokens": (dict(z=torch.zeros(99).as_strided((2, 3, 8), (48, 4, 1))), InvalidArgumentError, "overlaps"),
    "source at z's start": (dict(z=SHARED, source=SHARED[0, :1, :4]), InvalidArgumentError, "source lies within z"),
    "source at z's end": (dict(z=SHARED, source=SHARED[1, 2:, 4:]), InvalidArgumentError, "source lies within z"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name, backend):
    changed, error, message = BAD[name]
    z, table, ab, source, offset = make((2, 3, 2, 4), [[0, 0, 0, 1, 0, 0, 0]], [PATCH])
    arguments = dict(z=z, table=table, ab=ab, source=source, offset=offset) | changed
    z, offset = arguments.pop("z"), arguments.pop("offset")
    with pytest.raises(error, match=message) as raised:
        patch_heads(z, EditTable(*arguments.values()), offset, backend=backend)
    assert isinstance(raised.value, BkdfastError)
