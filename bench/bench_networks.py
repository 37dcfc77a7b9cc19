"""Whole networks, dense and pruned: eager and lowered."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

from bench.conftest import Timed
from bench.verified import error_rows, hold_to_model
from prunekern import prune
from prunekern.backends import BACKENDS, Lowered, lower
from tests.models import make

pytestmark = pytest.mark.benchmark(max_time=0.5, warmup=True, warmup_iterations=3)

SMALL = ("fashion", "lenet", "mlp", "resnet20")
CASES = [(name, kind, batch) for name in SMALL for kind in ("dense", "half") for batch in (1, 8, 64)]
CASES += [("resnet56", "dense", 1), ("resnet56", "dense", 8), ("mobilenet_v2", "dense", 1), ("resnet18", "dense", 1)]
RUNNERS = ("eager", *(b.name for b in BACKENDS if b.unavailable() is None and "cpu" in b.devices))


@lru_cache(maxsize=2)
def network(name: str, kind: str) -> tuple[nn.Module, Tensor]:
    """The dense network, or what is left of it at half of its MACs."""
    model, (x,) = make(name)
    return (model if kind == "dense" else prune(model, x).model), x


@lru_cache(maxsize=2)
def lowered(name: str, kind: str, backend: str) -> Lowered:
    return lower(*network(name, kind), backend=backend, verify=False)


@pytest.mark.parametrize(("name", "kind", "batch"), CASES)
@pytest.mark.parametrize("runner", RUNNERS)
def test_network(timed: Timed, name: str, kind: str, batch: int, runner: str) -> None:
    model, one = network(name, kind)
    torch.manual_seed(0)
    x = torch.randn(batch, *one.shape[1:])
    run = model if runner == "eager" else lowered(name, kind, runner)
    with torch.no_grad():
        hold_to_model(run(x), model, x, error_rows(run, x) if isinstance(run, Lowered) else ())
    timed(lambda: run(x), group=f"{name}, {kind}, batch {batch}")
