"""Builds the optional C++ extension `prunekern._C`; all else about the package is in pyproject.toml.

PRUNEKERN_BUILD=none   pure Python
PRUNEKERN_BUILD=cpp    the CPU kernels (what happens by default)
PRUNEKERN_BUILD=cuda   the CPU and the CUDA kernels: needs nvcc (CUDA_HOME, or on PATH), but no GPU and no CUDA torch;
                       without one it says so, and builds cpp. PRUNEKERN_CUDA_ARCHS="80 90a" names other targets than
                       csrc/cuda/nvcc.py does.

Where the extension cannot be built (no compiler, no torch, a compile error) the install goes on without it.
The reason is printed, and kept in `prunekern/_C.reason`, where `prunekern.kernels.unavailable()` finds it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

sys.path.insert(0, str(Path(__file__).resolve().parent / "csrc" / "cuda"))
import nvcc

MODES = ("none", "cpp", "cuda")
REBUILD = "PRUNEKERN_BUILD=cpp pip install -e . --no-build-isolation"

# Kernel units (csrc/cpu/kernels/) are compiled once per instruction set; which one runs is decided at run time.
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "portable": [],
    **({"avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]} if X86 else {})}
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0"]
KERNEL_FLAGS = [*FLAGS, "-fno-math-errno", "-ffp-contract=fast", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# What a sanitizer build adds, to compiling and linking alike (CONTRIBUTING.md).
EXTRA_FLAGS = os.environ.get("PRUNEKERN_CXXFLAGS", "").split()


def say(text: str) -> None:
    print(f"prunekern: {text}", file=sys.stderr, flush=True)


def build_mode() -> str:
    mode = os.environ.get("PRUNEKERN_BUILD", "cpp")
    if mode not in MODES:
        raise SystemExit(f"prunekern: PRUNEKERN_BUILD={mode!r} is not known; use one of {', '.join(MODES)}.")
    return mode


def find_compiler() -> str | None:
    """The C++ compiler on PATH: what CXX asks for, else what Python was built with, else the usual ones."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
    return next((name for name in names if name.split() and shutil.which(name.split()[0])), None)


def is_stale(target: Path, flags: str) -> bool:
    """Whether an object is missing, made with other flags, or older than a file that it was made from (as the
    compiler listed them beside it)."""
    try:
        made = target.stat().st_mtime
        sources = target.with_suffix(".d").read_text().split(":", 1)[1].replace("\\\n", " ").split()
        return target.with_suffix(".flags").read_text() != flags or made < max(os.stat(s).st_mtime for s in sources)
    except (OSError, IndexError, ValueError):
        return True


