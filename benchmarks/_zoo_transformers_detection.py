"""Rows of the zoo benchmark: detectors and segmenters of Hugging Face transformers, called by name, as
the library's own pipelines do."""

from __future__ import annotations

from typing import Any

from _zoo_networks import Maker, by_name, images, tokens, unit
from _zoo_transformers_backbones import enter
from _zoo_transformers_sizes import PYRAMID, STAGES, TEXT, VIT

_RESNET: dict[str, Any] = {**STAGES, "embedding_size": 16}
_LAST = ("ResNetConfig", {**_RESNET, "out_features": ["stage4"]})
_TWO_STAGES: dict[str, Any] = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 10}
_LEVELS = ("ResNetConfig", {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]})
_SWIN: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4}
_SWIN_LEVELS = (
    "SwinConfig",
    {**_SWIN, "image_size": 64, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
)
_DETR: dict[str, Any] = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 7,
    "num_labels": 5,
}
_RT: dict[str, Any] = {
    "backbone_config": ("RTDetrResNetConfig", {**_RESNET, "out_features": ["stage2", "stage3", "stage4"]}),
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [24, 32, 40],
    "encoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 10,
    "num_labels": 5,
    "anchor_image_size": None,
}

_SMALL = by_name(pixel_values=images(3, 32, 32))
_LARGE = by_name(pixel_values=images(3, 64, 64))
_WORDS = by_name(input_ids=tokens(98, 8), pixel_values=images(3, 32, 32))


def _masked(batch: int) -> Any:
    """Which pixels are image: all of them, as the processors of the library give where sizes are the same."""
    import torch

    return torch.ones(batch, 64, 64, dtype=torch.int64)


_WITH_MASK = by_name(pixel_values=images(3, 64, 64), pixel_mask=_masked)
_Row = tuple[str, str, str, dict[str, Any], Maker]

