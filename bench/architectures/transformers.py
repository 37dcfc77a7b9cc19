"""transformers: networks of every kind of block it has, built from their configurations with tiny sizes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from bench.architectures import BATCH, Builder, Inputs, image

# What is set wherever a configuration has it; its own attribute_map translates the names.
TINY: dict[str, Any] = {
    "hidden_size": 64, "d_model": 64, "num_hidden_layers": 2, "num_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_attention_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "intermediate_size": 128, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "d_ff": 128,
    "d_kv": 16, "vocab_size": 96, "max_position_embeddings": 64, "image_size": 32, "patch_size": 8, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}
LENGTH = 12


def ids() -> torch.Tensor:
    return torch.randint(3, 96, (BATCH, LENGTH))


def text() -> Inputs:
    return {"input_ids": ids(), "attention_mask": torch.ones(BATCH, LENGTH, dtype=torch.long)}


def plain() -> Inputs:
    return {"input_ids": ids()}


def pair() -> Inputs:
    return {"input_ids": ids(), "decoder_input_ids": ids()}


def pixels(side: int = 32) -> Inputs:
    return {"pixel_values": image(side)}


def shuffled_pixels() -> Inputs:
    return {**pixels(), "noise": torch.rand(BATCH, 16)}


def large_pixels() -> Inputs:
    return pixels(64)


def captioned() -> Inputs:
    return {**text(), **pixels()}


def waves() -> Inputs:
    return {"input_values": torch.randn(BATCH, 4000)}


def spectrogram() -> Inputs:
    return {"input_values": torch.randn(BATCH, 64, 32)}


def speech() -> Inputs:
    return {"input_features": torch.randn(BATCH, 80, 64), "decoder_input_ids": ids()}


def network(kind: str, inputs: Callable[[], Inputs], **own: Any) -> tuple[nn.Module, Inputs]:
    """A model class by name, its configuration tiny but for ``own``."""
    model = getattr(transformers, kind)
    known, renamed = model.config_class().to_dict(), model.config_class.attribute_map
    tiny = {renamed.get(key, key): value for key, value in TINY.items()}
    config = model.config_class(**{**{key: value for key, value in tiny.items() if key in known}, **own})
    config._attn_implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    return model(config), inputs()


GQA = {"num_key_value_heads": 2, "head_dim": 16}
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GPT2 = {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
WAVES = {"conv_dim": (32, 32, 32), "conv_stride": (5, 2, 2), "conv_kernel": (10, 3, 3), "num_feat_extract_layers": 3,
         "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
STAGES = {"num_stages": 4, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], "image_size": 64}
HEADS = {"num_attention_heads": [1, 2, 2, 4]}
SWIN = {"embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 64, "patch_size": 4}
BOTH = {"text_config": TINY, "vision_config": TINY}
NETWORKS: dict[str, tuple[str, Callable[[], Inputs], dict[str, Any]]] = {
    # encoders of text
    "bert": ("BertModel", text, {}),
    "bert-mlm": ("BertForMaskedLM", text, {}),
    "roberta": ("RobertaForSequenceClassification", text, {}),
    "xlm-roberta": ("XLMRobertaForTokenClassification", text, {}),
    "distilbert": ("DistilBertModel", text, {"dim": 64, "hidden_dim": 128, "n_heads": 4, "n_layers": 2}),
    "albert": ("AlbertModel", text, {"embedding_size": 32}),
    "electra": ("ElectraModel", text, {"embedding_size": 32}),
    "deberta-v2": ("DebertaV2Model", text, {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "mpnet": ("MPNetModel", text, {}),
    "squeezebert": ("SqueezeBertModel", text, {"embedding_size": 64}),
    "convbert": ("ConvBertModel", text, {"embedding_size": 32}),
    "mobilebert": ("MobileBertModel", text, {"embedding_size": 32, "intra_bottleneck_size": 32,
                                             "true_hidden_size": 32}),
    "roformer": ("RoFormerModel", text, {"embedding_size": 64}),
    "fnet": ("FNetModel", plain, {}),
    "modernbert": ("ModernBertModel", text, {"cls_token_id": 1, "sep_token_id": 2}),
    "esm": ("EsmModel", text, {"position_embedding_type": "rotary"}),
    "nystromformer": ("NystromformerModel", plain, {"num_landmarks": 4, "segment_means_seq_len": LENGTH}),
    "megatron-bert": ("MegatronBertModel", text, {}),
    # decoders of text
    "gpt2": ("GPT2LMHeadModel", plain, GPT2),
    "gpt-bigcode": ("GPTBigCodeForCausalLM", plain, GPT2),
    "gptj": ("GPTJForCausalLM", plain, {**GPT2, "rotary_dim": 8}),
    "codegen": ("CodeGenForCausalLM", plain, {**GPT2, "rotary_dim": 8}),
    "gpt-neo": ("GPTNeoForCausalLM", plain, {"attention_types": [[["global", "local"], 1]]}),
    "gpt-neox": ("GPTNeoXForCausalLM", plain, {}),
    "opt": ("OPTForCausalLM", plain, {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    "bloom": ("BloomForCausalLM", text, {"n_head": 4, "n_layer": 2}),
    "falcon": ("FalconForCausalLM", plain, {}),
    "mpt": ("MptForCausalLM", plain, {"n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "llama": ("LlamaForCausalLM", plain, GQA),
    "mistral": ("MistralForCausalLM", plain, GQA),
    "qwen2": ("Qwen2ForCausalLM", plain, GQA),
    "qwen3": ("Qwen3ForCausalLM", plain, GQA),
    "gemma": ("GemmaForCausalLM", plain, GQA),
    "gemma2": ("Gemma2ForCausalLM", plain, GQA),
    "phi": ("PhiForCausalLM", plain, {}),
    "phi3": ("Phi3ForCausalLM", plain, GQA),
    "olmo2": ("Olmo2ForCausalLM", plain, {}),
    "stablelm": ("StableLmForCausalLM", plain, {"num_key_value_heads": 2}),
    "starcoder2": ("Starcoder2ForCausalLM", plain, {"num_key_value_heads": 2}),
    "cohere": ("CohereForCausalLM", plain, {"num_key_value_heads": 2}),
    "granite": ("GraniteForCausalLM", plain, {"num_key_value_heads": 2}),
    "glm": ("GlmForCausalLM", plain, GQA),
    "mixtral": ("MixtralForCausalLM", plain, {**GQA, **MOE}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", plain, {**GQA, **MOE}),
    "mamba": ("MambaForCausalLM", plain, {"state_size": 8}),
    # encoder and decoder
    "t5": ("T5Model", pair, {}),
    "t5-gated": ("T5ForConditionalGeneration", pair, {"feed_forward_proj": "gated-gelu"}),
    "bart": ("BartModel", pair, {}),
    "marian": ("MarianModel", pair, {}),
    "pegasus": ("PegasusModel", pair, {}),
    "mbart": ("MBartModel", pair, {}),
    "m2m100": ("M2M100Model", pair, {}),
    "led": ("LEDModel", pair, {"attention_window": 4}),
    # images
    "vit": ("ViTForImageClassification", pixels, {}),
    "deit": ("DeiTModel", pixels, {}),
    "beit": ("BeitModel", pixels, {"use_relative_position_bias": True}),
    "dinov2": ("Dinov2Model", pixels, {}),
    "vit-mae": ("ViTMAEModel", shuffled_pixels, {"mask_ratio": 0.0}),
    "yolos": ("YolosForObjectDetection", pixels, {"num_detection_tokens": 5, "image_size": [32, 32]}),
    "dpt": ("DPTForDepthEstimation", pixels, {"num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3],
                                              "neck_hidden_sizes": [16, 16, 32, 32], "fusion_hidden_size": 16}),
    "swin": ("SwinModel", large_pixels, SWIN),
    "swinv2": ("Swinv2Model", large_pixels, SWIN),
    "convnext": ("ConvNextForImageClassification", large_pixels, {**STAGES, "patch_size": 4}),
    "convnextv2": ("ConvNextV2Model", large_pixels, {**STAGES, "patch_size": 4}),
    "segformer": ("SegformerForSemanticSegmentation", large_pixels, {
        "depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], **HEADS, "patch_sizes": [7, 3, 3, 3],
        "decoder_hidden_size": 32}),
    "pvt": ("PvtModel", large_pixels, {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64], **HEADS,
                                       "patch_sizes": [4, 2, 2, 2], "image_size": 64}),
    "mobilevit": ("MobileViTModel", large_pixels, {
        "hidden_sizes": [24, 32, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 96], "patch_size": 2,
        "image_size": 64}),
    "poolformer": ("PoolFormerModel", large_pixels, {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 48, 64],
                                                     "patch_size": 16}),
    "regnet": ("RegNetModel", large_pixels, {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64],
                                             "depths": [1, 1, 1, 1], "groups_width": 8}),
    "resnet": ("ResNetForImageClassification", large_pixels, {"embedding_size": 16, "depths": [1, 1, 1, 1],
                                                              "hidden_sizes": [32, 64, 96, 128]}),
    "mobilenet-v2": ("MobileNetV2Model", large_pixels, {"depth_multiplier": 0.35}),
    "focalnet": ("FocalNetModel", large_pixels, {
        "embed_dim": 24, "hidden_sizes": [24, 48], "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
        "image_size": 64, "patch_size": 4}),
    # sound
    "wav2vec2": ("Wav2Vec2Model", waves, WAVES),
    "hubert": ("HubertModel", waves, WAVES),
    "wavlm": ("WavLMModel", waves, WAVES),
    "whisper": ("WhisperModel", speech, {"max_source_positions": 32, "max_target_positions": 64}),
    "ast": ("ASTModel", spectrogram, {"max_length": 64, "num_mel_bins": 32}),
    # text and images
    "clip-text": ("CLIPTextModel", text, {}),
    "clip-vision": ("CLIPVisionModel", pixels, {}),
    "clip": ("CLIPModel", captioned, {**BOTH, "projection_dim": 32}),
    "siglip": ("SiglipModel", captioned, {**BOTH, "text_config": {**TINY, "projection_size": 64,
                                                                  "max_position_embeddings": LENGTH}}),
    "vilt": ("ViltModel", captioned, {}),
}
BUILDERS: dict[str, Builder] = {name: partial(network, kind, inputs, **own)
                                for name, (kind, inputs, own) in NETWORKS.items()}
