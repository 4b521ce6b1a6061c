"""Rows of the zoo benchmark: depth, key points, restoration, and images with text, of Hugging Face transformers, called
by name, as the library's own pipelines do."""

from __future__ import annotations

from typing import Any

from _zoo_networks import Maker, by_name, images, tokens, unit
from _zoo_transformers_backbones import enter
from _zoo_transformers_sizes import PYRAMID, TEXT, VIT

_SMALL = by_name(pixel_values=images(3, 32, 32))
_LARGE = by_name(pixel_values=images(3, 64, 64))
_WORDS = by_name(input_ids=tokens(98, 8), pixel_values=images(3, 32, 32))


_Row = tuple[str, str, str, dict[str, Any], Maker]

_DPT: dict[str, Any] = {"fusion_hidden_size": 16, "neck_hidden_sizes": [16, 16, 24, 32], "head_in_index": -1}
_DINO = (
    "Dinov2Config",
    {
        **VIT,
        "num_hidden_layers": 4,
        "mlp_ratio": 2,
        "out_indices": [1, 2, 3, 4],
        "reshape_hidden_states": False,
    },
)
_DENSE: tuple[_Row, ...] = (
    (
        "dpt_depth",
        "DPTForDepthEstimation",
        "DPTConfig",
        {**VIT, **_DPT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False},
        _SMALL,
    ),
    (
        "dpt_segmentation",
        "DPTForSemanticSegmentation",
        "DPTConfig",
        {**VIT, **_DPT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "is_hybrid": False},
        _SMALL,
    ),
    (
        "depth_anything",
        "DepthAnythingForDepthEstimation",
        "DepthAnythingConfig",
        {**_DPT, "backbone_config": _DINO, "patch_size": 8, "reassemble_hidden_size": 32, "head_hidden_size": 8},
        _SMALL,
    ),
    (
        "glpn",
        "GLPNForDepthEstimation",
        "GLPNConfig",
        {
            **PYRAMID,
            "decoder_hidden_size": 16,
        },
        _LARGE,
    ),
    (
        "zoedepth",
        "ZoeDepthForDepthEstimation",
        "ZoeDepthConfig",
        {
            **_DPT,
            "fusion_hidden_size": 32,
            "reassemble_factors": [4, 2, 1, 0.5],
            "bottleneck_features": 32,
            "num_relative_features": 16,
            "bin_embedding_dim": 16,
            "num_patch_transformer_hidden_layers": 1,
            "backbone_config": (
                "BeitConfig",
                {
                    **VIT,
                    "num_hidden_layers": 4,
                    "out_indices": [1, 2, 3, 4],
                    "reshape_hidden_states": False,
                    "use_relative_position_bias": True,
                },
            ),
        },
        _SMALL,
    ),
    (
        "vitpose",
        "VitPoseForPoseEstimation",
        "VitPoseConfig",
        {
            "backbone_config": (
                "VitPoseBackboneConfig",
                {
                    **VIT,
                    "image_size": [64, 48],
                    "patch_size": [16, 16],
                    "mlp_ratio": 2,
                    "out_indices": [2],
                },
            ),
            "num_labels": 5,
        },
        by_name(pixel_values=images(3, 64, 48)),
    ),
    (
        "vitmatte",
        "VitMatteForImageMatting",
        "VitMatteConfig",
        {
            "backbone_config": (
                "VitDetConfig",
                {
                    **VIT,
                    "num_channels": 4,
                    "patch_size": 16,
                    "image_size": 64,
                    "pretrain_image_size": 64,
                    "out_features": ["stage2"],
                },
            ),
            "hidden_size": 32,
            "fusion_hidden_sizes": [32, 16, 12, 8],
            "convstream_hidden_sizes": [8, 12, 16],
        },
        by_name(pixel_values=images(4, 64, 64)),
    ),
    (
        "superpoint",
        "SuperPointForKeypointDetection",
        "SuperPointConfig",
        {
            "encoder_hidden_sizes": [8, 8, 16, 16],
            "decoder_hidden_size": 16,
            "keypoint_decoder_dim": 65,
            "descriptor_decoder_dim": 16,
        },
        by_name(pixel_values=images(3, 64, 64)),
    ),
    (
        "swin2sr",
        "Swin2SRForImageSuperResolution",
        "Swin2SRConfig",
        {
            "image_size": 16,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 4,
            "upscale": 2,
            "upsampler": "pixelshuffle",
        },
        by_name(pixel_values=images(3, 16, 16)),
    ),
    (
        "vit_mae",
        "ViTMAEModel",
        "ViTMAEConfig",
        {**VIT, "mask_ratio": 0.5},
        by_name(pixel_values=images(3, 32, 32), noise=unit(16)),
    ),
)

