"""What a report says of values: how far outputs are from the float network's, and what rounding does to each tensor.

In: the float graph, a few inputs; networks on their way to the static one. Out: rows of a report. Holds: networks are
left as they are; the same inputs give the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.data.batches import Tensors
from sbs_fx.passes import activation_gates, weight_gates
from sbs_fx.passes.dialects import gates_of
from sbs_fx.passes.folding import CONVOLUTIONS
from sbs_fx.passes.graph import channel_rows
from sbs_fx.plan.errors import InputError
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.report.data import StageRow, TensorRow
from sbs_fx.training.evaluation import mode, runs
from sbs_fx.training.task import task_of


class Fidelity:
    """Divergence of networks from the float one, stage by stage.

    Args:
        teacher: the float graph. inputs: a few batches.
    """

    def __init__(self, teacher: fx.GraphModule, inputs: Sequence[Tensors]) -> None:
        self.task, self.inputs, self.rows = task_of(teacher), inputs, list[StageRow]()
        outputs = _outputs(teacher, inputs)
        try:
            self.wanted = [self.task.reference(output) for output in outputs]
        except InputError:  # reason: outputs that are numbers alone, which nothing can be measured of
            self.inputs = ()
        self.classes = [self._classes(output) for output in outputs if self.inputs]
        self._since = time.perf_counter()

    def add(self, name: str, network: nn.Module) -> None:
        """What a network gives now, under the name of a stage; its seconds are those since the one before."""
        if not self.inputs:
            return
        now = time.perf_counter()
        outputs = _outputs(runs(network), self.inputs)
        pairs = list(zip(outputs, self.wanted, strict=True))
        sizes = [len(x[0]) for x in self.inputs]
        with torch.no_grad():
            parts = [float(self.task.divergence(y, w)) * n for (y, w), n in zip(pairs, sizes, strict=True)]
        divergence = sum(parts) / sum(sizes)
        same = None
        if self.task.is_categorical:
            equal = [self._classes(y) == c for y, c in zip(outputs, self.classes, strict=True)]
            same = float(torch.cat([e.flatten() for e in equal]).double().mean())
        if math.isfinite(divergence):
            self.rows.append(StageRow(name=name, divergence=divergence, same=same, seconds=now - self._since))
        self._since = time.perf_counter()

    def _classes(self, output: Any) -> Tensor:
        return self.task.tensors(output)[0].argmax(1) if self.task.is_categorical else torch.empty(0)


@torch.no_grad()
def tensors_of(gated: fx.GraphModule, inputs: Iterable[Tensors]) -> tuple[TensorRow, ...]:
    """What the gates of activations did to the inputs, those that round; in the order in which they run."""
    calls = {str(node.target): node for node in gated.graph.find_nodes(op="call_module")}
    gates, paths = activation_gates(gated), gates_of(gated).activations
    seen = {name: _Seen(gates[name], *_place(calls[path].users)) for name, path in paths.items() if path in calls}
    with mode(gated, training=False), _watched(seen):
        for batch in inputs:
            gated(*batch)
    return tuple(s.row(name) for name, s in seen.items() if s.count)


@torch.no_grad()
def weight_noise(gated: fx.GraphModule, inputs: Sequence[Tensors]) -> dict[str, float]:
    """Node of a layer -> signal to quantisation noise of its weight, dB; of weights that are rounded, with noise."""
    calls = {str(node.target): node for node in gated.graph.find_nodes(op="call_module")}
    gates, found = weight_gates(gated), dict[str, float]()
    seen = {
        reader.name: _Seen(gates[name], reader.name, None)
        for name, path in gates_of(gated).weights.items()
        for reader in (calls[path].users if path in calls else ())
    }
    with mode(gated, training=False), _watched(seen):
        for batch in inputs[:1]:
            gated(*batch)
    for name, s in seen.items():
        if s.count and (sqnr := s.row(name).sqnr) is not None:
            found[name] = sqnr
    return found


@contextmanager
def _watched(seen: dict[str, _Seen]) -> Iterator[None]:
    handles = [s.gate.register_forward_hook(s.add) for s in seen.values() if not s.gate.is_float]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Seen:
    """Sums over what passed a gate. channel: the dimension of channels, None where nobody reads it."""

    def __init__(self, gate: SuperBitQuantizer, reader: str, channel: int | None) -> None:
        self.gate, self.reader, self.channel = gate, reader, channel
        self.count, self.clipped, self.signal, self.noise = 0, 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf
        self.largest: Tensor | None = None

    def add(self, _: Any, args: tuple[Tensor, ...], given: Tensor) -> None:
        x = args[0].float()
        if not x.numel():
            return
        error = (given.float() - x).abs()
        self.count += x.numel()
        self.signal += float(x.double().square().sum())
        self.noise += float(error.double().square().sum())
        self.clipped += int((error > 0.51 * self.gate.scale().max()).sum())  # reason: a weight's are by channel
        self.low, self.high = min(self.low, float(x.min())), max(self.high, float(x.max()))
        if self.channel is not None and x.ndim > 1:
            most = channel_rows(x.abs(), self.channel).amax(1)
            self.largest = most if self.largest is None else torch.maximum(self.largest, most)

    def row(self, name: str) -> TensorRow:
        largest = torch.empty(0) if self.largest is None else self.largest
        live = largest[largest > 0]
        finite = self.noise > 0 and self.signal > 0 and math.isfinite(self.noise + self.signal)
        return TensorRow(
            name=name,
            reader=self.reader,
            bits=self.gate.decided_bits(),
            low=self.low,
            high=self.high,
            step=float(self.gate.scale().max()),
            sqnr=10 * math.log10(self.signal / self.noise) if finite else None,
            clipped=self.clipped / self.count,
            spread=float(live.max() / live.min()) if len(live) else 1.0,
            dead=len(largest) - len(live),
            channels=len(largest),
        )


def _place(users: Iterable[fx.Node]) -> tuple[str, int | None]:
    """The first layer that reads a tensor, and where it has its channels."""
    reader = next(iter(users), None)
    if reader is None:
        return "", None
    return reader.name, 1 if reader.target in CONVOLUTIONS else -1


def _outputs(network: nn.Module, inputs: Iterable[Tensors]) -> list[Any]:
    with mode(network, training=False), torch.no_grad():
        return [network(*batch) for batch in inputs]
