"""A saved graph read from the members of its file, in a small part of the time that `torch.export.load` takes.

In: the members of a `model.pt2`, checked by `sbs_fx.export.trusted`. Out: the graph with its tensors, as
`torch.export.load(...).module()` gives it, or None for what a static graph seldom has (sub-graphs, objects, numbers
among the outputs of operators): torch reads those. Holds: no member is given to torch, so nothing in it can run.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._export.serde import schema, serialize
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from sbs_fx.passes.graph import hold

_DTYPES = serialize._SERIALIZE_TO_TORCH_DTYPE
_KINDS = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_PLAIN = ("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings", "as_int_lists")
_POSITIONAL = int(schema.ArgumentKind.POSITIONAL)


class Seldom(Exception):
    """What is left to torch."""


def read_graph(members: Mapping[str, bytes]) -> fx.GraphModule | None:
    """The graph of a file; None if torch is to read it. Raises KeyError, ValueError and kin for no graph of ours."""
    program = json.loads(members["models/model.json"])
    if program["schema_version"]["major"] != schema.SCHEMA_VERSION[0]:
        return None
    try:
        return _Reader(program, members).module()
    except Seldom:
        return None


class _Reader:
    def __init__(self, program: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
        self.module_json = program["graph_module"]
        self.values = _Values(self.module_json["graph"], program["range_constraints"])
        self.graph, self.nodes = fx.Graph(), dict[str, fx.Node]()
        self.root = nn.Module()
        self.tensors = {
            **_tensors(members, "data/constants/model_constants_config.json"),
            **_tensors(members, "data/weights/model_weights_config.json"),
        }

    def module(self) -> fx.GraphModule:
        graph, signature = self.module_json["graph"], self.module_json["signature"]
        for argument, spec in zip(graph["inputs"], signature["input_specs"], strict=True):
            self._input(argument, spec)
        for row in graph["nodes"]:
            self._node(row)
        if any(only(spec)[0] != "user_output" for spec in signature["output_specs"]):
            raise Seldom
        self.graph.output(tuple(self._argument(argument) for argument in graph["outputs"]))
        call = self.module_json["module_call_graph"][0]["signature"]
        names = [str(node.target) for node in self.graph.find_nodes(op="placeholder")]
        inputs = pytree.tree_structure((tuple(names), {}))
        if pytree.treespec_loads(call["in_spec"]) != inputs:
            raise Seldom
        info = _PyTreeInfo(names, inputs, pytree.treespec_loads(call["out_spec"]))
        self.graph._codegen = _PyTreeCodeGen(info)
        return fx.GraphModule(self.root, self.graph)

    def _input(self, argument: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
        kind, content = only(spec)
        how, value = only(argument)
        if how != "as_tensor" or kind not in (*_KINDS, "user_input"):
            raise Seldom
        name = value["name"]
        if kind == "user_input":
            node = self.graph.placeholder(name)
        else:
            target = content[_KINDS[kind]]
            hold(self.root, target, self.tensors[target])
            node = self.graph.create_node("get_attr", target)
        node.meta["val"] = self.values.tensor(name)
        self.nodes[name] = node

    def _node(self, row: Mapping[str, Any]) -> None:
        args, kwargs = [], {}
        for entry in row["inputs"]:
            value = self._argument(entry["arg"])
            if entry["kind"] == _POSITIONAL:
                args.append(value)
            else:
                kwargs[entry["name"]] = value
        outputs = row["outputs"]
        target = _target(row["target"])
        if len(outputs) == 1 and only(outputs[0])[0] in ("as_tensor", "as_sym_int"):
            how, value = only(outputs[0])
            name = value["name" if how == "as_tensor" else "as_name"]
            node = self.graph.create_node("call_function", target, tuple(args), kwargs, name)
            node.meta["val"] = self.values.tensor(name) if how == "as_tensor" else self.values.size(name)
            self.nodes[name] = node
            return
        if len(outputs) == 1 and only(outputs[0])[0] == "as_tensors":
            outputs = [{"as_tensor": part} for part in outputs[0]["as_tensors"]]
        if not outputs or any(only(part)[0] != "as_tensor" for part in outputs):
            raise Seldom
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, row.get("name"))
        names = [part["as_tensor"]["name"] for part in outputs]
        for i, name in enumerate(names):
            self.nodes[name] = self.graph.create_node("call_function", operator.getitem, (node, i), name=name)
            self.nodes[name].meta["val"] = self.values.tensor(name)
        node.meta["val"] = tuple(self.values.tensor(name) for name in names)

    def _argument(self, argument: Mapping[str, Any]) -> Any:
        how, value = only(argument)
        if how == "as_none":
            return None
        if how == "as_tensor":
            return self.nodes[value["name"]]
        if how == "as_tensors":
            return [self.nodes[part["name"]] for part in value]
        if how == "as_optional_tensors":
            return [None if "as_none" in part else self.nodes[part["as_tensor"]["name"]] for part in value]
        if how in _PLAIN:
            return value
        if how in ("as_float", "as_floats"):
            return [float(part) for part in value] if how == "as_floats" else float(value)
        if how in ("as_sym_int", "as_sym_ints"):
            return [self._size(part) for part in value] if how == "as_sym_ints" else self._size(value)
        if how == "as_scalar_type":
            return _DTYPES[value]
        if how == "as_memory_format":
            return serialize._SERIALIZE_TO_TORCH_MEMORY_FORMAT[value]
        if how == "as_layout":
            return serialize._SERIALIZE_TO_TORCH_LAYOUT[value]
        if how == "as_device":
            return torch.device(value["type"], value["index"])
        raise Seldom

    def _size(self, value: Mapping[str, Any]) -> Any:
        return value["as_int"] if "as_int" in value else self.nodes[value["as_name"]]


class _Values:
    """Shapes and dtypes by name, as fake tensors; those of one kind are one object."""

    def __init__(self, graph: Mapping[str, Any], ranges: Mapping[str, Any]) -> None:
        self.tensors, self.sizes = graph["tensor_values"], graph["sym_int_values"]
        self.made: dict[str, Tensor] = {}
        reader = serialize.GraphModuleDeserializer()
        reader.shape_env = ShapeEnv(assume_static_by_default=True)
        reader.fake_tensor_mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=reader.shape_env)
        reader.sympy_functions = {name: getattr(functions, name) for name in functions.__all__}
        reader.symbol_name_to_symbol, reader.unbacked_symbols = {}, set()
        reader.symbol_name_to_range = {
            name: ValueRanges(
                serialize._int_to_sympy_int(each["min_val"], -int_oo),
                serialize._int_to_sympy_int(each["max_val"], int_oo),
            )
            for name, each in ranges.items()
        }
        self.reader = reader

    def tensor(self, name: str) -> Tensor:
        meta = self.tensors[name]
        key = json.dumps(meta)
        if key not in self.made:
            self.made[key] = self.reader.deserialize_tensor_meta(serialize._dict_to_dataclass(schema.TensorMeta, meta))
        return self.made[key]

    def size(self, name: str) -> Any:
        return self.reader.deserialize_sym_int(serialize._dict_to_dataclass(schema.SymInt, self.sizes[name]))


def only(union: Mapping[str, Any]) -> tuple[str, Any]:
    """The one entry of what the schema calls a union."""
    ((kind, value),) = union.items()
    return kind, value


def _target(name: str) -> Any:
    """An operator by name; that it may be called is checked before."""
    if name.startswith("torch.ops."):
        library, operator_name, overload = name.split(".")[2:]
        return getattr(getattr(getattr(torch.ops, library), operator_name), overload)
    owner, _, leaf = name.rpartition(".")
    return getattr({"_operator": operator, "math": math, "torch": torch}[owner], leaf)


def _tensors(members: Mapping[str, bytes], config: str) -> dict[str, Tensor]:
    """Tensors by name; those of one member share its storage."""
    storages: dict[tuple[str, Any], Tensor] = {}
    result: dict[str, Tensor] = {}
    for name, entry in (json.loads(members[config])["config"] if config in members else {}).items():
        meta, path = entry["tensor_meta"], f"{config.rpartition('/')[0]}/{entry['path_name']}"
        dtype = _DTYPES[meta["dtype"]]
        if (path, dtype) not in storages:
            data = members[path]
            storages[path, dtype] = (
                torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            )
        numbers = [_numbers(meta["sizes"]), _numbers(meta["strides"]), meta["storage_offset"]["as_int"]]
        value = storages[path, dtype].as_strided(*numbers)
        result[name] = nn.Parameter(value, meta["requires_grad"]) if entry["is_param"] else value
    return result


def _numbers(sizes: Sequence[Mapping[str, Any]]) -> list[int]:
    return [size["as_int"] for size in sizes]
