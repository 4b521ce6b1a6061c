"""The float model and the process are what they were, whether capture succeeds or raises."""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx.passes import trace
from sbs_fx.passes.capture.unchanged import unchanged
from sbs_fx.plan.errors import SbsError, TraceError
from tests.oracles.state import state_of

TABLES: dict[int, Tensor] = {}


class Makers(OrderedDict[str, Any]):
    """Gives a new object each time that an entry is read, as tables of activation functions do."""

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(name)()


ACTIVATIONS = Makers(relu=nn.ReLU, gelu=nn.GELU)


@functools.lru_cache
def grid(size: int) -> Tensor:
    return torch.arange(size) + 0.5


class Caching(nn.Module):
    """Keeps tensors wherever a module of its kind was seen to keep them."""

    shape: Any = None
    grid = torch.empty(0)
    shared: dict[int, Tensor] = {}

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.conv, self.fails = nn.Conv2d(3, 4, 3, padding=1), fails
        self.register_buffer("anchors", torch.zeros(8))
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("later", None)
        self.by_size: dict[int, list[Tensor]] = {}
        self.sizes: list[int] = []
        self.state = SimpleNamespace(inner={"last": None})
        self.conv.register_forward_hook(lambda module, inputs, output: output + 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu()
        size = y.shape[-1]
        if self.shape != y.shape:
            self.grid, self.shape = torch.arange(size) + 0.5, y.shape
            self.anchors, self.later = self.grid * 2, self.grid * 3
            self.by_size.setdefault(size, []).append(self.grid)
            self.sizes.append(size)
            self.state.inner["last"] = y.sum()
            type(self).shared[size] = self.grid
            type(self).newest = self.grid  # type: ignore[attr-defined]
            TABLES[size] = self.grid
        random.random()
        np.random.rand()
        if self.fails:
            raise RuntimeError("as it was asked to")
        return y.sum(1) + self.grid + self.anchors + self.later + TABLES[size] + grid(size)


def model(fails: bool = False) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), Caching(fails))
    net[0].eval()  # one part in another mode than the rest
    net[2].conv.weight.requires_grad_(False)
    net[2].conv.bias.grad = torch.ones(4)
    return net


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    TABLES.clear()
    Caching.shared.clear()
    grid.cache_clear()


CALLS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "trace": trace,
    "compress": lambda net, x: sbs_fx.compress(net, x, budget=0.1),
    "compress in eval mode": lambda net, x: sbs_fx.compress(net.eval(), x, budget=0.1),
    "with data": lambda net, x: sbs_fx.compress(net, x, budget=0.1, data=[x], method="uniform"),
    "out of reach": lambda net, x: sbs_fx.compress(net, x, budget=1e-9),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_all_is_as_it_was(call: str, fails: bool) -> None:
    net, x = model(fails), torch.randn(2, 3, 8, 8)
    if call == "compress in eval mode":
        net.eval()
    before = state_of(net)
    if fails or call == "out of reach":
        with pytest.raises(SbsError):
            CALLS[call](net, x)
    else:
        CALLS[call](net, x)
    assert state_of(net) == before
    assert not TABLES
    assert not Caching.shared
    if not fails:
        y = net(x)
        assert type(y) is Tensor
        assert type(grid(8)) is Tensor
        assert torch.isfinite(y).all()


def test_the_inside_may_change_what_belongs_to_the_process() -> None:
    net = model()
    before = state_of(net)
    try:
        with unchanged(net):
            torch.set_default_dtype(torch.float64)
            torch.set_default_device("meta")
            torch.set_grad_enabled(False)
            torch.manual_seed(7)
            net.train()
            net[0].running_mean.add_(1)
            net[2].register_forward_pre_hook(print)
            net.add_module("more", nn.Identity())
            net[2].anchors = torch.ones(2)
            del net[2].sizes
            raise KeyError
    except KeyError:
        pass
    assert state_of(net) == before


class Counting(nn.Module):
    def __init__(self, read: bool) -> None:
        super().__init__()
        self.conv, self.read = nn.Conv2d(3, 4, 3), read
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.conv(x).mean((2, 3))
        return y + self.calls if self.read else y


def test_a_forward_that_writes_a_buffer_does_so_in_none_of_our_graphs() -> None:
    net, x = Counting(read=False).eval(), torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    assert torch.equal(graph(x), net(x))
    net.calls.zero_()
    sbs_fx.compress(net, x, budget=0.1, data=[x], method="uniform").model(x)
    graph(x)
    assert float(net.calls) == 0


def test_outputs_that_depend_on_what_a_forward_writes_are_refused() -> None:
    with pytest.raises(TraceError, match="forward changes the buffer 'calls' at each call .* make it an input"):
        trace(Counting(read=True).eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("fails", [False, True])
def test_a_table_that_makes_objects_when_it_is_read_keeps_its_entries(fails: bool) -> None:
    module = Caching(fails).eval()
    with pytest.raises(SbsError) if fails else nullcontext():
        trace(module, torch.randn(2, 3, 8, 8))
    assert list(dict.items(ACTIVATIONS)) == [("relu", nn.ReLU), ("gelu", nn.GELU)]
    assert isinstance(ACTIVATIONS["relu"], nn.ReLU)
    with unchanged(module):
        ACTIVATIONS["silu"] = nn.SiLU
    assert list(dict.items(ACTIVATIONS)) == [("relu", nn.ReLU), ("gelu", nn.GELU)]


class Drawing(nn.Module):
    """Draws at random in eval mode too, and writes what it is given where it cannot be captured."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(4, 3), fails

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            x.mul_(2)
            raise RuntimeError("as it was asked to")
        return self.layer(x) + torch.rand(3)


@pytest.mark.parametrize("fails", [False, True])
def test_inputs_and_random_states_are_what_they_were(fails: bool) -> None:
    model, x = Drawing(fails), torch.randn(2, 4)
    values, before = x.clone(), state_of(model)
    with pytest.raises(SbsError) if fails else nullcontext():
        sbs_fx.compress(model, x, budget=0.3, data=[x], method="uniform")
    assert torch.equal(x, values)
    assert state_of(model) == before
