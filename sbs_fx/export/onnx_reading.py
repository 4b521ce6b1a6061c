"""`Model`: an ONNX model as linters read it; `Rules`: what a linter looks for.

In: an `onnx.ModelProto`. Out: its nodes, its constants, and who makes and reads each tensor; what breaks a rule. Holds:
nothing is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sbs_fx.export.runtime import require

_PASSES = {"Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze"}  # what tools move quantisers through


class Model:
    """A model's graph, nodes and constants by name, and who makes and reads each tensor."""

    def __init__(self, model: Any) -> None:
        onnx = require("onnx")[0]
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        self.graph = model.graph
        self.nodes = list(model.graph.node)
        self.constants = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant":
                values = [a.t for a in node.attribute if a.name == "value"]
                self.constants[node.output[0]] = onnx.numpy_helper.to_array(values[0]) if values else None
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def of(self, *kinds: str) -> Iterator[Any]:
        return (node for node in self.nodes if node.op_type in kinds)

    def source(self, name: str) -> Any:
        """The node that makes a tensor, behind what only moves values; None for inputs and constants."""
        while name in self.makers and self.makers[name].op_type in _PASSES:
            name = self.makers[name].input[0]
        return self.makers.get(name)

    def maker(self, name: str) -> str:
        """The kind of that node; "" for inputs and constants."""
        node = self.source(name)
        return "" if node is None else node.op_type

    def code_type(self, node: Any) -> str:
        """Of the codes of a QuantizeLinear or DequantizeLinear; without a zero point they are uint8 by the standard."""
        codes = self.constants.get(node.input[2 if len(node.input) > 2 else 0])
        return "uint8" if codes is None else str(codes.dtype)

    def is_constant(self, name: str) -> bool:
        """Whether it is, or is made of, a constant alone."""
        while name in self.makers and self.makers[name].op_type in {*_PASSES, "DequantizeLinear", "QuantizeLinear"}:
            name = self.makers[name].input[0]
        return name in self.constants

    def is_weight(self, dequantizer: Any) -> bool:
        return dequantizer.op_type == "DequantizeLinear" and dequantizer.input[0] in self.constants


Rule = Callable[[Model], Iterator[tuple[str, str]]]


class Rules(list[Rule]):
    """The rules of one tool: each gives the names of nodes that break it, with what is wrong."""

    def rule(self, function: Rule) -> Rule:
        """Register a function as the next rule."""
        self.append(function)
        return function

    def problems(self, model: Any) -> list[str]:
        """Lines "RULE: NODE WHAT" of an `onnx.ModelProto`, in the order of the rules."""
        known = Model(model)
        return [f"{rule.__name__}: {name} {problem}" for rule in self for name, problem in rule(known)]
