"""Channels priced as they are once the layers that read them are refitted without them.

In: second moments of what layers read, float weights, how much each output counts. Out: an order in which the channels
of a group go, what is lost as they go, and weights refitted to any set that stays. Source: the optimal brain surgeon's
formula for blocks of columns, w_c [(H^-1)_cc]^-1 w_c^T, channels taken one after the other, the cheapest first.
Holds: what all others together can say in a channel's stead costs nothing; the loss grows with every channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sbs_fx.calibration.columns import Product
from sbs_fx.calibration.rounding import InputMoments, damping_of
from sbs_fx.passes import CostModel
from sbs_fx.passes.channels import dims as d
from sbs_fx.search.channel_bits import coordinates

_COLUMNS = 512  # of a layer; of one with more, a share of 1 in 512 goes at once: each time takes their number squared
_AT_ONCE = 256  # channels of a group that are looked at one by one; of larger groups, as many go at once


@dataclass
class Reading:
    """A layer as what it makes of channels.

    Attributes:
        product, rows: of its weight, (outputs, columns). moments: of the columns, damped.
        columns: group -> the columns of each of its channels, (size, columns of a channel).
    """

    product: Product
    rows: Tensor
    moments: Tensor
    columns: dict[str, Tensor]
    _corrections: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def refitted(self, weight: Tensor, kept: Mapping[str, Sequence[int]]) -> Tensor:
        """The weight, float or rounded, with what the columns that go did added to those that stay, which are zero."""
        gone = [
            columns[[c for c in range(len(columns)) if c not in stay]].flatten()
            for name, columns in self.columns.items()
            if len(stay := set(kept.get(name, range(len(columns))))) < len(columns)
        ]
        if not gone:
            return weight
        removed = torch.cat(gone).unique()
        key = tuple(removed.tolist())
        if key not in self._corrections:
            stays = torch.ones(len(self.moments), dtype=torch.bool)
            stays[removed] = False
            factor = torch.linalg.cholesky(self.moments[stays][:, stays])
            share = torch.cholesky_solve(self.moments[stays][:, removed], factor)
            correction = torch.zeros_like(self.rows)
            correction[:, stays] = self.rows[:, removed] @ share.T
            correction[:, removed] = torch.nan
            self._corrections[key] = correction
        correction = self._corrections[key]
        rows = self.product.rows(weight)[0]
        return self.product.weight(torch.where(correction.isnan(), 0, rows + correction.to(rows))[None])


def readings(
    cost: CostModel, products: Mapping[str, Product], weights: Mapping[str, Tensor], moments: Mapping[str, InputMoments]
) -> dict[str, Reading]:
    """Weight name -> the layer that reads with it, where it is one product of one group of channels."""
    result: dict[str, Reading] = {}
    for layer in cost.layers:
        for name, (dims, out) in layer.weights.items():
            product = products.get(name)
            if product is None or product.groups > 1 or name not in moments or len(cost.weights[name]) > 1:
                continue
            inputs = dims[1 - out % len(dims)]
            width = product.width // d.resolve(inputs).size
            columns = {}
            for group in cost.groups.values():
                if group.axis in d.axes(inputs):
                    owner = coordinates(inputs, group.axis)
                    places = [(owner == c).nonzero().flatten() for c in range(group.size)]
                    if len({len(p) for p in places}) == 1:
                        first = torch.stack(places) * width
                        columns[group.name] = (first[..., None] + torch.arange(width)).flatten(1)
            matrix = moments[name].matrix.double().cpu()
            matrix = matrix + damping_of(matrix, moments[name].samples) * torch.eye(matrix.shape[1]).to(matrix)
            rows = product.rows(weights[name].detach().float().cpu())[0].clone()  # reason: weights change with plans
            result[name] = Reading(product, rows, matrix[0].float(), columns)
    return result


def readers_of(
    cost: CostModel, read: Mapping[str, Reading], squares: Mapping[str, Tensor]
) -> dict[str, list[tuple[Reading, Tensor]]]:
    """Group -> the layers that read it and what an error of their outputs costs, half of `squares`; of groups that are
    read by such layers alone, so that what goes can be made good by all that misses it."""
    groups = _refittable(cost, {name: reading for name, reading in read.items() if name in squares})
    return {g: [(r, squares[n] / 2) for n, r in read.items() if n in squares and g in r.columns] for g in groups}


def _refittable(cost: CostModel, read: Mapping[str, Reading]) -> set[str]:
    names = {group.axis: group.name for group in cost.groups.values()}
    result = set(names.values())
    for layer in cost.layers:
        if not layer.weights:
            result -= {
                names.get(axis, "") for product in layer.products for dim in product.dims for axis in d.axes(dim)
            }
        for weight, (dims, out) in layer.weights.items():
            of_weight = read[weight].columns if weight in read else {}
            for i, dim in enumerate(dims):
                if i != out % len(dims):
                    result -= {names[axis] for axis in d.axes(dim) if axis in names} - of_weight.keys()
    return result & {group for reading in read.values() for group in reading.columns}


class _Left:
    """A reading while channels of one group go."""

    def __init__(self, reading: Reading, group: str, importance: Tensor) -> None:
        self.columns = reading.columns[group]
        self.rows = reading.rows * importance.to(reading.rows).clamp_min(0).sqrt()[:, None]
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(reading.moments))

    def costs(self) -> Tensor:
        """Of each channel, (size,)."""
        if self.columns.shape[1] == 1:
            at = self.columns[:, 0]
            return self.rows.square().sum(0)[at] / self.inverse.diagonal()[at].clamp_min(1e-30)
        blocks = self.inverse[self.columns[:, :, None], self.columns[:, None]]
        rows = self.rows[:, self.columns].movedim(1, 0)  # (size, outputs, columns of a channel)
        return (torch.linalg.inv(blocks) * (rows.mT @ rows)).sum((1, 2))

    def remove(self, channels: Tensor) -> float:
        """Take channels out; what is lost with them together."""
        at = self.columns[channels].flatten()
        block, rows, across = self.inverse[at][:, at], self.rows[:, at], self.inverse[at]
        solved = torch.linalg.solve(block, rows.T)  # (columns, outputs)
        lost = float((solved * rows.T).sum())
        self.rows -= solved.T @ across
        self.inverse.addmm_(across.T, torch.linalg.solve(block, across), alpha=-1)
        self.inverse[at, at] = 1.0  # reason: nobody asks for them again, and blocks are to stay regular
        return lost


def removal(
    group: str, size: int, fewest: int, readers: Sequence[tuple[Reading, Tensor]]
) -> tuple[list[int], list[float]]:
    """Channels in the order in which they go, down to `fewest` that stay, and the loss with none, one, two ... of them
    gone. readers: the layers that read the group, with half of what a squared error of each output costs."""
    left = [_Left(reading, group, importance) for reading, importance in readers]
    order: list[int] = []
    losses = [0.0]
    gone = torch.zeros(size, dtype=torch.bool)
    widest = max((len(reading.inverse) for reading in left), default=0)
    step = max(1, size // _AT_ONCE, widest // _COLUMNS)
    while len(order) < size - fewest:
        costs = sum((reading.costs() for reading in left), torch.zeros(size))
        costs = torch.where(gone | ~costs.isfinite(), torch.inf, costs)
        chosen = costs.argsort(stable=True)[: min(step, size - fewest - len(order))]
        lost = sum(reading.remove(chosen) for reading in left)
        gone[chosen] = True
        order += chosen.tolist()
        losses += [losses[-1] + max(lost, 0.0) * (i + 1) / len(chosen) for i in range(len(chosen))]
    return order, losses