class OptionalBuildExt(build_ext):
    """`build_ext` that leaves the extension out, with its reason, instead of failing the install."""

    def run(self) -> None:
        self.in_source = bool(self.inplace)  # setuptools clears the flag while it builds
        super().run()

    def build_extension(self, ext: Extension) -> None:
        reason = self.obstacle()
        if reason is None:
            try:
                self.add_torch(ext)
                ext.extra_objects = self.compile_all()
                linked, objects = Path(self.build_temp) / "linked.txt", "\n".join(ext.extra_objects)
                if not linked.is_file() or linked.read_text() != objects:
                    self.force = True      # setuptools compares times only: with and without CUDA are other binaries
                super().build_extension(ext)
                linked.write_text(objects)
            except (BaseError, CCompilerError, OSError) as error:
                say(str(error))
                reason = f"{os.environ['CXX']} could not build it; `{REBUILD} -v` shows its output"
        binary = Path(self.get_ext_filename(ext.name)).name
        for folder in self.package_folders():
            note = folder / "_C.reason"
            note.unlink(missing_ok=True)
            if reason is not None:
                # An older binary would be used with sources that it was not made from.
                (folder / binary).unlink(missing_ok=True)
                folder.mkdir(parents=True, exist_ok=True)
                note.write_text(reason + "\n", encoding="utf-8")
        if reason is None:
            say("C++ extension built.")
        else:
            say(f"NOTE: pure-Python install: {reason}. Everything works, some CPU paths are slower.")

    def obstacle(self) -> str | None:
        """Why nothing can be compiled, or None."""
        mode = build_mode()
        if mode == "none":
            return "PRUNEKERN_BUILD=none was asked for"
        if (compiler := find_compiler()) is None:
            return f"no C++ compiler was found; install one (or set CXX), then: {REBUILD}"
        os.environ.setdefault("CXX", compiler)
        try:
            import torch  # noqa: F401
        except ImportError as error:
            return f"torch cannot be imported by the build ({error}); install torch, then: {REBUILD}"
        return None

    def compile_all(self) -> list[str]:
        """Objects of all units that need no torch, in parallel; what is up to date is left alone."""
        cuda, objects = self.compile_cuda()
        units = [(unit, isa, [f"-DPK_ISA={isa}", *KERNEL_FLAGS, *INSTRUCTION_SETS[isa]])
                 for unit in sorted(Path("csrc/cpu/kernels").glob("*.cpp")) for isa in INSTRUCTION_SETS]
        engine = sorted(Path("csrc/cuda").glob("*.cpp")) if cuda else []
        units += [(unit, "api", [*FLAGS, *cuda]) for unit in (*sorted(Path("csrc/api").glob("*.cpp")), *engine)]

        def compile_one(job: tuple[Path, str, list[str]]) -> str:
            unit, folder, flags = job
            where = str(Path(self.build_temp) / folder)
            (target,) = self.compiler.object_filenames([str(unit)], output_dir=where)
            flags = [*flags, *EXTRA_FLAGS]
            if self.force or is_stale(Path(target), " ".join(flags)):
                self.compiler.compile([str(unit)], output_dir=where, extra_postargs=[*flags, "-MMD"])
                Path(target).with_suffix(".flags").write_text(" ".join(flags))
            return target
        with ThreadPoolExecutor(os.cpu_count() or 1) as workers:
            return [*workers.map(compile_one, units), *objects]

    def compile_cuda(self) -> tuple[list[str], list[str]]:
        """Flags for what calls the CUDA kernels, and their objects with the runtime; or nothing, and a note why."""
        if build_mode() != "cuda":
            return [], []
        found = nvcc.find()
        if found is None:
            say("NOTE: no nvcc was found (CUDA_HOME, PATH); building without CUDA.")
            return [], []
        objects, report = nvcc.compile_all(found, Path(self.build_temp) / "cuda", self.force)
        say(f"CUDA kernels for {', '.join(nvcc.targets(found))}: {report}")
        return ["-DPK_CUDA=1", f"-I{found.home / 'include'}"], [*objects, str(nvcc.runtime(found))]

    def add_torch(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        ext.include_dirs += include_paths()
        ext.library_dirs += library_paths()

    def package_folders(self) -> list[Path]:
        """Where the binary goes: the build folder, and the sources too for an editable install."""
        return [Path(self.build_lib) / "prunekern", *([Path("prunekern")] if self.in_source else [])]


setup(
    ext_modules=[
        Extension(
            "prunekern._C",
            sources=sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])),
            depends=sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.def"),
                                    *Path("csrc").glob("*/kernels/*.c*"), *Path("csrc").glob("*/*.cpp")])),
            define_macros=[
                *([("PK_X86", "1")] if X86 else []),
                ("TORCH_TARGET_VERSION", "0x020b000000000000"),  # torch 2.11's stable ABI
                ("Py_LIMITED_API", "0x030b0000"),
            ],
            extra_compile_args=[*FLAGS, *EXTRA_FLAGS],
            extra_link_args=["-pthread", "-ldl", *EXTRA_FLAGS],
            libraries=["torch_cpu"],
            language="c++",
            py_limited_api=True,
            optional=True,
        )
    ],
    cmdclass={"build_ext": OptionalBuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
