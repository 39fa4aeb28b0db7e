"""The examples in docstrings, and those of the README."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((ROOT / "bkdfast").rglob("*.py"))
    if ">>>" in path.read_text("utf-8")
]


def test_modules_with_examples_are_found():
    assert {"bkdfast.ops.patch_heads", "bkdfast.svd.delta"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_readme(tmp_path, monkeypatch, capsys, fresh_dynamo):
    """Its blocks, one after the other, print what their comments say."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    plan = re.search(r"^Patch of .*\n(  .*\n)+", printed, re.M)  # what it says depends on the machine
    assert plan and "4 of 16 columns" in plan[0] and "FLOP instead of" in plan[0]
    lines = [line for line in printed.replace(plan[0], "").splitlines() if line]
    said = re.sub(r"\s+", " ", code)
    assert len(lines) == 4 and all(line in said for line in lines), lines
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("heads.png", "trace.png", "curve.png"))
