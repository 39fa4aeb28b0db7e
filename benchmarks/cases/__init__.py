"""The cases by op; `all_cases(device)` makes them one after another."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import torch

from benchmarks.case import Case


def all_cases(device: torch.device, ops: set[str] | None = None) -> Iterator[Case]:
    """Every case of every op (or of some), made when it is asked for: some hold gigabytes."""
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if ops is None or module in ops:
            yield from importlib.import_module(f"{__name__}.{module}").cases(device)
