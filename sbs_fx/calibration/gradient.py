"""`Tuner`: a block brought nearer to the float one by gradient, for some steps or some time.

In: a block of a gated graph, what it reads, what it is to give. Out: its weights, ranges, biases and norms moved, in
place. Source: adaptive rounding with a straight-through gradient (AdaQuant, arXiv 2006.10518), learned steps
(arXiv 1902.08153), activations left in float at random (QDrop, arXiv 2203.05740).
Holds: a weight stays within a step of where it began, and is a level of its gate afterwards; what other blocks read too
does not move. The same seed and number of steps give the same block; with a deadline, the machine's speed counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.calibration.rounding import weight_parameters
from sbs_fx.calibration.settings import Reconstruction
from sbs_fx.data.batches import Tensors, joined_inputs
from sbs_fx.passes import activation_gates, weight_gates
from sbs_fx.quantizer.superbit import SuperBitQuantizer

_NUMBERS, _FEWEST = 1 << 23, 8  # of a step's input at most, and images all the same


class Tuner:
    """Tunes one block after the other.

    Args:
        gated: the whole graph. settings: with 0 steps, as many as a block's part of the time allows. deadline: of
            `time.monotonic()`; the time is shared evenly among `blocks`.
    """

    def __init__(
        self, gated: fx.GraphModule, settings: Reconstruction, seed: int, deadline: float | None, blocks: int
    ) -> None:
        self.settings, self.deadline, self.blocks = settings, deadline, blocks
        self.generator = torch.Generator().manual_seed(seed)
        self.names = {id(gate): name for name, gate in weight_gates(gated).items()}
        self.activations = {id(gate) for gate in activation_gates(gated).values()}
        self.parameters = weight_parameters(gated)
        self.calls = _calls(gated)

    def until(self) -> float:
        """The end of the next block's part of the time."""
        now, blocks = time.monotonic(), max(1, self.blocks)
        self.blocks -= 1
        return math.inf if self.deadline is None else now + (self.deadline - now) / blocks

    def __call__(self, part: fx.GraphModule, now: list[Tensors], targets: list[Tensors], until: float) -> None:
        """Adam on the squared error, all rates falling to zero as a cosine."""
        rates, weights = self._variables(part)
        if not rates:
            return
        inputs, wanted = joined_inputs(now), joined_inputs(targets)
        optimiser = torch.optim.Adam([{"params": [p], "lr": rate} for p, rate in rates])
        count, begun, step = len(inputs[0]), time.monotonic(), 0
        batch = min(self.settings.batch, max(_FEWEST, _NUMBERS // max(x[:1].numel() for x in inputs)))
        scale = [1 / float(t.square().mean().clamp_min(1e-30)) for t in wanted]
        with self._dropping(part):
            while (done := self._done(step, begun, until)) < 1:
                for group, (_, rate) in zip(optimiser.param_groups, rates, strict=True):
                    group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
                chosen = torch.randperm(count, generator=self.generator)[:batch].to(inputs[0].device)
                outputs = part(*(x[chosen] if len(x) == count else x for x in inputs))
                loss = torch.stack(
                    [k * (y - t[chosen]).square().mean() for y, t, k in zip(outputs, wanted, scale, strict=True)]
                ).sum()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                with torch.no_grad():
                    for weight, (low, high) in weights.items():
                        weight.copy_(torch.minimum(torch.maximum(weight, low), high))
                step += 1
        with torch.no_grad():
            for name, gate in self._gates(part, weights):
                self.parameters[name].copy_(gate(self.parameters[name]))

    def _done(self, step: int, begun: float, until: float) -> float:
        by_steps = step / self.settings.steps if self.settings.steps else 0.0
        return max(by_steps, (time.monotonic() - begun) / max(until - begun, 1e-9))

    @contextmanager
    def _dropping(self, part: fx.GraphModule) -> Iterator[None]:
        """Gates of activations give, at random, what they were given."""
        generators: dict[torch.device, torch.Generator] = {}

        def drop(_: nn.Module, args: Sequence[Any], output: Tensor) -> Tensor:
            if output.device not in generators:
                generators[output.device] = torch.Generator(output.device).manual_seed(self.generator.initial_seed())
            share = torch.rand(output.shape, generator=generators[output.device], device=output.device)
            return torch.where(share < self.settings.drop, args[0], output)

        gates = [m for m in part.modules() if id(m) in self.activations] if self.settings.drop else []
        handles = [gate.register_forward_hook(drop) for gate in gates]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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
