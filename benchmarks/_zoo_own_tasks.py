"""Rows of the zoo benchmark that are written here: what networks are for, beside classes.

Restoration and super-resolution, and generation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _zoo_blocks import conv
from _zoo_networks import images, network, several, tokens, unit
from torch import Tensor, nn

_SMALL = images(3, 16, 16)

# -- super-resolution and restoration ----------------------------------------------------------------------------------


@network("restoration", images(1, 16, 16), other_size=images(1, 20, 24))
def espcn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2), nn.Tanh(), nn.Conv2d(16, 9, 3, padding=1), nn.PixelShuffle(3), nn.Sigmoid()
    )


@network("restoration", _SMALL)
def edsr() -> nn.Module:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(True), nn.Conv2d(16, 16, 3, padding=1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x).mul(0.1)

    class EDSR(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Conv2d(3, 3, 1)
            self.mean.requires_grad_(False)
            self.first, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Block(), Block())
            self.up = nn.Sequential(
                nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(16, 64, 3, padding=1), nn.PixelShuffle(2)
            )
            self.last = nn.Conv2d(16, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(self.mean(x))
            return self.last(self.up(x + self.body(x)))

    return EDSR()


@network("restoration", _SMALL)
def rrdb() -> nn.Module:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8 if i < 3 else 16, 3, padding=1) for i in range(4))

        def forward(self, x: Tensor) -> Tensor:
            features = [x]
            for layer in self.convs[:-1]:
                features.append(F.leaky_relu(layer(torch.cat(features, 1)), 0.2))
            return x + 0.2 * self.convs[-1](torch.cat(features, 1))

    class RRDB(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Sequential(Dense(), Dense())
            self.up, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x + self.body(x)
            return self.last(F.leaky_relu(self.up(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2))

    return RRDB()


@network("restoration", _SMALL)
def channel_attention_restorer() -> nn.Module:
    class Attention(nn.Module):
        """Attention among channels, with a learned temperature and normalised queries, as in Restormer."""

        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(2, 1, 1))
            self.qkv, self.local = nn.Conv2d(16, 48, 1, bias=False), nn.Conv2d(48, 48, 3, padding=1, groups=48)
            self.out, self.norm = nn.Conv2d(16, 16, 1), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            q, k, v = (t.unflatten(1, (2, 8)).flatten(3) for t in self.local(self.qkv(y)).chunk(3, 1))
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
            return x + self.out((attention @ v).flatten(1, 2).unflatten(2, x.shape[-2:]))

    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        Attention(),
        Attention(),
        nn.PixelUnshuffle(2),
        nn.Conv2d(64, 12, 1),
        nn.PixelShuffle(2),
    )


@network("restoration", _SMALL)
def simple_gate_restorer() -> nn.Module:
    class Block(nn.Module):
        """NAFNet: half of the channels gates the other, and each channel is scaled."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.wide = nn.GroupNorm(1, 16), nn.Conv2d(16, 32, 1)
            self.local, self.scale = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(16, 16, 1)
            self.out, self.beta = nn.Conv2d(16, 16, 1), nn.Parameter(torch.zeros(1, 16, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.local(self.wide(self.norm(x))).chunk(2, 1)
            y = a * b
            return x + self.out(y * self.scale(y.mean((2, 3), keepdim=True))) * self.beta

    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Block(), Block(), nn.Conv2d(16, 3, 3, padding=1))


# -- generation --------------------------------------------------------------------------------------------------------


@network("generation", images(8))
def dcgan_generator() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 32 * 16),
        nn.Unflatten(1, (32, 4, 4)),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
        nn.Tanh(),
    )


@network("generation", images(8))
def style_generator() -> nn.Module:
    class Modulated(nn.Module):
        """A kernel per example, scaled by a style and normalised again (StyleGAN2)."""

        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight, self.style = nn.Parameter(torch.randn(outputs, inputs, 3, 3)), nn.Linear(8, inputs)

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            batch, channels, height, width = x.shape
            weight = self.weight[None] * (1 + self.style(w))[:, None, :, None, None]
            weight = weight * torch.rsqrt(weight.square().sum((2, 3, 4), keepdim=True) + 1e-8)
            x = F.conv2d(x.reshape(1, -1, height, width), weight.flatten(0, 1), padding=1, groups=batch)
            return x.view(batch, -1, height, width)

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mapping = nn.Sequential(nn.Linear(8, 8), nn.LeakyReLU(0.2), nn.Linear(8, 8))
            self.constant = nn.Parameter(torch.randn(1, 16, 4, 4))
            self.first, self.second, self.image = Modulated(16, 16), Modulated(16, 8), nn.Conv2d(8, 3, 1)

        def forward(self, z: Tensor) -> Tensor:
            w = self.mapping(z)
            x = F.leaky_relu(self.first(self.constant.expand(z.shape[0], -1, -1, -1), w), 0.2)
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            return self.image(F.leaky_relu(self.second(x, w), 0.2))

    return Generator()


