"""What the build left behind: `bkdfast/_build.json`, written by `setup.py`, read by `bkdfast doctor`."""

from __future__ import annotations

import json
from pathlib import Path

BUILD_INFO = Path(__file__).with_name("_build.json")


def read_build_info() -> dict:
    """Build facts (`extension`, `reason`, `torch`, `compiler`), or an empty dict where nothing was recorded."""
    if not BUILD_INFO.exists():
        return {}
    return json.loads(BUILD_INFO.read_text(encoding="utf-8"))
