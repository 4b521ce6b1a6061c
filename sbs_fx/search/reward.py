"""`Reward`: what bits by channel are worth, without training.

In: a few labelled batches, bits by channel. Out: accuracy, with the batch-norm statistics that follow
from some of the batches with the bits applied (`NormShift`), less a tenth of the cross-entropy, which tells plans of
equal accuracy apart. Holds: a plan's reward does not depend on what was tried before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.calibration.norm_shift import NormShift
from sbs_fx.data.batches import check_labels, read_batches, start_epoch
from sbs_fx.passes import apply_bits, channel_gates, insert_gates, weight_gates
from sbs_fx.search.channel_bits import BitsByChannel, ChannelBits
from sbs_fx.training.evaluation import mode
from sbs_fx.training.task import CLASSIFICATION

_LIKELIHOOD = 0.1  # weight of the log-likelihood beside accuracy, both as numbers near 1


class Reward:
    """Call it with bits by channel. The network's float weights stay as they are.

    Args:
        data: yields (images, labels): `norm_batches` for statistics and then `reward_batches` for accuracy; the same
            ones where it has no more.

    Raises:
        DataError: no batch, no labels, or labels that the network has no class for.
    """

    def __init__(
        self,
        channels: ChannelBits,
        data: Iterable[Any],
        norm_batches: int,
        reward_batches: int,
    ) -> None:
        self.channels, problem = channels, channels.problem
        self.network = insert_gates(problem.graph, problem.groups)
        start_epoch(data, 0)
        device = problem.inputs[0].device
        read = read_batches(data, inputs=len(problem.inputs), max_batches=norm_batches + reward_batches)
        batches = [
            (tuple(x.to(device) for x in b.inputs), check_labels(b.targets, None, b.number).to(device)) for b in read
        ]
        self.norm_batches = batches[:norm_batches]
        self.batches = batches[norm_batches:] or batches
        self.names = [n for n, _ in problem.graph.named_buffers()]
        self.norms = NormShift(self.network, self.norm_batches)
        self.ranges = self._calibrated()

    def _calibrated(self) -> dict[int, dict[str, Tensor]]:
        """Weight ranges by bits; activation ranges are set once, on the float network."""
        ranges: dict[int, dict[str, Tensor]] = {}
        problem = self.channels.problem
        levels = sorted({bits for each in self.channels.levels.values() for bits in each} - {0}) or [8]
        for bits in levels:
            fixed = {**dict.fromkeys(problem.cost.weights, bits), **self.channels.fixed}
            apply_bits(self.network, fixed, self.channels.activation_bits)
            batches = self.norm_batches if bits == levels[-1] else self.norm_batches[:1]
            calibrate(self.network, batches, inputs=problem.inputs)
            ranges[bits] = {n: g.range.detach().clone() for n, g in weight_gates(self.network).items()}
        return ranges

    @torch.no_grad()
    def apply(self, bits: BitsByChannel) -> None:
        """Put a plan into the network, and its own batch-norm statistics."""
        gates = weight_gates(self.network)
        for name, each in bits.items():
            gates[name].fix(each)
            chosen = torch.tensor(each, device=gates[name].range.device)
            for b, ranges in self.ranges.items():
                gates[name].range.copy_(torch.where(chosen == b, ranges[name], gates[name].range))
        for name, kept in self.channels.kept(bits).items():
            channel_gates(self.network)[name].fix(kept)
        self.norms.apply()

    @torch.no_grad()
    def __call__(self, bits: BitsByChannel) -> float:
        self.apply(bits)
        right = loss = 0.0
        total = 0
        with mode(self.network, training=False):
            for inputs, labels in self.batches:
                (logits,) = CLASSIFICATION.tensors(self.network(*inputs))
                check_labels(labels.cpu(), logits.shape[1], 0)
                right += float((logits.argmax(1) == labels).sum())
                loss += float(F.cross_entropy(logits, labels, reduction="sum"))
                total += len(labels)
        return (right - _LIKELIHOOD * min(loss, 100.0 * total)) / total if math.isfinite(loss) else -math.inf

    def statistics(self) -> dict[str, Tensor]:
        """The buffers of the traced graph as they are now."""
        state = self.network.state_dict()
        return {n: state[n].detach().clone() for n in self.names if n in state}
