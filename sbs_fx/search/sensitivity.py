"""What each decision costs by itself: second-order estimates from per-sample gradients.

In: a searchable graph with all its gates open, quantised forms of weights and activations, batches of images. Out: the
estimated loss of each bitwidth of each weight and tensor, and per group a matrix from which that of removing any set
of channels follows. Source: MPQCO (arXiv 2110.06554): dL ~ 1/2 dW^T H dW with H ~ E[g g^T], and from it
dL ~ 1/(2N) sum_n <g_n, dW>^2 [our derivation]; for channels it is Fisher pruning (arXiv 1801.05787).
Holds: no per-sample gradient of a weight is ever formed: <g_n, dW> = <dL_n/dy, y(W + dW) - y(W)> at the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sbs_fx.data.batches import Tensors, check_labels
from sbs_fx.passes import ChannelGroups, activation_gates, weight_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Dim
from sbs_fx.passes.folding import WITH_BIAS
from sbs_fx.plan.errors import DataError, WeightsError
from sbs_fx.plan.plan import Kind
from sbs_fx.training.evaluation import mode
from sbs_fx.training.task import task_of

aten = torch.ops.aten

Forms = Mapping[int, Callable[[Tensor], Tensor]]  # bits -> the tensor as that many bits have it


@dataclass
class Sensitivity:
    """Loss (cross-entropy, nats an image) that decisions are estimated to cost, each by itself.

    Attributes:
        bits: kind ("weight" or "activation") -> name -> bits -> loss.
        channels: group -> (images, size): what the loss of each image changes by, to first order, when a channel goes;
            a set R of channels costs 1/2 mean_n (sum_{c in R} channels[n, c])^2.
        outputs: weight -> (outputs,): the squared gradient at each output of its layer, added up over places, the mean
            over images; half of it times a squared error is what that error costs. Convolutions and linears alone.
        labelled: False where the model's own predictions stood in for labels.
    """

    bits: dict[Kind, dict[str, dict[int, float]]] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    labelled: bool = True

    def of_removing(self, group: str, gone: Sequence[int]) -> float:
        return 0.5 * float(self.channels[group][:, list(gone)].sum(1).square().mean())


def sensitivity(
    network: fx.GraphModule,
    groups: ChannelGroups,
    data: Iterable[tuple[Tensors, Tensor | None]],
    forms: Mapping[Kind, Mapping[str, Forms]],
    prunable: Iterable[str] = (),
    seed: int = 0,
) -> Sensitivity:
    """Estimate by one forward and one backward pass over the data.

    Args:
        network: from `insert_gates` on the graph of `groups`, all gates open. data: (inputs, labels or None); without
            labels, and in tasks other than classification, targets are drawn from the model's own predictions, which
            makes H the Fisher information itself.
        forms: of weights and of activations by name, what is to be judged. prunable: names of groups.

    Raises:
        WeightsError: the gradient at a layer is NaN or Inf; names it. DataError: that of the loss.
    """
    recorder, task = _Recorder(network, groups, forms, prunable), task_of(network)
    generator = torch.Generator().manual_seed(seed)
    images = 0
    labelled = True
    with mode(network, training=False):
        for index, (inputs, labels) in enumerate(data):
            recorder.begin(len(inputs[0]))
            output = recorder.run(*(x.detach().requires_grad_(x.is_floating_point()) for x in inputs))
            labelled = labelled and task.name == "classification" and labels is not None and labels.ndim == 1
            if labelled:
                (logits,) = task.tensors(output)
                labels = check_labels(labels, logits.shape[1], index)
                loss = F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
            else:
                loss = task.sampled(output, generator)
            if not bool(torch.isfinite(loss)):
                raise DataError(f"the loss of the float model is {float(loss)} after {images} images; check the data")
            loss.backward()
            recorder.end()
            images += len(inputs[0])
    return Sensitivity(
        {
            kind: {n: {b: 0.5 * s / images for b, s in table.items()} for n, table in sums.items()}
            for kind, sums in recorder.sums.items()
        },
        {n: torch.cat(rows) for n, rows in recorder.rows.items()},
        {n: squares / images for n, squares in recorder.squares.items()},
        labelled,
    )


class _Recorder(fx.Interpreter):
    """Runs the float graph; keeps what layers and gates saw until the gradients are there."""

    def __init__(
        self,
        network: fx.GraphModule,
        groups: ChannelGroups,
        forms: Mapping[Kind, Mapping[str, Forms]],
        prunable: Iterable[str],
    ) -> None:
        super().__init__(network)
        self.garbage_collect_values = True
        self.forms = forms
        self.weights = {id(gate): name for name, gate in weight_gates(network).items()}
        self.activations = {id(gate): name for name, gate in activation_gates(network).items()}
        self.sums: dict[Kind, dict[str, dict[int, float]]] = {
            kind: {name: dict.fromkeys(table, 0.0) for name, table in of_kind.items()}
            for kind, of_kind in forms.items()
        }
        self.squares: dict[str, Tensor] = {}
        self.rows: dict[str, list[Tensor]] = {name: [] for name in prunable}
        self.axes = {groups[name].axis: name for name in self.rows}
        self.types = {node.name: dims for node, dims in groups.inference.dims.items()}
        self.layers: list[tuple[fx.Node, dict[str, Tensor], tuple[Any, ...], dict[str, Any], Tensor]] = []
        self.tensors: list[tuple[str, str, Tensor]] = []

    def begin(self, images: int) -> None:
        self.images = images
        self.layers.clear()
        self.tensors.clear()

    def run_node(self, n: fx.Node) -> Any:
        module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        if id(module) in self.activations:
            x = self.env[n.args[0]]  # type: ignore[index]
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            x = x.view_as(x)  # reason: what reads the tensor past the gate has no part in this gradient
            x.retain_grad()
            self.tensors.append((self.activations[id(module)], self._source(n).name, x))
            return x
        result = super().run_node(n)
        read = {self.weights[id(m)]: self.env[a] for a, m in self._gates(n) if id(m) in self.weights}
        if read and n.op != "call_module" and isinstance(result, Tensor) and result.requires_grad:
            result.retain_grad()
            self.layers.append((n, read, *self.fetch_args_kwargs_from_env(n), result))
        return result

    def _gates(self, node: fx.Node) -> Iterable[tuple[fx.Node, Any]]:
        for source in node.all_input_nodes:
            if source.op == "call_module":
                yield source, self.fetch_attr(str(source.target))

    def _source(self, gate: fx.Node) -> fx.Node:
        source: Any = gate.args[0]
        while source.name not in self.types:  # a masked form of a tensor
            source = source.args[0]
        return source

    @torch.no_grad()
    def end(self) -> None:
        for node, read, args, kwargs, y in reversed(self.layers):  # an error names the layer where it begins
            grad = self._gradient(y, node.name)
            for name, weight in read.items():
                if node.target in WITH_BIAS:
                    channel = grad.ndim - 1 if node.target is aten.linear.default else 1
                    squares = grad.double().square().sum([i for i in range(grad.ndim) if i != channel]).cpu()
                    self.squares[name] = self.squares.get(name, 0) + squares
                for bits, form in self.forms["weight"].get(name, {}).items():
                    changed = form(weight)
                    swap = lambda a, w=weight, c=changed: c if a is w else a  # noqa: E731
                    other = node.target(*fx.node.map_aggregate(args, swap), **kwargs)
                    self._add("weight", name, bits, grad * (other - y))
        rows = {name: torch.zeros(self.images, axis.size) for axis, name in self.axes.items()}
        for name, source, x in self.tensors:
            grad = self._gradient(x, name)
            for bits, form in self.forms["activation"].get(name, {}).items():
                self._add("activation", name, bits, grad * (form(x) - x))
            self._channels(source, grad, x, rows)
        for name, row in rows.items():
            self.rows[name].append(row)

    def _gradient(self, x: Tensor, name: str) -> Tensor:
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        if not bool(torch.isfinite(grad).all()):
            raise WeightsError(
                f"the gradient at {name!r} is NaN or Inf although the loss is finite; the model overflows there",
                names=[name],
            )
        return grad

    def _add(self, kind: Kind, name: str, bits: int, products: Tensor) -> None:
        # reason: batches of windows or tokens keep the image as the slowest index
        images = self._images(products)
        squares = products.reshape(images, -1).sum(1).double().square()
        self.sums[kind][name][bits] += float(squares.sum()) * (images / self.images)

    def _images(self, x: Tensor) -> int:
        """How many images a tensor tells apart: all, or one where it comes from an input that is the same for all."""
        return self.images if x.numel() % self.images == 0 else 1

    def _channels(self, source: str, grad: Tensor, x: Tensor, rows_of: dict[str, Tensor]) -> None:
        """What goes with a channel is all that layers read of it, less its mean, which biases take over."""
        for i, dim in enumerate(self.types[source]):
            if not any(axis in self.axes for axis in d.axes(dim)):
                continue
            place, own, values, slopes = i, dim, x, grad
            if d.resolve(dim).size != x.shape[i]:  # images times channels, as where each image has a kernel of its own
                place, own = max(1, i), _of_an_image(dim)
                values, slopes = (_by_image(t, i, self.images) for t in (x, grad))
            others = [k for k in range(values.ndim) if k != place]
            products = -slopes * (values - values.mean(others, keepdim=True))
            images = self._images(products.select(place, 0))
            rows = products.movedim(place, -1).reshape(images, -1, values.shape[place]).sum(1).cpu()
            rows = rows * (images / self.images)
            for axis, part in _along(own, rows):
                if axis in self.axes:
                    rows_of[self.axes[axis]] += part


def _of_an_image(dim: Dim) -> Dim:
    """A dimension of images times coordinates, without the images."""
    whole = d.resolve(dim)
    assert isinstance(whole, d.Prod)
    return d.product(whole.factors[1:])


def _by_image(x: Tensor, place: int, images: int) -> Tensor:
    """The images that are the slowest part of a dimension in front, (images, ...)."""
    parts = x.unflatten(place, (images, -1)).movedim(place, 0)
    return parts.flatten(0, 1) if place else parts


def _along(dim: Dim, rows: Tensor) -> Iterable[tuple[Axis, Tensor]]:
    """Rows (images, size of a dimension) as (images, size of an axis), for each axis the dimension is made of."""
    dim = d.resolve(dim)
    if isinstance(dim, Axis):
        yield dim, rows
    elif isinstance(dim, d.Sum):
        for item, part in zip(dim.items, rows.split([item.size for item in dim.items], 1), strict=True):
            yield from _along(item, part)
    elif isinstance(dim, d.Prod):
        grid = rows.reshape(len(rows), *(f.size for f in dim.factors))
        for i, factor in enumerate(dim.factors):
            yield from _along(factor, grid.movedim(i + 1, 1).flatten(2).sum(2))
