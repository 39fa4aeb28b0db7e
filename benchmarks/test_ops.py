"""Every version of every case under pytest-benchmark: `python -m pytest benchmarks --benchmark-only`.

For a look at single ops; the ratios that documents quote come from `python -m benchmarks.run`.
"""

from __future__ import annotations

import torch

from benchmarks.cases import all_cases

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    cases = list(all_cases(DEVICE))
    found = [(case, name) for case in cases for name in case.versions]
    metafunc.parametrize(("case", "version"), found, ids=[f"{c.op} {c.name}: {name}" for c, name in found])


def test_op(benchmark, case, version):
    benchmark.group = f"{case.op} {case.name}"
    with torch.no_grad():
        case.check()
        run = case.versions[version]
        benchmark(run if DEVICE.type == "cpu" else lambda: (run(), torch.cuda.synchronize()))
