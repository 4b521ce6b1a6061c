"""`trace`: an eager module in, one functional ATen graph out.

In: any `nn.Module` that `torch.export` can capture, and example inputs whose first dimension is the batch.
Out: a `torch.fx.GraphModule` of functional ATen operators whose batch dimension is dynamic; parameters and buffers keep
the module's names, and a weight that was folded (`weights.py`) has that of a plain layer's. Invariant: in eval mode the
outputs are bitwise those of the module, at any batch size.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.canonical import canonicalise
from sbs_fx.passes.capture.export import Dynamic, dynamic_dims, exported, quiet_torch
from sbs_fx.passes.capture.inputs import set_inputs
from sbs_fx.passes.capture.models import put_in_eval_mode, unwrapped
from sbs_fx.passes.capture.signature import Inputs, Signature
from sbs_fx.passes.capture.sound import check_same
from sbs_fx.passes.capture.unchanged import unchanged
from sbs_fx.passes.capture.weights import fold_weights, merge_weights
from sbs_fx.passes.channels.inference import load_rules
from sbs_fx.passes.dialects import Traced, set_dialect
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import InputError, TraceError


@boundary("trace")
def trace(module: Any, example_inputs: Inputs, *, dynamic: Dynamic | None = None) -> fx.GraphModule:
    """Capture `module` in eval mode as a functional graph whose batch may have any size.

    >>> graph = trace(torch.nn.Linear(4, 3), torch.randn(2, 4))
    >>> [node.name for node in graph.graph.nodes if node.op == "call_function"]
    ['linear']

    Args:
        module: the float model, an `ExportedProgram` or a graph. It is captured in eval mode and left as it was.
            Wrappers that only pass their arguments on, such as `DataParallel`, are looked through.
        example_inputs: a tensor of shape (batch, ...), a tuple of positional arguments or a dict of keyword arguments;
            lists, dicts and dataclasses of tensors, None, numbers and texts may be among them, and stay as they are.
            The batch is at least 2 (a batch of 1 would be taken for a constant by `torch.export`).
        dynamic: dimensions that may change: names out of "batch", "height" and "width" (the last two dimensions of what
            has a batch); or, by the name of a tensor, its dimensions with a name each, such as
            `{"prototypes": {}, "images": {0: "batch", 2: "height"}}`. Default: the batch, which is the first dimension
            of each tensor that has there what the first tensor has.

    The graph takes the tensors among the inputs, in order.

    Raises:
        InputError: inputs that the model does not take, a batch of 1, or an input on another device.
        GraphError: the rules of another package cannot be loaded.
        TraceError: `torch.export` could not capture the module, the module fixes a size that was to change, or it
            computes something else while it is exported; names the place and the reason.
    """
    load_rules()
    module = unwrapped(module)
    signature, tensors = Signature.of(module, example_inputs)
    tensors = _apart(tensors)
    dims = dynamic_dims(signature, tensors, dynamic)
    _check_tensors(module, signature, tensors, dims)
    with unchanged(module):
        put_in_eval_mode(module)
        graph_module, spec = exported(module, signature, tensors, dims)
    _made_canonical(graph_module, module)
    with unchanged(module), quiet_torch():  # reason: apart, as what was cached while tensors were fake is forgotten
        put_in_eval_mode(module)
        check_same(graph_module, lambda: signature.called(module, tensors), tensors)
    set_dialect(graph_module, Traced())
    set_inputs(graph_module, spec)
    return graph_module


def _made_canonical(graph_module: fx.GraphModule, module: nn.Module) -> None:
    _share_storage(graph_module, module)
    _drop_writes(graph_module)
    _register_constants(graph_module)
    canonicalise(graph_module)
    merge_weights(graph_module)
    fold_constants(graph_module)
    fold_weights(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    _drop_unused_tensors(graph_module)
    graph_module.recompile()


def _apart(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Each a tensor of its own: of one that is given twice, torch would read the second place alone."""
    return tuple(x.clone() if any(x is other for other in tensors[:i]) else x for i, x in enumerate(tensors))


def _check_tensors(
    module: nn.Module, signature: Signature, tensors: Sequence[torch.Tensor], dims: Sequence[Mapping[int, str]]
) -> None:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for name, x, of_tensor in zip(signature.names, tensors, dims, strict=True):
        if x.device != device:
            raise InputError(f"example input {name!r} is on {x.device} and the model on {device}; move one of them")
        for place, asked in of_tensor.items():
            if x.shape[place] < 2:
                raise InputError(
                    f"example input {name!r} has shape {tuple(x.shape)}; give a {asked} of 2 or more, so that the "
                    f"{asked} dimension can be kept dynamic"
                )
    if not any(dims):
        raise InputError(
            f"no example input has a batch dimension: shapes {[tuple(x.shape) for x in tensors]}; expected tensors of "
            "shape (batch, ...)"
        )


