"""timm: one or more networks of each of its families; plain transformers two blocks deep: their blocks are alike."""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
from torch import nn

from bench.architectures import Builder, Inputs, image

SIDE = 64
# Any size of images will do.
FREE = """lambda_resnet26t mobileone_s1 gernet_s repvgg_a0 resnet26t gcresnet33ts eca_resnet33ts seresnet33ts resnetaa50
    convnext_atto convnextv2_atto convnext_zepto_rms cpubone_nano crossvit_9_240 crossvit_9_dagger_240 csatv2
    cs3darknet_s cs3darknet_focus_s darknet17 cspresnet50 cspdarknet53 cs3sedarknet_l cspnext_tiny davit_tiny
    densenet121 densenetblur121d dla46_c dla46x_c dla60_res2net dpn48b dpn68 edgenext_xx_small mobilenetv2_035
    efficientnet_lite0 efficientnet_b0 mnasnet_small mixnet_s tinynet_e fbnetc_100 spnasnet_100 efficientnet_es
    mobilenet_edgetpu_100 efficientnet_b0_g8_gn efficientvim_m1 efficientvit_b0 efficientvit_l1 efficientvit_m0
    fasternet_t0 fastvit_t8 fastvit_sa12 focalnet_tiny_srf ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_b
    hgnetv2_b0 hgnet_tiny sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto lcnetv2_small
    lowformer_b0 mambaout_femto poolformerv2_s12 poolformer_s12 caformer_s18 convformer_s18 mobilenetv3_small_050
    lcnet_035 mobilenetv4_conv_small_035 mobilenetv4_hybrid_medium fbnetv3_b mobilenetv5_base mobilevit_xxs
    mobilevitv2_050 mvitv2_tiny nasnetalarge nextvit_small nf_regnet_b0 nf_resnet26 nfnet_l0 dm_nfnet_f0 eca_nfnet_l0
    pnasnet5large pvt_v2_b0 pvt_v2_b2_li rdnet_tiny regnetx_002 regnety_002 regnetz_b16 regnetv_040 repghostnet_050
    repvit_m0_9 res2net50_14w_8s res2next50 resnest14d resnest50d_4s2x40d resnet10t resnet18 resnetblur18 ecaresnet26t
    seresnext26d_32x4d resnext50_32x4d resnetrs50 resnetv2_18 resnetv2_50x1_bit rexnet_100 selecsls42 legacy_seresnet18
    legacy_seresnext26_32x4d sequencer2d_s shvit_s1 skresnet18 skresnext50_32x4d starnet_s050 swiftformer_xs
    tiny_vit_5m_224 tresnet_m twins_svt_small twins_pcpvt_small vgg11 test_vit2 test_vit4 ese_vovnet19b_slim_dw
    ese_vovnet39b xception41 legacy_xception"""
# Built for a size of images.
SIZED = """eca_botnext26ts_256 lambda_resnet26rpt_256 coat_tiny coat_lite_tiny efficientformerv2_s0 gcvit_xxtiny
    hiera_tiny_224 levit_128s levit_conv_128s maxvit_pico_rw_256 maxvit_rmlp_pico_rw_256 coatnet_pico_rw_224
    coatnext_nano_rw_224 maxxvit_rmlp_nano_rw_256 maxxvitv2_nano_rw_256 coatnet_rmlp_nano_rw_224 nest_tiny
    swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256 swinv2_cr_tiny_ns_224 visformer_tiny
    vitamin_small_224 volo_d1_224 pit_ti_224 pit_ti_distilled_224"""
# Built for a size of images, two blocks deep.
SHALLOW = """beit_base_patch16_224 beitv2_base_patch16_224 cait_xxs24_224 convit_tiny deit_tiny_patch16_224
    deit_tiny_distilled_patch16_224 deit3_small_patch16_224 eva02_tiny_patch14_224 eva_large_patch14_196
    vit_tiny_patch16_dinov3_qkvb vit_pe_core_tiny_patch16_384 tnt_s_patch16_224 vit_tiny_patch16_224
    vit_small_patch16_rope_mixed_224 vit_base_patch16_clip_224 vit_tiny_r_s16_p8_224 vit_relpos_small_patch16_224
    vit_srelpos_small_patch16_224 vit_relpos_base_patch16_clsgap_224 vit_xsmall_patch16_clip_224
    vit_base_patch16_siglip_224 vit_so150m2_patch16_reg1_gap_256 vit_little_patch16_reg4_gap_256 flexivit_small
    vit_pwee_patch16_reg1_gap_256 vit_base_patch16_xp_224 xcit_nano_12_p16_224 samvit_base_patch16_224"""
# Side of the images, options.
OWN: dict[str, tuple[int, dict[str, Any]]] = {
    **dict.fromkeys(("naflexvit_base_patch16_gap", "gemma4_vit_167m", "qwen3_vit_88m"), (SIDE, {"depth": 2})),
    **{name: (SIDE, {"img_size": SIDE})
       for name in ("gmlp_ti16_224", "gmixer_12_224", "resmlp_12_224", "mixer_s16_224")},
    **dict.fromkeys(("inception_v3", "inception_v4", "inception_resnet_v2"), (96, {})),
    "convmixer_768_32": (SIDE, {}), "efficientformer_l1": (224, {}),
    "halonet_h1": (256, {}), "eca_halonext26ts": (256, {}),
}


def network(name: str, side: int = SIDE, **options: Any) -> tuple[nn.Module, Inputs]:
    return timm.create_model(name, pretrained=False, **options), image(side)


BUILDERS: dict[str, Builder] = {
    **{name: partial(network, name) for name in FREE.split()},
    **{name: partial(network, name, img_size=SIDE) for name in SIZED.split()},
    **{name: partial(network, name, img_size=SIDE, depth=2) for name in SHALLOW.split()},
    **{name: partial(network, name, side, **options) for name, (side, options) in OWN.items()},
}
