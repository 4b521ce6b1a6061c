"""`integer_joins`: no tensor of a convolutional block leaves its codes where streams join.

In: a static graph from `finalize` and batches. Out: a copy in which the operands of residual adds, products and
concatenations that come from convolutions, and the inputs and outputs of pools, are 8-bit codes as well, one
quantisation a tensor, shared by its readers: so compilers for integer kernels keep a block in integers from end to end.
Holds: a tensor that already has 8-bit codes is not quantised again; streams that no convolution writes, as in
transformers, stay in float, where they err less and cost little; so does what a layer is to read in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.data.batches import in_cache
from sbs_fx.passes.channels.facts import facts_of, non_negative
from sbs_fx.passes.dialects import DEQUANTIZE, QUANTIZE, StaticActivation, quantizers, set_dialect, static_of
from sbs_fx.passes.folding import CONVOLUTIONS
from sbs_fx.passes.graph import with_tensors
from sbs_fx.passes.static.finalize import MAX_CODE, MIDDLE
from sbs_fx.passes.static.fused import fused
from sbs_fx.quantizer.ranges import SAMPLED, Histogram
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten

BITS = 8
_IMAGES = 64  # that ranges are taken from
Activations = dict[str, StaticActivation]


def integer_joins(
    static: fx.GraphModule,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    method: str = "mse",
    percentile: float = 99.99,
    known: Mapping[str, Histogram] | None = None,
    zero_points: bool = True,
) -> fx.GraphModule:
    """Another graph of the same tensors with integer joins, their ranges from what the graph computes on `batches`.

    Args:
        static: from `finalize`.
        batches: tuples of inputs as the graph takes them; memory does not grow with their number.
        method, percentile: as in `sbs_fx.calibration.calibrate.calibrate`, for 8 bits.
        known: tensors whose values are known by other means, by name; they are not looked at on the batches.
        zero_points: codes may stand for zero anywhere; False: signed codes around zero.

    The activations of the result are the new tensors too, as "<tensor>_joined".

    >>> static = integer_joins(finalize(result.gated), [(images,)])
    >>> static(images).shape
    torch.Size([2, 4])
    """
    result = with_tensors(static, {})
    activations = dict(static_of(static).activations)
    _use_all_codes(result)
    sites = _sites(result.graph, {*static_of(static).floats})
    if sites:
        unsigned = {*non_negative(result.graph.nodes)} if zero_points else set()
        gates = {n: SuperBitQuantizer(signed=n not in unsigned, affine=zero_points) for n in sites}
        _set_ranges(result, gates, batches, method, percentile, known or {})
        for tensor, readers in sites.items():
            _quantize(result.graph, tensor, readers, gates[tensor], activations)
        _share_codes_of_pools(result.graph, activations)
    _drop_ceilings(result)
    set_dialect(result, replace(static_of(static), activations=_in_order(result.graph, activations)))
    result.graph.lint()
    result.recompile()
    return result.eval()


# -- where -------------------------------------------------------------------------------------------------------------


def _sites(graph: fx.Graph, floats: set[str]) -> dict[fx.Node, list[fx.Node]]:
    """Tensor -> the joins, pools and means that are to read its codes; none that gives what a layer reads in float."""
    stream: set[fx.Node] = set()  # values that a convolution, or a join of such values, has made
    sites: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        operands = [n for n in node.all_input_nodes if n in stream]
        facts = facts_of(node.target)
        if node.target in CONVOLUTIONS:
            stream.add(node)
        elif facts.codes and operands:
            # reason: the other operand of an add may be a stream that only normalised layers have written so far
            read = node.all_input_nodes if node.target is aten.add.Tensor and _alike(node) else operands
            for tensor in () if _gives(node, floats) else read:
                sites.setdefault(tensor, []).append(node)
            if facts.codes != "mean":
                stream.add(node)
        elif operands and facts.elementwise and len(node.all_input_nodes) == 1:  # such as an activation
            stream.add(node)
    return sites


def _gives(node: fx.Node, floats: set[str]) -> bool:
    """Whether one of these tensors is the node, or is made of it alone without another join."""
    stack = [node]
    while stack:
        source = stack.pop()
        if source.name in floats:
            return True
        alone = [n for n in source.users if len(n.all_input_nodes) == 1]
        stack += [n for n in alone if facts_of(n.target).codes != "join" and n.target != QUANTIZE]
    return False


def _alike(node: fx.Node) -> bool:
    """Whether all operands are tensors of the result's shape that the input determines."""
    shape = node.meta["val"].shape
    return all(n.op == "call_function" and n.meta["val"].shape == shape for n in node.all_input_nodes)


# -- ranges ------------------------------------------------------------------------------------------------------------


class _Observer(fx.Interpreter):
    """Keeps a histogram of the values of some nodes, by name."""

    def __init__(self, module: fx.GraphModule, names: Iterable[str]) -> None:
        super().__init__(module)
        self.histograms = {name: Histogram(SAMPLED) for name in names}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.histograms:
            self.histograms[n.name].add(value)
        return value


def _set_ranges(
    module: fx.GraphModule,
    gates: Mapping[fx.Node, SuperBitQuantizer],
    batches: Iterable[tuple[Tensor, ...]],
    method: str,
    percentile: float,
    known: Mapping[str, Histogram],
) -> None:
    observer = _Observer(fused(module), (node.name for node in gates if node.name not in known))
    seen = 0
    with torch.no_grad():
        for batch in batches if observer.histograms else ():
            if seen >= _IMAGES:
                break
            seen += len(batch[0])
            for part in in_cache(batch):
                observer.run(*part)
    for node, gate in gates.items():
        gate.fix(BITS)
        (known.get(node.name) or observer.histograms[node.name]).set_range(gate, method, percentile)


