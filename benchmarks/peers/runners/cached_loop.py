"""Plain PyTorch hooks over transformers' own cache of the prompt."""

from __future__ import annotations

import functools

from benchmarks.sweep_task import Sweep, Task
from benchmarks.sweep_task import cached_loop as run

PACKAGES = ()


def load(task: Task) -> Sweep:
    return functools.partial(run, task)
