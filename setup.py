"""Build of the compiled extension; everything else is in pyproject.toml.

The extension is optional. It is left out, and a pure Python install made that says so loudly, when

- `BKDFAST_NO_EXT=1` is set,
- torch cannot be imported (a plain `pip install .` builds in isolation, without torch: use `--no-build-isolation`),
- there is no C++ compiler, or compiling fails (`BKDFAST_REQUIRE_EXT=1` makes that an error instead).

What happened is written to `bkdfast/_build.json`, which `bkdfast doctor` reads.
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
# The lowest torch whose stable ABI the library needs: one build serves 2.10 and later.
STABLE_ABI = "0x020a000000000000"
REQUIRED = os.environ.get("BKDFAST_REQUIRE_EXT") == "1"


def why_no_extension():
    """None when the extension can be built, else the reason in words."""
    if os.environ.get("BKDFAST_NO_EXT") == "1":
        return "BKDFAST_NO_EXT=1 at build time"
    try:
        import torch  # noqa: F401
        from torch.utils import cpp_extension  # noqa: F401
    except ImportError:
        return (
            "torch could not be imported at build time; install torch, then "
            "`pip install --no-build-isolation .` (a plain `pip install .` builds without it)"
        )
    compiler = os.environ.get("CXX", "c++")
    try:
        subprocess.run([*compiler.split(), "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return f"no C++ compiler ({compiler!r} does not run); install g++ or clang++, or set CXX"
    return None


def record(package=ROOT / "bkdfast", **facts):
    """Write the build facts into `package` (the source tree, or where a wheel is being put together)."""
    facts = {"extension": False, "reason": None, "python": platform.python_version(), **facts}
    (Path(package) / "_build.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if facts["reason"]:
        if REQUIRED:
            sys.exit(f"BKDFAST_REQUIRE_EXT=1, but: {facts['reason']}")
        bar = "!" * 100
        text = f"bkdfast: PURE PYTHON INSTALL, without the compiled kernels.\n{facts['reason']}"
        print(f"{bar}\n{text}\n{bar}", file=sys.stderr)


def extension_arguments():
    reason = why_no_extension()
    if reason:
        record(reason=reason)
        return {}
    import torch
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """Records what was built; a failed compile leaves a working pure Python install."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # noqa: BLE001  any failure of a compiler is the same to the user
                if REQUIRED:
                    raise
                reason = f"compiling failed ({type(error).__name__}: {error}); see the build log (pip install -v)"
                record(self.package_folder(), reason=reason)
                self.extensions = []
            else:
                compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True)
                record(
                    self.package_folder(),
                    extension=True,
                    torch=torch.__version__,
                    compiler=compiler.stdout.splitlines()[0],
                )

        def package_folder(self):
            return ROOT / "bkdfast" if self.inplace or self.editable_mode else Path(self.build_lib) / "bkdfast"

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    extension = cpp_extension.CppExtension(
        "bkdfast._C",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp")),
        # Contraction off: a*z + b*s rounds as the reference does, on every machine.
        extra_compile_args=[
            "-O3",
            "-std=c++20",
            "-fvisibility=hidden",
            "-ffp-contract=off",
            f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
        ],
        py_limited_api=True,
    )
    command = BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [extension], "cmdclass": {"build_ext": command}}


setup(
    # The top-level name `triton_kernels` belongs to Triton itself; ours is installed inside the package.
    packages=[*find_packages(include=["bkdfast*"]), "bkdfast.triton_kernels"],
    package_dir={"bkdfast.triton_kernels": "triton_kernels"},
    **extension_arguments(),
)
