"""Ranges that suit each bitwidth, and a network put at a plan with them.

In: a searchable graph, a space, batches. Out: a calibrated copy of each gate at each bitwidth that it may have, or its
range alone. Holds: the same data gives the same ranges.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.calibration.calibrate import observe
from sbs_fx.passes import activation_gates, apply_bits, channel_gates, weight_gates
from sbs_fx.plan import Plan
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.plan import Kind
from sbs_fx.quantizer.grid import Grid
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.search.space import Space

Ranges = Mapping[tuple[Kind, str, int], Grid]  # of a weight or an activation at these bits

_BATCHES = 2


def gates_by_bits(
    network: fx.GraphModule,
    space: Space,
    data: Iterable[Any],
    inputs: Sequence[Tensor],
    method: str = "mse",
    max_batches: int = _BATCHES,
) -> dict[tuple[Kind, str, int], SuperBitQuantizer]:
    """Copies of all gates, fixed at each bitwidth that they may have and calibrated for it, all channels there. The
    network's own end as they were, but for ranges."""
    masks = {gate: (gate.mask.clone(), gate.searching) for gate in channel_gates(network).values()}
    for channel_gate in masks:
        channel_gate.fix(range(channel_gate.size))
    gates: dict[Kind, dict[str, SuperBitQuantizer]] = {
        "weight": weight_gates(network),
        "activation": activation_gates(network),
    }
    fixed = {gate: gate.bits for of_kind in gates.values() for gate in of_kind.values()}
    copies: dict[tuple[Kind, str, int], SuperBitQuantizer] = {}
    observations = None
    for bits in sorted({b for kind in gates for name in gates[kind] for b in space.values(kind, name)}):
        apply_bits(network, *(dict.fromkeys(gates[kind], bits) for kind in gates))
        if bits != FLOAT_BITS:
            observations = observations or observe(network, data, inputs=inputs, max_batches=max_batches)
            observations.set_ranges(method)
        for kind, of_kind in gates.items():
            for name, gate in of_kind.items():
                if bits in space.values(kind, name):
                    copies[kind, name, bits] = copy.deepcopy(gate)
    for gate, before in fixed.items():
        if before is None:
            gate.search()
        else:
            gate.fix(before)
    for channel_gate, (mask, searching) in masks.items():
        channel_gate.mask.copy_(mask)
        channel_gate.searching = searching
    return copies


def ranges_by_bits(network: fx.GraphModule, space: Space, data: Iterable[Any], inputs: Sequence[Tensor]) -> Ranges:
    """The range of least error of each gate at each bitwidth that it may have; see `gates_by_bits`."""
    return {key: gate.grid for key, gate in gates_by_bits(network, space, data, inputs).items()}


@torch.no_grad()
def put_at(network: fx.GraphModule, plan: Plan, ranges: Ranges) -> None:
    """Fix the gates of a network at a plan, with the ranges that suit its bits where there are any."""
    weights, activations = weight_gates(network), activation_gates(network)
    apply_bits(
        network,
        {n: b for n, b in plan.weight_bits.items() if n in weights},
        {n: b for n, b in plan.activation_bits.items() if n in activations},
    )
    use_ranges(network, plan, ranges)
    for name, gate in channel_gates(network).items():
        gate.fix(plan.kept[name])


@torch.no_grad()
def use_ranges(network: fx.GraphModule, plan: Plan, ranges: Ranges) -> None:
    """Put into gates the ranges that suit the bits of a plan, where there are any."""
    kinds: tuple[tuple[Kind, Mapping[str, SuperBitQuantizer], Mapping[str, Any]], ...] = (
        ("weight", weight_gates(network), plan.weight_bits),
        ("activation", activation_gates(network), plan.activation_bits),
    )
    for kind, gates, bits in kinds:
        for name, gate in gates.items():
            suited = ranges.get((kind, name, bits.get(name, 0)))
            if suited is not None:
                gate.use(suited)
