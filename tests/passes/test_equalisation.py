"""`equalise`: the same bits, and channels of like range behind norms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from sbs_fx.passes import trace
from sbs_fx.passes.equalisation import equalise

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


def test_a_network_without_such_norms_is_given_back() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    graph = trace(net, torch.randn(2, 3, 8, 8))
    assert equalise(graph) is graph
