"""Facts of operators: every operator with a rule states its own, and what they say is true of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import sbs_fx.passes.channels.rules  # noqa: F401  # reason: fills the tables
from sbs_fx.passes.channels.facts import FACTS, facts_of, never, non_negative, overloads
from sbs_fx.passes.channels.inference import RULES
from tests.networks.calls import CLAIMED, NEGATIVE, Case

aten = torch.ops.aten

UNCALLED = {"sym_size"}  # reason: gives a number


def x_of(seed: int) -> Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(seed))


def run(case: Case, x: Tensor, second: Any = aten.abs.default) -> tuple[dict[fx.Node, Any], fx.Node]:
    """The values of a case's nodes, and the node of its result."""
    graph_module = fx.symbolic_trace(lambda x: case(x, second(x)))
    interpreter = fx.Interpreter(graph_module, garbage_collect_values=False)
    torch.manual_seed(0)
    interpreter.run(x)
    for node, value in interpreter.env.items():
        node.meta["val"] = value
    (output,) = graph_module.graph.find_nodes(op="output")
    return interpreter.env, output.args[0]


def results(cases: list[Case], **options: Any) -> Iterator[tuple[fx.Node, Tensor, set[fx.Node]]]:
    """(node of the result, its value, the nodes that are claimed never to be negative)."""
    for case in cases:
        values, last = run(case, x_of(0), **options)
        yield last, values[last], non_negative(last.graph.nodes)


def name_of(target: Any) -> str:
    return target._schema.name.removeprefix("aten::")


def test_every_operator_with_a_rule_states_its_facts() -> None:
    assert {str(t) for t in RULES if t not in FACTS} == {"pointwise", "unknown"}, "state Facts() if none are true"


def test_what_is_never_negative_is_so() -> None:
    called = set()
    for node, value, claimed in results(CLAIMED):
        assert node in claimed, node.format_node()
        assert bool((value >= 0).all()), node.format_node()
        called |= {name_of(n.target) for n in claimed if hasattr(n.target, "_schema")}
    stated = {name_of(t) for t, facts in FACTS.items() if hasattr(t, "_schema") and facts.non_negative is not never}
    assert stated - called == UNCALLED, "add a call"


def test_what_can_be_negative_is_not_claimed() -> None:
    for node, value, claimed in results(NEGATIVE):
        assert bool((value < 0).any()), f"no example: {node.format_node()}"
        assert node not in claimed, node.format_node()
    for node, value, claimed in results(CLAIMED, second=aten.neg.default):
        assert node not in claimed or not bool((value < 0).any()), node.format_node()


def test_elementwise_functions_commute_with_a_permutation() -> None:
    checked = set()
    x = x_of(1)
    order = torch.randperm(x.numel())
    for case in CLAIMED + NEGATIVE + unary():
        values, last = run(case, x)
        calls = [n for n in last.graph.nodes if n.op == "call_function" and n.all_input_nodes]
        if last in calls and all(facts_of(n.target).elementwise for n in calls):
            permuted, other = run(case, x.flatten()[order].view_as(x))
            torch.testing.assert_close(permuted[other].flatten(), values[last].flatten()[order], equal_nan=True)
            checked |= {name_of(n.target) for n in calls}
    stated = {name_of(t) for t, facts in FACTS.items() if hasattr(t, "_schema") and facts.elementwise}
    assert stated - checked == set(), "add a call"


def unary() -> list[Case]:
    """Every operator that is elementwise by torch's tag alone and takes one tensor of floats."""
    cases: list[Case] = []
    packets = [p for p in (getattr(aten, name) for name in dir(aten)) if isinstance(p, torch._ops.OpOverloadPacket)]
    for target in overloads(*packets):
        required = [str(a.type) for a in target._schema.arguments if not a.has_default_value()]
        is_unary = required == ["Tensor"] and target is not aten.bitwise_not.default  # reason: not of floats
        if is_unary and target not in FACTS and facts_of(target).elementwise:
            cases.append(lambda x, p, f=target: f(x))  # type: ignore[misc]
    return cases


def test_moving_operators_give_values_that_they_read() -> None:
    checked = set()
    for case in CLAIMED + NEGATIVE:
        values, last = run(case, x_of(2))
        for node in last.graph.nodes:
            if node.op == "call_function" and facts_of(node.target).moves and isinstance(values[node], Tensor):
                read = [t.flatten().to(values[node].dtype) for n in node.all_input_nodes for t in tensors(values[n])]
                assert bool(torch.isin(values[node], torch.cat([torch.zeros(1), *read])).all()), node.format_node()
                checked.add(name_of(node.target) if hasattr(node.target, "_schema") else "getitem")
    stated = {name_of(t) for t, facts in FACTS.items() if hasattr(t, "_schema") and facts.moves}
    assert stated - checked == {"split_with_sizes", "unbind", "meshgrid"}, "add a call; these give several tensors"


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


