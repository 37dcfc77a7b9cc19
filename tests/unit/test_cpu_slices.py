"""Batches in slices and parts on the C++ engine."""

from __future__ import annotations

import pytest
import torch

from prunekern.backends import Lowered, lower
from prunekern.backends.cpu import CpuPlacement
from prunekern.backends.cpu.parted import PartedPlacement
from prunekern.kernels import unavailable
from prunekern.lower.tolerance import error
from tests.models import make

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no C++ engine: {unavailable()}")


def placed(lowered: Lowered, batch: int) -> CpuPlacement | PartedPlacement:
    (found,) = (p for signature, p in lowered._placements.items() if signature.batch == batch)
    return found       # type: ignore[return-value]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [64, 96, 131, 203])
def test_large_batches_are_cut(batch: int, threads: int) -> None:
    model, (x,) = make("fashion", batch=batch)
    lowered = lower(model, x[:2], backend="cpu", num_threads=threads)
    with torch.no_grad():
        assert error(lowered(x), model(x)) < 1e-5
    placement = placed(lowered, batch)
    parts = placement.parts if isinstance(placement, PartedPlacement) else [placement]
    assert sum(part.signature.batch for part in parts) == batch
    assert parts[0].slices > 1
    assert (len(parts) == 2) == (batch == 131), "a prime has no slices but single images"
    assert {part.settings.threads for part in parts} == {threads}
    report = lowered.verify(model, x)
    assert len(report.outputs) == 1


def test_samples_that_meet_stay_together() -> None:
    class Meets(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.softmax(0)
    x = torch.randn(4096, 300)
    lowered = lower(Meets().eval(), x[:2], backend="cpu")
    assert error(lowered(x), x.softmax(0)) < 1e-6
    assert placed(lowered, 4096).slices == 1       # type: ignore[union-attr]
