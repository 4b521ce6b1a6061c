"""Files for TensorRT keep its published rules, each of which finds what breaks it; nothing here needs a GPU."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx

import sbs_fx
from sbs_fx.export import export
from sbs_fx.export.onnx import onnx_model
from sbs_fx.export.runtime import flat
from sbs_fx.export.tensorrt import symmetric_codes, tensorrt_model
from sbs_fx.export.tensorrt_rules import _RULES, tensorrt_problems
from sbs_fx.passes import finalize, integer_grid, integer_joins
from sbs_fx.passes.dialects import QUANTIZE
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, weight_gates
from sbs_fx.plan.errors import BackendError
from tests.networks.odd_models import Made
from tests.networks.small import Residual
from tests.oracles.gated import gate

onnx = pytest.importorskip("onnx")
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def static(bits: tuple[int, ...], **options: Any) -> fx.GraphModule:
    torch.manual_seed(0)
    gated = gate(Residual().eval(), IMAGES)
    apply_bits(gated, dict.fromkeys(weight_gates(gated), 8), dict(zip(activation_gates(gated), bits, strict=True)))
    return integer_grid(integer_joins(finalize(gated), [(IMAGES,)], **options))


@pytest.fixture(scope="module")
def eight() -> fx.GraphModule:
    return static((8, 8, 8, 8))


@pytest.fixture(scope="module")
def model(eight: fx.GraphModule) -> Any:
    return tensorrt_model(eight, (IMAGES,))[0]


def test_symmetric_codes_are_exact_where_they_can_be() -> None:
    few = finalize_few()
    signed, lost = symmetric_codes(few)
    assert lost == ()
    assert torch.equal(signed(IMAGES), few(IMAGES))


def finalize_few() -> fx.GraphModule:
    """Unsigned codes of up to 6 bits, signed ones around 128."""
    torch.manual_seed(0)
    gated = gate(Residual().eval(), IMAGES)
    for gate_ in activation_gates(gated).values():
        gate_.below = None
    apply_bits(
        gated, dict.fromkeys(weight_gates(gated), 8), dict(zip(activation_gates(gated), (8, 5, 3, 6), strict=True))
    )
    return finalize(gated)


def test_what_is_lost_is_named_and_little(eight: fx.GraphModule, tmp_path: Path) -> None:
    found = export(eight, (IMAGES,), "tensorrt", tmp_path / "model.onnx", metadata={"classes": ["a"], "mean": [0.5]})
    assert found.lost
    assert found.lost[0].startswith("relu: ")
    assert found.kernels is None  # ONNX Runtime's say nothing of TensorRT's
    want = eight(IMAGES)
    assert float((flat(found(IMAGES))[0] - want).norm()) <= 0.1 * float(want.norm())  # seven bits and a sign
    file = onnx.load(tmp_path / "model.onnx")
    assert tensorrt_problems(file) == []
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert facts["classes"] == ["a"]
    assert facts["size"] == [16, 16]
    assert facts["bits"]["weights"]["stem.weight"] == 8
    signed, _ = symmetric_codes(eight)
    assert all(
        q.args[2] == 0 and q.args[5] == torch.int8 for q in signed.graph.find_nodes(op="call_function", target=QUANTIZE)
    )


# -- each rule finds what breaks it ------------------------------------------------------------------------------------


def node_of(model: Any, kind: str, place: int = 0) -> Any:
    return [node for node in model.graph.node if node.op_type == kind][place]


def give(node: Any, place: int, values: Any, model: Any) -> None:
    """A constant of its own as a node's input."""
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), "changed"))
    node.input[place] = "changed"


def opset(model: Any) -> None:
    model.opset_import[0].version = 26


def operator(model: Any) -> None:
    node_of(model, "Conv").op_type = "ConvInteger"


def zero_point(model: Any) -> None:
    give(node_of(model, "QuantizeLinear"), 2, np.int8(3), model)


def unsigned(model: Any) -> None:
    give(node_of(model, "QuantizeLinear"), 2, np.uint8(0), model)


def computed_scale(model: Any) -> None:
    node_of(model, "QuantizeLinear").input[1] = "input"


def several_scales(model: Any) -> None:
    give(node_of(model, "QuantizeLinear"), 1, np.ones(3, np.float32), model)


def other_axis(model: Any) -> None:
    weight = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "left.weight")
    next(a for a in weight.attribute if a.name == "axis").i = 1


def one_dimension(model: Any) -> None:
    weight = next(n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == "left.weight")
    give(weight, 0, np.ones((16, 16, 3), np.int8), model)


