"""The one call, end to end on small networks, and every kind of bad input: a clear error, nothing lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import sbs_fx
from benchmarks._cifar_models import CifarResNet
from sbs_fx.export import load_saved
from sbs_fx.passes import channel_groups, on_device, slim, trace
from sbs_fx.passes.dialects import static_of
from sbs_fx.plan.errors import (
    BudgetError,
    DataError,
    FileError,
    InfeasibleBudget,
    InputError,
    MethodError,
    PolicyError,
    PolicyMismatch,
    SbsError,
    TraceError,
    WeightsError,
)

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8, classes=10).eval()


@pytest.fixture(scope="module")
def result(net) -> sbs_fx.Result:
    return sbs_fx.compress(net, IMAGES[:2], budget=0.03, config=sbs_fx.Config(weight_bits=8, activation_bits=8))


def test_the_budget_is_met_and_the_graph_is_static(result, net) -> None:
    assert sbs_fx.Budget(bops=0.03).is_satisfied_by(result.cost)
    assert any(len(k) < result.policy.sizes[n] for n, k in result.policy.kept.items())
    targets = {n.target for n in result.model.graph.nodes if n.op == "call_function"}
    assert not any("sbs_fx" in getattr(t, "__module__", "") for t in targets if callable(t))
    assert not list(result.model.graph.find_nodes(op="call_module"))
    for batch in (1, 2, 4):
        assert result.model(IMAGES[:batch]).shape == (batch, 10)


def test_the_float_model_is_untouched(net) -> None:
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    sbs_fx.compress(net, IMAGES[:2], budget=0.05)
    assert net.training
    net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_saved_policy_applied_again_gives_the_same_graph(result, net, tmp_path) -> None:
    result.save(tmp_path)
    policy = sbs_fx.Policy.load(tmp_path / "policy.json")
    again = sbs_fx.apply(net, policy, IMAGES[:2])
    assert torch.equal(again.model(IMAGES), result.model(IMAGES))
    assert again.cost == result.cost


def test_a_static_graph_moves_with_all_its_constants(result) -> None:
    """Tensors on the meta device do not mix with others, so that one left behind is an error."""
    assert on_device(result.model, "meta")(IMAGES.to("meta")).shape == (4, 10)
    assert torch.equal(on_device(result.model, "cpu")(IMAGES), result.model(IMAGES))


def test_files_say_how_images_are_normalised(tmp_path) -> None:
    model = timm.create_model("test_resnet").eval()
    result = sbs_fx.compress(model, method="uniform", budget=0.08)
    result.save(tmp_path)
    assert static_of(load_saved(tmp_path / "model.pt2")[0]).metadata["mean"] == list(model.pretrained_cfg["mean"])


def test_saved_file_runs_with_torch_alone(result, tmp_path) -> None:
    result.save(tmp_path)
    torch.save(IMAGES, tmp_path / "images.pt")
    script = (
        "import torch, torch.ao.quantization.fx._decomposed, sys; "
        "m = torch.export.load('model.pt2').module(); torch.save(m(torch.load('images.pt')), 'out.pt'); "
        "assert 'sbs_fx' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": ""})
    assert torch.equal(torch.load(tmp_path / "out.pt"), result.model(IMAGES))
    assert torch.equal(sbs_fx.load(tmp_path / "model.pt2")(IMAGES), result.model(IMAGES))
    stored = result.cost.stored_bits / 8
    assert (tmp_path / "model.pt2").stat().st_size <= 1.1 * stored + 200_000


def test_calibration_data_and_fine_tuning_change_the_result(net) -> None:
    data = [(IMAGES, torch.tensor([0, 1, 2, 3]))]
    config = sbs_fx.Config(epochs=1)
    tuned = sbs_fx.compress(net, IMAGES[:2], budget=0.05, data=data, config=config)
    plain = sbs_fx.compress(net, IMAGES[:2], budget=0.05, data=data)
    assert not torch.equal(tuned.model(IMAGES), plain.model(IMAGES))


def test_progress_is_reported_in_order(net) -> None:
    seen: list[tuple[str, float]] = []
    sbs_fx.compress(net, IMAGES[:2], progress=lambda stage, done: seen.append((stage, done)))
    assert [d for _, d in seen] == sorted(d for _, d in seen)
    assert seen[0][0] == "trace"
    assert seen[-1] == ("done", 1.0)


def test_budgets_as_people_say_them(net) -> None:
    whole = sbs_fx.compress(net, IMAGES[:2], budget="20x").baseline_cost
    for measure, text in {"macs": f"{whole.macs / 2e3} K", "size": f"{whole.stored_bits / 48e3} kB, 20x"}.items():
        result, limits = sbs_fx.compress(net, IMAGES[:2], budget=text), sbs_fx.Budget.parse(text)
        assert limits.amounts.keys() == {measure}
        assert limits.is_satisfied_by(result.cost)
        assert 0.5 * limits.amounts[measure] < result.cost.by_measure[measure] <= limits.amounts[measure]


@pytest.mark.parametrize(("budget", "method"), [("params=50%", "opq"), ("params=12K", "uniform")])
def test_a_budget_of_parameters_is_met_as_torch_counts_them(net, budget: str, method: str) -> None:
    """In the graph that the policy leaves of the float model."""
    result = sbs_fx.compress(net, IMAGES[:2], budget=budget, method=method)
    graph = trace(net, IMAGES[:2])
    slimmed = slim(graph, channel_groups(graph), result.policy.kept)
    left, whole = (sum(p.numel() for p in m.parameters()) for m in (slimmed, net))
    limit = whole // 2 if "%" in budget else 12000
    assert left == result.cost.params
    assert 0.7 * limit < left <= limit < whole


@pytest.mark.parametrize("budget", [0, -0.1, float("nan"), 1.5, "five", "bops=0"])
def test_meaningless_budgets(net, budget) -> None:
    with pytest.raises(BudgetError):
        sbs_fx.compress(net, IMAGES[:2], budget=budget)


def test_a_budget_out_of_reach_names_the_least(net) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        sbs_fx.compress(net, IMAGES[:2], budget=1e-5)
    assert 1e-5 < caught.value.least["bops"] < 0.05


def test_unknown_method_lists_the_known_ones(net) -> None:
    with pytest.raises(MethodError, match="uniform"):
        sbs_fx.compress(net, IMAGES[:2], method="magic")


def test_example_inputs(net) -> None:
    with pytest.raises(InputError, match="pretrained_cfg"):
        sbs_fx.compress(net)
    with pytest.raises(InputError, match="batch of 2 or more"):
        sbs_fx.compress(net, IMAGES[:1])
    with pytest.raises(InputError, match=re.escape("(2, 5, 32, 32)")):
        sbs_fx.compress(net, torch.randn(2, 5, 32, 32))
    with pytest.raises(InputError, match="meta"):
        sbs_fx.compress(net, torch.empty(2, 3, 32, 32, device="meta"))


def test_a_model_that_cannot_be_exported_names_the_submodule() -> None:
    class Branch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Branch") as caught:
        sbs_fx.compress(nn.Sequential(nn.Conv2d(3, 4, 3), Branch()), IMAGES[:2])
    assert caught.value.reason


def test_unsound_weights_are_named() -> None:
    bad = CifarResNet(8, classes=10)
    with torch.no_grad():
        bad.layer1[0].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match=re.escape("layer1.0.conv1.weight")):
        sbs_fx.compress(bad, IMAGES[:2])


def test_a_policy_of_another_model_names_what_differs(result) -> None:
    with pytest.raises(PolicyMismatch, match="layer"):
        sbs_fx.apply(CifarResNet(14, classes=10), result.policy, IMAGES[:2])


def test_policies_with_unknown_or_repeated_channels(result) -> None:
    name = next(iter(result.policy.kept))
    for wrong in ([0, 0], [0, 10_000], []):
        with pytest.raises(PolicyError):
            sbs_fx.Policy(**{**result.policy.model_dump(), "kept": {**result.policy.kept, name: wrong}})


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b.replace(b"0", b"1", 3), lambda b: b""])
@pytest.mark.parametrize("name", ["policy.json", "model.pt2"])
def test_truncated_or_altered_files_are_refused(result, tmp_path, name: str, damage) -> None:
    result.save(tmp_path)
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises((FileError, PolicyError)):
        sbs_fx.Policy.load(path) if name == "policy.json" else sbs_fx.load(path)


def _raises_midway():
    yield IMAGES, torch.zeros(4, dtype=torch.int64)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty|no batch"),
        ([(IMAGES * float("nan"), torch.zeros(4, dtype=torch.int64))], "NaN|finite"),
        ([torch.randn(2, 3, 8, 9)[:, :1]], "shape"),
    ],
)
def test_bad_calibration_data(net, data, message: str) -> None:
    with pytest.raises(SbsError, match=message):
        sbs_fx.compress(net, IMAGES[:2], data=data)


def test_an_iterable_that_raises_midway_is_chained(net) -> None:
    with pytest.raises(DataError) as caught:
        sbs_fx.compress(net, IMAGES[:2], data=_raises_midway())
    assert isinstance(caught.value.__cause__, OSError)


def test_labels_out_of_range(net) -> None:
    with pytest.raises(DataError, match="label"):
        sbs_fx.compress(net, IMAGES[:2], data=[(IMAGES, torch.tensor([0, 1, 2, 99]))], config=sbs_fx.Config(epochs=1))


def test_output_directory_that_is_a_file_fails_before_any_work(net, tmp_path) -> None:
    target = tmp_path / "out"
    target.write_text("mine")
    stages: list[str] = []
    with pytest.raises(FileError):
        sbs_fx.compress(net, IMAGES[:2], output_dir=target, progress=lambda s, _: stages.append(s))
    assert not stages
    assert target.read_text() == "mine"


def test_a_full_disk_leaves_what_was_there(result, tmp_path, monkeypatch) -> None:
    result.save(tmp_path)
    before = {p.name: p.read_bytes() for p in Path(tmp_path).iterdir()}
    real = os.fsync

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match="space"):
        result.save(tmp_path)
    monkeypatch.setattr(os, "fsync", real)
    assert {p.name: p.read_bytes() for p in Path(tmp_path).iterdir()} == before


def test_timm_name_and_budget_as_text(tmp_path) -> None:
    result = sbs_fx.compress(timm.create_model("test_resnet"), budget="4%", output_dir=tmp_path)
    reports = ["report.html", "report.json", "report.txt"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt2", "policy.json", *reports]
    assert sbs_fx.Budget(bops=0.04).is_satisfied_by(result.cost)
    with pytest.raises(InputError, match="resnet18"):
        sbs_fx.compress("resnet1888")


@pytest.mark.parametrize("model", [nn.Identity(), nn.Sequential(), nn.ReLU(), nn.BatchNorm2d(3)])
def test_of_a_model_without_layers_nothing_is_taken(model: nn.Module) -> None:
    result = sbs_fx.compress(model, IMAGES, budget=0.1)
    assert result.cost.bops == result.baseline_cost.bops == 0
    assert torch.equal(result.model(IMAGES), model.eval()(IMAGES))
    assert sbs_fx.apply(model, result.policy, IMAGES, budget=0.1).cost == result.cost


def test_models_without_values_and_of_mixed_precision() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(WeightsError, match="2 parameters are on the meta device .*'weight'"):
        sbs_fx.compress(nn.Linear(4, 3, device="meta"), x)
    with pytest.raises(TraceError, match="'0.weight' has no shape yet; run the model once"):
        sbs_fx.compress(nn.Sequential(nn.LazyLinear(3)), x)
    with pytest.raises(TraceError, match="sub-module '0' is scripted"):
        sbs_fx.compress(nn.Sequential(torch.jit.script(nn.Linear(4, 3))), x)
    with pytest.raises(InputError, match="captured, but does not run on the example inputs: .*dtype"):
        sbs_fx.compress(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3).half()), x)
    norm = nn.BatchNorm1d(4)
    norm.running_mean[1] = torch.nan  # type: ignore[index]
    with pytest.raises(WeightsError, match="NaN in 1 buffers, the first: .*running_mean"):
        sbs_fx.compress(nn.Sequential(norm, nn.Linear(4, 3)), x)


def test_a_layer_without_channels() -> None:
    model, x = nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)).eval(), torch.randn(2, 4)
    assert torch.equal(sbs_fx.compress(model, x, budget=0.3).model(x), model(x))


def test_complex_weights_are_no_constraint() -> None:
    model = nn.Linear(4, 3, dtype=torch.complex64)
    with pytest.raises(InfeasibleBudget, match="the least that method"):
        sbs_fx.compress(model, torch.randn(2, 4, dtype=torch.complex64), budget=0.3)


def test_names_and_places_of_no_sense(net, tmp_path) -> None:
    for method in (None, 3, ["opq"]):
        with pytest.raises(MethodError, match="unknown method"):
            sbs_fx.compress(net, IMAGES[:2], method=method)
    for place in (3.5, "a\0b", tmp_path / ("n" * 300)):
        with pytest.raises(FileError, match="cannot make the output directory"):
            sbs_fx.compress(net, IMAGES[:2], output_dir=place)


def test_whole_numbers_are_searched_with_data() -> None:
    model, x = nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(32, 3)).eval(), torch.arange(8).view(2, 4)
    result = sbs_fx.compress(model, x, data=[(x, torch.tensor([0, 1]))], method="two_stage", budget=0.3)
    assert result.model(x).shape == (2, 3)


def test_a_number_that_depends_on_data_may_be_an_output() -> None:
    class Mean(nn.Linear):
        def forward(self, x: torch.Tensor) -> float:
            return super().forward(x).mean().item()

    assert isinstance(sbs_fx.compress(Mean(4, 3), torch.randn(2, 4), budget=0.3).model(torch.randn(2, 4)), float)


def test_settings_of_methods_are_a_dict() -> None:
    with pytest.raises(ValueError, match="methods=3; expected a dict of settings by name of method"):
        sbs_fx.Config(methods=3)


@pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf")])
def test_a_variance_that_is_none_is_named(value: float) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    net[1].running_var[3] = value  # type: ignore[index]
    with pytest.raises(WeightsError, match=r"1\.running_var"):
        sbs_fx.compress(net, torch.randn(2, 3, 8, 8))
