"""Peak of this process's resident set while something runs; without bkdfast, for peers read it too."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def peak_growth(run: Callable[[], Result]) -> tuple[Result, float, float]:
    """(what `run` returns, growth over the state before, peak of the process), in bytes; for a fresh process.

    On Linux the kernel's high-water mark is set back first, so that what loading a model needed does not count.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # freed memory that malloc keeps would hide what `run` needs
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS") or _highest()
    result = run()
    peak = _status("VmHWM") or _highest()
    return result, float(peak - before), float(peak)


def _highest() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return 0
    found = re.search(rf"{name}:\s+(\d+) kB", text)
    return int(found.group(1)) * 1024 if found else 0
