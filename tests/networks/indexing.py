"""More networks for operators.py: those with places, of indices, steps, grids and shifted kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d, ps_roi_align, ps_roi_pool, roi_align, roi_pool

from tests.networks.operators import CASES, CHANNELS, SIDE, Function, both, case


def written(y: Tensor, values: Tensor) -> Tensor:
    y = y.exp()
    y[:, :, torch.tensor([0, 2])] = values
    return y


def masked_write(y: Tensor) -> Tensor:
    y = y.exp()
    y[y > 2] = 0.5
    return y


def enter_short_ones() -> None:
    free: dict[str, Function] = {
        "running_over_space": lambda p, y: y.cummax(2).values + y.cummin(3).values + y.logcumsumexp(3),
        "rotate_space": lambda p, y: y[:, :, :4].rot90(1, (2, 3)).sum(3, keepdim=True) + y.rot90(2, (2, 3)),
        "diagonals": lambda p, y: both(y.diagonal(0, 2, 3), y.diagonal(1, -1, -2)),
        # places in space, each channel by itself
        "gather_tokens": lambda p, y: y.flatten(2).mT.gather(
            1, y.mean((1, 3)).argsort(1)[:, :5, None].expand(-1, -1, CHANNELS)
        ),
        "scatter_tokens": lambda p, y: (
            y.flatten(2).scatter_add(2, (y > 0).long().flatten(2), y.flatten(2))
            + y.flatten(2).scatter(2, (y > 0).long().flatten(2), 0.5)
            + y.flatten(2).scatter_reduce(2, (y > 0).long().flatten(2), y.flatten(2).exp(), "amax")
        ),
        "write_tokens": lambda p, y: (
            y.index_add(2, torch.tensor([0, 1, 1, 2, 5, 3]), y.exp(), alpha=0.5)
            + y.index_fill(3, torch.tensor([1, 3]), -1.0)
            + written(y, y[:, :, :2])
            + written(y, y[:, :, 1:2, :1])
        ),
        "written_by_a_mask": lambda p, y: masked_write(y),
        "emptied": lambda p, y: y + y.exp().zero_(),
        "unpool": lambda p, y: F.max_unpool2d(*F.max_pool2d(y, 2, return_indices=True), 2),
        "unpool_3d": lambda p, y: F.max_unpool3d(
            *F.max_pool3d(y[:, :, None], (1, 2, 2), return_indices=True), (1, 2, 2)
        ),
        "adaptive_max_pool_3d": lambda p, y: F.adaptive_max_pool3d(y[:, :, None], (1, 3, 2)),
        "grid_sample_3d": lambda p, y: F.grid_sample(
            y[:, :, None], y.mean(1)[:, None, :, :, None].tanh().expand(-1, 2, -1, -1, 3), align_corners=False
        ),
        "affine_grid": lambda p, y: F.grid_sample(
            y,
            F.affine_grid(y[:, :2, 0, :3].mean(1, keepdim=True) + torch.eye(2, 3), y.shape, False),
            align_corners=False,
        ),
    }
    pinned: dict[str, Function] = {
        "median": lambda p, y: y - y.median() + y.nanmedian(),
        "kth_channel": lambda p, y: y.kthvalue(3, 1).values,
        "running_channels": lambda p, y: y.cummax(1).values + y.logcumsumexp(1),
        "rotate_channels": lambda p, y: y[:, :6].rot90(1, (1, 2)) * y[:, 6:],
        "diagonal_of_channels": lambda p, y: y.diagonal(0, 1, 2),
        "scatter_channels": lambda p, y: y.scatter(1, (y[:, :4] > 0).long(), y[:, 4:8]),
        "written_by_index": lambda p, y: written(y.transpose(1, 2), y[:, :2].transpose(1, 2)),
        "fill_channels": lambda p, y: y.index_fill(1, torch.tensor([1, 3]), -1.0),
    }
    for functions in (free, pinned):
        for name, function in functions.items():
            CASES[name] = (function, {}, functions is free)


enter_short_ones()


def cells(y: Tensor, p: nn.ParameterDict, operator: Function, state: Tensor) -> Tensor:
    """A recurrent layer of one direction, steps in the second dimension."""
    weights = [p["of_input"], p["of_hidden"]]
    return operator(y, state, weights, False, 1, 0.0, False, False, True)[0]  # type: ignore[call-arg,arg-type]


@case(of_input=(15, 12), of_hidden=(15, 5))
def recurrent_over_pixels(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return cells(y.flatten(2).mT, p, torch.gru, y.new_zeros(1, y.shape[0], 5))  # type: ignore[arg-type]


@case(of_input=(15, 12), of_hidden=(15, 5), bias=(15,), other_bias=(15,))
def gru_cell_over_rows(p: nn.ParameterDict, y: Tensor) -> Tensor:
    state = y.new_zeros(y.shape[0], 5)
    for row in y.mean(3).unbind(2):
        state = torch.gru_cell(row, state, p["of_input"], p["of_hidden"], p["bias"], p["other_bias"])
    return state


@case(of_input=(20, 12), of_hidden=(20, 5))
def lstm_cell_over_rows(p: nn.ParameterDict, y: Tensor) -> Tensor:
    states = (y[:, :5, 0, 0], y[:, :5, 1, 1].exp())
    for row in y.mean(3).unbind(2)[:3]:
        states = torch.lstm_cell(row, states, p["of_input"], p["of_hidden"])
    return both(*states)


@case(of_input=(12, 12), of_hidden=(12, 12), bias=(12,), other_bias=(12,))
def plain_cells(p: nn.ParameterDict, y: Tensor) -> Tensor:
    weights = (p["of_input"], p["of_hidden"], p["bias"], p["other_bias"])
    return torch.rnn_relu_cell(y[:, :, 1, 1], torch.rnn_tanh_cell(y[:, :, 0, 0], y[:, :, 0, 1], *weights), *weights)


@case(of_input=(10, 12))
def unsafe_parts(p: nn.ParameterDict, y: Tensor) -> Tensor:
    a, b = torch.unsafe_split(F.linear(y.mean((2, 3)), p["of_input"]), 5, 1)
    c, e = torch.unsafe_split_with_sizes(y.mean((2, 3)), [5, 7], 1)
    return both(a * b.sigmoid() + c, e)


def boxes_of(y: Tensor) -> Tensor:
    """Two boxes an image, (number of the image, corners): (B, C, H, W) -> (2 B, 5)."""
    number = torch.arange(y.shape[0], dtype=y.dtype)[:, None]
    corner = y[:, :2, 0, 0].sigmoid()
    rows = [torch.cat([number, corner, corner + size], 1) for size in (3, 4)]
    return torch.stack(rows, 1).flatten(0, 1)


@case()
def boxes_aligned(p: nn.ParameterDict, y: Tensor) -> Tensor:
    boxes = boxes_of(y.detach())
    parts = roi_align(y, boxes, 2, sampling_ratio=2, aligned=True), roi_pool(y, boxes, (1, 2))
    return both(*(x.unflatten(0, (-1, 2)) for x in parts))


@case()
def boxes_by_position(p: nn.ParameterDict, y: Tensor) -> Tensor:
    boxes = boxes_of(y.detach())
    parts = ps_roi_align(y, boxes, (1, 2), sampling_ratio=1), ps_roi_pool(y, boxes, (2, 1))
    return both(*(x.unflatten(0, (-1, 2)) for x in parts))


@case(free=False, of_input=(5, 36), of_hidden=(5, 5))
def recurrent_over_channels(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return cells(y.flatten(2), p, torch.rnn_tanh, y.new_zeros(1, y.shape[0], 5))  # type: ignore[arg-type]


@case(of_input=(5, 6), of_hidden=(5, 5))
def recurrent_for_each_channel(p: nn.ParameterDict, y: Tensor) -> Tensor:
    batch = y.reshape(-1, SIDE, SIDE)
    state = torch.ones_like(y)[:, :, 0, :5].reshape(1, -1, 5)
    return cells(batch, p, torch.rnn_relu, state).reshape(y.shape[0], CHANNELS, -1)  # type: ignore[arg-type]


@case(flow=(2, 12, 1, 1))
def grid_of_channels(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return F.grid_sample(y, F.conv2d(y, p["flow"]).permute(0, 2, 3, 1).tanh(), align_corners=False)


@case(flow=(8, 12, 1, 1))
def grid_of_heads(p: nn.ParameterDict, y: Tensor) -> Tensor:
    """Each head looks at places of its own; heads are folded into the batch."""
    places = F.conv2d(y, p["flow"]).reshape(-1, 2, SIDE, SIDE).permute(0, 2, 3, 1).tanh()
    return F.grid_sample(y.reshape(-1, 3, SIDE, SIDE), places, align_corners=False).reshape(y.shape[0], 12, SIDE, SIDE)


@case(weight=(8, 12, 3, 3), offset=(18, 12, 1, 1), bias=(8,))
def deformable(p: nn.ParameterDict, y: Tensor) -> Tensor:
    return deform_conv2d(y, F.conv2d(y, p["offset"])[:, :, :4, :4] / 9, p["weight"], p["bias"])


@case(weight=(8, 6, 3, 3), offset=(36, 12, 1, 1), mask=(18, 12, 1, 1))
def deformable_in_groups(p: nn.ParameterDict, y: Tensor) -> Tensor:
    mask = F.conv2d(y, p["mask"]).sigmoid()
    return deform_conv2d(y, F.conv2d(y, p["offset"]) / 9, p["weight"].tanh(), padding=1, mask=mask)
