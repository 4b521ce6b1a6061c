"""`multi_path`: one path a bitwidth, a published baseline; what sharing a path saves is measured against this.

In and out: as `sbs`, but nothing is pruned. Source: DNAS (arXiv 1812.00090), in the form that single-path bit sharing
is compared with: every convolution and linear layer is there once a candidate bitwidth, with a weight, a weight
quantiser and an activation quantiser of its own (`split_paths`), and what the paths give is added up with softmax
weights. A layer has one vector of architecture parameters, and so one bitwidth for weight and activation.
Ours: the vectors are trained along with the weights (no second data set, no Gumbel noise); their expected bits go into
the cost and the control of `GateSearch`; a tensor that several layers read counts with the mean of what they expect and
gets the most that they choose; the last moves (`settle`), after which weight and activation may differ. Weights and
inputs of the first and last layers have one path at their fixed bits. Products of two activations, and those with a
weight that is computed, keep one super-bit quantiser an operand, whose gates search as in `GateSearch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.data.batches import read_batches
from sbs_fx.passes import ChannelGroups, CostModel, activation_gates, apply_bits, insert_gates, weight_gates
from sbs_fx.passes.graph import with_tensors
from sbs_fx.plan import Budget
from sbs_fx.plan.errors import InputError
from sbs_fx.search.baselines.split_paths import MARK, Fixed, PathSum, split_paths
from sbs_fx.search.gate_search import Draft, GateSearch, Search, bits_of, while_searching
from sbs_fx.search.sbs import check_training_data
from sbs_fx.search.searched import Searched, policy_of
from sbs_fx.search.settle import Space, judged_on, ranges_by_bits, settle
from sbs_fx.search.uniform import end_bits
from sbs_fx.training import Checkpoints, Training, train
from sbs_fx.training.progress import Observer

_TRAVEL = 5.0  # how far an architecture parameter can move in all


class MultiPathSearch(GateSearch):
    """Paths and weights trained together.

    Arguments are those of `GateSearch`; the network, from `insert_gates` without channel gates, is rewritten.

    Raises:
        InputError: `search.decisions` is "channels".
    """

    method: ClassVar[str] = "multi_path"
    starts_warm: ClassVar[bool] = False

    def __init__(
        self,
        network: fx.GraphModule,
        groups: ChannelGroups,
        cost: CostModel,
        budget: Budget,
        search: Search,
        *,
        fixed: Fixed = ({}, {}),
        steps: int | None = None,
        name: str = "search",
    ) -> None:
        if search.decisions == "channels":
            raise InputError(
                "decisions 'channels' with one path a bitwidth, which prunes nothing; use 'bits' or 'joint'"
            )
        self.fixed = fixed
        self.choices = split_paths(network, cost, fixed)
        of_paths = (
            {n: bits_of(g) for n, g in weight_gates(network).items() if MARK in n},
            {n: bits_of(g) for n, g in activation_gates(network).items() if MARK in n},
        )
        super().__init__(
            network,
            groups,
            cost,
            budget,
            search.model_copy(update={"decisions": "bits"}),
            fixed=({**fixed[0], **of_paths[0]}, {**fixed[1], **of_paths[1]}),
            steps=steps,
            name=name,
        )
        self.readers: dict[str, list[PathSum]] = {}  # searched tensor -> the layers with paths that read it
        for choice in self.choices.values():
            for tensor in choice.reads:
                if tensor not in fixed[1]:
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
        return sizes, weights, activations

    def draft(self) -> Draft:
        found = super().draft()
        weights = found.weight_bits | {n: choice.paths.decided_bits() for n, choice in self.choices.items()}
        activations = {**self.fixed[1], **found.activation_bits}
        for name, readers in self.readers.items():
            activations[name] = max([paths.decided_bits() for paths in readers] + [activations.get(name, 0)])
        return Draft(
            {name: weights[name] for name in self.cost.weights},
            {name: activations[name] for name in self.cost.activations},
            found.kept,
        )

    def measures(self) -> dict[str, Any]:
        draft = self.draft()
        histograms = {}
        for key, table in (("weight_bits", draft.weight_bits), ("activation_bits", draft.activation_bits)):
            bits = list(table.values())
            histograms[key] = {b: bits.count(b) for b in sorted(set(bits))}
        return {**super().measures(), **histograms}

    def tensors(self, graph: fx.GraphModule, weight_bits: Mapping[str, int]) -> dict[str, Tensor]:
        """Parameters and buffers by their names in the traced graph, weights from the paths of these bits."""
        state = self.network.state_dict()
        chosen = {choice.weight: choice.copies[weight_bits[name]] for name, choice in self.choices.items()}
        names = [*dict(graph.named_parameters()), *dict(graph.named_buffers())]
        return {n: state[chosen.get(n, n)].detach().clone() for n in names if chosen.get(n, n) in state}


def multi_path(
    graph: fx.GraphModule,
    groups: ChannelGroups,
    cost: CostModel,
    budget: Budget,
    data: Iterable[Any],
    *,
    inputs: Sequence[Tensor],
    search: Search | None = None,
    settings: Training | None = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    progress: Observer | None = None,
) -> Searched:
    """Search by one path a bitwidth. Arguments and errors are those of `sbs`; channels are not among the decisions."""
    search, settings = search or Search(), settings or Training()
    check_training_data(data)
    ends = end_bits(cost)
    fixed = (ends.weights, ends.activations)
    steps = search.epochs * len(data) if isinstance(data, Sized) else None
    network = insert_gates(graph, groups, channels=False)
    stage = MultiPathSearch(network, groups, cost, budget, search, fixed=fixed, steps=steps)
    calibrate(network, data, inputs=inputs)
    train(
        stage,
        data,
        epochs=search.epochs,
        lr=search.lr,
        settings=while_searching(settings),
        teacher=graph if settings.distillation else None,
        seed=seed,
        checkpoints=checkpoints,
        progress=progress,
    )
    draft = stage.draft()
    single = insert_gates(with_tensors(graph, stage.tensors(graph, draft.weight_bits)), groups, channels=False)
    apply_bits(single, draft.weight_bits, draft.activation_bits)
    space = Space(
        tuple(name for name in cost.weights if name not in fixed[0]),
        tuple(name for name in cost.activations if name not in fixed[1]),
        {},
    )
    batches = judged_on(graph, read_batches(data, max_batches=search.settle_batches))
    decided = settle(single, cost, budget, draft, space, batches, ranges_by_bits(single, space, data, inputs))
    policy = policy_of(decided, groups, stage.method, seed, "symmetric")
    return Searched(policy, stage.tensors(graph, decided.weight_bits))
