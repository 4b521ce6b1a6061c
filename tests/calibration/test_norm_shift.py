"""Batch-norm statistics that follow a network: none where nothing changes, exact ones where it is known what does."""

from __future__ import annotations

import torch
from torch import fx, nn

from benchmarks._cifar_models import CifarResNet
from sbs_fx.calibration.norm_shift import NormShift
from sbs_fx.passes import channel_groups, insert_gates, trace
from sbs_fx.passes.graph import attribute


def gated(module: nn.Module) -> fx.GraphModule:
    graph = trace(module.eval(), torch.randn(2, 3, 16, 16))
    return insert_gates(graph, channel_groups(graph))


def test_statistics_stay_where_nothing_changes() -> None:
    network = gated(CifarResNet(20))
    norms = NormShift(network, [torch.randn(8, 3, 16, 16)])
    trained = {n: attribute(network, n).clone() for pair in norms.names for n in pair}
    assert len(trained) == 2 * 21
    norms.apply()
    for name, value in trained.items():
        torch.testing.assert_close(attribute(network, name), value, rtol=1e-5, atol=1e-5)


def test_statistics_of_another_scale_are_found_from_noise() -> None:
    """The weights before a batch norm doubled, and a bias added: mean and variance must follow exactly."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        module[1].running_mean.uniform_(-1, 1)
        module[1].running_var.uniform_(0.5, 2)
    network = gated(module)
    x = torch.randn(4, 3, 16, 16)
    before = network(x).detach()
    norms = NormShift(network, [torch.randn(8, 3, 16, 16)])
    with torch.no_grad():
        attribute(network, "0.weight").mul_(2)
        attribute(network, "0.bias").mul_(2).add_(0.7)
    assert not torch.allclose(network(x), before, atol=1e-2)
    norms.apply()
    # reason: eps is not scaled
    torch.testing.assert_close(network(x).detach(), before, rtol=1e-3, atol=1e-3)


def test_dead_channels_keep_what_was_trained() -> None:
    network = gated(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)))
    norms = NormShift(network, [torch.randn(4, 3, 16, 16)])
    with torch.no_grad():
        attribute(network, "0.weight").zero_()
    norms.apply()
    assert all(torch.isfinite(attribute(network, n)).all() for n in norms.trained)
    assert torch.equal(attribute(network, "1.running_var"), norms.trained["1.running_var"])
