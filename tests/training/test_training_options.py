"""Options of a training run, each against what its definition says; checkpoints that cannot be taken up."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, fx, nn

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.passes import activation_gates, apply_bits, channel_groups, insert_gates, trace, weight_gates
from sbs_fx.passes.gates.insertion import BatchNorm
from sbs_fx.plan.errors import CheckpointMismatch, FileError, SettingsError, TrainingError
from sbs_fx.training import Checkpoints, Progress, Training, fine_tune
from sbs_fx.training.norms import estimate_norms
from sbs_fx.training.objective import Example, Objective, sharpen
from sbs_fx.training.processes import Processes
from tests.oracles.search_runs import IMAGES, digits, network


@pytest.fixture
def gated() -> fx.GraphModule:
    graph = trace(network(), IMAGES)
    result = insert_gates(graph, channel_groups(graph), channels=False)
    apply_bits(result, dict.fromkeys(weight_gates(result), 4), dict.fromkeys(activation_gates(result), 8))
    calibrate(result, digits(64), inputs=(IMAGES,))
    return result


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters() if "gates" not in n}


def tune(gated: fx.GraphModule, **options: Any) -> None:
    arguments = {"epochs": 2, "lr": 0.02, "seed": 0} | {
        k: options.pop(k) for k in ("epochs", "lr", "validation", "progress", "checkpoints", "teacher") if k in options
    }
    fine_tune(gated, digits(96), settings=Training(**options), **arguments)


def test_the_average_of_weights_is_the_result(gated: fx.GraphModule) -> None:
    """With a decay of d the average after n steps is d^n w_0 + (1 - d) sum d^(n-k) w_k."""
    history = [weights_of(gated)]
    plain, averaged = copy.deepcopy(gated), copy.deepcopy(gated)
    tune(plain, progress=lambda _: None)
    seen: list[dict[str, Tensor]] = []
    tune(averaged, ema=0.8, progress=lambda _: seen.append(weights_of(averaged)))
    # a step is told of after its update, so the last weights before the average took their place are among them
    for state in seen:
        history.append(state)
    for name, value in weights_of(averaged).items():
        expected = history[0][name].double()
        for state in history[1:]:
            expected = 0.8 * expected + 0.2 * state[name].double()
        assert torch.allclose(value.double(), expected, atol=1e-5), name
    assert any(not torch.equal(v, weights_of(plain)[n]) for n, v in weights_of(averaged).items())


def test_sharpened_gradient_is_that_at_the_worst_point(gated: fx.GraphModule) -> None:
    images, labels = next(iter(digits(32)))
    objective = Objective(gated, None, Training(), Processes())
    example = Example(0, (images,), labels, labels)
    weights = [p for n, p in gated.named_parameters() if "gates" not in n]

    def gradients() -> list[Tensor]:
        for p in gated.parameters():
            p.grad = None
        objective(example)[0].backward()
        return [p.grad.clone() for p in weights if p.grad is not None]

    before = [p.detach().clone() for p in weights]
    plain = gradients()
    norm = torch.cat([g.flatten() for g in plain]).norm()
    with torch.no_grad():
        for p, g in zip(weights, plain, strict=True):
            p += 0.05 * g / norm
    expected = gradients()
    with torch.no_grad():
        for p, old in zip(weights, before, strict=True):
            p.copy_(old)
    gradients()
    sharpen(gated, weights, 0.05, lambda: objective(example)[0])
    for p, old, wanted in zip(weights, before, expected, strict=True):
        assert torch.equal(p, old)
        assert p.grad is not None
        assert torch.allclose(p.grad, wanted, atol=1e-5)


def test_smoothing_and_mixing_change_the_targets(gated: fx.GraphModule) -> None:
    images, labels = next(iter(digits(32)))
    with torch.no_grad():
        logits = gated(images)
        for smoothing in (0.0, 0.2):
            objective = Objective(gated, None, Training(label_smoothing=smoothing), Processes())
            target = torch.full((32, 10), smoothing / 10)
            target[torch.arange(32), labels] += 1 - smoothing
            expected = -(target * logits.log_softmax(1)).sum(1).mean()
            assert torch.allclose(objective(Example(0, (images,), labels, labels))[0], expected, atol=1e-5)
        mixing = Objective(gated, None, Training(mixup=1.0), Processes())
        from sbs_fx.data.batches import Batch

        example = mixing.place(Batch(0, (images,), labels))
        assert example.targets is not None
        assert torch.allclose(example.targets.sum(1), torch.ones(32))
        assert not torch.equal(example.inputs[0], images)
        assert float(mixing(example)[0]) > 0


def test_clipping_bounds_a_step(gated: fx.GraphModule) -> None:
    """With plain steps and no momentum, a step is at most the rate times the clipped norm."""
    before = weights_of(gated)
    tune(gated, epochs=1, lr=1.0, clip=1e-3, momentum=1e-9, weight_decay=0.0, warmup=0.0, range_lr=0.0)
    moved = torch.cat([(p - before[n]).flatten() for n, p in weights_of(gated).items()]).norm()
    assert 0 < moved <= 3 * 1e-3 * 1.001  # three batches


def test_statistics_are_the_mean_over_batches(gated: fx.GraphModule) -> None:
    inputs: list[Tensor] = []
    norm = next(m for m in gated.modules() if isinstance(m, BatchNorm))
    handle = norm.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    estimate_norms(gated, digits(96), 3)
    handle.remove()
    expected = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    found = next(b for n, b in gated.named_buffers() if n.endswith("running_mean"))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not norm.training
    assert norm.momentum == 0.1


def test_patience_keeps_the_best_state(gated: fx.GraphModule) -> None:
    steps: list[Progress] = []
    states: dict[int, dict[str, Tensor]] = {}

    def watch(step: Progress) -> None:
        steps.append(step)
        if step.validation is not None:
            states[step.epoch] = weights_of(gated)

    tune(gated, epochs=12, lr=0.5, patience=2, validation=digits(96, "test", shuffle=False), progress=watch)
    accuracy = [s.validation for s in steps if s.validation is not None]
    best = accuracy.index(max(accuracy))
    assert len(accuracy) == min(12, best + 3)
    assert all(torch.equal(v, states[best][n]) for n, v in weights_of(gated).items())


def test_half_precision_and_memory_format(gated: fx.GraphModule) -> None:
    losses: list[float] = []
    tune(gated, precision="bf16", channels_last=True, epochs=4, progress=lambda s: losses.append(s.loss))
    assert all(p.dtype == torch.float32 for p in gated.parameters())
    assert sum(losses[-3:]) < sum(losses[:3])


def test_settings_that_mean_nothing() -> None:
    for wrong in ({"ema": 1.0}, {"precision": "fp16"}, {"mixup": -1}, {"unknown": 1}, {"patience": 0}):
        with pytest.raises(SettingsError, match="invalid Training"):
            Training(**wrong)


# Checkpoints


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, {"model": "a", "budget": {"bops": 0.1}}) as first:
        first.save("search", {"x": torch.ones(2)}, {"step": 3})
        saved = first.load("search")
        assert saved is not None
        assert saved.state == {"step": 3}
    other = Checkpoints(tmp_path, {"model": "a", "budget": {"bops": 0.2}})
    with other, pytest.raises(CheckpointMismatch, match=r"budget was .*0\.1.*is .*0\.2") as error:
        other.load("search")
    assert error.value.different == ("budget",)
    with Checkpoints(tmp_path, {"model": "b"}, restart=True) as anew:
        assert anew.load("search") is None


def test_an_altered_checkpoint_is_refused(tmp_path: Path) -> None:
    """Of its tensors and of what is said beside them, whatever still reads as a checkpoint."""
    with Checkpoints(tmp_path, {"model": "a"}) as checkpoints:
        checkpoints.save("search", {"x": torch.ones(4)}, {"step": 3})
        data = (tmp_path / "search.safetensors").read_bytes()
        for old, new in ((b'step\\": 3', b'step\\": 4'), (torch.ones(1).numpy().tobytes(), b"\0\0\0\0")):
            assert old in data
            (tmp_path / "search.safetensors").write_bytes(data.replace(old, new, 1))
            with pytest.raises(FileError, match="altered"):
                checkpoints.load("search")
        (tmp_path / "search.safetensors").write_bytes(data)
        assert checkpoints.load("search") is not None


def test_a_directory_has_one_user(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, {}), pytest.raises(FileError, match="in use by another process"):
        Checkpoints(tmp_path, {})
    Checkpoints(tmp_path, {}).close()


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, {}) as checkpoints:
        checkpoints.save("search", {"x": torch.ones(200)}, {})
        path = Path(checkpoints.path("search"))
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(FileError, match=r"cannot read the checkpoint .*search\.safetensors"):
            checkpoints.load("search")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot use"):
        Checkpoints(tmp_path / "file", {})


def test_a_loss_that_is_not_finite_names_the_last_good_state(gated: fx.GraphModule, tmp_path: Path) -> None:
    with Checkpoints(tmp_path, {}) as checkpoints, pytest.raises(TrainingError) as error:
        tune(gated, lr=1e30, clip=0.0, checkpoint_every=1, warmup=0.0, checkpoints=checkpoints)
    assert error.value.checkpoint == checkpoints.path("fine-tune")
    assert "last good state" in str(error.value)
    kept = load_file(error.value.checkpoint)
    assert error.value.step > 0
    assert all(
        bool(torch.isfinite(v).all()) for n, v in kept.items() if n.startswith("network/") and math.prod(v.shape)
    )


def test_out_of_memory_names_the_knobs_and_the_last_state(gated: fx.GraphModule, tmp_path: Path) -> None:
    calls = []

    def exhaust(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError

    gated.register_forward_pre_hook(exhaust)
    with Checkpoints(tmp_path, {}) as checkpoints, pytest.raises(TrainingError, match="the batch size") as error:
        tune(gated, checkpoint_every=1, checkpoints=checkpoints)
    assert error.value.step == 2
    assert error.value.checkpoint == checkpoints.path("fine-tune")
