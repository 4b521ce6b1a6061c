"""Blocks over tokens (B, N, C), and window attention over images: linear layers, gates, attention, token mixing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.blocks import Block, State, activation, block


class FlatBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, N, C) with the tokens folded into the batch (LeViT)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)).reshape(input.shape)


class TransposedBatchNorm(nn.BatchNorm1d):
    """Batch norm of (B, N, C) with the channels moved to dimension 1."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


def token_norm(name: str, channels: int) -> nn.Module:
    """A normalisation of (B, N, C) by name."""
    makers = {
        "layer": lambda: nn.LayerNorm(channels),
        "layer_plain": lambda: nn.LayerNorm(channels, elementwise_affine=False),
        "rms": lambda: nn.RMSNorm(channels, eps=1e-6),
        "batch": lambda: TransposedBatchNorm(channels),
        "batch_flat": lambda: FlatBatchNorm(channels),
    }
    return makers[name]()


@block(
    "linear",
    "tokens",
    norm=("layer", "layer_plain", "rms", "batch", "batch_flat"),
    widen=(0, 4),
    bias=(True, False),
    cast=(False, True),
)
class Linear(Block):
    """A normalisation and a linear layer, to whose precision its input may be cast."""

    def __init__(self, state: State, *, norm: str, widen: int, bias: bool, cast: bool) -> None:
        out = min(state.channels + widen, 24)
        super().__init__(state.but(out))
        self.norm = token_norm(norm, state.channels)
        self.linear, self.cast = nn.Linear(state.channels, out, bias=bias), cast

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.linear(x.to(self.linear.weight.dtype) if self.cast else x)


@block(
    "mlp",
    "tokens",
    function=("relu", "gelu", "silu", "sigmoid"),
    norm=("layer", "rms"),
    scale=("none", "channel", "one"),
)
class Mlp(Block):
    """x + scale * second(f(first(norm(x))))."""

    def __init__(self, state: State, *, function: str, norm: str, scale: str) -> None:
        super().__init__(state)
        c = state.channels
        self.norm = token_norm(norm, c)
        self.first, self.second = nn.Linear(c, c + 6), nn.Linear(c + 6, c)
        self.act = activation(function, c + 6)
        self.scale = None if scale == "none" else nn.Parameter(torch.ones(c if scale == "channel" else ()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(self.norm(x))))
        return x + (y if self.scale is None else y * self.scale)


@block("gated_mlp", "tokens", how=("separate", "glu", "chunk", "split"), norm=(False, True))
class GatedMlp(Block):
    """SwiGLU and its kin: hidden = value * silu(gate), from two layers or the halves of one."""

    def __init__(self, state: State, *, how: str, norm: bool) -> None:
        super().__init__(state)
        c, hidden, self.how = state.channels, state.channels + 2, how
        self.before = nn.LayerNorm(c)
        self.gate = nn.Linear(c, hidden) if how == "separate" else None
        self.value = nn.Linear(c, hidden if how == "separate" else 2 * hidden)
        self.norm = nn.LayerNorm(hidden) if norm else nn.Identity()
        self.project = nn.Linear(hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        value = self.value(y)
        if self.gate is not None:
            hidden = F.silu(self.gate(y)) * value
        elif self.how == "glu":
            hidden = F.glu(value, dim=-1)
        else:
            half = value.shape[-1] // 2
            gate, value = value.chunk(2, dim=-1) if self.how == "chunk" else value.split([half, half], dim=-1)
            hidden = F.silu(gate) * value
        return x + self.project(self.norm(hidden))


@block("class_token", "tokens", position=(False, True))
class ClassToken(Block):
    """One more learned token in front."""

    def __init__(self, state: State, *, position: bool) -> None:
        super().__init__(replace(state, prefix=state.prefix + 1))
        self.token = nn.Parameter(torch.zeros(1, 1, state.channels))
        self.embed = nn.Parameter(torch.zeros(1, self.out.tokens, state.channels)) if position else None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1)
        return x if self.embed is None else x + self.embed


