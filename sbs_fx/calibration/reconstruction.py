"""`reconstruct`: a calibrated network brought back towards the float one, block by block, without labels or training.

In: a gated graph (slim, bits fixed, calibrated), the float graph it came from, a few hundred images. Out: the same
graph, with weights, biases and ranges of its own, in place. Each block reads what the quantised, pruned network before
it gives, and is brought towards what the float network gives at its end: its layers in closed form (`Refits`), then,
if steps are asked for, by gradient: block-wise reconstruction (BRECQ, arXiv 2102.05426), adaptive rounding with a
straight-through gradient (AdaQuant, arXiv 2006.10518), learned steps (arXiv 1902.08153).
Holds: no block is left worse than it was on the images that judge; a weight that moved is a level of its gate, so
`finalize` gives the same codes; the same seed gives the same network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbs_fx.calibration.blocks import alike, cut_points, results, subgraph
from sbs_fx.calibration.closed_form import Refits
from sbs_fx.calibration.rounding import DAMPING, weight_parameters
from sbs_fx.data.batches import Tensors, in_cache, joined_inputs, read_batches, split_inputs, start_epoch
from sbs_fx.passes import ChannelGroups, channel_gates, weight_gates
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.plan import Settings
from sbs_fx.plan.errors import GraphError
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.training.evaluation import mode

_IMAGES, _NUMBERS = 1024, 256 * 3 * 224 * 224
_HELD_OUT = 8  # batches, of which one is kept for judging


class Reconstruction(Settings):
    """Settings of `reconstruct`.

    Attributes:
        images: read from the data; None: 1,024, but no more than 256 of 224 x 224 pixels. batch: images of one step.
        steps: of the gradient, in each block, behind the closed form; 0: none.
        damping: what draws a refitted weight to the given one, as a share of the mean second moment of its inputs.
        tolerance: a block is left as it is where its mean squared error is a smaller share of what the float network
            gives, squared. At 8 bits that is 1e-4 to 1e-3, of which so few images mend a tenth.
        weight_rate: of weights, in steps of their grid. range_rate, affine_rate: of ranges, and of biases and norms, as
            a share of their size. All fall to zero as a cosine.
    """

    images: int | None = Field(default=None, ge=1)
    batch: int = Field(default=64, ge=1)
    steps: int = Field(default=0, ge=0)
    damping: float = Field(default=DAMPING, gt=0)
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
    step: Callable[[int, int], None] | None = None,
) -> list[Reconstructed]:
    """Reconstruct in place.

    Args:
        gated: from `insert_gates(..., channels=False)` on the slim graph, bits fixed, calibrated.
        teacher: the traced float graph, which `groups` was found on. kept: coordinates by group that are left in gated.
        data: yields (images, labels), images, or tuples of inputs; labels are not read. inputs: example inputs.
        seed: of the order of images. step: called with the number of each block as it begins, and how many there are.

    Raises:
        DataError: no batch, or one of another form. GraphError: gated has channel gates, or gates that still search.
    """
    settings = settings or Reconstruction()
    if channel_gates(gated) or any(gate.bits is None for gate in weight_gates(gated).values()):
        raise GraphError("reconstruction takes a slim graph whose bits are fixed", pass_name="reconstruct")
    work = _Work(gated, teacher, Slices(groups, kept or {}), settings, seed)
    images = _images(data, inputs, settings)
    begin: str | None = None
    now, real = images, list(images)  # what the block reads in the gated network, and in the float one
    rows = []
    requires = {p: p.requires_grad for p in gated.parameters()}
    state, whole = _state(gated), _ends(gated, groups)
    try:
        with mode(gated, training=False):
            before = work.error_of_all(images, whole[-1])
            for i, ends in enumerate(whole, 1):
                if step is not None:
                    step(i, len(whole))
                row, given, wanted = work.reconstruct(begin, ends, now, real)
                rows.append(row)
                begin = ends[0]
                now, real = ([(*x, y[0]) for x, y in zip(images, ys, strict=True)] for ys in (given, wanted))
            if rows[-1].after > before:  # reason: blocks that are each better need not be so together
                gated.load_state_dict(state)
                rows = [Reconstructed(row.ends, row.before, row.before) for row in rows]
    finally:
        for parameter, value in requires.items():
            parameter.requires_grad_(value)
            parameter.grad = None
    return rows


def _images(data: Iterable[Any], inputs: Sequence[Tensor], settings: Reconstruction) -> list[Tensors]:
    """The first examples in batches."""
    start_epoch(data, 0)
    numbers = max(x[:1].numel() for x in inputs)
    parts, count = list[Tensors](), settings.images or max(1, min(_IMAGES, _NUMBERS // numbers))
    for _, tensors, _ in read_batches(data, inputs=len(inputs)):
        parts.append(split_inputs(tensors, count)[0])
        count -= len(parts[-1][0])
        if count <= 0:
            break
    joined = joined_inputs(parts)
    moved = tuple(x.to(e.device, e.dtype) for x, e in zip(joined, inputs, strict=True))
    return [part for batch in split_inputs(moved, settings.batch) for part in in_cache(batch)]


def _ends(gated: fx.GraphModule, groups: ChannelGroups) -> list[tuple[str, ...]]:
    """Ends of all blocks, tensors that the float graph has too; the last are those of the graph."""
    leaves = tuple(node.name for node in next(iter(gated.graph.find_nodes(op="output"))).all_input_nodes)
    cuts = cut_points(gated, groups.inference.layers, alike(groups))
    return [*((cut,) for cut in cuts if cut not in leaves), leaves]


class _Work:
    def __init__(
        self, gated: fx.GraphModule, teacher: fx.GraphModule, index: Slices, settings: Reconstruction, seed: int
    ) -> None:
        self.gated, self.teacher, self.index, self.settings = gated, teacher, index, settings
        self.types = {node.name: dims for node, dims in index.groups.inference.dims.items()}
        self.generator = torch.Generator().manual_seed(seed)
        self.names = {id(gate): name for name, gate in weight_gates(gated).items()}
        self.parameters = weight_parameters(gated)
        self.calls = _calls(gated)
        self.refits = Refits(gated, teacher, index, seed, settings.damping)

    def error_of_all(self, images: list[Tensors], ends: tuple[str, ...]) -> float:
        """Of the whole network on the batches that judge."""
        judged = images[self._fitted(images) :]
        wanted, given = (self._run(subgraph(g, None, ends), judged) for g in (self.teacher, self.gated))
        return _error(given, self._targets(wanted, ends))

    def _targets(self, wanted: Sequence[Tensors], ends: Sequence[str]) -> list[Tensors]:
        """Tensors of the float network at the coordinates that the gated one has kept."""
        types = [self.types[end] for end in ends]
        return [tuple(self.index.select(y, t) for y, t in zip(ys, types, strict=True)) for ys in wanted]

    @staticmethod
    def _fitted(batches: Sequence[Any]) -> int:
        """How many batches are fitted on; the last ones judge. 0: all do both, as they are few."""
        return len(batches) - len(batches) // _HELD_OUT if len(batches) >= _HELD_OUT else 0

    def reconstruct(
        self, begin: str | None, ends: tuple[str, ...], now: list[Tensors], real: list[Tensors]
    ) -> tuple[Reconstructed, list[Tensors], list[Tensors]]:
        """One block; also what it gives now and what the float network gives at its ends, batch by batch. `real` is
        emptied where nothing reads it again: it takes as much as any of the others."""
        wanted, observed = self.refits.observe(begin, ends, real)
        targets = self._targets(wanted, ends)
        part, fitted = subgraph(self.gated, begin, ends), self._fitted(now)
        if not any(node.name in self.refits.affine for node in part.graph.nodes):
            real.clear()
        before = best = _error(self._run(part, now[fitted:]), targets[fitted:])
        signal = _error([tuple(torch.zeros_like(t) for t in ts) for ts in targets[fitted:]], targets[fitted:])
        if before <= self.settings.tolerance * signal:
            return Reconstructed(ends, before, before), self._run(part, now), wanted
        state, fit, given = _state(part), fitted or len(now), None
        steps = [lambda: self.refits(part, begin, now[:fit], real[:fit], observed)]
        steps += [lambda: self._by_gradient(part, now[:fit], targets[:fit])] if self.settings.steps else []
        for step in steps:
            step()
            changed = self._run(part, now)
            if (after := _error(changed[fitted:], targets[fitted:])) < best:
                best, state, given = after, _state(part), changed
            else:
                part.load_state_dict(state)
        return Reconstructed(ends, before, best), given or self._run(part, now), wanted

    @staticmethod
    def _run(part: fx.GraphModule, batches: Sequence[Tensors]) -> list[Tensors]:
        return list(results(part, batches))

    # -- by gradient ---------------------------------------------------------------------------------------------------

    def _by_gradient(self, part: fx.GraphModule, now: list[Tensors], targets: list[Tensors]) -> None:
        """Adam on weights (straight through their rounding), ranges, biases and norms, on the squared error."""
        s = self.settings
        rates, weights = self._variables(part)
        if not rates:
            return
        inputs, wanted = joined_inputs(now), joined_inputs(targets)
        optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates])
        count = len(inputs[0])
        scale = [1 / float(t.square().mean().clamp_min(1e-30)) for t in wanted]
        for step in range(s.steps):
            chosen = torch.randperm(count, generator=self.generator)[: s.batch].to(inputs[0].device)
            outputs = part(*(x[chosen] if len(x) == count else x for x in inputs))
            loss = torch.stack(
                [k * (y - t[chosen]).square().mean() for y, t, k in zip(outputs, wanted, scale, strict=True)]
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
    """How often each module is called, and how often each parameter and what a gate gives is read."""
    counts: dict[str, int] = {}
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            is_call = node.op == "call_module" and not isinstance(
                graph_module.get_submodule(str(node.target)), SuperBitQuantizer
            )
            counts[str(node.target)] = counts.get(str(node.target), 0) + (1 if is_call else len(node.users))
    return counts


def _state(part: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in part.state_dict().items() if isinstance(value, Tensor)}


def _error(results: Sequence[Tensors], targets: Sequence[Tensors]) -> float:
    """Mean squared error of the tensors at the ends, added up."""
    total = 0.0
    for ys, ts in zip(results, targets, strict=True):
        total += sum(float(F.mse_loss(y, t)) * len(y) for y, t in zip(ys, ts, strict=True))
    total /= sum(len(ys[0]) for ys in results)
    return total if total == total else math.inf
