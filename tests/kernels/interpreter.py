"""What Triton 3.6's interpreter gets wrong, mended for the tests: each is right in compiled kernels."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch, _convert, _binary = (
    interpreter._patch_lang_tensor,
    interpreter._convert_float,
    interpreter.InterpreterBuilder.binary_op,
)


def _patch_index(tensor, scope):
    """Loop bounds are arrays of one element, which numpy 2.4 no longer turns into an int."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


def _convert_rounding(data, source, target, mode):
    """float32 to bfloat16 rounds to nearest; the interpreter cuts the low bits off."""
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().view(np.uint16)
    return _convert(data, source, target, mode)


def _binary_typed(self, lhs, rhs, op):
    """A comparison is a truth value; the interpreter gives it its operands' type, and broadcasting then casts it."""
    result = _binary(self, lhs, rhs, op)
    if result.data.dtype == bool:
        result.dtype = tl.int1
    return result


def mend() -> None:
    interpreter._patch_lang_tensor = _patch_index
    interpreter._convert_float = _convert_rounding
    interpreter.InterpreterBuilder.binary_op = _binary_typed
