"""Rows of the zoo benchmark: vision backbones of Hugging Face transformers with a classifier, a few narrow layers each.

`_zoo_transformers_tasks` has detection, segmentation, depth, and images with text.
"""

from __future__ import annotations

from typing import Any

from _zoo_networks import Maker, add, images
from _zoo_transformers_sizes import PYRAMID, STAGES, VIT
from torch import nn

_SIZE = images(3, 32, 32)
_WIDE = images(3, 64, 64)
_CLIP = images(4, 3, 32, 32)  # frames before colours

_EAGER: dict[str, Any] = {**VIT, "attn_implementation": "eager"}
_WINDOWS: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}


def build(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    """A model of transformers from its configuration, random weights. An option that is a pair (name of a
    configuration, its options) becomes that configuration."""
    import transformers

    return getattr(transformers, model)(configuration(config, options))


def configuration(name: str, options: dict[str, Any]) -> Any:
    import transformers

    made = {key: configuration(*value) if isinstance(value, tuple) else value for key, value in options.items()}
    return getattr(transformers, name)(**made)


def enter(kind: str, name: str, model: str, config: str, options: dict[str, Any], inputs: Maker, **more: Any) -> None:
    """A row of transformers, named "hf_" and its name."""
    add(kind, f"hf_{name}", lambda: build(model, config, options), inputs, package="transformers", **more)


_ROWS: tuple[tuple[str, str, str, dict[str, Any], Maker], ...] = (
    ("vit", "ViTForImageClassification", "ViTConfig", VIT, _SIZE),
    ("vit_eager", "ViTForImageClassification", "ViTConfig", _EAGER, _SIZE),
    ("deit", "DeiTForImageClassificationWithTeacher", "DeiTConfig", VIT, _SIZE),
    # reason: eager, as exported with a fused kernel the model adds True to its position bias, which rounds otherwise
    ("beit", "BeitForImageClassification", "BeitConfig", {**_EAGER, "use_relative_position_bias": True}, _SIZE),
    ("data2vec_vision", "Data2VecVisionForImageClassification", "Data2VecVisionConfig", VIT, _SIZE),
    ("dinov2", "Dinov2ForImageClassification", "Dinov2Config", {**VIT, "mlp_ratio": 2}, _SIZE),
    ("dinov2_swiglu", "Dinov2Model", "Dinov2Config", {**VIT, "mlp_ratio": 2, "use_swiglu_ffn": True}, _SIZE),
    ("dinov2_registers", "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", VIT, _SIZE),
    ("dinov3_vit", "DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "num_register_tokens": 2}, _SIZE),
    ("dinov3_gated", "DINOv3ViTModel", "DINOv3ViTConfig", {**VIT, "use_gated_mlp": True}, _SIZE),
    ("dinov3_convnext", "DINOv3ConvNextModel", "DINOv3ConvNextConfig", STAGES, _SIZE),
    ("vit_msn", "ViTMSNForImageClassification", "ViTMSNConfig", VIT, _SIZE),
    ("ijepa", "IJepaForImageClassification", "IJepaConfig", VIT, _SIZE),
    ("pixio", "PixioModel", "PixioConfig", VIT, _SIZE),
    ("convnext", "ConvNextForImageClassification", "ConvNextConfig", STAGES, _WIDE),
    ("convnextv2", "ConvNextV2ForImageClassification", "ConvNextV2Config", STAGES, _WIDE),
    ("resnet", "ResNetForImageClassification", "ResNetConfig", {**STAGES, "embedding_size": 16}, _WIDE),
    (
        "regnet",
        "RegNetForImageClassification",
        "RegNetConfig",
        {**STAGES, "groups_width": 8, "embedding_size": 16},
        _WIDE,
    ),
    ("bit", "BitForImageClassification", "BitConfig", {**STAGES, "embedding_size": 16, "num_groups": 4}, _WIDE),
    ("swin", "SwinForImageClassification", "SwinConfig", _WINDOWS, _WIDE),
    ("swinv2", "Swinv2ForImageClassification", "Swinv2Config", _WINDOWS, _WIDE),
    (
        "focalnet",
        "FocalNetForImageClassification",
        "FocalNetConfig",
        {
            "image_size": 64,
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        _WIDE,
    ),
    ("poolformer", "PoolFormerForImageClassification", "PoolFormerConfig", {**STAGES}, _WIDE),
    (
        "pvt",
        "PvtForImageClassification",
        "PvtConfig",
        {
            "image_size": 64,
            **PYRAMID,
        },
        _WIDE,
    ),
    (
        "pvt_v2",
        "PvtV2ForImageClassification",
        "PvtV2Config",
        {
            **PYRAMID,
        },
        _WIDE,
    ),
    (
        "cvt",
        "CvtForImageClassification",
        "CvtConfig",
        {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 4]},
        _WIDE,
    ),
    (
        "levit",
        "LevitForImageClassificationWithTeacher",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [32, 48, 64],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        _WIDE,
    ),
    ("mobilenet_v1", "MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25}, _WIDE),
    ("mobilenet_v2", "MobileNetV2ForImageClassification", "MobileNetV2Config", {"depth_multiplier": 0.25}, _WIDE),
    (
        "mobilevit",
        "MobileViTForImageClassification",
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
            "num_attention_heads": 4,
        },
        _WIDE,
    ),
    (
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        "MobileViTV2Config",
        {"image_size": 64, "width_multiplier": 0.25},
        _WIDE,
    ),
    (
        "swiftformer",
        "SwiftFormerForImageClassification",
        "SwiftFormerConfig",
        {"image_size": 64, "depths": [1, 1, 1, 1], "embed_dims": [16, 24, 32, 40], "mlp_ratio": 2},
        _WIDE,
    ),
    (
        "efficientnet",
        "EfficientNetForImageClassification",
        "EfficientNetConfig",
        {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320},
        _WIDE,
    ),
    (
        "hiera",
        "HieraForImageClassification",
        "HieraConfig",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "depths": [1, 1, 1],
            "num_heads": [1, 2, 4],
            "masked_unit_size": [4, 4],
            "query_stride": [2, 2],
            "num_query_pool": 2,
        },
        _WIDE,
    ),
    (
        "hgnet_v2",
        "HGNetV2ForImageClassification",
        "HGNetV2Config",
        {
            "stem_channels": [3, 8, 16],
            "stage_in_channels": [16, 24, 32, 40],
            "stage_mid_channels": [8, 8, 16, 16],
            "stage_out_channels": [24, 32, 40, 48],
            "stage_num_blocks": [1, 1, 1, 1],
            "hidden_sizes": [24, 32, 40, 48],
        },
        _WIDE,
    ),
    ("textnet", "TextNetForImageClassification", "TextNetConfig", {"image_size": [64, 64]}, _WIDE),
    (
        "perceiver",
        "PerceiverForImageClassificationConvProcessing",
        "PerceiverConfig",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 322,
            "num_blocks": 1,
            "num_self_attends_per_block": 1,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 1,
        },
        images(3, 224, 224),
    ),
    (
        "vitdet",
        "VitDetModel",
        "VitDetConfig",
        {
            **VIT,
            "pretrain_image_size": 32,
            "window_block_indices": [0],
            "window_size": 2,
            "use_relative_position_embeddings": True,
        },
        _SIZE,
    ),
    ("timesformer", "TimesformerForVideoClassification", "TimesformerConfig", {**VIT, "num_frames": 4}, _CLIP),
    ("videomae", "VideoMAEForVideoClassification", "VideoMAEConfig", {**VIT, "num_frames": 4}, _CLIP),
    (
        "vivit",
        "VivitForVideoClassification",
        "VivitConfig",
        {**VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]},
        _CLIP,
    ),
    (
        "vjepa2",
        "VJEPA2ForVideoClassification",
        "VJEPA2Config",
        {
            **VIT,
            "crop_size": 32,
            "frames_per_clip": 4,
            "pred_hidden_size": 32,
            "pred_num_attention_heads": 4,
            "pred_num_hidden_layers": 1,
            "num_pooler_layers": 1,
        },
        _CLIP,
    ),
)
_SIZES = {"convnext": images(3, 96, 64), "poolformer": images(3, 96, 64)}  # traced for any height and width too
for _name, _model, _config, _options, _inputs in _ROWS:
    _kind = "video" if _inputs is _CLIP else "backbone"
    enter(_kind, _name, _model, _config, _options, _inputs, other_size=_SIZES.get(_name))
