"""`slim` and `compare_slim`: every deliberate index error is noticed, plans are checked, passes run in a `PassManager`.

That slim equals masked on every kind of network is in test_equalities.py.
"""

from __future__ import annotations

from random import Random

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.utils import _pytree as pytree

from sbs_fx.passes import channel_groups, insert_gates, on_device, slim, trace, weight_gates
from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.slim import Slices
from sbs_fx.passes.graph import attribute
from sbs_fx.passes.oracles.slimming import (
    MeasuredSlices,
    activations,
    compare_slim,
    masked_activations,
    relative_error,
)
from sbs_fx.passes.pass_manager import as_pass
from sbs_fx.plan.errors import GraphError, PolicyError
from tests.networks.models import SMALLEST_RECIPES
from tests.oracles.agreement import NODE_TOLERANCE, Plan, Traced, random_plan, traced

# reason: a ReLU over pooled channels silences some for every image, and a weight that meets only zeros may be any
BLIND = ("squeeze_excite", "cross_stage", "grouped-of-shuffled", "zero-pad-after")
MUTATED = [name for name in SMALLEST_RECIPES if not name.startswith(BLIND)][::8]
BATCH = 8  # reason: more images leave fewer channels that a ReLU silences on all of them


def most(case: Traced, random: Random) -> Plan:
    """Of every group about 60 %, but not all and at least two: the norm of a single coordinate says nothing."""
    return {
        name: sorted(random.sample(range(group.size), max(2, min(group.size - 1, round(0.6 * group.size)))))
        for name, group in case.groups.items()
    }


def shifted(index: Tensor, size: int, random: Random) -> Tensor:
    """The same coordinates but for one, which is replaced by its neighbour."""
    wrong, place = index.clone(), random.randrange(len(index))
    wrong[place] += random.choice([step for step in (-1, 1) if 0 <= wrong[place] + step < size])
    return wrong


def case_of(name: str) -> Traced:
    return traced(SMALLEST_RECIPES[name].build(), SMALLEST_RECIPES[name].example)


# Mutations


def mutations(case: Traced, slimmed: fx.GraphModule, plan: Plan, random: Random) -> dict[tuple[str, int], Tensor]:
    """For every sliced dimension of every tensor: the tensor with one coordinate of that dimension taken wrongly."""
    slices = Slices(case.groups, plan)
    found: dict[tuple[str, int], Tensor] = {}
    for name, types in case.groups.inference.tensors.items():
        for position, dim in enumerate(types):
            if slices.changed(dim):
                value = attribute(case.exact, name).detach()
                for i, other in enumerate(types):
                    index = slices.index(other)
                    index = shifted(index, value.shape[i], random) if i == position else index
                    value = value.index_select(i, index)
                found[name, position] = value
    for name, value in slimmed.named_buffers():
        if name not in case.groups.inference.tensors:  # the coordinates of an adapter
            found[name, 0] = shifted(value, int(value.max()) + 2, random)
    return found


def test_every_shifted_index_is_noticed() -> None:
    """One wrong coordinate in one dimension of one tensor, a few hundred times: some node differs each time."""
    tried, missed = 0, []
    for name in MUTATED:
        case, random = case_of(name), Random(0)
        plan, inputs = most(case, random), case.inputs(BATCH)
        expected = dict(masked_activations(case.exact, case.groups, plan, inputs))
        slimmed, slices = slim(case.exact, case.groups, plan), MeasuredSlices(case.groups, plan, inputs)

        def worst(
            graph: fx.GraphModule = slimmed,
            inputs: tuple[Tensor] = inputs,
            expected: dict[str, Tensor] = expected,
            slices: MeasuredSlices = slices,
        ) -> float:
            values = {node: v for node, v in activations(graph, inputs) if node in expected}
            assert values.keys() == expected.keys()
            return max(relative_error(slices.narrow(node, v), expected[node]) for node, v in values.items())

        assert worst() <= NODE_TOLERANCE
        for (tensor, position), wrong in mutations(case, slimmed, plan, random).items():
            parameter = attribute(slimmed, tensor)
            right, parameter.data = parameter.data, wrong
            tried += 1
            if worst() <= 1e-6:
                missed.append(f"{name}: {tensor} dimension {position}")
            parameter.data = right
    assert missed == []
    assert tried >= 200


