"""`equalise`: the same bits, and channels of like range behind norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import sbs_fx
from sbs_fx import Config
from sbs_fx.passes import equalise, trace

TOKENS = torch.randn(3, 5, 8)


class Block(nn.Module):
    """What transformers have: a norm behind which linears read, in a residual stream; `tied` reads a weight twice."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm, tied: bool = False, leak: bool = False) -> None:
        super().__init__()
        self.norm, self.first, self.second, self.back = norm(8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.tied, self.leak = tied, leak
        spread = torch.tensor([1.0, 40.0, 0.01, 1.0, 0.0, 300.0, 2.0, 1.0])
        self.norm.weight = nn.Parameter(spread)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        z = self.back(self.first(y) * self.second(y))
        z = z + y if self.leak else z
        return x + z + (self.first(x).sum() if self.tied else 0)


def _output(graph: fx.GraphModule, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = graph(x)
    return y[0] if isinstance(y, (tuple, list)) else y


def _ranges(graph: fx.GraphModule) -> Tensor:
    """Largest value of each channel behind the norm, without the one that is zero."""
    found: list[Tensor] = []

    class Run(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Tensor:
            result = super().run_node(n)
            if "norm" in str(n.target) and n.op == "call_function":
                found.append(result)
            return result

    Run(graph).run(torch.randn(64, 5, 8))
    ranges = found[0].detach().abs().flatten(0, 1).amax(0)
    return ranges[ranges > 0]


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_the_same_bits_and_channels_alike(norm: type[nn.Module]) -> None:
    block = Block(norm).eval()
    graph = trace(block, TOKENS)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    equal = equalise(graph)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 5, 8)
        assert torch.equal(_output(equal, x), _output(graph, x))
    spread, wide = (float(r.max() / r.min()) for r in (_ranges(equal), _ranges(graph)))
    assert spread < wide / 50
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("options", [{"tied": True}, {"leak": True}])
def test_what_something_else_reads_stays(options: dict[str, bool]) -> None:
    graph = trace(Block(**options).eval(), TOKENS)
    assert equalise(graph) is graph


def test_what_would_not_be_exact_stays() -> None:
    block = Block().eval().half()
    with torch.no_grad():
        block.norm.weight[2] = 2.0**-24  # the smallest there is
        block.norm.weight[1] = 2.0**-23
        block.first.weight[:, 1], block.second.weight[:, 1] = 2.0**-12, 2.0**-12
    graph = trace(block, TOKENS.half())
    x = torch.randn(2, 5, 8).half()
    assert torch.equal(_output(equalise(graph), x), _output(graph, x))


def test_a_network_without_such_norms_is_given_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    graph = trace(net, torch.randn(2, 3, 8, 8))
    assert equalise(graph) is graph


def test_outliers_of_a_norm_cost_no_accuracy() -> None:
    """A transformer's own kind: some channels a hundred times as large as the others, small weights behind them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 5)).eval()
    outliers = torch.ones(64)
    outliers[::16] = 128.0
    data = [torch.randn(64, 8) for _ in range(4)]
    config = Config(prune=False, calibration_batches=4)
    errors = []
    for scale in (torch.ones(64), outliers):
        with torch.no_grad():
            net[1].weight.mul_(scale)
            net[1].bias.mul_(scale)
            net[2].weight.div_(scale)
        result = sbs_fx.compress(net, data[0], budget="50%", method="uniform", data=data, config=config)
        with torch.no_grad():
            errors.append(float((result.model(data[1]) - net(data[1])).square().mean()))
    plain, spread = errors
    assert spread < 3 * plain  # reason: a 700-fold without it; half of the range is now the weights
