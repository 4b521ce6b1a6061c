"""Training steps of the searches that are compared, and what one of them takes.

In: names of a model and of a method. Out: seconds of steps of two methods in turn, or bytes that a step needs. A step
is that of `sbs_fx.training.loop` for data that lies on the device: forward, penalty, backward, clipping, optimisers.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _cifar_models import CifarResNet
from _rows import even_plan
from torch import Tensor, nn

from sbs_fx.calibration.calibrate import calibrate
from sbs_fx.data.batches import Batch
from sbs_fx.passes import activation_gates, apply_bits, channel_groups, cost_model, insert_gates, trace, weight_gates
from sbs_fx.plan import Budget
from sbs_fx.search import Problem, Search, SpaceSettings
from sbs_fx.search.baselines.bayesian_bits import BayesianSearch
from sbs_fx.search.baselines.multi_path import MultiPathSearch
from sbs_fx.search.gate_search import GateSearch
from sbs_fx.training import Training, TrainingStage
from sbs_fx.training.objective import Objective
from sbs_fx.training.optimizers import Optimizers
from sbs_fx.training.processes import Processes

SEARCHES = {"sbs": GateSearch, "multi_path": MultiPathSearch, "bayesian_bits": BayesianSearch}
METHODS = ("float", "uniform", *SEARCHES)
BUDGET = Budget(bops=1 / 66.3)
UNIFORM_BITS = 4
STEPS = 10_000  # of the stage that a step is one of, so that rates and gates hardly move


@dataclass(frozen=True)
class Model:
    """How to make a network, the size of its images, and how many a batch has."""

    make: Callable[[], nn.Module]
    size: int
    batch: int


def _timm(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name)

    return make


MODELS = {
    "resnet20": Model(lambda: CifarResNet(20), 32, 128),
    "resnet18": Model(_timm("resnet18"), 224, 8),
    "mobilenetv2": Model(_timm("mobilenetv2_100"), 224, 8),
    "vit_tiny": Model(_timm("vit_tiny_patch16_224"), 224, 8),
}


@dataclass(frozen=True)
class Setting:
    """What all methods of a comparison share. `batch` is the number of images, None: the model's."""

    model: str
    compiled: bool
    device: str = "cpu"
    precision: str = "fp32"
    batch: int | None = None
    threads: int = 1


class Step:
    """One training step of a method, on the same images each time."""

    def __init__(self, setting: Setting, method: str) -> None:
        torch.manual_seed(0)
        model = MODELS[setting.model]
        self.device = torch.device(setting.device)
        images = torch.randn(setting.batch or model.batch, 3, model.size, model.size)
        module = model.make().eval()
        graph = trace(module, images[:2])
        groups = channel_groups(graph)
        cost = cost_model(graph, groups)
        with torch.no_grad():
            classes = graph(images[:1]).shape[1]
        prunes = method in ("sbs", "bayesian_bits")
        problem = Problem.of(cost, BUDGET, (images[:2],), SpaceSettings(prune=prunes))
        blocks = {name: problem.space.multiple(group) for name, group in groups.items()}
        network = insert_gates(graph, groups, channels=prunes, block=blocks).to(self.device)
        even = even_plan(cost, UNIFORM_BITS, UNIFORM_BITS)
        settings = Training(
            precision=setting.precision, compiled=setting.compiled, channels_last=True, distillation=0.0
        )
        self.stage = TrainingStage(network)
        if method in SEARCHES:
            self.stage = SEARCHES[method](network, problem, Search(), steps=STEPS)
        elif method == "uniform":
            apply_bits(network, even.weight_bits, even.activation_bits)
        if method != "float":
            calibrate(network, [images[:32]], inputs=(images[:2].to(self.device),))
        network.to(memory_format=torch.channels_last)
        network.train()
        self.settings, self.network, self.count = settings, network, 0
        self.objective = Objective(network, None, settings, Processes())
        self.optimizers = Optimizers(network, 0.01, settings, self.stage.optimizers(settings))
        self.optimizers.plan(STEPS)
        self.example = self.objective.place(Batch(0, (images,), torch.arange(len(images)) % classes))
        self.quantisers = len(weight_gates(network)) + len(activation_gates(network))

    def __call__(self) -> None:
        self.optimizers.start(self.count)
        self.stage.before_step(self.count, self.count / STEPS)
        loss, _ = self.objective(self.example)
        penalty = self.stage.penalty()
        (loss if penalty is None else loss + penalty).backward()
        self.stage.before_update(self.count)
        nn.utils.clip_grad_norm_(self.optimizers.weights, self.settings.clip)
        self.optimizers.update()
        self.stage.after_step(self.count)
        self.count += 1

    def wait(self) -> None:
        """Until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, steps: int) -> float:
        """Wall-clock seconds a step."""
        self.wait()
        start = time.perf_counter()
        for _ in range(steps):
            self()
        self.wait()
        return (time.perf_counter() - start) / steps

    def state_bytes(self) -> int:
        """Weights, buffers and what optimisers keep."""
        tensors = [*self.network.parameters(), *self.network.buffers(), *self.optimizers.state().values()]
        return sum(t.numel() * t.element_size() for t in tensors)


def time_pair(task: tuple[Setting, tuple[str, str], int, int]) -> dict[str, Any]:
    """Seconds a step of two methods, `repeats` times `steps` of the one and `steps` of the other."""
    setting, pair, repeats, steps = task
    torch.set_num_threads(setting.threads)
    both = [Step(setting, method) for method in pair]
    started = [each.seconds(1) for each in both]
    for each in both:
        each.seconds(2)
    found = [[each.seconds(steps) for each in both] for _ in range(repeats)]
    ratios = sorted(first / second for first, second in found)
    return {
        "seconds": dict(zip(pair, (statistics.median(column) for column in zip(*found, strict=True)), strict=True)),
        "first_step_seconds": dict(zip(pair, started, strict=True)),
        "ratio": statistics.median(ratios),
        "lowest": ratios[0],
        "highest": ratios[-1],
        "repeats": repeats,
        "steps": steps,
    }


def measure_memory(task: tuple[Setting, str]) -> dict[str, Any]:
    """Bytes at the peak of a step. On a CPU: the state, and by how much the resident set grows in a step from rest (the
    process must give freed memory back at once); elsewhere what the allocator counts."""
    setting, method = task
    torch.set_num_threads(setting.threads)
    step = Step(setting, method)
    row: dict[str, Any] = {"quantisers": step.quantisers, "saved_bytes": None}
    step(), step()
    state, peaks = step.state_bytes(), []
    for _ in range(3):
        step.optimizers.start(step.count)  # no gradients
        gc.collect()
        if step.device.type == "cuda":
            step.wait()
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated())
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
            before = _resident("VmRSS")
            step()
            peaks.append(state + _resident("VmHWM") - before)
    if not setting.compiled:
        row["saved_bytes"] = _saved_bytes(step)
    return row | {"peak_bytes": int(statistics.median(peaks)), "state_bytes": state}


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def _saved_bytes(step: Step) -> int:
    """Bytes that autograd holds after the forward pass, weights and images apart; memory shared is counted once."""
    state = {t.untyped_storage().data_ptr() for t in (*step.network.parameters(), *step.network.buffers())}
    state.add(step.example.inputs[0].untyped_storage().data_ptr())
    held: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in state:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step.objective(step.example)
    return sum(held.values())
