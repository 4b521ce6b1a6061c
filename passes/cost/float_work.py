"""What multiplies in a graph: its layers, and operators that are none, such as those without a rule, in float.

In: inference over a graph. Out: one `LayerExpression` an operator that multiplies, and the operators of which nobody
can say what they cost. Counts of what is no layer are torch's own where it has a formula (`torch.utils.flop_counter`,
two operations a multiply-accumulate; another package registers one with `register_flop_formula`), those of the table
here elsewhere; other ATen operators multiply nothing by matrices and count as 0, as elementwise ones do. One example
(batch 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.inference import Inference
from sbs_fx.passes.cost.layers import LayerExpression, Product, layer_expression, symbol_values

KIND = "float"
_EINSUM = torch.ops.aten.einsum.default
_UNCOUNTABLE = ("linalg_", "_linalg_", "cholesky", "lu_", "ormqr", "geqrf", "triangular_solve")


def _bilinear(args: Sequence[Any], out: Sequence[Tensor]) -> int:
    """y_o = x1 W_o x2, the smaller product first."""
    weight = args[2]
    rows = out[0].numel() // weight.shape[0]
    return rows * weight.shape[0] * (weight.shape[1] * weight.shape[2] + min(weight.shape[1:]))


def _sampled(args: Sequence[Any], out: Sequence[Tensor]) -> int:
    """Two neighbours along each dimension of the grid."""
    return out[0].numel() * 2 ** (out[0].ndim - 2)


def _aligned(args: Sequence[Any], out: Sequence[Tensor]) -> int:
    """Four neighbours of each sampled place; where the size of a box says how many, those of the whole map."""
    space, cells, ratio = args[0].shape[2:], out[0].shape[2:], args[5]
    samples = ratio**2 if ratio > 0 else math.prod(math.ceil(n / m) for n, m in zip(space, cells, strict=True))
    return out[0].numel() * 4 * samples


def _fourier(args: Sequence[Any], out: Sequence[Tensor]) -> int:
    """2.5 n log2 n, half of the 5 n log2 n operations by which transforms are compared (Cooley and Tukey, radix 2)."""
    whole = max((x for x in (args[0], out[0])), key=lambda x: x.numel())
    points = math.prod(whole.shape[dim] for dim in args[1])
    return math.ceil(2.5 * whole.numel() * math.log2(max(2, points)))


def _distances(args: Sequence[Any], out: Sequence[Tensor]) -> int:
    return out[0].numel() * args[0].shape[-1]


def _factored(cubes: float) -> Callable[[Sequence[Any], Sequence[Tensor]], int]:
    """Of square matrices, a share of n^3 each (Golub and Van Loan, Matrix Computations: 2/3 n^3 operations for LU, 1/3
    for Cholesky, 2 for an inverse), and n^2 for each column that a system is solved for."""

    def formula(args: Sequence[Any], out: Sequence[Tensor]) -> int:
        n, matrices = args[0].shape[-1], args[0].numel() // max(1, args[0].shape[-1] ** 2)
        solved = args[1].numel() * n if len(args) > 1 and isinstance(args[1], Tensor) else 0
        return math.ceil(cubes * matrices * n**3) + solved

    return formula


_FORMULAS: Mapping[str, Callable[[Sequence[Any], Sequence[Tensor]], int]] = {
    "aten::bilinear": _bilinear,
    "aten::grid_sampler": _sampled,
    "aten::grid_sampler_2d": _sampled,
    "aten::grid_sampler_3d": _sampled,
    "torchvision::roi_align": _aligned,
    "torchvision::ps_roi_align": _aligned,
    "aten::_fft_r2c": _fourier,
    "aten::_fft_c2c": _fourier,
    "aten::_fft_c2r": _fourier,
    "aten::_cdist_forward": _distances,
    "aten::cdist": _distances,
    "aten::_linalg_det": _factored(1 / 3),
    "aten::_linalg_slogdet": _factored(1 / 3),
    "aten::linalg_lu_factor_ex": _factored(1 / 3),
    "aten::_linalg_solve_ex": _factored(1 / 3),
    "aten::linalg_cholesky_ex": _factored(1 / 6),
    "aten::linalg_inv_ex": _factored(1),
    "aten::linalg_solve_triangular": _factored(0),
}


# Of inputs alone, as the size of what comes out depends on data: the area that each pair of boxes shares.
_OF_INPUTS: Mapping[str, Callable[[Sequence[Any]], int]] = {"torchvision::nms": lambda args: args[0].shape[0] ** 2}


def all_layers(
    inference: Inference, traced_sizes: Mapping[sympy.Symbol, int]
) -> tuple[tuple[LayerExpression, ...], dict[str, str]]:
    """What multiplies, in graph order, and node -> operator of what cannot be counted, at the sizes of the trace."""
    symbols = symbol_values(inference)
    sizes = {s: 1 if v is None else v for s, v in symbols.items()} | {**traced_sizes}
    nodes = {node.name: node for node in inference.graph_module.graph.nodes}
    layers, uncounted = [], {}
    for node in nodes.values():
        if node.name in inference.layers:
            layer = layer_expression(inference, nodes, inference.layers[node.name], symbols)
            unknown = layer.symbols - symbols.keys()
            if unknown:  # reason: how many rows there are depends on values, as behind a mask
                uncounted[node.name] = f"{layer.name}, whose number of rows depends on data,"
                layer = layer.without(unknown)
            layers.append(layer)
            continue
        if node.op != "call_function":
            continue
        macs = _macs(node, sizes, node.name not in inference.unknown)
        if macs is None:
            uncounted[node.name] = str(node.target)
        elif macs:
            # reason: what has a rule does as much for each coordinate of its result
            types = () if node.name in inference.unknown else inference[node]
            types = types[0] if types and isinstance(types[0], tuple) else types  # of several results the first
            dims = tuple(dim for dim in types if d.axes(dim))
            scale = macs // math.prod(dim.size for dim in dims)
            name = f"{str(node.target).removesuffix('.default')} ({node.name})"
            layers.append(LayerExpression(name, node.name, KIND, (Product(scale, dims, None, None),), {}))
    return tuple(layers), uncounted


def _macs(node: fx.Node, sizes: Mapping[sympy.Symbol, int], has_rule: bool) -> int | None:
    """Of one call; None if nobody knows."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0 if has_rule else None
    name, overload = node.target._schema.name, node.target
    counts = overload._overloadpacket in flop_registry or overload is _EINSUM
    if name not in _FORMULAS and name not in _OF_INPUTS and not counts:
        namespace, _, operator = name.partition("::")
        return None if not has_rule and (namespace != "aten" or operator.startswith(_UNCOUNTABLE)) else 0

    def concrete(value: Any) -> Any:
        value = value.meta.get("val") if isinstance(value, fx.Node) else value
        if isinstance(value, Tensor):
            return torch.empty([_number(n, sizes) for n in value.shape], dtype=value.dtype, device="meta")
        return _number(value, sizes) if isinstance(value, torch.SymInt) else value

    try:
        args, kwargs = pytree.tree_map_only((fx.Node, torch.SymInt), concrete, (list(node.args), dict(node.kwargs)))
        if name in _OF_INPUTS:
            return _OF_INPUTS[name](args)
        out = pytree.tree_map(concrete, node.meta["val"])
    except TypeError:  # a size that depends on values
        return None
    if name in _FORMULAS:
        return _FORMULAS[name](args, [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)])
    if overload is not _EINSUM:
        return int(flop_registry[overload._overloadpacket](*args, **kwargs, out_val=out)) // 2
    with FlopCounterMode(display=False) as counter:  # reason: it is products of matrices, which torch counts one by one
        overload(*args, **kwargs)
    return counter.get_total_flops() // 2


def _number(size: Any, sizes: Mapping[sympy.Symbol, int]) -> int:
    return int(size.node.expr.subs(sizes)) if isinstance(size, torch.SymInt) else size