# Reductions of (2, 4, 6, 6) over dimension 1, or contractions of it; w has as many rows as the tensor has channels.
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda x, w: aten.softmax.int(x, 1)[:, :4],
    "_softmax": lambda x, w: aten._softmax.default(x, 1, False)[:, :4],
    "_safe_softmax": lambda x, w: aten._safe_softmax.default(x, 1)[:, :4],
    "sum": lambda x, w: torch.stack([aten.sum.dim_IntList(x, [1]).sum(), aten.sum.default(x)]),
    "amax": lambda x, w: aten.amax.default(x, [1]),
    "amin": lambda x, w: aten.amin.default(x, [1]),
    "max": lambda x, w: aten.max.default(x),
    "min": lambda x, w: aten.min.default(x),
    "prod": lambda x, w: aten.prod.dim_int(x, 1),
    "any": lambda x, w: aten.any.dim(aten.relu.default(x), 1).double(),
    "all": lambda x, w: aten.all.dim(x - 7, 1).double(),
    "nansum": lambda x, w: aten.nansum.default(x, [1]),
    "count_nonzero": lambda x, w: aten.count_nonzero.dim_IntList(x, [1]).double(),
    "logsumexp": lambda x, w: aten.logsumexp.default(x, [1]),
    "linear": lambda x, w: aten.linear.default(x.movedim(1, -1), w.T),
    "matmul": lambda x, w: aten.matmul.default(x.movedim(1, -1), w),
    "bmm": lambda x, w: aten.bmm.default(x.flatten(2).mT, w.expand(2, -1, -1)),
    "mm": lambda x, w: aten.mm.default(x[0].flatten(1).T, w),
    "mv": lambda x, w: aten.mv.default(x[0].flatten(1).T, w[:, 0]),
    "dot": lambda x, w: aten.dot.default(x[0, :, 0, 0], w[:, 0]),
    "addmm": lambda x, w: aten.addmm.default(torch.ones(5), x[0].flatten(1).T, w),
    "baddbmm": lambda x, w: aten.baddbmm.default(torch.ones(5), x.flatten(2).mT, w.expand(2, -1, -1)),
    "einsum": lambda x, w: aten.einsum.default("bchw,cd->bdhw", [x, w]),
    "scaled_dot_product_attention": lambda x, w: aten.scaled_dot_product_attention.default(
        x.flatten(2).mT, x.flatten(2).mT, x[:, :4].flatten(2).mT, scale=0.5
    ),
    "conv1d": lambda x, w: aten.conv1d.default(x.flatten(2), w.T[..., None]),
    "conv2d": lambda x, w: aten.conv2d.default(x, w.T[..., None, None]),
    "conv3d": lambda x, w: aten.conv3d.default(x[..., None], w.T[..., None, None, None]),
    "conv_transpose1d": lambda x, w: aten.conv_transpose1d.default(x.flatten(2), w[..., None]),
    "conv_transpose2d": lambda x, w: aten.conv_transpose2d.input(x, w[..., None, None]),
    "conv_transpose3d": lambda x, w: aten.conv_transpose3d.input(x[..., None], w[..., None, None, None]),
}


def test_neutral_numbers_change_no_reduction() -> None:
    stated = {name_of(t): facts.neutral for t, facts in FACTS.items() if facts.neutral is not None}
    assert stated.keys() == REDUCTIONS.keys(), "add a call"
    x, w = x_of(3), torch.randn(7, 5)
    for name, neutral in stated.items():
        longer = torch.cat([x, torch.full((2, 3, 6, 6), neutral)], 1)
        torch.testing.assert_close(REDUCTIONS[name](longer, w), REDUCTIONS[name](x, w[:4]), msg=name)
        other = torch.cat([x, torch.full((2, 3, 6, 6), 7.0 if neutral != math.inf else -7.0)], 1)
        assert not torch.allclose(REDUCTIONS[name](other, w), REDUCTIONS[name](x, w[:4])), f"{name} ignores any number"


# By what kernels do: calls on whole numbers from -8 to 8.
KERNELS: dict[str, dict[str, Callable[[Tensor], Tensor]]] = {
    "join": {
        "add": lambda x: aten.add.Tensor(x, x.flip(1)),
        "mul": lambda x: aten.mul.Tensor(x, x.flip(1)),
        "cat": lambda x: aten.cat.default([x, x.flip(1)], 1),
        "concat": lambda x: aten.concat.default([x, x.flip(1)], 1),
    },
    "pick": {
        "max_pool2d": lambda x: aten.max_pool2d.default(x, [3, 3], [2, 2], [1, 1]),
        "upsample_nearest2d": lambda x: aten.upsample_nearest2d.vec(x, [9, 9], None),
    },
    "mean": {
        "mean": lambda x: aten.mean.dim(x, [2, 3]),
        "avg_pool2d": lambda x: aten.avg_pool2d.default(x, [2, 2]),
        "adaptive_avg_pool2d": lambda x: aten.adaptive_avg_pool2d.default(x, [2, 2]),
    },
}


@pytest.mark.parametrize("codes", KERNELS)
def test_kernels_on_codes(codes: str) -> None:
    """Joins of whole numbers are whole; picking commutes with scaling and rounding, means with scale and offset."""
    stated = {name_of(t) for t, facts in FACTS.items() if facts.codes == codes}
    assert stated == KERNELS[codes].keys(), "add a call"
    x = (3 * x_of(4)).round()
    for call in KERNELS[codes].values():
        if codes == "join":
            assert torch.equal(call(x), call(x).round())
        elif codes == "pick":
            assert torch.equal(call((x / 3).round()), (call(x) / 3).round())
            assert not torch.equal(call(-x), -call(x)) or call(x).shape[2] > x.shape[2]
        else:
            torch.testing.assert_close(call(0.3 * (x - 2)), 0.3 * (call(x) - 2))
            assert not torch.equal(call(x), call(x).round())
