"""Rows of the zoo benchmark: torchvision's segmenters, detectors and optical flow, on small backbones.

A detector is there twice: as a user has it, from images to a list of found boxes per image, whose number depends on
data; and without what follows its last layer, as detectors are deployed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _zoo_networks import add, by_name, images, several, unit
from torch import Tensor, nn

_SIZE = images(3, 64, 64)
_OPTIONS: dict[str, Any] = {"package": "torchvision", "imports": ("torchvision",)}


def _resnet(**options: Any) -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], **options)


# -- segmentation ------------------------------------------------------------------------------------------------------


def _layers(body: nn.Module, layers: dict[str, str]) -> nn.Module:
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(body, return_layers=layers)


def _segmenter(kind: str, auxiliary: bool) -> nn.Module:
    from torchvision.models import segmentation as s

    layers = {"layer4": "out", **({"layer3": "aux"} if auxiliary else {})}
    head = {"FCN": s.fcn.FCNHead, "DeepLabV3": s.deeplabv3.DeepLabHead}[kind](512, 5)
    return getattr(s, kind)(_layers(_resnet(), layers), head, s.fcn.FCNHead(256, 5) if auxiliary else None)


def _dilated_fcn() -> nn.Module:
    from torchvision.models import segmentation as s
    from torchvision.models.resnet import Bottleneck, ResNet

    body = ResNet(Bottleneck, [1, 1, 1, 1], replace_stride_with_dilation=[False, True, True])
    return s.FCN(_layers(body, {"layer4": "out"}), nn.Sequential(nn.Conv2d(2048, 32, 1), nn.Conv2d(32, 5, 1)), None)


def _mobile(name: str) -> nn.Module:
    from torchvision.models import segmentation as s
    from torchvision.models.mobilenetv3 import mobilenet_v3_small

    features = mobilenet_v3_small(weights=None, dilated=True).features
    if name == "lraspp":
        return s.LRASPP(_layers(features, {"4": "low", "12": "high"}), 40, 576, 5)
    return s.DeepLabV3(_layers(features, {"12": "out"}), s.deeplabv3.DeepLabHead(576, 5))


_SEGMENTERS: dict[str, Callable[[], nn.Module]] = {
    "fcn_auxiliary": partial(_segmenter, "FCN", True),
    "fcn": partial(_segmenter, "FCN", False),
    "fcn_dilated": _dilated_fcn,
    "deeplabv3_auxiliary": partial(_segmenter, "DeepLabV3", True),
    "deeplabv3_mobilenet": partial(_mobile, "deeplabv3"),
    "lraspp_mobilenet": partial(_mobile, "lraspp"),
}
for _name, _build in _SEGMENTERS.items():
    _other = images(3, 96, 64) if _name in ("fcn", "lraspp_mobilenet") else None
    add("segmenter", _name, _build, _SIZE, other_size=_other, package="torchvision")


# -- detection ---------------------------------------------------------------------------------------------------------


def _pyramid(levels: int, extra: str | None = None, width: int = 32) -> nn.Module:
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    blocks = {None: LastLevelMaxPool, "p6p7": lambda: LastLevelP6P7(width, width)}[extra]()
    layers = {f"layer{i}": str(i) for i in range(5 - levels, 5)}
    widths = [64, 128, 256, 512][4 - levels :]
    return BackboneWithFPN(_resnet(), layers, widths, width, extra_blocks=blocks)


def _detector(kind: str) -> nn.Module:
    from torchvision.models import detection as d

    size = {"min_size": 64, "max_size": 64}
    if kind in ("RetinaNet", "FCOS"):
        # reason: a group norm of 32 groups in the head, which takes no single value a group, as of one image's last map
        width = 64 if kind == "FCOS" else 32
        return getattr(d, kind)(_pyramid(3, "p6p7", width), num_classes=5, topk_candidates=50, **size)
    mask, keypoint = d.mask_rcnn, d.keypoint_rcnn
    options: dict[str, Any] = {
        "FasterRCNN": {},
        "MaskRCNN": {
            "mask_head": mask.MaskRCNNHeads(32, (32, 32), 1),
            "mask_predictor": mask.MaskRCNNPredictor(32, 32, 5),
        },
        "KeypointRCNN": {
            "keypoint_head": keypoint.KeypointRCNNHeads(32, (32, 32)),
            "keypoint_predictor": keypoint.KeypointRCNNPredictor(32, 4),
        },
    }[kind]
    head = d.faster_rcnn.TwoMLPHead(32 * 49, 64)
    found = {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20}
    return getattr(d, kind)(
        _pyramid(4),
        box_head=head,
        box_predictor=d.faster_rcnn.FastRCNNPredictor(64, 5),
        **options,
        **size,
        **found,
    )


def _ssdlite() -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    return ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


class _Levels(nn.Module):
    """Feature maps of several strides, as SSD takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = _layers(_resnet(), {"layer2": "0", "layer3": "1", "layer4": "2"})
        self.out_channels = [128, 256, 512]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.body(x)


