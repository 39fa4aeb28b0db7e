"""Plain PyTorch hooks, one full forward for each head: what all others are compared with."""

from __future__ import annotations

import functools

from benchmarks.sweep_task import Sweep, Task
from benchmarks.sweep_task import hook_loop as run

PACKAGES = ()


def load(task: Task) -> Sweep:
    return functools.partial(run, task)
