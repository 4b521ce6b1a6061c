"""A static graph as the members of a file of `torch.export`, without capturing it again.

In: a packed static graph, whose nodes know their shapes. Out: what `torch.export.save` would write of it, by name, or
None for what a static graph seldom has (comparisons between sizes, operators without a schema, outputs that no operator
computes): torch captures and writes those. Holds: `torch.export.load` reads it and computes what the graph does. Sizes
and dtypes of values are right; strides of views are those that they had when the model was traced.
"""

from __future__ import annotations

import inspect
import json
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._export.serde import schema, serialize
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

from sbs_fx.export.program import plain_outputs
from sbs_fx.export.schema import Seldom
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.passes.graph import read_tensors
from sbs_fx.passes.static.fold import Constants

VERSION = 8  # of torch's schema that is written here
_FIXED = {
    "archive_format": b"pt2", "archive_version": b"0", ".data/version": b"6\n", "data/sample_inputs/model.pt": b"",
    "data/constants/model_constants_config.json": b'{"config": {}}', "byteorder": sys.byteorder.encode(),
}  # fmt: skip
_POSITIONAL, _KEYWORD = int(schema.ArgumentKind.POSITIONAL), int(schema.ArgumentKind.KEYWORD)
_SIZES = (int, torch.SymInt)


def program_members(packed: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, bytes] | None:
    """Members by name; None if torch is to write the graph, as for inputs of another size than it was traced for."""
    spec = inputs_of(packed)
    if spec is None or spec.guards or spec.ranges or schema.SCHEMA_VERSION[0] != VERSION:
        return None
    values = [node.meta.get("val") for node in packed.graph.find_nodes(op="placeholder")]
    if len(values) != len(inputs) or not all(map(_is_of, inputs, values)):
        return None
    try:
        return _Writer(packed).members()
    except Seldom:
        return None


def _is_of(tensor: Tensor, value: Any) -> bool:
    """Whether a tensor has the dtype of a placeholder, and its sizes where they are fixed."""
    return (
        isinstance(value, Tensor)
        and (value.dtype, value.ndim) == (tensor.dtype, tensor.ndim)
        and all(isinstance(a, torch.SymInt) or a == b for a, b in zip(value.shape, tensor.shape, strict=True))
    )


