"""`multi_path`: one path a bitwidth, a published baseline; what sharing a path saves is measured against this.

In and out: as `sbs`, but nothing is pruned. Source: DNAS (arXiv 1812.00090), in the form that single-path bit sharing
is compared with: every convolution and linear layer is there once a candidate bitwidth, with a weight, a weight
quantiser and an activation quantiser of its own (`split_paths`), and what the paths give is added up with softmax
weights. A layer has one vector of architecture parameters, and so one bitwidth for weight and activation.
Ours: the vectors are trained along with the weights (no second data set, no Gumbel noise); their expected bits go into
the cost and the control of `GateSearch`; a tensor that several layers read counts with the mean of what they expect and
gets the most that they choose; budget repair, after which weight and activation may differ. Weights and
inputs of the first and last layers have one path at their fixed bits. Products of two activations, and those with a
weight that is computed, keep one super-bit quantiser an operand, whose gates search as in `GateSearch`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sized
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import InputError
from sbs_fx.search.baselines.split_paths import MARK, PathSum, split_paths
from sbs_fx.search.gate_search import GateSearch, Search, bits_of, while_searching
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.search.ranges import ranges_by_bits
from sbs_fx.search.registry import Run, method
from sbs_fx.search.repair import BudgetRepair, Harm, judged_on
from sbs_fx.search.sbs import check_training_data
from sbs_fx.training import Training, train

_TRAVEL = 5.0  # how far an architecture parameter can move in all


class MultiPathSearch(GateSearch):
    """Paths and weights trained together.

    Arguments are those of `GateSearch`; the network, from `insert_gates` without channel gates, is rewritten.

    """

    method: ClassVar[str] = "multi_path"
    starts_warm: ClassVar[bool] = False

    def __init__(
        self,
        network: fx.GraphModule,
        problem: Problem,
        search: Search,
        *,
        steps: int | None = None,
        name: str = "search",
    ) -> None:
        self.fixed = problem.space.fixed("weight"), problem.space.fixed("activation")
        self.choices = split_paths(network, problem.cost, self.fixed)
        of_paths = (
            {n: bits_of(g) for n, g in weight_gates(network).items() if MARK in n},
            {n: bits_of(g) for n, g in activation_gates(network).items() if MARK in n},
        )
        fixed = Plan({}, {**self.fixed[0], **of_paths[0]}, {**self.fixed[1], **of_paths[1]})
        super().__init__(network, problem, search, fixed=fixed, steps=steps, name=name)
        self.readers: dict[str, list[PathSum]] = {}  # searched tensor -> the layers with paths that read it
        for choice in self.choices.values():
            for tensor in choice.reads:
                if tensor not in self.fixed[1]:
                    self.readers.setdefault(tensor, []).append(choice.paths)

    def optimizers(self, settings: Training) -> list[torch.optim.Optimizer]:
        logits = [choice.paths.logits for choice in self.choices.values()]
        lr = _TRAVEL / (0.5 * self.steps)  # 0.5: the mean of a cosine
        own = [torch.optim.Adam(logits, lr=lr, betas=(0.9, 0.99), eps=1e-12)] if logits else []
        return [*super().optimizers(settings), *own]

    def expectations(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        sizes, weights, activations = super().expectations()
        means = {choice.paths: choice.paths.expected_bits() for choice in self.choices.values()}
        weights |= {name: means[choice.paths] for name, choice in self.choices.items()}
        for name, bits in self.fixed[1].items():
            activations.setdefault(name, torch.tensor(float(bits)))
        for name, readers in self.readers.items():
            # a layer without paths reads the tensor through a gate of the tensor's own name
            apart = [activations[name]] if name in activations else []
            activations[name] = torch.stack([means[paths] for paths in readers] + apart).mean()
        # reason: gates of single paths are none of the price's variables
        weights = {name: bits for name, bits in weights.items() if MARK not in name}
        activations = {name: bits for name, bits in activations.items() if MARK not in name}
        return sizes, weights, activations

    def plan(self) -> Plan:
        plan = super().plan()
        weights = {**plan.weight_bits} | {n: choice.paths.decided_bits() for n, choice in self.choices.items()}
        activations = {**self.fixed[1], **plan.activation_bits}
        for name, readers in self.readers.items():
            most = max([paths.decided_bits() for paths in readers] + [activations.get(name, 0)])
            # reason: a path has its weight's bits, which the tensor's own constraints may not allow
            activations[name] = self.problem.space.at_most("activation", name, most)
        return Plan(
            plan.kept,
            {name: weights[name] for name in self.problem.cost.weights},
            {name: activations[name] for name in self.problem.cost.activations},
        )

    def measures(self) -> dict[str, Any]:
        plan = self.plan()
        tables: dict[str, Any] = {"weight_bits": plan.weight_bits, "activation_bits": plan.activation_bits}
        histograms = {key: dict(sorted(Counter(table.values()).items())) for key, table in tables.items()}
        return {**super().measures(), **histograms}

    def tensors(self, graph: fx.GraphModule, plan: Plan) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the traced graph, weights from the paths of a plan's bits."""
        state = self.network.state_dict()
        bits: dict[str, Any] = {**plan.weight_bits}
        chosen = {choice.weight: choice.copies[bits[name]] for name, choice in self.choices.items()}
        names = [*dict(graph.named_parameters()), *dict(graph.named_buffers())]
        return {n: state[chosen.get(n, n)].detach().clone() for n in names if chosen.get(n, n) in state}


@method(
    "multi_path",
    help="one path a bitwidth with softmax weights (DNAS), a published baseline; nothing is pruned",
    needs="labels",
    trains=True,
    settings=Search,
    section="search",
    resumes=True,
)
def multi_path(problem: Problem, run: Run) -> SearchResult:
    """Search by one path a bitwidth. Errors are those of `sbs`; channels are not among the decisions.

    Raises:
        InputError: the settings quantise nothing.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["multi_path"].search is multi_path, METHODS["multi_path"].trains
    (True, True)
    """
    if not problem.space.settings.quantise:
        raise InputError("quantise=False with one path a bitwidth, which prunes nothing: choose another method")
    search: Search = run.settings or Search()
    check_training_data(run.data, len(problem.inputs))
    problem = problem.within(prune=False)
    space, groups = problem.space, problem.groups
    network = insert_gates(problem.graph, groups, channels=False, candidates=space.values)
    steps = search.epochs * len(run.data) if isinstance(run.data, Sized) else None
    stage = MultiPathSearch(network, problem, search, steps=steps)
    calibrate(network, run.data, inputs=problem.inputs)
    train(
        stage,
        run.data,
        epochs=search.epochs,
        lr=search.lr,
        settings=while_searching(run.training),
        teacher=problem.graph if run.training.distillation else None,
        seed=problem.seed,
        checkpoints=run.checkpoints,
        progress=run.observer,
    )
    plan = stage.plan()
    single = insert_gates(with_tensors(problem.graph, stage.tensors(problem.graph, plan)), groups, channels=False)
    apply_bits(single, plan.weight_bits, plan.activation_bits)
    batches = judged_on(problem.graph, run.data, search.repair_batches)
    ranges = ranges_by_bits(single, space, run.data, problem.inputs)
    decided = BudgetRepair(problem, Harm(single, batches, ranges), {})(plan)
    return SearchResult(decided, stage.tensors(problem.graph, decided))
