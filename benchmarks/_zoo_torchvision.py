"""Rows of the zoo benchmark: torchvision's classifiers and video networks, each architecture as small as it can be."""

from __future__ import annotations

from functools import partial
from typing import Any

from _zoo_networks import add, images
from torch import nn

_SIZE = images(3, 64, 64)
_CLIP = images(3, 8, 32, 32)


def _models() -> Any:
    import torchvision.models

    return torchvision.models


def _by_name(name: str, **options: Any) -> nn.Module:
    """As the library's own function makes it."""
    return getattr(_models(), name)(weights=None, num_classes=10, **options)


def _alexnet() -> nn.Module:
    model = _by_name("alexnet")
    model.classifier = nn.Sequential(
        nn.Dropout(), nn.Linear(256 * 36, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 64), nn.ReLU(True)
    )
    return model


def _vgg(batch_norm: bool) -> nn.Module:
    vgg = _models().vgg
    features = vgg.make_layers([16, "M", 24, 24, "M", 32, 32, "M"], batch_norm=batch_norm)
    model = vgg.VGG(features, num_classes=10, init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(32 * 49, 64), nn.ReLU(True), nn.Dropout(), nn.Linear(64, 10))
    return model


def _resnet(block: str, **options: Any) -> nn.Module:
    resnet = _models().resnet
    return resnet.ResNet(getattr(resnet, block), [1, 1, 1, 1], num_classes=10, **options)


def _densenet() -> nn.Module:
    return _models().densenet.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10, memory_efficient=False)


def _densenet_checkpointed() -> nn.Module:
    return _models().densenet.DenseNet(8, (2, 2), 16, num_classes=10, memory_efficient=True)


def _regnet(se_ratio: float | None) -> nn.Module:
    regnet = _models().regnet
    params = regnet.BlockParams.from_init_params(
        depth=4, w_0=16, w_a=16.0, w_m=2.0, group_width=8, bottleneck_multiplier=1.0, se_ratio=se_ratio
    )
    return regnet.RegNet(params, num_classes=10)


def _convnext() -> nn.Module:
    convnext = _models().convnext
    widths = ((16, 24), (24, 32), (32, None))
    settings = [convnext.CNBlockConfig(a, b, 1) for a, b in widths]
    return convnext.ConvNeXt(settings, num_classes=10, layer_scale=0.5)


def _efficientnet_v2() -> nn.Module:
    efficientnet = _models().efficientnet
    settings = [
        efficientnet.FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        efficientnet.FusedMBConvConfig(4, 3, 2, 16, 24, 1),
        efficientnet.MBConvConfig(4, 3, 2, 24, 32, 2),
    ]
    return efficientnet.EfficientNet(settings, dropout=0.2, last_channel=64, num_classes=10)


def _vit() -> nn.Module:
    return _models().VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)


def _swin(version: int) -> nn.Module:
    swin = _models().swin_transformer
    blocks = {1: (swin.SwinTransformerBlock, swin.PatchMerging), 2: (swin.SwinTransformerBlockV2, swin.PatchMergingV2)}
    block, merging = blocks[version]
    return swin.SwinTransformer(
        [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, block=block, downsample_layer=merging
    )


def _maxvit() -> nn.Module:
    return _models().MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, num_classes=10)


_CLASSIFIERS: dict[str, Any] = {
    "alexnet": _alexnet,
    "vgg": partial(_vgg, False),
    "vgg_bn": partial(_vgg, True),
    "resnet_basic": partial(_resnet, "BasicBlock"),
    "resnet_bottleneck": partial(_resnet, "Bottleneck"),
    "resnext": partial(_resnet, "Bottleneck", groups=32, width_per_group=4),
    "resnet_dilated": partial(_resnet, "Bottleneck", replace_stride_with_dilation=[False, True, True]),
    "squeezenet1_1": partial(_by_name, "squeezenet1_1"),
    "densenet": _densenet,
    "densenet_checkpointed": _densenet_checkpointed,
    "googlenet": partial(_by_name, "googlenet", aux_logits=False, init_weights=False, transform_input=True),
    "mobilenet_v2": partial(_by_name, "mobilenet_v2", width_mult=0.25),
    "mobilenet_v3_small": partial(_by_name, "mobilenet_v3_small"),
    "mobilenet_v3_large": partial(_by_name, "mobilenet_v3_large"),
    "mnasnet0_5": partial(_by_name, "mnasnet0_5"),
    "shufflenet_v2_x0_5": partial(_by_name, "shufflenet_v2_x0_5"),
    "efficientnet_b0": partial(_by_name, "efficientnet_b0"),
    "efficientnet_v2": _efficientnet_v2,
    "regnet_x": partial(_regnet, None),
    "regnet_y": partial(_regnet, 0.25),
    "convnext": _convnext,
    "vit_torchvision": _vit,
    "swin_v1": partial(_swin, 1),
    "swin_v2": partial(_swin, 2),
    "maxvit": _maxvit,
}
_OTHER_INPUTS = {"vit_torchvision": images(3, 32, 32)}
_ANY_SIZE = {"resnet_basic", "mobilenet_v3_small", "convnext", "swin_v1"}  # traced for any height and width too

for _name, _build in _CLASSIFIERS.items():
    add(
        "classifier",
        _name,
        _build,
        _OTHER_INPUTS.get(_name, _SIZE),
        other_size=images(3, 96, 64) if _name in _ANY_SIZE else None,
        package="torchvision",
    )

add(
    "classifier",
    "inception_v3",
    partial(_by_name, "inception_v3", aux_logits=False, init_weights=False, transform_input=True),
    images(3, 96, 96),
    package="torchvision",
)


# -- video -------------------------------------------------------------------------------------------------------------


def _video_resnet(conv: str, stem: str = "BasicStem") -> nn.Module:
    video = _models().video.resnet
    makers = [video.Conv3DSimple, *[getattr(video, conv)] * 3]
    return video.VideoResNet(video.BasicBlock, makers, [1, 1, 1, 1], getattr(video, stem), num_classes=10)


def _s3d() -> nn.Module:
    return _models().video.s3d(weights=None, num_classes=10)


def _mvit() -> nn.Module:
    mvit = _models().video.mvit
    settings = [
        mvit.MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 4, 4]),
        mvit.MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
    ]
    return mvit.MViT(
        (32, 32),
        8,
        settings,
        residual_pool=True,
        residual_with_cls_embed=False,
        rel_pos_embed=True,
        proj_after_attn=True,
        num_classes=10,
    )


def _swin3d() -> nn.Module:
    swin = _models().video.swin_transformer
    return swin.SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], num_classes=10)


for _name, _build, _inputs in (
    ("r3d", partial(_video_resnet, "Conv3DSimple"), _CLIP),
    ("mc3", partial(_video_resnet, "Conv3DNoTemporal"), _CLIP),
    ("r2plus1d", partial(_video_resnet, "Conv2Plus1D", "R2Plus1dStem"), _CLIP),
    ("s3d", _s3d, images(3, 16, 224, 224)),
    ("mvit_v2", _mvit, _CLIP),
    ("swin3d", _swin3d, _CLIP),
):
    add("video", _name, _build, _inputs, package="torchvision")
