"""pytorchcv: one network of each kind of block in each of its families, in the narrowest width there is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorchcv.model_provider import get_model
from torch import Tensor, nn

from bench.architectures import BATCH, Builder, Inputs, image

# Side of the images -> names.
NETWORKS = {
    32: """nin_cifar10 resnet20_cifar10 resnet56_cifar10 resnet164bn_cifar10 preresnet20_cifar10 preresnet164bn_cifar10
        resnext20_16x4d_cifar10 resnext29_32x4d_cifar10 seresnet20_cifar10 seresnet164bn_cifar10 sepreresnet20_cifar10
        pyramidnet110_a48_cifar10 densenet40_k12_cifar10 densenet40_k12_bc_cifar10 xdensenet40_2_k24_bc_cifar10
        wrn16_10_cifar10 wrn20_10_1bit_cifar10 wrn20_10_32bit_cifar10 ror3_56_cifar10 rir_cifar10 msdnet22_cifar10
        resdropresnet20_cifar10 shakeshakeresnet20_2x16d_cifar10 shakedropresnet20_cifar10 fractalnet_cifar10
        diaresnet20_cifar10 diapreresnet20_cifar10""",
    64: """bninception resnet10 resnetbc14b resnet18_wd4 resnet50 resnet50b preresnet10 preresnetbc14b preresnet18_wd4
        preresnet50 resnext14_16x4d resnext14_32x4d seresnet10 seresnetbc26b seresnet50 sepreresnet10 sepreresnetbc26b
        seresnext50_32x4d senet16 senet28 resnestabc14 resnesta18 resnesta50 ibn_resnet50 ibnb_resnet50
        ibn_resnext50_32x4d ibn_densenet121 airnet50_1x64d_r2 airnext50_32x4d_r2 bam_resnet18 bam_resnet50
        cbam_resnet18 cbam_resnet50 resattnet56 sknet50 regnetx002 regnety002 diaresnet10 diaresnetbc14b diapreresnet10
        diapreresnetbc14b pyramidnet101_a360 diracnet18v2 sharesnet18 sharesnet50 densenet121 condensenet74_c4_g4
        condensenet74_c8_g8 sparsenet121 peleenet wrn50_2 drnc26 drnd22 darknet_ref darknet_tiny darknet19 darknet53
        channelnet revnet38 irevnet301 bagnet9 dla34 dla46c dla46xc dla60x fishnet99 espnetv2_wd2 dicenet_wd5 dicenet_w1
        hrnet_w18_small_v1 hrnetv2_w18 vovnet27s selecsls42 selecsls42b hardnet39ds hardnet68 xdensenet121_2
        squeezenet_v1_0 squeezenet_v1_1 squeezeresnet_v1_0 sqnxt23_w1 sqnxt23v5_w1 shufflenet_g1_wd4 shufflenet_g2_w1
        shufflenet_g3_wd4 shufflenet_g4_w1 shufflenet_g8_w1 shufflenetv2_wd2 shufflenetv2b_wd2 menet108_8x1_g3
        menet128_8x1_g4 menet160_8x1_g8 mobilenet_wd4 mobilenetb_wd4 fdmobilenet_wd4 mobilenetv2_wd4 mobilenetv2b_wd4
        mobilenetv3_small_w7d20 mobilenetv3_large_w7d20 igcv3_wd4 ghostnet mnasnet_b1 mnasnet_a1 mnasnet_small darts
        proxylessnas_cpu proxylessnas_mobile fbnet_cb nasnet_4a1056 pnasnet5large spnasnet efficientnet_b0
        efficientnet_b0b efficientnet_b0c efficientnet_edge_small_b mixnet_s mixnet_m isqrtcovresnet18 isqrtcovresnet50
        resneta10 resnetabc14b resnetd50b fastseresnet101b octresnet10_ad2 octresnet50b_ad2 resnet10_cub seresnet10_cub
        mobilenet_wd4_cub proxylessnas_cpu_cub fcn8sd_resnetd50b_voc pspnet_resnetd50b_voc deeplabv3_resnetd50b_voc
        cgnet_cityscapes dabnet_cityscapes bisenet_resnet18_celebamaskhq danet_resnetd50b_cityscapes fpenet_cityscapes
        ctxnet_cityscapes lednet_cityscapes esnet_cityscapes edanet_cityscapes enet_cityscapes erfnet_cityscapes
        linknet_cityscapes segnet_cityscapes unet_cityscapes sqnet_cityscapes alphapose_fastseresnet101b_coco
        simplepose_resnet18_coco simplepose_mobile_resnet18_coco simplepose_mobile_mobilenetv3_small_w1_coco
        lwopenpose2d_mobilenet_cmupan_coco lwopenpose3d_mobilenet_cmupan_coco ibppose_coco prnet centernet_resnet18_voc
        tresnet_m espcnet_cityscapes""",
    96: "inceptionv3 inceptionv4 inceptionresnetv1 inceptionresnetv2 polynet",
    128: "scnet50 scneta50 sinet_cityscapes lffd20x5s320v2_widerface icnet_resnetd50b_cityscapes fastscnn_cityscapes",
    224: "alexnet alexnetb zfnet vgg11 bn_vgg11 bn_vgg11b dpn68 dpn68b msdnet22",
    299: "xception",
    448: "ntsnet_cub",
}
POSES = ("alphapose", "simplepose")     # networks that look for the maxima of their maps one by one, unless told not to
SIZED = ("_voc", "_cityscapes", "_celebamaskhq")        # networks that resize to a size given when they are built


def network(name: str, side: int) -> tuple[nn.Module, Inputs]:
    options: dict[str, Any] = {"in_size": (side, side)} if name.endswith(SIZED) else {}
    if name.startswith(POSES):
        options["return_heatmap"] = True
    return with_orders(globally_pooled(get_model(name, pretrained=False, **options))), image(side)


def with_orders(model: nn.Module) -> nn.Module:
    """Lists of channels that training would find (CondenseNet's) and that are all zeros before it: some order."""
    for name, buffer in model.named_buffers():
        if name.endswith(".index") and not buffer.is_floating_point() and not bool(buffer.any()):
            buffer.copy_(torch.randperm(len(buffer)))
    return model


def globally_pooled(model: nn.Module) -> nn.Module:
    """Average what the last layer gives, whatever its size: pooling fixed at 7x7 would ask for images of 224x224."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "final_pool", None), nn.AvgPool2d):
            module.final_pool = nn.AdaptiveAvgPool2d(1)
    return model


def odd(name: str, inputs: Callable[[], Inputs], **options: Any) -> tuple[nn.Module, Inputs]:
    """A network that does not take images."""
    return filled(get_model(name, pretrained=False, **options)), inputs()


def filled(model: nn.Module) -> nn.Module:
    """Parameters that are left as memory was found: some values."""
    for parameter in model.parameters():
        if not bool(parameter.detach().abs().max() < 100):
            nn.init.normal_(parameter, std=0.05)
    return model


def person(count: int = BATCH) -> Tensor:
    return torch.full((count,), 3)


ODD: dict[str, Builder] = {
    "pfpcnet": partial(odd, "pfpcnet", lambda: torch.randn(BATCH, 1, 320, 240)),
    "voca8flame": partial(odd, "voca8flame", lambda: (torch.randn(BATCH, 1, 16, 29), person())),
    "nvpattexp116bazel76": partial(odd, "nvpattexp116bazel76", lambda: (torch.randn(BATCH, 8, 16, 29), person())),
    "visemenet20": partial(odd, "visemenet20", lambda: (torch.randn(34, 8, 195), torch.full((34, 76), 3))),
    "superpointnet": partial(odd, "superpointnet", lambda: image(64, 1)),
    "raft_small": partial(odd, "raft_small", lambda: (image(128), image(128))),
    "propainter_rfc": partial(odd, "propainter_rfc", lambda: (torch.randn(BATCH, 3, 2, 64, 64),
                                                              torch.randn(BATCH, 3, 1, 64, 64))),
    **{name: partial(odd, name, lambda: (torch.randn(BATCH, 64, 128), torch.tensor([128, 96])), from_audio=False)
       for name in ("jasper5x3", "jasperdr10x5_en", "quartznet5x5_en_ls")},
}
BUILDERS: dict[str, Builder] = {name: partial(network, name, side) for side, names in NETWORKS.items()
                                for name in names.split()} | ODD
