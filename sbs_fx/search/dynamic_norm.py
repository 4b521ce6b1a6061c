"""How good a policy is, predicted without training: its loss with batch-norm statistics of its own.

In: a searchable graph, quantised forms of its weights, ranges of its gates at every bitwidth, a batch of images. Out:
the divergence from the float model of any draft of decisions. Source: Dynamic BN (Pattern Recognition 140, 2023): mean
and variance re-estimated with the policy applied, then the loss on a small set [our reading]; ours does both in one
pass over one batch. Holds: parameters, ranges and statistics of the graph it was given are put back by `reset`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from sbs_fx.passes import activation_gates, channel_gates, weight_gates
from sbs_fx.passes.insert_gates import BatchNorm
from sbs_fx.rounding import weight_parameters
from sbs_fx.search.gate_search import Draft
from sbs_fx.superbit import FLOAT_BITS
from sbs_fx.training.evaluation import device_of, logits_of, mode

_FEW = 8  # images that are too few for statistics


class Predictor:
    """Predicted loss of drafts: KL divergence from the float model (nats an image).

    Args:
        network: searchable; its gates and weights change with every draft.
        ranges: ("w" or "a", name, bits) -> range of that gate.
        forms: weight name -> bits -> the parameter as that many bits have it; what is not there is rounded by its gate.
        images: one batch. teacher: the float graph.

    Attributes:
        passes: how many drafts were predicted so far.
    """

    def __init__(
        self,
        network: fx.GraphModule,
        ranges: Mapping[tuple[str, str, int], Tensor],
        forms: Mapping[str, Mapping[int, Tensor]],
        images: Tensor,
        teacher: fx.GraphModule,
    ) -> None:
        self.network, self.ranges, self.forms = network, ranges, forms
        self.passes = 0
        self.gates = {"w": weight_gates(network), "a": activation_gates(network)}
        self.channels = channel_gates(network)
        self.parameters = {n: p for n, p in weight_parameters(network).items() if n in forms}
        self.originals = {n: p.detach().clone() for n, p in self.parameters.items()}
        self.images = images.to(device_of(network))
        with mode(teacher, training=False), torch.no_grad():
            self.wanted = F.log_softmax(logits_of(teacher(self.images)).float(), dim=1)

    @torch.no_grad()
    def __call__(self, draft: Draft, *, dynamic: bool = True) -> float:
        """`dynamic` False: with the float model's statistics."""
        self._apply(draft)
        self.passes += 1
        norms = {m: m.momentum for m in self.network.modules() if isinstance(m, BatchNorm)}
        with mode(self.network, training=False):
            for module in norms if dynamic and len(self.images) >= _FEW else ():
                module.train()
                module.momentum = 0.0  # reason: the float model's statistics stay
            found = F.log_softmax(logits_of(self.network(self.images)).float(), dim=1)
        for module, momentum in norms.items():
            module.momentum = momentum
        loss = float(F.kl_div(found, self.wanted, reduction="batchmean", log_target=True))
        return loss if loss == loss else float("inf")

    @torch.no_grad()
    def _apply(self, draft: Draft) -> None:
        for kind, table in (("w", draft.weight_bits), ("a", draft.activation_bits)):
            for name, bits in table.items():
                gate = self.gates[kind][name]
                gate.fix(bits)
                if bits != FLOAT_BITS:
                    gate.range.copy_(self.ranges[kind, name, bits])
                if kind == "w" and name in self.parameters:
                    self.parameters[name].copy_(self.forms[name].get(bits, self.originals[name]))
        for name, channels in self.channels.items():
            channels.fix(draft.kept[name])

    def reset(self) -> None:
        """Weights as they were, every gate open."""
        kept = {name: list(range(gate.size)) for name, gate in self.channels.items()}
        bits = [dict.fromkeys(self.gates[kind], FLOAT_BITS) for kind in ("w", "a")]
        self._apply(Draft(bits[0], bits[1], kept))