@block("position", "tokens", shape=("1nc", "nc", "11c"))
class Position(Block):
    """A learned embedding of the positions."""

    def __init__(self, state: State, *, shape: str) -> None:
        super().__init__(state)
        n, c = state.tokens, state.channels
        self.embed = nn.Parameter(torch.zeros({"1nc": (1, n, c), "nc": (n, c), "11c": (1, 1, c)}[shape]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embed


@block("token_mixing", "tokens", how=("mlp", "gate", "affine"))
class TokenMixing(Block):
    """Linear layers over the tokens: a residual MLP (Mixer), one linear with an affine norm (ResMLP), or the gate of
    half of the channels by the other (gMLP)."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c, n, self.how = state.channels, state.tokens, how
        self.norm = nn.LayerNorm(c)
        if how == "mlp":
            self.mix: nn.Module = nn.Sequential(nn.Linear(n, 7), nn.GELU(), nn.Linear(7, n))
        elif how == "affine":
            self.mix = nn.Linear(n, n)
            self.scale, self.bias = nn.Parameter(torch.ones(1, 1, c)), nn.Parameter(torch.zeros(1, 1, c))
        else:
            self.mix = nn.Linear(n, n)
            self.first, self.second = nn.Linear(c, c + 4), nn.Linear(c // 2 + 2, c)
            self.gate_norm = nn.LayerNorm(c // 2 + 2)

    def over_tokens(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "affine":
            return x + self.over_tokens(torch.addcmul(self.bias, self.scale, x))
        if self.how == "mlp":
            return x + self.over_tokens(self.norm(x))
        value, gate = F.gelu(self.first(self.norm(x))).chunk(2, dim=-1)
        return x + self.second(value * self.over_tokens(self.gate_norm(gate)))


def core(q: Tensor, k: Tensor, v: Tensor, how: str, bias: Tensor | None = None) -> Tensor:
    """Attention of q (B, H, N, D), k (B, H, M, D), v (B, H, M, E) with an optional bias (1 or B, H, N, M)."""
    if how == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    q = q * q.shape[-1] ** -0.5
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) if how == "einsum" else q @ k.transpose(-2, -1)
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1) @ v


class SelfAttention(nn.Module):
    """(B, N, C) -> (B, N, C); how q, k, v are laid out in one or three linear layers is `qkv`."""

    def __init__(self, channels: int, heads: int, qkv: str, how: str) -> None:
        super().__init__()
        self.heads, self.qkv, self.how = heads, qkv, how
        self.head_width = channels // heads
        self.value_width = self.head_width + 1 if qkv == "per_head" else self.head_width
        if qkv == "separate":
            self.q, self.k, self.v = (nn.Linear(channels, channels, bias=bias) for bias in (True, False, True))
        else:
            self.project_in = nn.Linear(channels, heads * (2 * self.head_width + self.value_width))
        self.mix_heads = nn.Linear(heads, heads) if how == "talking" else None
        self.project_out = nn.Linear(heads * self.value_width, channels)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, _ = x.shape
        heads, d = self.heads, self.head_width
        if self.qkv == "separate":
            parts = [layer(x) for layer in (self.q, self.k, self.v)]
        elif self.qkv == "chunk":
            parts = list(self.project_in(x).chunk(3, dim=-1))
        elif self.qkv == "per_head":
            together = self.project_in(x).reshape(b, n, heads, -1).transpose(1, 2)
            q, k, v = together.split([d, d, self.value_width], dim=3)
            return q, k, v
        else:
            q, k, v = self.project_in(x).reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
            return q, k, v
        q, k, v = (part.reshape(b, n, heads, d).transpose(1, 2) for part in parts)
        return q, k, v

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.split(x)
        if self.mix_heads is not None:
            logits = (q * 0.3) @ k.transpose(-2, -1)
            logits = self.mix_heads(logits.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            y = logits.softmax(dim=-1) @ v
        else:
            y = core(q, k, v, self.how, bias)
        return self.project_out(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


@block(
    "attention",
    "tokens",
    heads=(2, 1, 4),
    qkv=("fused", "separate", "chunk", "per_head"),
    how=("sdpa", "softmax", "einsum", "talking"),
)
class Attention(Block):
    """x + attention(norm(x))."""

    def __init__(self, state: State, *, heads: int, qkv: str, how: str) -> None:
        super().__init__(state)
        self.norm = nn.LayerNorm(state.channels)
        self.attention = SelfAttention(state.channels, heads, qkv, how)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def rotate(x: Tensor, style: str) -> Tensor:
    """Rotary embedding of (B, H, N, D), D even, computed from positions 0..N-1 (RoFormer, equation 34)."""
    n, d = x.shape[-2:]
    inverse = 100.0 ** (-torch.arange(0, d, 2, dtype=x.dtype, device=x.device) / d)
    angle = torch.outer(torch.arange(n, dtype=x.dtype, device=x.device), inverse)
    if style == "half":
        angle = torch.cat([angle, angle], dim=-1)
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        angle = angle.repeat_interleave(2, dim=-1)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
    return x * angle.cos() + turned * angle.sin()


@block(
    "grouped_attention",
    "tokens",
    groups=(1, 2),
    share=("repeat", "enable_gqa", "expand"),
    rotary=("none", "half", "interleaved"),
)
class GroupedAttention(Block):
    """Four heads of queries, fewer of keys and values, norms of each head's query and key, rotary positions."""

    def __init__(self, state: State, *, groups: int, share: str, rotary: str) -> None:
        super().__init__(state)
        c, d = state.channels, 4
        self.groups, self.share, self.rotary, self.head_width = groups, share, rotary, d
        self.norm = nn.RMSNorm(c, eps=1e-6)
        self.q, self.k, self.v = nn.Linear(c, 4 * d), nn.Linear(c, groups * d), nn.Linear(c, groups * d)
        self.norm_q, self.norm_k = nn.RMSNorm(d, eps=1e-6), nn.RMSNorm(d, eps=1e-6)
        self.project = nn.Linear(4 * d, c, bias=False)

    def spread(self, x: Tensor) -> Tensor:
        """(B, groups, N, D) -> (B, 4, N, D)."""
        b, _, n, d = x.shape
        if self.share == "repeat":
            return x.repeat_interleave(4 // self.groups, dim=1)
        return x.unsqueeze(2).expand(-1, -1, 4 // self.groups, -1, -1).reshape(b, 4, n, d)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        y = self.norm(x)
        q = self.norm_q(self.q(y).reshape(b, n, 4, self.head_width)).transpose(1, 2)
        k = self.norm_k(self.k(y).reshape(b, n, self.groups, self.head_width)).transpose(1, 2)
        v = self.v(y).reshape(b, n, self.groups, self.head_width).transpose(1, 2)
        if self.rotary != "none":
            q, k = rotate(q, self.rotary), rotate(k, self.rotary)
        if self.share == "enable_gqa":
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, self.spread(k), self.spread(v))
        return x + self.project(out.transpose(1, 2).flatten(2))


def relative_index(height: int, width: int, prefix: int) -> Tensor:
    """(N, N) rows of a table: one row per offset between two positions, row 0 wherever a class token takes part."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([rows.flatten(), columns.flatten()])
    offset = at[:, :, None] - at[:, None, :]
    grid = (offset[0] + height - 1) * (2 * width - 1) + offset[1] + width
    return F.pad(grid, (prefix, 0, prefix, 0))


@block("relative_attention", "tokens", how=("sdpa", "softmax"), bias=("table", "generated"))
class RelativeAttention(Block):
    """Attention with a bias per head and offset, from a learned table or from a small MLP of the offset."""

    index: Tensor
    offsets: Tensor

    def __init__(self, state: State, *, how: str, bias: str) -> None:
        super().__init__(state)
        self.heads = 2
        index = relative_index(state.height, state.width, state.prefix)
        self.register_buffer("index", index)
        rows = int(index.max()) + 1
        self.table: nn.Parameter | None = None
        self.norm = nn.LayerNorm(state.channels)
        self.attention = SelfAttention(state.channels, self.heads, "fused", how)
        if bias == "table":
            self.table = nn.Parameter(torch.zeros(rows, self.heads))
        else:
            self.register_buffer("offsets", torch.stack([torch.linspace(-1, 1, rows), torch.linspace(0, 1, rows)], 1))
            self.generate = nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, self.heads, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        n = self.out.tokens
        table = self.generate(self.offsets) if self.table is None else self.table
        bias = table[self.index.reshape(-1)].reshape(n, n, self.heads).permute(2, 0, 1).unsqueeze(0)
        return x + self.attention(self.norm(x), bias)


@block("channel_attention", "tokens", heads=(2, 1, 4))
class ChannelAttention(Block):
    """Attention between channels: softmax over D of l2-normalised queries and keys (XCiT, equation 3)."""

    def __init__(self, state: State, *, heads: int) -> None:
        super().__init__(state)
        c, self.heads = state.channels, heads
        self.norm = nn.LayerNorm(c)
        self.qkv, self.project = nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return x + self.project((logits.softmax(dim=-1) @ v).permute(0, 3, 1, 2).reshape(b, n, c))


@block("window_attention", "image", shift=(0, 1), qkv=("fused", "separate"))
class WindowAttention(Block):
    """Attention inside 2 x 2 windows folded into the batch, of an image that is rolled first if asked (Swin)."""

    def __init__(self, state: State, *, shift: int, qkv: str) -> None:
        super().__init__(state)
        self.shift = shift
        self.norm = nn.LayerNorm(state.channels)
        self.attention = SelfAttention(state.channels, 2, qkv, "softmax")

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = F.pad(self.norm(x.permute(0, 2, 3, 1)), (0, 0, 0, w % 2, 0, h % 2))
        if self.shift:
            y = torch.roll(y, (-self.shift, -self.shift), dims=(1, 2))
        rows, columns = (h + 1) // 2, (w + 1) // 2
        windows = y.reshape(b, rows, 2, columns, 2, c).transpose(2, 3).reshape(-1, 4, c)
        y = self.attention(windows).reshape(b, rows, columns, 2, 2, c)
        y = y.transpose(2, 3).reshape(b, 2 * rows, 2 * columns, c)
        if self.shift:
            y = torch.roll(y, (self.shift, self.shift), dims=(1, 2))
        return x + y[:, :h, :w].permute(0, 3, 1, 2)
