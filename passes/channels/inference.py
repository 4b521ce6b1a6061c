"""Dim-type inference: one forward pass over a traced graph that gives every dimension of every tensor its type.

In: a graph from `trace`. Out: an `Inference` that holds, per node, the types of its dimensions and what a rewriter must
know: which integer arguments follow which types (`edits`), where a statistic runs over an axis (`statistics`), where an
operator mixes neighbouring channels (`adapters`) and which nodes multiply (`layers`). Rules live in `passes/rules`, one
short function per operator; an operator without a rule pins all that it touches and is named.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const, Dim
from sbs_fx.passes.channels.facts import MOVES, Facts, facts_of, overloads, state
from sbs_fx.plan.errors import GraphError
from sbs_fx.plan.registry import load_entry_points

Dims = tuple[Dim, ...]
Rule = Callable[["Inference", fx.Node], Any]
RULES: dict[Any, Rule] = {}
Path = tuple[int, ...]  # place of a tensor among a node's arguments

# reason: a prime that no layer has as a width, so that a symbolic size never looks like a channel count
_FIRST_HINT = 10007


def rule(*targets: Any, facts: Facts | None = None) -> Callable[[Rule], Rule]:
    """Register a rule for operators; one without overload stands for all its overloads, a string is the name of one
    whose library may not be imported yet. `facts` are those of each; where they differ they are stated beside the rule,
    with `state`.

    >>> @rule(torch.ops.aten.digamma.default, facts=Facts(elementwise=True))
    ... def _digamma(t, node):
    ...     return t[node.args[0]]
    """
    if facts is not None:
        state(facts, *targets)

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(overloads(*targets), function))
        return function

    return register


def load_rules() -> None:
    """Fill the table of rules: with ours, and with those of other packages.

    Raises:
        GraphError: a module of another package cannot be imported, or states facts that are stated already.
    """
    import sbs_fx.passes.channels.rules  # noqa: F401  reason: the rules import this module

    load_entry_points("sbs_fx.rules", GraphError)


def rule_of(target: Any) -> Rule | None:
    """The rule of an operator, or of its name."""
    return RULES.get(target) or RULES.get(target.name() if isinstance(target, torch._ops.OpOverload) else "")


@dataclass(frozen=True)
class Edit:
    """An integer argument that follows a type: the argument at `path` of a node becomes the size of `dim`."""

    path: tuple[int, ...]
    dim: Dim


@dataclass(frozen=True)
class Statistic:
    """A reduction over channel axes. `neutral` is the number that a masked reference puts where coordinates are gone;
    None: there is none, the operator itself must leave them out (means, variances, normalisation)."""

    neutral: float | None
    arg: Path
    dims: tuple[tuple[int, Dim], ...]  # (dimension of the argument, its type)


@dataclass(frozen=True)
class Adapter:
    """An operator across channels, to be run at full width: scatter, run, gather along `dim` of argument 0."""

    dim: int
    type: Dim


@dataclass(frozen=True)
class Term:
    """One product of a layer: MACs = the product of `sizes`, each a type beside its symbolic size at trace time.

    `operands` are the two tensors that are multiplied; None stands for one that exists only inside the operator
    (attention probabilities, a hidden state), which stays in float.

    >>> [len(layer.terms) for layer in groups.inference.layers.values()]
    [1, 1, 1]
    """

    sizes: tuple[tuple[Dim, Any], ...]
    operands: tuple[Path | None, Path | None]


@dataclass(frozen=True)
class Layer:
    """A node that multiplies and accumulates. Operands that depend on a model input are `inputs`, others `weights`.

    `outputs` is the dimension of a weight that carries the output channels (0; 1 for transposed convolutions).
    """

    name: str
    kind: str
    terms: tuple[Term, ...]
    inputs: tuple[Path, ...]
    weights: tuple[Path, ...]
    outputs: int = 0


def operand(node: fx.Node, path: Path) -> fx.Node:
    """The tensor at `path` among a node's arguments."""
    value: Any = node.args
    for step in path:
        value = value[step]
    return value


