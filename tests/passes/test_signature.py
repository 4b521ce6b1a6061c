"""How models are called: what may stand among example inputs, and what a graph says to a call it was not made for."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx.passes import trace
from sbs_fx.passes.capture.inputs import InputSpec, evaluated, inputs_of
from sbs_fx.plan.errors import InputError, TraceError


@dataclass
class Views:
    left: Tensor
    scale: float
    rest: list[Tensor]


class Pair(NamedTuple):
    images: Tensor
    table: Tensor


class Net(nn.Module):
    """A convolution and what `join` makes of its features and the arguments."""

    def __init__(self, join: Callable[..., Any], forward: str = "positional") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.join = nn.Conv2d(3, 16, 3), join
        self.head = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu().mean((2, 3))


class Positional(Net):
    def forward(self, images: Tensor, other: Any = None, *, flag: bool = False) -> Any:
        return self.join(self, images, other, flag)


class Many(Net):
    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.join(self, *inputs, **options)


def x(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def table(rows: int = 7) -> Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows))


def with_table(net: Net, images: Tensor, other: Any, flag: bool) -> Tensor:
    features = net.features(images)
    return (nn.functional.normalize(features) if flag else features) @ other.t()


def summed(net: Net, images: Any, *others: Any, **options: Any) -> dict[str, Tensor]:
    parts = [images, *others, *options.values()]
    return {"logits": net.head(sum(net.features(part) for part in parts if isinstance(part, Tensor)))}


Case = tuple[nn.Module, Callable[[int], Any], tuple[str, ...]]
CASES: dict[str, Case] = {
    "no batch": (Positional(with_table), lambda b: (x(b), table()), ("images", "other")),
    "a dict": (Positional(with_table), lambda b: {"images": x(b), "other": table(), "flag": True}, ("images", "other")),
    "none": (Positional(lambda net, a, b, _: net.head(net.features(a))), lambda b: (x(b), None), ("images",)),
    "list": (Positional(lambda net, a, b, _: summed(net, a, *b)), lambda b: (x(b), [x(b), x(b)]),
             ("images", "other_0", "other_1")),
    "nested dict": (Positional(lambda net, a, b, _: summed(net, a, b["more"]["x"])),
                    lambda b: (x(b), {"more": {"x": x(b)}, "n": 3}), ("images", "other_more_x")),
    "dataclass": (Positional(lambda net, a, b, _: net.head(b.scale * net.features(b.left) + net.features(b.rest[0]))),
                  lambda b: (x(b), Views(x(b), 2.0, [x(b)])), ("images", "other_left", "other_rest_0")),
    "named tuple": (Positional(lambda net, a, b, _: net.features(b.images) @ b.table.t()),
                    lambda b: (x(b), Pair(x(b), table())), ("images", "other_images", "other_table")),
    "mapping": (Positional(lambda net, a, b, _: summed(net, a, b["x"])), lambda b: (x(b), UserDict(x=x(b))),
                ("images", "other_x")),
    "any number": (Many(summed), lambda b: (x(b), x(b), x(b)), ("inputs_0", "inputs_1", "inputs_2")),
    "any names": (Many(summed), lambda b: (x(b),), ("inputs_0",)),
}  # fmt: skip


def called(model: Any, inputs: Any) -> Any:
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        value = [dict(part) if isinstance(part, UserDict) else part for part in value]
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", CASES)
def test_a_call_of_any_form(name: str, tmp_path: Path) -> None:
    model, inputs, names = CASES[name]
    model.eval()
    graph = trace(model, inputs(2))
    assert [node.name for node in graph.graph.find_nodes(op="placeholder")] == list(names)
    assert {n for n, _ in graph.named_parameters()} <= {n for n, _ in model.named_parameters()}
    flat = leaves(inputs(5))
    assert len(flat) == len(names)
    for a, b in zip(leaves(graph(*flat)), leaves(called(model, inputs(5))), strict=True):
        assert torch.equal(a, b)
    result = sbs_fx.compress(model, inputs(2), budget=0.3)
    expected = leaves(result.model(*flat))
    # the arguments of the model, the tensors in order, and those by name
    for way in (called(result.model, inputs(5)), result.model(**dict(zip(names, flat, strict=True)))):
        assert all(torch.equal(a, b) for a, b in zip(leaves(way), expected, strict=True))
    result.save(tmp_path)
    loaded = sbs_fx.load(tmp_path / "model.pt2")
    assert all(torch.equal(a, b) for a, b in zip(leaves(loaded(*flat)), expected, strict=True))
    assert inputs_of(loaded) == inputs_of(result.model)


def test_another_value_of_a_constant_is_refused() -> None:
    model, inputs, _ = CASES["a dict"]
    result = sbs_fx.compress(model.eval(), inputs(2), budget=0.3)
    with pytest.raises(InputError, match="made for True where the call has False; compress the model again"):
        result.model(**{**inputs(2), "flag": False})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pictures": x()}, r"Positional.forward\(.*\) cannot be called .*: missing .* 'images'; give a tuple"),
        ((x(), None, True), "too many positional arguments"),
        ((x(), object()), "example input 'other' is a object; expected a torch.Tensor"),
        ({}, "no example inputs were given"),
        (("text",), "no tensor of shape"),
    ],
)
def test_inputs_that_are_none(inputs: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        trace(Positional(with_table).eval(), inputs)


# What a graph was made for


@pytest.mark.parametrize("kind", ["result", "loaded"])
def test_calls_that_a_graph_was_not_made_for(kind: str, tmp_path: Path) -> None:
    model = Positional(with_table).eval()
    result = sbs_fx.compress(model, (x(), table()), budget=0.3)
    result.save(tmp_path)
    run = result.model if kind == "result" else sbs_fx.load(tmp_path / "model.pt2")
    run(x(1), table())
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((x(2).to("meta"), table()), "'images' is on meta and the graph on cpu; move one of them"),
        ((x(2).to_sparse(), table()), "'images' has layout torch.sparse_coo; the graph takes dense tensors"),
        ((torch.randn(2, 3, 9, 8), table()), "'images' has size 9 in dimension 2, .* was made for 8 .*'height'"),
        ((torch.randn(2, 4, 8, 8), table()), "'images' has size 4 in dimension 1"),
        ((x()[0], table()), "'images' has 3 dimensions"),
        ((x().half(), table()), "'images' has dtype torch.float16; the graph takes images: float32 .*convert it"),
        ((x(), table(6)), "'other' has size 6 in dimension 0"),
        ((x(),), "the graph takes"),
        ((torch.randn(0, 3, 8, 8), table()), "'images' has size 0 .* a batch of 1 or more"),
        ((x(), 3), "'other' is a int; expected a tensor: other: float32"),
    ]
    for inputs, message in wrong:
        with pytest.raises(InputError, match=message):
            run(*inputs)


def test_what_has_a_batch_by_chance_can_be_said_to_have_none() -> None:
    model = Positional(with_table).eval()
    tied = sbs_fx.compress(model, (x(7), table(7)), budget=0.3).model
    with pytest.raises(InputError, match=r"another input's batch is 5; .*compress with dynamic=\{\"other\": \{\}\}"):
        tied(x(5), table(7))
    free = sbs_fx.compress(model, (x(7), table(7)), budget=0.3, dynamic={"other": {}}).model
    assert free(x(5), table(7)).shape == (5, 7)


def test_other_image_sizes_where_asked(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    result = sbs_fx.compress(net, x(), budget=0.3, dynamic=("batch", "height", "width"))
    result.save(tmp_path)
    images = torch.randn(3, 3, 20, 11)
    assert torch.equal(sbs_fx.load(tmp_path / "model.pt2")(images), result.model(images))
    with pytest.raises(InputError, match="height of 3 or more"):
        result.model(torch.randn(3, 3, 2, 11))


def test_dynamic_names_what_is_there() -> None:
    model = Positional(with_table).eval()
    for dynamic, message in (
        (("depth",), "'depth'; expected any of"),
        ({"pictures": {0: "batch"}}, "names 'pictures'; the tensors are images, other"),
        ({"images": {4: "batch"}}, r"dimension 4 of 'images', whose shape is \(2, 3, 8, 8\)"),
        ({"images": {}, "other": {}}, "no example input has a batch"),
        ("batch", "dynamic='batch'; expected names such as"),
        (3, "dynamic=3; expected names such as"),
        ({"images": None}, "dynamic= has None for 'images'; expected a name"),
        ({"images": {"0": "batch"}}, "by the number of the dimension"),
        ({"images": {0: "my batch"}}, "expected a name, a word each"),
    ):
        with pytest.raises(InputError, match=message):
            trace(model, (x(), table()), dynamic=dynamic)  # type: ignore[arg-type]


# Branches on sizes


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((2, 3))
        return y * 2 if x.shape[0] > 4 or x.shape[0] % 3 == 0 else y


def test_a_branch_on_the_batch_is_kept_and_checked(tmp_path: Path) -> None:
    model = Branch().eval()
    result = sbs_fx.compress(model, x(2), budget=0.5)
    result.save(tmp_path)
    loaded = sbs_fx.load(tmp_path / "model.pt2")
    for run in (result.model, loaded):
        for batch in (1, 2, 4):
            assert torch.allclose(run(x(batch)), model(x(batch)), atol=0.3)
        for batch, message in ((3, "batch % 3"), (5, "batch of 1 to 4"), (6, "batch of 1 to 4")):
            with pytest.raises(InputError, match=message):
                run(x(batch))


def test_a_size_that_the_model_fixes_is_named() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x).relu().view(2, -1))

    with pytest.raises(
        TraceError, match=r"a batch of 2 alone, .*test_signature.py:\d+ \(return .*\) calls view with the"
    ):
        trace(Fixed().eval(), x())


def test_guards_are_arithmetic_and_nothing_else() -> None:
    spec = inputs_of(trace(Branch().eval(), x(2)))
    assert spec is not None
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert evaluated("(batch % 3) != 0", {"batch": 4})
    assert not evaluated("(batch % 3) != 0", {"batch": 6})
    for text in (
        "__import__('os').getcwd()",
        "batch.real",
        "[batch]",
        "(lambda: 1)()",
        "9 ** 9 ** 9",
        "batch if 1 else 0",
        "abs(batch)",
    ):
        with pytest.raises(ValueError, match="no comparison of sizes"):
            InputSpec.from_json({"tensors": [], "ranges": {}, "guards": [text]})


def test_two_images_through_one_encoder() -> None:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(32, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            both = self.encoder(torch.cat([left, right], 0)).relu().mean((2, 3))
            return self.head(torch.cat(both.chunk(2, 0), 1))

    model = Siamese().eval()
    graph = trace(model, (x(2), x(2)))
    for batch in (1, 2, 5):
        assert torch.equal(graph(x(batch), x(batch) + 1), model(x(batch), x(batch) + 1))
    result = sbs_fx.compress(model, (x(2), x(2)), budget=0.3)
    assert result.model(x(5), x(5)).shape == (5, 2)
    with pytest.raises(InputError, match="batch"):
        result.model(x(2), x(5))


def test_sizes_that_depend_on_one_another_are_one() -> None:
    """The batch of what comes out of the encoder is half of both together, for torch another size than either."""

    class Correlation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            one, other = self.encoder(torch.cat([left, right], 0)).chunk(2, 0)
            batch, _, height, width = one.shape
            volume = (one.flatten(2).mT @ other.flatten(2)).reshape(batch * height * width, 1, height, width)
            places = left.new_zeros(left.shape[0] * height * width, 2, 2, 2)
            samples = nn.functional.grid_sample(volume, places, align_corners=True)
            return self.head(samples.view(left.shape[0], height, width, 4))

    model = Correlation().eval()
    graph = trace(model, {"left": x(2), "right": x(2) + 1})
    spec = inputs_of(graph)
    assert spec is not None
    assert spec.ranges == {"batch": (1, None)}
    for batch in (1, 2, 5):
        assert torch.equal(graph(x(batch), x(batch) + 1), model(x(batch), x(batch) + 1))
    assert sbs_fx.compress(model, (x(2), x(2)), budget=0.9).model(x(5), x(5) + 1).shape == (5, 8, 8, 2)


def test_a_tensor_that_is_given_twice_is_two() -> None:
    model, same = CASES["any number"][0].eval(), x(2)
    graph = trace(model, (same, same, same))
    assert torch.equal(graph(x(3), x(3) + 1, x(3) - 2)["logits"], model(x(3), x(3) + 1, x(3) - 2)["logits"])


def test_data_of_models_with_several_inputs() -> None:
    model, inputs, _ = CASES["any number"]
    data = [{"inputs_2": x(4), "inputs_1": x(4) + 1, "inputs_0": x(4), "labels": torch.zeros(4).long()}] * 2
    for method in ("auto", "uniform", "opq"):
        result = sbs_fx.compress(model.eval(), inputs(2), budget=0.3, data=data, method=method)
        assert result.policy.method == ("two_stage" if method == "auto" else method)


def test_a_number_that_is_none_is_the_same_number_again() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return x * 2 if scale != scale else x * scale

    x = torch.randn(2, 4)
    graph = sbs_fx.compress(Scaled(), {"x": x, "scale": float("nan")}).model
    assert torch.equal(graph(x=x, scale=float("nan")), 2 * x)
    with pytest.raises(InputError, match="the graph was made for nan where the call has 1.0"):
        graph(x=x, scale=1.0)
