"""`patch_heads` under autograd, `torch.compile` and `opcheck`."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from bkdfast import EditTable, patch_heads
from bkdfast.errors import InvalidArgumentError
from bkdfast.ops.edit_table import COLUMNS, OPEN
from bkdfast.ops.patch_heads import _functional, _op

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
B, T, S, W = 2, 4, 3, 5
ROWS = [[0, 0, 1, 3, 0, 2, 0], [-1, 0, -OPEN, OPEN, 2, 0, 0], [1, 0, 0, 4, 1, 1, 1]]
COEFFICIENTS = [[0.0, 0.0], [0.3, -1.7], [1.0, 2.0]]


def arguments(dtype=FP32, rows=ROWS, coefficients=COEFFICIENTS, seed=0):
    g = torch.Generator().manual_seed(seed)
    accumulate = FP64 if dtype == FP64 else FP32
    return (
        torch.randn(B, T, S * W, generator=g, dtype=FP64).to(dtype),
        torch.tensor(rows, dtype=torch.int32).view(-1, COLUMNS),
        torch.tensor(coefficients, dtype=accumulate).view(-1, 2),
        torch.randn(6, W, generator=g, dtype=FP64).to(accumulate),
        torch.zeros(1, B, dtype=torch.int32),
    )


def plain(z, table, ab, source, offset):
    """Clone and assign, with PyTorch's own autograd."""
    z = z.clone()
    for (row, _, start, stop, piece, entry, stride), (a, b) in zip(table.tolist(), ab.tolist(), strict=True):
        for i in range(B) if row < 0 else (row,):
            for t in range(max(start, 0), min(stop, T)):
                cell = slice(piece * W, (piece + 1) * W)
                old = z[i, t, cell].clone().to(source.dtype)
                z[i, t, cell] = ((a * old if a else 0.0) + b * source[entry + stride * (t - start)]).to(z.dtype)
    return z


def edits_of(arguments):
    return EditTable(*arguments[1:4])


