"""Single weights pruned: which, at how many bits, and what they take to store, the places of the others included.

In: a traced model, bits that may be used, a limit on the stored size. Out: bits and masked weights. Holds: the stored
size counts what a decoder needs, and meets the limit.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, fx

from sbs_fx.passes import CostModel
from sbs_fx.passes.channels.inference import operand
from sbs_fx.passes.graph import attribute
from sbs_fx.plan import Cost, Policy
from sbs_fx.plan.errors import InfeasibleBudget
from sbs_fx.search.solvers.laplace import RUN_BITS, Choices, allocate, choices, laplace_fit, pruned_share
from sbs_fx.search.uniform import end_bits

FORM_BITS = 8  # which of the forms a weight has, once a weight
_LOG_FACTOR, _BISECTIONS = 2.0, 24  # of a common factor on all thresholds
_CLOSE = 0.9995  # of the limit that should be used at least


def coded_bits(mask: Tensor, bits: int) -> int:
    """Bits that a weight takes to store, places and codes: the least of three forms.

    All codes; a bitmap and the codes that stay; or, for each that stays, the number of zeros before it in r bits and
    its code, with an entry of code zero for each 2^r zeros more. r is the best of 1 to 16.

    Args:
        mask: True where a weight stays, any shape. bits: of a code.
    """
    places = mask.flatten().nonzero().flatten()
    kept, total = len(places), mask.numel()
    least = min(total * bits, total + kept * bits)
    zeros = places.diff(prepend=places.new_full((1,), -1)) - 1
    for r in RUN_BITS:
        if kept * (r + bits) < least:
            least = min(least, (kept + int((zeros >> r).sum())) * (r + bits))
    return least + FORM_BITS


def sparse_cost(cost: CostModel, policy: Policy, tensors: dict[str, Tensor]) -> Cost:
    """The cost of a policy whose masked weights, by parameter name, are stored as `coded_bits` says; everything else,
    bit operations among it, is as without masks."""
    total = cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits)
    parameters = _parameters(cost)
    rows, seen = [], set()
    for row, layer in zip(total.layers, cost.layers, strict=True):
        stored = row.stored_bits
        for name in layer.weights:
            bits = policy.weight_bits[name]
            if name not in seen and parameters.get(name) in tensors and isinstance(bits, int):
                mask = tensors[parameters[name]] != 0
                stored += coded_bits(mask, bits) - mask.numel() * bits
            seen.add(name)
        rows.append(row.model_copy(update={"stored_bits": stored}))
    return total.model_copy(update={"layers": tuple(rows)})


def _parameters(cost: CostModel) -> dict[str, str]:
    """Weight name -> its parameter, where it is one."""
    nodes = {node.name: node for node in cost.groups.inference.graph_module.graph.nodes}
    found = {name: operand(nodes[places[0][0].name], places[0][1]) for name, places in cost.weights.items()}
    return {name: str(node.target) for name, node in found.items() if node.op == "get_attr"}


def weight_tensors(graph: fx.GraphModule, cost: CostModel) -> dict[str, Tensor]:
    """Weight name -> its parameter's value; weights that are computed have none."""
    return {name: attribute(graph, parameter).detach() for name, parameter in _parameters(cost).items()}


