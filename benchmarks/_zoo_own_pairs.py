"""Rows of the zoo benchmark that are written here: flows, two inputs (Siamese, two towers), structured outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _zoo_blocks import IMAGES, Head, conv, stem
from _zoo_networks import images, network, several, tokens
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# -- normalising flows -------------------------------------------------------------------------------------------------


class _Coupling(nn.Module):
    """Half of the channels gives scale and shift of the other half; convolutions with weight norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        norm = parametrizations.weight_norm
        self.net = nn.Sequential(
            norm(nn.Conv2d(channels // 2, 16, 3, padding=1)), nn.ReLU(), norm(nn.Conv2d(16, channels, 3, padding=1))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)
        log_scale, shift = self.net(a).chunk(2, 1)
        log_scale = torch.tanh(log_scale)
        return torch.cat([b * log_scale.exp() + shift, a], 1), log_scale.sum((1, 2, 3))


@network("flow", images(3, 16, 16))
def coupling_flow() -> nn.Module:
    class Flow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.couplings = nn.ModuleList(_Coupling(12) for _ in range(2))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.pixel_unshuffle(x, 2)
            total = x.new_zeros(x.shape[0])
            for coupling in self.couplings:
                x, log_determinant = coupling(x)
                total = total + log_determinant
            return x, total

    return Flow()


@network("flow", images(3, 16, 16))
def glow() -> nn.Module:
    class Step(nn.Module):
        """Actnorm, an invertible 1 x 1 convolution with its determinant, a coupling."""

        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shift = nn.Parameter(torch.ones(12, 1, 1)), nn.Parameter(torch.zeros(12, 1, 1))
            self.matrix, self.coupling = nn.Parameter(torch.linalg.qr(torch.randn(12, 12))[0]), _Coupling(12)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            pixels = x.shape[2] * x.shape[3]
            x = F.conv2d((x + self.shift) * self.scale, self.matrix[..., None, None])
            x, log_determinant = self.coupling(x)
            fixed = torch.linalg.slogdet(self.matrix)[1] + self.scale.abs().log().sum()
            return x, log_determinant + pixels * fixed

    class Glow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([Step(), Step()])

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x, total = F.pixel_unshuffle(x, 2), torch.zeros(())
            for step in self.steps:
                x, log_determinant = step(x)
                total = total + log_determinant
            return x, total

    return Glow()


# -- two inputs --------------------------------------------------------------------------------------------------------


@network("two inputs", several(IMAGES, lambda batch: IMAGES(batch + 50)[:batch]))
def siamese() -> nn.Module:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tower, self.head = nn.Sequential(stem(), Head(16)), nn.Linear(10, 1)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head((self.tower(a) - self.tower(b)).abs())

    return Siamese()


@network("two inputs", several(images(3, 16, 16), images(3, 32, 32)))
def siamese_tracker() -> nn.Module:
    class Tracker(nn.Module):
        """Cross-correlation: the template's features are the kernel, one group per example (SiamFC)."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = stem()

        def forward(self, template: Tensor, search: Tensor) -> Tensor:
            kernel, x = self.backbone(template), self.backbone(search)
            batch, channels, height, width = x.shape
            out = F.conv2d(x.reshape(1, batch * channels, height, width), kernel, groups=batch)
            return out.transpose(0, 1)

    return Tracker()


@network("two inputs", several(IMAGES, tokens(40, 6)))
def two_towers() -> nn.Module:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.words, self.text = nn.Sequential(stem(), Head(16)), nn.Embedding(40, 16), nn.Linear(16, 10)
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            a = F.normalize(self.image(image), dim=-1)
            b = F.normalize(self.text(self.words(text).mean(1)), dim=-1)
            logits = self.scale.exp() * a @ b.t()
            return logits, logits.t()

    return Towers()


@network("two inputs", several(images(3, 16, 32), lambda batch: images(3, 16, 32)(batch + 50)[:batch]))
def stereo() -> nn.Module:
    class Stereo(nn.Module):
        """A cost volume of shifted differences, 3-d convolutions, and the expectation over disparities."""

        def __init__(self) -> None:
            super().__init__()
            self.features, self.cost = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv3d(16, 8, 3, padding=1)
            self.last = nn.Conv3d(8, 1, 3, padding=1)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            a, b = self.features(left), self.features(right)
            shifted = [torch.cat([a, F.pad(b, (i, 0))[..., : b.shape[-1]]], 1) for i in range(4)]
            cost = self.last(F.relu(self.cost(torch.stack(shifted, 2)))).squeeze(1)
            disparity = torch.arange(4, device=cost.device, dtype=cost.dtype).view(1, 4, 1, 1)
            return (cost.softmax(1) * disparity).sum(1)

    return Stereo()


@network("two inputs", several(images(2, 3, 16, 16), images(2, 4)))
def camera_views() -> nn.Module:
    class Views(nn.Module):
        """Views are folded into the batch and fused again."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.pose = stem(), nn.Linear(4, 16)
            self.fuse = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.head = nn.Linear(16, 5)

        def forward(self, views: Tensor, poses: Tensor) -> Tensor:
            x = self.backbone(views.flatten(0, 1)).mean((2, 3)).unflatten(0, views.shape[:2])
            return self.head(self.fuse(x + self.pose(poses)).mean(1))

    return Views()


# -- dense and structured outputs --------------------------------------------------------------------------------------


@network("structured", images(3, 32, 32))
def pose_heatmaps() -> nn.Module:
    class Pose(nn.Module):
        """Soft arg-max of heat maps."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.up = stem(), nn.ConvTranspose2d(16, 16, 4, 2, 1)
            self.heat = nn.Conv2d(16, 7, 1)

        def forward(self, x: Tensor) -> Tensor:
            heat = self.heat(F.relu(self.up(self.stem(x))))
            p = heat.flatten(2).softmax(-1).view_as(heat)
            x_axis, y_axis = torch.linspace(0, 1, heat.shape[3]), torch.linspace(0, 1, heat.shape[2])
            return torch.stack([(p.sum(2) * x_axis).sum(-1), (p.sum(3) * y_axis).sum(-1)], -1)

    return Pose()


@network("structured", images(3, 32, 32))
def high_resolution() -> nn.Module:
    class HR(nn.Module):
        """Branches of several resolutions that exchange sums."""

        def __init__(self) -> None:
            super().__init__()
            self.high, self.low = conv(3, 16, stride=2), conv(16, 24, stride=2)
            self.down, self.up = conv(16, 24, stride=2), conv(24, 16, 1)
            self.last = nn.Conv2d(40, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            high = self.high(x)
            low = self.low(high)
            up = F.interpolate(self.up(low), size=high.shape[-2:], mode="bilinear", align_corners=True)
            high, low = F.relu(high + up), F.relu(low + self.down(high))
            return self.last(torch.cat([high, F.interpolate(low, size=high.shape[-2:])], 1))

    return HR()


@network("structured", images(3, 32, 32))
def embedding_with_margin() -> nn.Module:
    class ArcFace(nn.Module):
        """Cosine to normalised class weights."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.embed = stem(), nn.Linear(16 * 64, 16, bias=False)
            self.norm, self.weight = nn.BatchNorm1d(16), nn.Parameter(torch.randn(10, 16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            embedding = F.normalize(self.norm(self.embed(self.stem(x).flatten(1))))
            return embedding, 16 * F.linear(embedding, F.normalize(self.weight))

    return ArcFace()


@network("structured", images(3, 32, 32))
def netvlad() -> nn.Module:
    class VLAD(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.assign, self.centres = stem(), nn.Conv2d(16, 4, 1), nn.Parameter(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = F.normalize(self.stem(x), dim=1)
            assign = self.assign(x).flatten(2).softmax(1)
            residual = torch.einsum("bkn,bcn->bkc", assign, x.flatten(2)) - assign.sum(-1)[..., None] * self.centres
            return F.normalize(F.normalize(residual, dim=2).flatten(1))

    return VLAD()


@network("structured", images(1, 32, 64))
def text_recogniser() -> nn.Module:
    class Recogniser(nn.Module):
        """A transformer decoder with learned queries over image columns."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = conv(1, 16, stride=2), conv(16, 16, stride=2)
            self.queries = nn.Parameter(torch.randn(6, 16))
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), 2)
            self.head = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            memory = self.second(self.first(x)).mean(2).transpose(1, 2)
            return self.head(self.decoder(self.queries.expand(x.shape[0], -1, -1), memory))

    return Recogniser()
