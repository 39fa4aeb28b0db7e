"""`bkdfast._native`, the compiled host-side runtime, where it can be imported; everything in it has a Python twin."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from bkdfast._build import read_build_info


def load() -> tuple[ModuleType | None, str | None]:
    """(The module, None), or (None, why there is none); a missing or broken module never breaks the import."""
    if os.environ.get("BKDFAST_BACKEND") == "reference":
        return None, "BKDFAST_BACKEND=reference"
    built = read_build_info()
    reason = built.get("native_reason") or "reinstall with a C++ compiler and pybind11: pip install ."
    missing = f"it was not built: {reason}"
    if built.get("native") is False:  # whatever an earlier build left
        return None, missing
    try:
        return importlib.import_module("bkdfast._native"), None
    except ModuleNotFoundError:
        return None, missing
    except ImportError as error:
        return None, f"it does not load: {error}"


NATIVE, WHY_NOT = load()
