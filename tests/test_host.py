"""`bkdfast._native`: what it says of the CPU and of its build, what it links, and installs without it."""

import importlib
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bkdfast
from bkdfast import _host

needs_native = pytest.mark.skipif(_host.NATIVE is None, reason=f"bkdfast._native: {_host.WHY_NOT}")


@needs_native
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel's own list is the oracle")
def test_cpu_features_are_those_of_the_kernel():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = set(next(line for line in lines if line.startswith(("flags", "Features"))).split(":")[1].split())
    found = _host.NATIVE.cpu_features()
    assert found and found == {name: name in flags for name in found}
    if platform.machine() == "x86_64":
        assert {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"} <= found.keys()


@needs_native
def test_build_info():
    facts = _host.NATIVE.build_info()
    assert facts["compiler"].split()[0] in ("gcc", "clang") and facts["cxx_standard"] >= 202002
    assert facts["optimized"] and "-O3" in facts["flags"]
    assert facts["python"] == platform.python_version() or facts["python"].rpartition(".")[0] in sys.version
    assert facts["pybind11"].split(".")[0].isdigit()


@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of loaded libraries")
def test_it_needs_no_torch():
    code = (
        "import importlib.util as u, sys; spec = u.spec_from_file_location('_native', sys.argv[1]); "
        "module = u.module_from_spec(spec); spec.loader.exec_module(module); module.cpu_features(); "
        "maps = open('/proc/self/maps').read(); assert '_native' in maps; print('torch' in maps or 'cudart' in maps)"
    )
    command = [sys.executable, "-c", code, _host.NATIVE.__file__]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_reference_backend_leaves_it_out(monkeypatch):
    monkeypatch.setenv("BKDFAST_BACKEND", "reference")
    assert _host.load() == (None, "BKDFAST_BACKEND=reference")


@pytest.mark.parametrize(
    ("recorded", "said"), [({}, "reinstall with a C++ compiler"), ({"native_reason": "no room"}, "no room")]
)
def test_a_missing_module_is_explained(recorded, said, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.delenv("BKDFAST_BACKEND", raising=False)
    monkeypatch.setattr(importlib, "import_module", absent)
    monkeypatch.setattr(_host, "read_build_info", lambda: recorded)
    module, reason = _host.load()
    assert module is None and reason.startswith("it was not built: ") and said in reason


def test_a_broken_module_does_not_break_the_import(tmp_path):
    ignore = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "pair")
    shutil.copytree(Path(bkdfast.__file__).parent, tmp_path / "bkdfast", ignore=ignore)
    (tmp_path / "bkdfast" / f"_native{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    code = "from bkdfast import _host, doctor; print(_host.WHY_NOT); print(doctor.report())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.startswith("it does not load: ") and "not loaded   it does not load: " in done.stdout
