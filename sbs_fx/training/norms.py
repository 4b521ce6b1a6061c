"""`estimate_norms`: batch-norm statistics of the network as it is now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sbs_fx.data.batches import read_batches
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.passes.graph import input_count
from sbs_fx.training.evaluation import device_of, mode


def estimate_norms(network: nn.Module, data: Iterable[Any], batches: int) -> None:
    """Batch-norm statistics of a gated graph as the mean over some batches; everything else, modes included, stays."""
    momenta = {m: m.momentum for m in network.modules() if isinstance(m, BatchNorm)}
    device = device_of(network)
    with mode(network, training=False), torch.no_grad():
        for module in momenta:
            module.train()
        for index, inputs, _ in read_batches(data, inputs=input_count(network), max_batches=batches):
            for module in momenta:
                module.momentum = 1 / (index + 1)
            network(*(x.to(device) for x in inputs))
    for module, momentum in momenta.items():
        module.momentum = momentum
