"""The channel gate: which channels of a group stay, as a mask whose decisions a gradient can move.

In: norms of a group's channels. Out: a mask of zeros and ones over them. Source: Single-path Bit Sharing (arXiv
2101.04935), which takes pruning for quantisation to 0 bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sbs_fx.plan.errors import InputError, PolicyError
from sbs_fx.quantizer.superbit import hard_gate


class ChannelGate(nn.Module):
    """Which channels of a group stay: a mask of zeros and ones, fixed or decided by the norms of the channels.

    Channels are taken in blocks of `block` (the last may be smaller); a block's norm is the mean over its channels, its
    gate g = 1[norm > alpha], one alpha for the group (arXiv 2101.04935). If no block passes, the largest stays.

    Attributes:
        mask: (size,), initially ones. threshold: alpha, shape (), initially 0.
    """

    mask: Tensor
    block_norms: Tensor

    def __init__(self, size: int, block: int = 1) -> None:
        super().__init__()
        if size < 1 or block < 1:
            raise PolicyError(f"channel gate of size {size} in blocks of {block}; expected both to be at least 1")
        self.size, self.block, self.searching = size, block, False
        self.threshold = nn.Parameter(torch.zeros(()))
        self.register_buffer("mask", torch.ones(size))
        self.register_buffer("block_norms", torch.full((-(-size // block),), torch.inf), persistent=False)

    def fix(self, kept: Sequence[int]) -> None:
        """Keep exactly these channels. Raises PolicyError if there are none, or unknown or repeated ones."""
        if not kept or len(set(kept)) != len(kept) or min(kept) < 0 or max(kept) >= self.size:
            raise PolicyError(f"kept channels {list(kept)}; expected one or more, each once, from 0 to {self.size - 1}")
        self.searching = False
        self.mask.zero_()[list(kept)] = 1

    def gate_from(self, norms: Tensor) -> Tensor:
        """Decide from the norms (size,) of the channels, and return the mask (size,), differentiable in `threshold`.
        From now on, until `fix`, `forward` gives that mask too, at the threshold of the moment."""
        if norms.shape != (self.size,):
            raise InputError(f"norms of shape {tuple(norms.shape)}; expected ({self.size},), one a channel")
        owner = torch.arange(self.size, device=norms.device) // self.block
        sums = torch.zeros_like(self.block_norms).index_add_(0, owner, norms.detach().to(self.block_norms.dtype))
        self.block_norms.copy_(sums / torch.bincount(owner))
        self.searching = True
        return self.forward()

    def forward(self) -> Tensor:
        """The mask (size,): ones for channels that stay, zeros for the others."""
        if not self.searching:
            return self.mask
        gates = hard_gate(self.block_norms, self.threshold)
        largest = torch.arange(len(gates), device=gates.device) == self.block_norms.argmax()
        gates = gates + (largest & (gates.detach() < 0.5).all()).to(gates.dtype)
        mask = gates.repeat_interleave(self.block)[: self.size]
        with torch.no_grad():
            self.mask.copy_(mask)
        return mask

    def extra_repr(self) -> str:
        return f"size={self.size}, block={self.block}"
