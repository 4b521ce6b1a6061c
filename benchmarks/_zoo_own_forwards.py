"""Rows of the zoo benchmark that are written here: mixtures of experts, spectra, points, ways to write a forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _zoo_blocks import IMAGES, Head, conv, stem
from _zoo_networks import images, network, several, tokens, unit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

# -- experts -----------------------------------------------------------------------------------------------------------


class _Experts(nn.Module):
    """Mixture of experts; `sparse`: each token visits its two best, by index, as in Mixtral."""

    def __init__(self, width: int = 16, experts: int = 4, sparse: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, width, 32) / 4)
        self.down = nn.Parameter(torch.randn(experts, 32, width) / 6)
        self.route, self.sparse = nn.Linear(width, experts), sparse

    def forward(self, x: Tensor) -> Tensor:
        route = self.route(x).softmax(-1)
        if self.sparse:
            best, index = route.topk(2, -1)
            route = torch.zeros_like(route).scatter(-1, index, best)
        hidden = F.gelu(torch.einsum("btc,ech->bteh", x, self.up))
        return torch.einsum("bteh,ehc,bte->btc", hidden, self.down, route)


class _TokenMixture(nn.Module):
    def __init__(self, mixture: nn.Module) -> None:
        super().__init__()
        self.patch, self.norm, self.mixture = nn.Conv2d(3, 16, 8, 8), nn.LayerNorm(16), mixture
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head((x + self.mixture(self.norm(x))).mean(1))


@network("experts", IMAGES)
def experts_soft() -> nn.Module:
    return _TokenMixture(_Experts())


@network("experts", IMAGES)
def experts_top_two() -> nn.Module:
    return _TokenMixture(_Experts(sparse=True))


@network("experts", IMAGES)
def experts_by_loop() -> nn.Module:
    class Loop(nn.Module):
        """Tokens are sent to experts by boolean index: a size that depends on data."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
            self.route = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            best = self.route(x).argmax(-1)
            out = torch.zeros_like(x)
            for i, expert in enumerate(self.experts):
                mask = best == i
                out[mask] = expert(x[mask])
            return out

    return _TokenMixture(Loop())


# -- spectra, graphs, points -------------------------------------------------------------------------------------------


