"""What runs a single layer in the kernel suites: torch, this library's backends, and each of their algorithms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from bench.verified import error_rows
from prunekern.backends import BACKENDS, lower
from prunekern.core.program import GEMMS

SHOWN = {"implicit GEMM": "1x1 GEMM"}       # as ``explain()`` calls it where the window has one place


@dataclass(frozen=True)
class Ready:
    """A call to time, and the rows of the tolerance table that it falls under."""

    call: Callable[[], Tensor]
    rows: Iterable[str] = ()


@dataclass(frozen=True)
class Engine:
    """``make`` takes a module and its input; it skips the test where it cannot run them."""

    name: str
    make: Callable[[nn.Module, Tensor], Ready]


def _torch(model: nn.Module, x: Tensor) -> Ready:
    return Ready(lambda: model(x))


def _channels_last(model: nn.Module, x: Tensor) -> Ready:
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return Ready(lambda: model(x))


def _lowered(backend: str, model: nn.Module, x: Tensor) -> Ready:
    lowered = lower(model, x, backend=backend, verify=False)
    return Ready(lambda: lowered(x), error_rows(lowered, x))


def _forced(algorithm: str, model: nn.Module, x: Tensor) -> Ready:
    """By one algorithm of the `cpu` backend, whether it would be chosen or not."""
    program = lower(model, x, backend="cpu", verify=False).program
    (step,) = (step for step in program.steps if step.op in GEMMS)
    lowered = lower(model, x, backend="cpu", verify=False, algorithms={step.name: algorithm})
    (found,) = (row.algorithm for row in lowered.explain(x).rows if row.step == step.name)
    if found not in (algorithm, SHOWN.get(algorithm)):
        pytest.skip(f"{algorithm} does not take this convolution")
    return Ready(lambda: lowered(x), error_rows(lowered, x))


def _on_cpu() -> list[str]:
    return [backend.name for backend in BACKENDS if backend.unavailable() is None and "cpu" in backend.devices]


TORCH = Engine("torch", _torch)
CHANNELS_LAST = Engine("torch channels_last", _channels_last)
LOWERED = tuple(Engine(name, partial(_lowered, name)) for name in _on_cpu())


def forced() -> tuple[Engine, ...]:
    """An engine for each algorithm of the `cpu` backend that a convolution can be run by."""
    if "cpu" not in _on_cpu():
        return ()
    from prunekern.backends.cpu.convs import algorithms
    return tuple(Engine(f"cpu, {name}", partial(_forced, name)) for name in algorithms())