_DETECTORS: tuple[_Row, ...] = (
    ("detr", "DetrForObjectDetection", "DetrConfig", {**_DETR, "backbone_config": _LAST}, _LARGE),
    ("detr_with_mask", "DetrForObjectDetection", "DetrConfig", {**_DETR, "backbone_config": _LAST}, _WITH_MASK),
    (
        "detr_segmentation",
        "DetrForSegmentation",
        "DetrConfig",
        {
            **_DETR,
            "backbone_config": ("ResNetConfig", {**_RESNET, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
        },
        _LARGE,
    ),
    (
        "table_transformer",
        "TableTransformerForObjectDetection",
        "TableTransformerConfig",
        {**_DETR, "backbone_config": _LAST},
        _LARGE,
    ),
    (
        "conditional_detr",
        "ConditionalDetrForObjectDetection",
        "ConditionalDetrConfig",
        {**_DETR, "backbone_config": _LAST},
        _LARGE,
    ),
    (
        "dab_detr",
        "DabDetrForObjectDetection",
        "DabDetrConfig",
        {**{k: v for k, v in _DETR.items() if k != "d_model"}, "hidden_size": 32, "backbone_config": _LAST},
        _LARGE,
    ),
    (
        "deformable_detr",
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        {**_DETR, "backbone_config": _LEVELS, "num_feature_levels": 3},
        _LARGE,
    ),
    (
        "deformable_detr_two_stage",
        "DeformableDetrForObjectDetection",
        "DeformableDetrConfig",
        {**_DETR, "backbone_config": _LEVELS, "num_feature_levels": 3, **_TWO_STAGES},
        _LARGE,
    ),
    ("rt_detr", "RTDetrForObjectDetection", "RTDetrConfig", _RT, _LARGE),
    (
        "rt_detr_cached_anchors",
        "RTDetrForObjectDetection",
        "RTDetrConfig",
        {**_RT, "anchor_image_size": [64, 64]},
        _LARGE,
    ),
    ("rt_detr_v2", "RTDetrV2ForObjectDetection", "RTDetrV2Config", _RT, _LARGE),
    (
        "d_fine",
        "DFineForObjectDetection",
        "DFineConfig",
        {
            **_RT,
            "backbone_config": (
                "HGNetV2Config",
                {
                    "stem_channels": [3, 8, 16],
                    "stage_in_channels": [16, 24, 32, 40],
                    "stage_mid_channels": [8, 8, 16, 16],
                    "stage_out_channels": [24, 32, 40, 48],
                    "stage_num_blocks": [1, 1, 1, 1],
                    "hidden_sizes": [24, 32, 40, 48],
                    "out_features": ["stage2", "stage3", "stage4"],
                },
            ),
            "encoder_in_channels": [32, 40, 48],
        },
        _LARGE,
    ),
    (
        "yolos",
        "YolosForObjectDetection",
        "YolosConfig",
        {**VIT, "image_size": [32, 32], "num_detection_tokens": 5},
        _SMALL,
    ),
    (
        "owlvit",
        "OwlViTForObjectDetection",
        "OwlViTConfig",
        {"text_config": TEXT, "vision_config": VIT, "projection_dim": 32},
        by_name(input_ids=tokens(98, 8), pixel_values=images(3, 32, 32)),
    ),
    ("lw_detr_vit", "VitDetBackbone", "VitDetConfig", {**VIT, "pretrain_image_size": 32}, _SMALL),
)

_MASK_FORMER: dict[str, Any] = {"backbone_config": _SWIN_LEVELS, "num_labels": 5}
_SEGMENTERS: tuple[_Row, ...] = (
    (
        "mask2former",
        "Mask2FormerForUniversalSegmentation",
        "Mask2FormerConfig",
        {
            **_MASK_FORMER,
            "hidden_dim": 32,
            "feature_size": 32,
            "mask_feature_size": 32,
            "encoder_layers": 1,
            "decoder_layers": 3,
            "encoder_feedforward_dim": 64,
            "dim_feedforward": 64,
            "num_queries": 7,
            "num_attention_heads": 4,
        },
        _LARGE,
    ),
    (
        "maskformer",
        "MaskFormerForInstanceSegmentation",
        "MaskFormerConfig",
        {
            **_MASK_FORMER,
            "mask_feature_size": 32,
            "fpn_feature_size": 32,
            "decoder_config": ("DetrConfig", {**_DETR, "backbone_config": _LAST}),
        },
        _LARGE,
    ),
    (
        "eomt",
        "EomtForUniversalSegmentation",
        "EomtConfig",
        {**VIT, "num_hidden_layers": 3, "num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1, "mlp_ratio": 2},
        _SMALL,
    ),
    (
        "segformer",
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            **PYRAMID,
            "decoder_hidden_size": 32,
        },
        _LARGE,
    ),
    (
        "upernet",
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        {
            "backbone_config": (
                "ConvNextConfig",
                {
                    **STAGES,
                    "out_features": ["stage1", "stage2", "stage3", "stage4"],
                },
            ),
            "hidden_size": 32,
            "auxiliary_channels": 16,
            "auxiliary_in_channels": 32,
        },
        _LARGE,
    ),
    (
        "beit_segmentation",
        "BeitForSemanticSegmentation",
        "BeitConfig",
        {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        _SMALL,
    ),
    (
        "mobilevit_segmentation",
        "MobileViTForSemanticSegmentation",
        "MobileViTConfig",
        {
            "image_size": 64,
            "hidden_sizes": [24, 32, 40],
            "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
            "num_attention_heads": 4,
            "aspp_out_channels": 16,
            "atrous_rates": [2, 3, 4],
        },
        _LARGE,
    ),
    (
        "mobilenet_v2_segmentation",
        "MobileNetV2ForSemanticSegmentation",
        "MobileNetV2Config",
        {"depth_multiplier": 0.25},
        _LARGE,
    ),
    (
        "data2vec_segmentation",
        "Data2VecVisionForSemanticSegmentation",
        "Data2VecVisionConfig",
        {**VIT, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
        _SMALL,
    ),
    (
        "clipseg",
        "CLIPSegForImageSegmentation",
        "CLIPSegConfig",
        {
            "text_config": {**TEXT, "eos_token_id": 98},
            "vision_config": VIT,
            "projection_dim": 32,
            "reduce_dim": 16,
            "extract_layers": [0, 1],
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        _WORDS,
    ),
    (
        "sam_vision",
        "SamVisionModel",
        "SamVisionConfig",
        {
            **{k: v for k, v in VIT.items() if k != "intermediate_size"},
            "mlp_dim": 64,
            "window_size": 2,
            "global_attn_indexes": [1],
            "output_channels": 16,
        },
        _SMALL,
    ),
    (
        "sam2_vision",
        "Sam2VisionModel",
        "Sam2VisionConfig",
        {
            "backbone_config": (
                "Sam2HieraDetConfig",
                {
                    "hidden_size": 16,
                    "num_attention_heads": 1,
                    "image_size": [64, 64],
                    "blocks_per_stage": [1, 1, 2, 1],
                    "embed_dim_per_stage": [16, 32, 64, 128],
                    "num_attention_heads_per_stage": [1, 2, 4, 8],
                    "window_size_per_stage": [4, 4, 4, 2],
                    "global_attention_blocks": [3],
                    "window_positional_embedding_background_size": [4, 4],
                },
            ),
            "backbone_channel_list": [128, 64, 32, 16],
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
            "fpn_hidden_size": 16,
        },
        _LARGE,
    ),
    (
        "sam",
        "SamModel",
        "SamConfig",
        {
            "vision_config": {
                **{k: v for k, v in VIT.items() if k != "intermediate_size"},
                "mlp_dim": 64,
                "window_size": 2,
                "global_attn_indexes": [1],
                "output_channels": 32,
                "num_pos_feats": 16,
            },
            "prompt_encoder_config": {"hidden_size": 32, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
            "mask_decoder_config": {
                "hidden_size": 32,
                "mlp_dim": 64,
                "num_attention_heads": 4,
                "iou_head_hidden_dim": 16,
            },
        },
        by_name(pixel_values=images(3, 32, 32), input_points=unit(1, 2, 2)),
    ),
)

for _kind, _rows in (("hf detector", _DETECTORS), ("hf segmenter", _SEGMENTERS)):
    for _name, _model, _config, _options, _inputs in _rows:
        enter(_kind, _name, _model, _config, _options, _inputs)