@network("generation", _SMALL)
def vae() -> nn.Module:
    class VAE(nn.Module):
        """The mean alone is decoded in eval mode."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Sequential(conv(3, 16, stride=2), conv(16, 16, stride=2)), nn.Linear(256, 16)
            self.decoder = nn.Sequential(
                nn.Linear(8, 256), nn.Unflatten(1, (16, 4, 4)), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU()
            )
            self.last = nn.ConvTranspose2d(8, 3, 4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            mean, log_variance = self.head(self.encoder(x).flatten(1)).chunk(2, 1)
            z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean
            return self.last(self.decoder(z)), mean, log_variance

    return VAE()


@network("generation", _SMALL)
def vq_autoencoder() -> nn.Module:
    class VQ(nn.Module):
        """The nearest of a table of codes, by distance and argmin."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.codes = nn.Sequential(conv(3, 16, stride=2), nn.Conv2d(16, 8, 1)), nn.Embedding(20, 8)
            self.decoder = nn.Sequential(conv(8, 16), nn.ConvTranspose2d(16, 3, 4, 2, 1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            z = self.encoder(x).permute(0, 2, 3, 1)
            index = torch.cdist(z.flatten(1, 2), self.codes.weight.expand(x.shape[0], -1, -1)).argmin(-1)
            quantised = self.codes(index).unflatten(1, z.shape[1:3])
            return self.decoder((z + (quantised - z).detach()).permute(0, 3, 1, 2)), index

    return VQ()


class _Sinusoidal(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-torch.arange(8, device=t.device) / 2.0)
        angles = t[:, None].float() * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)


@network("generation", several(_SMALL, tokens(1000)))
def diffusion_unet() -> nn.Module:
    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.GroupNorm(4, inputs), nn.GroupNorm(4, outputs)])
            self.convs = nn.ModuleList(
                [nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)]
            )
            self.time = nn.Linear(16, 2 * outputs)
            self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            scale, shift = self.time(F.silu(time))[..., None, None].chunk(2, 1)
            y = self.convs[0](F.silu(self.norms[0](x)))
            y = self.norms[1](y) * (scale + 1) + shift
            return self.skip(x) + self.convs[1](F.silu(y))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(_Sinusoidal(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
            self.first, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
            self.blocks = nn.ModuleList([Block(16, 16), Block(16, 32), Block(32, 32), Block(48, 16)])
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
            self.up, self.last = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            time = self.time(t)
            first = self.blocks[0](self.first(x), time)
            x = self.blocks[1](self.down(first), time)
            flat = x.flatten(2).transpose(1, 2)
            flat = flat + self.attention(flat, flat, flat, need_weights=False)[0]
            x = self.blocks[2](flat.transpose(1, 2).reshape(x.shape), time)
            x = self.up(F.interpolate(x, scale_factor=2.0))
            return self.last(self.blocks[3](torch.cat([x, first], 1), time))

    return UNet()


@network("generation", several(images(4, 8, 8), tokens(1000), tokens(10)))
def diffusion_transformer() -> nn.Module:
    class Block(nn.Module):
        """adaLN-Zero: six vectors from the condition (DiT)."""

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(32, elementwise_affine=False) for _ in range(2))
            self.qkv, self.out, self.condition = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(16, 6 * 32)
            self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU("tanh"), nn.Linear(64, 32))

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            shift1, scale1, gate1, shift2, scale2, gate2 = self.condition(F.silu(c))[:, None].chunk(6, -1)
            y = self.norms[0](x) * (1 + scale1) + shift1
            q, k, v = self.qkv(y).reshape(*y.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + gate1 * self.out(y)
            return x + gate2 * self.mlp(self.norms[1](x) * (1 + scale2) + shift2)

    class DiT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.position = nn.Conv2d(4, 32, 2, 2), nn.Parameter(torch.randn(1, 16, 32))
            self.time, self.label = nn.Sequential(_Sinusoidal(), nn.Linear(16, 16)), nn.Embedding(10, 16)
            self.blocks, self.last = nn.ModuleList([Block(), Block()]), nn.Linear(32, 16)

        def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2) + self.position
            for block in self.blocks:
                x = block(x, self.time(t) + self.label(y))
            x = self.last(x).reshape(-1, 4, 4, 2, 2, 4)
            return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 4, 8, 8)

    return DiT()


@network("generation", unit(30, 3))
def radiance_field() -> nn.Module:
    class NeRF(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bands", 2.0 ** torch.arange(4))
            self.first, self.second, self.last = nn.Linear(27, 32), nn.Linear(32 + 27, 32), nn.Linear(32, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            angles = (x[..., None, :] * self.bands[:, None]).flatten(-2)
            x = torch.cat([x, angles.sin(), angles.cos()], -1)
            colour, density = self.last(F.relu(self.second(torch.cat([F.relu(self.first(x)), x], -1)))).split(
                [3, 1], -1
            )
            return torch.sigmoid(colour), F.softplus(density)

    return NeRF()