class _Writer:
    def __init__(self, packed: fx.GraphModule) -> None:
        self.graph, self.constants = packed.graph, Constants(packed)
        self.tensors = read_tensors(packed)
        self.names = {node.name for node in self.graph.nodes}
        self.lifted: dict[str, str] = {}  # tensor -> name of the input that stands for it
        for name in self.tensors:
            self.lifted[name] = self._unused(f"b_{name.replace('.', '_')}")
        self.items: dict[tuple[fx.Node, int], str] = {}  # operator and place among its results -> name
        self.values: dict[str, Any] = {}
        self.sizes: dict[str, Any] = {}
        self.metas: dict[Any, Any] = {}
        self.symbols: set[Any] = set()

    def members(self) -> dict[str, bytes]:
        weights = {name: self._weight(i, name) for i, name in enumerate(self.tensors)}
        inputs, specs = zip(*self._inputs(), strict=True)
        rows = [row for node in self.graph.nodes if node.op == "call_function" for row in self._rows(node)]
        (output,) = self.graph.find_nodes(op="output")
        outputs = [self._output(leaf) for leaf in pytree.tree_leaves(output.args[0])]
        graph = {
            "inputs": inputs, "outputs": outputs, "nodes": rows, "tensor_values": self.values,
            "sym_int_values": self.sizes, "sym_bool_values": {}, "is_single_tensor_return": False,
            "custom_obj_values": {}, "sym_float_values": {},
        }  # fmt: skip
        module = {
            "graph": graph,
            "signature": {"input_specs": specs, "output_specs": [{"user_output": {"arg": each}} for each in outputs]},
            "module_call_graph": [{"fqn": "", "signature": self._call()}],
            "metadata": {}, "treespec_namedtuple_fields": {},
        }  # fmt: skip
        program = {
            "graph_module": module,
            "opset_version": {"aten": torch._C._get_max_operator_version()},
            "range_constraints": {str(symbol): {"min_val": 1, "max_val": None} for symbol in self.symbols},
            "schema_version": dict(zip(("major", "minor"), schema.SCHEMA_VERSION, strict=True)),
            "verifiers": ["TRAINING"], "torch_version": str(torch.__version__), "guards_code": [],
        }  # fmt: skip
        config = {name: row for name, (row, _) in weights.items()}
        return {
            **{f"data/weights/{row['path_name']}": data for row, data in weights.values()},
            "data/weights/model_weights_config.json": json.dumps({"config": config}).encode(),
            **_FIXED,
            "models/model.json": json.dumps(program, allow_nan=False).encode(),
        }

    def _inputs(self) -> list[tuple[Any, Any]]:
        found = []
        for name, tensor in self.tensors.items():
            self.values[self.lifted[name]] = self._meta(tensor)
            arg = {"name": self.lifted[name]}
            kind: dict[str, Any] = {"buffer": {"arg": arg, "buffer_name": name, "persistent": True}}
            if isinstance(tensor, torch.nn.Parameter):
                kind = {"parameter": {"arg": arg, "parameter_name": name}}
            found.append(({"as_tensor": arg}, kind))
        for node in self.graph.find_nodes(op="placeholder"):
            value = node.meta["val"]
            expressions = [size.node.expr for size in value.shape if isinstance(size, torch.SymInt)]
            if not all(expression.is_Symbol for expression in expressions):
                raise Seldom
            self.symbols.update(expressions)
            self.values[node.name] = self._meta(value)
            argument = {"as_tensor": {"name": node.name}}
            found.append((argument, {"user_input": {"arg": argument}}))
        return found

    def _call(self) -> dict[str, Any]:
        codegen = self.graph._codegen
        if not isinstance(codegen, _PyTreeCodeGen) or codegen.pytree_info.out_spec is None:
            raise Seldom
        names = [node.name for node in self.graph.find_nodes(op="placeholder")]
        return {
            "inputs": [], "outputs": [],
            "in_spec": pytree.treespec_dumps(pytree.tree_structure((tuple(names), {}))),
            "out_spec": pytree.treespec_dumps(plain_outputs(codegen.pytree_info.out_spec)),
            "forward_arg_names": names,
        }  # fmt: skip

    def _rows(self, node: fx.Node) -> list[dict[str, Any]]:
        """What the schema calls a node; none for one of several results, which the operator's row names."""
        if node.target is operator.getitem:
            return []
        value = node.meta.get("val")
        if node in self.constants.nodes:
            value = self.constants.value(node)
        if isinstance(value, torch.SymInt):
            self._check_symbols([value])
            self.sizes[node.name] = _plain(serialize.serialize_sym_int(value))
            target, names = self._sizes_operator(node)
            inputs = [self._named(n, arg, _POSITIONAL) for n, arg in zip(names, node.args, strict=False)]
            return [_row(node, target, inputs, [{"as_sym_int": {"as_name": node.name}}])]
        if not isinstance(node.target, torch._ops.OpOverload):
            raise Seldom
        arguments = node.target._schema.arguments
        inputs = [self._named(a.name, arg, _POSITIONAL) for a, arg in zip(arguments, node.args, strict=False)]
        inputs += [self._named(a.name, node.kwargs[a.name], _KEYWORD) for a in arguments if a.name in node.kwargs]
        return [_row(node, f"torch.ops.{node.target}", inputs, self._results(node, value))]

    def _sizes_operator(self, node: fx.Node) -> tuple[str, list[str]]:
        if isinstance(node.target, torch._ops.OpOverload):
            return f"torch.ops.{node.target}", [a.name for a in node.target._schema.arguments]
        if getattr(node.target, "__module__", "") != "_operator" or node.kwargs:
            raise Seldom
        return f"_operator.{node.target.__name__}", list(inspect.signature(node.target).parameters)  # type: ignore

    def _results(self, node: fx.Node, value: Any) -> list[dict[str, Any]]:
        if isinstance(value, Tensor):
            self.values[node.name] = self._meta(value)
            return [{"as_tensor": {"name": node.name}}]
        if not isinstance(value, (tuple, list)) or not all(isinstance(part, Tensor) for part in value):
            raise Seldom
        readers = {user.args[1]: user.name for user in reversed(node.users) if user.target is operator.getitem}
        names = []
        for i, part in enumerate(value):
            names.append(readers.get(i) or self._unused(f"{node.name}_{i}"))
            self.items[node, i] = names[-1]
            self.values[names[-1]] = self._meta(part)
        tensors = [{"name": name} for name in names]
        returns = node.target._schema.returns  # type: ignore[union-attr]
        return [{"as_tensors": tensors}] if len(returns) == 1 else [{"as_tensor": each} for each in tensors]

    def _output(self, leaf: Any) -> dict[str, Any]:
        if isinstance(leaf, fx.Node) and leaf.op != "call_function":
            raise Seldom
        return self._argument(leaf)

    def _named(self, name: str, value: Any, kind: int) -> dict[str, Any]:
        return {"name": name, "arg": self._argument(value), "kind": kind}

    def _argument(self, value: Any) -> dict[str, Any]:
        if isinstance(value, fx.Node):
            is_size = isinstance(value.meta.get("val"), _SIZES)
            return {"as_sym_int": self._size(value)} if is_size else {"as_tensor": self._tensor(value)}
        if isinstance(value, (list, tuple)):
            return self._list(value)
        for kind, name in ((bool, "as_bool"), (int, "as_int"), (str, "as_string")):
            if type(value) is kind:
                return {name: value}
        if type(value) is float:
            return {"as_float": value if math.isfinite(value) else str(value).replace("inf", "Infinity")}
        if value is None:
            return {"as_none": True}
        if isinstance(value, torch.device):
            return {"as_device": {"type": value.type, "index": value.index}}
        for kind, name, table in (
            (torch.dtype, "as_scalar_type", serialize._TORCH_TO_SERIALIZE_DTYPE),
            (torch.memory_format, "as_memory_format", serialize._TORCH_TO_SERIALIZE_MEMORY_FORMAT),
            (torch.layout, "as_layout", serialize._TORCH_TO_SERIALIZE_LAYOUT),
        ):
            if isinstance(value, kind):
                return {name: int(table[value])}
        raise Seldom

    def _list(self, values: Any) -> dict[str, Any]:
        for kind, name in ((bool, "as_bools"), (int, "as_ints")):
            if values and all(type(value) is kind for value in values):
                return {name: list(values)}
        if values and all(type(value) is float and math.isfinite(value) for value in values):
            return {"as_floats": list(values)}
        if not values or not all(value is None or type(value) is int or isinstance(value, fx.Node) for value in values):
            raise Seldom
        if any(isinstance(value, fx.Node) and isinstance(value.meta.get("val"), _SIZES) for value in values):
            return {"as_sym_ints": [self._size(value) for value in values]}
        if all(isinstance(value, fx.Node) for value in values):
            return {"as_tensors": [self._tensor(value) for value in values]}
        return {
            "as_optional_tensors": [{"as_none": True} if v is None else {"as_tensor": self._tensor(v)} for v in values]
        }

    def _size(self, value: Any) -> dict[str, Any]:
        return {"as_int": value} if type(value) is int else {"as_name": value.name}

    def _tensor(self, node: fx.Node) -> dict[str, str]:
        if node.op == "get_attr":
            return {"name": self.lifted[str(node.target)]}
        if node.target is operator.getitem:
            return {"name": self.items[node.args]}  # type: ignore[index]
        return {"name": node.name}

    def _meta(self, value: Tensor) -> Any:
        """Shape, strides and dtype as the schema has them."""
        key = (value.dtype, str(value.shape), str(value.stride()), value.device, value.requires_grad)
        if key not in self.metas:
            self._check_symbols([*value.shape, *value.stride()])
            self.metas[key] = _plain(serialize.serialize_tensor_meta(value))
        return self.metas[key]

    def _check_symbols(self, sizes: list[Any]) -> None:
        for size in sizes:
            if isinstance(size, torch.SymInt) and not size.node.expr.free_symbols <= self.symbols:
                raise Seldom  # reason: a size that depends on values

    def _weight(self, number: int, name: str) -> tuple[dict[str, Any], bytes]:
        """What the file says of a tensor, and its bytes, in the order that it has in memory."""
        tensor = self.tensors[name].detach().cpu()
        if sorted(tensor.stride()) != sorted(tensor.contiguous().stride()) or tensor.is_contiguous():
            tensor = tensor.contiguous()
        dense = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)
        data = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().tobytes()
        meta = {**_plain(serialize.serialize_tensor_meta(dense)), "requires_grad": self.tensors[name].requires_grad}
        is_parameter = isinstance(self.tensors[name], torch.nn.Parameter)
        row = {"path_name": f"weight_{number}", "is_param": is_parameter, "use_pickle": False, "tensor_meta": meta}
        return row, data

    def _unused(self, name: str) -> str:
        while name in self.names:
            name += "_"
        self.names.add(name)
        return name


def _row(node: fx.Node, target: str, inputs: Any, outputs: Any) -> Mapping[str, Any]:
    return {
        "target": target, "inputs": inputs, "outputs": outputs, "metadata": {},
        "is_hop_single_tensor_return": None, "name": node.name,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """A value of the schema as JSON."""
    return json.loads(json.dumps(serialize._dataclass_to_dict(value), cls=serialize.EnumEncoder))
