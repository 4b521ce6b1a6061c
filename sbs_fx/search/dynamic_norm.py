"""How good a policy is, predicted without training: its loss with batch-norm statistics of its own.

In: a searchable graph, quantised forms of its weights, ranges of its gates at every bitwidth, a batch of images. Out:
the divergence from the float model of any plan. Source: Dynamic BN (Pattern Recognition 140, 2023): mean
and variance re-estimated with the policy applied, then the loss on a small set [our reading]. Ours does both in one
pass, and moves the float model's statistics by what the policy changes on this batch: mean + (m - m_float), variance
times v / v_float. For a network's running statistics need not be those of any batch (the float model itself may lose
much with the batch's own), and what is to be predicted is what a policy does, not what another estimate does.
Holds: with every gate open nothing diverges; statistics stay; `reset` puts weights and gates back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.calibration.rounding import weight_parameters
from sbs_fx.data.batches import Tensors
from sbs_fx.passes import activation_gates, channel_gates, weight_gates
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.search.ranges import Ranges, put_at
from sbs_fx.search.refitted import Reading
from sbs_fx.training.evaluation import device_of, mode
from sbs_fx.training.task import task_of

_FEW = 8  # images that are too few for statistics


class Predictor:
    """Predicted loss of plans: KL divergence from the float model (nats an image).

    Args:
        network: searchable; its gates and weights change with every plan.
        ranges: of each gate at each bitwidth.
        forms: weight name -> bits -> the parameter as that many bits have it; what is not there is rounded by its gate.
        inputs: one batch, the images first. teacher: the float graph.
        readings: layers that are refitted to the channels that stay.

    Attributes:
        passes: how many plans were predicted so far.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        ranges: Ranges,
        forms: Mapping[str, Mapping[int, Tensor]],
        inputs: Tensors,
        teacher: fx.GraphModule,
        readings: Mapping[str, Reading] | None = None,
    ) -> None:
        self.network, self.ranges, self.forms, self.readings = network, ranges, forms, readings or {}
        self.passes, self.task = 0, task_of(network)
        changed = forms.keys() | self.readings.keys()
        self.parameters = {n: p for n, p in weight_parameters(network).items() if n in changed}
        self.originals = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.inputs = tuple(x.to(device_of(network)) for x in inputs)
        self.norms = [m for m in network.modules() if isinstance(m, BatchNorm)]
        self.float_moments: dict[BatchNorm, tuple[Tensor, Tensor]] = {}
        with mode(teacher, training=False), torch.no_grad():
            self.teacher = self.task.reference(teacher(*self.inputs))
        with self._hooks(self._record):
            self._divergence()

    @property
    def images(self) -> int:
        """How many there are in the batch."""
        return len(self.inputs[0])

    @torch.no_grad()
    def __call__(self, plan: Plan, *, dynamic: bool = True) -> float:
        """`dynamic` False: with the float model's statistics."""
        self._apply(plan)
        self.passes += 1
        if dynamic and self.images >= _FEW:
            with self._hooks(self._moved):
                loss = self._divergence()
        else:
            loss = self._divergence()
        return loss if loss == loss else float("inf")

    @torch.no_grad()
    def _divergence(self) -> float:
        with mode(self.network, training=False):
            return float(self.task.divergence(self.network(*self.inputs), self.teacher))

    @contextmanager
    def _hooks(self, hook: Callable[[Any, Any], Any]) -> Iterator[None]:
        handles = [norm.register_forward_pre_hook(hook) for norm in self.norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _record(self, norm: BatchNorm, args: tuple[Tensor, ...]) -> None:
        self.float_moments[norm] = _moments(args[0])

    def _moved(self, norm: BatchNorm, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, weight, bias, mean, var = args
        (now, spread), (before, float_spread) = _moments(x), self.float_moments[norm]
        moved = (var + norm.eps) * (spread + norm.eps) / (float_spread + norm.eps) - norm.eps
        return x, weight, bias, mean + (now - before), moved

    @torch.no_grad()
    def _apply(self, plan: Plan) -> None:
        put_at(self.network, plan, self.ranges)
        for name, parameter in self.parameters.items():
            bits: Any = plan.weight_bits[name]
            value = self.forms.get(name, {}).get(bits, self.originals[name])
            reading = self.readings.get(name)
            parameter.copy_(value if reading is None else reading.refitted(value, plan.kept))

    def reset(self) -> None:
        """Weights as they were, every gate open."""
        kept = {name: list(range(gate.size)) for name, gate in channel_gates(self.network).items()}
        bits = [dict.fromkeys(gates(self.network), FLOAT_BITS) for gates in (weight_gates, activation_gates)]
        self._apply(Plan(kept, bits[0], bits[1]))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    var, mean = torch.var_mean(x, [i for i in range(x.ndim) if i != 1], correction=0)
    return mean, var
