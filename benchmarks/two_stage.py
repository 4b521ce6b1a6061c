"""What does the search without training reach, and does Dynamic BN predict losses?

`python benchmarks/two_stage.py --data-dir DIR --weights FILE --out FILE` takes the CIFAR-10 ResNet-20 of parameter-free
shortcuts (safetensors; images and labels as {train,test}_{images,labels}.npy in DIR). For budgets equal to what uniform
bitwidths cost it prints the accuracy of plain per-channel ranges of least error at these bitwidths, and of `two_stage`
after reconstruction, all from the same training images. Then it draws random policies and prints Kendall's rank
correlation of their loss on 1,000 test images (ranges and batch-norm statistics from 256 training images) with what was
predicted from these training images, with Dynamic BN and without. Last, the seconds to a plan for a ResNet-18 at 224 x
224 from 256 images of noise (weights as initialised). The same call again goes on with what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import timm
import torch
from _cifar_models import cifar10, cifar10_parser, padded_resnet20
from _rows import even_plan
from scipy.stats import kendalltau
from torch.nn import functional as F

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.calibration.reconstruction import Reconstruction, reconstruct
from sbs_fx.passes import apply_bits, channel_groups, cost_model, finalize, insert_gates, slim, trace
from sbs_fx.passes.channels.importance import group_importance
from sbs_fx.passes.channels.slim import slim_bits
from sbs_fx.plan import Budget, Plan
from sbs_fx.plan.plan import KINDS_OF_BITS
from sbs_fx.search import Problem, Run, TwoStage, two_stage
from sbs_fx.search.two_stage import evidence_of
from sbs_fx.training import evaluate
from sbs_fx.training.norms import estimate_norms

PLANS = [(3, 3), (4, 4), (4, 8), (8, 8)]  # weight and activation bits whose cost is the budget


class Case:
    """The network, its analyses and its data."""

    def __init__(self, options: argparse.Namespace) -> None:
        net = padded_resnet20(options.weights)
        self.inputs = (torch.zeros(2, 3, 32, 32),)
        self.graph = trace(net, self.inputs)
        self.groups = channel_groups(self.graph)
        self.cost = cost_model(self.graph, self.groups)
        test = list(cifar10(options.data_dir, "test", 250))
        self.test = test[: -(-options.images // 250)]
        count = -(-options.calibration // 128)
        self.train = list(cifar10(options.data_dir, "train", 128))[:count]

    def problem(self, budget: Budget) -> Problem:
        return Problem.of(self.cost, budget, self.inputs)

    def realise(self, plan: Plan, data: list[Any]) -> Any:
        gated = insert_gates(slim(self.graph, self.groups, plan.kept), self.groups, channels=False)
        apply_bits(gated, slim_bits(self.groups, plan), plan.activation_bits)
        calibrate(gated, data, inputs=self.inputs, max_batches=len(data))
        return gated


def row_of(case: Case, weight_bits: int, activation_bits: int, options: argparse.Namespace) -> dict[str, Any]:
    even = even_plan(case.cost, weight_bits, activation_bits)
    target = case.cost.evaluate(even)
    row: dict[str, Any] = {"budget": f"W{weight_bits}A{activation_bits}", "images": options.calibration}
    row["uniform"] = evaluate(case.realise(even, case.train), case.test)
    budget = Budget(bops=target.bops / case.cost.reference.bops)
    since = time.perf_counter()
    found = two_stage(case.problem(budget), Run(case.train))
    row["search_seconds"] = time.perf_counter() - since
    plan = found.plan
    spent = case.cost.evaluate(plan)
    row["bops_ratio"] = case.cost.reference.bops / spent.bops
    row["budget_used"] = spent.bops / target.bops
    row["considered"] = [vars(considered) for considered in found.considered]
    row["plan"] = {
        "weight_bits": list(plan.weight_bits.values()),
        "activation_bits": list(plan.activation_bits.values()),
        "kept": {n: len(k) for n, k in plan.kept.items() if len(k) < case.groups[n].size},
    }
    gated = case.realise(plan, case.train)
    since = time.perf_counter()
    settings = Reconstruction(steps=options.steps)
    reconstruct(
        gated, case.graph, case.train, inputs=case.inputs, groups=case.groups, kept=plan.kept, settings=settings
    )
    row["reconstruction_seconds"] = time.perf_counter() - since
    row["two_stage"] = evaluate(finalize(gated), case.test)
    return row


def random_plan(case: Case, generator: torch.Generator) -> Plan:
    """Bits and kept counts at random; how many of them are low differs from plan to plan."""
    space = case.problem(Budget(bops=1.0)).space
    fixed = {kind: space.fixed(kind) for kind in KINDS_OF_BITS}
    high, whole = torch.rand(2, generator=generator).tolist()
    scores = group_importance(case.groups)

    def bits() -> int:
        if float(torch.rand((), generator=generator)) < high:
            return 8
        return (2, 4)[int(torch.randint(2, (), generator=generator))]

    kept = {}
    for name, group in case.groups.items():
        step, count = space.multiple(group), group.size
        inner = sum(member.dim == 0 and member.tensor.endswith("conv1.weight") for member in group.members)
        if inner and name != "conv1.weight:0" and float(torch.rand((), generator=generator)) > whole:
            count = step * int(torch.randint(1, group.size // step + 1, (), generator=generator))
        kept[name] = tuple(sorted(scores[name].argsort(descending=True)[:count].tolist()))
    return Plan(
        kept,
        {n: fixed["weight"].get(n) or bits() for n in case.cost.weights},
        {n: fixed["activation"].get(n) or bits() for n in case.cost.activations},
    )


def correlation(case: Case, count: int, rows: list[dict[str, float]], save: Any) -> dict[str, float]:
    images = case.train[:2]
    _, predictor = evidence_of(case.problem(Budget(bops=1.0)), Run(images), TwoStage(images=256))
    for seed in range(len(rows), count):
        plan = random_plan(case, torch.Generator().manual_seed(seed))
        row = {"dynamic": predictor(plan), "static": predictor(plan, dynamic=False)}
        gated = case.realise(plan, images)
        estimate_norms(gated, images, len(images))
        with torch.no_grad():
            losses = [float(F.cross_entropy(gated(x), y)) for x, y in case.test[:4]]
        rows.append({**row, "measured": sum(losses) / len(losses)})
        save()
    measured = [row["measured"] for row in rows]
    return {kind: float(kendalltau([row[kind] for row in rows], measured)[0]) for kind in ("dynamic", "static")}


def time_to_plan(images: int = 256) -> dict[str, float]:
    """Seconds by the clock and of the processor, on all threads that torch has."""
    net, x = timm.create_model("resnet18").eval(), torch.randn(images, 3, 224, 224)
    since, spent = time.perf_counter(), time.process_time()
    graph = trace(net, x[:2])
    groups = channel_groups(graph)
    data = list(zip(x.split(32), torch.randint(1000, (images,)).split(32), strict=True))
    two_stage(Problem.of(cost_model(graph, groups), Budget(bops=0.05), (x[:2],)), Run(data))
    return {
        "seconds": time.perf_counter() - since,
        "cpu_seconds": time.process_time() - spent,
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = cifar10_parser(__doc__ or "")
    parser.add_argument("--calibration", type=int, default=1024, help="training images")
    parser.add_argument("--steps", type=int, default=Reconstruction().steps, help="of reconstruction, in each block")
    parser.add_argument("--policies", type=int, default=100, help="for the rank correlation")
    options = parser.parse_args()
    if options.data_dir is None or options.weights is None:
        print("not run: needs --data-dir and --weights")
        return 0
    torch.manual_seed(0)
    done = json.loads(options.out.read_text()) if options.out.exists() else {"rows": [], "policies": []}

    def save() -> None:
        options.out.write_text(json.dumps(done, indent=1) + "\n")

    case = Case(options)
    done.setdefault("float", evaluate(case.graph, case.test))
    for weight_bits, activation_bits in PLANS:
        if f"W{weight_bits}A{activation_bits}" not in [row["budget"] for row in done["rows"]]:
            done["rows"].append(row_of(case, weight_bits, activation_bits, options))
            save()
            print({k: v for k, v in done["rows"][-1].items() if k != "considered"}, flush=True)
    if options.policies:
        done["kendall"] = correlation(case, options.policies, done["policies"], save)
        save()
    if "resnet18" not in done:
        done["resnet18"] = time_to_plan()
        save()
    print(f"\nfloat {done['float']:.2f} %\n")
    print("| budget | BOPs | used | uniform, ranges alone | two_stage, static graph | seconds |")
    print("|---|---|---|---|---|---|")
    for r in done["rows"]:
        print(
            f"| {r['budget']} | {r['bops_ratio']:.1f}x | {100 * r['budget_used']:.1f} % | {r['uniform']:.2f} | "
            f"{r['two_stage']:.2f} | {r['search_seconds'] + r['reconstruction_seconds']:.0f} |"
        )
    if "kendall" in done:
        print(f"\nKendall over {len(done['policies'])} random policies: {done['kendall']}")
    print(f"\nResNet-18, 256 images: {done['resnet18']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
