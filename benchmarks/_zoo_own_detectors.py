"""Rows of the zoo benchmark that are written here: detectors as they are deployed.

YOLO-like networks with cached grids, distribution focal loss, NMS inside or none, and a DETR-like one with a hybrid
encoder, top-k queries and deformable attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _zoo_networks import images, network
from torch import Tensor, nn

_IMAGES = images(3, 64, 64)
_OTHER = images(3, 96, 64)


class _Conv(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn, self.act = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class _Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2, self.add = _Conv(width, width, 3), _Conv(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class _C2f(nn.Module):
    """Split, a chain of bottlenecks whose every link is kept, concatenation."""

    def __init__(self, inputs: int, outputs: int, shortcut: bool = True) -> None:
        super().__init__()
        self.c = outputs // 2
        self.cv1, self.cv2 = _Conv(inputs, 2 * self.c), _Conv(4 * self.c, outputs)
        self.m = nn.ModuleList(_Bottleneck(self.c, shortcut) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class _SPPF(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = _Conv(width, width // 2), _Conv(width * 2, width)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class _Pyramid(nn.Module):
    """Strides 4, 8 and 16, up and down again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = width
        self.stem = nn.Sequential(_Conv(3, w, 3, 2), _Conv(w, 2 * w, 3, 2), _C2f(2 * w, 2 * w))
        self.p4 = nn.Sequential(_Conv(2 * w, 3 * w, 3, 2), _C2f(3 * w, 3 * w))
        self.p5 = nn.Sequential(_Conv(3 * w, 4 * w, 3, 2), _SPPF(4 * w))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.n4, self.n3 = _C2f(7 * w, 3 * w, False), _C2f(5 * w, 2 * w, False)
        self.down, self.n5 = _Conv(2 * w, 2 * w, 3, 2), _C2f(5 * w, 4 * w, False)
        self.channels = (2 * w, 4 * w)

    def forward(self, x: Tensor) -> list[Tensor]:
        p3 = self.stem(x)
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.n4(torch.cat([self.up(p5), p4], 1))
        n3 = self.n3(torch.cat([self.up(n4), p3], 1))
        return [n3, self.n5(torch.cat([self.down(n3), n4], 1))]


def _anchors(features: list[Tensor], strides: Tensor) -> tuple[Tensor, Tensor]:
    points, scales = [], []
    for feature, stride in zip(features, strides, strict=True):
        height, width = feature.shape[-2:]
        y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        points.append(torch.stack([x, y], -1).view(-1, 2))
        scales.append(torch.full((height * width, 1), float(stride)))
    return torch.cat(points).transpose(0, 1), torch.cat(scales).transpose(0, 1)


