"""Build of the compiled extension; everything else is in pyproject.toml.

The extension is optional. It is left out, and a pure Python install made that says so loudly, when

- `BKDFAST_NO_EXT=1` is set,
- torch cannot be imported (a plain `pip install .` builds in isolation, without torch: use `--no-build-isolation`),
- there is no C++ compiler, or compiling fails (`BKDFAST_REQUIRE_EXT=1` makes that an error instead).

The CUDA kernels join the same library where `nvcc` is found, with any torch: nothing of CUDA is linked but the static
runtime. `BKDFAST_NO_CUDA=1` leaves them out; `TORCH_CUDA_ARCH_LIST` chooses the GPUs.

What happened is written to `bkdfast/_build.json`, which `bkdfast doctor` reads.
"""

import json
import os
import platform
import re
import shutil
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


def find_cuda():
    """(folder of the CUDA toolkit or None, facts for `_build.json`)."""
    import torch

    def without(reason):
        return None, {"built": False, "reason": reason}

    if os.environ.get("BKDFAST_NO_CUDA") == "1":
        return without("BKDFAST_NO_CUDA=1 at build time")
    if torch.version.hip:
        return without("this torch is for AMD GPUs; Triton serves them")
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes += [Path(nvcc).resolve().parent.parent] if nvcc else []
    homes = [Path(home) for home in homes if home and (Path(home) / "include" / "cuda_runtime.h").is_file()]
    homes = [home for home in homes if (home / "bin" / "nvcc").is_file()]
    if not homes:
        return without("no CUDA toolkit was found at build time; install it, or set CUDA_HOME to its folder")
    said = subprocess.run([homes[0] / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release ([\d.]+)", said)
    if version is None:
        return without(f"{homes[0] / 'bin' / 'nvcc'} does not run")
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    facts = {"built": True, "nvcc": version.group(1), "architectures": os.environ["TORCH_CUDA_ARCH_LIST"]}
    return homes[0], facts


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
            nonlocal cuda
            try:
                try:
                    super().build_extensions()
                except Exception as error:  # noqa: BLE001  any failure of a compiler is the same to the user
                    if REQUIRED or not cuda["built"]:
                        raise
                    cuda = {"built": False, "reason": f"compiling them failed ({why(error)})"}
                    print(f"bkdfast: the CUDA kernels are left out: {cuda['reason']}", file=sys.stderr)
                    self.extensions = [make_extension(None)]
                    super().build_extensions()
            except Exception as error:  # noqa: BLE001
                if REQUIRED:
                    raise
                self.facts = {"reason": f"compiling failed ({why(error)})"}
                self.extensions = []
            else:
                compiler = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True)
                self.facts = {
                    "extension": True,
                    "torch": torch.__version__,
                    "compiler": compiler.stdout.splitlines()[0],
                    "cuda": cuda,
                }

        def run(self):
            super().run()
            # Only now: while it builds, setuptools hides that the build is in place.
            in_place = self.inplace or self.editable_mode
            record(ROOT / "bkdfast" if in_place else Path(self.build_lib) / "bkdfast", **self.facts)

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    home, cuda = find_cuda()
    command = BuildExtension.with_options(no_python_abi_suffix=True)
    return {"ext_modules": [make_extension(home)], "cmdclass": {"build_ext": command}}


def why(error):
    return f"{type(error).__name__}: {error}; see the build log (pip install -v)"


def make_extension(cuda_home):
    """`bkdfast._C`: the C++ kernels, and the CUDA ones where `cuda_home` is a toolkit."""
    from torch.utils import cpp_extension

    def sources(pattern):
        return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))

    # Contraction off: a*z + b*s rounds as the reference does, on every machine.
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    arguments = {"sources": sources("cpu/*.cpp"), "extra_compile_args": {"cxx": flags}}
    if cuda_home:
        # torch looks for the toolkit only when it is a CUDA build itself.
        cpp_extension.CUDA_HOME = str(cuda_home)
        cpp_extension._check_cuda_version = lambda *_: None
        arguments["sources"] += sources("cuda/*.cu")
        arguments["extra_compile_args"]["nvcc"] = [
            "-O3",
            "-std=c++20",
            "--fmad=false",
            f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
        ]
        arguments["include_dirs"] = [str(cuda_home / "include")]
        arguments["library_dirs"] = [str(cuda_home / "lib64"), str(cuda_home / "lib")]
        arguments["libraries"] = ["cudart_static", "rt", "dl", "pthread"]
        # The static runtime must not answer for the libcudart that a CUDA torch brings.
        arguments["extra_link_args"] = ["-Wl,--exclude-libs,ALL"]
    return cpp_extension.CppExtension("bkdfast._C", py_limited_api=True, **arguments)


setup(
    # The top-level name `triton_kernels` belongs to Triton itself; ours is installed inside the package.
    packages=[*find_packages(include=["bkdfast*"]), "bkdfast.triton_kernels"],
    package_dir={"bkdfast.triton_kernels": "triton_kernels"},
    **extension_arguments(),
)
