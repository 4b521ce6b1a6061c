"""How much each channel of a group weighs: norms over all members of the group.

In: channel groups. Out: one score per coordinate and group, larger is more important. A coordinate's score is the norm
of everything that would be removed with it: rows, columns, biases and scales alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.channels.groups import ChannelGroup, ChannelGroups

Norm = Literal["l1", "l2"]


def group_importance(
    groups: ChannelGroups, norm: Norm = "l2", parameters: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Group name -> scores of shape (size,), float64: the L1 or L2 norm of each coordinate over all its members.

    Each parameter is divided by its own mean magnitude first, so that a layer scale of 1e-6 counts as much as a
    convolution. `parameters` (by name) take the place of those of the graph the groups were found on.
    """
    power = 1 if norm == "l1" else 2
    device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
    scores = {g.axis: torch.zeros(g.size, dtype=torch.float64, device=device) for g in groups.values()}
    for name, parameter in (parameters or dict(groups.inference.graph_module.named_parameters())).items():
        dims = groups.inference.tensors.get(name)
        if dims is None or not any(d.axes(dim) for dim in dims):
            continue
        mass = parameter.detach().abs().double().pow(power).to(device)
        mass = mass / mass.mean().clamp_min(1e-30)
        for i, dim in enumerate(dims):
            if d.axes(dim):
                others = [k for k in range(mass.ndim) if k != i]
                _spread(dim, mass.sum(others) if others else mass, scores)
    return {g.name: scores[g.axis].pow(1 / power) for g in groups.values()}


def most_important(scores: Tensor, count: int) -> list[int]:
    """The `count` coordinates of largest score, ascending; of equal ones, the first."""
    return sorted(scores.argsort(descending=True, stable=True)[:count].tolist())


def _spread(dim: Dim, mass: Tensor, scores: dict[Axis, Tensor]) -> None:
    """Add the mass of a dimension, shape (size,), to the coordinates of the axes that it is made of."""
    dim = d.resolve(dim)
    if isinstance(dim, Axis):
        scores[dim] += mass
    elif isinstance(dim, d.Sum):
        for item, part in zip(dim.items, mass.split([item.size for item in dim.items]), strict=True):
            _spread(item, part, scores)
    elif isinstance(dim, d.Prod):
        grid = mass.reshape([f.size for f in dim.factors])
        for i, part in enumerate(dim.factors):
            others = [k for k in range(grid.ndim) if k != i]
            _spread(part, grid.sum(others), scores)


def kernel_multiple(
    group: ChannelGroup, round_to: int | None, preferred: int | None = None, *, fast: bool = False
) -> int:
    """What kept channels should be a multiple of: `round_to`; None: `preferred`, as measured, else 16, and half of
    that in groups under four times as many channels, unless it is to be `fast`: layers with 24 of 32 channels were seen
    to take up to 1.4 times as long as with all, with 8 of 16 twice as long.

    Kernels step at multiples of the width of the whole tensor dimension, so a product axis needs a smaller one.
    """
    preferred = preferred or 16
    multiple = round_to or (preferred if fast or group.size >= 4 * preferred else max(1, preferred // 2))
    widest = 1
    for member in group.members:
        dim = d.resolve(member.type)
        if isinstance(dim, d.Prod):
            widest = max(widest, dim.size // group.size)
    multiple //= math.gcd(multiple, widest)
    return multiple if round_to or fast or group.size > multiple else 1