def _share_storage(graph_module: fx.GraphModule, module: nn.Module) -> None:
    """One name per tensor: aliases of a tied parameter are redirected to the first name that the module gives it."""
    first: dict[int, str] = {}
    for name, tensor in [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]:
        first.setdefault(id(tensor), name)
    alias = {
        name: first[id(tensor)]
        for name, tensor in [
            *module.named_parameters(remove_duplicate=False),
            *module.named_buffers(remove_duplicate=False),
        ]
    }
    seen: dict[str, fx.Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "get_attr":
            continue
        node.target = alias.get(node.target, node.target)
        if node.target in seen:
            node.replace_all_uses_with(seen[node.target])
            graph_module.graph.erase_node(node)
        else:
            seen[node.target] = node


def _drop_writes(graph_module: fx.GraphModule) -> None:
    """Remove what writes a buffer at the end of a call, such as a counter's. Raises TraceError if outputs depend on it:
    each call would then give other values, and a graph of functions cannot."""
    written = set()
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
        written.add(node.args[0])
        node.replace_all_uses_with(node.args[1])
        graph_module.graph.erase_node(node)
    if not written:
        return
    graph_module.graph.eliminate_dead_code()
    for buffer in graph_module.graph.find_nodes(op="get_attr"):
        if buffer in written:
            raise TraceError(
                f"forward changes the buffer {buffer.target!r} at each call and computes its output from it; a graph "
                "has no state: make it an input and an output of forward, or leave it as it is in eval mode"
            )


def _register_constants(graph_module: fx.GraphModule) -> None:
    """Tensors that a forward closes over become buffers, so that they move and are saved with the graph."""
    for name in {str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")}:
        owner, _, leaf = name.rpartition(".")
        holder = graph_module.get_submodule(owner)
        if leaf not in holder._parameters and leaf not in holder._buffers:
            value = getattr(holder, leaf)
            delattr(holder, leaf)
            holder.register_buffer(leaf, value)


def fold_constants(graph_module: fx.GraphModule) -> bool:
    """Evaluate once what depends on buffers and creation operators alone; True if anything was folded.

    Tables such as rotary embeddings become buffers, so that their dimensions can be typed and sliced like any other.
    Whatever depends on a parameter stays live (weight standardisation), as does what depends on an input's size.
    """
    graph = graph_module.graph
    buffers = dict(graph_module.named_buffers(remove_duplicate=False))
    constant: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target in buffers:
            constant[node] = buffers[node.target]
        elif node.op == "call_function" and _is_foldable(node, constant):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: constant[n])
            with torch.no_grad():
                constant[node] = node.target(*args, **kwargs)
    changed = False
    for node, value in constant.items():
        live = [user for user in node.users if user not in constant]
        if node.op == "get_attr" or not live or not isinstance(value, torch.Tensor):
            continue
        name = f"_folded_{node.name}"
        # reason: clone, so that an expanded or aliased value owns its storage and can be sliced and saved
        graph_module.register_buffer(name, value.detach().clone(memory_format=torch.contiguous_format))
        with graph.inserting_before(node):
            table = graph.get_attr(name)
        table.meta = dict(node.meta)
        for user in live:
            user.replace_input_with(node, table)
        changed = True
    graph.eliminate_dead_code()
    return changed


def _is_foldable(node: fx.Node, constant: dict[fx.Node, Any]) -> bool:
    if node.target is operator.getitem:
        return node.args[0] in constant
    if not isinstance(node.target, torch._ops.OpOverload):
        return all(n in constant for n in node.all_input_nodes) and bool(node.all_input_nodes)
    if torch.Tag.nondeterministic_seeded in node.target.tags:
        return False
    return all(n in constant for n in node.all_input_nodes)


def _drop_unused_tensors(graph_module: fx.GraphModule) -> None:
    """Delete parameters, buffers and sub-modules that no node reads, so that nothing full-size travels along."""
    used = {node.target for node in graph_module.graph.nodes if node.op in ("get_attr", "call_module")}
    for name, _ in [
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    ]:
        if name not in used and not any(name.startswith(f"{u}.") for u in used):
            owner, _, leaf = name.rpartition(".")
            delattr(graph_module.get_submodule(owner), leaf)
    graph_module.delete_all_unused_submodules()


def outputs_of(graph_module: fx.GraphModule) -> list[fx.Node]:
    """The nodes that the graph returns, in order."""
    (output,) = graph_module.graph.find_nodes(op="output")
    return [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, fx.Node)]
