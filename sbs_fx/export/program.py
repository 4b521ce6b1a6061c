"""A static graph as `torch.export` captures it: where every file format begins.

In: a static graph and example inputs. Out: an exported program. Holds: what was a dynamic dimension when the model was
traced is one again; outputs are in plain containers; no node carries where it came from, which takes more room than
the node.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.export import quiet_torch
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.plan.errors import GraphError

_DESCRIPTIONS = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node", "custom")


def exported_program(
    static: fx.GraphModule, example_inputs: Tensor | Sequence[Tensor], *, largest: int | None = None
) -> torch.export.ExportedProgram:
    """A static graph as `torch.export` captures it; dimensions that were dynamic stay so, up to `largest`.

    Raises:
        GraphError: the number of inputs is wrong, or `torch.export` cannot capture the graph.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    shapes = dynamic_shapes(static, inputs, largest)
    spec = inputs_of(static)
    if spec is not None and (spec.guards or spec.ranges):  # reason: named dimensions may have no guards
        shapes = tuple(dict.fromkeys(shape, Dim.AUTO) for shape in shapes)
    # reason: a dynamic dimension of size 1 would be taken for a constant
    inputs = tuple(
        x.repeat([2 if i in shape and n == 1 else 1 for i, n in enumerate(x.shape)])
        for x, shape in zip(inputs, shapes, strict=True)
    )
    try:
        with quiet_torch():
            program = torch.export.export(static, inputs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise GraphError(
            f"torch.export cannot capture the static graph on inputs of shape "
            f"{[tuple(x.shape) for x in inputs]}: {type(error).__name__}: {error}",
            pass_name="save",
        ) from error
    for node in list(program.graph.nodes):
        for key in _DESCRIPTIONS:  # reason: where a node came from takes more room than the node
            node.meta.pop(key, None)
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)  # reason: one a conversion, and none can fail
    program.graph_module.recompile()
    signature = program.module_call_graph[0].signature
    assert signature is not None
    signature.out_spec = plain_outputs(signature.out_spec)
    return program


def output_names(program: torch.export.ExportedProgram) -> list[str]:
    """A name for each tensor that a program gives, in order: "logits" for one (batch, classes) alone, "output" for any
    other one, of several the keys that lead to each, such as "boxes" or "features_0"; "output_0" where it is a place
    alone."""
    signature = program.module_call_graph[0].signature
    assert signature is not None
    places = pytree.tree_unflatten([*range(signature.out_spec.num_leaves)], signature.out_spec)
    keys = [path for path, _ in pytree.tree_flatten_with_path(places)[0]]
    (last,) = program.graph.find_nodes(op="output")
    values = [value.meta.get("val") if isinstance(value, fx.Node) else None for value in last.args[0]][-len(keys) :]
    tensors = [(path, value) for path, value in zip(keys, values, strict=True) if isinstance(value, Tensor)]
    if len(tensors) == 1:
        return ["logits" if tensors[0][1].ndim == 2 else "output"]
    names = ["_".join(str(getattr(key, "key", getattr(key, "idx", ""))) for key in path) for path, _ in tensors]
    return [f"output_{name}" if name[:1].isdigit() else name for name in names]


def plain_outputs(spec: pytree.TreeSpec) -> pytree.TreeSpec:
    """The structure of an output in containers that every torch knows, or a file could be read only where the library
    is imported that the model comes from: what has names becomes a dict, a named tuple and anything else a tuple."""
    tensors = [torch.empty(0)] * spec.num_leaves
    return pytree.tree_structure(_plain(pytree.tree_unflatten(tensors, spec)))


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind in (dict, OrderedDict):
        return kind((name, _plain(part)) for name, part in value.items())
    if kind is list or isinstance(value, tuple):
        return [_plain(part) for part in value] if kind is list else tuple(_plain(part) for part in value)
    node = pytree.SUPPORTED_NODES.get(kind)
    if node is None:
        return value
    parts, _ = node.flatten_fn(value)
    if isinstance(value, Mapping) and len(value) == len(parts):
        return {str(name): _plain(part) for name, part in zip(value, parts, strict=True)}
    keys = [key for key, _ in node.flatten_with_keys_fn(value)[0]] if node.flatten_with_keys_fn else []
    names = [key.name for key in keys if isinstance(key, pytree.GetAttrKey)]
    if names and len(names) == len(keys):
        return {name: _plain(part) for name, part in zip(names, parts, strict=True)}
    return tuple(_plain(part) for part in parts)


def dynamic_shapes(
    graph_module: fx.GraphModule, inputs: tuple[Tensor, ...], largest: int | None = None
) -> tuple[dict[int, Any], ...]:
    """Per input, the dimensions that were symbolic when the graph was traced; the first one if that is not known."""
    dims: dict[str, Any] = {}
    shapes = []
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    if len(placeholders) != len(inputs):
        raise GraphError(f"got {len(inputs)} example inputs; the graph takes {len(placeholders)}", pass_name="save")
    for node in placeholders:
        value = node.meta.get("val")
        symbols = (
            {0: "batch"}
            if value is None
            else {i: str(size.node.expr) for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
        )
        for symbol in symbols.values():
            dims.setdefault(symbol, Dim(f"dim{len(dims)}" if dims else "batch", min=1, max=largest))
        shapes.append({i: dims[symbol] for i, symbol in symbols.items()})
    return tuple(shapes)
