"""`bkdfast doctor`: which backend serves each op here, why the others do not, and what was built."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import bkdfast.ops.cosine_monitor
import bkdfast.ops.delta_sketch
import bkdfast.ops.norm_tap
import bkdfast.ops.patch_heads  # noqa: F401  importing an op file registers it
from bkdfast import _host
from bkdfast._build import read_build_info
from bkdfast._version import __version__
from bkdfast.ops._library import EXTENSION, OPS

SWITCHES = ("BKDFAST_BACKEND", "BKDFAST_NO_EXT", "BKDFAST_REQUIRE_EXT", "OMP_NUM_THREADS")


def report() -> str:
    """The whole report as text, one fact a line."""
    lines = [f"bkdfast {__version__}, Python {platform.python_version()}, {platform.machine()}"]
    for package in ("torch", "transformers", "safetensors", "numpy", "triton", "matplotlib"):
        lines.append(f"  {package:<13}{_version(package)}")
    lines += ["", "Compiled extension"]
    built = read_build_info()
    if EXTENSION.path is not None:
        lines.append(f"  loaded       {EXTENSION.path.name}, built with torch {built.get('torch', '?')}")
        lines.append(f"  compiler     {built.get('compiler', '?')}")
    else:
        lines.append(f"  not loaded   {EXTENSION.reason}")
    lines += ["", "Host module (_native)", *_host_module()]
    lines += ["", "Ops (CPU tensors)"]
    for name, op in sorted(OPS.items()):
        status = op.backends()
        serving = next(backend for backend, state in status.items() if state == "available")
        others = "; ".join(f"{backend}: {state}" for backend, state in status.items() if state != "available")
        lines.append(f"  {name:<24}{serving}" + (f"   ({others})" if others else ""))
    lines.append("  Triton and CUDA kernels come with a later version; on CUDA tensors the references serve.")
    lines += ["", "Machine"]
    lines.append(f"  CPU          {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    lines.append(f"  features     {_features()}")
    lines.append(f"  GPU          {_gpu()}")
    lines += ["", "Environment"]
    lines += [f"  {name:<20}{os.environ.get(name, '(not set)')}" for name in SWITCHES]
    return "\n".join(lines)


def _host_module() -> list[str]:
    if _host.NATIVE is None:
        return [f"  not loaded   {_host.WHY_NOT}", "  edit tables are checked in numpy instead"]
    built = _host.NATIVE.build_info()
    return [
        f"  loaded       {Path(_host.NATIVE.__file__ or '').name}, built with pybind11 {built['pybind11']}",
        f"  compiler     {built['compiler']}, C++ {built['cxx_standard']}, {built['flags']}",
    ]


def _features() -> str:
    if _host.NATIVE is None:
        return "(the host module tells them)"
    present = [name for name, has in _host.NATIVE.cpu_features().items() if has]
    return " ".join(present) or "(not known on this kind of CPU)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use" if torch.version.cuda else "none (this torch is a CPU build)"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
