"""`FrozenMasks`: fine-tuning in which pruned weights stay zero and weight ranges as they are (arXiv 2205.11141)."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sbs_fx.passes import weight_gates
from sbs_fx.passes.dialects import gates_of
from sbs_fx.passes.graph import attribute
from sbs_fx.training.stage import TrainingStage


class FrozenMasks(TrainingStage):
    """A stage that moves only the weights that are not zero when it is made, between steps that do not move.

    Args:
        network: from `insert_gates`, calibrated, its weights masked.
    """

    def __init__(self, network: fx.GraphModule, name: str = "fine-tune") -> None:
        super().__init__(network, name)
        self.steps = [(gate.range, gate.range.detach().clone()) for gate in weight_gates(network).values()]
        self.masks: list[tuple[Tensor, Tensor]] = []
        gates = set(gates_of(network).weights.values())
        for node in network.graph.find_nodes(op="call_module"):
            source = node.args[0] if node.target in gates else None
            if isinstance(source, fx.Node) and source.op == "get_attr":
                weight = attribute(network, str(source.target))
                self.masks.append((weight, weight.detach() != 0))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for weight, mask in self.masks:
            weight.mul_(mask)
        for range_, value in self.steps:
            range_.copy_(value)