def prune_weights(
    graph: fx.GraphModule, cost: CostModel, policy: Policy, share: float, *, choose_bits: bool = True
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Prune single weights and lower bits until the stored size is at most `share` of the float model's.

    Damage is the squared error of each weight as a share of its second moment, sizes are those of `laplace.choices`;
    the smallest weights of a layer go, as many as its threshold prunes of a Laplace density. Then bits and forms stay,
    thresholds alone are allocated again, and a common factor on them makes the coded size meet the limit. Weights that
    are computed keep all.

    Args:
        policy: whose weight bits are the most that a weight may have; channels are all kept.
        choose_bits: lower ones may be taken.

    Returns:
        Weight name -> bits, and parameter name -> weight with zeros.

    Raises:
        InfeasibleBudget: the limit is below what is left with one weight a layer.
    """
    weights = weight_tensors(graph, cost)
    most = {n: b for n, b in policy.weight_bits.items() if isinstance(b, int)}
    ends = end_bits(cost).weights
    tables = {
        n: choices(
            tuple(x for x in (2, 4, 8) if x == b or (x < b and choose_bits and n not in ends)),
            "any" if n in weights else "dense",
        )
        for n, b in most.items()
    }
    counts, worth = _counts(cost), {n: laplace_fit(w) for n, w in weights.items()}
    dense = cost.evaluate(policy.kept, policy.weight_bits, policy.activation_bits)
    limit = share * cost.reference.stored_bits
    fixed = dense.other_stored_bits + FORM_BITS * len(most)
    found = allocate(counts, tables, limit - fixed, worth)
    for at in found[::-1] if found else ():
        # reason: beyond the limit first, as its forms use all of it once thresholds are raised
        assert found is not None
        forms = {n: _same_form(tables[n], i, at[n] != found[0][n]) for n, i in at.items()}
        bits = {n: int(table.bits[0]) for n, table in forms.items()}
        plan = policy.model_copy(update={"weight_bits": bits})
        again = allocate(counts, forms, limit - fixed, worth)
        chosen = again[0] if again else {n: len(table.size) - 1 for n, table in forms.items()}
        thresholds = {n: float(forms[n].threshold[i]) for n, i in chosen.items()}
        tensors = _scaled_to(limit, cost, plan, weights, thresholds)
        if tensors is not None:
            return bits, tensors
    least = (fixed + sum(counts[n] * float(t.size[-1]) for n, t in tables.items())) / cost.reference.stored_bits
    raise InfeasibleBudget(
        f"the budget {{'size': {share}}} cannot be met: the least that pruning single weights reaches on this model is "
        f"about {least:.4g}; raise the budget",
        least={"size": least},
    )


def _scaled_to(
    limit: float, cost: CostModel, plan: Policy, weights: dict[str, Tensor], thresholds: dict[str, float]
) -> dict[str, Tensor] | None:
    """Masked weights by parameter name, all thresholds times the factor at which the coded size meets the limit."""
    parameters = _parameters(cost)
    ordered = {n: w.abs().flatten().sort().values for n, w in weights.items()}
    low, high, best = -_LOG_FACTOR, _LOG_FACTOR, None
    for factor in itertools.chain((0.0, high), itertools.repeat(None, _BISECTIONS)):
        middle = (low + high) / 2 if factor is None else factor
        gone = {n: float(pruned_share(t * math.exp(middle))) for n, t in thresholds.items()}
        tensors = {parameters[n]: _masked(w, ordered[n], gone[n]) for n, w in weights.items()}
        size = sparse_cost(cost, plan, tensors).stored_bits
        if size <= limit:
            high, best = middle, tensors
            if size >= _CLOSE * limit or not any(thresholds.values()):
                break
        elif middle == high:
            return None
        else:
            low = middle
    return best


def _same_form(table: Choices, i: int, on_the_limit: bool) -> Choices:
    """What may still change: thresholds at these bits, of a weight that is stored sparse, or that is what goes beyond
    the limit."""
    bits = int(table.bits[i])
    is_fixed = len(table.size) == 1 or (table.size[i] >= bits and not on_the_limit)
    return choices((bits,), "dense" if is_fixed else "sparse")


def _masked(weight: Tensor, ordered: Tensor, gone: float) -> Tensor:
    """A copy with the smallest share `gone` at zero, never all, the earlier ones of equals; `ordered` are the sorted
    magnitudes."""
    count = min(weight.numel() - 1, round(weight.numel() * gone))
    if not count:
        return weight.clone()
    size, edge = weight.abs().flatten(), ordered[count - 1]
    keep = size > edge
    if missing := weight.numel() - count - int(keep.sum()):
        keep[(size == edge).nonzero().flatten()[-missing:]] = True
    return weight * keep.view(weight.shape)


def _counts(cost: CostModel) -> dict[str, int]:
    """Weight name -> its number of elements."""
    return {n: math.prod(x.size for x in dims) for layer in cost.layers for n, (dims, _) in layer.weights.items()}
