"""`fold_weights`: what a module computes from parameters, to multiply its input with, becomes one parameter.

In: a traced graph. Out: True if a weight of a convolution, linear or recurrent layer was folded; it has the bits that
the module computes in eval mode, and the name of a plain layer's weight. Holds: nothing else reads what was folded.

Only such weights are folded as have no exact form once channels go, and would be pinned or priced wrongly:

- a product of parameters (a low-rank update, a spectral norm): its inner dimension is no channel of the model, and the
  multiplications are no work of the layer. A spectral norm is a constant of the whole weight; that of what is left of
  it would scale every output anew;
- a division by norms of rows (weight norm): where all of a row goes that is 0 / 0, which the whole layer then reads;
- an operator without a rule (an orthogonal weight).

Everything else stays live: types follow sums and padding, and the statistics of a standardised weight run over the
input channels that are left, in the masked graph as in the slim one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes.channels.facts import facts_of
from sbs_fx.passes.channels.inference import load_rules, rule_of
from sbs_fx.passes.folding import (
    CELLS,
    CONSTANT_PRODUCTS,
    RECURRENT,
    WEIGHT,
    WEIGHTS_OF_CELL,
    WITH_BIAS,
    constant_nodes,
)
from sbs_fx.passes.graph import attribute

aten = torch.ops.aten

_NORMS = {aten.linalg_vector_norm.default, aten.norm.ScalarOpt_dim, aten.norm.Scalar}


def merge_weights(graph_module: fx.GraphModule) -> None:
    """One node for equal computations that lead to weights: they run again at each call of a layer."""
    graph = graph_module.graph
    leading: set[fx.Node] = set()
    for _, weight in _computed_weights(graph, constant_nodes(graph)):
        leading.update(() if weight in leading else _sources(weight))
    first: dict[str, fx.Node] = {}
    for node in [n for n in graph.nodes if n in leading and n.op == "call_function"]:
        same = first.setdefault(f"{node.target}{node.args}{node.kwargs}", node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def fold_weights(graph_module: fx.GraphModule) -> bool:
    """Compute once the weights that cannot stay live, each with all that leads to it; True if there were any."""
    load_rules()
    graph = graph_module.graph
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    changed = False
    for layer, weight in list(_computed_weights(graph, constant_nodes(graph))):
        sources = {} if weight._erased else _sources(weight)
        if not any(_has_no_exact_form(node) for node in sources):
            continue
        if any(user not in sources for node in sources for user in node.users if _is_own(node, weight, parameters)):
            continue  # reason: what else is computed from these parameters would no longer be trained with them
        name = next(name for name in _names(layer, weight, sources) if _is_free(graph, name, sources))
        with torch.no_grad():
            value = _evaluate(graph_module, list(sources))
        needs_grad = any(parameters[n.target].requires_grad for n in sources if n.target in parameters)
        _register(graph_module, name, nn.Parameter(value, needs_grad))
        with graph.inserting_before(next(iter(sources))):
            read = graph.get_attr(name)
        read.meta = dict(weight.meta)
        weight.replace_all_uses_with(read)
        for node in reversed(sources):
            if not node.users:
                graph.erase_node(node)
        changed = True
    return changed


def _computed_weights(graph: fx.Graph, constants: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    for layer in graph.nodes:
        if layer in constants:
            continue
        operands = [layer.args[WEIGHT]] if layer.target in WITH_BIAS else []
        operands += layer.args[2] if layer.target in RECURRENT else []
        operands += layer.args[WEIGHTS_OF_CELL] if layer.target in CELLS else []
        for weight in operands:
            if weight in constants and weight.op == "call_function":
                yield layer, weight


def _sources(weight: fx.Node) -> dict[fx.Node, None]:
    """A node and all that leads to it, in graph order."""
    found = {weight}
    for node in reversed(weight.graph.nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return dict.fromkeys(node for node in weight.graph.nodes if node in found)


def _has_no_exact_form(node: fx.Node) -> bool:
    if node.target in CONSTANT_PRODUCTS:
        return True
    if node.target is aten.div.Tensor and _is_norm_of_parts(node.args[1]):
        return True
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    return is_operator and rule_of(node.target) is None and torch.Tag.pointwise not in node.target.tags


def _is_norm_of_parts(value: Any) -> bool:
    """Whether a tensor has norms of rows, such as may be zero: something is always left of a whole weight."""
    while isinstance(value, fx.Node) and facts_of(value.target).moves:
        value = value.args[0]
    return getattr(value, "target", None) in _NORMS and value.meta["val"].numel() > 1


def _is_own(node: fx.Node, weight: fx.Node, parameters: dict[str, nn.Parameter]) -> bool:
    """Whether only the weight may read a node: buffers are not trained, and whoever reads the weight reads the new
    one."""
    return node is not weight and (node.op != "get_attr" or node.target in parameters)


def _names(layer: fx.Node, weight: fx.Node, sources: dict[fx.Node, None]) -> Iterator[str]:
    """What the weight may be called, best first: the tensor that torch says it parametrises, or by its layer."""
    for node in sources:
        owner, found, rest = str(node.target).partition("parametrizations.")
        if node.op == "get_attr" and found:
            yield owner + rest.partition(".")[0]
    stack = (layer.meta.get("nn_module_stack") or {}).values()
    path = [re.sub(r"@\d+", "", path) for path, _ in stack][-1:]  # reason: so torch counts the calls of a module
    if layer.target in WITH_BIAS:
        yield ".".join([*filter(None, path), "weight"])
    yield f"_folded_{weight.name}"


def _is_free(graph: fx.Graph, name: str, sources: dict[fx.Node, None]) -> bool:
    """Whether a tensor may have a name: nothing else has it or a part of it, but what goes."""
    holder = graph.owning_module
    taken = {str(node.target) for node in graph.find_nodes(op="get_attr") if node not in sources}
    is_module = any(path == name for path, _ in holder.named_modules())
    return not is_module and not any(name == t or f"{name}.".startswith(f"{t}.") for t in taken)


def _evaluate(graph_module: fx.GraphModule, nodes: list[fx.Node]) -> Tensor:
    """The value of the last of these nodes, which own all that they read."""
    values = {}
    for node in nodes:
        if node.op == "get_attr":
            values[node] = attribute(graph_module, str(node.target)).detach()
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[nodes[-1]].clone()  # reason: in the layout that it has, as in another one products round otherwise


def _register(graph_module: fx.GraphModule, name: str, parameter: nn.Parameter) -> None:
    """Enter a parameter; a tensor of that name, which only the sources read, goes."""
    *path, leaf = name.split(".")
    owner: nn.Module = graph_module
    for step in path:
        if step not in owner._modules:
            owner.add_module(step, nn.Module())
        owner = owner.get_submodule(step)
    if hasattr(owner, leaf):
        delattr(owner, leaf)
    owner.register_parameter(leaf, parameter)
