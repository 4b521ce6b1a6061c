"""`trace`: what the graph holds besides equal outputs (those are in test_equalities.py), and its errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sbs_fx.passes import channel_groups, cost_model, slim, trace
from sbs_fx.passes.capture.canonical import canonicalise
from sbs_fx.plan.errors import InputError, TraceError
from tests.networks.models import Recipe, step

aten = torch.ops.aten


class Apply(nn.Module):
    """A function of the input and of one layer, as a module."""

    def __init__(self, function: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv, x)


def assert_traced(module: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> fx.GraphModule:
    """Traces, and compares with the module bit for bit at batch 1, 2 and 5; the inputs stay as they were."""
    graph = trace(module, torch.randn(2, *shape))
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        before = x.clone()
        with torch.no_grad():
            got = graph(x)
            assert torch.equal(x, before)
            assert torch.equal(got, module.eval()(x))
    return graph


# What a graph holds


def test_names_modes_and_parameters_stay() -> None:
    network = Recipe((step("residual"), step("attention"))).build()
    network.blocks[0].train()
    modes = {name: m.training for name, m in network.named_modules()}
    graph = trace(network, torch.randn(2, 3, 8, 8))
    assert {name: m.training for name, m in network.named_modules()} == modes
    own = dict(network.named_parameters())
    for name, parameter in graph.named_parameters():
        assert torch.equal(parameter, own[name])
        assert parameter.requires_grad
    assert dict(graph.named_parameters()).keys() == own.keys()


def test_graphs_are_functional_and_flat() -> None:
    graph = trace(Recipe((step("in_place"), step("residual", in_place=True))).build(), torch.randn(2, 3, 8, 8))
    for node in graph.graph.nodes:
        assert node.op in ("placeholder", "get_attr", "call_function", "output")
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable
        assert not isinstance(node.target, torch._ops.HigherOrderOperator)


def test_parameters_that_nothing_reads_are_left_out() -> None:
    module = Apply(lambda conv, x: conv(x))
    module.unused = nn.Linear(4, 4)
    assert [name for name, _ in trace(module, torch.randn(2, 3, 8, 8)).named_parameters()] == [
        "conv.weight",
        "conv.bias",
    ]


def test_a_tied_parameter_has_one_name() -> None:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    graph = trace(nn.Sequential(first, nn.ReLU(), second, first), torch.randn(2, 6))
    assert sorted(graph.state_dict()) == ["0.bias", "0.weight", "2.bias"]
    assert len(graph.graph.find_nodes(op="get_attr")) == 3


def test_tables_are_folded_and_computed_weights_are_not() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6))
            self.register_buffer("frequency", torch.rand(3))

        def forward(self, x: Tensor) -> Tensor:
            angle = torch.outer(torch.arange(x.shape[1]).to(x.dtype), self.frequency).repeat(1, 2)
            return F.linear(x * angle.cos() + angle.sin(), self.weight / self.weight.norm())

    graph = assert_traced(Tables(), (4, 6))
    called = {str(node.target) for node in graph.graph.nodes}
    assert not called & {"aten.cos.default", "aten.arange.default", "aten.sin.default"}
    assert "aten.div.Tensor" in called
    assert sum(name.startswith("_folded_") for name, _ in graph.named_buffers()) == 2


def test_composites_without_a_rule_are_taken_apart_and_others_are_not() -> None:
    """Also those that are made of others without a rule: inner of tensordot. Outputs stay bitwise."""
    aten = torch.ops.aten
    eye = torch.eye(8)
    graph = assert_traced(Apply(lambda conv, x: F.layer_norm(torch.inner(conv(x), eye).diff(dim=2), (8,))))
    called = {node.target for node in graph.graph.nodes}
    assert not called & {aten.inner.default, aten.tensordot.default, aten.diff.default}
    assert {aten.mm.default, aten.layer_norm.default, aten.conv2d.default} <= called


def test_random_numbers_are_not_folded() -> None:
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.rand(6)

    graph = trace(Noise(), torch.randn(2, 6))
    assert not torch.equal(graph(torch.zeros(2, 6)), graph(torch.zeros(2, 6)))


def test_dropout_keeps_its_rate_and_batch_norm_its_eps() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.003, momentum=0.02), nn.Dropout(0.35)).train()
    graph = trace(module, torch.randn(2, 3, 4, 4))
    assert module.training
    (norm,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    (dropout,) = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
    assert norm.args[5:8] == (False, 0.02, 0.003)
    assert dropout.args[1:] == (0.35, False)


def test_several_inputs_and_outputs() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + b, "product": a * b}

    graph = trace(Two(), (torch.randn(2, 3), torch.randn(2, 3)))
    result = graph(torch.ones(4, 3), torch.full((4, 3), 2.0))
    assert {name: value[0, 0].item() for name, value in result.items()} == {"sum": 3.0, "product": 2.0}


def test_the_image_size_may_be_dynamic_too() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    graph = trace(module, torch.randn(2, 3, 8, 9), dynamic=("batch", "height", "width"))
    x = torch.randn(1, 3, 12, 5)
    assert torch.equal(graph(x), module.eval()(x))


# Writes in place: views that see them, views that must not


def into_a_view(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y = conv(x)
    part = y[:, 2:4]
    part.mul_(2.0)
    return torch.cat([y.relu_(), part], dim=1)


def into_the_input(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return conv(x.clone().relu_().add_(1.0))


def after_a_view_was_read(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y = conv(x)
    flat = y.flatten(2)
    before = flat.sum(2)
    y.add_(before[:, :, None, None])
    return flat + y.flatten(2)


def into_a_residual(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y = conv(x)
    skip = y
    y = F.relu(y, inplace=True)
    y += skip
    return y * skip


def into_a_slice(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 8, 8, 8)
    y[:, :6] = conv(x)
    y[:, 6:, ::2] = 1.0
    return y


def into_both_halves(conv: nn.Conv2d, x: Tensor) -> Tensor:
    first, second = conv(x).chunk(2, dim=1)
    first = first.contiguous()
    first.add_(second)
    second = second.clone().sub_(first)
    return torch.cat([second, first], dim=1)


def through_a_reshape(conv: nn.Conv2d, x: Tensor) -> Tensor:
    y = conv(x)
    y.view(y.shape[0], -1)[:, :7].fill_(0.5)
    y.transpose(1, 2).clamp_(min=0.0)
    return F.dropout(y, 0.5, training=False).mul_(3.0) + y


WRITES = [
    into_a_view,
    into_the_input,
    after_a_view_was_read,
    into_a_residual,
    into_a_slice,
    into_both_halves,
    through_a_reshape,
]


@pytest.mark.parametrize("function", WRITES, ids=[f.__name__ for f in WRITES])
def test_writes_in_place(function: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
    graph = assert_traced(Apply(function))
    assert not any(
        node.target._schema.is_mutable for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)
    )


# Errors


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "no example inputs"),
        (([1, 2],), r"no tensor of shape \(batch, ...\) among the example inputs \(list\)"),
        (torch.tensor(1.0), "is a scalar"),
        (torch.randn(1, 3, 8, 8), r"\(1, 3, 8, 8\); give a batch of 2"),
        (torch.randn(2, 3, 8, 8, device="meta"), "on meta and the model on cpu"),
        (torch.randn(2, 4, 8, 8), r"does not run on example inputs of shape \(2, 4, 8, 8\)"),
    ],
)
def test_inputs_that_cannot_be_used(inputs: object, message: str) -> None:
    module = Apply(lambda conv, x: conv(x))
    with pytest.raises(InputError, match=message):
        trace(module, inputs)  # type: ignore[arg-type]


def test_control_flow_on_values_names_the_sub_module() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    module = nn.Sequential(nn.Conv2d(3, 4, 1), Branch()).train()
    with pytest.raises(TraceError, match=r"sub-module Branch at test_trace.py") as caught:
        trace(module, torch.randn(2, 3, 8, 8))
    assert caught.value.submodule.startswith("Branch")
    assert caught.value.reason
    assert module.training


class Strides(nn.Module):
    """What is at a place times its stride, as the heads of detectors have it; strides are a plain attribute."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv, self.how = nn.Conv2d(3, 4, 3, padding=1), how
        self.strides, self.count = torch.tensor([4.0, 8.0]), torch.tensor(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        shape = (y.shape[2] * y.shape[3], 1)
        if self.how == "number":
            scales = [torch.full(shape, float(stride)) for stride in self.strides]
        elif self.how == "tensor":
            scales = [torch.full(shape, stride) for stride in self.strides]
        elif self.how == "place":
            scales = [y.new_full(shape, self.strides[i]) for i in range(int(self.count))]
        else:
            self.count.add_(1)
            scales = [y.new_full(shape, float(self.count))]
        return y.flatten(2).mT * torch.cat(scales, 1).sum(1, keepdim=True)


@pytest.mark.parametrize("how", ["number", "tensor", "place"])
def test_numbers_in_plain_attributes_are_read(how: str) -> None:
    model = Strides(how).eval()
    graph = trace(model, torch.randn(2, 3, 8, 6), dynamic=("batch", "height", "width"))
    x = torch.randn(3, 3, 5, 9)
    assert torch.equal(graph(x), model(x))


def test_a_plain_attribute_that_a_forward_changes_is_not_read() -> None:
    with pytest.raises(TraceError, match="data-dependent|changes"):
        trace(Strides("counted").eval(), torch.randn(2, 3, 8, 6))


class Lengths(nn.Module):
    """The batch taken by len(x): as a size, a divisor and a row count."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).view(len(x), 4, -1)
        rows = torch.arange(len(y), device=x.device)[:, None]
        picked = y[rows, :, torch.arange(y.shape[2])].view(len(x), -1, 4)
        return self.linear(picked) / len(self.conv.weight)


def test_the_length_of_a_tensor_is_its_first_size() -> None:
    before = set(globals())
    graph = assert_traced(Lengths())
    assert set(globals()) == before
    assert graph(torch.randn(7, 3, 8, 8)).shape == (7, 64, 5)
    with pytest.raises(TraceError):
        trace(Loops().eval(), torch.randn(2, 3, 8, 8))
    assert set(globals()) == before


class Loops(Lengths):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.conv(x)[i] for i in range(len(x))])


class Vector(nn.Module):
    """Rows times a vector, spelt as a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.vector = nn.Linear(8, 16), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.linear(x), self.vector)


def test_a_linear_whose_weight_is_a_vector_is_a_product() -> None:
    graph = assert_traced(Vector(), (3, 8, 8))
    groups = channel_groups(graph)
    cost = cost_model(graph, groups)
    assert cost.reference.macs == 3 * 8 * (8 * 16 + 16)
    half = slim(graph, groups, {name: range(8) for name in groups})
    assert half(torch.randn(2, 3, 8, 8)).shape == (2, 3, 8)
    assert list(groups.values())[0].size == 16


def test_states_have_the_shapes_of_those_given() -> None:
    """Even where torch has noted another, as 2.11 does for layers that run both ways."""
    x = torch.randn(2, 3, 4)
    graph = trace(nn.LSTM(4, 5, bidirectional=True, batch_first=True).eval(), x)
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.lstm.input)
    y, *states = node.meta["val"]
    node.meta["val"] = (y, *(state.unsqueeze(1) for state in states))
    canonicalise(graph)
    assert [tuple(value.shape[2:]) for value in node.meta["val"]] == [(10,), (5,), (5,)]
    read = {user.args[1]: user.meta["val"] for user in node.users}
    assert all(read[i] is value for i, value in enumerate(node.meta["val"]) if i in read)
