"""What runs in a process of its own: one network of the zoo. And the list of them, without their libraries in sight."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Sequence
from importlib import metadata
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.architectures import PACKAGES, architectures
from bench.zoo_case import examine

MEMORY = 10 * 2 ** 30          # bytes: a network that wants more fails alone, instead of taking the machine down


def names(zoo: str) -> list[str]:
    return list(architectures(zoo))


def facts(zoos: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """Where and of what the figures of a run are."""
    found = machine.environment(torch.device("cpu"))
    packages = [*(PACKAGES[zoo] for zoo in zoos if zoo in PACKAGES), "torch-pruning"]
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found["versions"][name] = metadata.version(name)
    return {**found, "arguments": [Path(a).name if Path(a).is_absolute() else a for a in arguments]}


def main(pipe: connection.Connection, zoo: str, name: str, library: str, build: float, cap: float) -> None:
    """Send the stages as they begin, then the case as JSON; print nothing. build, cap: seconds of processor time, which
    a busy machine does not stretch."""
    torch.set_num_threads(1)
    limit(build, "RLIMIT_CPU")
    limit(MEMORY, "RLIMIT_DATA")

    def tell(stage: str) -> None:
        if stage in ("trace", "run"):       # a peer's checks have seconds of their own
            limit(time.process_time() + cap, "RLIMIT_CPU")
        pipe.send(stage)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    pipe.send(examine(architectures(zoo)[name], library, tell).to_json())


def limit(most: float, what: str) -> None:
    """Where the system knows such limits."""
    with contextlib.suppress(ImportError, AttributeError, ValueError, OSError):
        import resource
        resource.setrlimit(getattr(resource, what), (math.ceil(most), resource.RLIM_INFINITY))