class _DFL(nn.Module):
    """The expectation over bins, as a convolution with fixed weights."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.conv, self.bins = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False), bins
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, anchors = x.shape
        return self.conv(x.view(batch, 4, self.bins, anchors).transpose(2, 1).softmax(1)).view(batch, 4, anchors)


class _Detect(nn.Module):
    """Decoupled branches; anchors are computed where the image size is new and kept, as attributes."""

    bins, classes = 8, 5

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stride = torch.tensor([4.0, 8.0])
        self.no = self.classes + 4 * self.bins
        self.cv2 = nn.ModuleList(
            nn.Sequential(_Conv(c, 16, 3), _Conv(16, 16, 3), nn.Conv2d(16, 4 * self.bins, 1)) for c in channels
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(_Conv(c, c, 3, groups=c), _Conv(c, 16), nn.Conv2d(16, self.classes, 1)) for c in channels
        )
        self.dfl = _DFL(self.bins)
        self.shape: tuple[int, ...] | None = None
        self.anchors, self.strides = torch.empty(0), torch.empty(0)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        shape = features[0].shape
        outputs = [torch.cat((box(x), score(x)), 1) for x, box, score in zip(features, self.cv2, self.cv3, strict=True)]
        flat = torch.cat([x.view(shape[0], self.no, -1) for x in outputs], 2)
        if self.shape != shape:
            self.anchors, self.strides = _anchors(outputs, self.stride)
            self.shape = shape
        box, score = flat.split((4 * self.bins, self.classes), 1)
        left_top, right_bottom = self.dfl(box).chunk(2, 1)
        low, high = self.anchors - left_top, self.anchors + right_bottom
        boxes = torch.cat(((low + high) / 2, high - low), 1) * self.strides
        return torch.cat((boxes, score.sigmoid()), 1), outputs


class _Detector(nn.Module):
    def __init__(self, head: type[nn.Module]) -> None:
        super().__init__()
        self.pyramid = _Pyramid()
        self.head = head(self.pyramid.channels)

    def forward(self, x: Tensor) -> object:
        return self.head(self.pyramid(x))


@network("detector", _IMAGES, other_size=_OTHER)
def yolo_dfl() -> nn.Module:
    return _Detector(_Detect)


class _ShapeOfImage(_Detect):
    """The cache is keyed by height and width alone."""

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        size = features[0].shape[2:]
        if self.shape != size:
            self.anchors, self.strides = _anchors(features, self.stride)
            self.shape = size
        kept = self.shape
        self.shape = features[0].shape
        try:
            return super().forward(features)
        finally:
            self.shape = kept


@network("detector", _IMAGES)
def yolo_cached_by_size() -> nn.Module:
    return _Detector(_ShapeOfImage)


class _EndToEnd(_Detect):
    """NMS-free: the best by topk and gather (YOLOv10)."""

    def forward(self, features: list[Tensor]) -> Tensor:  # type: ignore[override]
        found = super().forward(features)[0].transpose(1, 2)
        boxes, scores = found.split((4, self.classes), -1)
        index = scores.amax(-1).topk(20).indices[..., None]
        boxes = boxes.gather(1, index.expand(-1, -1, 4))
        best, which = scores.gather(1, index.expand(-1, -1, self.classes)).flatten(1).topk(20)
        boxes = boxes.gather(1, (which // self.classes)[..., None].expand(-1, -1, 4))
        return torch.cat([boxes, best[..., None], (which % self.classes)[..., None].float()], -1)


@network("detector", _IMAGES)
def yolo_end_to_end() -> nn.Module:
    return _Detector(_EndToEnd)


class _AnchorBased(nn.Module):
    """Three anchors a cell and a grid in a buffer list, decoded in place (YOLOv5)."""

    classes = 5

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.no = self.classes + 5
        self.grid = [torch.empty(0) for _ in channels]
        self.register_buffer(
            "anchors", torch.tensor([[[10.0, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]]])
        )
        self.m = nn.ModuleList(nn.Conv2d(c, 3 * self.no, 1) for c in channels)

    def forward(self, features: list[Tensor]) -> Tensor:
        outputs = []
        for i, (x, layer) in enumerate(zip(features, self.m, strict=True)):
            x = layer(x)
            batch, _, height, width = x.shape
            x = x.view(batch, 3, self.no, height, width).permute(0, 1, 3, 4, 2).contiguous()
            if self.grid[i].shape[2:4] != x.shape[2:4]:
                y_axis, x_axis = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
                self.grid[i] = torch.stack((x_axis, y_axis), 2).expand(1, 3, height, width, 2).float() - 0.5
            y = x.sigmoid()
            y[..., 0:2] = (y[..., 0:2] * 2 + self.grid[i]) * 4 * 2**i
            y[..., 2:4] = (y[..., 2:4] * 2) ** 2 * self.anchors[i].view(1, 3, 1, 1, 2)
            outputs.append(y.view(batch, -1, self.no))
        return torch.cat(outputs, 1)


@network("detector", _IMAGES)
def yolo_anchors() -> nn.Module:
    return _Detector(_AnchorBased)


@network("detector", _IMAGES, package="torchvision", imports=("torchvision",))
def yolo_with_nms() -> nn.Module:
    class WithNMS(nn.Module):
        """NMS inside, of the first image: the number of boxes depends on data."""

        def __init__(self) -> None:
            super().__init__()
            self.detector = _Detector(_Detect)

        def forward(self, x: Tensor) -> Tensor:
            from torchvision.ops import box_convert, nms

            found = self.detector(x)[0][0].t()
            boxes = box_convert(found[:, :4], "cxcywh", "xyxy")
            return found[nms(boxes, found[:, 4:].amax(1), 0.5)]

    return WithNMS()


@network("detector", _IMAGES)
def centre_net() -> nn.Module:
    class CentreNet(nn.Module):
        """Peaks of heat maps by max pooling, topk, gather of the regressions there."""

        def __init__(self) -> None:
            super().__init__()
            self.pyramid = _Pyramid()
            self.heat, self.size = (
                nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, outputs, 1))
                for outputs in (5, 4)
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = self.pyramid(x)[0]
            heat = self.heat(x).sigmoid()
            peaks = heat * (F.max_pool2d(heat, 3, 1, 1) == heat).float()
            scores, index = peaks.flatten(1).topk(10)
            place = index % (x.shape[2] * x.shape[3])
            sizes = self.size(x).flatten(2).gather(2, place[:, None].expand(-1, 4, -1))
            return scores, index, sizes

    return CentreNet()


class _DeformableAttention(nn.Module):
    """Each query looks at a few points of each level, by grid sampling."""

    def __init__(self, width: int = 32, heads: int = 4, levels: int = 2, points: int = 2) -> None:
        super().__init__()
        self.sizes = (heads, levels, points)
        self.offsets, self.weights = (nn.Linear(width, heads * levels * points * n) for n in (2, 1))
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        (heads, levels, points), (batch, count, width) = self.sizes, query.shape
        value = self.value(memory).view(batch, -1, heads, width // heads)
        offsets = self.offsets(query).view(batch, count, heads, levels, points, 2)
        weights = self.weights(query).view(batch, count, heads, levels * points).softmax(-1)
        scale = reference[:, :, None, None, None, 2:]
        grid = 2 * (reference[:, :, None, None, None, :2] + offsets / points * scale * 0.5) - 1
        sampled = []
        for level, (part, shape) in enumerate(zip(value.split([h * w for h, w in shapes], 1), shapes, strict=True)):
            image = part.flatten(2).transpose(1, 2).reshape(batch * heads, width // heads, *shape)
            places = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
            sampled.append(F.grid_sample(image, places, "bilinear", "zeros", False))
        weights = weights.transpose(1, 2).reshape(batch * heads, 1, count, levels * points)
        out = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1).view(batch, width, count)
        return self.out(out.transpose(1, 2))


class _DecoderLayer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.cross_attention = _DeformableAttention(width)
        self.linear1, self.linear2 = nn.Linear(width, 64), nn.Linear(64, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, shapes: list) -> Tensor:
        q = x + position
        x = self.norms[0](x + self.self_attention(q, q, x)[0])
        x = self.norms[1](x + self.cross_attention(x + position, reference, memory, shapes))
        return self.norms[2](x + self.linear2(F.relu(self.linear1(x))))


@network("detector", _IMAGES)
def rt_detr_like() -> nn.Module:
    class RTDETR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pyramid = _Pyramid()
            self.project = nn.ModuleList(
                nn.Sequential(nn.Conv2d(c, 32, 1, bias=False), nn.BatchNorm2d(32)) for c in self.pyramid.channels
            )
            self.encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
            self.memory = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32))
            self.score, self.box = nn.Linear(32, 5), nn.Linear(32, 4)
            self.layers = nn.ModuleList(_DecoderLayer() for _ in range(2))
            self.position = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 32))
            self.boxes = nn.ModuleList(nn.Linear(32, 4) for _ in range(2))
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            levels = [project(f) for project, f in zip(self.project, self.pyramid(x), strict=True)]
            height, width = levels[1].shape[2:]
            deep = self.encoder(levels[1].flatten(2).permute(0, 2, 1))
            levels[1] = deep.permute(0, 2, 1).reshape(-1, 32, height, width).contiguous()
            shapes = [(level.shape[2], level.shape[3]) for level in levels]
            memory = self.memory(torch.cat([level.flatten(2).permute(0, 2, 1) for level in levels], 1))
            scores = self.score(memory)
            _, best = torch.topk(scores.max(-1).values, 10, dim=1)
            reference = self.box(memory).gather(1, best[..., None].repeat(1, 1, 4)).sigmoid()
            query = memory.gather(1, best[..., None].repeat(1, 1, 32))
            for layer, box in zip(self.layers, self.boxes, strict=True):
                query = layer(query, self.position(reference), reference, memory, shapes)
                reference = torch.sigmoid(box(query) + torch.logit(reference, eps=1e-5))
            return self.head(query), reference

    return RTDETR()


@network("detector", _IMAGES)
def detr_like() -> nn.Module:
    class DETR(nn.Module):
        """The forty lines of the paper."""

        def __init__(self) -> None:
            super().__init__()
            self.pyramid, self.conv = _Pyramid(), nn.Conv2d(32, 32, 1)
            self.transformer = nn.Transformer(32, 4, 1, 1, 64)
            self.classes, self.boxes = nn.Linear(32, 6), nn.Linear(32, 4)
            self.query = nn.Parameter(torch.rand(10, 32))
            self.row, self.column = nn.Parameter(torch.rand(20, 16)), nn.Parameter(torch.rand(20, 16))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.conv(self.pyramid(x)[1])
            height, width = h.shape[-2:]
            position = torch.cat(
                [
                    self.column[:width].unsqueeze(0).repeat(height, 1, 1),
                    self.row[:height].unsqueeze(1).repeat(1, width, 1),
                ],
                -1,
            )
            source = position.flatten(0, 1).unsqueeze(1) + 0.1 * h.flatten(2).permute(2, 0, 1)
            out = self.transformer(source, self.query.unsqueeze(1).expand(-1, x.shape[0], -1)).transpose(0, 1)
            return {"logits": self.classes(out), "boxes": self.boxes(out).sigmoid()}

    return DETR()


@network("detector", _IMAGES)
def instance_masks() -> nn.Module:
    class Prototypes(nn.Module):
        """YOLACT: prototypes times coefficients."""

        def __init__(self) -> None:
            super().__init__()
            self.pyramid, self.prototype = (
                _Pyramid(),
                nn.Sequential(nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16, 6, 1)),
            )
            self.coefficients = nn.Conv2d(32, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            high, low = self.pyramid(x)
            coefficients = self.coefficients(low).flatten(2).transpose(1, 2).tanh()
            prototypes = self.prototype(high)
            masks = torch.matmul(coefficients, prototypes.flatten(2)).unflatten(2, prototypes.shape[-2:])
            return masks.sigmoid()

    return Prototypes()
