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
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    said = re.sub(r"\s+", " ", code)
    assert len(lines) == 4 and all(line in said for line in lines), lines
    assert (tmp_path / "heads.png").stat().st_size > 1000
