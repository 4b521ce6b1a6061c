"""Blocks over images whose subject is space and layers: convolutions, residual adds, resampling, shared weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.blocks import (
    MAX_WIDTH,
    Block,
    State,
    activation,
    block,
    conv_norm_act,
    image_norm,
    pointwise,
    standardise,
)


@block(
    "conv",
    "image",
    kernel=(3, 1, 5, 4),
    stride=(1, 2),
    groups=(1, 2, 4),
    dilation=(1, 2),
    padding=("half", "same", "odd"),
    widen=(0, 4, 8, -4),
    bias=(True, False),
)
class Conv(Block):
    """One convolution; "odd" padding differs between height and width and changes the image size."""

    def __init__(
        self,
        state: State,
        *,
        kernel: int,
        stride: int,
        groups: int,
        dilation: int,
        padding: str,
        widen: int,
        bias: bool,
    ) -> None:
        super().__init__(state)
        out = min(max(state.channels + widen, 4), MAX_WIDTH)
        half = dilation * (kernel - 1) // 2
        pads = (half + 1, max(half - 1, 0)) if padding == "odd" else (half, half)
        by_name = padding == "same" and stride == 1
        height, width = (
            side if by_name else (side + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for side, pad in zip((state.height, state.width), pads, strict=True)
        )
        if not (min(height, width) >= 2 and max(height, width) <= 14):
            kernel, stride, dilation, pads, by_name = 1, 1, 1, (0, 0), False
            height, width = state.height, state.width
        self.conv = nn.Conv2d(
            state.channels, out, kernel, stride, "same" if by_name else pads, dilation, groups=groups, bias=bias
        )
        self.out = state.but(out, height, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@block("depthwise", "image", multiplier=(1, 2), kernel=(3, 5), stride=(1, 2), project=(True, False))
class Depthwise(Block):
    """Depthwise convolution with 1 or 2 outputs a channel, then (if asked or too wide) a pointwise one."""

    def __init__(self, state: State, *, multiplier: int, kernel: int, stride: int, project: bool) -> None:
        super().__init__(state)
        c, stride = state.channels, stride if state.smallest_side >= 4 else 1
        wide = c * multiplier
        self.conv = nn.Conv2d(c, wide, kernel, stride, kernel // 2, groups=c, bias=False)
        self.norm = nn.BatchNorm2d(wide)
        project = project or wide > MAX_WIDTH
        self.project = pointwise(wide, c) if project else nn.Identity()
        self.out = state.but(c if project else wide, -(-state.height // stride), -(-state.width // stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu6(self.norm(self.conv(x))))


@block("norm", "image", norm=("batch", "group", "one_group", "instance", "layer", "response", "evo", "evo_one"))
class Norm(Block):
    """Pointwise convolution, a normalisation, ReLU, pointwise convolution."""

    def __init__(self, state: State, *, norm: str) -> None:
        super().__init__(state)
        self.first = pointwise(state.channels, state.channels, bias=False)
        self.norm = image_norm(norm, state.channels)
        self.second = pointwise(state.channels, state.channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.norm(self.first(x))))


@block(
    "activation",
    "image",
    function=("relu", "relu6", "gelu", "silu", "hardswish", "sigmoid", "exp", "prelu", "floor"),
)
class Activation(Block):
    """Grouped convolution, an activation, a pointwise convolution."""

    def __init__(self, state: State, *, function: str) -> None:
        super().__init__(state)
        c = state.channels
        self.first = nn.Conv2d(c, c, 3, padding=1, groups=2)
        self.act = activation(function, c)
        self.second = pointwise(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x)))


@block("pool", "image", how=("max", "average", "adaptive", "ceil"))
class Pool(Block):
    """Pooling by two where the image is large enough; "adaptive" goes to 3 x 2."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        if how == "adaptive":
            self.pool: nn.Module = nn.AdaptiveAvgPool2d((3, 2))
            self.out = state.but(height=3, width=2)
        elif state.smallest_side < 4:
            self.pool = nn.MaxPool2d(3, 1, 1) if how == "max" else nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        elif how == "max":
            self.pool = nn.MaxPool2d(3, 2, 1)
            self.out = state.but(height=(state.height - 1) // 2 + 1, width=(state.width - 1) // 2 + 1)
        else:
            self.pool = nn.AvgPool2d(2, 2, ceil_mode=how == "ceil", count_include_pad=False)
            up = how == "ceil"
            self.out = state.but(height=(state.height + up) // 2, width=(state.width + up) // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@block("residual", "image", shortcut=("identity", "project", "zero_pad"), groups=(1, 2), in_place=(False, True))
class Residual(Block):
    """conv-norm-ReLU, conv-norm, plus the input: as it is, through a strided convolution, or sliced and zero-padded."""

    def __init__(self, state: State, *, shortcut: str, groups: int, in_place: bool) -> None:
        super().__init__(state)
        self.shortcut, self.in_place = shortcut, in_place
        c, out, stride = state.channels, state.channels, 1
        self.narrow: nn.Module = nn.Identity()
        if shortcut == "zero_pad":
            if 2 * c > MAX_WIDTH:
                self.narrow = pointwise(c, 8)
                c = 8
            out = 2 * c
        if shortcut != "identity" and state.smallest_side >= 4:
            stride = 2
        self.stride, self.pad = stride, (out - c) // 2
        self.body = nn.Sequential(
            conv_norm_act(c, out, 3, stride, groups), nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        )
        if shortcut == "project":
            self.project = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.out = state.but(out, -(-state.height // stride), -(-state.width // stride))

    def forward(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        y = self.body(x)
        if self.shortcut == "project":
            x = self.project(x)
        elif self.shortcut == "zero_pad":
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        if self.in_place:
            y += x
            return F.relu_(y)
        return F.relu(y + x)


@block("standardised", "image", by=("var", "batch_norm"), groups=(1, 4))
class Standardised(Block):
    """Convolution with a weight standardised in the forward, and a gain per output."""

    def __init__(self, state: State, *, by: str, groups: int) -> None:
        super().__init__(state)
        c = state.channels
        self.by, self.groups = by, groups
        self.weight = nn.Parameter(torch.ones(c, c // groups, 3, 3))
        self.gain = nn.Parameter(torch.ones(c, 1, 1, 1))
        self.bias = nn.Parameter(torch.zeros(c))
        self.project = pointwise(c, c)

    def forward(self, x: Tensor) -> Tensor:
        weight = standardise(self.weight, self.by) * self.gain
        return self.project(F.relu(F.conv2d(x, weight, self.bias, padding=1, groups=self.groups)))


@block("computed_weights", "image", how=("low_rank", "row_norm", "spectral"))
class ComputedWeights(Block):
    """Convolution with a weight that has no exact form with fewer channels, which capture computes once: a low-rank
    update, a division by the norms of rows, one by a product with fixed vectors."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c, self.how = state.channels, how
        self.weight = nn.Parameter(torch.ones(c, c, 3, 3))
        if how == "low_rank":
            self.weight_a, self.weight_b = nn.Parameter(torch.ones(2, c * 9)), nn.Parameter(torch.ones(c, 2))
        self.register_buffer("left", torch.linspace(0.1, 0.3, c))
        self.register_buffer("right", torch.linspace(-0.2, 0.3, c * 9))
        self.project = pointwise(c, c)

    def forward(self, x: Tensor) -> Tensor:
        weight, flat = self.weight, self.weight.flatten(1)
        if self.how == "low_rank":
            weight = weight + (self.weight_b @ self.weight_a).view_as(weight)
        elif self.how == "row_norm":
            weight = weight / flat.norm(dim=1)[:, None, None, None]
        else:
            weight = weight / (1 + (self.left @ (flat @ self.right)).square())
        return self.project(F.relu(F.conv2d(x, weight, padding=1)))


@block("summed_weights", "image", groups=(1, 2), identity=(False, True))
class SummedWeights(Block):
    """One convolution whose kernel is the sum of a 3 x 3, a padded 1 x 1 and, if asked, a scaled identity."""

    def __init__(self, state: State, *, groups: int, identity: bool) -> None:
        super().__init__(state)
        c = state.channels
        self.groups, self.identity = groups, identity
        self.weight_3 = nn.Parameter(torch.zeros(c, c // groups, 3, 3))
        self.weight_1 = nn.Parameter(torch.zeros(c, c // groups, 1, 1))
        self.bias_3 = nn.Parameter(torch.zeros(c))
        self.bias_1 = nn.Parameter(torch.zeros(c))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_3 + F.pad(self.weight_1, (1, 1, 1, 1))
        y = F.conv2d(x, weight, self.bias_3 + self.bias_1, padding=1, groups=self.groups)
        return F.relu(y + self.scale * x if self.identity else y)


@block("shared", "image", how=("twice", "weight", "alias", "norm", "transposed"))
class Shared(Block):
    """Parameters in two places: a layer called twice, one weight in two layers, one layer under two names, a batch
    norm after two convolutions, a weight and its transpose."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c = state.channels
        self.how = how
        if how == "transposed":
            self.weight = nn.Parameter(torch.zeros(c + 4, c))
            self.bias = nn.Parameter(torch.zeros(c + 4))
            return
        self.first = nn.Conv2d(c, c, 3, padding=1)
        self.second = self.first if how in ("twice", "alias") else nn.Conv2d(c, c, 3, padding=1)
        if how == "weight":
            self.second.weight = self.first.weight
        self.norm = nn.BatchNorm2d(c) if how == "norm" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "transposed":
            x = x.permute(0, 2, 3, 1)
            x = F.relu(F.linear(x, self.weight, self.bias)) @ self.weight
            return x.permute(0, 3, 1, 2)
        if self.how == "twice":
            return self.first(F.relu(self.first(x)))
        y = F.relu(self.norm(self.first(x)))
        return self.norm(self.second(y))


@block("pixel", "image", how=("unshuffle", "shuffle"))
class Pixel(Block):
    """Pixel unshuffle and a pointwise convolution back; or a strided convolution to 4 C and pixel shuffle."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c, self.how = state.channels, how
        h, w = state.height, state.width
        if how == "unshuffle":
            self.project = pointwise(4 * c, c)
            self.out = state.but(height=(h + 1) // 2, width=(w + 1) // 2) if state.smallest_side > 2 else state
        else:
            self.project = nn.Conv2d(c, 4 * c, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        if self.how == "shuffle":
            return F.pixel_shuffle(self.project(x), 2)[:, :, :h, :w]
        x = F.pad(x, (0, 2 * self.out.width - w, 0, 2 * self.out.height - h))
        return self.project(F.pixel_unshuffle(x, 2))


@block("upsample", "image", mode=("nearest", "bilinear", "bicubic"))
class Upsample(Block):
    """A coarse branch (average pool, convolution) scaled up again and added."""

    def __init__(self, state: State, *, mode: str) -> None:
        super().__init__(state)
        self.mode = mode
        self.coarse = conv_norm_act(state.channels, state.channels)
        self.fine = pointwise(state.channels, state.channels)

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.coarse(F.avg_pool2d(x, 2))
        corners = None if self.mode == "nearest" else False
        return self.fine(x) + F.interpolate(coarse, size=x.shape[-2:], mode=self.mode, align_corners=corners)


@block("transposed_conv", "image", groups=(1, 2), multiplier=(1, 2))
class TransposedConv(Block):
    """Strided convolution down, transposed convolution up, cut to size."""

    def __init__(self, state: State, *, groups: int, multiplier: int) -> None:
        super().__init__(state)
        c, middle = state.channels, state.channels * multiplier
        self.down = conv_norm_act(c, middle, 3, 2)
        self.up = nn.ConvTranspose2d(middle, c, 3, 2, padding=1, output_padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))[:, :, : self.out.height, : self.out.width]


@block("unfold", "image", how=("linear", "involution", "fold"))
class Unfold(Block):
    """3 x 3 patches (im2col), then: one linear map of C * 9; weights per position shared by groups of channels; or
    weights per position and a fold (col2im)."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c, self.how, self.groups = state.channels, how, 2
        if how == "linear":
            self.project: nn.Module = nn.Linear(9 * c, c)
        else:
            self.attend = pointwise(c, 9 * self.groups)
            self.project = pointwise(c, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        patches = F.unfold(x, 3, padding=1)
        if self.how == "linear":
            return self.project(patches.transpose(1, 2)).transpose(1, 2).reshape(b, c, h, w)
        weights = self.attend(x).reshape(b, self.groups, 1, 9, h * w).softmax(dim=3)
        weighted = patches.reshape(b, self.groups, c // self.groups, 9, h * w) * weights
        if self.how == "fold":
            return self.project(F.fold(weighted.reshape(b, c * 9, h * w), (h, w), 3, padding=1))
        return self.project(weighted.sum(dim=3).reshape(b, c, h, w))


@block("patch_merging", "image", norm_first=(True, False))
class PatchMerging(Block):
    """Four strided slices side by side, layer norm and linear on channels-last (Swin)."""

    def __init__(self, state: State, *, norm_first: bool) -> None:
        super().__init__(state)
        c, self.norm_first = state.channels, norm_first
        out = 2 * c if 2 * c <= MAX_WIDTH else 12
        self.norm = nn.LayerNorm(4 * c if norm_first else out)
        self.reduce = nn.Linear(4 * c, out, bias=False)
        self.small = state.smallest_side < 4
        if self.small:
            self.out = state.but(out)
        else:
            self.out = state.but(out, (state.height + 1) // 2, (state.width + 1) // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.small:
            parts = [x, x.flip(1), x.flip(2), x.flip(1, 2)]
        else:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            parts = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        merged = torch.cat(parts, dim=-1)
        merged = self.reduce(self.norm(merged)) if self.norm_first else self.norm(self.reduce(merged))
        return merged.permute(0, 3, 1, 2)
