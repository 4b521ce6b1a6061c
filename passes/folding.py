"""Which values can be computed once, and which batch norms dissolve into the layer before them.

In: a graph whose batch norms are `batch_norm` nodes, or modules that take the same first arguments. Out: sets of nodes,
no values. Invariant: a traced graph and the gated graph of any of its slim forms give the same answer, so that a plan
can be priced by what its static graph will hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
}
TRANSPOSED = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
WITH_BIAS = CONVOLUTIONS | TRANSPOSED | {aten.linear.default}
RECURRENT = {aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input}  # weights are argument 2
CELLS = {aten.lstm_cell.default, aten.gru_cell.default, aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default}
WEIGHTS_OF_CELL = slice(2, 4)  # places among their arguments
WEIGHT, BIAS = 1, 2  # places among their arguments

# Operators that multiply and add up; of parameters alone they are no work of a layer.
CONSTANT_PRODUCTS = WITH_BIAS | {
    *(aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default, aten.vdot.default),
    *(aten.addmm.default, aten.baddbmm.default, aten.addmv.default, aten.outer.default, aten.einsum.default),
    *(aten.inner.default, aten.kron.default, aten.linalg_multi_dot.default),
}


def constant_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on parameters and buffers alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr" or (
            node.op in ("call_function", "call_module")
            and all(source in found for source in node.all_input_nodes)
            and not _is_random(node)
        ):
            found.add(node)
    return found


def _is_random(node: fx.Node) -> bool:
    if node.target is aten.dropout.default:  # reason: a module once gates are in, and nothing in eval mode
        return False
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def has_statistics(node: fx.Node) -> bool:
    """Whether a node is a batch norm that uses running means and variances."""
    return node.target is aten.batch_norm.default and not node.args[5] and node.args[3] is not None


def folded_norms(
    graph: fx.Graph, norms: Iterable[fx.Node], readers: Callable[[fx.Node], int]
) -> dict[fx.Node, fx.Node]:
    """Layer -> the batch norm that folds into it: its input is a convolution or a linear that nothing else reads.

    A weight that several layers share is left alone: its layers would no longer agree on its values. So is a layer
    whose weight or bias depends on the input.

    Args:
        norms: the batch norms with statistics. readers: how many layers read the weight of a layer.
    """
    constants = constant_nodes(graph)

    def is_constant(argument: Any) -> bool:
        return not isinstance(argument, fx.Node) or argument in constants

    found = {}
    for norm in norms:
        layer = _layer_before(norm)
        if (
            layer is not None
            and all(is_constant(argument) for argument in (*layer.args[WEIGHT : BIAS + 1], *norm.args[1:5]))
            and readers(layer.args[WEIGHT]) == 1  # type: ignore[arg-type]
        ):
            found[layer] = norm
    return found


def shared_biases(graph: fx.Graph) -> set[fx.Node]:
    """Layers whose bias is a parameter or buffer that something else reads too. In a static graph each has a bias of
    its own, as its values depend on the layer's scales."""
    return {
        node
        for node in graph.nodes
        if node.target in WITH_BIAS
        and isinstance(bias := node.args[BIAS], fx.Node)
        and bias.op == "get_attr"
        and len(bias.users) > 1
    }


def _layer_before(norm: fx.Node) -> fx.Node | None:
    """The layer that feeds a batch norm and nothing else. In between, positions may be picked (what `slim` does behind
    an operator that runs at full width), and tokens flattened: channels stay last."""
    source: Any = norm.args[0]
    flat, channels = source.meta["val"].ndim == 2, source.meta["val"].shape[-1]
    flattened = False
    while _reads(source) == 1:
        if source.target in (aten.reshape.default, aten.flatten.using_ints):
            flattened = True
            if source.args[0].meta["val"].shape[-1] != channels:
                return None
        elif source.target is aten.index_select.default:
            rank = source.meta["val"].ndim
            if source.args[1] % rank == (rank - 1 if flat else 1):
                return None
        else:
            break
        source = source.args[0]
    if _reads(source) != 1:
        return None
    if source.target in CONVOLUTIONS | TRANSPOSED and not flattened:
        return source
    return source if source.target is aten.linear.default and flat else None


def _reads(node: fx.Node) -> int:
    """How many nodes read the values of a tensor, not its shape alone."""
    return sum(not _asks_for_shape(user, node) for user in node.users)


def _asks_for_shape(user: fx.Node, node: fx.Node) -> bool:
    return user.target is aten.sym_size.int or (user.target is aten.reshape_as.default and user.args[0] is not node)
