"""`equalise`: channels of one tensor brought to like ranges, by scales that norms give up and the weights behind take.

In: a traced graph. Out: a copy with other values of some parameters, or the graph itself where there is nothing to do.
Channel c of what an affine norm gives has mean b_c and spread |w_c|; where linears alone read it, dividing both by s_c
and multiplying column c of the linears' weights by s_c changes nothing. s_c is the square root of the channel's range
over its column's (SmoothQuant, arXiv 2211.10438, with the norm's own parameters in place of data), as a power of two.
Holds: the graph computes the same bits, since powers of two are exact; names, nodes and shapes stay.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sbs_fx.passes.graph import attribute, with_tensors

aten = torch.ops.aten

_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2, None)}  # places of weight and bias
_SPREADS = 3.0  # of a channel, beyond its mean
_LARGEST = 6  # power of two


@torch.no_grad()
def equalise(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Scales of norms moved into the linears that read them.

    Args:
        graph_module: traced; it stays as it is.

    Returns:
        A copy that gives the same bits and has the tensors that did not change in common with it, or the graph itself
        where there is nothing to move.

    >>> import torch
    >>> from sbs_fx.passes import equalise, trace
    >>> net = torch.nn.Sequential(torch.nn.LayerNorm(3), torch.nn.Linear(3, 2))
    >>> net[0].weight.data = torch.tensor([1.0, 64.0, 1.0])
    >>> graph = equalise(trace(net.eval(), torch.randn(2, 3)))
    >>> bool(graph.get_parameter("0.weight").max() < 64)
    True
    """
    changed: dict[str, Tensor] = {}
    readers = _readers(graph_module)
    for norm in graph_module.graph.nodes:
        found = _movable(norm, readers)
        if found is None:
            continue
        parameters, weights = found
        values = [attribute(graph_module, name).detach() for name in parameters]
        columns = [attribute(graph_module, name).detach() for name in weights]
        if values[0].ndim != 1:
            continue
        reach = _SPREADS * values[0].abs() + (values[1].abs() if len(values) > 1 else 0)
        scale = _powers(reach, torch.stack([each.abs().amax(0) for each in columns]).amax(0))
        if (scale == 1).all():
            continue
        moved = {name: value / scale for name, value in zip(parameters, values, strict=True)}
        moved |= {name: value * scale for name, value in zip(weights, columns, strict=True)}
        back = [*(moved[name] * scale for name in parameters), *(moved[name] / scale for name in weights)]
        # reason: half precision has few exponents, and what falls below them is no longer exact
        if all(torch.equal(a, b) for a, b in zip(back, [*values, *columns], strict=True)):
            changed |= moved
    return with_tensors(graph_module, changed) if changed else graph_module


def _powers(reach: Tensor, columns: Tensor) -> Tensor:
    """Scales by channel, around 1: those of nothing are 1."""
    usable = (reach > 0) & (columns > 0)
    ratio = torch.where(usable, reach, 1.0).double().log2() - torch.where(usable, columns, 1.0).double().log2()
    if not usable.any():
        return torch.ones_like(reach)
    power = ((ratio - ratio[usable].median()) / 2).round().clamp(-_LARGEST, _LARGEST)
    return torch.where(usable, power.exp2(), 1.0).to(reach.dtype)


def _readers(graph_module: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Parameter or buffer -> the nodes that read it, under whatever node it is fetched."""
    readers: dict[str, list[fx.Node]] = {}
    for node in graph_module.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).extend(node.users)
    return readers


def _movable(norm: fx.Node, readers: dict[str, list[fx.Node]]) -> tuple[list[str], list[str]] | None:
    """Names of the norm's parameters and of the weights behind it; None where something else reads any of them."""
    places = _NORMS.get(norm.target)
    if places is None:
        return None
    operands = [norm.args[i] for i in places if i is not None and i < len(norm.args)]
    parameters = [str(x.target) for x in operands if isinstance(x, fx.Node) and x.op == "get_attr"]
    if not parameters or operands[0] is None or len(parameters) != sum(x is not None for x in operands):
        return None
    linears, weights = list(norm.users), list[str]()
    for linear in linears:
        weight = linear.args[1] if len(linear.args) > 1 else None
        if linear.target is not aten.linear.default or linear.args[0] is not norm:
            return None
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        weights.append(str(weight.target))
    alone = all(readers[name] == [norm] for name in parameters)
    together = all(reader in linears for name in weights for reader in readers[name])
    return (parameters, list(dict.fromkeys(weights))) if linears and alone and together else None
