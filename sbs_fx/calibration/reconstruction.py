"""`reconstruct`: a calibrated network brought back towards the float one, block by block, without labels or training.

In: a gated graph (slim, bits fixed, calibrated), the float graph it came from, a few hundred images. Out: the same
graph, with batch-norm statistics, biases, ranges and rounding of its own, in place. Sources: block-wise reconstruction
(BRECQ, arXiv 2102.05426), adaptive rounding with a straight-through gradient (AdaQuant, arXiv 2006.10518), bias
correction (arXiv 1906.04721), learned steps (arXiv 1902.08153). Each block reads what the quantised network before it
gives, and is brought towards what the float network gives at its end.
Holds: no block is left worse than it was on these images; a weight that moved is a level of its gate, at most a step
and the rounding of it away, so `finalize` gives the same codes; the same seed gives the same network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx, nn

from sbs_fx.calibration.blocks import cut_points, subgraph
from sbs_fx.calibration.rounding import weight_parameters
from sbs_fx.data.batches import read_batches, start_epoch
from sbs_fx.passes import ChannelGroups, channel_gates, weight_gates
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.plan import Value
from sbs_fx.plan.errors import GraphError, InputError
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.training.evaluation import mode

aten = torch.ops.aten


class Reconstruction(Value):
    """Settings of `reconstruct`.

    Attributes:
        images: read from the data. batch: images of one step.
        steps: of the gradient, in each block; 0: statistics and biases alone.
        tolerance: a block is left as it is where its mean squared error is a smaller share of what the float network
            gives, squared. At 8 bits that is 1e-4 to 1e-3, of which so few images mend a tenth.
        weight_rate: of weights, in steps of their grid. range_rate, affine_rate: of ranges, and of biases and norms, as
            a share of their size. All fall to zero as a cosine.
    """

    _error = InputError

    images: int = Field(default=1024, ge=1)
    batch: int = Field(default=64, ge=1)
    steps: int = Field(default=200, ge=0)
    tolerance: float = Field(default=2e-3, ge=0)
    weight_rate: float = Field(default=0.1, gt=0)
    range_rate: float = Field(default=0.005, gt=0)
    affine_rate: float = Field(default=0.002, gt=0)


@dataclass(frozen=True)
class Reconstructed:
    """A block, named by the tensors at its end: its mean squared error before and after."""

    ends: tuple[str, ...]
    before: float
    after: float


def reconstruct(
    gated: fx.GraphModule,
    teacher: fx.GraphModule,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    groups: ChannelGroups,
    kept: Mapping[str, Sequence[int]] | None = None,
    settings: Reconstruction | None = None,
    seed: int = 0,
) -> list[Reconstructed]:
    """Reconstruct in place.

    Args:
        gated: from `insert_gates(..., channels=False)` on the slim graph, bits fixed, calibrated.
        teacher: the traced float graph, which `groups` was found on. kept: coordinates by group that are left in gated.
        data: yields (images, labels), images, or tuples of inputs; labels are not read. inputs: example inputs.
        seed: of the order of images.

    Raises:
        DataError: no batch, or one of another form. GraphError: gated has channel gates, or gates that still search.
    """
    settings = settings or Reconstruction()
    if channel_gates(gated) or any(gate.bits is None for gate in weight_gates(gated).values()):
        raise GraphError("reconstruction takes a slim graph whose bits are fixed", pass_name="reconstruct")
    work = _Work(gated, teacher, Slices(groups, kept or {}), settings, seed)
    images = _images(data, inputs, settings.images)
    begin: str | None = None
    inputs_now, float_inputs = images, images  # what the block reads in the gated network, and in the float one
    rows = []
    requires = {p: p.requires_grad for p in gated.parameters()}
    try:
        with mode(gated, training=False):
            for ends in _ends(gated, groups):
                row, given_next, wanted_next = work.reconstruct(begin, ends, inputs_now, float_inputs)
                rows.append(row)
                begin = ends[0]
                inputs_now, float_inputs = [*images, given_next[0]], [*images, wanted_next[0]]
    finally:
        for parameter, value in requires.items():
            parameter.requires_grad_(value)
            parameter.grad = None
    return rows


def _images(data: Iterable[Any], inputs: Sequence[Tensor], count: int) -> list[Tensor]:
    """The first `count` examples, one tensor for each input."""
    start_epoch(data, 0)
    parts: list[tuple[Tensor, ...]] = []
    for _, tensors, _ in read_batches(data, inputs=len(inputs)):
        parts.append(tensors)
        if sum(len(p[0]) for p in parts) >= count:
            break
    return [
        torch.cat([p[i] for p in parts])[:count].to(example.device, example.dtype) for i, example in enumerate(inputs)
    ]


def _ends(gated: fx.GraphModule, groups: ChannelGroups) -> list[tuple[str, ...]]:
    """Ends of all blocks, tensors that the float graph has too; the last are those of the graph."""
    leaves = tuple(node.name for node in next(iter(gated.graph.find_nodes(op="output"))).all_input_nodes)
    cuts = cut_points(gated, groups.inference.layers, _alike(groups))
    return [*((cut,) for cut in cuts if cut not in leaves), leaves]


def _alike(groups: ChannelGroups) -> set[str]:
    """Nodes that give in a slim graph what they give in the float graph, at the kept coordinates."""
    # reason: an operator that runs at full width gives all coordinates, of which some mean nothing
    return {node.name for node in groups.inference.dims if node.name not in groups.inference.adapters}


class _Work:
    def __init__(
        self, gated: fx.GraphModule, teacher: fx.GraphModule, index: Slices, settings: Reconstruction, seed: int
    ) -> None:
        self.gated, self.teacher, self.index, self.settings = gated, teacher, index, settings
        self.types = {node.name: dims for node, dims in index.groups.inference.dims.items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.names = {id(gate): name for name, gate in weight_gates(gated).items()}
        self.parameters = weight_parameters(gated)
        self.calls, self.alike = _calls(gated), _alike(index.groups)

    def reconstruct(
        self, begin: str | None, ends: tuple[str, ...], inputs_now: list[Tensor], float_inputs: list[Tensor]
    ) -> tuple[Reconstructed, list[Tensor], list[Tensor]]:
        """One block; also what it gives now and what the float network gives at its ends."""
        float_ends = self._run(subgraph(self.teacher, begin, ends), float_inputs)
        targets = [self.index.select(y, self.types[end]) for end, y in zip(ends, float_ends, strict=True)]
        part = subgraph(self.gated, begin, ends)
        results = self._run(part, inputs_now)
        before = best = _error(results, targets)
        if before <= self.settings.tolerance * sum(float(t.square().mean()) for t in targets):
            return Reconstructed(ends, before, before), results, float_ends
        state = {k: v.clone() for k, v in part.state_dict().items() if isinstance(v, Tensor)}
        for change in (self._norms, self._biases, self._reconstruct):
            change(part, begin, inputs_now, float_inputs, targets)
            changed = self._run(part, inputs_now)
            if (after := _error(changed, targets)) < best:
                best, results = after, changed
                state = {k: v.clone() for k, v in part.state_dict().items() if isinstance(v, Tensor)}
            else:
                part.load_state_dict(state)
        return Reconstructed(ends, before, best), results, float_ends

    @torch.no_grad()
    def _run(self, part: fx.GraphModule, inputs_now: Sequence[Tensor]) -> list[Tensor]:
        batches = zip(*(x.split(self.settings.batch) for x in inputs_now), strict=True)
        return [torch.cat(ys) for ys in zip(*(part(*xs) for xs in batches), strict=True)]

    # -- closed form ---------------------------------------------------------------------------------------------------

    def _norms(self, part: fx.GraphModule, begin: str | None, inputs_now: list[Tensor], *_: Any) -> None:
        """Statistics of batch norms as the mean over all batches of what they meet now."""
        norms = {m: m.momentum for m in part.modules() if isinstance(m, BatchNorm)}
        batches = list(zip(*(x.split(self.settings.batch) for x in inputs_now), strict=True))
        for index, xs in enumerate(batches if norms else ()):
            for module in norms:
                module.train()
                module.momentum = 1 / (index + 1)
            with torch.no_grad():
                part(*xs)
        for module, momentum in norms.items():
            module.eval()
            module.momentum = momentum

    def _biases(
        self, part: fx.GraphModule, begin: str | None, inputs_now: list[Tensor], float_inputs: list[Tensor], _: Any
    ) -> None:
        """Biases of layers and batch norms, one after the other, so that the mean of each output channel is right."""
        for node in list(part.graph.nodes):
            name = _bias(part, node)
            if name is None or node.name not in self.alike or not self._owns(part, name):
                continue
            mean = self._run(subgraph(self.teacher, begin, [node.name]), float_inputs)[0]
            mean = self.index.select(mean, self.types[node.name])
            off = mean - self._run(subgraph(self.gated, begin, [node.name]), inputs_now)[0]
            channel = off.ndim - 1 if node.target is aten.linear.default else 1
            bias = part.get_parameter(name)
            with torch.no_grad():
                bias.add_(off.mean([i for i in range(off.ndim) if i != channel]).to(bias.dtype))

    # -- by gradient ---------------------------------------------------------------------------------------------------

    def _reconstruct(
        self,
        part: fx.GraphModule,
        begin: str | None,
        inputs_now: list[Tensor],
        float_inputs: list[Tensor],
        targets: list[Tensor],
    ) -> None:
        """Adam on weights (straight through their rounding), ranges, biases and norms, on the squared error."""
        s = self.settings
        rates, weights = self._variables(part)
        if not rates or not s.steps:
            return
        optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates])
        count, batch = len(inputs_now[0]), min(s.batch, len(inputs_now[0]))
        scale = [1 / float(t.square().mean().clamp_min(1e-30)) for t in targets]
        for step in range(s.steps):
            chosen = torch.randperm(count, generator=self.generator)[:batch].to(inputs_now[0].device)
            outputs = part(*(x[chosen] for x in inputs_now))
            loss = torch.stack(
                [k * (y - t[chosen]).square().mean() for y, t, k in zip(outputs, targets, scale, strict=True)]
            ).sum()
            optimiser.zero_grad()
            loss.backward()
            for group, (_, rate) in zip(optimiser.param_groups, rates, strict=True):
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / s.steps))
            optimiser.step()
            with torch.no_grad():
                for weight, (low, high) in weights.items():
                    weight.copy_(torch.minimum(torch.maximum(weight, low), high))
        with torch.no_grad():
            for name, gate in self._gates(part, weights):
                self.parameters[name].copy_(gate(self.parameters[name]))

    def _variables(
        self, part: fx.GraphModule
    ) -> tuple[list[tuple[nn.Parameter, float]], dict[nn.Parameter, tuple[Tensor, Tensor]]]:
        """Parameters with their rates, and the bounds of weights, one step on either side of the float weight."""
        s = self.settings
        rates: list[tuple[nn.Parameter, float]] = []
        weights: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        for name, gate in part.named_modules():
            if not isinstance(gate, SuperBitQuantizer) or gate.is_float or not self._owns(part, name):
                continue
            rates.append((gate.range, s.range_rate * float(gate.range.detach().abs().mean())))
            weight = self.parameters.get(self.names.get(id(gate), ""))
            if weight is not None:
                step = gate._along(gate.scale(), weight)
                weights[weight] = (weight.detach() - step, weight.detach() + step)
                rates.append((weight, s.weight_rate * float(gate.scale().mean())))
        for name, parameter in part.named_parameters():
            parameter.requires_grad_(False)
            if parameter.ndim == 1 and not name.startswith(("weight_gates", "activation_gates")):
                size = float(parameter.detach().square().mean().sqrt())
                if size > 0 and self._owns(part, name):
                    rates.append((parameter, s.affine_rate * size))
        for parameter, _ in rates:
            parameter.requires_grad_(True)
        return rates, weights

    def _gates(self, part: fx.GraphModule, weights: Mapping[Any, Any]) -> list[tuple[str, SuperBitQuantizer]]:
        gates = [(self.names.get(id(m), ""), m) for m in part.modules() if isinstance(m, SuperBitQuantizer)]
        return [(n, m) for n, m in gates if n in self.parameters and self.parameters[n] in weights]

    def _owns(self, part: fx.GraphModule, name: str) -> bool:
        """Whether a parameter or gate is read in this block alone."""
        return _calls(part).get(name) == self.calls.get(name)


def _calls(graph_module: fx.GraphModule) -> dict[str, int]:
    """How often each module is called and each parameter read."""
    counts: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            times = len(node.users) if node.op == "get_attr" else 1
            counts[str(node.target)] = counts.get(str(node.target), 0) + times
    return counts


def _bias(part: fx.GraphModule, node: fx.Node) -> str | None:
    """The parameter that is added to each channel of a layer or batch norm, if it has one."""
    is_norm = node.op == "call_module" and isinstance(part.get_submodule(str(node.target)), BatchNorm)
    is_layer = node.target in (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    bias = node.args[2] if (is_norm or is_layer) and len(node.args) > 2 else None
    return str(bias.target) if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def _error(results: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    errors = [float((y - t).square().mean()) for y, t in zip(results, targets, strict=True)]
    total = sum(errors)
    return total if total == total else math.inf
