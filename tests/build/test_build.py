"""Installs of every kind, each in a copy of the repository: editable and wheel, with and without a compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "_build.json", "__pycache__", ".*_cache", "*-report"
)
INSIDE = """
import json, torch, bkdfast as bf
from bkdfast import _host
from bkdfast.ops._library import EXTENSION, OPS
z = torch.ones(1, 2, 4)
bf.patch_heads(z, bf.EditTable.pack([[0, 0, 1, 2, 0, 0, 0]], [[0.0, 0.0]], torch.zeros(1, 2), slices=2))
import bkdfast.triton_kernels, importlib.util
print(json.dumps({
    "reason": EXTENSION.reason,
    "native": _host.WHY_NOT,
    "backends": OPS["patch_heads"].backends(),
    "z": z.tolist(),
    "file": bf.__file__,
    "shadow": importlib.util.find_spec("triton_kernels") is not None,
    "pair": (bf.demo.PAIR / "tuned" / "model.safetensors").is_file(),
}))
"""


def run(*command, cwd, ok=True, **environment):
    result = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert (result.returncode == 0) == ok, result.stdout[-3000:] + result.stderr[-3000:]
    return result


@pytest.fixture
def source(tmp_path):
    shutil.copytree(ROOT, tmp_path / "source", ignore=LEFT_OUT)
    return tmp_path / "source"


def install(source, tmp_path, **environment):
    """Build a wheel as a user does and unpack it into a folder of its own; returns (folder, what pip said).

    Without the CUDA kernels, which take minutes to compile, unless the environment says otherwise.
    """
    environment = {"BKDFAST_NO_CUDA": "1", **environment}
    pip = (sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps")
    said = run(*pip, "-w", tmp_path / "wheel", source, cwd=tmp_path, **environment)
    wheel = next((tmp_path / "wheel").glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    return tmp_path / "site", said.stdout + said.stderr


def look(site, tmp_path):
    """Import the installed package from outside the repository."""
    code = "import bkdfast.demo\n" + INSIDE
    # -P: the working directory is not searched; PYTHONPATH comes before the editable install of the repository.
    said = run(sys.executable, "-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(site))
    found = json.loads(said.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(site)
    assert found["z"] == [[[1, 1, 1, 1], [0, 0, 1, 1]]], "the op must work whichever backend serves"
    assert found["pair"], "the demo pair is package data"
    return found


@pytest.mark.slow
def test_wheel_with_the_extension(source, tmp_path):
    site, said = install(source, tmp_path)
    found = look(site, tmp_path)
    assert found["reason"] is None and found["backends"]["cpp"] == "available"
    assert found["native"] is None
    assert "PURE PYTHON" not in said and "left out: " not in said.replace("CUDA kernels are left out: ", "")
    # The name triton_kernels belongs to Triton; ours is inside the package and shadows nothing.
    assert not found["shadow"] and not (site / "triton_kernels").exists()
    names = {path.name for path in (site / "bkdfast").iterdir()}
    assert "triton_kernels" in names and "_C.so" in names and "tests" not in names
    # A stable ABI without Python has no tag; an extension module of one Python has its own.
    assert "_native" + sysconfig.get_config_var("EXT_SUFFIX") in names and "_native.so" not in names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"BKDFAST_NO_EXT": "1"}, "BKDFAST_NO_EXT=1"),
        ({"CXX": "/nonexistent/c++"}, "no C++ compiler"),
    ],
)
def test_pure_python_install_works_and_says_what_is_missing(source, tmp_path, environment, reason):
    site, said = install(source, tmp_path, **environment)
    assert "PURE PYTHON INSTALL" in said and reason in said
    found = look(site, tmp_path)
    assert reason in found["reason"] and reason in found["backends"]["cpp"] and reason in found["native"]
    assert not list((site / "bkdfast").glob("*.so"))
    doctor = run(sys.executable, "-P", "-m", "bkdfast", "doctor", cwd=tmp_path, PYTHONPATH=str(site)).stdout
    assert reason in doctor and "reference" in doctor


@pytest.mark.slow
def test_a_compile_error_leaves_a_working_install(source, tmp_path):
    (source / "csrc" / "cpu" / "broken.cpp").write_text("#error broken on purpose\n")
    site, said = install(source, tmp_path)
    assert "PURE PYTHON INSTALL" in said and "compiling failed" in said
    found = look(site, tmp_path)
    assert "compiling failed" in found["reason"] and found["native"] is None
    refused = run(
        sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path / "w2", source,
        cwd=tmp_path, ok=False, BKDFAST_REQUIRE_EXT="1",
    )  # fmt: skip
    assert "broken on purpose" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_a_compile_error_of_the_cuda_kernels_leaves_the_others(source, tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    for path in (source / "csrc" / "cuda").glob("*.cu"):
        path.write_text("#error broken on purpose\n")
    site, said = install(source, tmp_path, BKDFAST_NO_CUDA="")
    assert "the CUDA kernels are left out: compiling them failed" in said and "PURE PYTHON" not in said
    found = look(site, tmp_path)
    assert found["backends"]["cpp"] == "available" and "compiling them failed" in found["backends"]["cuda"]


@pytest.mark.slow
def test_a_wheel_with_the_cuda_kernels(source, tmp_path):
    """One library with and without a GPU: it loads with this torch, and says what it was built for."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    site, said = install(source, tmp_path, BKDFAST_NO_CUDA="", TORCH_CUDA_ARCH_LIST="9.0")
    found = look(site, tmp_path)
    assert found["reason"] is None and "left out" not in said
    assert json.loads((site / "bkdfast" / "_build.json").read_text())["cuda"]["architectures"] == "9.0"


