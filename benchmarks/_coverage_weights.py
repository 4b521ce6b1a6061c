"""Weights under which errors show: nothing zero, nothing constant, activations of order one.

In: a model whose layer scales may be 1e-6 and whose gammas and gates may start at zero, which would hide any wrong
index. Out: the same model with random parameters, and batch-norm statistics that fit them but are not exact.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_LEAST_VARIANCE = 0.25


@torch.no_grad()
def randomise(model: nn.Module, *inputs: torch.Tensor, seed: int = 0) -> None:
    """Draw every parameter anew, then let batch norms measure one batch and shake what they found, in place.

    Weights have variance 1 / fan-in, biases are small, scales lie between 0.5 and 1.5, and a batch norm's statistics
    do not amplify more than twice.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / max(1, parameter[0].numel()) ** 0.5)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        else:
            parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval()
        norm.momentum = momentum
        mean, var = norm.running_mean, norm.running_var
        assert mean is not None
        assert var is not None
        # reason: soft attention averages, so the norm after it has a small variance; if it made up for that, attention
        # that gets sharper as its input grows would double its output layer by layer, until only one index counts
        var.clamp_(min=_LEAST_VARIANCE)
        mean.add_(0.1 * var.sqrt() * torch.randn(mean.shape, generator=generator))
        var.mul_(0.8 + 0.4 * torch.rand(var.shape, generator=generator))
