"""Rows of the zoo benchmark: the decoders of segmentation-models-pytorch, on small encoders without weights."""

from __future__ import annotations

from typing import Any

from _zoo_networks import add, images
from torch import nn

_SIZE = images(3, 64, 64)


def _build(decoder: str, encoder: str, options: dict[str, Any]) -> nn.Module:
    import segmentation_models_pytorch

    return getattr(segmentation_models_pytorch, decoder)(encoder, encoder_weights=None, classes=4, **options)


_NARROW: dict[str, Any] = {"decoder_channels": (48, 32, 24, 16, 8)}
_ROWS: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("unet", "Unet", "mobilenet_v2", _NARROW),
    ("unet_scse", "Unet", "mobilenet_v2", {"decoder_channels": (96, 64, 48, 32, 16), "decoder_attention_type": "scse"}),
    ("unet_transformer", "Unet", "mit_b0", _NARROW),
    ("unet_with_label", "Unet", "mobilenet_v2", {**_NARROW, "aux_params": {"classes": 3, "dropout": 0.2}}),
    ("unet_plus_plus", "UnetPlusPlus", "mobilenet_v2", _NARROW),
    ("manet", "MAnet", "efficientnet-b0", {**_NARROW, "decoder_pab_channels": 16}),
    ("linknet", "Linknet", "mobilenet_v2", {}),
    ("fpn", "FPN", "mobilenet_v2", {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}),
    ("pspnet", "PSPNet", "mobilenet_v2", {"psp_out_channels": 32}),
    ("pan", "PAN", "mobilenet_v2", {"decoder_channels": 16}),
    ("deeplab", "DeepLabV3", "mobilenet_v2", {"decoder_channels": 32}),
    ("deeplab_plus", "DeepLabV3Plus", "mobilenet_v2", {"decoder_channels": 32}),
    ("upernet", "UPerNet", "mobilenet_v2", {"decoder_channels": 32}),
    ("segformer_decoder", "Segformer", "mit_b0", {"decoder_segmentation_channels": 32}),
    ("dpt_decoder", "DPT", "tu-vit_tiny_patch16_224", {"decoder_fusion_channels": 16, "dynamic_img_size": True}),
)
for _name, _decoder, _encoder, _options in _ROWS:
    add(
        "decoder",
        f"smp_{_name}",
        lambda decoder=_decoder, encoder=_encoder, options=_options: _build(decoder, encoder, options),
        images(3, 128, 128) if _name == "pan" else _SIZE,
        other_size=images(3, 96, 64) if _name in ("unet", "fpn") else None,
        package="segmentation_models_pytorch",
    )
