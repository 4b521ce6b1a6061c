"""`verify`: each part of each specification refuses a graph that breaks it, and names the place.

That every pass gives a graph of its dialect is checked in all tests, by conftest.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from sbs_fx.passes import channel_groups, finalize, insert_gates, trace
from sbs_fx.passes.dialects import (
    DEQUANTIZE,
    QUANTIZE,
    Gated,
    Searchable,
    Static,
    StoredWeight,
    Traced,
    gates_of,
    quantizers,
    set_dialect,
    static_of,
    verify,
)
from sbs_fx.passes.gates.masked import silence
from sbs_fx.plan.errors import GraphError
from tests.networks.small import Residual
from tests.oracles.gated import fixed, gate

aten = torch.ops.aten
IMAGES = torch.randn(2, 3, 16, 16)


class Regularised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout()
        self.residual = Residual()
        self.residual.stem = nn.Conv2d(8, 16, 3, 2, 1)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(self.drop(torch.relu(self.norm(self.conv(x)))))


@cache
def traced() -> fx.GraphModule:
    return trace(Regularised(), IMAGES)


def graph_of(dialect: type) -> fx.GraphModule:
    if dialect is Traced:
        return trace(Regularised(), IMAGES)
    if dialect is Static:
        return finalize(fixed(gate(Regularised(), IMAGES), 4))
    return insert_gates(traced(), channel_groups(traced()), channels=dialect is Searchable)


def node(graph_module: fx.GraphModule, target: Any) -> fx.Node:
    return next(n for n in graph_module.graph.nodes if n.target == target)


def call(graph_module: fx.GraphModule, target: Any, *args: Any, op: str = "call_function") -> fx.Node:
    with graph_module.graph.inserting_before(next(n for n in graph_module.graph.nodes if n.op == "output")):
        return graph_module.graph.create_node(op, target, args)


def set_weights(static: fx.GraphModule, change: Callable[[StoredWeight], StoredWeight]) -> None:
    dialect = static_of(static)
    set_dialect(static, replace(dialect, weights={name: change(w) for name, w in dialect.weights.items()}))


def set_activations(static: fx.GraphModule, **changes: Any) -> None:
    dialect = static_of(static)
    activations = {name: a._replace(**changes) for name, a in dialect.activations.items()}
    set_dialect(static, replace(dialect, activations=activations))


def gates(gated: fx.GraphModule) -> Gated:
    return gates_of(gated)


SPOILT: dict[str, tuple[type, Callable[[fx.GraphModule], Any], str]] = {
    "another dialect": (Traced, lambda g: set_dialect(g, Gated({}, {})), "this is a gated graph"),
    "module": (Traced, lambda g: call(g, "conv", op="call_module"), "is a call_module"),
    "method": (Traced, lambda g: call(g, "relu", node(g, "x"), op="call_method"), "is a call_method"),
    "in place": (Traced, lambda g: call(g, aten.relu_.default, node(g, "x")), "writes to its arguments"),
    "python": (Traced, lambda g: call(g, torch.relu, node(g, "x")), "no operator of this dialect"),
    "arithmetic": (Traced, lambda g: call(g, operator.mul, node(g, "x"), 2), "no operator of this dialect"),
    "quantised": (
        Traced,
        lambda g: call(g, QUANTIZE, node(g, "x"), 1.0, 0, 0, 9, torch.uint8),
        "which is of quantized_decomposed",
    ),
    "no value": (Traced, lambda g: node(g, aten.relu.default).meta.clear(), r'relu.*meta\["val"\]'),
    "unread": (Traced, lambda g: g.register_buffer("extra", torch.ones(1)), "extra.*no node reads"),
    "unheld": (Traced, lambda g: delattr(g.conv, "weight"), "conv.weight.*holds no such tensor"),
    "masked": (Gated, lambda g: call(g, silence, node(g, "x"), node(g, "x"), 1), "no operator of this dialect"),
    "stranger": (Gated, lambda g: (g.add_module("y", nn.ReLU()), call(g, "y", node(g, "x"), op="call_module")), "ReLU"),
    "uncalled": (
        Gated,
        lambda g: set_dialect(g, replace(gates(g), activations={**gates(g).activations, "y": "activation_gates.y"})),
        "'y'.*no node calls",
    ),
    "no quantiser": (Gated, lambda g: g.set_submodule(gates(g).weights["conv"], nn.Identity()), "no SuperBitQuantizer"),
    "called twice": (
        Gated,
        lambda g: call(g, gates(g).activations["x"], node(g, "x"), op="call_module"),
        "'x'.*2 nodes call",
    ),
    "another tensor": (
        Gated,
        lambda g: node(g, gates(g).activations["x"]).update_arg(0, node(g, "conv.weight")),
        "is the gate of 'x', and reads conv_weight",
    ),
    "dropout": (Gated, lambda g: call(g, aten.dropout.default, node(g, "x"), 0.5, False), "does not switch"),
    "no channel gate": (
        Searchable,
        lambda g: g.set_submodule(next(iter(gates(g).channels.values())), nn.Identity()),
        "no ChannelGate",
    ),
    "module in static": (Static, lambda g: call(g, "conv", op="call_module"), "is a call_module"),
    "codes": (Static, lambda g: g.get_buffer("conv.weight").fill_(9), "conv.weight.*codes from 9 to 9 at 4 bits"),
    "low codes": (
        Static,
        lambda g: g.get_buffer("conv.weight").fill_(-9),
        "conv.weight.*codes from -9 to -9 at 4 bits",
    ),
    "wide codes": (
        Static,
        lambda g: g.get_submodule("conv").register_buffer("weight", g.get_buffer("conv.weight").int()),
        "conv.weight.*without a buffer of int8 codes",
    ),
    "too many channels": (Static, lambda g: set_weights(g, lambda w: w._replace(bits=(4,) * 9)), "9 bitwidths for 8"),
    "another axis": (
        Static,
        lambda g: set_weights(g, lambda w: w._replace(bits=(4,) * 8, axis=1)),
        "conv.weight.*8 bitwidths for 3 channels",
    ),
    "another zero point": (Static, lambda g: node(g, DEQUANTIZE).update_arg(2, 7), "dequantises otherwise"),
    "zero bits": (Static, lambda g: set_weights(g, lambda w: w._replace(bits=0)), "conv.weight.*at 0 bits"),
    "channels": (Static, lambda g: set_weights(g, lambda w: w._replace(bits=(4,))), "1 bitwidths for 8 channels"),
    "no codes": (
        Static,
        lambda g: set_dialect(g, replace(static_of(g), weights={"y": StoredWeight(4, 0)})),
        "'y'.*without a buffer",
    ),
    "unstated": (Static, lambda g: set_dialect(g, replace(static_of(g), activations={})), "does not state"),
    "zero point": (Static, lambda g: set_activations(g, zero_point=7), "not the activation 'x' as stated"),
    "values": (Static, lambda g: set_activations(g, values="y"), "does not state"),
    "too many codes": (Static, lambda g: set_activations(g, bits=2), "256 codes at 2 bits"),
    "another scale": (Static, lambda g: node(g, DEQUANTIZE).update_arg(1, 0.7), "dequantises otherwise"),
    "not dequantised": (
        Static,
        lambda g: call(g, QUANTIZE, *next(quantizers(g.graph))[0].args),
        "quantised and not dequantised",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_verify_refuses(name: str) -> None:
    dialect, spoil, message = SPOILT[name]
    graph_module = graph_of(dialect)
    verify(graph_module, dialect)
    spoil(graph_module)
    with pytest.raises(GraphError, match=message):
        verify(graph_module, dialect)


def test_each_dialect_is_asked_for_by_what_makes_it() -> None:
    with pytest.raises(GraphError, match=r"expected a gated graph, from `insert_gates.*`; this is a traced one"):
        gates_of(traced())
    with pytest.raises(GraphError, match="expected a static graph, from `finalize`; this is a searchable one"):
        static_of(graph_of(Searchable))
    assert static_of(traced()) == Static()
