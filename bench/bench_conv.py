"""Single convolutions with a ReLU: lowered, and as torch runs them."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from bench.conftest import Timed
from bench.engines import CHANNELS_LAST, LOWERED, TORCH, Engine, forced
from bench.verified import hold_to_model

pytestmark = pytest.mark.benchmark(max_time=0.3, warmup=True, warmup_iterations=10)


class Conv(NamedTuple):
    """Square input of ``side``, padded so that stride 1 keeps the size."""

    batch: int
    side: int
    inp: int
    out: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        name = f"{self.batch}x{self.inp}x{self.side}x{self.side}-{self.out}-{self.kernel}x{self.kernel}"
        return name + f"-s{self.stride}" * (self.stride > 1) + f"-g{self.groups}" * (self.groups > 1)

    @property
    def macs(self) -> int:
        out = -(-self.side // self.stride)
        return self.batch * out * out * self.out * self.inp // self.groups * self.kernel ** 2


CONVS = [
    Conv(1, 28, 1, 16), Conv(64, 28, 1, 16), Conv(1, 14, 16, 16), Conv(64, 14, 16, 16),     # Fashion-MNIST network
    Conv(64, 14, 9, 7), Conv(64, 14, 16, 17),                                               # the same, other widths
    Conv(1, 32, 16, 16), Conv(8, 32, 16, 16), Conv(8, 16, 32, 32), Conv(8, 8, 64, 64),      # ResNet-20
    Conv(8, 32, 13, 11), Conv(8, 16, 29, 37),
    Conv(1, 56, 64, 64), Conv(1, 56, 64, 256, 1), Conv(1, 56, 128, 128, 3, 2), Conv(1, 7, 512, 512),    # ResNet-50
    Conv(1, 56, 45, 77), Conv(1, 14, 1024, 301, 1), Conv(1, 224, 3, 64, 7, 2),
    Conv(1, 56, 144, 144, 3, 1, 144), Conv(1, 28, 128, 128, 3, 1, 32),                      # depthwise, grouped
]


@pytest.mark.parametrize("engine", [TORCH, CHANNELS_LAST, *LOWERED, *forced()], ids=lambda engine: engine.name)
@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_conv(timed: Timed, conv: Conv, engine: Engine) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(conv.inp, conv.out, conv.kernel, conv.stride, conv.kernel // 2, groups=conv.groups),
                          nn.ReLU()).eval()
    x = torch.randn(conv.batch, conv.inp, conv.side, conv.side)
    with torch.no_grad():
        ready = engine.make(model, x)
        hold_to_model(ready.call(), model, x, ready.rows)
    timed(ready.call, group=f"conv {conv}", flops=2 * conv.macs)