def _ssd() -> nn.Module:
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD

    return SSD(_Levels(), DefaultBoxGenerator([[2], [2, 3], [2]]), (64, 64), 5)


_DETECTORS: dict[str, Callable[[], nn.Module]] = {
    "faster_rcnn": partial(_detector, "FasterRCNN"),
    "mask_rcnn": partial(_detector, "MaskRCNN"),
    "keypoint_rcnn": partial(_detector, "KeypointRCNN"),
    "retinanet": partial(_detector, "RetinaNet"),
    "fcos": partial(_detector, "FCOS"),
    "ssd": _ssd,
    "ssdlite": _ssdlite,
}


class _Dense(nn.Module):
    """A detector up to the outputs of its last layer, on images that are normalised already."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


class _SecondStage(nn.Module):
    """Boxes are given: aligned, then classified, then masked."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.heads = detector.backbone, detector.roi_heads

    def forward(self, x: Tensor, boxes: Tensor) -> tuple[Tensor, ...]:
        from torchvision.ops import roi_align

        features = self.backbone(x)["1"]
        corner = boxes[..., :2] * 32
        corners = torch.cat([corner, corner + 8 + boxes[..., 2:] * 24], -1)
        number = torch.arange(x.shape[0], dtype=x.dtype)[:, None, None].expand(-1, boxes.shape[1], 1)
        rois = torch.cat([number, corners], -1).flatten(0, 1)
        scores, regression = self.heads.box_predictor(self.heads.box_head(roi_align(features, rois, 7, 0.25, 2, True)))
        masks = self.heads.mask_predictor(self.heads.mask_head(roi_align(features, rois, 14, 0.25, 2, True)))
        return scores, regression, masks


for _name, _build in _DETECTORS.items():
    add("detector", _name, _build, unit(3, 64, 64), **_OPTIONS)
for _name in ("faster_rcnn", "retinanet", "fcos", "ssd", "ssdlite"):
    _size = images(3, 128, 128) if _name == "ssdlite" else _SIZE
    add("detector", f"{_name}_dense", lambda build=_DETECTORS[_name]: _Dense(build()), _size, **_OPTIONS)
add(
    "detector",
    "mask_rcnn_second_stage",
    lambda: _SecondStage(_detector("MaskRCNN")),
    several(_SIZE, unit(6, 4)),
    **_OPTIONS,
)


# -- optical flow ------------------------------------------------------------------------------------------------------


def _raft(size: str) -> nn.Module:
    from torchvision.models import optical_flow

    return getattr(optical_flow, f"raft_{size}")(weights=None)


_PAIR = by_name(
    image1=images(3, 128, 128), image2=lambda b: images(3, 128, 128)(b + 50)[:b], num_flow_updates=lambda batch: 2
)
for _name in ("small", "large"):
    add("optical flow", f"raft_{_name}", partial(_raft, _name), _PAIR, **_OPTIONS)
