"""What an operator does to signs, values and 8-bit codes: one table, keyed by ATen operator.

In: an operator, or the nodes of a graph. Out: its `Facts`, stated beside its rule in `passes/channels/rules`; the nodes
that are never negative. Holds: a fact is true of every call, of finite values and in eval mode; what has a rule has
facts, `Facts()` where none of them is true of it; what torch tags as pointwise and states no facts is `elementwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx


@dataclass(frozen=True)
class Call:
    """One call of an operator, and the nodes before it that are never negative."""

    node: fx.Node
    non_negative: Set[fx.Node]

    def __getitem__(self, key: int | str) -> Any:
        """The argument at a position of the schema or of a name in it; its default where the call has none."""
        args = self.node.args
        if isinstance(key, int) and key < len(args):
            return args[key]
        arguments = self.node.target._schema.arguments
        position = key if isinstance(key, int) else [a.name for a in arguments].index(key)
        argument = arguments[position]
        return args[position] if position < len(args) else self.node.kwargs.get(argument.name, argument.default_value)

    def keeps(self, *keys: int | str) -> bool:
        """Whether none of these arguments can be below zero; None takes no part."""
        return all(self._is_non_negative(self[key]) for key in keys)

    def _is_non_negative(self, value: Any) -> bool:
        if isinstance(value, (list, tuple)):
            return all(self._is_non_negative(item) for item in value)
        if isinstance(value, fx.Node):
            return value in self.non_negative
        return value is None or (isinstance(value, (int, float)) and value >= 0)


Sign = Callable[[Call], bool]


def never(call: Call) -> bool:
    return False


def always(call: Call) -> bool:
    """No result is below zero, such as of an absolute value.

    >>> Facts(always, elementwise=True).elementwise
    True
    """
    return True


def keeps(*keys: int | str) -> Sign:
    """No result is below zero where none of these arguments is.

    >>> facts = Facts(keeps(0), moves=True)  # such as of a permutation
    >>> facts.moves
    True
    """
    return lambda call: call.keeps(*keys)


def any_of(*keys: int | str) -> Sign:
    """No result is below zero where one of these arguments is not.

    >>> facts = Facts(any_of(0, 1), elementwise=True)  # such as of a maximum
    >>> facts.elementwise
    True
    """
    return lambda call: any(call.keeps(key) for key in keys)


@dataclass(frozen=True)
class Facts:
    """
    Attributes:
        non_negative: whether the result of a call is never below zero.
        elementwise: each value is a function of the values at its place, so of one value where one tensor is read.
        moves: its values are some of those of the tensors that it reads, in any number and order, and zeros where it
            pads.
        neutral: the number that its reduction ignores. None: it reduces nothing, or counts what it reduces.
        codes: what kernels for 8-bit codes do: "join" those of several tensors, "pick" some of one tensor's as they
            are, take their "mean". None: there is no such kernel.

    >>> Facts(keeps(0), elementwise=True).moves
    False
    """

    non_negative: Sign = never
    elementwise: bool = False
    moves: bool = False
    neutral: float | None = None
    codes: Literal["join", "pick", "mean"] | None = None


FACTS: dict[Any, Facts] = {}
NOTHING = Facts()
POINTWISE = Facts(elementwise=True)
MOVES = Facts(keeps(0), moves=True)


def overloads(*targets: Any) -> Iterator[Any]:
    """Operators by overload; a name without one stands for all its functional overloads."""
    for target in targets:
        if isinstance(target, torch._ops.OpOverloadPacket):
            named = (getattr(target, name) for name in target.overloads())
            yield from (overload for overload in named if not overload._schema.is_mutable)
        else:
            yield target


def state(facts: Facts, *targets: Any) -> None:
    """Enter the facts of operators, once each."""
    for target in overloads(*targets):
        if target in FACTS:
            raise ValueError(f"the facts of {target} are stated twice")
        FACTS[target] = facts


def facts_of(target: Any) -> Facts:
    import sbs_fx.passes.channels.rules  # noqa: F401  reason: fills FACTS; the rules import this module

    is_pointwise = torch.Tag.pointwise in getattr(target, "tags", ())
    return FACTS.get(target, POINTWISE if is_pointwise else NOTHING)


def non_negative(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes, given in graph order, whose value is provably never negative: an unsigned grid wastes no level on them."""
    result: set[fx.Node] = set()
    for node in nodes:
        if node.op == "call_function" and facts_of(node.target).non_negative(Call(node, result)):
            result.add(node)
    return result
