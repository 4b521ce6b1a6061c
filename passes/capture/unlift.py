"""`unlifted`: an exported program as a graph that holds its tensors.

In: a program of `torch.export`. Out: what its `module(check_guards=False)` gives, without the checks of inputs, which
are ours. Holds: names, values and metadata of nodes are the program's; time grows with the number of layers, not with
its square, as torch's does for modules that lie side by side.
"""

from __future__ import annotations

from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from sbs_fx.passes.graph import hold

_LIFTED = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def unlifted(program: ExportedProgram) -> fx.GraphModule:
    """The graph with a `get_attr` in the place of each parameter, buffer and constant that the program takes."""
    signature = program.graph_signature
    plain = all(spec.kind is InputKind.USER_INPUT or spec.kind in _LIFTED for spec in signature.input_specs)
    plain = plain and all(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
    if not plain or any(node.op in ("get_attr", "call_module") for node in program.graph.nodes):
        module = program.module(check_guards=False)  # reason: torch knows how to write buffers and call sub-graphs
        assert isinstance(module, fx.GraphModule)
        return module
    root = nn.Module()
    tensors = {**program.constants, **program.state_dict}
    for spec in signature.input_specs:
        if spec.kind in _LIFTED:
            assert spec.target is not None
            value = tensors[spec.target]
            value = value.detach() if spec.kind is InputKind.CONSTANT_TENSOR else value
            hold(root, spec.target, value, persistent=spec.persistent is not False)
    targets = {spec.arg.name: spec.target for spec in signature.input_specs if spec.kind in _LIFTED}  # type: ignore
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        target = targets.get(node.name) if node.op == "placeholder" else None
        if target is None:
            copies[node] = graph.node_copy(node, lambda n: copies[n])
        else:
            copies[node] = graph.create_node("get_attr", target)
            copies[node].meta = dict(node.meta)
    arguments = program.module_call_graph[0].signature
    assert arguments is not None
    info = _PyTreeInfo(list(arguments.forward_arg_names or []), program.call_spec.in_spec, program.call_spec.out_spec)
    graph._codegen = _PyTreeCodeGen(info)
    return fx.GraphModule(root, graph)
