"""Rows of the zoo benchmark that are written here: layers that image classifiers of timm do not have.

1-d and 3-d convolutions, recurrent heads, deformable and conditional convolutions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _zoo_blocks import IMAGES, Head, conv, stem
from _zoo_networks import images, network
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# -- other dimensions --------------------------------------------------------------------------------------------------


@network("conv1d", images(4, 64))
def conv1d_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(4, 16, 5, padding=2),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(16, 32, 3, padding=2, dilation=2),
        nn.BatchNorm1d(32),
        nn.GELU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


class _Residual1d(nn.Module):
    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.filter = parametrizations.weight_norm(nn.Conv1d(width, width, 2, dilation=dilation))
        self.gate = parametrizations.weight_norm(nn.Conv1d(width, width, 2, dilation=dilation))
        self.out = nn.Conv1d(width, width, 1)
        self.dilation = dilation

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (self.dilation, 0))
        return x + self.out(torch.tanh(self.filter(padded)) * torch.sigmoid(self.gate(padded)))


@network("conv1d", images(1, 64))
def wavenet() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 16, 1), *(_Residual1d(16, 2**i) for i in range(3)), nn.Conv1d(16, 8, 1))


@network("conv1d", images(2, 64))
def conv1d_unet() -> nn.Module:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Conv1d(2, 16, 4, 2, 1)
            self.deep = nn.Conv1d(16, 32, 4, 2, 1)
            self.up = nn.ConvTranspose1d(32, 16, 4, 2, 1)
            self.last = nn.ConvTranspose1d(32, 2, 4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            down = F.leaky_relu(self.down(x), 0.2)
            up = F.leaky_relu(self.up(F.leaky_relu(self.deep(down), 0.2)), 0.2)
            return self.last(torch.cat([down, up], 1))

    return UNet()


@network("conv3d", images(1, 8, 16, 16))
def conv3d_classifier() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 16, (1, 3, 3), padding=(0, 1, 1)),
        nn.BatchNorm3d(16),
        nn.ReLU(),
        nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0), groups=4),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


@network("conv3d", images(1, 8, 16, 16))
def conv3d_unet() -> nn.Module:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU())
            self.down = nn.Sequential(nn.Conv3d(8, 16, 3, 2, 1), nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU())
            self.up = nn.ConvTranspose3d(16, 8, 2, 2)
            self.last = nn.Conv3d(16, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            return self.last(torch.cat([first, self.up(self.down(first))], 1))

    return UNet()


# -- recurrent heads ---------------------------------------------------------------------------------------------------


class _Recurrent(nn.Module):
    """Columns of a feature map as a sequence, as in text recognition (CRNN)."""

    def __init__(self, cell: str, **options: object) -> None:
        super().__init__()
        self.stem = stem()
        self.cell = getattr(nn, cell)(16 * 8, 24, batch_first=True, **options)
        self.head = nn.Linear(24 * (2 if self.cell.bidirectional else 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        sequence = self.stem(x).permute(0, 3, 1, 2).flatten(2)
        return self.head(self.cell(sequence)[0])


@network("recurrent", IMAGES)
def lstm_head() -> nn.Module:
    return _Recurrent("LSTM")


@network("recurrent", IMAGES)
def lstm_two_ways() -> nn.Module:
    return _Recurrent("LSTM", bidirectional=True, num_layers=2)


@network("recurrent", IMAGES)
def gru_head() -> nn.Module:
    return _Recurrent("GRU")


@network("recurrent", IMAGES)
def gru_two_ways() -> nn.Module:
    return _Recurrent("GRU", bidirectional=True)


@network("recurrent", IMAGES)
def rnn_head() -> nn.Module:
    return _Recurrent("RNN", nonlinearity="relu")


@network("recurrent", images(4, 3, 16, 16))
def conv_lstm() -> nn.Module:
    class ConvLSTM(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gates = nn.Conv2d(3 + 8, 32, 3, padding=1)
            self.head = nn.Conv2d(8, 1, 1)

        def forward(self, video: Tensor) -> Tensor:
            h = c = video.new_zeros(video.shape[0], 8, *video.shape[-2:])
            for frame in video.unbind(1):
                i, f, o, g = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
            return self.head(h)

    return ConvLSTM()


@network("recurrent", images(12, 6))
def gru_cell_loop() -> nn.Module:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell, self.head = nn.GRUCell(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 16)
            for i in range(x.shape[1]):
                h = self.cell(x[:, i], h)
            return self.head(h)

    return Loop()


# -- unusual convolutions ----------------------------------------------------------------------------------------------


@network("deformable", IMAGES, package="torchvision", imports=("torchvision",))
def deformable_convolution() -> nn.Module:
    from torchvision.ops import DeformConv2d

    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.offset = stem(), nn.Conv2d(16, 27, 3, padding=1)
            self.conv, self.head = DeformConv2d(16, 24, 3, padding=1), Head(24)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            offset, mask = self.offset(x).split([18, 9], 1)
            return self.head(F.relu(self.conv(x, offset, mask.sigmoid())))

    return Deformable()


@network("deformable", IMAGES)
def deformable_by_grid_sample() -> nn.Module:
    class Deformable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.offset = stem(), nn.Conv2d(16, 2, 3, padding=1)
            self.conv, self.head = conv(16, 16), Head(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            theta = torch.eye(2, 3, device=x.device)[None].expand(x.shape[0], -1, -1)
            grid = F.affine_grid(theta, list(x.shape), align_corners=False)
            grid = grid + 0.1 * torch.tanh(self.offset(x)).permute(0, 2, 3, 1)
            return self.head(self.conv(F.grid_sample(x, grid, align_corners=False)))

    return Deformable()


class _CondConv(nn.Module):
    """A kernel for each example, mixed from experts; computed as one grouped convolution."""

    def __init__(self, inputs: int, outputs: int, experts: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, outputs * inputs * 9) / 10)
        self.route, self.shape = nn.Linear(inputs, experts), (outputs, inputs, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight = torch.sigmoid(self.route(x.mean((2, 3)))) @ self.weight
        weight = weight.view(batch * self.shape[0], *self.shape[1:])
        out = F.conv2d(x.reshape(1, batch * channels, height, width), weight, padding=1, groups=batch)
        return out.view(batch, self.shape[0], height, width)


@network("condconv", IMAGES)
def condconv() -> nn.Module:
    return nn.Sequential(stem(), _CondConv(16, 24), nn.BatchNorm2d(24), nn.ReLU(), Head(24))


@network("condconv", IMAGES)
def dynamic_convolution_by_sum() -> nn.Module:
    class Dynamic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = stem(), Head(24)
            self.experts = nn.ModuleList(nn.Conv2d(16, 24, 3, padding=1) for _ in range(3))
            self.route = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            route = self.route(x.mean((2, 3))).softmax(1)
            mixed = sum(route[:, i, None, None, None] * expert(x) for i, expert in enumerate(self.experts))
            return self.head(F.relu(mixed))

    return Dynamic()


@network("condconv", IMAGES)
def involution() -> nn.Module:
    class Involution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = stem(), Head(16)
            self.reduce, self.span = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 9 * 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            batch, _, height, width = x.shape
            kernel = self.span(F.relu(self.reduce(x))).view(batch, 4, 1, 9, height, width)
            patches = F.unfold(x, 3, padding=1).view(batch, 4, 4, 9, height, width)
            return self.head((kernel * patches).sum(3).view(batch, 16, height, width))

    return Involution()
