"""Every backend computes the static graph: bit for bit where it is exact, with int8 kernels; bad input is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import sbs_fx
from sbs_fx.cli import main
from sbs_fx.export import TARGETS, load_saved, onnx, runner, runtime
from sbs_fx.export.benchmark import benchmark
from sbs_fx.export.executorch import run_executorch
from sbs_fx.export.inductor import run_inductor
from sbs_fx.export.onnx import onnx_model, run_onnx
from sbs_fx.export.onnx_graph import for_integer_products
from sbs_fx.export.packing import pack
from sbs_fx.export.runtime import flat, layer_names
from sbs_fx.passes import finalize, integer_grid, integer_joins
from sbs_fx.passes.dialects import Static, static_of, verify
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, weight_gates
from sbs_fx.plan.errors import BackendError, FileError, InputError
from tests.networks.small import EXAMPLE, Residual, net
from tests.oracles.gated import gate

BACKENDS = ("inductor", "onnxruntime", "openvino")
SUFFIX = {name: entry.suffix for name, entry in TARGETS.entries().items()}
FORMATS = tuple(name for name, entry in TARGETS.entries().items() if entry.runs)
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def compressed(
    name: str, bits: int, *, activation_bits: int | None = None, exact: bool = False, images: Tensor = IMAGES
) -> sbs_fx.Result:
    """A timm model whose norms have seen noise, at one bitwidth."""
    torch.manual_seed(0)
    model = timm.create_model(name, zero_init_last=False) if "resnet" in name else timm.create_model(name)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *images.shape[1:]))
    budget = {8: 0.08, 4: 0.04, 2: 0.03}[bits]
    config = sbs_fx.Config(weight_bits=bits, activation_bits=activation_bits or bits, exact=exact)
    return sbs_fx.compress(model.eval(), images, budget=budget, method="uniform", config=config)


@pytest.fixture(scope="module")
def small() -> sbs_fx.Result:
    return compressed("resnet10t", 4, activation_bits=8)


# The deeper network at one bitwidth: it takes long.
@pytest.mark.parametrize(("name", "bits"), [("resnet18", 2), ("resnet18", 4), ("resnet18", 8), ("resnet50", 4)])
def test_exact_graphs_are_bit_equal_on_every_backend(name: str, bits: int) -> None:
    result = compressed(name, bits, exact=True)
    expected = result.model(IMAGES)
    for backend in BACKENDS:
        found = runner(result.model, (IMAGES,), backend)
        assert torch.equal(flat(found(IMAGES))[0], expected), backend
        assert found.kernels is not None
        assert not found.kernels.floating, (backend, found.kernels)


@pytest.fixture(scope="module")
def mixed() -> fx.GraphModule:
    """A small network with a weight of each bitwidth, one of several, one of which single weights are pruned, and
    activations of 2 to 8 bits."""
    torch.manual_seed(0)
    images = IMAGES[:, :, :16, :16]
    model = Residual().eval()
    model.inner.weight.data *= torch.rand(model.inner.weight.shape) < 0.5
    gated = gate(model, images)
    weights = dict(zip(weight_gates(gated), (6, [3, 5, 6, 8, 0, 2, 4, 5] * 2, 4, 3, 2), strict=True))
    apply_bits(gated, weights, dict(zip(activation_gates(gated), (8, 5, 3, 6), strict=True)))
    static = finalize(gated, nonzeros={"inner": int(model.inner.weight.count_nonzero())})
    return integer_grid(integer_joins(static, [(images,)]), exact=True)


@pytest.mark.parametrize("backend", [*BACKENDS, "packed"])
def test_mixed_bits_are_bit_equal_on_every_backend(mixed: fx.GraphModule, backend: str) -> None:
    images = IMAGES[:, :, :16, :16]
    found = run_inductor(pack(mixed), (images,)) if backend == "packed" else runner(mixed, (images,), backend)
    assert torch.equal(flat(found(images))[0], mixed(images))
    assert found.kernels is not None
    assert not found.kernels.floating, found.kernels


def test_onnx_holds_two_three_and_four_bits_as_int4(mixed: fx.GraphModule) -> None:
    onnx = pytest.importorskip("onnx")
    images = IMAGES[:, :, :16, :16]
    model = onnx_model(mixed, (images,), low_bits=True)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for name, stored in static_of(mixed).weights.items():
        most = stored.bits if isinstance(stored.bits, int) else max(stored.bits)
        assert types[name] == (onnx.TensorProto.INT4 if most <= 4 else onnx.TensorProto.INT8), name
    found = run_onnx(model.SerializeToString(), mixed)
    assert torch.equal(flat(found(images))[0], mixed(images))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_layer_of_a_mobile_network_reaches_an_int8_kernel(backend: str) -> None:
    result = compressed("mobilenetv2_050", 8)
    found = runner(result.model, (IMAGES,), backend)
    assert found.kernels is not None
    assert found.kernels.floating == ()
    assert list(found.kernels.integer) == layer_names(result.model)


def test_layers_without_an_int8_kernel_are_named() -> None:
    result = compressed("mobilenetv3_small_050", 8)  # another activation function than relu, and onnxruntime gives up
    kernels = runner(result.model, (IMAGES,), "onnxruntime").kernels
    assert kernels is not None
    assert kernels.floating
    assert set(kernels.floating) | set(kernels.integer) == set(layer_names(result.model))
    assert kernels.floating[0] in str(kernels)
    assert not runner(result.model, (IMAGES,), "openvino").kernels.floating  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def executorch_file(small: sbs_fx.Result, tmp_path_factory: pytest.TempPathFactory) -> tuple[runtime.Runner, Path]:
    """What `export` gives back and writes: it takes long."""
    pytest.importorskip("executorch")
    path = tmp_path_factory.mktemp("program") / "model.pte"
    return small.export("executorch", path), path


def test_executorch_holds_what_it_can_and_refuses_the_rest(
    small: sbs_fx.Result, executorch_file: tuple[runtime.Runner, Path], mixed: fx.GraphModule
) -> None:
    written, path = executorch_file
    assert written.kernels is not None
    assert written.kernels.floating == (layer_names(small.model)[-1],)  # its result is not quantised
    again = run_executorch(path.read_bytes(), written.kernels)  # reason: a program that has failed stays so
    with pytest.raises(BackendError, match="at most 8 images"):
        again(torch.randn(9, 3, 64, 64))
    with pytest.raises(BackendError, match="bit-equal.*ExecuTorch additions"):
        runner(mixed, (IMAGES[:, :, :16, :16],), "executorch")
    config = sbs_fx.Config(weight_bits=8, activation_bits=8, exact=True)
    plain = sbs_fx.compress(net(), EXAMPLE, budget=0.08, method="uniform", config=config)  # no additions
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(flat(runner(plain.model, plain.example_inputs, "executorch")(images))[0], plain.model(images))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_layer_of_a_small_transformer_reaches_an_int8_kernel(backend: str) -> None:
    class Net(nn.Module):  # the widths all alike
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.norm = nn.Conv2d(3, 32, 16, 16), nn.LayerNorm(32)
            self.attention = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
            self.head = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.patches(x).flatten(2).transpose(1, 2)
            q, k, v = (layer(self.norm(x)).unflatten(-1, (2, 16)).transpose(1, 2) for layer in self.attention[:3])
            mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.head((x + self.attention[3](mixed)).mean(1))

    torch.manual_seed(0)
    config = sbs_fx.Config(weight_bits=8, activation_bits=8)
    result = sbs_fx.compress(Net().eval(), IMAGES, budget=0.2, method="uniform", config=config)
    kernels = runner(result.model, (IMAGES,), backend).kernels
    assert kernels is not None
    assert kernels.floating == ()
    assert list(kernels.integer) == layer_names(result.model)
    rewritten = for_integer_products(result.model)
    targets = {node.target for node in rewritten.graph.nodes}
    assert not targets & {torch.ops.aten.conv2d.default, torch.ops.aten.scaled_dot_product_attention.default}
    with torch.no_grad():
        assert torch.allclose(rewritten(IMAGES), result.model(IMAGES), atol=1e-5)


@pytest.mark.parametrize("product", [F.linear, torch.matmul])
def test_a_weight_of_one_dimension(product: Callable[[Tensor, Tensor], Tensor], tmp_path: Path) -> None:
    """It has one output, so one scale: an own scale for every number that is summed has no integer kernel."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.vector = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            return product(self.first(x).relu().flatten(2).mT, self.vector)

    torch.manual_seed(0)
    result = sbs_fx.compress(Net().eval(), IMAGES[..., :8, :8], budget=0.04, method="opq")
    static = finalize(result.gated)
    verify(static, Static)
    assert static.vector_scale.unique().numel() == 1
    want = result.model(IMAGES[..., :8, :8])
    for format, options in {"onnx": {}, "openvino": {}, "pt2": {}, "onnx int4": {"low_bits": True}}.items():
        run = result.export(format.split()[0], tmp_path / f"model{SUFFIX[format.split()[0]]}", **options)
        assert torch.allclose(flat(run(IMAGES[..., :8, :8]))[0], want, atol=0.02 * float(want.abs().max()))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_computes_what_the_graph_does_at_any_batch_size(
    small: sbs_fx.Result, format: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = tmp_path / f"model{SUFFIX[format]}"
    if format == "litert":
        pytest.importorskip("litert_torch", reason="litert-torch is not installed: pip install 'sbs-fx[litert]'")
    if format == "executorch":
        found, path = request.getfixturevalue("executorch_file")
    else:
        found = small.export(format, path)
    for batch in (1, 3):
        images = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        want, have = small.model(images), flat(found(images))[0]
        assert have.shape == want.shape
        assert float((want - have).norm()) <= 0.2 * float(want.norm())
    with pytest.raises(InputError, match=r"has size 32 in dimension 2, .*; the graph was made for 64 there"):
        found(torch.randn(2, 3, 32, 64))
    with pytest.raises(InputError, match="has 3 dimensions"):
        found(torch.randn(3, 64, 64))
    expected = {f"model{SUFFIX[format]}"} | ({"model.bin"} if format == "openvino" else set())
    assert set(os.listdir(path.parent)) == expected


def test_onnx_files_hold_the_stored_bits(small: sbs_fx.Result, tmp_path: Path) -> None:
    small.export("onnx", tmp_path / "eight.onnx")
    small.export("onnx", tmp_path / "four.onnx", low_bits=True)
    eight, four = (os.path.getsize(tmp_path / f"{name}.onnx") for name in ("eight", "four"))
    at_eight = sum(layer.params for layer in small.cost.layers) + small.cost.other_stored_bits / 8
    assert eight <= 1.1 * at_eight + 200_000
    assert four <= 1.1 * small.cost.stored_bits / 8 + 200_000
    assert four < 0.7 * eight


def test_onnx_runs_in_openvino_with_a_dynamic_batch(small: sbs_fx.Result, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino")
    small.export("onnx", tmp_path / "model.onnx")
    # reason: left to itself it computes in bfloat16 where the processor can
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", settings)
    for batch in (1, 4):
        images = torch.randn(batch, 3, 64, 64)
        want, have = small.model(images), torch.from_numpy(compiled([images.numpy()])[0])
        assert float((want - have).norm()) <= 0.2 * float(want.norm())


def test_an_aoti_package_needs_torch_alone(small: sbs_fx.Result, tmp_path: Path) -> None:
    small.export("aoti", tmp_path / "model.pt2")
    torch.save({"images": IMAGES, "expected": small.model(IMAGES)}, tmp_path / "case.pt")
    code = (
        "import sys, torch\n"
        "case = torch.load(sys.argv[2])\n"
        "found = torch._inductor.aoti_load_package(sys.argv[1])(case['images'])\n"
        "assert not any(name.split('.')[0] in ('sbs_fx', 'torchao', 'timm') for name in sys.modules)\n"
        "assert (found - case['expected']).norm() <= 0.2 * case['expected'].norm()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "model.pt2", tmp_path / "case.pt"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "extra"),
    [
        ("onnx", "onnx"),
        ("openvino", "openvino"),
        ("aoti", "inductor"),
        ("executorch", "executorch"),
        ("litert", "litert"),
        ("coreml", "coreml"),
    ],
)
def test_a_tool_that_is_not_installed_is_named(
    small: sbs_fx.Result, format: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = runtime.importlib.import_module

    def missing(name: str) -> object:
        if name.partition(".")[0] in runtime.EXTRAS:
            raise ImportError(f"No module named {name!r}")
        return real(name)

    monkeypatch.setattr(runtime.importlib, "import_module", missing)
    with pytest.raises(BackendError, match=rf"sbs-fx\[{extra}\]"):
        small.export(format, tmp_path / f"model{SUFFIX[format]}")
    assert os.listdir(tmp_path) == []


def test_a_backend_that_computes_something_else_is_refused(
    small: sbs_fx.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.onnx").write_text("what was here before")
    run = onnx.run_onnx

    def wrong(*arguments: object, **options: object) -> runtime.Runner:
        found = run(*arguments, **options)  # type: ignore[arg-type]
        return runtime.Runner("onnxruntime", lambda *inputs: [y.flip(1) for y in found(*inputs)])

    monkeypatch.setattr(onnx, "run_onnx", wrong)
    with pytest.raises(BackendError, match="another function"):
        small.export("onnx", tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_text() == "what was here before"
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_an_exact_graph_without_integer_form_is_refused_with_the_reason() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.GELU(), nn.Conv2d(8, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(28800, 9)
    )
    config = sbs_fx.Config(exact=True, weight_bits=8, activation_bits=8)
    result = sbs_fx.compress(model.eval(), IMAGES, budget=0.1, method="uniform", config=config)
    refused = []
    for backend in BACKENDS:
        try:
            assert torch.equal(flat(runner(result.model, (IMAGES,), backend)(IMAGES))[0], result.model(IMAGES))
        except BackendError as error:
            refused.append(str(error))
    assert all("bit-equal" in reason for reason in refused)


@pytest.mark.parametrize(
    ("format", "name", "error"),
    [
        ("tflite", "model.tflite", "tflite"),
        ("onnx", "model.bin", ".onnx"),
        ("onnx", "missing/model.onnx", "missing"),
        ("onnx", "modelonnx", "does not end in"),
    ],
)
def test_bad_exports_are_one_error(small: sbs_fx.Result, format: str, name: str, error: str, tmp_path: Path) -> None:
    with pytest.raises((BackendError, FileError), match=error):
        small.export(format, tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_options_and_names_of_files(small: sbs_fx.Result, tmp_path: Path) -> None:
    small.export("pt2", tmp_path / "model.pt2", low_bits=False)  # not asked for
    small.export("openvino", tmp_path / "model.xml")
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "model.pt2", "model.xml"]
    with pytest.raises(BackendError, match="'pt2' has no option 'low_bits'; it takes none"):
        small.export("pt2", tmp_path / "model.pt2", low_bits=True)


def test_images_of_another_size_are_refused(small: sbs_fx.Result) -> None:
    compiled = small.compiled()
    with pytest.raises(InputError, match="made for 64 there"):
        compiled(torch.randn(2, 3, 32, 32))


# -- benchmark ---------------------------------------------------------------------------------------------------------


def test_benchmark_times_all_backends_and_finds_the_fastest(small: sbs_fx.Result) -> None:
    found = benchmark(small.model, (IMAGES,), backends=("eager", "onnxruntime", "openvino"), batch_sizes=(1,), rounds=2)
    seconds = {timing.backend: timing.seconds for timing in found.timings}
    assert set(seconds) == {"eager", "onnxruntime", "openvino"}
    assert seconds[found.best[1]] == min(seconds.values())
    layers = len(layer_names(small.model))
    for rows in found.layers.values():
        assert len(rows) == layers + 1
        assert sum(row.seconds for row in rows) > 0
        assert {row.weight_bits for row in rows} == {"4", "8", ""}
    assert list(found.tables())
    assert '"best"' in found.to_json()


def test_commands(small: sbs_fx.Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.save(tmp_path / "out")
    saved = str(tmp_path / "out" / "model.pt2")
    static, inputs = load_saved(saved)
    assert isinstance(static, fx.GraphModule)
    assert inputs[0].shape == IMAGES.shape
    for arguments in (
        ["export", saved, "--format", "openvino", "--out", str(tmp_path / "model.xml")],
        ["bench", saved, "--backends", "openvino", "--batch-sizes", "1", "--rounds", "2"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "reached an int8 kernel" in text
    assert "fastest at batch 1: openvino" in text