@network("spectra", IMAGES)
def fourier_operator() -> nn.Module:
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lift, self.skip, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 1, 1)
            self.real, self.imaginary = (nn.Parameter(torch.randn(8, 8, 5, 5)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.lift(x)
            spectrum = torch.fft.rfft2(x)
            low = torch.einsum("bixy,ioxy->boxy", spectrum[..., :5, :5], torch.complex(self.real, self.imaginary))
            full = F.pad(low, (0, spectrum.shape[-1] - 5, 0, spectrum.shape[-2] - 5))
            return self.head(F.gelu(self.skip(x) + torch.fft.irfft2(full, s=x.shape[-2:])))

    return Fourier()


@network("spectra", IMAGES)
def gabor_and_dct() -> nn.Module:
    class Transform(nn.Module):
        """A fixed transform in a buffer in front of a small network."""

        def __init__(self) -> None:
            super().__init__()
            k, n = torch.arange(8.0), torch.arange(8.0)
            table = torch.cos(torch.pi / 8 * (n[None] + 0.5) * k[:, None])
            self.register_buffer("table", torch.einsum("ix,jy->ijxy", table, table).reshape(64, 1, 8, 8) / 8)
            self.conv, self.head = conv(192, 16, 1), Head(16)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = F.conv2d(x.flatten(0, 1)[:, None], self.table, stride=8)
            return self.head(self.conv(spectrum.view(x.shape[0], 192, *spectrum.shape[-2:])))

    return Transform()


@network("points", several(images(3, 20), unit(20, 20)))
def graph_convolution() -> nn.Module:
    class GCN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            adjacency = adjacency / adjacency.sum(-1, keepdim=True)
            x = F.relu(adjacency @ self.first(x.transpose(1, 2)))
            return self.second(adjacency @ x)

    return GCN()


@network("points", images(3, 40))
def point_net() -> nn.Module:
    class PointNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
            self.matrix, self.head = nn.Linear(16, 9), nn.Linear(32, 5)
            self.local = nn.Sequential(nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            matrix = self.matrix(self.transform(x).amax(2)).view(-1, 3, 3) + torch.eye(3, device=x.device)
            return self.head(self.local(torch.bmm(matrix, x)).amax(2))

    return PointNet()


@network("points", images(3, 24))
def edge_convolution() -> nn.Module:
    class EdgeConv(nn.Module):
        """Neighbours by topk of distances, gathered, as in DGCNN."""

        def __init__(self) -> None:
            super().__init__()
            self.edge = nn.Sequential(nn.Conv2d(6, 16, 1, bias=False), nn.BatchNorm2d(16), nn.LeakyReLU(0.2))
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            index = torch.cdist(x.transpose(1, 2), x.transpose(1, 2)).topk(4, largest=False).indices
            near = torch.gather(
                x[:, :, None, :].expand(-1, -1, 24, -1), 3, index[:, None].expand(-1, x.shape[1], -1, -1)
            )
            centre = x[..., None].expand_as(near)
            return self.head(self.edge(torch.cat([near - centre, centre], 1)).amax((2, 3)))

    return EdgeConv()


# -- ways to write a forward -------------------------------------------------------------------------------------------


@network("forward", several(IMAGES, images(5)))
def var_positional() -> nn.Module:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head, self.other = stem(), Head(16), nn.Linear(5, 10)

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.head(self.stem(inputs[0])) + self.other(inputs[1])

    return Many()


@network("forward", IMAGES)
def named_tuple_output() -> nn.Module:
    from typing import NamedTuple

    class Output(NamedTuple):
        logits: Tensor
        features: Tensor

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = stem(), Head(16)

        def forward(self, x: Tensor) -> Output:
            features = self.stem(x)
            return Output(self.head(features), features)

    return Named()


@network("forward", IMAGES)
def dict_of_lists_output() -> nn.Module:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = conv(3, 8, stride=2), conv(8, 16, stride=2), Head(16)

        def forward(self, x: Tensor) -> dict[str, object]:
            first = self.first(x)
            second = self.second(first)
            return {"logits": self.head(second), "features": [first, second], "none": None, "scale": 2}

    return Nested()


@network("forward", IMAGES)
def counter_in_forward() -> nn.Module:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = stem(), Head(16)
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.history: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.history.append(len(self.history))
            return self.head(self.stem(x))

    return Counting()


@network("forward", IMAGES)
def checkpointed() -> nn.Module:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = stem(), conv(16, 16), Head(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(x + checkpoint(self.block, x, use_reentrant=False))

    return Checkpointed()


@network("forward", IMAGES)
def spectral_norm() -> nn.Module:
    conv, linear = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 5)
    return nn.Sequential(
        parametrizations.spectral_norm(conv),
        nn.LeakyReLU(0.1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        parametrizations.spectral_norm(linear),
    )


@network("forward", IMAGES)
def old_weight_norm() -> nn.Module:
    from torch.nn.utils import weight_norm

    return nn.Sequential(weight_norm(nn.Conv2d(3, 16, 3, 2)), nn.ReLU(), weight_norm(nn.Conv2d(16, 8, 3, 2)), Head(8))


@network("forward", IMAGES)
def old_spectral_norm() -> nn.Module:
    from torch.nn.utils import spectral_norm

    return nn.Sequential(spectral_norm(nn.Conv2d(3, 16, 3, 2)), nn.ReLU(), spectral_norm(nn.Conv2d(16, 8, 3)), Head(8))


@network("forward", IMAGES)
def weight_standardised() -> nn.Module:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            mean, var = (f(self.weight, dim=(1, 2, 3), keepdim=True) for f in (torch.mean, torch.var))
            weight = (self.weight - mean) / torch.sqrt(var + 1e-5)
            return F.conv2d(x, weight, self.bias, self.stride, self.padding)

    return nn.Sequential(Standardised(3, 16, 3, 2), nn.GroupNorm(4, 16), nn.ReLU(), Standardised(16, 8, 3), Head(8))


@network("forward", IMAGES)
def half_inside() -> nn.Module:
    class Half(nn.Module):
        """A part that asks for bfloat16 by autocast, whatever is outside."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = stem(), conv(16, 16), Head(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = self.block(x)
            return self.head(x + y.float())

    return Half()


@network("forward", IMAGES)
def early_exit() -> nn.Module:
    class Exits(nn.Module):
        """Stops where it is sure: a branch on data."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.first, self.block, self.second = stem(), Head(16), conv(16, 16), Head(16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            first = self.first(x)
            if first.softmax(1).amax() > 0.9:
                return first
            return self.second(self.block(x))

    return Exits()


@network("forward", IMAGES)
def random_in_forward() -> nn.Module:
    class Noisy(nn.Module):
        """Adds noise in training only, and augments by `x.training`."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.drop, self.head = stem(), nn.Dropout2d(0.3), Head(16)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x + 0.1 * torch.randn_like(x)
            return self.head(self.drop(self.stem(x)))

    return Noisy()


@network("forward", several(tokens(50, 12), IMAGES))
def token_and_image() -> nn.Module:
    class Both(nn.Module):
        """FiLM: the text scales and shifts the channels of the image."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.film = nn.Embedding(50, 12), nn.Linear(12, 32)
            self.stem, self.block, self.head = stem(), conv(16, 16), Head(16)

        def forward(self, text: Tensor, image: Tensor) -> Tensor:
            scale, shift = self.film(self.words(text).mean(1))[..., None, None].chunk(2, 1)
            return self.head(self.block(self.stem(image) * (1 + scale) + shift))

    return Both()
