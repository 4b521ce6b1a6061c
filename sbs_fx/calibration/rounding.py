"""Rounding in closed form: each column's error is passed on to the columns that are still to be rounded.

In: a weight, its quantiser, second moments of what the layer reads. Out: the weight on its grid, of less error at the
layer's output than rounding to the nearest level gives. Source: GPTQ (arXiv 2210.17323), in the order of the moments'
diagonal. Holds: every value is a level of the quantiser, so rounding again changes nothing; no output has a larger
error than by rounding to the nearest level.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from sbs_fx.calibration.columns import Product
from sbs_fx.data.batches import Tensors
from sbs_fx.passes import weight_gates
from sbs_fx.passes.gates.masked import silence
from sbs_fx.passes.graph import attribute
from sbs_fx.quantizer.superbit import SuperBitQuantizer
from sbs_fx.training.evaluation import mode

DAMPING = 0.01  # of the mean of the moments' diagonal, as in the paper
_ENOUGH = 4  # samples for each column that a fit is trusted with
_ROWS = 4  # samples of a layer's input for each of its columns, about
_LEAST_ROWS = 4096
_BLOCK = 64  # columns whose error is passed on within the block first


def products(network: fx.GraphModule) -> dict[str, tuple[fx.Node, Product]]:
    """Weight name -> the layer that multiplies it and how, where a single one does and its form is known."""
    gates = {id(gate): name for name, gate in weight_gates(network).items()}
    found: dict[str, tuple[fx.Node, Product]] = {}
    for node in network.graph.find_nodes(op="call_module"):
        name = gates.get(id(network.get_submodule(str(node.target))))
        reader = next(iter(node.users), None)
        if name is None or reader is None or len(node.users) > 1 or node in (reader.args[0], *reader.args[2:]):
            continue
        product = Product.of(reader, node.meta["val"])
        if product is not None:
            found[name] = reader, product
    return found


def damping_of(moments: Tensor, samples: int, share: float = DAMPING) -> Tensor:
    """What is added to the diagonal of (groups, columns, columns) moments, (groups, 1, 1): a share of its mean, more
    where there are fewer than a few samples for each column."""
    share = share * max(1.0, _ENOUGH * moments.shape[1] / samples)
    return share * moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)[:, None, None]


class InputMoments(NamedTuple):
    """E[x x^T] of the columns that a weight is multiplied with, (groups, columns, columns), of so many samples."""

    matrix: Tensor
    samples: int


def input_moments(network: fx.GraphModule, batches: Iterable[Tensors], names: Iterable[str]) -> dict[str, InputMoments]:
    """Moments by weight name, at random places; weights that no `Product` describes are left out.

    Args:
        network: gated, all gates open.
    """
    moments = _Moments(network, set(names))
    batches = list(batches)
    with mode(network, training=False), torch.no_grad():
        for inputs in batches:
            moments.share = len(inputs[0]) / sum(len(b[0]) for b in batches)
            moments.run(*inputs)
    return {name: InputMoments(matrix, moments.samples[name]) for name, matrix in moments.sums.items()}


class _Moments(fx.Interpreter):
    def __init__(self, network: fx.GraphModule, names: set[str]) -> None:
        super().__init__(network)
        self.read = {node: (name, p) for name, (node, p) in products(network).items() if name in names}
        self.sums: dict[str, Tensor] = {}
        self.samples: dict[str, int] = {}
        self.share = 1.0
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.read:
            x, (name, product) = self.env[n.all_input_nodes[0]], self.read[n]
            rows = max(_LEAST_ROWS, _ROWS * product.width) * self.share
            places = product.places(result, max(1, round(rows / len(x))), self.generator)
            columns = product.columns(x, result.shape, places)
            moments = columns @ columns.mT / columns.shape[2] * self.share
            self.sums[name] = self.sums.get(name, 0) + moments
            self.samples[name] = self.samples.get(name, 0) + columns.shape[2]
        return result


@torch.no_grad()
def compensated(weight: Tensor, gate: SuperBitQuantizer, product: Product, moments: Tensor) -> Tensor:
    """The weight rounded by a gate with fixed bits; moments (groups, columns, columns) of the columns of its product.

    The ranges are those of the gate. Rounding is done in float32.
    """
    weights = product.rows(weight.detach().float())
    columns = weights.shape[2]
    each = (gate._along(v, weight) for v in (gate.scale().float(), *gate._bounds(torch.float32)[:2]))
    scale, low, high = (product.rows(torch.as_tensor(v).to(weights).expand(weight.shape))[:, :, :1] for v in each)

    def nearest(values: Tensor) -> Tensor:
        return torch.minimum(torch.maximum((values / scale).round(), low), high) * scale

    order = moments.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True, stable=True)
    rest, factor = weights[:, :, order], _factor(moments[:, order][:, :, order])
    result = torch.empty_like(rest)
    for start in range(0, columns, _BLOCK):
        stop = min(columns, start + _BLOCK)
        part, own = rest[:, :, start:stop], factor[:, start:stop, start:stop]
        errors = torch.empty_like(part)
        for i in range(stop - start):
            rounded = nearest(part[:, :, i : i + 1])
            result[:, :, start + i : start + i + 1] = rounded
            errors[:, :, i : i + 1] = (part[:, :, i : i + 1] - rounded) / own[:, i, i][:, None, None]
            part[:, :, i:] -= errors[:, :, i : i + 1] * own[:, None, i, i:]
        rest[:, :, stop:] -= errors @ factor[:, start:stop, stop:]
    result, plain = result[:, :, order.argsort()], nearest(weights)

    def error(values: Tensor) -> Tensor:
        off = values - weights
        return ((off @ moments.float()) * off).sum(2, keepdim=True)

    result = torch.where(error(result) < error(plain), result, plain)
    return product.weight(result).to(weight.dtype)


def _factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, (groups, columns, columns)."""
    moments = moments.double()
    damping = DAMPING * moments.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    moments = moments + damping[:, None, None] * torch.eye(moments.shape[1]).to(moments)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True).float()


def weight_parameters(network: fx.GraphModule) -> dict[str, nn.Parameter]:
    """Weight name -> the parameter that its gate quantises, where the gate is all that reads it; a weight that is
    computed, or read past its gate, has none. Masks between the two do not count."""
    readers: dict[str, list[fx.Node]] = {}
    for node in network.graph.find_nodes(op="get_attr"):
        readers.setdefault(str(node.target), []).extend(node.users)
    gates = {id(gate): name for name, gate in weight_gates(network).items()}
    parameters = {}
    for target, users in readers.items():
        names = {gates.get(id(gate)) for user in users for gate in _behind_masks(network, user)}
        parameter = attribute(network, target)
        if len(names) == 1 and (name := names.pop()) is not None and isinstance(parameter, nn.Parameter):
            parameters[name] = parameter
    return parameters


def _behind_masks(network: fx.GraphModule, node: fx.Node) -> Iterable[Any]:
    if node.target is silence:
        for user in node.users:
            yield from _behind_masks(network, user)
    else:
        yield network.get_submodule(str(node.target)) if node.op == "call_module" else node
