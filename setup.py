"""Build of the compiled extension; everything else is in pyproject.toml.

The extension is optional. It is left out, and a pure Python install made that says so loudly, when

- `BKDFAST_NO_EXT=1` is set,
- torch cannot be imported (a plain `pip install .` builds in isolation, without torch: use `--no-build-isolation`),
- there is no C++ compiler, or compiling fails (`BKDFAST_REQUIRE_EXT=1` makes that an error instead).

The CUDA kernels join the same library where `nvcc` is found, with any torch: nothing of CUDA is linked but the static
runtime. `BKDFAST_NO_CUDA=1` leaves them out; `TORCH_CUDA_ARCH_LIST` chooses the GPUs.

The host-side module `bkdfast._native` (pybind11) is built apart from the kernels: it needs no torch, so an isolated
build has it, and neither of the two is lost when the other fails.

What happened is written to `bkdfast/_build.json`, which `bkdfast doctor` reads.
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
# The lowest torch whose stable ABI the library needs: one build serves 2.10 and later.
STABLE_ABI = "0x020a000000000000"
REQUIRED = os.environ.get("BKDFAST_REQUIRE_EXT") == "1"


def why_no_extension():
    """None when the extension can be built, else the reason in words."""
    if os.environ.get("BKDFAST_NO_EXT") == "1":
        return "BKDFAST_NO_EXT=1 at build time"
    try:
        import torch
        from torch.utils import cpp_extension  # noqa: F401
    except (ImportError, OSError):  # OSError: it is there, and its libraries do not load
        return (
            "torch could not be imported at build time; install torch, then "
            "`pip install --no-build-isolation .` (a plain `pip install .` builds without it)"
        )
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 10):
        return f"torch {torch.__version__} is older than 2.10, whose stable ABI the kernels need; upgrade torch"
    return why_no_compiler()


def why_no_compiler():
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
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        knows_blackwell = tuple(map(int, version.group(1).split("."))) >= (12, 8)
        os.environ["TORCH_CUDA_ARCH_LIST"] = "8.0;9.0;10.0+PTX" if knows_blackwell else "8.0;9.0+PTX"
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


def without_extension(native_reason, **facts):
    """The arguments of `setup` for a pure Python install: what is missing is recorded where the package is put."""

    class BuildPy(build_py):
        def run(self):
            super().run()
            folder = ROOT / "bkdfast" if self.editable_mode else Path(self.build_lib) / "bkdfast"
            record(folder, **facts)
            note_native(folder, native_reason)

    return {"cmdclass": {"build_py": BuildPy}}


def extension_arguments():
    reason = why_no_extension()
    if reason:
        return without_extension(why_no_native(), reason=reason)
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
                    # The same object: setuptools has noted things on it that a new one would lack.
                    vars(self.extensions[0]).update(vars(make_extension(None)))
                    super().build_extensions()
            except Exception as error:  # noqa: BLE001
                if REQUIRED:
                    raise
                self.facts = {"reason": f"compiling failed ({why(error)})"}
                self.extensions = []
            else:
                command = [*os.environ.get("CXX", "c++").split(), "--version"]
                said = subprocess.run(command, capture_output=True, text=True).stdout
                self.facts = {
                    "extension": True,
                    "torch": torch.__version__,
                    "compiler": (said.splitlines() or ["unknown"])[0],
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
    arguments["depends"] = sources("*/*.h") + sources("*/*.cuh")  # a change of these alone rebuilds too
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


def pybind11_headers():
    """Folder of pybind11's headers, its own or those that torch carries, or None."""
    try:
        import pybind11
    except ImportError:
        torch = importlib.util.find_spec("torch")
        bundled = Path(torch.origin).parent / "include" if torch else None
        return str(bundled) if bundled and (bundled / "pybind11" / "pybind11.h").is_file() else None
    return pybind11.get_include()


def why_no_native():
    if os.environ.get("BKDFAST_NO_EXT") == "1":
        return "BKDFAST_NO_EXT=1 at build time"
    if pybind11_headers() is None:
        return "pybind11 could not be imported at build time; install it (pip install pybind11) and reinstall"
    return why_no_compiler()


def make_native():
    """`bkdfast._native`: an ordinary Python extension module, free of torch and CUDA."""
    flags = ["-O3", "-std=c++20", "-fvisibility=hidden", "-g0"]
    folder = Path("csrc", "native")
    return Extension(
        "bkdfast._native",
        sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).glob("*.cpp")),
        depends=[str(folder / "native.h")],
        include_dirs=[pybind11_headers()],
        define_macros=[("NATIVE_FLAGS", json.dumps(" ".join(flags)))],
        extra_compile_args=flags,
        language="c++",
    )


def note_native(folder, reason):
    """Add what became of `_native` to the facts in `folder`; say so where it is missing."""
    path = Path(folder) / "_build.json"
    facts = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    facts |= {"native": reason is None, "native_reason": reason}
    path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    if reason and REQUIRED:
        sys.exit(f"BKDFAST_REQUIRE_EXT=1, but bkdfast._native is missing: {reason}")
    if reason:
        print(f"bkdfast: the host-side module _native is left out: {reason}", file=sys.stderr)


def with_native(arguments):
    """The arguments of `setup`, with `bkdfast._native` beside the extension that may be in them."""
    missing = why_no_native()
    if missing and "ext_modules" not in arguments:
        return arguments

    class BuildNative(arguments.get("cmdclass", {}).get("build_ext", build_ext)):
        """Builds `_native` with setuptools' own command, before and apart from the others: torch's flags and file
        names are for `_C`."""

        def build_extensions(self):
            native = [extension for extension in self.extensions if extension.name == "bkdfast._native"]
            others = [extension for extension in self.extensions if extension not in native]
            self.native_reason = missing
            try:
                self.extensions = native
                build_ext.build_extensions(self)
            except Exception as error:  # noqa: BLE001  as for `_C`
                if REQUIRED:
                    raise
                native, self.native_reason = [], f"compiling failed ({why(error)})"
            self.extensions = others
            super().build_extensions()
            self.extensions = self.extensions + native

        def get_ext_filename(self, name):
            if name.rpartition(".")[2] == "_native":
                return build_ext.get_ext_filename(self, name)
            return super().get_ext_filename(name)

        def run(self):
            # What an earlier build left must not pass for what this one could not build.
            in_place = self.inplace or self.editable_mode
            for folder in [Path(self.build_lib) / "bkdfast", *([ROOT / "bkdfast"] if in_place else [])]:
                for stale in folder.glob("_[Cn]*.so"):
                    stale.unlink()
            super().run()
            note_native(ROOT / "bkdfast" if in_place else Path(self.build_lib) / "bkdfast", self.native_reason)

    extensions = [*arguments.get("ext_modules", []), *([] if missing else [make_native()])]
    commands = {**arguments["cmdclass"], "build_ext": BuildNative}
    return {**arguments, "ext_modules": extensions, "cmdclass": commands}


setup(
    # The top-level name `triton_kernels` belongs to Triton itself; ours is installed inside the package.
    packages=[*find_packages(include=["bkdfast*"]), "bkdfast.triton_kernels"],
    package_dir={"bkdfast.triton_kernels": "triton_kernels"},
    **with_native(extension_arguments()),
)
