"""A layer refitted in closed form: on what it now reads it gives what the float network gave, at its bits.

In: second moments of what a layer reads now and of what it is to give, its weight and gate. Out: weight on the gate's
grid, range of the gate, and the bias that the means ask for. Source: least squares on quantised inputs with rounding
of GPTQ (arXiv 2210.17323) behind it; channels that went and bits that went are the same thing to it.
Holds: every value is a level of the gate; the same moments give the same weight; where samples are few, it is drawn to
the float weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx

from sbs_fx.calibration.blocks import alike, results, subgraph
from sbs_fx.calibration.columns import Product
from sbs_fx.calibration.rounding import DAMPING, compensated, damping_of, products, weight_parameters
from sbs_fx.data.batches import Tensors
from sbs_fx.passes import weight_gates
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.folding import CONVOLUTIONS
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.passes.graph import attribute, channel_rows
from sbs_fx.passes.static.fold import Constants, batch_norm_folds
from sbs_fx.quantizer.ranges import best_top, grid_of, set_range, weight_top
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten

_LEAST_FACTOR = 1e-6  # of a batch norm; a channel multiplied by less can mend nothing
_LEAST_SPREAD, _SCALES = 1e-3, (0.5, 2.0)  # of a channel, for its scale to be fitted, and what that may become
_AT_ONCE = 1 << 23  # numbers that moments take in
_PLACES, _SAMPLES, _EACH = 96, 8192, 24  # of an image at most; of all images at least, and for each column


class Moments:
    """Means and second moments of samples x (groups, columns, n) and y (groups, outputs, n), added up in float64.

    Products are taken in float32 of values less the first samples' means, which loses nothing of the spread.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, x: Tensor, y: Tensor) -> None:
        self.waiting.append((x.float(), y.float()))
        if sum(each[0].numel() for each in self.waiting) >= _AT_ONCE:
            self._count()

    def _count(self) -> None:
        """Take what is waiting in; of few samples a time, sums would cost more than products."""
        x, y = (_joined(each) for each in zip(*self.waiting, strict=True))
        self.waiting.clear()
        if not self.samples:
            self.shifts = x.mean(2, keepdim=True), y.mean(2, keepdim=True)
            self.sums = [torch.zeros((), dtype=torch.float64, device=x.device)] * 5
        self.samples += x.shape[2]
        x, y = (values - shift for values, shift in zip((x, y), self.shifts, strict=True))
        for i, value in enumerate(
            (x.sum(2), y.sum(2), x @ x.mT, y @ x.mT, y.square().sum(2))  # each sum has samples of one batch alone
        ):
            self.sums[i] = self.sums[i] + value.double()

    def finished(self, *, centred: bool) -> Statistics:
        """`centred`: an intercept takes the means; else they are part of what the weight has to give."""
        if self.waiting:
            self._count()
        x, y, xx, yx, yy = (s / self.samples for s in self.sums)
        xx, yx, yy = xx - x[:, :, None] * x[:, None], yx - y[:, :, None] * x[:, None], yy - y.square()
        mean_x, mean_y = (m + s[:, :, 0].double() for m, s in zip((x, y), self.shifts, strict=True))
        if not centred:
            xx, yx = xx + mean_x[:, :, None] * mean_x[:, None], yx + mean_y[:, :, None] * mean_x[:, None]
            yy = yy + mean_y.square()
        return Statistics(self.samples, mean_x, mean_y, xx, yx, yy)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Samples (groups, columns, n) as one tensor, in the order in which they are in memory: any other takes longer than
    the products."""
    if parts[0].stride(2) < parts[0].stride(1):
        return torch.cat(list(parts), 2)
    return torch.cat([part.movedim(2, 0) for part in parts]).movedim(0, 2)


@dataclass(frozen=True)
class Statistics:
    """Of x (groups, columns) and y (groups, outputs): means, E[x x^T], E[y x^T], E[y^2]; float64."""

    samples: int
    mean_x: Tensor
    mean_y: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor


@torch.no_grad()
def refit(
    weight: Tensor, gate: SuperBitQuantizer, product: Product, statistics: Statistics, share: float = DAMPING
) -> Tensor:
    """The weight with which the layer gives y on x, rounded by the gate, whose range is set.

    Least squares, drawn to the given weight by a share of the moments' diagonal, the more the fewer samples there are.
    """
    rows, moments = product.rows(weight).double(), statistics.xx
    damping = damping_of(moments, statistics.samples, share)
    damped = moments + damping * torch.eye(moments.shape[1]).to(moments)
    rows = torch.linalg.solve(damped, (statistics.yx + damping * rows).mT).mT
    fitted = product.weight(rows).to(weight.dtype)
    if gate.is_float:
        return fitted
    if gate.channels == rows.shape[0] * rows.shape[1]:
        values, importance = rows.float().flatten(0, 1), damped.diagonal(dim1=1, dim2=2).float()
        importance = importance[:, None].expand(-1, rows.shape[1], -1).flatten(0, 1)
        set_range(gate, best_top(values, values.abs().amax(1), grid_of(gate), importance))
    else:
        set_range(gate, weight_top(fitted, gate, "mse"))
    return compensated(fitted, gate, product, moments)


def intercept(rows: Tensor, statistics: Statistics) -> Tensor:
    """What is to be added to each output, (groups * outputs,)."""
    return (statistics.mean_y - (rows.double() @ statistics.mean_x[:, :, None])[:, :, 0]).flatten()


class Refits:
    """Refits the layers of a gated graph, block by block.

    Args:
        gated: bits fixed, calibrated. teacher: the float graph. index: kept coordinates of the teacher's tensors.
        damping: of the least squares.
    """

    def __init__(
        self, gated: fx.GraphModule, teacher: fx.GraphModule, index: Slices, seed: int, damping: float = DAMPING
    ) -> None:
        self.gated, self.teacher, self.index, self.seed, self.damping = gated, teacher, index, seed, damping
        self.types = {node.name: dims for node, dims in index.groups.inference.dims.items()}
        parameters, gates = weight_parameters(gated), weight_gates(gated)
        self.alike = alike(index.groups)
        self.layers = {
            node.name: (node, product, parameters[name], gates[name])
            for name, (node, product) in products(gated).items()
            if name in parameters and node.name in self.alike and _has_plain_bias(node)
        }
        self._reset(fold.norm for fold in batch_norm_folds(Constants(gated)).values())
        self.folds = batch_norm_folds(Constants(gated))
        self.joins, self.affine = self._joins(), self._affine()

    def observe(
        self, begin: str | None, ends: Sequence[str], real: Sequence[Tensors]
    ) -> tuple[list[Tensors], Observed]:
        """What the float network gives at the ends of the block behind `begin`, and samples of what its layers give.
        real: batches of what the block reads."""
        part = subgraph(self.teacher, begin, ends)
        names = [node.name for node in part.graph.nodes if node.name in self.layers]
        joined = [self.joins[name][0] for name in names if name in self.joins]
        images = sum(len(tensors[0]) for tensors in real)
        observed = Observed(self, subgraph(self.teacher, begin, [*ends, *names, *joined]), names, joined, images)
        return [observed.add(batch, tensors)[: len(ends)] for batch, tensors in enumerate(real)], observed

    def __call__(
        self,
        part: fx.GraphModule,
        begin: str | None,
        now: Sequence[Tensors],
        real: Sequence[Tensors],
        observed: Observed,
    ) -> None:
        """Refit the layers of one block, in its order, in place.

        Args:
            part: the block, from the tensor `begin` on. now, real: batches of what it reads in the gated and the float
                network.
        """
        for name in [node.name for node in part.graph.nodes]:
            if name in self.layers:
                self._refit(name, begin, now, observed)
            elif name in self.affine:
                self._align(name, begin, now, real)

    @torch.no_grad()
    def _refit(self, name: str, begin: str | None, now: Sequence[Tensors], observed: Observed) -> None:
        node, product, parameter, gate = self.layers[name]
        other, factor = self.joins.get(name, ("", torch.ones(())))
        source, own = cast("tuple[fx.Node, fx.Node | None]", (node.args[0], node.args[2]))
        part = subgraph(self.gated, begin, [source.name, *([other] if other else [])])
        bias, mean = self._additive(node)
        fixed = attribute(self.gated, str(own.target)) if bias is mean is None and own is not None else None
        moments = Moments()
        for batch, (x, *others) in enumerate(results(part, now)):
            sample = observed.samples[name, batch]
            y = sample.given if fixed is None else sample.given - fixed.view(product.groups, -1, 1)
            if sample.other is not None:
                y = y + (sample.other - product.outputs(others[0], sample.places)) * factor
            moments.add(product.columns(x, sample.shape, sample.places), y)
        statistics = moments.finished(centred=bias is not None or mean is not None)
        parameter.copy_(refit(parameter.detach(), gate, product, statistics, self.damping))
        added = intercept(product.rows(parameter.detach()), statistics)
        if bias is not None:
            bias.copy_(added)
        elif mean is not None:
            mean.sub_(added)

    def _reset(self, norms: Iterable[fx.Node]) -> None:
        """The statistics of the float network, which is what layers are fitted to."""
        for norm in norms:
            for source in norm.args[3:5]:
                if isinstance(source, fx.Node) and source.op == "get_attr":
                    name = str(source.target)
                    attribute(self.gated, name).detach().copy_(self.index.tensor(self.teacher, name))

    def _joins(self) -> dict[str, tuple[str, Tensor]]:
        """Layer -> the tensor that was there before it and that its result is added to, and what a difference of that
        tensor is for the layer: what came in wrong by the other way, the layer can make good."""
        found: dict[str, tuple[str, Tensor]] = {}
        position = {node: i for i, node in enumerate(self.gated.graph.nodes)}
        for name, (node, product, _, _) in self.layers.items():
            fold = self.folds.get(node)
            last = node if fold is None else fold.norm
            join = next(iter(last.users)) if len(last.users) == 1 else None
            if join is None or join.target is not aten.add.Tensor or join.kwargs or len(join.args) > 2:
                continue
            other = join.args[1] if join.args[0] is last else join.args[0]
            if (
                not isinstance(other, fx.Node)
                or other.name not in self.alike
                or position[other] >= position[node]
                or other.meta["val"].shape != last.meta["val"].shape
            ):
                continue
            one = torch.ones(1, 1, 1)
            if fold is not None:
                usable = fold.factor.abs() > _LEAST_FACTOR
                one = torch.where(usable, 1 / fold.factor, 0.0).float().view(product.groups, -1, 1)
            found[name] = other.name, one
        return found

    @torch.no_grad()
    def _align(self, name: str, begin: str | None, now: Sequence[Tensors], real: Sequence[Tensors]) -> None:
        """Factor and bias of a norm of its own, or the bias of a layer that is no `Product`: least squares in each
        channel."""
        node, weight, bias = self.affine[name]
        channel = -1 if node.target is aten.linear.default else 1
        parts = subgraph(self.gated, begin, [name]), subgraph(self.teacher, begin, [name])
        moments = Moments()
        for (x,), (given,) in zip(results(parts[0], now), results(parts[1], real), strict=True):
            y = self.index.select(given, self.types[name])
            moments.add(*(channel_rows(v, channel)[:, None] for v in (x, y)))
        s = moments.finished(centred=True)
        spread, scale = s.xx[:, 0, 0], torch.ones_like(s.xx[:, 0, 0])
        if weight is not None:
            fits = (s.yx[:, 0, 0] / spread.clamp_min(1e-30)).clamp(*_SCALES)
            scale = torch.where(spread > _LEAST_SPREAD * s.yy[:, 0], fits, scale)
            weight.mul_(scale)
        bias.copy_(bias * scale + s.mean_y[:, 0] - scale * s.mean_x[:, 0])

    def _affine(self) -> dict[str, tuple[fx.Node, Tensor | None, Tensor]]:
        """Node -> scale and bias that it alone reads, of batch norms that no layer takes in and of other layers."""
        found: dict[str, tuple[fx.Node, Tensor | None, Tensor]] = {}
        folded = {fold.norm for fold in self.folds.values()}

        for node in self.gated.graph.nodes:
            is_norm = node.op == "call_module" and isinstance(self.gated.get_submodule(str(node.target)), BatchNorm)
            is_layer = node.target in CONVOLUTIONS | {aten.linear.default} and node.name not in self.layers
            if node.name in self.alike and node not in folded and (is_norm or is_layer):
                bias = self._own(node.args[2])
                if bias is not None:
                    found[node.name] = node, self._own(node.args[1]) if is_norm else None, bias
        return found

    def _additive(self, node: fx.Node) -> tuple[Tensor | None, Tensor | None]:
        """What moves all values of an output channel and nothing else: the layer's bias, or the mean of the batch norm
        behind a layer without one."""
        if node.args[2] is not None:
            return self._own(node.args[2]), None
        return None, self._own(self.folds[node].norm.args[3]) if node in self.folds else None

    def _own(self, source: Any) -> Tensor | None:
        """A parameter or buffer that nothing else reads."""
        alone = isinstance(source, fx.Node) and source.op == "get_attr" and len(source.users) == 1
        return attribute(self.gated, str(source.target)).detach() if alone else None


def _has_plain_bias(layer: fx.Node) -> bool:
    """Whether it has none, or one that depends on no input."""
    bias = layer.args[2]
    return bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")


class _Sample(NamedTuple):
    """What a layer of the float network gives at some places, and the tensor that this is added to; and its shape."""

    given: Tensor
    other: Tensor | None
    shape: tuple[int, ...]
    places: Tensor


class Observed(fx.Interpreter):
    """Runs float layers and keeps samples at random places, at the kept coordinates."""

    def __init__(
        self, refits: Refits, part: fx.GraphModule, names: Sequence[str], joined: Sequence[str], images: int
    ) -> None:
        super().__init__(part)
        self.refits, self.names, self.images, self.batch = refits, set(names), images, 0
        ends = next(iter(part.graph.find_nodes(op="output"))).args[0]
        self.nodes = dict(zip(joined, ends[len(ends) - len(joined) :], strict=True))
        self.generator = torch.Generator().manual_seed(refits.seed)
        self.samples: dict[tuple[str, int], _Sample] = {}

    @torch.no_grad()
    def add(self, batch: int, tensors: Tensors) -> Tensors:
        self.batch = batch
        result: Tensors = self.run(*tensors)
        return result

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            product = self.refits.layers[n.name][1]
            count = min(_PLACES, -(-max(_SAMPLES, _EACH * product.width) // self.images))
            places = product.places(result, count, self.generator)
            other = self.refits.joins.get(n.name, (None,))[0]
            tensors = [(n.name, result), *([(other, self.env[self.nodes[other]])] if other else [])]
            kept = [self.refits.index.select(x, self.refits.types[name]) for name, x in tensors]
            given, *others = (product.outputs(x, places) for x in kept)
            shape = tuple(result.shape)
            self.samples[n.name, self.batch] = _Sample(given, others[0] if others else None, shape, places)
        return result
