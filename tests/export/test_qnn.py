"""Files for Qualcomm's NPUs have fixed shapes and keep the published rules, each of which finds what breaks it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

from sbs_fx.export import export
from sbs_fx.export.qnn import qnn_model
from sbs_fx.export.qnn_rules import _RULES, qnn_problems
from sbs_fx.export.runtime import flat, in_batches
from tests.networks.small import Residual
from tests.oracles.gated import integer_graph

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def static() -> fx.GraphModule:
    return integer_graph(Residual, IMAGES, exact=True)


@pytest.fixture(scope="module")
def model(static: fx.GraphModule) -> Any:
    return qnn_model(static, (IMAGES,))


def test_a_file_has_fixed_shapes_and_takes_any_number_here(static: fx.GraphModule, tmp_path: Path) -> None:
    found = export(static, (IMAGES,), "qnn", tmp_path / "model.onnx", batch=2)
    file = onnx.load(tmp_path / "model.onnx")
    for value, shape in ((file.graph.input[0], [2, 3, 16, 16]), (file.graph.output[0], [2, 5])):
        assert [size.dim_value for size in value.type.tensor_type.shape.dim] == shape
    for count in (1, 2, 5):
        assert torch.allclose(flat(found(IMAGES[:count]))[0], static(IMAGES[:count]), atol=1e-6)  # sums of floats
    assert found.lost == ()
    assert qnn_problems(file) == []


def test_batches_are_filled_up_and_cut_off_again() -> None:
    seen: list[Any] = []

    def run(parts: Any) -> list[Any]:
        seen.append(parts[0].shape)
        return [parts[0] + parts[1], parts[1].sum(1)]

    x, y = torch.randn(5, 3), torch.randn(5, 3)
    total, sums = in_batches(run, (x, y), 2)
    assert torch.equal(total, x + y)
    assert torch.equal(sums, y.sum(1))
    assert seen == [(2, 3)] * 3


# -- each rule finds what breaks it ------------------------------------------------------------------------------------


def node_of(model: Any, kind: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == kind)


def give(node: Any, place: int, values: Any, model: Any) -> None:
    """A constant of its own as a node's input."""
    name = f"changed_{len(model.graph.initializer)}"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    node.input[place] = name


def dynamic(model: Any) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


def operator(model: Any) -> None:
    node_of(model, "Relu").op_type = "Mish"


def in_float(model: Any) -> None:
    node_of(model, "Conv").input[0] = "input"


def signed(model: Any) -> None:
    give(node_of(model, "QuantizeLinear"), 2, np.int8(0), model)


def signed_product(model: Any) -> None:
    """Of two tensors, one of which is signed codes."""
    last = [node for node in model.graph.node if node.op_type == "DequantizeLinear" and len(node.input) > 2][-1]
    give(last, 2, np.int8(0), model)
    model.graph.node.append(onnx.helper.make_node("MatMul", [last.output[0], last.output[0]], ["product"], name="mm"))


def several_scales(model: Any) -> None:
    give(node_of(model, "QuantizeLinear"), 1, np.ones(3, np.float32), model)


def other_axis(model: Any) -> None:
    weight = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "left.weight")
    next(a for a in weight.attribute if a.name == "axis").i = 1


RULES = {
    dynamic: "fixed_shapes",
    operator: "supported_operators",
    in_float: "quantized",
    signed: "unsigned_codes",
    signed_product: "products",
    several_scales: "scales_per_channel",
    other_axis: "scales_per_channel",
}


@pytest.mark.parametrize("change", RULES)
def test_each_rule_finds_what_breaks_it(model: Any, change: Callable[[Any], None]) -> None:
    assert qnn_problems(model) == []
    broken = copy.deepcopy(model)
    change(broken)
    assert RULES[change] in {line.partition(":")[0] for line in qnn_problems(broken)}


def test_every_rule_has_a_test() -> None:
    assert {rule.__name__ for rule in _RULES} == set(RULES.values())
