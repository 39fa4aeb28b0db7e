"""The `bkdfast::` op library: one `Op` per op file, its schema, its fake, its reference and the backends that serve it.

The schema is defined here in Python, so an op exists when nothing is compiled. Kernels only add to it:

- `reference`: plain PyTorch, registered under `CompositeExplicitAutograd`, i.e. for every device without a kernel.
- `cpp`: the compiled library `bkdfast/_C*.so` registers `CPU` kernels when it is loaded (`load_extension`).

The dispatcher therefore picks the best one by itself; `Op.backends()` says which one that is, and why not the others.
`BKDFAST_BACKEND=reference` keeps the compiled library from being loaded.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from bkdfast.errors import BackendError

_LIBRARY = torch.library.Library("bkdfast", "DEF")
OPS: dict[str, Op] = {}


class Op:
    """One op of the library: `Op(schema, fake=..., reference=...)`.

    Args:
        schema: the op's schema without namespace, e.g. `"scale(Tensor(a!) x, float by) -> ()"`.
        fake: same signature; checks shapes and returns fake outputs (nothing for an op that only mutates).
        reference: same signature in plain PyTorch; it is the op's meaning.
    """

    def __init__(self, schema: str, *, fake: Callable, reference: Callable) -> None:
        self.name = schema.split("(", 1)[0]
        self.reference = reference
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(self.name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"bkdfast::{self.name}", fake, lib=_LIBRARY)
        self.dispatched = getattr(torch.ops.bkdfast, self.name).default
        OPS[self.name] = self

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        """Give a functional op its gradient (as `torch.library.register_autograd`)."""
        torch.library.register_autograd(f"bkdfast::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY)

    def resolve(self, backend: str | None) -> Callable:
        """The callable that serves `backend` (None: the dispatcher's choice).

        Raises:
            BackendError: `backend` is unknown or cannot serve this op here.
        """
        if backend is None:
            return self.dispatched
        status = self.backends()
        if backend not in status:
            raise BackendError(f"backend {backend!r} is not one of {sorted(status)}")
        if backend == "reference":
            return self.reference
        if status[backend] != "available":
            raise BackendError(f"backend {backend!r} cannot serve {self.name} here: {status[backend]}")
        return self.dispatched

    def backends(self) -> dict[str, str]:
        """Each backend of this op on CPU tensors: `"available"`, or why it is not."""
        cpp = "available"
        if EXTENSION.reason is not None:
            cpp = EXTENSION.reason
        elif not torch._C._dispatch_has_kernel_for_dispatch_key(f"bkdfast::{self.name}", "CPU"):
            cpp = "no C++ kernel for this op yet"
        return {"cpp": cpp, "reference": "available"}


class Extension:
    """The compiled library: its path when loaded, else the reason why it is not."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.reason: str | None = "not loaded yet"

    def load(self) -> None:
        """Load `bkdfast/_C*.so` if there is one; a missing or broken library never breaks the import."""
        wanted = os.environ.get("BKDFAST_BACKEND", "")
        if wanted not in ("", "cpp", "reference"):
            raise BackendError(f"BKDFAST_BACKEND={wanted!r} is not one of 'cpp', 'reference'; unset it or fix it")
        if wanted == "reference":
            self.reason = "BKDFAST_BACKEND=reference"
            return
        found = sorted(Path(__file__).resolve().parent.parent.glob("_C*.so"))
        if not found:
            self.reason = "the C++ extension was not built: " + _why_not_built()
        else:
            try:
                torch.ops.load_library(found[0])
                self.path, self.reason = found[0], None
            except OSError as error:
                self.reason = f"{found[0].name} does not load: {error}"
        if wanted == "cpp" and self.reason is not None:
            raise BackendError(f"BKDFAST_BACKEND=cpp, but {self.reason}")


def _why_not_built() -> str:
    from bkdfast._build import read_build_info

    return read_build_info().get("reason") or "reinstall with a C++ compiler: pip install --no-build-isolation ."


EXTENSION = Extension()
EXTENSION.load()
