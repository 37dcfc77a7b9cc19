"""Twenty-five networks of the zoo benchmark, one of each kind that is hard: halved, proven, lowered, within the wanted
share of the MACs. All of them: ``python bench/zoo.py``."""

from __future__ import annotations

import pytest

from bench.architectures import PACKAGES, architectures
from bench.zoo_case import examine

SAMPLE = {
    "pytorchcv": ("resnext20_16x4d_cifar10", "diaresnet20_cifar10", "xdensenet40_2_k24_bc_cifar10",
                  "fractalnet_cifar10", "wrn20_10_1bit_cifar10"),
    "torchvision": ("shufflenet_v2_x0_5", "squeezenet1_1", "mobilenet_v3_small"),
    "timm": ("test_vit4", "nf_resnet26", "resnest14d", "cs3darknet_focus_s", "pvt_v2_b0", "efficientvit_b0"),
    "transformers": ("llama", "gpt2", "deberta-v2", "swin", "t5", "mixtral", "mamba"),
    "pyg": ("GCN", "GATv2", "GraphSAGE-jk-max", "GIN-jk-lstm"),
}


@pytest.mark.parametrize(("zoo", "name"), [(zoo, name) for zoo, names in SAMPLE.items() for name in names])
def test_half_of_it(zoo: str, name: str) -> None:
    pytest.importorskip(PACKAGES[zoo], reason="install the extra 'zoo'", exc_type=ImportError)
    case = examine(architectures(zoo)[name], "prunekern", lambda stage: None)
    assert case.status == "PASS", f"{case.kind}: {case.reason}"
    assert case.error is not None
    assert case.error < 1e-9