@pytest.mark.parametrize("dtype", [FP16, BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize(
    ("op", "requires_grad"), [(_op, False), (_functional, False), (_functional, True)], ids=["in place", "new", "grad"]
)
def test_opcheck(op, dtype, requires_grad):
    z, *rest = arguments(dtype)
    torch.library.opcheck(op.dispatched, (z.requires_grad_(requires_grad), *rest))


@pytest.mark.parametrize("shape", [(0, T, S * W), (B, 0, S * W), (B, 1, S * W)])
def test_opcheck_shapes(shape):
    z, *rest = arguments(rows=[[-1, 0, 0, 3, 1, 1, 0]], coefficients=[[1.0, 1.0]])
    for op in (_op, _functional):
        torch.library.opcheck(op.dispatched, (torch.randn(shape), *rest))
        torch.library.opcheck(op.dispatched, (torch.randn(*shape[:2], 2 * shape[2])[..., ::2], *rest))


@pytest.mark.parametrize("dtype", [FP32, FP64, BF16], ids=str)
def test_gradient_equals_clone_and_assign(dtype):
    args = arguments(dtype)
    weight = torch.randn(B, T, S * W, dtype=FP64).to(dtype)
    results = []
    for edit in (lambda z: patch_heads(z, edits_of(args)), lambda z: plain(z, *args[1:])):
        leaf = args[0].clone().requires_grad_()
        out = edit(leaf * 2)
        (out * weight).sum().backward()
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    untouched = 2 * weight
    assert (results[0][1] - untouched).abs().max() > 0.5, "the edit must matter to the gradient"
    assert (results[0][1][0, 1, :W] == 0).all(), "a zeroed cell has no gradient"


def test_gradcheck():
    args = arguments(FP64)
    z = args[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: patch_heads(z, edits_of(args)), z)
    assert torch.autograd.gradgradcheck(lambda z: patch_heads(z * z, edits_of(args)), z)


def test_the_buffers_may_be_overwritten_before_the_backward():
    grads = []
    for overwrite in (False, True):
        args = arguments()
        leaf = args[0].clone().requires_grad_()
        out = patch_heads(leaf * 1, edits_of(args), args[4])
        if overwrite:
            for buffer in args[1:]:
                buffer.fill_(1)
        out.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads) and (grads[0] - 2 * arguments()[0]).abs().max() > 0.5


def test_a_saved_tensor_edited_in_place_raises_in_the_backward():
    args = arguments()
    weight = torch.randn(B, T, S * W, requires_grad=True)
    saved = args[0].clone()
    loss = (weight * saved).sum()
    version = saved._version
    patch_heads(saved, edits_of(args))  # saved needs no gradient itself, so this is in place
    assert saved._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_autograd_z_itself_is_left_alone():
    args = arguments()
    z = args[0].clone().requires_grad_()
    assert patch_heads(z, edits_of(args)) is not z and torch.equal(z, args[0])
    with torch.no_grad():
        assert patch_heads(z, edits_of(args)) is z and not torch.equal(z, args[0])
    with pytest.raises(InvalidArgumentError, match="backend= serves the in-place op"):
        patch_heads(z, edits_of(args), backend="reference")


def test_inference_mode():
    with torch.inference_mode():
        args = arguments()
        got = patch_heads(args[0].clone(), edits_of(args))
        assert torch.equal(got, plain(*args)) and not torch.equal(got, args[0])


@pytest.mark.parametrize("grad", [False, True], ids=["in place", "autograd"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_changing_the_table_does_not_recompile(backend, grad, fresh_dynamo):
    z, *buffers = arguments()
    edits, counter = EditTable(*buffers[:3]), CompileCounterWithBackend(backend)

    @torch.compile(fullgraph=True, backend=counter)
    def model(z):
        return patch_heads(z * 2, edits, buffers[3]) + 1

    seen = []
    other = [[1, 0, 0, 2, 1, 0, 0], [0, 0, 2, 3, 0, 5, 0], [0, 0, 0, 0, 0, 0, 0]]
    for rows, seed, first in ((ROWS, 0, 0), (other, 1, 0), (other, 1, 1), ([[0] * 7] * 3, 2, 0)):
        new = arguments(rows=rows, seed=seed)
        for buffer, content in zip(buffers, (*new[1:4], new[4] + first), strict=True):
            buffer.copy_(content)
        inputs = new[0].clone().requires_grad_(grad)
        got = model(inputs)
        leaf = new[0].clone().requires_grad_(grad)
        want = patch_heads(leaf * 2, edits, buffers[3]) + 1
        assert torch.equal(got, want)
        if grad:
            got.square().sum().backward()
            want.square().sum().backward()
            torch.testing.assert_close(inputs.grad, leaf.grad)
        seen.append(got.detach() - (new[0] * 2 + 1))
    assert counter.frame_count == 1
    assert all((effect.abs() > 0.1).any() for effect in seen[:3]) and (seen[3] == 0).all()
    assert not torch.equal(seen[0] != 0, seen[1] != 0) and not torch.equal(seen[1] != 0, seen[2] != 0)


def test_a_compiled_out_of_range_edit_raises(fresh_dynamo):
    z, *buffers = arguments()
    edits = EditTable(*buffers[:3])
    model = torch.compile(lambda z: patch_heads(z * 2, edits) + 1, fullgraph=True, backend="aot_eager")
    model(z)
    buffers[0][0, 0] = 7
    with pytest.raises((RuntimeError, InvalidArgumentError), match="edit 0 addresses row 7"):
        model(z)


def test_dynamic_shapes(fresh_dynamo):
    _, *buffers = arguments(rows=[[-1, 0, 1, OPEN, 1, 1, 0]], coefficients=[[0.0, 1.0]])
    edits, counter = EditTable(*buffers[:3]), CompileCounterWithBackend("aot_eager")
    offset = torch.zeros(1, 16, dtype=torch.int32)
    model = torch.compile(lambda z: patch_heads(z * 2, edits, offset), fullgraph=True, backend=counter, dynamic=True)
    # The first call has no size in common with the buffers: dynamo would take them for the same symbol.
    for rows, tokens in ((3, 4), (4, 7), (9, 8), (5, 2)):
        z = torch.randn(rows, tokens, S * W)
        got = model(z)
        assert torch.equal(got, patch_heads(z * 2, edits, offset)) and not torch.equal(got, z * 2)
    assert counter.frame_count == 1
