"""`tall_dot`, `tall_combine`, `combine_and_dot` and `cholesky_inverse`, over backends and shapes."""

import pytest
import torch

from bkdfast.errors import BackendError, InvalidArgumentError, InvalidTypeError
from bkdfast.ops import tall_products as module
from bkdfast.ops.tall_products import cholesky_inverse, combine_and_dot, tall_combine, tall_dot

FP64 = torch.float64
# Rows, widths of A's blocks, columns of B: tiles, vectors, chunks and groups short, whole and one over.
SHAPES = [(1, [1], 1), (7, [3], 2), (64, [8], 8), (65, [9, 8], 24), (512, [16, 16], 16), (519, [16, 7, 1], 17)]
SHAPES += [(1000, [80, 33], 80), (300, [5, 24], 41), (63, [16], 40), (2049, [32, 4], 9)]
EMPTY = [(0, [3, 2], 4), (5, [0], 4), (5, [3, 0, 2], 4), (5, [3], 0), (0, [0], 0)]


@pytest.fixture(params=["cpp", "reference"])
def backend(request):
    state = module.DOT.backends()[request.param]
    if state != "available":
        pytest.skip(state)
    return request.param


def needs_cpp():
    if module.DOT.backends()["cpp"] != "available":
        pytest.skip(module.DOT.backends()["cpp"])


def whole_numbers(*shape, generator):
    """Products and sums of these are exact in any order."""
    return torch.randint(-99, 100, shape, generator=generator).double()


def make(n, widths, q, numbers=whole_numbers):
    g = torch.Generator().manual_seed(0)
    a = [numbers(n, width, generator=g) for width in widths]
    return a, numbers(sum(widths), q, generator=g), numbers(n, q, generator=g)


def gaussian(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=FP64)


