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
import bkdfast.ops.patch_heads
import bkdfast.ops.prefix_attention  # noqa: F401  importing an op file registers it
from bkdfast import _host
from bkdfast._build import read_build_info
from bkdfast._version import __version__
from bkdfast.errors import BackendError
from bkdfast.ops._library import EXTENSION, OPS

SWITCHES = (
    "BKDFAST_BACKEND",
    "BKDFAST_CPU",
    "BKDFAST_NO_EXT",
    "BKDFAST_NO_CUDA",
    "BKDFAST_REQUIRE_EXT",
    "OMP_NUM_THREADS",
)


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
        lines.append(f"  CPU kernels  {_cpu_isa()}")
        lines.append(f"  CUDA kernels {EXTENSION.why_no_cuda() or _cuda_build(built['cuda'])}")
    else:
        lines.append(f"  not loaded   {EXTENSION.reason}")
    lines += ["", "Host module (_native)", *_host_module()]
    lines += ["", "Ops: what serves them on CPU tensors, and on CUDA tensors", *_ops()]
    lines += ["", "Machine"]
    lines.append(f"  CPU          {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    lines.append(f"  features     {_features()}")
    lines.append(f"  GPU          {_gpu()}")
    lines += ["", "Environment"]
    lines += [f"  {name:<20}{os.environ.get(name, '(not set)')}" for name in SWITCHES]
    return "\n".join(lines)


def _ops() -> list[str]:
    """One line an op, then each reason why a backend is out, with the ops it holds for."""
    gpu = torch.cuda.is_available()
    lines = [
        f"  {name:<24}{op.serving('cpu'):<12}{op.serving('cuda') if gpu else '-'}" for name, op in sorted(OPS.items())
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, op in sorted(OPS.items()):
        for backend, status in op.backends().items():
            if status != "available" and not op.composite:
                reasons.setdefault((backend, status), []).append(name)
    everywhere = sum(not op.composite for op in OPS.values())
    for (backend, status), names in sorted(reasons.items()):
        which = "" if len(names) == everywhere else f" ({', '.join(names)})"
        lines.append(f"  not {backend} here: {status}{which}")
    return lines


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


def _cuda_build(cuda: dict) -> str:
    return f"for {cuda['architectures']}, by nvcc {cuda['nvcc']}"


def _cpu_isa() -> str:
    try:
        return str(EXTENSION.cpu_isa())
    except BackendError as error:
        return f"none: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return (
            "none that torch can use" if torch.version.cuda or torch.version.hip else "none (this torch is a CPU build)"
        )
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
