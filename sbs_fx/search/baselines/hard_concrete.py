"""Hard-concrete gates: a super-bit quantiser and a channel gate whose decisions are drawn at random while they learn.

In: as for `superbit`. Out: the same, mixed by gates between 0 and 1 in train mode, by gates of 0 and 1 in eval
mode. Source: Bayesian Bits (arXiv 2005.07093), constants from its authors' code: u uniform, s = sigmoid((logit(u) +
phi)/beta), g = clip(s(zeta - gamma) + gamma, 0, 1); q(g > 0) = sigmoid(phi - beta log(-gamma/zeta)); at test, g = 1
where q(g = 0) < 0.34.
Holds: what is kept for the backward pass is the input, the range and the gates (the authors keep a tensor a candidate).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sbs_fx.quantizer.channel_gate import ChannelGate
from sbs_fx.quantizer.grid import Level, Sides
from sbs_fx.quantizer.superbit import SuperBitQuantizer, _chain, _inside, _ranges, _straight_through

BETA, ZETA, GAMMA = 2 / 3, 1.1, -0.1
FIRST_PHI = 6.0
TEST_THRESHOLD = 0.34
_LEAST_NOISE = 1e-6


def open_probability(phi: Tensor) -> Tensor:
    """q(g > 0) of gates, of phi's shape."""
    return torch.sigmoid(phi - BETA * math.log(-GAMMA / ZETA))


