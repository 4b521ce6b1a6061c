"""`NormShift`: batch-norm statistics that follow what bits and masks do to a network, from any images, or none.

In: a gated graph in float, and batches. Out: the same graph with statistics for the decisions of the moment. Statistics
estimated on a few batches differ from the trained ones for two reasons: the network has changed, and the batches are
not those of training (no crops and flips, other images, or plain noise). Only the first is wanted, so it is measured as
the difference that the decisions make on the same batches, and added to the trained statistics:

    var = var_trained * r^2,   mean = mean_now + (mean_trained - mean_float) * r,   r^2 = var_now / var_float

Ours. On a small residual network for CIFAR-10 with weights of 4 bits, plain training images gave 87.0 % where estimated
anew and 90.8 % this way; standard normal noise gave 90.8 % as well, and 82 % instead of 64 % where a tenth of the
channels was pruned.
Holds: a network that has not changed keeps the trained statistics, to rounding; weights and bits stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.passes.graph import attribute
from sbs_fx.training.norms import estimate_norms

_LEAST, _MOST = 1e-2, 1e2  # of r^2; beyond it a channel is as good as constant, before or after


class NormShift:
    """The statistics of a network in float; `apply` sets those that belong to its decisions.

    Args:
        network: from `insert_gates`, trained statistics; without `floats` every gate open, channels all kept.
        batches: of (images, ...), or images, as the graph takes them.
        floats: statistics of the float network on the batches, by name; None: measured.
    """

    def __init__(
        self, network: fx.GraphModule, batches: Sequence[Any], floats: Mapping[str, Tensor] | None = None
    ) -> None:
        self.network, self.batches = network, batches
        self.names = statistics_of(network)
        self.trained = self._read()
        if floats is None:
            estimate_norms(network, batches, len(batches))
            floats = self._read()
            write(network, self.trained)
        self.floats = floats

    @torch.no_grad()
    def apply(self) -> None:
        """Set the statistics of the network as its gates are now. Channels without spread keep the trained ones."""
        write(self.network, self.trained)
        estimate_norms(self.network, self.batches, len(self.batches))
        now, shifted_values = self._read(), {}
        for mean, var in self.names:
            ratio = now[var] / self.floats[var]
            usable = torch.isfinite(ratio) & (ratio >= _LEAST) & (ratio <= _MOST) & torch.isfinite(now[mean])
            ratio = torch.where(usable, ratio, torch.ones_like(ratio))
            shifted = now[mean] + (self.trained[mean] - self.floats[mean]) * ratio.sqrt()
            shifted_values[mean] = torch.where(usable, shifted, self.trained[mean])
            shifted_values[var] = self.trained[var] * ratio
        write(self.network, shifted_values)

    def _read(self) -> dict[str, Tensor]:
        return {n: attribute(self.network, n).detach().clone() for pair in self.names for n in pair}


@torch.no_grad()
def write(network: fx.GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Set parameters and buffers by name, in place."""
    for name, value in tensors.items():
        attribute(network, name).copy_(value)


def statistics_of(network: fx.GraphModule) -> list[tuple[str, str]]:
    """(mean, var) of every batch norm by their names in the graph, each once."""
    names: dict[tuple[str, str], None] = {}
    for node in network.graph.find_nodes(op="call_module"):
        if isinstance(network.get_submodule(str(node.target)), BatchNorm):
            mean, var = node.args[3:5]
            if isinstance(mean, fx.Node) and isinstance(var, fx.Node) and mean.op == var.op == "get_attr":
                names[str(mean.target), str(var.target)] = None
    return list(names)
