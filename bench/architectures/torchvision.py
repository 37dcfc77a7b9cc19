"""torchvision: one network of each kind, for images, dense labels, videos and optical flow; backbones of detectors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.video.mvit import MSBlockConfig, MViT

from bench.architectures import BATCH, Builder, Inputs, image

# Side of the images -> names.
NETWORKS = {
    64: """resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 mobilenet_v2 mobilenet_v3_small
        mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_0 squeezenet1_1 googlenet
        efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf vgg11 vgg11_bn alexnet convnext_tiny swin_t
        swin_v2_t vit_b_16""",
    96: "inception_v3",
    224: "maxvit_t",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "inception_v3": {"init_weights": False}, "googlenet": {"init_weights": False}, "vit_b_16": {"image_size": 64},
}
DENSE = ("deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large")
VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18", "s3d", "swin3d_t")
VIDEO_SIZES = {"s3d": (224, 16)}


def network(name: str, side: int) -> tuple[nn.Module, Inputs]:
    return models.get_model(name, weights=None, **OPTIONS.get(name, {})), image(side)


def dense(name: str) -> tuple[nn.Module, Inputs]:
    return models.get_model(name, weights=None, weights_backbone=None), image(64)


def vit(depth: int) -> tuple[nn.Module, Inputs]:
    return models.VisionTransformer(32, 8, depth, 4, 64, 128, num_classes=10), image(32)


def video(name: str) -> tuple[nn.Module, Inputs]:
    side, frames = VIDEO_SIZES.get(name, (64, 8))
    inputs = torch.randn(BATCH if side == 64 else 1, 3, frames, side, side)
    return models.get_model(name, weights=None, **OPTIONS.get(name, {})), inputs


def mvit(second: bool) -> tuple[nn.Module, Inputs]:
    """The first five blocks of mvit_v1_b, in both versions, at two thirds of its width."""
    heads, widths, steps = (1, 2, 2, 4, 4), (64, 128, 128, 256, 256, 256), (8, 4, 4, 2, 2)
    blocks = [MSBlockConfig(heads[i], widths[i], widths[i + 1], [3, 3, 3] if i % 2 or second else [], [3, 3, 3],
                            [1, 2, 2] if i % 2 else [1, 1, 1] if second else [], [1, steps[i], steps[i]])
              for i in range(len(heads))]
    model = MViT((64, 64), 4, blocks, residual_pool=second, residual_with_cls_embed=False, rel_pos_embed=second,
                 proj_after_attn=second, num_classes=10)
    return model, torch.randn(BATCH, 3, 4, 64, 64)


def flow(name: str) -> tuple[nn.Module, Inputs]:
    return models.get_model(name, weights=None), {"image1": image(128), "image2": image(128), "num_flow_updates": 2}


class Dense(nn.Module):
    """A detector up to its boxes: images in, the maps of its heads out."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def detector(name: str) -> tuple[nn.Module, Inputs]:
    built = models.get_model(name, weights=None, weights_backbone=None, num_classes=10)
    head = built.head if hasattr(built, "head") else built.rpn.head
    return Dense(built.backbone, head), image(320 if name.startswith("ssd") else 64)


def pyramid(kind: str) -> tuple[nn.Module, Inputs]:
    if kind == "mobilenet":
        return mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True), image(64)
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None), image(64)


BUILDERS: dict[str, Builder] = {
    **{name: partial(network, name, side) for side, names in NETWORKS.items() for name in names.split()},
    "vit_32": partial(vit, 3),
    **{name: partial(dense, name) for name in DENSE},
    **{name: partial(video, name) for name in VIDEO},
    "mvit_v1": partial(mvit, False),
    "mvit_v2": partial(mvit, True),
    "raft_small": partial(flow, "raft_small"),
    **{name: partial(detector, name) for name in ("retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssd300_vgg16",
                                                  "ssdlite320_mobilenet_v3_large", "fasterrcnn_resnet50_fpn")},
    "resnet18_fpn": partial(pyramid, "resnet"),
    "mobilenet_v3_fpn": partial(pyramid, "mobilenet"),
}
