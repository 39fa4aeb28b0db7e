"""Every Triton and CUDA kernel compiles for every GPU it is meant for, without spills and within shared memory.

No GPU is needed. The figures are compared with `resources.csv`, so that a change shows in review:
`python -m tests.kernels.resources` rewrites it.
"""

from __future__ import annotations

import collections
import importlib.util
from pathlib import Path

import pytest

from bkdfast.ops._library import EXTENSION, OPS
from tests.kernels import resources

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed, and with it neither its compiler nor cuobjdump")
    return resources.collect()


def test_every_triton_kernel_is_compiled_for_every_target(rows):
    modules = {path.stem for path in (ROOT / "triton_kernels").glob("*.py")} - {"__init__"}
    assert {op.triton for op in OPS.values() if op.triton} <= set(resources.triton_modules()) <= modules
    for name, i in resources.triton_variants():
        variant = list(resources._module(name).aot_variants())[i]
        same = (f"triton/{name}", variant[1].__name__, variant[0])
        built = {row.target for row in rows if (row.source, row.kernel, row.variant) == same}
        assert built == set(resources.TARGETS), (name, variant[0])


def test_every_cuda_kernel_is_compiled_for_every_target(rows):
    if EXTENSION.reason or EXTENSION.why_no_cuda():
        pytest.skip(EXTENSION.reason or EXTENSION.why_no_cuda())
    targets = collections.defaultdict(set)
    for row in rows:
        if row.source.startswith("cuda/"):
            targets[row.source, row.kernel, row.variant].add(row.target)
    assert targets and all(found == {"sm_80", "sm_90", "sm_100"} for found in targets.values()), targets
    without = {"prefix_attention"}  # Triton alone serves it
    wanted = {f"cuda/{op.triton}" for op in OPS.values() if op.triton and op.name not in without}
    assert {source for source, *_ in targets} == wanted


def test_no_spills_and_shared_memory_within_limits(rows):
    assert not [row for row in rows if row.stack]
    assert not [row for row in rows if row.shared > resources.SHARED_LIMIT[row.target]]
    assert not [row for row in rows if row.occupancy == 0]


def test_the_table_is_current(rows):
    versions, kept = resources.read()
    if versions != resources.versions():
        pytest.skip(f"the table was made with {versions[2:]}, here is {resources.versions()[2:]}")
    assert kept == rows, "run `python -m tests.kernels.resources` and look at the difference"
