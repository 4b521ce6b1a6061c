"""`trace`: an eager module in, one functional ATen graph out.

In: any `nn.Module` that `torch.export` can capture, and example inputs whose first dimension is the batch.
Out: a `torch.fx.GraphModule` of functional ATen operators whose batch dimension is dynamic; parameters and buffers keep
the module's names, and a weight that was folded (`weights.py`) has that of a plain layer's. Invariant: in eval mode the
outputs are bitwise those of the module, at any batch size.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sbs_fx.passes.capture.canonical import canonicalise
from sbs_fx.passes.capture.functional import decompositions, make_functional
from sbs_fx.passes.capture.unchanged import unchanged
from sbs_fx.passes.capture.weights import fold_weights, merge_weights
from sbs_fx.passes.channels.inference import load_rules
from sbs_fx.passes.dialects import Traced, set_dialect
from sbs_fx.plan.errors import InputError, TraceError


def trace(
    module: nn.Module,
    example_inputs: torch.Tensor | Sequence[torch.Tensor],
    *,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """Capture `module` in eval mode as a functional graph with a dynamic batch dimension.

    Args:
        module: the float model. It is exported in eval mode and left in the mode it was in.
        example_inputs: a tensor or a sequence of tensors, each of shape (batch, ...) with batch at least 2
            (a batch of 1 would be taken for a constant by `torch.export`).
        dynamic_shapes: as in `torch.export.export`; default: the first dimension of each input is the batch.

    Raises:
        InputError: an input is not a tensor, has no batch dimension, has batch 1, or sits on another device.
        GraphError: the rules of another package cannot be loaded.
        TraceError: `torch.export` could not capture the module; names the sub-module and the reason.
    """
    load_rules()
    args = _checked_inputs(module, example_inputs)
    if dynamic_shapes is None:
        batch = Dim("batch", min=1)
        dynamic_shapes = tuple({0: batch} for _ in args)
    with unchanged(module):
        module.eval()
        graph_module = _export(module, args, dynamic_shapes)
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
    set_dialect(graph_module, Traced())
    return graph_module


def _checked_inputs(
    module: nn.Module, example_inputs: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    args = (example_inputs,) if isinstance(example_inputs, torch.Tensor) else tuple(example_inputs)
    if not args:
        raise InputError("no example inputs were given: pass a tensor of shape (batch, ...) or a tuple of tensors")
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for i, x in enumerate(args):
        if not isinstance(x, torch.Tensor):
            raise InputError(
                f"example input {i} is a {type(x).__name__}; expected a torch.Tensor of shape (batch, ...)"
            )
        if x.ndim == 0:
            raise InputError(f"example input {i} is a scalar; expected a tensor of shape (batch, ...)")
        if x.shape[0] < 2:
            raise InputError(
                f"example input {i} has shape {tuple(x.shape)}; give a batch of 2 or more, so that the "
                "batch dimension can be kept dynamic"
            )
        if x.device != device:
            raise InputError(f"example input {i} is on {x.device} and the model on {device}; move one of them")
    return args


def _export(module: nn.Module, args: tuple[torch.Tensor, ...], dynamic_shapes: Any) -> fx.GraphModule:
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=False)
            table = decompositions(program.graph)
            if table or not make_functional(program.graph):
                # This traces again, which removes in-place operators and sub-graphs too, even with an empty table.
                program = program.run_decompositions(table)
            return program.module(check_guards=False)
    except Exception as error:
        _raise_as_input_error(module, args)
        where = _failing_submodule(error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TraceError(
            f"torch.export could not capture {type(module).__name__}"
            f"{f' (sub-module {where})' if where else ''}: {type(error).__name__}: {reason}",
            submodule=where,
            reason=reason,
        ) from error


def _raise_as_input_error(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """If the module cannot even run on the inputs, the inputs are at fault, not the export."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    try:
        with torch.no_grad():  # reason: on copies, since some modules write what they own
            functional_call(module, {name: tensor.clone() for name, tensor in tensors.items()}, args)
    except Exception as error:
        shapes = ", ".join(str(tuple(a.shape)) for a in args)
        raise InputError(
            f"the model does not run on example inputs of shape {shapes}: {type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else ''}; "
            "give inputs that the model accepts"
        ) from error


def _failing_submodule(error: BaseException) -> str:
    """The innermost `nn.Module` whose forward was running when `error` was raised, by class name ('' if unknown)."""
    place, tb = "", error.__traceback__
    while tb is not None:
        owner = tb.tb_frame.f_locals.get("self")
        if tb.tb_frame.f_code.co_name == "forward" and isinstance(owner, nn.Module):
            place = f"{type(owner).__name__} at {tb.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]}:{tb.tb_lineno}"
        tb = tb.tb_next
    return place


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