# -- nodes -------------------------------------------------------------------------------------------------------------


def _quantize(
    graph: fx.Graph, tensor: fx.Node, readers: list[fx.Node], gate: SuperBitQuantizer, activations: Activations
) -> None:
    """Let the readers read 8-bit codes of the tensor: those it has, or new ones."""
    values = _full_quantizer(tensor)
    if values is None:
        symmetric = gate.signed and gate.below is None
        zero = MIDDLE if symmetric else -int(gate._bounds(torch.float32)[0])
        values = _new_quantizer(graph, tensor, float(gate.scale()), zero, activations)
    for reader in readers:
        reader.replace_input_with(tensor, values)


def _new_quantizer(graph: fx.Graph, tensor: fx.Node, scale: float, zero: int, activations: Activations) -> fx.Node:
    """8-bit codes of a tensor; the node that holds their values.

    A quantiser of fewer bits then reads these values. Its step is made an odd number of theirs, so that it rounds as it
    did before: its boundaries lie between two fine codes, never on one.
    """
    coarse = [user for user in tensor.users if user.target is QUANTIZE]
    steps = int(coarse[0].args[1] / scale) if coarse else 0
    if steps:
        scale = coarse[0].args[1] / (steps - 1 + steps % 2)
    name, values = f"{tensor.name}_joined", tensor
    for target, suffix, dtype in ((QUANTIZE, "quantized", torch.uint8), (DEQUANTIZE, "dequantized", torch.float32)):
        arguments = (values, scale, zero, 0, MAX_CODE, torch.uint8)
        with graph.inserting_after(values):
            values = graph.create_node("call_function", target, arguments, name=f"{name}_{suffix}")
        values.meta["val"] = tensor.meta["val"].to(dtype)
    for user in coarse if steps else ():
        user.replace_input_with(tensor, values)
    activations[name] = StaticActivation(BITS, zero, values.args[0].name, values.name)
    return values


def _full_quantizer(tensor: fx.Node) -> fx.Node | None:
    """The node that holds the values of a tensor's 8-bit codes, if it has any."""
    codes = (user for user in tensor.users if user.target is QUANTIZE)
    return next((values for q in codes for values in q.users if values.target is DEQUANTIZE), None)


def _drop_ceilings(module: fx.GraphModule) -> None:
    """What cuts values off above (relu6, hardtanh from 0) where all readers' codes end there anyway becomes a relu:
    kernels have one, and every code stays."""
    ends = {first: _last_code(last) for first, last in quantizers(module.graph)}
    for node in module.graph.nodes:
        top = _ceiling(node)
        if (
            top is not None
            and node.users
            and all(user in ends and user.args[2] == 0 and top / user.args[1] > ends[user] - 0.5 for user in node.users)
        ):
            node.target, node.args, node.kwargs = aten.relu.default, node.args[:1], {}


def _ceiling(node: fx.Node) -> float | None:
    """Where a function that is 0 below 0 stops to grow; None if the node is no such function."""
    if node.target is aten.relu6.default:
        return 6.0
    bounds = node.args[1:] if node.target in (aten.hardtanh.default, aten.clamp.default) else ()
    return float(bounds[1]) if len(bounds) == 2 and bounds[0] == 0 and bounds[1] is not None else None


def _last_code(last: fx.Node) -> int:
    """The largest code that a quantiser lets through."""
    node = last.args[0]
    while node.target is aten.clamp_min.default:
        node = node.args[0]
    return node.args[1] if node.target is aten.clamp_max.default else MAX_CODE


def _share_codes_of_pools(graph: fx.Graph, activations: Activations) -> None:
    """What a pool gives has the codes of what it takes: rounding commutes with picking, so one scale serves both."""
    for pool in [n for n in graph.nodes if facts_of(n.target).codes == "pick"]:
        before = pool.args[0]
        if before.target is not DEQUANTIZE or before.args[0].target is not QUANTIZE:
            continue
        after = _full_quantizer(pool)
        if after is None:
            users = list(pool.users)
            after = _new_quantizer(graph, pool, *before.args[1:3], activations)
            for user in users:
                user.replace_input_with(pool, after)
        if len(before.users) == len(before.args[0].users) == 1:
            for node in (before, before.args[0]):
                node.args = (node.args[0], *after.args[1:])


def _use_all_codes(module: fx.GraphModule) -> None:
    """Signed 8-bit codes may reach -128, one step below the symmetric grid, which saves a clip that no kernel has."""
    for first, last in list(quantizers(module.graph)):
        low = last.args[0]
        if low.target is aten.clamp_min.default and low.args == (first, 1):
            low.replace_all_uses_with(first)
            module.graph.erase_node(low)


def _in_order(graph: fx.Graph, activations: Activations) -> Activations:
    """The activations as the graph now is: in its order, with the nodes that hold codes and values."""
    by_values = {activation.values: (name, activation) for name, activation in activations.items()}
    result = {}
    for _, last in quantizers(graph):
        name, activation = by_values[last.name]
        result[name] = activation._replace(codes=last.args[0].name, zero_point=last.args[2])
    return result
