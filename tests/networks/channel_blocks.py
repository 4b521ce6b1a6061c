"""Blocks over images whose subject is the channel axis: concatenation, splits, shuffles, gates, broadcasting."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.networks.blocks import MAX_WIDTH, Block, State, block, conv_norm_act, pointwise


@block("dense", "image", growth=("4 4", "3 5", "1 2 5"))
class Dense(Block):
    """Each convolution sees everything before it and adds a few channels (DenseNet)."""

    def __init__(self, state: State, *, growth: str) -> None:
        super().__init__(state)
        width = state.channels
        self.layers = nn.ModuleList()
        for more in map(int, growth.split()):
            self.layers.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, more, 3, padding=1)))
            width += more
        self.narrow = pointwise(width, 12) if width > MAX_WIDTH else nn.Identity()
        self.out = state.but(12 if width > MAX_WIDTH else width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return self.narrow(x)


@block("split", "image", how=("split", "chunk", "slice", "narrow", "tensor_split"), join=(True, False))
class Split(Block):
    """Uneven parts of the channels; the first goes through a convolution, all are concatenated, mixed if asked."""

    def __init__(self, state: State, *, how: str, join: bool) -> None:
        super().__init__(state)
        c, self.how = state.channels, how
        self.part = -(-c // 3) if how == "chunk" else -(-(c + 1) // 3) if how == "tensor_split" else c // 4
        self.expand = pointwise(c, c + 1) if how == "tensor_split" else nn.Identity()
        self.conv = conv_norm_act(self.part, self.part)
        width = c + (how == "tensor_split")
        self.join = pointwise(width, c) if join or width != c else nn.Identity()

    def parts(self, x: Tensor) -> list[Tensor]:
        rest = x.shape[1] - self.part
        if self.how == "split":
            return list(torch.split(x, [self.part, rest], dim=1))
        if self.how == "chunk":  # unequal: 8 channels are 3, 3 and 2
            return list(torch.chunk(x, 3, dim=1))
        if self.how == "tensor_split":
            return list(torch.tensor_split(x, 3, dim=1))
        if self.how == "narrow":
            return [x.narrow(1, 0, self.part), x.narrow(1, self.part, rest)]
        return [x[:, : self.part], x[:, self.part :]]

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.parts(self.expand(x))
        return self.join(torch.cat([*others, self.conv(first)], dim=1))


@block("cross_stage", "image", share=(4, 2))
class CrossStage(Block):
    """Two convolutions of uneven width side by side, one of them with a residual block after it (CSP)."""

    def __init__(self, state: State, *, share: int) -> None:
        super().__init__(state)
        c = state.channels
        part = c // share
        self.expand = conv_norm_act(c, c, 1)
        self.part = part
        self.residual = nn.Sequential(conv_norm_act(part, part + 1, 1), conv_norm_act(part + 1, part, 3))
        self.join = conv_norm_act(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip, deep = self.expand(x).split([self.out.channels - self.part, self.part], dim=1)
        return self.join(torch.cat([deep + self.residual(deep), skip], dim=1))


@block("shuffle", "image", how=("reshape", "native", "flatten"), groups=(2, 4))
class Shuffle(Block):
    """Grouped convolution, channel shuffle, grouped convolution."""

    def __init__(self, state: State, *, how: str, groups: int) -> None:
        super().__init__(state)
        c, self.how, self.groups = state.channels, how, groups
        self.first = conv_norm_act(c, c, 1, groups=groups)
        self.second = nn.Conv2d(c, c, 3, padding=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        b, c, h, w = x.shape
        if self.how == "native":
            x = F.channel_shuffle(x, self.groups)
        elif self.how == "reshape":
            x = x.reshape(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        else:
            x = x.unflatten(1, (self.groups, c // self.groups)).transpose(1, 2).flatten(1, 2)
        return self.second(x)


@block("squeeze_excite", "image", layer=("conv", "linear"), gate=("sigmoid", "hardsigmoid", "softmax"))
class SqueezeExcite(Block):
    """Gate per channel from the mean of the image; "softmax" is a statistic over the channels themselves."""

    def __init__(self, state: State, *, layer: str, gate: str) -> None:
        super().__init__(state)
        c, self.layer, self.gate = state.channels, layer, gate
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=4)
        self.reduce = pointwise(c, c // 4 + 1) if layer == "conv" else nn.Linear(c, c // 4 + 1)
        self.expand = pointwise(c // 4 + 1, c) if layer == "conv" else nn.Linear(c // 4 + 1, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        squeezed = x.mean(dim=(2, 3), keepdim=True) if self.layer == "conv" else x.mean(dim=(2, 3))
        gate = self.expand(F.relu(self.reduce(squeezed)))
        if self.gate == "sigmoid":
            gate = torch.sigmoid(gate)
        elif self.gate == "hardsigmoid":
            gate = F.hardsigmoid(gate)
        else:
            gate = 2 * gate.softmax(dim=1)
        return x * gate.reshape(x.shape[0], -1, 1, 1)


@block("channel_conv", "image", kernel=(3, 5))
class ChannelConv(Block):
    """Gate per channel from a 1-d convolution that runs along the channels (ECA)."""

    def __init__(self, state: State, *, kernel: int) -> None:
        super().__init__(state)
        self.expand = conv_norm_act(state.channels, state.channels)
        self.conv = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        gate = self.conv(x.mean(dim=(2, 3)).unsqueeze(1)).sigmoid()
        return x * gate.reshape(x.shape[0], -1, 1, 1).expand_as(x)


@block("gated_conv", "image", how=("glu", "chunk", "split", "slice"))
class GatedConv(Block):
    """One half of a convolution gates the other."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c, self.how = state.channels, how
        self.conv = nn.Conv2d(c, 2 * c, 3, padding=1)
        self.project = pointwise(c, c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        c = self.out.channels
        if self.how == "glu":
            return self.project(F.glu(x, dim=1))
        if self.how == "chunk":
            value, gate = x.chunk(2, dim=1)
        elif self.how == "split":
            value, gate = x.split(c, dim=1)
        else:
            gate, value = x[:, :c], x[:, c:]
        return self.project(value * F.silu(gate))


@block("channels_last", "image", residual=(True, False), scale=("none", "channel", "one"))
class ChannelsLast(Block):
    """Depthwise convolution, then layer norm and two linear layers on (B, H, W, C), scaled and added (ConvNeXt)."""

    def __init__(self, state: State, *, residual: bool, scale: str) -> None:
        super().__init__(state)
        c, self.residual = state.channels, residual
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.norm = nn.LayerNorm(c, eps=1e-6)
        self.first = nn.Linear(c, c + 6)
        self.second = nn.Linear(c + 6, c)
        self.scale = None if scale == "none" else nn.Parameter(torch.ones(c if scale == "channel" else ()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.second(F.gelu(self.first(y)))
        if self.scale is not None:
            y = y * self.scale
        y = y.permute(0, 3, 1, 2)
        return x + y if self.residual else y


@block("broadcast", "image", what=("channel", "one", "position", "bias", "number", "rows"))
class Broadcast(Block):
    """Convolution, then a parameter (or a number) that broadcasts against it, then a convolution."""

    def __init__(self, state: State, *, what: str) -> None:
        super().__init__(state)
        c, h, w = state.channels, state.height, state.width
        self.what = what
        self.first, self.second = pointwise(c, c), pointwise(c, c)
        shapes = {"channel": (c, 1, 1), "one": (), "position": (1, c, h, w), "bias": (1, c, 1, 1), "rows": (h, 1)}
        self.name = {"position": "embed", "bias": "bias"}.get(what, "scale")
        if what in shapes:
            self.register_parameter(self.name, nn.Parameter(torch.ones(shapes[what])))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.what == "number":
            x = x * 0.7 - 0.1
        elif self.name == "scale":
            x = x * self.get_parameter("scale")
        else:
            x = x + self.get_parameter(self.name)
        return self.second(F.relu(x))


@block("selective", "image", how=("stack", "view"))
class Selective(Block):
    """Two branches weighted by a softmax over the branches, per channel (selective kernels, split attention)."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        c, self.how = state.channels, how
        self.conv = conv_norm_act(c, 2 * c, 3, groups=2) if how == "view" else conv_norm_act(c, c, 3)
        self.other = conv_norm_act(c, c, 1) if how == "stack" else nn.Identity()
        self.reduce, self.expand = nn.Linear(c, c - 1), nn.Linear(c - 1, 2 * c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        if self.how == "stack":
            branches = torch.stack([self.conv(x), self.other(x)], dim=1)
        else:
            branches = self.conv(x).reshape(b, 2, c, h, w)
        squeezed = branches.sum(dim=1).mean(dim=(2, 3))
        weights = self.expand(F.relu(self.reduce(squeezed))).reshape(b, 2, c, 1, 1).softmax(dim=1)
        return (branches * weights).sum(dim=1)


@block("roll", "image", how=("space", "chunks", "channels"))
class Roll(Block):
    """torch.roll: of the image, of a different shift for each chunk of channels, or of the channels themselves."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        self.how = how
        self.first = conv_norm_act(state.channels, state.channels, 1)
        self.second = pointwise(state.channels, state.channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "space":
            x = torch.roll(x, shifts=(-1, 1), dims=(2, 3))
        elif self.how == "channels":
            x = torch.roll(x, shifts=1, dims=1)
        else:
            x = torch.cat([torch.roll(part, i - 1, dims=2) for i, part in enumerate(x.chunk(3, dim=1))], dim=1)
        return self.second(x)


@block("in_place", "image", how=("slice", "add", "copy"))
class InPlace(Block):
    """Writes through a view: half of the channels, an addition to one of them, a copy into new zeros."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        self.how, self.part = how, state.channels // 2
        self.first = conv_norm_act(state.channels, state.channels, 1)
        self.second = nn.Conv2d(self.part, self.part, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "slice":
            y[:, : self.part] = self.second(y[:, self.part :])
        elif self.how == "add":
            y[:, self.part :] += self.second(y[:, : self.part])
        else:
            new = torch.zeros_like(y)
            new[:, : self.part].copy_(self.second(y[:, self.part :]))
            y = y + new
        return y


@block("places", "image", how=("unpool", "gather", "scatter", "write", "turn", "extremes"))
class Places(Block):
    """A pointwise convolution; then values move to other pixels, each channel by itself, or meet their extremes."""

    def __init__(self, state: State, *, how: str) -> None:
        super().__init__(state)
        self.how = how
        self.first = conv_norm_act(state.channels, state.channels, 1)
        self.second = pointwise(state.channels, state.channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.how == "unpool":
            y = F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2, output_size=y.shape[2:])
        elif self.how == "gather":
            y = y.gather(3, (x > 0).long())
        elif self.how == "scatter":
            y = y.scatter_add(2, (x > 0).long(), y) + y.scatter(3, (x > 0).long(), 0.5)
        elif self.how == "write":
            y = y.index_add(2, torch.tensor([0, 0]), y[:, :, :2])
            y[:, :, :, torch.tensor([1, 0])] = x[..., :2]
            y[y > 1] = 0.5
        elif self.how == "turn":
            y = y.rot90(2, (2, 3)) + y.diagonal(0, 2, 3)[..., :1, None] + y.cummax(3).values
        else:
            y = y.flatten(2).median(2).values[..., None, None] * (y > 0.5).any(1, keepdim=True) + (1 + y / 9).prod(
                3, True
            )
        return x + self.second(y)


@block(
    "lstm",
    "image",
    axis=("rows", "columns", "tokens"),
    bidirectional=(True, False),
    start=("zero", "learned"),
    cell=("lstm", "gru", "tanh", "relu", "projected"),
)
class Recurrent(Block):
    """Batch-first LSTM, GRU or plain cells along one axis, rows or columns being folded into the batch, then a linear
    layer, added."""

    def __init__(self, state: State, *, axis: str, bidirectional: bool, start: str, cell: str) -> None:
        super().__init__(state)
        c, hidden = state.channels, state.channels // 2 + 1
        self.axis, self.directions, self.hidden = axis, 1 + bidirectional, hidden
        self.norm = nn.LayerNorm(c)
        kinds = {"lstm": nn.LSTM, "gru": nn.GRU, "projected": partial(nn.LSTM, proj_size=hidden)}
        kind = kinds.get(cell, partial(nn.RNN, nonlinearity=cell))
        self.cell = kind(c, hidden + 2 * (cell == "projected"), batch_first=True, bidirectional=bidirectional)
        self.project = nn.Linear(hidden * self.directions, c)
        self.token = nn.Parameter(torch.zeros(2, self.directions, 1, hidden)) if start == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        order = (0, 3, 2, 1) if self.axis == "columns" else (0, 2, 3, 1)
        grid = self.norm(x.permute(order))
        b, rows, length, c = grid.shape
        sequence = grid.reshape(b, rows * length, c) if self.axis == "tokens" else grid.reshape(-1, length, c)
        if self.token is None:
            y, _ = self.cell(sequence)
        else:
            first, second = (s.contiguous() for s in self.token.expand(-1, -1, sequence.shape[0], -1).unbind(0))
            second = F.pad(second, (0, self.cell.hidden_size - self.hidden))
            y, _ = self.cell(sequence, (first, second) if isinstance(self.cell, nn.LSTM) else first)
        y = self.project(y).reshape(b, rows, length, c)
        return x + y.permute((0, 3, 2, 1) if self.axis == "columns" else (0, 3, 1, 2))


@block("cells", "image", cell=("lstm", "gru", "tanh", "relu"), start=("zero", "mean"))
class Cells(Block):
    """A cell of one step, called for each column with the state that the last one left; the last state, added."""

    def __init__(self, state: State, *, cell: str, start: str) -> None:
        super().__init__(state)
        c, self.hidden = state.channels, state.channels // 2 + 1
        kinds = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}
        self.cell = kinds.get(cell, partial(nn.RNNCell, nonlinearity=cell))(c, self.hidden)
        self.start = pointwise(c, self.hidden) if start == "mean" else None
        self.project = nn.Linear(self.hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden)
        if self.start is not None:
            state = self.start(x).mean((2, 3))
        memory = torch.zeros_like(state)
        for column in x.mean(2).unbind(2):
            if isinstance(self.cell, nn.LSTMCell):
                state, memory = self.cell(column, (state, memory))
            else:
                state = self.cell(column, state)
        return x + self.project(state)[..., None, None]