@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_every_entry_is_exact(shape, backend):
    a, c, x = make(*shape)
    whole = torch.cat(a, 1)
    product = (whole[:, :, None] * c).sum(1)  # [n, q]
    assert torch.equal(tall_dot(a, x, backend=backend), (whole[:, :, None] * x[:, None]).sum(0))
    assert torch.equal(tall_combine(a, c, backend=backend), product)
    assert torch.equal(tall_combine(a, c, x, backend=backend), x - product)
    for start, b in ((None, []), (x, []), (x, a), (None, [x, *a])):
        y, products = combine_and_dot(a, c, start, b, backend=backend)
        assert torch.equal(y, product if start is None else x - product)
        assert torch.equal(products, (torch.cat([*b, y], 1)[:, :, None] * y[:, None]).sum(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rounds_as_float64_does(shape, backend):
    a, c, x = make(*shape, gaussian)
    whole, few = torch.cat(a, 1), 8 * torch.finfo(FP64).eps
    got, want = tall_dot(a, x, backend=backend), whole.T @ x
    assert ((got - want).abs() <= few * (whole.abs().T @ x.abs())).all()
    got, want = tall_combine(a, c, x, backend=backend), x - whole @ c
    assert ((got - want).abs() <= few * (x.abs() + whole.abs() @ c.abs())).all()


@pytest.mark.parametrize("shape", [(4096, [48, 32], 32), (3001, [80, 80], 80), (8000, [7, 33], 33)], ids=str)
def test_the_number_of_threads_does_not_change_a_bit(shape, monkeypatch):
    needs_cpp()
    (a, c, x), runs, before = make(*shape, gaussian), [], torch.get_num_threads()
    assert shape[0] * sum(shape[1]) * shape[2] >= 1 << 21, "so small that one thread does it"
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs.append([tall_dot(a, x), tall_combine(a, c), *combine_and_dot(a, c, x, a)])
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_a_gram_matrix_is_symmetric_to_the_bit(backend):
    a, c, x = make(1000, [16, 5], 33, gaussian)
    for gram in (tall_dot([x], x, backend=backend), combine_and_dot(a, c, x, backend=backend)[1]):
        if backend == "cpp":
            assert torch.equal(gram, gram.T)
        torch.testing.assert_close(gram, gram.T)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(value, backend):
    a, c, x = make(200, [9], 11)
    a[0][130, 4] = value
    assert not tall_dot(a, x, backend=backend)[4].isfinite().any()
    assert tall_dot(a, x, backend=backend)[torch.arange(9) != 4].isfinite().all()
    got = tall_combine(a, c, x, backend=backend)
    assert not got[130].isfinite().all() and got[torch.arange(200) != 130].isfinite().all()


@pytest.mark.parametrize("grade", [0, 150])
@pytest.mark.parametrize("width", [0, 1, 2, 7, 16, 33, 80])
def test_cholesky_makes_columns_orthonormal_whatever_their_sizes(width, grade, backend):
    x = make(300, [width], 1, gaussian)[0][0]
    sizes = 10.0 ** torch.linspace(-grade, grade, width, dtype=FP64)
    gram = (x.T @ x) * sizes * sizes[:, None]
    r, inverse, skewed = cholesky_inverse(gram, backend=backend)
    eye = torch.eye(width, dtype=FP64)
    assert torch.equal(r, r.triu()) and torch.equal(inverse, inverse.triu()) and (r.diagonal() > 0).all()
    torch.testing.assert_close((r / sizes).T @ (r / sizes), x.T @ x)
    torch.testing.assert_close((r / sizes) @ (inverse * sizes[:, None]), eye)
    q = x @ (inverse * sizes[:, None])
    assert width == 0 or torch.linalg.matrix_norm(q.T @ q - eye, 2) <= 8 * skewed + 1e-14
    assert skewed <= 1e-12


def test_cholesky_says_how_far_from_orthonormal(backend):
    x = make(300, [16], 1, gaussian)[0][0]
    x[:, 9] = x[:, 3] + 1e-5 * x[:, 9]
    _, inverse, skewed = cholesky_inverse(x.T @ x, backend=backend)
    q = x @ inverse
    off = torch.linalg.matrix_norm(q.T @ q - torch.eye(16), 2)
    assert 1e-8 < off <= 8 * skewed < 1e-3


@pytest.mark.parametrize("entry", [0.0, -1.0, float("nan")])
def test_cholesky_without_a_factor(entry, backend):
    x = make(30, [5], 1, gaussian)[0][0]
    gram = x.T @ x
    gram[3, 3] = entry
    assert not cholesky_inverse(gram, backend=backend)[2] < float("inf")
    gram = torch.ones(5, 5, dtype=FP64)
    assert not cholesky_inverse(gram, backend=backend)[2] < float("inf")


def test_input_is_not_changed(backend):
    a, c, x = make(100, [9, 3], 5)
    before = [tensor.clone() for tensor in (*a, c, x)]
    combine_and_dot(a, c, x, a, backend=backend)
    tall_dot(a, x, backend=backend)
    assert all(torch.equal(old, new) for old, new in zip(before, (*a, c, x), strict=True))


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_opcheck(start, dot):
    a, c, x = make(20, [3, 4], 5, gaussian)
    torch.library.opcheck(torch.ops.bkdfast.tall_dot.default, (a, x))
    torch.library.opcheck(torch.ops.bkdfast.cholesky_inverse.default, (x.T @ x,))
    arguments = (a, c, x if start else None, a[:1] if dot else [], dot)
    torch.library.opcheck(torch.ops.bkdfast.tall_combine.default, arguments)


def test_compiles_into_one_graph():
    def orthonormal(a, c, x):
        y, products = combine_and_dot(a, c, x, a)
        return tall_dot(a, tall_combine([y], products[: y.shape[1]].contiguous()))

    inputs = make(30, [3, 4], 5, gaussian)
    torch._dynamo.reset()
    compiled = torch.compile(orthonormal, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), orthonormal(*inputs))


ONE = torch.ones(4, 2, dtype=FP64)


@pytest.mark.parametrize(
    "call, error, says",
    [
        (lambda: tall_dot([], ONE), InvalidArgumentError, "one block of columns at least"),
        (lambda: tall_dot([ONE[:, 0]], ONE), InvalidArgumentError, r"a\[0\] must be a matrix"),
        (lambda: tall_dot([ONE], ONE[:3]), InvalidArgumentError, r"b must have 4 rows, found \(3, 2\)"),
        (lambda: tall_dot([ONE, ONE[:3]], ONE), InvalidArgumentError, r"a\[1\] must have 4 rows"),
        (lambda: tall_dot([ONE], ONE.float()), InvalidTypeError, "b must be torch.float64, found torch.float32"),
        (lambda: tall_dot([ONE.repeat(1, 2)[:, ::2]], ONE), InvalidArgumentError, r"a\[0\] must be contiguous"),
        (lambda: tall_dot([ONE], ONE.to("meta")), InvalidArgumentError, "b is on meta but"),
        (lambda: tall_combine([ONE], ONE), InvalidArgumentError, "c must have 2 rows"),
        (lambda: tall_combine([ONE], ONE[:2], ONE[:3]), InvalidArgumentError, "x must have 4 rows"),
        (lambda: tall_combine([ONE], ONE[:2], ONE.repeat(1, 2)), InvalidArgumentError, "x must have 2 columns"),
        (lambda: combine_and_dot([ONE], ONE[:2], None, [ONE[:3]]), InvalidArgumentError, r"b\[0\] must have 4 rows"),
        (lambda: cholesky_inverse(ONE), InvalidArgumentError, "gram must be a square matrix"),
        (lambda: cholesky_inverse(ONE[:2].float()), InvalidTypeError, "must be torch.float64"),
        (lambda: combine_and_dot([ONE], ONE[:2].float()), InvalidTypeError, "c must be torch.float64"),
    ],
)
def test_bad_arguments(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_unknown_backend():
    with pytest.raises(BackendError, match="not one of"):
        tall_dot([ONE], ONE, backend="abacus")


def test_autocast_does_not_reach_the_products(backend):
    a, c, x = make(50, [3], 4, gaussian)
    with torch.autocast("cpu", torch.bfloat16):
        found = tall_dot(a, x, backend=backend), *combine_and_dot(a, c, x, backend=backend)
    want = tall_dot(a, x, backend=backend), *combine_and_dot(a, c, x, backend=backend)
    assert all(torch.equal(one, two) for one, two in zip(found, want, strict=True))