@pytest.mark.parametrize(("name", "part"), [("attention", d.Prod), ("dense", d.Sum), ("shuffle", d.Prod)])
def test_wrong_index_arithmetic_is_noticed(name: str, part: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and indices are computed apart: an error that slicing and gathering share does not cancel."""
    case = case_of(name)
    plan = most(case, Random(0))
    right = d.kept_index

    def wrong(dim: d.Dim, kept: dict[d.Axis, Tensor]) -> Tensor:
        dim = d.resolve(dim)
        index = right(dim, kept)
        return index.flip(0) if isinstance(dim, part) else index

    assert compare_slim(case.exact, case.groups, plan, case.inputs()).worst_error <= NODE_TOLERANCE
    monkeypatch.setattr(d, "kept_index", wrong)
    flipped = slim(case.exact, case.groups, plan)
    monkeypatch.undo()
    assert compare_slim(case.exact, case.groups, plan, case.inputs(), slimmed=flipped).worst_error > 1e-3

    def shifted_by_one(dim: d.Dim, kept: dict[d.Axis, Tensor]) -> Tensor:
        index = right(dim, kept)
        return (index + 1) % dim.size if isinstance(d.resolve(dim), part) and len(index) < dim.size else index

    monkeypatch.setattr(d, "kept_index", shifted_by_one)
    assert compare_slim(case.exact, case.groups, plan, case.inputs()).worst_error > 1e-3


def test_a_report_names_the_first_node_that_is_wrong() -> None:
    case = case_of("residual")
    plan = most(case, Random(0))
    slimmed = slim(case.exact, case.groups, plan)
    report = compare_slim(case.exact, case.groups, plan, case.inputs(), slimmed=slimmed)
    assert report.first_above(NODE_TOLERANCE) == ""
    assert report.nodes == len(
        [
            n
            for n in case.exact.graph.nodes
            if n.op == "call_function" and "val" in n.meta and isinstance(n.meta["val"], Tensor)
        ]
    )
    assert report.differs_from_dense > 1e-3
    assert f"{report.nodes} tensors compared, worst relative error" in str(report)
    (norm, *_) = [n for n in slimmed.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    attribute(slimmed, str(norm.args[1].target)).data *= 1.5
    wrong = compare_slim(case.exact, case.groups, plan, case.inputs(), slimmed=slimmed)
    assert wrong.first_above(NODE_TOLERANCE) == norm.name
    assert wrong.worst_error > 1e-2
    assert wrong.output_error > 1e-6
    other = slim(case.exact, case.groups, {})
    with pytest.raises(GraphError, match=r"has shape \(.*\) in the slim graph and \(.*\) by its type"):
        compare_slim(case.exact, case.groups, plan, case.inputs(), slimmed=other)


# Plans


def test_the_empty_plan_changes_nothing() -> None:
    case = case_of("attention")
    slimmed = slim(case.exact, case.groups, {})
    with torch.no_grad():
        assert torch.equal(slimmed(*case.inputs()), case.exact(*case.inputs()))
    first = next(iter(slimmed.parameters()))
    first.data.zero_()
    assert not any(torch.equal(first, p) for p in case.exact.parameters()), "the slim graph owns its tensors"


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ({"stem.layer.weight:1": [0]}, "'stem.layer.weight:1', which is no channel group"),
        ({"stem.layer.weight:0": []}, "at least one"),
        ({"stem.layer.weight:0": [0, 0]}, "ascending, distinct"),
        ({"stem.layer.weight:0": [1, 0]}, "ascending, distinct"),
        ({"stem.layer.weight:0": [0, 8]}, r"within \[0, 8\)"),
        ({"stem.layer.weight:0": [-1, 3]}, r"within \[0, 8\)"),
    ],
)
def test_plans_that_make_no_sense(kept: Plan, message: str) -> None:
    case = case_of("residual")
    with pytest.raises(PolicyError, match=message):
        slim(case.graph, case.groups, kept)


def test_features_of_a_model_without_a_head_shrink_on_request() -> None:
    recipe = SMALLEST_RECIPES["gated-attention-features"]
    graph = trace(recipe.build().double(), recipe.example().double())
    groups = channel_groups(graph, keep_outputs=False)
    assert len(groups) > len(channel_groups(graph))
    plan = random_plan(groups, Random(1))
    plan["stem.layer.weight:0"] = [0, 2, 5]
    report = compare_slim(graph, groups, plan, (recipe.example(3).double(),))
    assert report.worst_error <= NODE_TOLERANCE
    with torch.no_grad():
        assert slim(graph, groups, plan)(recipe.example(3).double()).shape[-1] == 3


class Table(nn.Module):
    """Products of two maps, with channels and rows of one in the rows, channels and columns of the other beside."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        product = (self.a(x)[:, :, None] * self.b(x)[:, None]).transpose(2, 3)
        return product.reshape(x.shape[0], 4 * x.shape[2], 6 * x.shape[3])


def test_two_sizes_of_a_reshape_follow_their_channels_and_the_image() -> None:
    """3 of 4 channels times 8 rows, 2 of 6 times 9 columns; neither can be left to -1."""
    graph = trace(Table(), torch.randn(2, 3, 5, 7), dynamic=("batch", "height", "width"))
    slimmed = slim(graph, channel_groups(graph, keep_outputs=False), {"a.weight:0": [0, 2, 3], "b.weight:0": [1, 4]})
    x = torch.randn(3, 3, 8, 9)
    with torch.no_grad():
        whole = graph(x).view(3, 4, 8, 6, 9)
        torch.testing.assert_close(slimmed(x), whole[:, [0, 2, 3]][:, :, :, [1, 4]].reshape(3, 24, 18))


# torch's own pass manager


def test_passes_run_in_a_pass_manager() -> None:
    network, x = SMALLEST_RECIPES["residual"].build(), SMALLEST_RECIPES["residual"].example(3)
    graph = trace(network, x)
    plan = random_plan(channel_groups(graph), Random(0))
    manager = PassManager([as_pass(channel_groups), as_pass(slim, kept=plan), as_pass(insert_gates, channels=False)])
    result = manager(graph)
    assert result.modified
    with torch.no_grad():
        assert torch.equal(result.graph_module(x), slim(graph, channel_groups(graph), plan)(x))
    analysed = PassManager([as_pass(channel_groups)])(graph)
    assert not analysed.modified
    changes = result.graph_module.meta["changes"]
    assert changes["slim"].tensors
    assert changes["insert_gates"].added >= len(weight_gates(result.graph_module)) > 0
    assert not changes["insert_gates"].removed
    everything = {name: list(range(group.size)) for name, group in channel_groups(graph).items()}
    assert not PassManager([as_pass(slim, kept=everything)])(graph).modified
    assert list(analysed.graph_module.meta["channel_groups"]) == list(plan)


def test_adapters_shrink_with_the_channels_and_shrink_again() -> None:
    class Neighbours(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.mix, self.head = nn.Linear(6, 12), nn.Conv1d(1, 1, 5, padding=2), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.sigmoid(self.mix(torch.relu(self.stem(x)).unsqueeze(1))).squeeze(1).roll(1, 1))

    graph = trace(Neighbours().double(), torch.randn(2, 6, dtype=torch.float64))
    groups, x = channel_groups(graph), torch.randn(3, 6, dtype=torch.float64)
    kept = [0, 1, 4, 5, 6, 9, 11]
    once = slim(graph, groups, {"stem.weight:0": kept})
    buffers = dict(once.named_buffers())
    assert len(buffers) == 2
    assert all(b.tolist() == kept for b in buffers.values())
    again = channel_groups(once)
    assert {name: group.size for name, group in again.items()} == {"stem.weight:0": 7}
    assert compare_slim(once, again, {"stem.weight:0": [1, 2, 6]}, (x,)).worst_error <= NODE_TOLERANCE
    twice = slim(once, again, {"stem.weight:0": [1, 2, 6]})
    with torch.no_grad():
        assert torch.equal(twice(x), slim(graph, groups, {"stem.weight:0": [1, 4, 11]})(x))


# Devices


@pytest.mark.parametrize("name", list(SMALLEST_RECIPES)[::4])
def test_all_of_a_graph_moves_to_another_device(name: str) -> None:
    """The meta device stands for a GPU: what stays behind on the CPU cannot be mixed with it."""
    case = case_of(name)
    images = case.images(2)
    moved = on_device(case.graph, "meta")(images.to("meta"))
    here = on_device(case.graph, "cpu")(images)
    expected = case.graph(images)
    for there, again, value in zip(_tensors(moved), _tensors(here), _tensors(expected), strict=True):
        assert there.device.type == "meta"
        assert there.shape == value.shape
        assert torch.equal(again, value)


def _tensors(output: object) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
