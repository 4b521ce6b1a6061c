"""How much cheaper is a plan's price by polynomial than by a walk over the layers?

Both sides in turn in one process, a plan of random bits and kept counts for each network; the least of the rounds.
Prints a table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from sbs_fx.passes import CostModel, channel_groups, cost_model, trace
from sbs_fx.plan import Plan

NETWORKS = ("resnet18", "densenet121", "mobilenetv3_small_100", "deit_tiny_patch16_224")


def drawn_plan(cost: CostModel, seed: int) -> Plan:
    """Random counts of every group, random bits of every weight and tensor."""
    draw = random.Random(seed)
    kept = {g.name: range(draw.randint(1, g.size)) for g in cost.groups.values()}
    bits = [{name: draw.choice((2, 4, 8)) for name in names} for names in (cost.weights, cost.activations)]
    return Plan(kept, *bits)


def expected_in_a_step(cost: CostModel, plan: Plan) -> None:
    """Price and gradient with tensors in the place of every count and bitwidth, as a search step takes them."""
    tables: list[dict[str, Any]] = [
        {name: torch.tensor(float(value), requires_grad=True) for name, value in table.items()}
        for table in ({n: len(k) for n, k in plan.kept.items()}, plan.weight_bits, plan.activation_bits)
    ]
    cost.expected(*tables)["bops"].backward()


def seconds(call: Callable[[], object], at_least: float = 0.05) -> float:
    """Of one call, taken over as many as fill the time."""
    count, since = 0, time.process_time()
    while time.process_time() - since < at_least:
        call()
        count += 1
    return (time.process_time() - since) / count


def row_of(name: str, rounds: int) -> dict[str, Any]:
    graph = trace(timm.create_model(name, num_classes=10).eval(), torch.randn(2, 3, 224, 224))
    cost = cost_model(graph, channel_groups(graph))
    plan = drawn_plan(cost, 0)
    walked, priced = cost.evaluate(plan).by_measure, cost.price(plan)
    assert walked == {measure: priced[measure] for measure in walked}
    calls: dict[str, Callable[[], object]] = {
        "walk": lambda: cost.evaluate(plan),
        "price": lambda: cost.price(plan),
        "step": lambda: expected_in_a_step(cost, plan),
    }
    times = {key: min(seconds(call) for _ in range(rounds)) for key, call in calls.items()}
    terms = {measure: len(polynomial.terms) for measure, polynomial in cost.polynomials.items()}
    return {"network": name, "terms": terms, **times, "ratio": times["walk"] / times["price"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row_of(name, options.rounds) for name in NETWORKS]
    print("| network | terms of BOPs | walk, ms | price, ms | walk / price | price and gradient in a step, ms |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['network']} | {row['terms']['bops']} | {1e3 * row['walk']:.2f} | {1e3 * row['price']:.3f} | "
            f"{row['ratio']:.0f} | {1e3 * row['step']:.2f} |"
        )
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