@pytest.mark.slow
def test_a_build_elsewhere_leaves_the_facts_of_this_one(source, tmp_path):
    """Building a wheel in a checkout must not touch what its editable install knows."""
    facts = source / "bkdfast" / "_build.json"
    facts.write_text('{"extension": true, "mine": 1}')
    install(source, tmp_path, BKDFAST_NO_EXT="1")
    assert json.loads(facts.read_text()) == {"extension": True, "mine": 1}


@pytest.mark.slow
def test_a_compile_error_of_the_host_module_leaves_the_kernels(source, tmp_path):
    (source / "csrc" / "native" / "broken.cpp").write_text("#error broken on purpose\n")
    site, said = install(source, tmp_path)
    assert "_native is left out: compiling failed" in said and "PURE PYTHON" not in said
    found = look(site, tmp_path)
    assert found["reason"] is None and "not built: compiling failed" in found["native"]
    doctor = run(sys.executable, "-P", "-m", "bkdfast", "doctor", cwd=tmp_path, PYTHONPATH=str(site)).stdout
    assert "not built: compiling failed" in doctor and "checked in numpy" in doctor


def setup_without(source, hidden, *command, **environment):
    """Run `setup.py` where some packages cannot be imported: what isolation does, but it needs no network."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({hidden!r})); sys.argv = ['setup.py', *sys.argv[1:]]; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    return run(sys.executable, "-c", code, *command, cwd=source, **environment).stderr


@pytest.mark.slow
def test_isolated_build_has_no_torch_and_says_so(source, tmp_path):
    """A plain `pip wheel .` builds without torch: no kernels, loudly, with the command that builds them; `_native`."""
    # What an earlier build with torch left behind does not join this wheel.
    stale = source / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "bkdfast" / "_C.so"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"stale")
    said = setup_without(source, ["torch"], "bdist_wheel", "-d", tmp_path / "wheel")
    assert "PURE PYTHON INSTALL" in said and "--no-build-isolation" in said
    wheel = next((tmp_path / "wheel").glob("*.whl"))
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    found = look(tmp_path / "site", tmp_path)
    assert "--no-build-isolation" in found["reason"] and found["native"] is None
    assert [path.name.split(".")[0] for path in (tmp_path / "site" / "bkdfast").glob("*.so")] == ["_native"]


@pytest.mark.slow
def test_without_pybind11_the_headers_of_torch_serve(source):
    setup_without(source, ["pybind11"], "build_ext", "--inplace", BKDFAST_NO_CUDA="1")
    assert json.loads((source / "bkdfast" / "_build.json").read_text())["native"] is True
    assert list((source / "bkdfast").glob("_native.*.so"))


@pytest.mark.slow
def test_without_any_headers_of_pybind11(source):
    said = setup_without(source, ["pybind11", "torch"], "build")
    assert "_native is left out: pybind11 could not be imported" in said and "PURE PYTHON INSTALL" in said
    facts = json.loads((source / "build" / "lib" / "bkdfast" / "_build.json").read_text())
    assert facts["native"] is False and "pip install pybind11" in facts["native_reason"]


def test_this_install_is_complete():
    """The environment the tests run in: our package is found, nothing of ours is at the top level."""
    code = (
        "import importlib.util as u, bkdfast.triton_kernels as ours; found = u.find_spec('triton_kernels'); "
        "assert found is None or 'bkdfast' not in str(found.origin), found; print(ours.__name__)"
    )
    assert run(sys.executable, "-P", "-c", code, cwd="/").stdout.strip() == "bkdfast.triton_kernels"


def test_nothing_imports_a_top_level_triton_kernels():
    """The lint rule that bans it bites."""
    banned = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "bkdfast/x.py", "-"],
        input="import triton_kernels\n",
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert banned.returncode == 1 and "TID251" in banned.stdout


def test_every_switch_is_in_the_readme():
    used = set()
    for path in [ROOT / "setup.py", *(ROOT / "bkdfast").rglob("*.py"), *(ROOT / "csrc").rglob("*.*")]:
        used |= set(re.findall(r"[\"']BKDFAST_[A-Z_]+", path.read_text()))  # quoted: macros are not switches
    used = {name[1:] for name in used}
    readme = (ROOT / "README.md").read_text()
    assert {"BKDFAST_CPU", "BKDFAST_BACKEND", "BKDFAST_NO_EXT"} <= used
    assert not {name for name in used if f"`{name}" not in readme}
