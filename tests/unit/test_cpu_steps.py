"""Steps that are not GEMMs, on the CPU engine: all of them native where the engine says so, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunekern.backends import lower
from prunekern.backends.cpu.native import instruction_sets
from tests.weights import randomise_

ISAS = instruction_sets()
if not ISAS:
    pytest.skip("the extension is not built", allow_module_level=True)


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def after(*layers: nn.Module) -> nn.Module:
    """Behind a convolution, whose output the engine may lay out as it likes."""
    return nn.Sequential(nn.Conv2d(3, 21, 3, padding=1), *layers)


MAP, HEADS = ((2, 3, 9, 11),), ((2, 4, 6, 8), (2, 4, 9, 8), (2, 4, 9, 5))
CASES: dict[str, tuple[nn.Module, tuple[tuple[int, ...], ...]]] = {
    **{f"upsample {mode} {option}": (after(nn.Upsample(mode=mode, **option)), MAP)
       for mode in ("nearest", "nearest-exact", "bilinear")
       for option in ({"scale_factor": 2}, {"scale_factor": 1.7}, {"size": (5, 30)})},
    "upsample corners": (after(nn.Upsample(scale_factor=3, mode="bilinear", align_corners=True)), MAP),
    "upsample 1d": (nn.Upsample(scale_factor=2, mode="linear"), ((2, 5, 7),)),
    "upsample 3d": (nn.Upsample(scale_factor=2, mode="trilinear"), ((2, 5, 3, 4, 7),)),
    "recompute scale": (Call(lambda x: functional.interpolate(x, scale_factor=1.7, recompute_scale_factor=True)), MAP),
    "reflection": (after(nn.ReflectionPad2d((2, 1, 0, 3)), nn.Conv2d(21, 4, 3)), MAP),
    "replication": (after(nn.ReplicationPad2d(2)), MAP),
    "circular": (after(nn.CircularPad2d((3, 2, 1, 0))), MAP),
    "constant": (after(nn.ConstantPad2d((1, 0, 2, 1), 0.5), nn.Conv2d(21, 4, 3, padding=1)), MAP),
    "channels padded on": (after(Call(lambda x: functional.pad(x, (0, 0, 0, 0, 3, 2)))), MAP),
    "max pool": (after(nn.MaxPool2d(3, 2, 1)), MAP),
    "max pool, ceil, dilated": (after(nn.MaxPool2d(3, 2, 1, 2, ceil_mode=True)), MAP),
    "average pool": (after(nn.AvgPool2d(3, 2, 1, count_include_pad=False)), MAP),
    "average pool, ceil": (after(nn.AvgPool2d(3, 2, 1, ceil_mode=True)), MAP),
    "average pool, divisor": (after(nn.AvgPool2d(2, divisor_override=3)), MAP),
    "pool of one channel": (nn.Sequential(nn.Conv2d(3, 1, 3), nn.MaxPool2d(2)), MAP),
    "pool 1d": (nn.AvgPool1d(3, 2, 1), ((2, 5, 12),)),
    "pool 3d": (nn.MaxPool3d(2), ((2, 5, 4, 6, 8),)),
    "adaptive": (after(nn.AdaptiveAvgPool2d((4, 5)), nn.AdaptiveMaxPool2d((3, 2))), MAP),
    "global": (after(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(21, 4)), MAP),
    "means": (after(Call(lambda x: x.mean((1, 3)))), MAP),
    "largest": (after(Call(lambda x: x.amax(1, keepdim=True) * x + x.amin(-1, keepdim=True))), MAP),
    "gate": (after(Call(lambda x: x * torch.sigmoid(x.mean((2, 3), keepdim=True)))), MAP),
    "softmax over channels": (after(nn.Softmax(1)), MAP),
    "log softmax": (nn.LogSoftmax(-1), ((3, 10),)),
    "layer norm of channels last": (after(Call(lambda x: x.permute(0, 2, 3, 1)), nn.LayerNorm(21), nn.Linear(21, 5)),
                                    MAP),
    "layer norm": (nn.LayerNorm((5, 7)), ((2, 3, 5, 7),)),
    "rms norm": (nn.RMSNorm(7), ((2, 3, 7),)),
    "group norm": (after(nn.GroupNorm(3, 21)), MAP),
    "instance norm": (after(nn.InstanceNorm2d(21, affine=True)), MAP),
    "prelu": (after(nn.PReLU(21)), MAP),
    "batch norm alone": (nn.Sequential(nn.MaxPool2d(2), nn.BatchNorm2d(3), nn.ELU()), MAP),
    "depthwise": (after(nn.Conv2d(21, 21, 3, 2, 1, groups=21), nn.ReLU6()), MAP),
    "depthwise on a map of one row": (nn.Sequential(nn.Conv2d(3, 21, (9, 1)),
                                                    nn.Conv2d(21, 21, 3, padding=1, groups=21)), MAP),
    "depthwise, more outputs": (after(nn.Conv2d(21, 42, (5, 3), padding=2, dilation=(1, 2), groups=21), nn.SiLU()),
                                MAP),
    "depthwise 1d": (nn.Conv1d(6, 6, 5, padding=2, groups=6), ((2, 6, 17),)),
    "depthwise 3d": (nn.Conv3d(6, 6, 3, 2, 1, groups=6), ((2, 6, 5, 6, 7),)),
    "matmul": (Call(lambda a, b: torch.relu(a @ b.mT)), ((2, 4, 6, 8), (2, 4, 9, 8))),
    "attention": (Call(functional.scaled_dot_product_attention), HEADS),
    "causal attention": (Call(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True,
                                                                                      scale=0.3)), HEADS),
    "masked attention": (Call(functional.scaled_dot_product_attention), (*HEADS, (6, 9))),
    "grouped attention": (Call(lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)),
                          ((2, 4, 6, 8), (2, 2, 9, 8), (2, 2, 9, 5))),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_native(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``lower`` holds every step to fp64; here: no step fell back to the reference backend."""
    monkeypatch.setenv("PRUNEKERN_ISA", isa)
    torch.manual_seed(0)
    module, shapes = CASES[name]
    inputs: Any = tuple(torch.randn(shape) for shape in shapes)
    lowered = lower(randomise_(module).eval(), inputs, backend="cpu", tune="off")
    assert lowered.verification is not None
    placement = lowered.placement(lowered.signature(list(inputs)))
    assert "reference" not in placement.algorithms.values(), placement.algorithms
    assert len(placement.algorithms) == len(lowered.program.steps)


@pytest.mark.parametrize("module", [nn.Upsample(scale_factor=2, mode="bicubic"), nn.ConstantPad2d(-1, 0.0)], ids=str)
def test_what_it_does_not_take_runs_anyway(module: nn.Module) -> None:
    lowered = lower(module.eval(), (torch.randn(MAP[0]),), backend="cpu", tune="off")
    placement = lowered.placement(lowered.signature([torch.randn(MAP[0])]))
    assert set(placement.algorithms.values()) == {"reference"}