@dataclass
class Inference:
    """The state that rules read and write. `dims[node]` is a tuple of types, or a tuple of such tuples.

    >>> groups.inference.unknown  # node -> operator without a rule
    {}
    """

    graph_module: fx.GraphModule
    symbol_sizes: dict[str, int] = field(default_factory=dict)
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    statistics: dict[str, list[Statistic]] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    layers: dict[str, Layer] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)  # node -> operator without a rule
    conflicts: dict[str, str] = field(default_factory=dict)  # node -> why its types could not agree
    tensors: dict[str, Dims] = field(default_factory=dict)  # parameter or buffer -> types
    live: set[fx.Node] = field(default_factory=set)  # nodes that depend on a model input
    pin_outputs: bool = True
    _sizes: dict[Any, int] = field(default_factory=dict)
    _parameters: set[str] = field(default_factory=set)

    # -- what rules read ------------------------------------------------------------------------------------------

    def __getitem__(self, arg: Any) -> Dims:
        """Types of a tensor argument; a scalar has none."""
        return self.dims[arg] if isinstance(arg, fx.Node) and arg in self.dims else ()

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self.size(s) for s in node.meta["val"].shape)

    def size(self, value: Any) -> int:
        """An integer, symbolic size or node as an integer, each symbol replaced by its hint."""
        if isinstance(value, int):
            return value
        if isinstance(value, fx.Node):
            return self.size(value.meta["val"])
        expr = value.node.expr if isinstance(value, torch.SymInt) else sympy.sympify(value)
        if expr not in self._sizes:
            for symbol in sorted(expr.free_symbols, key=str):
                if str(symbol) not in self.symbol_sizes:
                    self.symbol_sizes[str(symbol)] = sympy.nextprime(_FIRST_HINT - 1 + 2 * len(self.symbol_sizes))
            hints = {s: self.symbol_sizes[str(s)] for s in expr.free_symbols}
            self._sizes[expr] = int(expr.subs(hints))
        return self._sizes[expr]

    def constant(self, node: fx.Node) -> Dims:
        """Types of an output whose coordinates all stay."""
        return tuple(Const(s) for s in self.shape(node))

    def is_masked(self, node: fx.Node) -> bool:
        """Whether coordinates that go are zero in the masked graph: in a parameter, but not in a buffer."""
        return node.op == "get_attr" and str(node.target) in self._parameters

    # -- what rules write -----------------------------------------------------------------------------------------

    def unify(self, node: fx.Node, a: Dim, b: Dim) -> None:
        try:
            d.unify(a, b)
        except d.Conflict as conflict:
            self.pin(node, f"types disagree: {conflict}", a, b)
            self.conflicts[node.name] = str(conflict)

    def factor(self, node: fx.Node, dim: Dim, size: int) -> tuple[Dim, Dim]:
        try:
            return d.factor(dim, size)
        except d.Conflict as conflict:
            self.pin(node, f"cannot be factored: {conflict}", dim)
            self.conflicts[node.name] = str(conflict)
            whole = d.resolve(dim).size
            return (Const(whole // size), Const(size)) if whole % size == 0 else (Const(whole), d.ONE)

    def split(self, node: fx.Node, dim: Dim, size: int) -> tuple[Dim, Dim]:
        try:
            return d.split(dim, size)
        except d.Conflict as conflict:
            self.pin(node, f"cannot be split: {conflict}", dim)
            self.conflicts[node.name] = str(conflict)
            return Const(size), Const(d.resolve(dim).size - size)

    def pin(self, node: fx.Node, why: str, *dims: Dim) -> None:
        cause = f"{node.name} ({_operator_name(node)}): {why}"
        for dim in dims:
            d.pin(dim, cause)

    def edit(self, node: fx.Node, *path: int, to: Dim) -> None:
        """The integer at `path` of the node's arguments follows the size of type `to`."""
        if not isinstance(to, Const):
            self.edits.setdefault(node.name, []).append(Edit(path, to))

    def statistic(self, node: fx.Node, positions: Sequence[int], *arg: int, neutral: float | None = None) -> None:
        """A reduction over dimensions `positions` of the argument at `arg` (default: the first); recorded if any of
        them has a free axis. `neutral`: where it is not that of the operator's facts."""
        arg = arg or (0,)
        neutral = facts_of(node.target).neutral if neutral is None else neutral
        types = self[operand(node, arg)]
        over = tuple((p % len(types), types[p]) for p in positions if d.axes(types[p]))
        if over:
            self.statistics.setdefault(node.name, []).append(Statistic(neutral, arg, over))

    def adapter(self, node: fx.Node, dim: int) -> None:
        self.adapters[node.name] = Adapter(dim, self[node.args[0]][dim])

    def layer(self, node: fx.Node, kind: str, *terms: Term, outputs: int = 0) -> None:
        """Record a node that multiplies. Its first operand counts as an activation whatever it is computed from."""
        if any(operand(node, p).meta["val"].is_complex() for term in terms for p in term.operands if p is not None):
            terms = tuple(Term(term.sizes, (None, None)) for term in terms)  # reason: complex numbers have no bits
        paths = dict.fromkeys(p for term in terms for p in term.operands if p is not None)
        first = next(iter(paths), None)
        inputs = tuple(p for p in paths if p == first or operand(node, p) in self.live)
        weights = tuple(p for p in paths if p not in inputs)
        self.layers[node.name] = Layer(node.name, kind, terms, inputs, weights, outputs)

    # -- the pass --------------------------------------------------------------------------------------------------

    def run(self, *, pin_outputs: bool = True) -> Inference:
        load_rules()
        self.pin_outputs = pin_outputs
        self._parameters = {name for name, _ in self.graph_module.named_parameters(remove_duplicate=False)}
        for node in self.graph_module.graph.nodes:
            if node.op == "output":
                self._output(node, pin_outputs)
                continue
            if node.op == "placeholder" or any(n in self.live for n in node.all_input_nodes):
                self.live.add(node)
            types = self._infer(node)
            if types is not None:
                self.dims[node] = types
                self._check(node, types)
        self._drop_layers_in_weights()
        return self

    def _drop_layers_in_weights(self) -> None:
        """A product of parameters that ends in weights alone is part of them: they are computed before they are priced,
        quantised and stored, and a static graph holds no more than the result."""
        ends: set[fx.Node] = set()
        for node in reversed(self.graph_module.graph.nodes):
            if node.users and node not in self.live and all(self._reads_as_weight(u, node, ends) for u in node.users):
                ends.add(node)
                self.layers.pop(node.name, None)

    def _reads_as_weight(self, user: fx.Node, node: fx.Node, ends: set[fx.Node]) -> bool:
        layer = self.layers.get(user.name)
        if layer is None:
            return user in ends
        others = [path for path in layer.inputs if operand(user, path) is node]
        return not others and any(operand(user, path) is node for path in layer.weights)

    def _infer(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if not isinstance(node.meta.get("val"), torch.Tensor):
                return None
            return tuple(
                Const(self.size(s), ("model input",) if i == 1 else ()) for i, s in enumerate(node.meta["val"].shape)
            )
        if node.op == "get_attr":
            if node.target not in self.tensors:
                self.tensors[node.target] = tuple(d.fresh(s) for s in self.shape(node))
            return self.tensors[node.target]
        value = node.meta.get("val")
        if not isinstance(value, (torch.Tensor, tuple, list)):
            return None  # a size: carries no coordinates
        function = rule_of(node.target)
        if (
            function is None
            and isinstance(node.target, torch._ops.OpOverload)
            and torch.Tag.pointwise in node.target.tags
        ):
            function = RULES["pointwise"]
        if function is None:
            self.unknown[node.name] = str(node.target)
            function = RULES["unknown"]
        return function(self, node)

    def _output(self, node: fx.Node, pin_outputs: bool) -> None:
        for leaf in node.all_input_nodes:
            types = self[leaf]
            for group in types if types and isinstance(types[0], tuple) else (types,):
                for dim in group:
                    if pin_outputs:
                        d.pin(dim, "model output")

    def _check(self, node: fx.Node, types: Any) -> None:
        value = node.meta["val"]
        pairs = [(types, value)] if isinstance(value, torch.Tensor) else list(zip(types, value, strict=True))
        for dims, tensor in pairs:
            if isinstance(tensor, torch.Tensor):
                sizes, shape = tuple(x.size for x in dims), tuple(self.size(s) for s in tensor.shape)
                if sizes != shape and _is_divided(tensor):
                    raise GraphError(
                        f"({_operator_name(node)}) divides the batch, so that examples share a row of its result; "
                        "write x.view(len(x), ...) or x.flatten(1) where -1 stands for the batch, or give inputs that "
                        "hold such examples in a dimension behind the batch",
                        pass_name="channel_groups",
                        node=node.name,
                    )
                if sizes != shape:
                    raise GraphError(
                        f"({_operator_name(node)}) types "
                        f"{[str(x) for x in dims]} have sizes {sizes}, its shape is {shape}: "
                        "the operator's rule is wrong",
                        pass_name="channel_groups",
                        node=node.name,
                    )


def _is_divided(tensor: torch.Tensor) -> bool:
    """Whether the first size is a part of symbolic ones, as the batch's half."""
    size = tensor.shape[0] if tensor.ndim else 1
    expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
    return bool(expression.atoms(sympy.Function)) or expression.as_numer_denom()[1] != 1


def _operator_name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").removesuffix(".default")


@rule(operator.getitem, facts=MOVES)
def _getitem(t: Inference, node: fx.Node) -> Any:
    return t.dims[node.args[0]][node.args[1]]


@rule("unknown")
def _unknown(t: Inference, node: fx.Node) -> Any:
    """No rule: nothing is assumed, everything it touches stays."""
    for source in node.all_input_nodes:
        types = t[source]
        flat = [x for g in types for x in g] if types and isinstance(types[0], tuple) else types
        t.pin(node, "operator without a rule", *flat)
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return t.constant(node)
    return tuple(tuple(Const(t.size(s)) for s in v.shape) if isinstance(v, torch.Tensor) else () for v in value)
