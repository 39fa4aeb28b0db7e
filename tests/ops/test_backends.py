"""Which backend serves an op: the environment switch, `backend=`, and an install without the compiled library."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bkdfast
from bkdfast import EditTable, patch_heads
from bkdfast.errors import BackendError
from bkdfast.ops._library import EXTENSION, OPS, Op
from bkdfast.ops.patch_heads import _op

PACKAGE = Path(bkdfast.__file__).parent
EDIT = EditTable.pack([[1, 0, 2, 3, 0, 0, 0]], [[0.0, 1.0]], torch.full((1, 4), 5.0), slices=2)
SCRIPT = """
import torch
from bkdfast.ops.edit_table import EditTable
from bkdfast.ops.patch_heads import _op, patch_heads
edit = EditTable.pack([[1, 0, 2, 3, 0, 0, 0]], [[0.0, 1.0]], torch.full((1, 4), 5.0), slices=2)
z = patch_heads(torch.ones(2, 3, 8), edit)
assert z.sum() == 48 + 4 * 4 and (z[1, 2, :4] == 5).all()
print(_op.backends()["cpp"])
"""


def run(script=SCRIPT, path=PACKAGE.parent, **environment):
    """Run a script in a process of its own, on the package under `path`."""
    env = {k: v for k, v in os.environ.items() if k not in ("BKDFAST_BACKEND", "BKDFAST_CPU")}
    env |= environment | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd="/")


def needs_cpp():
    if _op.backends()["cpp"] != "available":
        pytest.skip(_op.backends()["cpp"])


def test_every_op_has_a_reference_and_says_which_backend_serves():
    assert {"patch_heads", "patch_heads_functional"} <= OPS.keys()
    for op in OPS.values():
        status = op.backends()
        assert status["reference"] == "available" and set(status) >= {"cpp", "reference"}
    assert EXTENSION.path is None or EXTENSION.reason is None


def test_backend_argument_reaches_that_backend(monkeypatch):
    calls = []
    reference = _op.reference
    monkeypatch.setattr(_op, "reference", lambda *args: calls.append(1) or reference(*args))
    assert patch_heads(torch.ones(2, 3, 8), EDIT, backend="reference")[1, 2, 0] == 5
    assert calls == [1]
    needs_cpp()
    assert patch_heads(torch.ones(2, 3, 8), EDIT, backend="cpp")[1, 2, 0] == 5
    assert patch_heads(torch.ones(2, 3, 8), EDIT)[1, 2, 0] == 5
    assert calls == [1]


def test_the_compiled_kernel_serves_by_itself():
    needs_cpp()
    assert torch._C._dispatch_has_kernel_for_dispatch_key("bkdfast::patch_heads", "CPU")


def test_unknown_backend():
    with pytest.raises(BackendError, match=r"backend 'cuda9' is not one of \['cpp', .*'reference'"):
        patch_heads(torch.ones(2, 3, 8), EDIT, backend="cuda9")


def test_a_backend_that_cannot_serve_says_why(monkeypatch):
    monkeypatch.setattr(_op, "_resolved", {})
    monkeypatch.setattr(EXTENSION, "reason", "no compiler was found")
    with pytest.raises(BackendError, match="'cpp' cannot serve patch_heads here: no compiler was found"):
        patch_heads(torch.ones(2, 3, 8), EDIT, backend="cpp")


def test_an_op_without_a_kernel_says_so():
    needs_cpp()
    functional = OPS["patch_heads_functional"]
    assert isinstance(functional, Op) and functional.backends()["cpp"] == "it runs on the kernels of other ops"


def test_environment_forces_the_reference():
    done = run(BKDFAST_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "BKDFAST_BACKEND=reference"


def test_environment_asks_for_the_compiled_kernel():
    needs_cpp()
    done = run(BKDFAST_BACKEND="cpp")
    assert done.returncode == 0 and done.stdout.strip() == "available", done.stderr


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_environment_chooses_among_the_kernels_of_a_gpu(backend):
    """CPU tensors are served as ever; where that backend was not built or installed, the import says so."""
    done = run(SCRIPT + "print(_op.serving('cpu'), _op.serving('cuda'))", BKDFAST_BACKEND=backend)
    if done.returncode:
        assert f"BackendError: BKDFAST_BACKEND={backend}, but " in done.stderr
    else:
        assert done.stdout.splitlines()[-1].endswith(f" {backend}"), done.stdout


def test_environment_with_an_unknown_value():
    done = run(BKDFAST_BACKEND="fpga")
    assert done.returncode != 0
    assert "BackendError: BKDFAST_BACKEND='fpga' is not one of" in done.stderr


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the package without the compiled library."""
    root = tmp_path_factory.mktemp("bare")
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "pair")
    shutil.copytree(PACKAGE, root / "bkdfast", ignore=ignore)
    return root


def test_without_the_library_the_reference_serves(bare):
    done = run(path=bare)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the C++ extension was not built: reinstall with a C++ compiler")


def test_the_recorded_reason_is_given(bare):
    (bare / "bkdfast" / "_build.json").write_text('{"extension": false, "reason": "BKDFAST_NO_EXT=1 at build time"}')
    try:
        assert "not built: BKDFAST_NO_EXT=1 at build time" in run(path=bare).stdout
    finally:
        (bare / "bkdfast" / "_build.json").unlink()


def test_without_the_library_asking_for_it_is_an_error(bare):
    done = run(path=bare, BKDFAST_BACKEND="cpp")
    assert done.returncode != 0
    assert "BKDFAST_BACKEND=cpp, but the C++ extension was not built" in done.stderr


def test_a_broken_library_does_not_break_the_import(bare):
    broken = bare / "bkdfast" / "_C.so"
    broken.write_bytes(b"not a library")
    try:
        done = run(path=bare)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("_C.so does not load:")
    finally:
        broken.unlink()


ISA_SCRIPT = """
import torch
from bkdfast.ops._library import EXTENSION
from bkdfast.ops.delta_sketch import delta_sketch
sketch = delta_sketch(torch.zeros(3, 2), torch.ones(3, 2), torch.eye(2), backend="cpp")
print(sketch.changed.item(), EXTENSION.cpu_isa())
"""


@pytest.mark.parametrize("level", ["amx", "avx512", "avx2", "scalar"])
def test_the_instruction_set_can_be_capped(level):
    needs_cpp()
    done = run(ISA_SCRIPT, BKDFAST_CPU=level)
    if done.returncode and "the best this CPU has is" in done.stderr:
        pytest.skip(f"this CPU has no {level}")
    assert done.stdout == f"6 {level}\n", done.stderr


def test_an_unknown_instruction_set_is_an_error_at_the_first_op():
    needs_cpp()
    done = run(ISA_SCRIPT, BKDFAST_CPU="avx9")
    assert done.returncode and "BKDFAST_CPU='avx9' is not one of amx, avx512, avx2, scalar" in done.stderr
    importing = run("import bkdfast.doctor; print(bkdfast.doctor.report())", BKDFAST_CPU="avx9")
    assert importing.returncode == 0 and "BKDFAST_CPU='avx9' is not one of" in importing.stdout
