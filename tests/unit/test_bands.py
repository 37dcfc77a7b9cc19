"""Inverted residuals in bands of rows, against fp64."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from prunekern.backends import lower
from prunekern.backends.cpu import bands
from prunekern.backends.lowered import Lowered
from prunekern.kernels import unavailable
from prunekern.lower.tolerance import error, limit

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C++ engine: {unavailable()}")


@dataclass(frozen=True)
class Case:
    channels: int
    wide: int
    outputs: int
    height: int
    width: int
    kernel: int = 3
    stride: int = 1
    padding: int = 1
    residual: bool = False

    def __str__(self) -> str:
        return (f"{self.channels}-{self.wide}-{self.outputs} {self.height}x{self.width} k{self.kernel}s{self.stride}"
                f"p{self.padding}" + "+x" * self.residual)


class Block(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.residual = case.residual
        self.layers = nn.Sequential(
            nn.Conv2d(case.channels, case.wide, 1), nn.ReLU6(),
            nn.Conv2d(case.wide, case.wide, case.kernel, case.stride, case.padding, groups=case.wide), nn.SiLU(),
            nn.Conv2d(case.wide, case.outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


CASES = [
    Case(4, 20, 4, 23, 17, residual=True), Case(3, 37, 5, 30, 9),
    Case(8, 48, 8, 40, 12, kernel=5, padding=2, residual=True),
    Case(5, 33, 7, 31, 14, stride=2), Case(6, 18, 6, 29, 16, kernel=5, stride=2, padding=2),
    Case(2, 17, 3, 26, 11, padding=0), Case(4, 16, 4, 19, 8, kernel=7, padding=3, residual=True),
    Case(3, 19, 4, 20, 13, kernel=4, stride=3, padding=2), Case(1, 2, 1, 16, 16, residual=True),
    Case(4, 24, 6, 3, 50, kernel=3, padding=2), Case(16, 96, 24, 56, 56, stride=2)]


def lowered(model: nn.Module, x: Tensor, threads: int) -> Lowered:
    return lower(model, x, backend="cpu", num_threads=threads, tune="off", algorithms={"conv2d": "in bands"})


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bands(case: Case, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BYTES", 4 * case.wide * case.width * (case.kernel + 3 * case.stride))    # several bands
    model = Block(case).eval()
    for batch in (1, 3):
        x = torch.randn(batch, case.channels, case.height, case.width)
        with torch.no_grad():
            own, exact = model(x), copy.deepcopy(model).double()(x.double())
        network = lowered(model, x, threads)
        y = network(x)
        assert network.explain(x).rows[1].algorithm == "within conv2d"
        assert error(y, exact) <= limit(error(own, exact), torch.float32)
        assert torch.equal(network(x), y), "a second run, in memory that was used, gives something else"


def test_several_chains_for_one_image() -> None:
    """One image on two threads is cut in two; on one thread it is one chain that computes nothing twice."""
    case = Case(8, 64, 8, 64, 64, residual=True)
    model, x = Block(case).eval(), torch.randn(1, 8, 64, 64)
    for threads in (1, 2):
        network = lowered(model, x, threads)
        network(x)
        (placement,) = (p for signature, p in network._placements.items() if signature.batch == 1)
        (group,) = placement.network.recipe.groups       # type: ignore[attr-defined]
        assert len(group) == threads + 1


def test_what_is_needed_elsewhere_is_not_fused() -> None:
    class Tapped(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:      # type: ignore[override]
            wide = self.layers[:2](x)
            return self.layers[2:](wide), wide
    model, x = Tapped(Case(4, 20, 4, 23, 17)).eval(), torch.randn(1, 4, 23, 17)
    network = lowered(model, x, 1)
    assert {row.algorithm for row in network.explain(x).rows} >= {"1x1 GEMM", "depthwise"}
