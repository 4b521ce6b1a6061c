"""`finalize`: from a gated graph with every bitwidth fixed to a static quantised graph.

In: a graph from `insert_gates(..., channels=False)`, its gates fixed and its ranges set. Out: plain ATen and
`quantized_decomposed` nodes, no class of ours, no tensor that nothing reads. Invariant: fed the same codes, each layer
gives the codes that the gated graph gives in eval mode, but for rounding ties where a batch norm was folded.

    activation   quantize_per_tensor(x, s, z, 0, 255, uint8), clipped to its levels as codes, dequantize_per_tensor
    weight       int8 codes, one float32 scale a channel, dequantize_per_channel; transposed: codes * scale
    batch norm   folded into the convolution or linear before it, else `batch_norm` as it was
    at 32 bits   the tensor itself

The forms are those that the integer kernels of torch, ONNX Runtime and OpenVINO recognise and compute alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.passes.dialects import Static, StaticActivation, StoredWeight, gates_of, set_dialect
from sbs_fx.passes.folding import BIAS, TRANSPOSED, WEIGHT, shared_biases
from sbs_fx.passes.gates.insertion import BatchNorm, activation_gates, channel_gates, weight_gates
from sbs_fx.passes.static.fold import GROUPS, Constants, Fold, along_output, batch_norm_folds
from sbs_fx.plan.errors import GraphError
from sbs_fx.quantizer.grid import level, max_level
from sbs_fx.quantizer.superbit import SuperBitQuantizer

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

MIDDLE = 128  # the code of zero where values have a sign: 8-bit codes are stored without one
MAX_CODE = 255


def finalize(gated: fx.GraphModule, *, nonzeros: Mapping[str, int] | None = None) -> fx.GraphModule:
    """The static quantised graph of a gated one, which stays as it is.

    The `Static` of the result names activations as `activation_gates` does. Node names, the input and output structure
    and a dynamic batch are kept; a float parameter stays a parameter, without gradient.

    Args:
        gated: from `insert_gates(..., channels=False)`.
        nonzeros: weight -> how many of its single weights a plan keeps, where it prunes others; the files say so.

    Raises:
        GraphError: the graph has no gates, or has channel gates; a gate is still searching or has no usable range; a
            quantised tensor is float64.

    >>> finalize(result.gated)(images).shape
    torch.Size([2, 4])
    """
    gates = _checked(gated)
    lowering = _Lowering(gated, gates, nonzeros or {})
    for node in gated.graph.nodes:
        lowering.lower(node)
    return lowering.result()


def _checked(gated: fx.GraphModule) -> dict[str, tuple[str, SuperBitQuantizer]]:
    """Module path -> (name of the tensor, quantiser) of all gates, each fit to be made static."""

    def fail(message: str, node: str = "") -> GraphError:
        return GraphError(message, pass_name="finalize", node=node)

    dialect = gates_of(gated)
    if channel_gates(gated):
        raise fail(
            f"the graph still has {len(channel_gates(gated))} channel gates; remove the channels with "
            "`slim` and insert gates into the slim graph with channels=False"
        )
    result = {}
    for paths, gates in ((dialect.weights, weight_gates(gated)), (dialect.activations, activation_gates(gated))):
        for name, gate in gates.items():
            result[paths[name]] = (name, gate)
            if gate.bits is None:
                raise fail(f"the gate of {name!r} is still searching; fix its bitwidth first (apply_bits)", name)
            if not gate.is_float and not bool(torch.isfinite(gate.range).all()):
                raise fail(f"the range of {name!r} is not finite; calibrate the gates on clean data first", name)
    return result


class _Lowering:
    """The new graph while it is built: nodes of the gated graph go in, in order."""

    def __init__(
        self,
        gated: fx.GraphModule,
        gates: Mapping[str, tuple[str, SuperBitQuantizer]],
        nonzeros: Mapping[str, int],
    ) -> None:
        self.gated, self.gates, self.nonzeros = gated, gates, nonzeros
        self.graph = fx.Graph()
        self.graph._codegen = copy.deepcopy(gated.graph._codegen)  # keeps the structure of inputs and outputs
        self.new: dict[fx.Node, Any] = {}  # node of the gated graph -> node of the new one
        self.constants = Constants(gated)
        self.folds = batch_norm_folds(self.constants)
        self.folded = {fold.norm: layer for layer, fold in self.folds.items()}
        self.own_bias = shared_biases(gated.graph)
        self.tensors: dict[str, Tensor] = {}
        self.taken = {
            name
            for name, _ in [
                *gated.named_parameters(remove_duplicate=False),
                *gated.named_buffers(remove_duplicate=False),
                *gated.named_modules(),
            ]
        }
        self.zeros: dict[int, fx.Node] = {}  # number of channels -> zero points
        self.weights: dict[str, StoredWeight] = {}
        self.activations: dict[str, StaticActivation] = {}
        self.floats: list[str] = []

    def lower(self, node: fx.Node) -> None:
        if node.op == "call_module":
            module = self.gated.get_submodule(str(node.target))
            for kind, function in _MODULES.items():
                if isinstance(module, kind):
                    self.new[node] = function(self, node, module)
                    return
            raise GraphError(
                f"calls a {type(module).__name__}, which has no static form", pass_name="finalize", node=node.name
            )
        copied = self.graph.node_copy(node, self._argument)
        copied.meta = copy.copy(node.meta)
        self.new[node] = copied
        if node in self.folds:
            self._fold(node, copied, self.folds[node])
        elif node in self.own_bias:
            self._set_bias(node, copied, self.constants.value(node.args[BIAS]).clone())

    def result(self) -> fx.GraphModule:
        self.graph.eliminate_dead_code()
        for node in self.graph.find_nodes(op="call_function", target=decomposed.dequantize_per_channel.default):
            min(node.users).prepend(node)  # reason: a float weight lives no longer than the layer that reads it
        tensors: dict[str, Tensor] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            name = str(node.target)
            if name not in tensors:
                tensors[name] = self.tensors[name] if name in self.tensors else _copied(self.gated, name)
        result = fx.GraphModule(tensors, self.graph, type(self.gated).__name__)
        live = {node.name for node in self.graph.nodes}
        weights = {name: stored for name, stored in self.weights.items() if name in tensors}
        activations = {name: a for name, a in self.activations.items() if a.values in live}
        result.meta = dict(self.gated.meta)
        set_dialect(result, Static(weights, activations, floats=tuple(self.floats)))
        self.graph.lint()
        return result.eval()

    # -- modules of the gated graph --------------------------------------------------------------------------------

    def quantizer(self, node: fx.Node, gate: SuperBitQuantizer) -> fx.Node:
        name, _ = self.gates[str(node.target)]
        if str(node.target) in gates_of(self.gated).activations.values():
            return self._activation(node, name, gate)
        return self._weight(node, gate)

    def batch_norm(self, node: fx.Node, norm: BatchNorm) -> fx.Node:
        if node in self.folded:
            return self._argument(node.args[0])
        args = fx.node.map_arg(node.args, self._argument)
        return self._call(aten.batch_norm.default, (*args, False, norm.momentum, norm.eps, True), node, name=node.name)

    def dropout(self, node: fx.Node, _: nn.Dropout) -> fx.Node:
        return self._argument(node.args[0])

    # -- activations -----------------------------------------------------------------------------------------------

    def _activation(self, node: fx.Node, name: str, gate: SuperBitQuantizer) -> fx.Node:
        source: fx.Node = self._argument(node.args[0])
        if gate.is_float:
            self.floats.append(source.name)
            return source
        assert isinstance(gate.bits, int)  # one range a tensor, so one bitwidth
        value = node.meta.get("val")
        below, top, _ = level(gate.bits, gate.signed, gate.below)
        zero = MIDDLE if gate.signed and gate.below is None else -below
        arguments = (float(gate.scale()), zero, 0, MAX_CODE, torch.uint8)
        codes = value.to(torch.uint8) if isinstance(value, Tensor) else None
        quantize = decomposed.quantize_per_tensor.default
        last = self._call(quantize, (source, *arguments), codes, name=f"{name}_quantized")
        if zero + top < MAX_CODE:
            last = self._call(aten.clamp_max.default, (last, zero + top), codes, name=f"{name}_at_most")
        if zero + below > 0:
            # reason: two nodes, as compilers take `clamp` for a part of the quantiser and fail
            last = self._call(aten.clamp_min.default, (last, zero + below), codes, name=f"{name}_at_least")
        dequantize = decomposed.dequantize_per_tensor.default
        result = self._call(dequantize, (last, *arguments), node, name=f"{name}_dequantized")
        self.activations[name] = StaticActivation(gate.bits, zero, last.name, result.name)
        return self._typed(result, node)

    # -- weights ---------------------------------------------------------------------------------------------------

    def _weight(self, node: fx.Node, gate: SuperBitQuantizer) -> fx.Node:
        source: fx.Node = node.args[0]
        if source not in self.constants:
            raise GraphError(
                "is a weight that depends on the model's input; it needs an activation gate",
                pass_name="finalize",
                node=source.name,
            )
        layer, fold = next(((user, self.folds[user]) for user in node.users if user in self.folds), (None, None))
        weight = self.constants.value(source)
        factor = None if layer is None or fold is None else along_output(fold.factor.to(weight.device), layer, weight)
        if gate.is_float:
            if source.op == "get_attr" and factor is None:
                return self._argument(source)
            return self._tensor(self._name(source), _scaled(weight, factor), node)
        return self._quantized(node, gate, weight, factor)

    def _quantized(self, node: fx.Node, gate: SuperBitQuantizer, weight: Tensor, factor: Tensor | None) -> fx.Node:
        codes = gate.codes(weight, torch.int8)
        axis = gate.channel_dim % weight.ndim
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        scale = gate.scale().float().expand(weight.shape[axis]).view(shape)
        if factor is not None:
            codes = torch.where(factor < 0, -codes, codes)  # reason: a scale must be positive; levels are symmetric
            scale = (scale.double() * factor.abs()).float()
        layer = next(iter(node.users))
        groups = int(layer.args[GROUPS]) if scale.shape[0] > 1 and layer.target in TRANSPOSED else 1
        if groups > 1:  # reason: all rows of a group have the same scales
            scale = scale.view(groups, -1, *scale.shape[1:])[:, :1]
        name = self._name(node.args[0])
        bits = gate.bits if isinstance(gate.bits, int) else tuple(gate.bits.tolist())
        read_codes = self._tensor(name, codes, None)
        nonzeros = self.nonzeros.get(self.gates[str(node.target)][0])
        self.weights[str(read_codes.target)] = StoredWeight(bits, axis, nonzeros)
        transposed = any(user.target in TRANSPOSED for user in node.users)
        read_scale = self._tensor(f"{read_codes.target}_scale", scale if transposed else scale.flatten(), None)
        if transposed:  # reason: compilers take a transposed convolution of a dequantised weight for a plain one
            floats = self._call(aten.to.dtype, (read_codes, torch.float32), None)
            if groups > 1:
                shape = [groups, weight.shape[0] // groups, *scale.shape[2:]]
                rows = self._call(aten.expand.default, (read_scale, shape), None)
                read_scale = self._call(aten.reshape.default, (rows, [weight.shape[0], *scale.shape[2:]]), None)
            return self._typed(self._call(aten.mul.Tensor, (floats, read_scale), node), node)
        zeros = self._zeros(weight.shape[axis], weight.device)
        top = max_level(8, signed=True)
        arguments = (read_codes, read_scale, zeros, axis, -top, top, torch.int8)
        return self._typed(self._call(decomposed.dequantize_per_channel.default, arguments, node), node)

    def _typed(self, result: fx.Node, node: fx.Node) -> fx.Node:
        """A dequantised tensor in the dtype that the gate gave."""
        dtype = node.meta["val"].dtype
        if dtype == torch.float64:
            raise GraphError(
                "is float64; static graphs compute in float32: convert the model with model.float()",
                pass_name="finalize",
                node=node.name,
            )
        return result if dtype == torch.float32 else self._call(aten.to.dtype, (result, dtype), node)

    def _zeros(self, channels: int, device: torch.device) -> fx.Node:
        """Zero points of a symmetric weight: one tensor for all weights of that many channels."""
        if channels not in self.zeros:
            zeros = torch.zeros(channels, dtype=torch.int8, device=device)
            self.zeros[channels] = self._tensor(f"zero_points_{channels}", zeros, None)
        return self.zeros[channels]

    def _fold(self, node: fx.Node, copied: fx.Node, fold: Fold) -> None:
        """The batch norm's bias becomes the layer's; its factor is in the weight already."""
        weight: fx.Node = node.args[WEIGHT]
        if weight.op != "call_module":  # a layer without a gate on its weight
            value = self.constants.value(weight)
            with self.graph.inserting_before(copied):
                factor = along_output(fold.factor, node, value)
                copied.update_arg(WEIGHT, self._tensor(self._name(weight), _scaled(value, factor), weight))
        self._set_bias(node, copied, fold.bias.to(node.meta["val"].dtype))

    def _set_bias(self, node: fx.Node, copied: fx.Node, value: Tensor) -> None:
        """A bias that no other layer reads, under the name of the old one if nothing else reads that."""
        weight, old = node.args[WEIGHT], node.args[BIAS]
        alone = isinstance(old, fx.Node) and old.op == "get_attr" and len(old.users) == 1
        source = weight.args[0] if weight.op == "call_module" else weight  # type: ignore[union-attr]
        base = str(old.target) if alone else self._bias_name(source)  # type: ignore[union-attr,arg-type]
        self.taken -= {base} if alone else set()
        with self.graph.inserting_before(copied):
            copied.update_arg(BIAS, self._tensor(base, value, None))

    # -- names and nodes -------------------------------------------------------------------------------------------

    def _argument(self, node: fx.Node) -> fx.Node:
        return self.new[node]

    def _call(self, target: Any, args: tuple[Any, ...], like: Any, name: str | None = None) -> fx.Node:
        """A new node; its value has the shape and dtype of `like`, a node or a fake tensor."""
        result = self.graph.create_node("call_function", target, args, name=name)
        value = like.meta.get("val") if isinstance(like, fx.Node) else like
        if value is not None:
            result.meta["val"] = value
        return result

    def _tensor(self, name: str, value: Tensor, like: fx.Node | None) -> fx.Node:
        """A node that reads a new buffer called `name`, or almost so if that name is taken."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        self.tensors[name] = value.detach().contiguous()
        result = self.graph.get_attr(name)
        if like is not None and "val" in like.meta:
            result.meta["val"] = like.meta["val"]
        return result

    @staticmethod
    def _base(source: fx.Node) -> str:
        return str(source.target).removesuffix(".weight") if source.op == "get_attr" else source.name

    def _bias_name(self, source: fx.Node) -> str:
        """Beside the weight; not below it, where it is itself named like a module."""
        base = self._base(source)
        return f"{base}_bias" if source.op == "get_attr" and base == source.target else f"{base}.bias"

    def _name(self, source: fx.Node) -> str:
        """What to call the values that replace a weight: by its own name if nothing else reads it."""
        if source.op != "get_attr":
            return f"{source.name}.weight"
        if len(source.users) == 1:
            self.taken.discard(str(source.target))
        return str(source.target)


_MODULES: dict[type[nn.Module], Callable[[_Lowering, fx.Node, Any], fx.Node]] = {
    SuperBitQuantizer: _Lowering.quantizer,
    BatchNorm: _Lowering.batch_norm,
    nn.Dropout: _Lowering.dropout,
}


def _scaled(weight: Tensor, factor: Tensor | None) -> Tensor:
    return weight.clone() if factor is None else (weight.double() * factor).to(weight.dtype)


def _copied(module: nn.Module, name: str) -> Tensor:
    """A tensor of the gated graph, with storage of its own."""
    owner, _, leaf = name.rpartition(".")
    old = getattr(module.get_submodule(owner), leaf)
    new = old.detach().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
