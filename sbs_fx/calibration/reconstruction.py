"""`reconstruct`: a calibrated network brought back towards the float one, block by block, without labels or training.

In: a gated graph (slim, bits fixed, calibrated), the float graph it came from, a few hundred images. Out: the same
graph, with weights, biases and ranges of its own, in place. Each block reads what the quantised, pruned network before
it gives, and is brought towards what the float network gives at its end (BRECQ, arXiv 2102.05426): its layers in closed
form (`Refits`), then, if steps or time are asked for, by gradient in a second pass (`Tuner`).
Holds: no block is left worse than it was on the images that judge; a weight that moved is a level of its gate, so
`finalize` gives the same codes; the same seed gives the same network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sbs_fx.calibration.blocks import alike, cut_points, results, subgraph
from sbs_fx.calibration.closed_form import Refits
from sbs_fx.calibration.gradient import Tuner
from sbs_fx.calibration.settings import Reconstruction
from sbs_fx.data.batches import Tensors, in_cache, joined_inputs, read_batches, split_inputs, start_epoch
from sbs_fx.passes import ChannelGroups, channel_gates, weight_gates
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.plan.errors import GraphError
from sbs_fx.training.evaluation import mode

_IMAGES, _NUMBERS = 1024, 256 * 3 * 224 * 224
_HELD_OUT = 8  # batches, of which one is kept for judging


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
    deadline: float | None = None,
) -> list[Reconstructed]:
    """Reconstruct in place.

    Args:
        gated: from `insert_gates(..., channels=False)` on the slim graph, bits fixed, calibrated.
        teacher: the traced float graph, which `groups` was found on. kept: coordinates by group that are left in gated.
        data: yields (images, labels), images, or tuples of inputs; labels are not read. inputs: example inputs.
        seed: of the order of images. deadline: of `time.monotonic()`, until which blocks are tuned by gradient, each as
            long as the others; the closed form is not cut short.

    Raises:
        DataError: no batch, or one of another form. GraphError: gated has channel gates, or gates that still search.
    """
    settings = settings or Reconstruction()
    if channel_gates(gated) or any(gate.bits is None for gate in weight_gates(gated).values()):
        raise GraphError("reconstruction takes a slim graph whose bits are fixed", pass_name="reconstruct")
    work = _Work(gated, teacher, Slices(groups, kept or {}), settings, seed)
    images = _images(data, inputs, settings)
    requires = {p: p.requires_grad for p in gated.parameters()}
    state, whole = _state(gated), _ends(gated, groups)
    try:
        with mode(gated, training=False):
            before = work.error_of_all(images, whole[-1])
            rows = work.sweep(images, whole, None)
            if rows[-1].after > before:  # reason: blocks that are each better need not be so together
                gated.load_state_dict(state)
                rows = [Reconstructed(row.ends, row.before, row.before) for row in rows]
            if settings.steps or deadline is not None:
                state, before = _state(gated), work.error_of_all(images, whole[-1])
                tuner = Tuner(gated, settings, seed, deadline, len(whole))
                tuned = work.sweep(images, whole, tuner)
                if tuned[-1].after > before:
                    gated.load_state_dict(state)
                else:
                    rows = [
                        Reconstructed(row.ends, row.before, new.after) for row, new in zip(rows, tuned, strict=True)
                    ]
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

    def sweep(
        self, images: list[Tensors], whole: Sequence[tuple[str, ...]], tuner: Tuner | None
    ) -> list[Reconstructed]:
        """All blocks, from the input on: refitted, or tuned."""
        begin: str | None = None
        now, real = images, images  # what the block reads in the gated network, and in the float one
        rows = []
        for ends in whole:
            row, given, wanted = self._block(begin, ends, now, real, tuner)
            rows.append(row)
            begin = ends[0]
            now, real = ([(*x, y[0]) for x, y in zip(images, ys, strict=True)] for ys in (given, wanted))
        return rows

    def _block(
        self, begin: str | None, ends: tuple[str, ...], now: list[Tensors], real: list[Tensors], tuner: Tuner | None
    ) -> tuple[Reconstructed, list[Tensors], list[Tensors]]:
        """One block; also what it gives now and what the float network gives at its ends, batch by batch."""
        if tuner is None:
            wanted, observed = self.refits.observe(begin, ends, real)
        else:
            wanted, until = self._run(subgraph(self.teacher, begin, ends), real), tuner.until()
        targets = self._targets(wanted, ends)
        part, fitted = subgraph(self.gated, begin, ends), self._fitted(now)
        before = _error(self._run(part, now[fitted:]), targets[fitted:])
        signal = _error([tuple(torch.zeros_like(t) for t in ts) for ts in targets[fitted:]], targets[fitted:])
        if before <= self.settings.tolerance * signal:
            return Reconstructed(ends, before, before), self._run(part, now), wanted
        state, fit = _state(part), fitted or len(now)
        if tuner is None:
            self.refits(part, begin, now[:fit], real[:fit], observed)
        else:
            tuner(part, now[:fit], targets[:fit], until)
        given = self._run(part, now)
        if (after := _error(given[fitted:], targets[fitted:])) < before:
            return Reconstructed(ends, before, after), given, wanted
        part.load_state_dict(state)
        return Reconstructed(ends, before, before), self._run(part, now), wanted

    @staticmethod
    def _run(part: fx.GraphModule, batches: Sequence[Tensors]) -> list[Tensors]:
        return list(results(part, batches))


def _state(part: fx.GraphModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in part.state_dict().items() if isinstance(value, Tensor)}


def _error(results: Sequence[Tensors], targets: Sequence[Tensors]) -> float:
    """Mean squared error of the tensors at the ends, added up."""
    total = 0.0
    for ys, ts in zip(results, targets, strict=True):
        total += sum(float(F.mse_loss(y, t)) * len(y) for y, t in zip(ys, ts, strict=True))
    total /= sum(len(ys[0]) for ys in results)
    return total if total == total else math.inf