def one_operand(model: Any) -> None:
    node_of(model, "Conv").input[0] = "input"


def one_of_two_added(model: Any) -> None:
    node_of(model, "Add").input[1] = node_of(model, "Conv", 1).output[0]


def before_relu(model: Any) -> None:
    """The first convolution's result is quantised, and then cut off."""
    conv, relu = node_of(model, "Conv"), node_of(model, "Relu")
    names = list(node_of(model, "QuantizeLinear").input)
    for kind, source, result in (("QuantizeLinear", conv.output[0], "codes"), ("DequantizeLinear", "codes", "values")):
        model.graph.node.append(onnx.helper.make_node(kind, [source, *names[1:]], [result]))
    relu.input[0] = "values"


def not_folded(model: Any) -> None:
    node_of(model, "Relu").op_type = "BatchNormalization"


RULES = {
    opset: "opset",
    operator: "supported_operators",
    zero_point: "zero_points",
    unsigned: "signed_codes",
    computed_scale: "constant_scales",
    several_scales: "scales_per_channel",
    other_axis: "scales_per_channel",
    one_dimension: "convolutions",
    one_operand: "all_operands",
    one_of_two_added: "residual_adds",
    before_relu: "inside_fusions",
    not_folded: "inside_fusions",
}


@pytest.mark.parametrize("change", RULES)
def test_each_rule_finds_what_breaks_it(model: Any, change: Callable[[Any], None]) -> None:
    assert tensorrt_problems(model) == []
    broken = copy.deepcopy(model)
    change(broken)
    assert RULES[change] in {line.partition(":")[0] for line in tensorrt_problems(broken)}


def test_a_norm_beside_another_reader_of_a_layer_cannot_be_folded(model: Any) -> None:
    shared = copy.deepcopy(model)
    not_folded(shared)
    conv = node_of(shared, "Conv")
    shared.graph.node.append(onnx.helper.make_node("Sigmoid", [conv.output[0]], ["beside"], name="beside"))
    assert tensorrt_problems(shared) == []


def test_every_rule_has_a_test() -> None:
    assert {rule.__name__ for rule in _RULES} == set(RULES.values())


def test_a_result_for_the_target_loses_nothing(tmp_path: Path) -> None:
    config = sbs_fx.Config(target="tensorrt")
    result = sbs_fx.compress(Residual().eval(), IMAGES, budget=0.09, method="uniform", config=config)
    named = sbs_fx.compress(Residual().eval(), IMAGES, budget=0.09, method="uniform", target="tensorrt")
    assert named.policy.activation_bits == result.policy.activation_bits
    assert set(result.policy.activation_bits.values()) == {8}
    found = result.export("tensorrt", tmp_path / "model.onnx")
    assert found.lost == ()
    want = result.model(IMAGES)
    assert float((flat(found(IMAGES))[0] - want).norm()) <= 0.01 * float(want.norm())  # ties alone
    with pytest.raises(ValueError, match="activation_bits=4, which target 'tensorrt' does not compute"):
        sbs_fx.Config(target="tensorrt", activation_bits=4)
    with pytest.raises(BackendError, match="tensort"):
        sbs_fx.Config(target="tensort")


OUTPUTS: dict[str, tuple[Any, list[str]]] = {
    "scores": (lambda y, x: y, ["logits"]),
    "map": (lambda y, x: y[..., None], ["output"]),
    "dict": (lambda y, x: {"boxes": y, "features": {"mean": y.mean(1)}}, ["boxes", "features_mean"]),
    "places": (lambda y, x: [y, (y + 1, None), {"a": y.sum(1)}], ["output_0", "output_1_0", "output_2_a"]),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_called_by_what_they_are(kind: str) -> None:
    function, names = OUTPUTS[kind]
    rows = torch.randn(2, 4)
    found = onnx_model(finalize(gate(Made(function).eval(), rows)), (rows,))
    assert [value.name for value in found.graph.output] == names
    onnx.checker.check_model(found, full_check=True)


@pytest.mark.parametrize("opset", [21, 23])
def test_names_are_those_of_the_graph(eight: fx.GraphModule, opset: int) -> None:
    model = onnx_model(eight, (IMAGES,), opset=opset)
    assert model.opset_import[0].version == opset
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    names = {node.name for node in model.graph.node}
    assert {"layer:conv2d", "relu_1_quantized", "relu_1_dequantized", "stem.weight_values"} <= names
    assert not [name for name in names if "quantize_per" in name]
