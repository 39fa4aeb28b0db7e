"""`import bkdfast` stays cheap: what it brings beside torch is small, and what is heavy comes when it is used."""

import subprocess
import sys

import pytest

HEAVY = ["transformers", "huggingface_hub", "peft", "matplotlib", "pandas", "scipy", "sklearn", "triton"]


@pytest.mark.parametrize("module", ["bkdfast", "bkdfast.svd", "bkdfast.cli"])
def test_nothing_heavy_is_imported(module):
    script = f"import sys, torch; before = set(sys.modules); import {module}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    found = done.stdout.split()
    assert module in found
    assert not {name.partition(".")[0] for name in found} & set(HEAVY)