def drawn_gates(phi: Tensor) -> Tensor:
    """A draw of each gate, in [0, 1], differentiable in phi, from torch's generator."""
    noise = torch.logit(torch.rand_like(phi), eps=_LEAST_NOISE)
    return (torch.sigmoid((noise + phi) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def decided_gates(phi: Tensor) -> Tensor:
    """Each gate at test: 1 where q(g = 0) is below the threshold, else 0."""
    return (1 - open_probability(phi.detach()) < TEST_THRESHOLD).to(phi.dtype)


class _Mixture(torch.autograd.Function):
    """z_2 + g_4(eps_4 + g_8 eps_8) for gates (candidates - 1,) in [0, 1], as (1 - g_4) z_2 + g_4(1 - g_8) z_4 + ..., so
    that gates of 0 and 1 give the plain quantiser to the last bit. With as many gates as levels, the last share is that
    of x itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, range_: Tensor, gates: Tensor, levels: Sequence[Level], sides: Sides) -> Tensor:
        ctx.save_for_backward(x, range_, gates)
        ctx.levels, ctx.sides = levels, sides
        ctx.input_dtype, ctx.range_dtype = x.dtype, range_.dtype
        value, width = _ranges(x, range_)
        shares = _shares(_passed(gates.to(value.dtype)))
        y = torch.zeros_like(value)
        for index, z in enumerate(_chain(value, width, levels)):
            y = y + shares[index] * z
        if len(gates) == len(levels):
            y = y + shares[-1] * value
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        saved_x, range_, saved_gates = ctx.saved_tensors
        x, width = _ranges(saved_x, range_)
        grad, gates = grad.to(x.dtype), saved_gates.to(x.dtype)
        passed = _passed(gates)
        shares = _shares(passed)
        y = previous = torch.zeros_like(x)
        offsets = []  # <grad, eps_b>, one number a gate
        for index, z in enumerate(_chain(x, width, ctx.levels)):
            y = y + shares[index] * z
            if index:
                offsets.append((grad * (z - previous)).sum())
            previous = z
        unrounded = None
        if len(gates) == len(ctx.levels):
            offsets.append((grad * (x - previous)).sum())
            unrounded = shares[-1]
        grad_gates = torch.zeros_like(saved_gates)
        after = torch.zeros((), dtype=x.dtype, device=x.device)
        for index in reversed(range(len(offsets))):
            after = offsets[index] + (gates[index + 1] * after if index + 1 < len(offsets) else 0)
            grad_gates[index] = passed[index] * after
        inside = _inside(x, width, ctx.sides)
        return *_straight_through(grad, y, x, width, inside, ctx, unrounded), grad_gates, None, None


def _passed(gates: Tensor) -> Tensor:
    """Products of the gates before each candidate, 1 for the first; shape (candidates,)."""
    return torch.cat([gates.new_ones(1), gates.cumprod(0)])


def _shares(passed: Tensor) -> Tensor:
    """How much of each candidate is in the mixture; they add up to 1."""
    return passed - torch.cat([passed[1:], passed.new_zeros(1)])


class HardConcreteQuantizer(SuperBitQuantizer):
    """A super-bit quantiser whose gates are drawn in train mode, and decided by `TEST_THRESHOLD` in eval mode.

    Attributes:
        phi: location of each gate's distribution, shape (len(candidates) - 1,), initially 6. There is no `threshold`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        del self.threshold
        self.phi = nn.Parameter(torch.full((len(self.candidates) - 1,), FIRST_PHI))

    def gates(self) -> tuple[Tensor, ...]:
        """0 or 1 for every candidate after the first, as in eval mode."""
        return tuple(decided_gates(self.phi))

    def expected_bits(self) -> Tensor:
        """2 + q_4(2 + 4 q_8) while searching, differentiable in phi; a constant otherwise."""
        if self.bits is not None:
            return super().expected_bits()
        return self._sum([b - a for a, b in zip(self.candidates, self.candidates[1:], strict=False)])

    def weighted_bits(self) -> Tensor:
        """The paper's sum_b b prod_{j <= b} q(g_j > 0) while searching; the bits otherwise."""
        return self._sum(self.candidates[1:]) if self.bits is None else super().expected_bits()

    def _sum(self, more: Sequence[int]) -> Tensor:
        """The first candidate, and what each open gate adds, times its probability."""
        passed = open_probability(self.phi).cumprod(0)
        return self.candidates[0] + (passed * self.phi.new_tensor(more)).sum()

    def forward(self, x: Tensor) -> Tensor:
        if self.bits is not None:
            return super().forward(x)
        gates = drawn_gates(self.phi) if self.training else decided_gates(self.phi)
        return _Mixture.apply(x, self._along(self.range, x), gates, self._levels(), self._sides())


class HardConcreteChannelGate(ChannelGate):
    """A channel gate with a hard-concrete variable for each block; if all of them are 0, the likeliest is 1.

    Attributes:
        phi: location of each block's distribution, shape (blocks,), initially 6. There is no `threshold`.
    """

    def __init__(self, size: int, block: int = 1) -> None:
        super().__init__(size, block)
        del self.threshold
        self.phi = nn.Parameter(torch.full((len(self.block_norms),), FIRST_PHI))

    def search(self) -> None:
        """Draw the mask from now on, until `fix`."""
        self.searching = True

    def expected_size(self) -> Tensor:
        """Expected number of open channels, differentiable in phi; the number of kept ones if fixed."""
        return self._of_channels(open_probability(self.phi)).sum() if self.searching else self.mask.sum()

    @torch.no_grad()
    def decide(self) -> None:
        """Put the decisions of the moment into `mask`."""
        self.mask.copy_(self._of_channels(self._one_at_least(decided_gates(self.phi))))

    def forward(self) -> Tensor:
        """The mask (size,), between 0 and 1 in train mode."""
        if not self.searching:
            return self.mask
        gates = drawn_gates(self.phi) if self.training else decided_gates(self.phi)
        return self._of_channels(self._one_at_least(gates))

    def _one_at_least(self, gates: Tensor) -> Tensor:
        likeliest = torch.arange(len(gates), device=gates.device) == self.phi.argmax()
        return torch.where(likeliest & (gates == 0).all(), torch.ones_like(gates), gates)

    def _of_channels(self, of_blocks: Tensor) -> Tensor:
        return of_blocks.repeat_interleave(self.block)[: self.size]
