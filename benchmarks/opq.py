"""How fast, how exact and how good is the one-shot allocation?

`python benchmarks/opq.py --data-dir DIR --weights FILE --out FILE` allocates a ResNet-50 (random weights, 224 x 224)
under several budgets, and says how many seconds that takes and how close to the limit it comes; then it compares
`uniform` and `opq` on the trained CIFAR-10 ResNet-20, at several budgets of bit operations, data-free and with ranges
calibrated on 512 training images, and prunes single weights of it to several sizes; nothing is trained.
Without --data-dir and --weights only the first part is run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from _cifar_models import cifar10, cifar10_parser, padded_resnet20
from torch import nn

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import CostModel, apply_bits, channel_groups, cost_model, finalize, insert_gates, slim, trace
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget
from sbs_fx.search import Opq, Problem, Run, SearchResult, SpaceSettings, opq, uniform
from sbs_fx.training.evaluation import evaluate

ALLOCATIONS = [
    ("channels", Budget(bops=1 / 32)),
    ("channels", Budget(size=0.12)),
    ("channels", Budget(bops=1 / 32, size=0.12)),
    ("weights", Budget(size=0.1)),
    ("weights", Budget(size=0.04)),  # reason: a bit for each weight, which stay, takes 0.031 alone
]
RATIOS = (20, 30, 45, 60, 80, 100)
SIZES = (5, 8, 10, 12, 16)


def cost_of(module: nn.Module, images: torch.Tensor) -> CostModel:
    graph = trace(module.eval(), images)
    return cost_model(graph, channel_groups(graph))


def allocations() -> list[dict[str, Any]]:
    images = torch.randn(2, 3, 224, 224)
    cost = cost_of(timm.create_model("resnet50"), images)
    rows = []
    for prunes, budget in ALLOCATIONS:
        begun, used_before = time.perf_counter(), time.process_time()
        problem = Problem.of(cost, budget, (images,))
        found = opq(problem, Run(settings=Opq(prunes=prunes, shifts_norms=False)))
        seconds, cpu = time.perf_counter() - begun, time.process_time() - used_before
        rows.append(
            {
                "model": "resnet50",
                "prunes": prunes,
                "budget": budget.limits,
                "seconds": round(seconds, 2),
                "cpu_seconds": round(cpu, 2),
                "unused": round(1 - problem.used(found.plan), 6),
            }
        )
        print(rows[-1], flush=True)
    return rows


def accuracy(cost: CostModel, found: SearchResult, images: torch.Tensor, data: Any, test: Any) -> float:
    groups, plan = cost.groups, found.plan
    slimmed = slim(with_tensors(groups.inference.graph_module, found.tensors), groups, plan.kept)
    gated = insert_gates(slimmed, groups, channels=False)
    apply_bits(gated, plan.weight_bits, plan.activation_bits)
    calibrate(gated, data, inputs=(images,))
    return evaluate(finalize(gated), test)


def _kept(tensors: Mapping[str, torch.Tensor]) -> float:
    """Share of weights that are not pruned."""
    weights = [t for t in tensors.values() if t.ndim > 1]
    return sum(int((t != 0).sum()) for t in weights) / sum(t.numel() for t in weights)


def comparison(data_dir: Path, weights: Path, count: int) -> list[dict[str, Any]]:
    net = padded_resnet20(weights)
    images = torch.randn(2, 3, 32, 32)
    cost = cost_of(net, images)
    graph = cost.groups.inference.graph_module
    test = list(cifar10(data_dir, "test", 500))[: count // 500]
    train = list(cifar10(data_dir, "train", 128))[:4]
    rows: list[dict[str, Any]] = [{"model": "resnet20", "method": "float", "accuracy": evaluate(graph, test)}]
    for ratio in RATIOS:
        budget = Budget(bops=1 / ratio)
        problem, trains = Problem.of(cost, budget, (images,)), Run(fine_tunes=True)  # as if channels could be won back
        plans = [("uniform", uniform(problem, trains))]
        if ratio <= 60:  # bits alone, whatever share of channels then stays
            fixed = SpaceSettings(weight_bits=4, activation_bits=8 if ratio <= 30 else 4)
            plans.append(("uniform W4", uniform(Problem.of(cost, budget, (images,), fixed), trains)))
        for name, shifts in (("opq, trained norms", False), ("opq", True)):
            plans.append((name, opq(problem, Run(settings=Opq(shifts_norms=shifts)))))
        for method, found in plans:
            price, sizes = cost.price(found.plan), [group.size for group in cost.groups.values()]
            row = {
                "model": "resnet20",
                "method": method,
                "asked": ratio,
                "bops_ratio": cost.whole["bops"] / price["bops"],
                "kept": sum(map(len, found.plan.kept.values())) / sum(sizes),
                "data_free": accuracy(cost, found, images, None, test),
                "calibrated": accuracy(cost, found, images, train, test),
            }
            rows.append(row)
            print(row, flush=True)
    for ratio in SIZES:
        problem = Problem.of(cost, Budget(size=1 / ratio), (images,))
        found = opq(problem, Run(settings=Opq(prunes="weights")))
        kept = _kept(found.tensors)
        row = {
            "model": "resnet20",
            "method": "opq, single weights",
            "asked": ratio,
            "size_ratio": cost.whole["size"] / cost.price(found.plan)["size"],
            "kept": kept,
            "data_free": accuracy(cost, found, images, None, test),
            "calibrated": accuracy(cost, found, images, train, test),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> int:
    parser = cifar10_parser(__doc__ or "")
    options = parser.parse_args()
    rows = allocations()
    if options.data_dir is not None and options.weights is not None:
        rows += comparison(options.data_dir, options.weights, options.images)
    options.out.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n| method | asked | reached | kept | top-1 data-free | top-1 calibrated |\n|---|---|---|---|---|---|")
    for r in rows:
        if "data_free" in r:
            reached = r.get("bops_ratio") or r["size_ratio"]
            print(
                f"| {r['method']} | {r['asked']}x | {reached:.2f}x | {100 * r['kept']:.0f} % | {r['data_free']:.2f} | "
                f"{r['calibrated']:.2f} |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
