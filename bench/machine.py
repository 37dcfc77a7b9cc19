"""Where figures were taken: processor, caches, load, versions, revision, and the most that the machine can do."""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import prunekern
from prunekern.backends.roofline import measure_roof

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "numpy", "onnx", "onnxruntime", "openvino", "triton")
FLAGS = re.compile(r"sse4_2|avx.*|fma|f16c|amx.*|asimd.*|sve.*|bf16|i8mm")      # those that kernels are chosen by


def placeless(value: Any) -> Any:
    """Texts without the folders that packages and this checkout happen to lie in."""
    if isinstance(value, str):
        return re.sub(r"[^\s\"'(]*/site-packages/", "", value).replace(f"{ROOT}/", "")
    if isinstance(value, Mapping):
        return {key: placeless(item) for key, item in value.items()}
    return [placeless(item) for item in value] if isinstance(value, (list, tuple)) else value


def load_average() -> tuple[float, ...]:
    """Processes that wanted to run, over the last 1, 5 and 15 minutes."""
    return os.getloadavg() if hasattr(os, "getloadavg") else ()


def processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(*keys: str) -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.split(":")[0].strip() in keys)
    except (OSError, StopIteration):
        return None


def instruction_sets() -> list[str]:
    """The processor's vector extensions, as Linux names them."""
    return [flag for flag in (_cpuinfo("flags", "Features") or "").split() if FLAGS.fullmatch(flag)]


def caches(root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, str]:
    """Sizes of the first core's caches: {'L1d': '32K', 'L2': '1024K', 'L3': '32768K'}."""
    found = {}
    for index in sorted(root.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}" + ("d" if kind == "Data" else "")] = size
    return found


SOURCES = ("prunekern", "csrc", "setup.py", "bench/*.py", "tests/models.py", "tests/weights.py")


def _git(*arguments: str) -> bytes:
    return subprocess.run(("git", "-C", str(ROOT), *arguments), capture_output=True, check=True, timeout=20).stdout


def commit() -> str | None:
    """The revision that is checked out, '+' where files differ from it; None outside a git checkout."""
    try:
        return _git("rev-parse", "HEAD").decode().strip() + ("+" if _git("diff", "HEAD", "--name-only") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def sources() -> str | None:
    """A hash of all files that figures come from, as they are checked out; None outside a git checkout."""
    try:
        names = _git("ls-files", "-z", "--", *SOURCES).decode().split("\0")[:-1]
    except (OSError, subprocess.SubprocessError):
        return None
    found = hashlib.sha256()
    for name in names:
        path = ROOT / name
        found.update(name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b"") + b"\0")
    return found.hexdigest()[:16]


def extension() -> str | None:
    """A hash of the C++ extension's binary, which may be older than its sources; None where there is none."""
    found = importlib.util.find_spec("prunekern._C")
    if found is None or found.origin is None:
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()[:16]


def cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on besides the networks."""
    versions = {"python": platform.python_version(), "prunekern": prunekern.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit(),
            "sources": sources(), "extension": extension(), "versions": versions,
            "device": gpu or processor(), "cpu": processor(), "cpus": cpus(), "flags": instruction_sets(),
            "caches": caches(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda, "platform": platform.platform(), "load_average_before": load_average()}


def peaks(device: torch.device, threads: Iterable[int]) -> dict[str, Any]:
    """By number of threads: fp32 GFLOP/s, and GB/s from each level of memory, all measured now."""
    found = {}
    for count in threads:
        roof = measure_roof(device, torch.float32, count)
        found[str(count)] = {"gflops": round(2e-9 * roof.macs, 1), "by": roof.how,
                             "gbytes_per_s": {str(size): round(speed / 1e9, 1) for size, speed in roof.bandwidth}}
    return found
