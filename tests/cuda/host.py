"""The CUDA backend on the host: its kernels, engine and planner, compiled for the CPU (csrc/host)."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import platform
import shutil
import sys
from pathlib import Path

import pytest

from prunekern.backends.cuda import CudaBackend, Options
from prunekern.backends.cuda.library import Library

ROOT = Path(__file__).parents[2]
HOST = ROOT / "csrc" / "host"
CUDA = ROOT / "csrc" / "cuda"


def load(file: Path) -> object:
    """A build script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem + "_script", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)      # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def compiler() -> list[str]:
    """The C++ compiler, or a skip that says why not."""
    command = os.environ.get("CXX", "g++").split()
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]} here")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("cuda_on_host.h switches fibers on x86-64 only")
    return command


def library_file() -> Path:
    """Built once, in build/host; workers wait for each other."""
    compiler()
    folder = ROOT / "build" / "host"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return Path(load(HOST / "build.py").build(folder))  # type: ignore[attr-defined]


def backend(**options: object) -> CudaBackend:
    """The CUDA backend with CPU tensors for those of a GPU."""
    return CudaBackend(Options(**options), Library(library_file()), ("cpu",))  # type: ignore[arg-type]
