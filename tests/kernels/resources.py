"""What every GPU kernel takes of a GPU, without one: `python -m tests.kernels.resources` rewrites `resources.csv`.

Triton kernels are compiled ahead of time, each representative variant (`aot_variants()` of its module) for each
target; CUDA kernels are read out of the built `bkdfast/_C.so`. Registers, stack and shared memory come from `cuobjdump`
(part of the triton package) and, for AMD, from the assembly's metadata. Occupancy is an estimate: resident warps over
the most there can be, from registers, static shared memory and threads; dynamic shared memory of CUDA kernels is not
counted.
"""

from __future__ import annotations

import csv
import importlib
import io
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).with_name("resources.csv")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
_SHARED_PER_SM = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10, "gfx942": 64 << 10}


@dataclass(frozen=True, order=True)
class Row:
    """One kernel on one target. Shared memory in bytes a block, occupancy in percent."""

    source: str
    kernel: str
    variant: str
    target: str
    registers: int
    stack: int
    shared: int
    threads: int
    occupancy: int


def versions() -> str:
    """The compilers whose figures are comparable."""
    import triton

    from bkdfast._build import read_build_info

    return f"# triton {triton.__version__}, nvcc {(read_build_info().get('cuda') or {}).get('nvcc', 'none')}"


def collect() -> list[Row]:
    """All rows, sorted."""
    with ProcessPoolExecutor(2) as pool:
        rows = [row for part in pool.map(_compile, triton_variants(), chunksize=4) for row in part]
    return sorted([*rows, *cuda_rows()])


def triton_modules() -> Iterator[str]:
    """Names of the kernel modules."""
    import bkdfast.triton_kernels

    for info in pkgutil.iter_modules(bkdfast.triton_kernels.__path__):
        if hasattr(_module(info.name), "aot_variants"):
            yield info.name


def triton_variants() -> Iterator[tuple[str, int]]:
    """(module, index of the variant)."""
    for name in triton_modules():
        for i, _ in enumerate(_module(name).aot_variants()):
            yield name, i


def _module(name: str):
    return importlib.import_module(f"bkdfast.triton_kernels.{name}")


def _compile(which: tuple[str, int]) -> list[Row]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, index = which
    name, function, signature, constexprs, warps, stages = list(_module(module).aot_variants())[index]
    signature = {
        argument: "constexpr" if argument in constexprs else signature[argument] for argument in function.arg_names
    }
    # What the launcher specialises: data is aligned, and so are the rows.
    aligned = [i for i, kind in enumerate(signature.values()) if kind[0] == "*" or kind.endswith(":16")]
    signature = {argument: kind.removesuffix(":16") for argument, kind in signature.items()}
    source = ASTSource(
        fn=function,
        signature=signature,
        constexprs={(function.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    rows = []
    for target in TARGETS:
        amd = target.startswith("gfx")
        gpu = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)
        built = triton.compile(source, target=gpu, options={"num_warps": warps, "num_stages": stages})
        if amd:
            text = built.asm["amdgcn"]
            registers = _field(text, ".vgpr_count")
            stack = _field(text, ".private_segment_fixed_size") + _field(text, ".vgpr_spill_count")
        else:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(built.asm["cubin"])
                file.flush()
                _, _, registers, stack, _ = next(parse_usage(cuobjdump("-res-usage", file.name)))
        threads, shared = warps * (64 if amd else 32), built.metadata.shared
        rows.append(
            Row(f"triton/{module}", function.__name__, name, target, registers, stack, shared, threads,
                occupancy(target, registers, shared, threads))
        )  # fmt: skip
    return rows


def _field(text: str, name: str) -> int:
    found = re.search(rf"{re.escape(name)}:\s*(\d+)", text)
    assert found, f"{name} is not in the assembly"
    return int(found.group(1))


def cuda_rows() -> list[Row]:
    """The CUDA kernels of the built library; none where it was built without them."""
    from bkdfast.ops._library import EXTENSION

    if EXTENSION.path is None or EXTENSION.why_no_cuda():
        return []
    library = str(EXTENSION.path)
    usage = list(parse_usage(cuobjdump("-res-usage", library)))
    threads = dict(re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", cuobjdump("-ptx", library)))
    short = dict(zip((name for _, name, *_ in usage), demangle([name for _, name, *_ in usage]), strict=True))
    rows = []
    for target, name, registers, stack, shared in usage:
        kernel, _, variant = short[name].partition("<")
        assert name in threads, f"{short[name]} has no __launch_bounds__"
        count = int(threads[name])
        source = re.search(
            r"__[0-9a-f]+_\d+_(\w+?)_cu_", name
        )  # the compiler's name for the file's anonymous namespace
        assert source, f"{short[name]} is not in an anonymous namespace"
        rows.append(
            Row(f"cuda/{source.group(1)}", kernel, variant.removesuffix(">"), target, registers, stack, shared, count,
                occupancy(target, registers, shared, count))
        )  # fmt: skip
    return rows


def demangle(names: list[str]) -> list[str]:
    """Names with template arguments, without namespaces and parameters."""
    said = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    plain = [re.sub(r"\(anonymous namespace\)::|^void |bkdfast::", "", line) for line in said.splitlines()]
    return [re.sub(r"\((\w+)\)(\d+)", r"\2", line) for line in plain]


def cuobjdump(*arguments: str) -> str:
    """Output of the disassembler that comes with triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def parse_usage(text: str) -> Iterator[tuple[str, str, int, int, int]]:
    """(target, mangled name, registers, stack and local bytes, shared bytes) of each function."""
    target = ""
    lines = iter(text.splitlines())
    for line in lines:
        if found := re.match(r"arch = (\w+)", line):
            target = found.group(1)
        elif found := re.match(r" Function (\S+):", line):
            use = dict(re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", next(lines)))
            shared = int(use["SHARED"])
            yield target, found.group(1), int(use["REG"]), int(use["STACK"]) + int(use["LOCAL"]), shared


def occupancy(target: str, registers: int, shared: int, threads: int) -> int:
    """Percent of the warps that could be resident on one multiprocessor."""
    if target.startswith("gfx"):
        waves = threads // 64
        by_registers = min(8, 512 // max(-(-registers // 8) * 8, 8)) * 4 // waves
        blocks = min(by_registers, _SHARED_PER_SM[target] // shared if shared else 32)
        return round(100 * blocks * waves / 32)
    warps = -(-threads // 32)
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps) if registers else 32
    by_shared = _SHARED_PER_SM[target] // (shared + 1024) if shared else 32
    blocks = min(by_registers, by_shared, 64 // warps, 32)
    return round(100 * blocks * warps / 64)


def write(rows: list[Row]) -> str:
    """The table as text."""
    out = io.StringIO()
    out.write(versions() + "\n")
    table = csv.writer(out, lineterminator="\n")
    table.writerow([field.name for field in fields(Row)])
    table.writerows(astuple(row) for row in rows)
    return out.getvalue()


def read() -> tuple[str, list[Row]]:
    """(versions, rows) of the table in the repository."""
    first, *rest = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [Row(*row[:4], *map(int, row[4:])) for row in csv.reader(rest[1:])]  # type: ignore[arg-type]
    return first, rows


if __name__ == "__main__":
    TABLE.write_text(write(collect()), encoding="utf-8")
    print(f"wrote {TABLE}", file=sys.stderr)
