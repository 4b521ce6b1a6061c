"""`calibrate`: give every gate of fixed bitwidth the range it clips to.

In: a gated graph with its bits fixed, and batches of images or none. Out: the same graph, `range` set in every gate
that has 2 to 8 bits. Holds: the same data gives the same ranges; memory does not grow with the number of batches;
torch's random state, the mode of the graph and its batch-norm statistics stay as they were.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.calibration.synthetic import Bounds, bounds_of, synthetic
from sbs_fx.data.batches import in_cache, read_batches, start_epoch
from sbs_fx.passes.channels.facts import facts_of
from sbs_fx.passes.gates.insertion import BatchNorm, activation_gates, weight_gates
from sbs_fx.passes.static.fold import Constants, batch_norm_folds
from sbs_fx.plan.errors import DataError, InputError, MethodError, WeightsError
from sbs_fx.quantizer.ranges import SAMPLED, Histogram, set_range, weight_top
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten

Inputs = tuple[Tensor, ...]  # a batch as the graph takes it

METHODS = ("mse", "minmax", "percentile")
# Standard deviations of a batch norm's output that a range takes in. 3 to 6 were tried on a residual network for
# CIFAR-10: at 8-bit activations all within 0.5 points; at 4 bits "minmax" was best with 4 and 1.7 points worse with 6.
SPREAD = 4.0
_STATISTICS = 16  # values of a channel that are too few for a batch norm's statistics
_POINTS = 65  # of the distribution that stands for a batch norm's output


def calibrate(
    gated: fx.GraphModule,
    data: Iterable[Any] | None = None,
    *,
    inputs: Sequence[Tensor],
    method: str = "mse",
    max_batches: int = 8,
    percentile: float = 99.99,
    spread: float = SPREAD,
) -> None:
    """Set the range of every weight and activation gate that is fixed below 32 bits, in place.

    | method       | activations: the outermost level stands for | weights, channel by channel |
    |--------------|---------------------------------------------|-----------------------------|
    | "mse"        | the value of least error at the gate's bits | the same                    |
    | "minmax"     | the largest absolute value                  | the same                    |
    | "percentile" | a percentile of absolute values             | as "mse"                    |

    The float network is run, gates pass their input on. A gate that is still searching gets the range of its middle
    candidate. Without data, synthetic normal input is run with every batch norm on the batch's own statistics, so that
    its outputs have the spread they had in training; and for a batch norm's output, and what elementwise functions, max
    pools and reshapes make of it, the distribution is taken from beta and gamma themselves: channel c is normal with
    mean beta_c and deviation |gamma_c|, cut at `spread` deviations (after arXiv 1906.04721).

    Args:
        gated: from `insert_gates`, bits applied.
        data: yields (images, labels), images, or tuples of inputs, floating images normalised; None: data-free.
        inputs: example inputs of the graph; they give shapes, dtypes and device.
        max_batches: how many batches are used at most.
        percentile: above 50, at most 100; 100 is "minmax".

    Raises:
        MethodError: unknown method. InputError: number of example inputs. WeightsError: NaN or Inf in a weight.
        DataError: no batch, an iterable that raises, NaN or Inf or images of another shape (each names the batch).
    """
    if method not in METHODS:
        raise MethodError(f"unknown calibration method {method!r}; expected one of {METHODS}", known=METHODS)
    if not 50 < percentile <= 100:
        raise InputError(f"percentile {percentile}; expected above 50, at most 100")
    observe(gated, data, inputs=inputs, max_batches=max_batches, spread=spread).set_ranges(method, percentile)


def observe(
    gated: fx.GraphModule,
    data: Iterable[Any] | None = None,
    *,
    inputs: Sequence[Tensor],
    max_batches: int = 8,
    spread: float = SPREAD,
) -> Observations:
    """What `calibrate` sets ranges from: one run serves any bitwidths that the gates are then fixed at.

    Tensors whose gate passes floats while it runs are not observed. Arguments and errors are those of `calibrate`.
    """
    if max_batches < 1 or not spread > 0:
        raise InputError(f"max_batches {max_batches}, spread {spread}; expected at least 1, above 0")
    expected = len(gated.graph.find_nodes(op="placeholder"))
    if len(inputs) != expected:
        raise InputError(f"{len(inputs)} example inputs for a graph that takes {expected}; give one tensor for each")
    batches = calibration_batches(data, inputs, max_batches, least=_fewest_images(gated), bounds=bounds_of(gated))
    observations = Observations(gated, spread if data is None else None)
    modes = {module: module.training for module in gated.modules()}
    gated.eval()
    try:
        with torch.no_grad():
            for index, batch in enumerate(batches):
                for part in [batch] if data is None else in_cache(batch):
                    observations.add(index, part)
    finally:
        for module, training in modes.items():
            module.training = training
    return observations


# Input


def calibration_batches(
    data: Iterable[Any] | None,
    inputs: Sequence[Tensor],
    max_batches: int,
    *,
    least: int = 1,
    bounds: Bounds | None = None,
) -> Iterator[Inputs]:
    """Batches as the graph takes them: of the data, or synthetic ones of at least that many images, within `bounds`.
    Raises DataError as `calibrate` does."""
    if data is None:
        return synthetic(inputs, max_batches, least, bounds)
    start_epoch(data, 0)
    return _checked(data, inputs, max_batches)


def _checked(data: Iterable[Any], inputs: Sequence[Tensor], max_batches: int) -> Iterator[Inputs]:
    for index, tensors, _ in read_batches(data, inputs=len(inputs), max_batches=max_batches):
        for x, example in zip(tensors, inputs, strict=True):
            if x.shape[1:] != example.shape[1:]:
                raise DataError(
                    f"batch {index} has shape {tuple(x.shape)}; the graph takes "
                    f"(batch, {', '.join(str(int(s)) for s in example.shape[1:])})"
                )
            if x.is_floating_point() != example.is_floating_point():
                raise DataError(
                    f"batch {index} has dtype {x.dtype}, the graph takes {example.dtype}; images must be "
                    "normalised, as the model was trained"
                )
            if x.is_floating_point() and not bool(torch.isfinite(x).all()):
                raise DataError(f"NaN or Inf in batch {index} of the calibration data; drop or mend that batch")
        yield tuple(x.to(e.device, e.dtype) for x, e in zip(tensors, inputs, strict=True))


def _fewest_images(gated: fx.GraphModule) -> int:
    """How many images a batch needs for batch norms to have statistics: one, or two if one has next to no other
    dimensions to take them over (behind a global pooling). What is large is a batch of large images."""
    for node in gated.graph.find_nodes(op="call_module"):
        if isinstance(gated.get_submodule(str(node.target)), BatchNorm):
            sizes = (size if isinstance(size, int) else _STATISTICS for size in node.meta["val"].shape[2:])
            if math.prod(sizes) < _STATISTICS:
                return 2
    return 1


# The run


class Observations(fx.Interpreter):
    """Runs the float graph and keeps the values of weights, from the first batch, and histograms of activations.

    With `spread` (data-free), batch norms use the batch's statistics, and `known` maps a node to the values that its
    channels take at a grid of deviations, shape (points, channels), wherever beta and gamma determine them.
    """

    def __init__(self, gated: fx.GraphModule, spread: float | None) -> None:
        super().__init__(gated)
        self.weights = {id(gate): (name, gate) for name, gate in weight_gates(gated).items()}
        self.activations = {id(gate): (name, gate) for name, gate in activation_gates(gated).items()}
        self.values: dict[int, Tensor] = {}  # of weights
        self.histograms: dict[int, Histogram] = {}
        self.batch = 0
        self.deviations = None if spread is None else torch.linspace(-spread, spread, _POINTS)[:, None]
        self.known: dict[fx.Node, Tensor] = {}
        self.analytic: set[int] = set()

    def add(self, index: int, batch: Inputs) -> None:
        self.batch = index
        self.run(*batch)

    @torch.no_grad()
    def set_ranges(self, method: str = "mse", percentile: float = 99.99) -> None:
        """The range of each observed gate that rounds, at the bits it now has; as `calibrate` does."""
        for key, (_, gate) in self.weights.items():
            if key in self.values and not gate.is_float:
                set_range(gate, weight_top(self.values[key], gate, method))
        for key, (_, gate) in self.activations.items():
            if key in self.histograms and not gate.is_float:
                self.histograms[key].set_range(gate, method, percentile)

    def analytic_histograms(self) -> dict[str, Histogram]:
        """Of all tensors whose distribution batch norms determine, by the names they have in the static graph, where a
        layer that a batch norm dissolves into gives what the norm gave; none where data was given."""
        if not self.known:
            return {}
        layers = {fold.norm: layer for layer, fold in batch_norm_folds(Constants(self.module)).items()}
        histograms: dict[str, Histogram] = {}
        for node, values in self.known.items():
            histogram = histograms[layers.get(node, node).name] = Histogram()
            histogram.add(values, self._density().expand_as(values))
        return histograms

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.deviations is not None and self.batch == 0:
            self._follow(n)
        return result

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if id(module) in self.weights:
            if self.batch == 0:
                self._keep(module, args[0])
            return args[0]
        if id(module) in self.activations:
            if id(module) not in self.analytic:
                self._count(module, args[0])
            return args[0]
        if self.deviations is not None and isinstance(module, BatchNorm):
            x, weight, bias = args[:3]
            return aten.batch_norm.default(x, weight, bias, None, None, True, module.momentum, module.eps, True)
        return super().call_module(target, args, dict(kwargs))

    def _keep(self, module: nn.Module, weight: Tensor) -> None:
        name, gate = self.weights[id(module)]
        if not gate.is_float and not bool(torch.isfinite(weight).all()):
            raise WeightsError(f"NaN or Inf in the weight {name!r}; mend the model before compressing it", names=[name])
        self.values[id(module)] = weight

    def _count(self, module: nn.Module, x: Tensor, weights: Tensor | None = None) -> None:
        name, gate = self.activations[id(module)]
        if not gate.is_float and not self.histograms.setdefault(id(module), Histogram(SAMPLED)).add(x, weights):
            cause = "this data" if self.deviations is None else "synthetic input: give data"
            raise DataError(
                f"the activation {name!r} is NaN or Inf at batch {self.batch}, whose input is finite; the "
                f"model overflows on {cause}"
            )

    def _follow(self, node: fx.Node) -> None:
        """Carry the distribution of a batch norm's output through what comes after it."""
        module = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, BatchNorm):
            self.known[node] = self._normal(node)
            return
        sources = node.all_input_nodes
        if not sources or not all(source in self.known for source in sources):
            return
        values, facts = [self.known[source] for source in sources], facts_of(node.target)
        if len(sources) > 1:
            if node.target is aten.add.Tensor and not node.kwargs and values[0].shape == values[1].shape:
                self.known[node] = self._sum(*values)
            return
        if facts.moves or self._is_mean(node) or isinstance(module, (nn.Dropout, SuperBitQuantizer)):
            self.known[node] = values[0]
        elif facts.elementwise:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda _: values[0])
            self.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if module is not None and id(module) in self.activations and id(module) not in self.analytic:
            self.analytic.add(id(module))
            self.histograms.pop(id(module), None)  # reason: the synthetic run has been here just before
            self._count(module, values[0], self._density().expand_as(values[0]))

    @staticmethod
    def _is_mean(node: fx.Node) -> bool:
        """Whether it takes the mean over places. Images differ in more than noise: it may be as far out as a value."""
        if facts_of(node.target).codes != "mean":
            return False
        rank = node.all_input_nodes[0].meta["val"].ndim
        dims: Any = node.args[1] if node.target is aten.mean.dim else ()
        return node.target is not aten.mean.default and all(dim % rank > 1 for dim in dims)

    def _sum(self, x: Tensor, y: Tensor) -> Tensor:
        """Of two that know nothing of each other: means add up, deviations as squares."""
        density = self._density() / self._density().sum()
        mean_x, mean_y = (x * density).sum(0), (y * density).sum(0)
        deviation = torch.hypot(x - mean_x, y - mean_y)
        return mean_x + mean_y + self.deviations.sign() * deviation  # type: ignore[union-attr]

    def _normal(self, node: fx.Node) -> Tensor:
        """beta + z * |gamma| at the deviations z, shape (points, channels)."""
        weight, bias = (self.env[a].detach().float().cpu() if isinstance(a, fx.Node) else None for a in node.args[1:3])
        gamma = torch.ones(node.meta["val"].shape[1]) if weight is None else weight.abs()
        values = self.deviations * gamma
        return values if bias is None else values + bias

    def _density(self) -> Tensor:
        """Of the normal distribution at the deviations, up to a factor, shape (points, 1)."""
        return (-0.5 * self.deviations.double().square()).exp()  # type: ignore[union-attr]
