"""The `bkdfast::` op library: one `Op` per op file, its schema, its fake, its reference and the backends that serve it.

The schema is defined here in Python, so an op exists when nothing is compiled. Kernels only add to it:

- `reference`: plain PyTorch, registered under `CompositeExplicitAutograd`, i.e. for every device without a kernel.
- `cpp`, `cuda`: the compiled library `bkdfast/_C*.so` registers `CPU` and `CUDA` kernels when it is loaded.
- `triton`: the launcher `bkdfast.triton_kernels.<op>.launch`, registered for `CUDA` (AMD GPUs too) where no compiled
  CUDA kernel is, and imported at the first call.

The dispatcher therefore picks the best one by itself; `Op.backends()` says which are there, and why the others are not.
`BKDFAST_BACKEND` forces one for the tensors it serves; `BKDFAST_CPU` chooses the instruction set of the CPU kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

from bkdfast.errors import BackendError

CHOICES = ("cpp", "cuda", "triton", "reference")
FORCED = os.environ.get("BKDFAST_BACKEND", "")
_DEVICES = {"cpp": "cpu", "cuda": "cuda", "triton": "cuda"}
_LIBRARY = torch.library.Library("bkdfast", "DEF")
OPS: dict[str, Op] = {}


class Op:
    """One op of the library: `Op(schema, check=..., reference=...)`.

    Args:
        schema: the op's schema without namespace, e.g. `"scale(Tensor(a!) x, float by) -> ()"`.
        check: same signature; refuses shapes, dtypes and devices that do not fit.
        fake: same signature; returns fake outputs (None: the op only mutates). It runs after `check`.
        reference: same signature in plain PyTorch; it is the op's meaning.
        triton: module of `bkdfast.triton_kernels` whose `launch` or, for the second op of a file, `launch_<name>` has
            the same signature; None: the op has no Triton kernel.
        composite: the reference is written in other ops of the library, whose kernels serve it.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable,
        reference: Callable,
        fake: Callable | None = None,
        triton: str | None = None,
        composite: bool = False,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self.check = check
        self.reference = reference
        self.triton = triton
        self.composite = composite
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        self._resolved: dict[tuple[str, str], Callable] = {}
        self._compiled = {device: self._has_kernel(device) for device in ("CPU", "CUDA")}
        if triton and _why_no_triton() is None and (FORCED == "triton" or not self._compiled["CUDA"]):
            _LIBRARY.impl(self.name, self._launch, "CUDA", allow_override=True)

        def checked_fake(*arguments):
            check(*arguments)
            return fake(*arguments) if fake else None

        torch.library.register_fake(f"bkdfast::{self.name}", checked_fake, lib=_LIBRARY)
        self.dispatched = getattr(torch.ops.bkdfast, self.name).default
        OPS[self.name] = self

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Give a functional op its gradient (as `torch.library.register_autograd`)."""
        torch.library.register_autograd(f"bkdfast::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def resolve(self, backend: str | None, device: torch.device | None = None) -> Callable:
        """The callable that serves `backend` (None: the dispatcher's choice) for tensors on `device` (None: CPU).

        Raises:
            BackendError: `backend` is unknown or cannot serve this op here.
        """
        if backend is None:
            return self.dispatched
        if backend == "reference":
            return self.reference
        here = device.type if device is not None else "cpu"
        if (backend, here) not in self._resolved:
            self._resolved[backend, here] = self._resolve(backend, here)
        return self._resolved[backend, here]

    def _resolve(self, backend: str, here: str) -> Callable:
        if backend not in CHOICES:
            raise BackendError(f"backend {backend!r} is not one of {sorted(CHOICES)}")
        status = self.backends()[backend]
        if status != "available":
            raise BackendError(f"backend {backend!r} cannot serve {self.name} here: {status}")
        if here != _DEVICES[backend]:
            raise BackendError(
                f"backend {backend!r} serves {_DEVICES[backend]} tensors, these are on {here}; move them or leave "
                "backend= unset"
            )
        if backend == "triton":
            return self._launch
        if backend == "cuda" and FORCED == "triton":
            raise BackendError(f"backend 'cuda' cannot serve {self.name} here: BKDFAST_BACKEND=triton replaced it")
        return self.dispatched

    def backends(self) -> dict[str, str]:
        """Each backend of this op: `"available"`, or why it is not."""
        status = {}
        for backend, key in (("cpp", "CPU"), ("cuda", "CUDA")):
            if EXTENSION.reason is not None:
                status[backend] = EXTENSION.reason
            elif not self._compiled[key]:
                status[backend] = self._no_kernel(backend)
            else:
                status[backend] = _gpu_status() if backend == "cuda" else "available"
        if self.triton is None:
            status["triton"] = self._no_kernel("triton")
        else:
            status["triton"] = _why_no_triton() or _gpu_status()
        return {**status, "reference": "available"}

    def serving(self, device: str) -> str:
        """The backend that the dispatcher picks for tensors on `device`, `"cpu"` or `"cuda"`."""
        if FORCED == "reference":
            return "reference"
        if self.composite:
            return "other ops"
        if self._compiled[device.upper()] and not (device == "cuda" and FORCED == "triton" and self.triton):
            return "cpp" if device == "cpu" else "cuda"
        return "triton" if device == "cuda" and self.triton and _why_no_triton() is None else "reference"

    def _has_kernel(self, key: str) -> bool:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"bkdfast::{self.name}", key)

    def _no_kernel(self, backend: str) -> str:
        if self.composite:
            return "it runs on the kernels of other ops"
        if backend == "cuda" and (reason := EXTENSION.why_no_cuda()):
            return reason
        language = {"cpp": "C++", "cuda": "CUDA", "triton": "Triton"}[backend]
        return f"no {language} kernel for this op"

    @functools.cached_property
    def _launcher(self) -> Callable:
        module = importlib.import_module(f"bkdfast.triton_kernels.{self.triton}")
        return module.launch if self.name == self.triton else getattr(module, f"launch_{self.name}")

    def _launch(self, *arguments):
        self.check(*arguments)  # a kernel would read out of bounds
        return self._launcher(*arguments)


class Extension:
    """The compiled library: its path when loaded, else the reason why it is not."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.reason: str | None = "not loaded yet"

    def load(self) -> None:
        """Load `bkdfast/_C*.so` if there is one; a missing or broken library never breaks the import."""
        if FORCED not in ("", *CHOICES):
            choices = ", ".join(map(repr, CHOICES))
            raise BackendError(f"BKDFAST_BACKEND={FORCED!r} is not one of {choices}; unset it or fix it")
        if FORCED == "reference":
            self.reason = "BKDFAST_BACKEND=reference"
            return
        found = sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))
        if not found or _build_info().get("extension") is False:  # one that an earlier build left is not of this source
            self.reason = "the C++ extension was not built: " + _why_not_built()
        else:
            try:
                torch.ops.load_library(found[0])
                self.path, self.reason = found[0], None
            except OSError as error:
                self.reason = f"{found[0].name} does not load: {error}"
        missing = {"cpp": self.reason, "cuda": self.reason or self.why_no_cuda(), "triton": _why_no_triton()}
        if reason := missing.get(FORCED):
            raise BackendError(f"BKDFAST_BACKEND={FORCED}, but {reason}")

    def why_no_cuda(self) -> str | None:
        """None when the library was built with its CUDA kernels."""
        cuda = _build_info().get("cuda") or {}
        return None if cuda.get("built") else cuda.get("reason", "the CUDA kernels were not built")

    def cpu_isa(self) -> str | None:
        """What the CPU kernels use: `"amx"`, `"avx512"`, `"avx2"` or `"scalar"`; None when nothing is loaded.

        Raises:
            BackendError: `BKDFAST_CPU` is unknown or more than this CPU has.
        """
        if self.path is None:
            return None
        ask = ctypes.CDLL(str(self.path)).bkdfast_cpu_isa
        ask.restype = ctypes.c_char_p
        answer = ask().decode()
        if answer not in ("amx", "avx512", "avx2", "scalar"):
            raise BackendError(answer)
        return answer


def _build_info() -> dict:
    from bkdfast._build import read_build_info

    return read_build_info()


def _why_not_built() -> str:
    return _build_info().get("reason") or "reinstall with a C++ compiler: pip install --no-build-isolation ."


@functools.cache
def _why_no_triton() -> str | None:
    if FORCED == "reference":
        return "BKDFAST_BACKEND=reference"
    if FORCED == "cuda":
        return "BKDFAST_BACKEND=cuda"
    return None if importlib.util.find_spec("triton") else "triton is not installed"


def _gpu_status() -> str:
    """`"available"` where torch can use a GPU, else why not."""
    if torch.cuda.is_available():
        return "available"
    return "no GPU that torch can use" if torch.version.cuda or torch.version.hip else "this torch is a CPU build"


EXTENSION = Extension()
EXTENSION.load()
