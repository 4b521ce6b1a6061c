"""Folding: what can be computed once, and batch norms that dissolve into the layer before them.

In: a graph whose batch norms are `insert_gates.BatchNorm` modules. Out: values of nodes that depend on parameters and
buffers alone, and per layer the factor and bias that stand for its batch norm. Invariant: layer * factor + bias equals
layer followed by batch norm in eval mode, to rounding; the graph itself is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.folding import BIAS, TRANSPOSED, constant_nodes, folded_norms
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.passes.graph import attribute

aten = torch.ops.aten

GROUPS = 6  # place of the number of groups among the arguments of both kinds


class Constants:
    """The nodes that depend on parameters and buffers alone, and their values, each computed once and on demand."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        self.module = graph_module
        self.nodes = constant_nodes(graph_module.graph)
        self._values: dict[fx.Node, Any] = {}

    def __contains__(self, node: Any) -> bool:
        """Whether an argument is known at compile time; None and numbers are."""
        return not isinstance(node, fx.Node) or node in self.nodes

    @torch.no_grad()
    def value(self, node: Any) -> Any:
        """Value of a constant node; any other argument is its own value."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return attribute(self.module, str(node.target)).detach()
        if node not in self._values:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.value)
            call: Any = self.module.get_submodule(str(node.target)) if node.op == "call_module" else node.target
            self._values[node] = call(*args, **kwargs)
        return self._values[node]


@dataclass(frozen=True)
class Fold:
    """A batch norm as an affine function of the layer before it: y -> y * factor + shift.

    `factor` and `bias` have shape (channels,) and are float64; `bias` replaces the layer's: shift + bias * factor.
    """

    norm: fx.Node
    factor: Tensor
    bias: Tensor


def batch_norm_folds(constants: Constants) -> dict[fx.Node, Fold]:
    """Layer -> its fold, for each batch norm of a gated graph that `folded_norms` finds."""
    graph = constants.module.graph
    modules = {node: constants.module.get_submodule(node.target) for node in graph.find_nodes(op="call_module")}
    norms = {node: module for node, module in modules.items() if isinstance(module, BatchNorm)}
    folds = {}
    for layer, norm in folded_norms(graph, norms, lambda weight: len(weight.users)).items():
        bias = constants.value(layer.args[BIAS])
        folds[layer] = _fold(norm, norms[norm].eps, None if bias is None else bias.double(), constants)
    return folds


def _fold(norm: fx.Node, eps: float, layer_bias: Tensor | None, constants: Constants) -> Fold:
    values: Sequence[Tensor | None] = [constants.value(argument) for argument in norm.args[1:5]]
    weight, bias, mean, var = (None if v is None else v.double() for v in values)
    assert mean is not None  # `insert_gates` makes a module only of a batch norm with statistics
    assert var is not None
    factor = torch.rsqrt(var + eps)
    factor = factor if weight is None else factor * weight
    moved = -mean if layer_bias is None else layer_bias - mean
    return Fold(norm, factor, moved * factor if bias is None else bias + moved * factor)


def along_output(values: Tensor, layer: fx.Node, weight: Tensor) -> Tensor:
    """Values per output channel of a layer (channels,), in a shape that broadcasts over the layer's weight.

    A transposed convolution has its weight as (G x inputs, outputs / G, ...): a group is a block of rows.
    """
    if layer.target not in TRANSPOSED:
        return values.view(-1, *[1] * (weight.ndim - 1))
    groups = int(layer.args[GROUPS])
    rows = values.view(groups, -1)
    if groups > 1:
        rows = rows.repeat_interleave(weight.shape[0] // groups, 0)
    return rows.view(*rows.shape, *[1] * (weight.ndim - 2))