_TROCR: dict[str, Any] = {
    "vocab_size": 99,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 16,
    "cross_attention_hidden_size": 32,
    "use_cache": False,
}
_CLIP: dict[str, Any] = {"text_config": {**TEXT, "eos_token_id": 98}, "vision_config": VIT, "projection_dim": 32}
_PAIRS: tuple[_Row, ...] = (
    ("clip", "CLIPModel", "CLIPConfig", _CLIP, _WORDS),
    ("clip_vision", "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VIT, "projection_dim": 16}, _SMALL),
    ("siglip", "SiglipModel", "SiglipConfig", {"text_config": TEXT, "vision_config": VIT}, _WORDS),
    ("siglip_vision", "SiglipVisionModel", "SiglipVisionConfig", VIT, _SMALL),
    ("chinese_clip", "ChineseCLIPModel", "ChineseCLIPConfig", _CLIP, _WORDS),
    (
        "groupvit",
        "GroupViTModel",
        "GroupViTConfig",
        {
            "text_config": {**TEXT, "eos_token_id": 98},
            "vision_config": {
                **VIT,
                "depths": [1, 1, 1],
                "num_group_tokens": [8, 4, 0],
                "num_output_groups": [8, 4, 4],
            },
            "projection_dim": 32,
            "projection_intermediate_dim": 32,
        },
        _WORDS,
    ),
    (
        "blip_retrieval",
        "BlipForImageTextRetrieval",
        "BlipConfig",
        {
            "text_config": {**TEXT, "encoder_hidden_size": 32},
            "vision_config": VIT,
            "image_text_hidden_size": 16,
        },
        _WORDS,
    ),
    ("vilt", "ViltForQuestionAnswering", "ViltConfig", {**VIT, "vocab_size": 99, "num_labels": 3}, _WORDS),
    (
        "layoutlmv3",
        "LayoutLMv3ForTokenClassification",
        "LayoutLMv3Config",
        {
            **TEXT,
            "input_size": 32,
            "patch_size": 8,
            "coordinate_size": 4,
            "shape_size": 8,
            "max_2d_position_embeddings": 64,
            "max_position_embeddings": 32,
            "rel_pos_bins": 8,
            "rel_2d_pos_bins": 8,
            "max_rel_pos": 16,
            "max_rel_2d_pos": 32,
        },
        by_name(
            input_ids=tokens(98, 8),
            bbox=lambda batch: tokens(30, 8, 4)(batch).sort(-1).values,
            pixel_values=images(3, 32, 32),
        ),
    ),
    (
        "x_clip",
        "XCLIPModel",
        "XCLIPConfig",
        {
            "text_config": {**TEXT, "eos_token_id": 98},
            "vision_config": {
                **VIT,
                "num_frames": 4,
                "mit_hidden_size": 32,
                "mit_intermediate_size": 32,
                "mit_num_attention_heads": 4,
            },
            "projection_dim": 32,
            "prompt_num_attention_heads": 4,
        },
        by_name(input_ids=tokens(98, 8), pixel_values=images(4, 3, 32, 32)),
    ),
    ("flava_image", "FlavaImageModel", "FlavaImageConfig", VIT, _SMALL),
    (
        "trocr",
        "VisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        {"encoder": {**VIT, "model_type": "vit"}, "decoder": {**_TROCR, "model_type": "trocr"}},
        by_name(pixel_values=images(3, 32, 32), decoder_input_ids=tokens(98, 8)),
    ),
)

for _kind, _rows in (("hf dense", _DENSE), ("image and text", _PAIRS)):
    for _name, _model, _config, _options, _inputs in _rows:
        enter(_kind, _name, _model, _config, _options, _inputs)
