"""How fast is it, and where does the time go? Models and backends timed side by side.

In: a static graph, maybe the float model it came from. Out: a `Benchmark`: latency per backend and batch size, the
fastest, and each layer's time. Holds: all are run in turn, in changing order, in one process with the same number of
threads, so that whatever else the machine does meets all of them alike; what counts is ratios of medians.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.export.formats import runner
from sbs_fx.export.inductor import compile_float
from sbs_fx.export.registry import BACKENDS
from sbs_fx.export.runtime import Runner, has_vnni, layer_names, of_batch, weight_name
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.graph import attribute
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import BackendError

if TYPE_CHECKING:
    from rich.table import Table

FLOAT = "float"  # the name of the float model under torch.compile with freezing
_LEAST_SECONDS = 0.02  # a sample is as many calls as take this long


@dataclass(frozen=True)
class Timing:
    """One backend at one batch size.

    Attributes:
        seconds: of a call, the median; of the processor's time where there is one thread. spread: between the
            quartiles. memory: bytes that a call needs at its peak above what the process holds at rest; None where the
            system does not tell. kernels: layers with an int8 kernel.
    """

    backend: str
    batch: int
    seconds: float
    spread: float
    images_per_second: float
    memory: int | None
    kernels: str


@dataclass(frozen=True)
class LayerTime:
    """Where the time of one call goes: a layer, or all that is not a layer ("the rest")."""

    layer: str
    seconds: float
    kernel: str
    weight_bits: str
    channels: int


@dataclass(frozen=True)
class Benchmark:
    """What `benchmark` gives back; `best` is the fastest backend at each batch size, `refused` says what cannot run."""

    timings: tuple[Timing, ...]
    layers: Mapping[str, tuple[LayerTime, ...]]
    refused: Mapping[str, str]
    threads: int

    @property
    def best(self) -> dict[int, str]:
        fastest: dict[int, Timing] = {}
        for timing in self.timings:
            if timing.backend != FLOAT and timing.seconds < fastest.get(timing.batch, timing).seconds + 1e-12:
                fastest[timing.batch] = timing
        return {batch: timing.backend for batch, timing in fastest.items()}

    def ratio(self, backend: str, batch: int, to: str = FLOAT) -> float:
        """Time of one backend over that of another."""
        seconds = {t.backend: t.seconds for t in self.timings if t.batch == batch}
        return seconds[backend] / seconds[to]

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "best": self.best}, indent=1)

    def tables(self) -> Iterator[Table]:
        """One table of backends, and one of layers per profiled backend, for rich."""
        from rich.table import Table  # reason: rich draws a random number where it is imported

        has_float = any(t.backend == FLOAT for t in self.timings)
        table = Table(title=f"Latency, {self.threads} thread(s), medians of runs in turn")
        for column in ("backend", "batch", "ms", "spread", "images/s", "peak MB", "to float", "int8 layers"):
            table.add_column(column, justify="left" if column in ("backend", "int8 layers") else "right")
        for t in sorted(self.timings, key=lambda t: (t.batch, t.seconds)):
            ratio = f"{self.ratio(t.backend, t.batch):.2f}" if has_float else "-"
            memory = "-" if t.memory is None else f"{t.memory / 1e6:.1f}"
            best = " *" if self.best.get(t.batch) == t.backend else ""
            table.add_row(
                t.backend + best,
                str(t.batch),
                f"{t.seconds * 1e3:.2f}",
                f"{t.spread * 1e3:.2f}",
                f"{t.images_per_second:.0f}",
                memory,
                ratio,
                t.kernels,
            )
        yield table
        for backend, layers in self.layers.items():
            table = Table(title=f"Where {backend} spends its time, batch {min(t.batch for t in self.timings)}")
            for column in ("layer", "ms", "%", "kernel", "weight bits", "channels"):
                table.add_column(column, justify="left" if column in ("layer", "kernel") else "right")
            total = sum(layer.seconds for layer in layers) or 1.0
            for layer in sorted(layers, key=lambda layer: -layer.seconds):
                share = f"{layer.seconds / total:.1%}"
                channels = str(layer.channels or "")
                table.add_row(
                    layer.layer, f"{layer.seconds * 1e3:.3f}", share, layer.kernel, layer.weight_bits, channels
                )
            yield table


@boundary("benchmark")
def benchmark(
    static: fx.GraphModule,
    example_inputs: Sequence[Tensor],
    *,
    float_model: nn.Module | None = None,
    backends: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    threads: int = 1,
    rounds: int = 15,
    layers: bool = True,
    progress: Callable[[str, float], None] | None = None,
) -> Benchmark:
    """Time a static graph on the CPU, each backend in turn.

    Args:
        example_inputs: as the graph takes them; repeated to each batch size.
        float_model: also timed, under `torch.compile` with freezing, as "float".
        backends: names of registered ones; None: all that are installed and can hold the graph.
        rounds: samples per backend and batch size, each at least 20 ms long.
        layers: also profile each backend, at the first batch size.
        progress: called with (step, share done).

    Raises:
        BackendError: a backend that was asked for is not installed or computes something else.
    """
    with torch_threads(threads):
        timings: list[Timing] = []
        profiles: dict[str, tuple[LayerTime, ...]] = {}
        refused: dict[str, str] = {}
        for number, batch in enumerate(batch_sizes):

            def tell(step: str, part: float, batch: int = batch, number: int = number) -> None:
                if progress is not None:
                    progress(f"{step}, batch {batch}", (number + part) / len(batch_sizes))

            inputs = of_batch(example_inputs, batch)
            runners = _runners(static, inputs, backends, threads, refused, tell)
            if float_model is not None:
                runners[FLOAT] = compile_float(float_model, inputs)
            tell("time in turn", 0.5)
            timings += time_runners(runners, inputs, batch, rounds, threads)
            for name, run in runners.items():
                if layers and run.profile is not None and name not in profiles:
                    tell(f"profile {name}", 0.9)
                    profiles[name] = _layers(run, static, inputs)
        return Benchmark(tuple(timings), profiles, refused, threads)


def time_runners(
    runners: Mapping[str, Callable[..., Any]], inputs: Sequence[Tensor], batch: int, rounds: int, threads: int = 1
) -> list[Timing]:
    """Run all in turn, in another order each round, on the same inputs. One thread is timed by the processor's clock,
    which other programs do not move; several by the wall's."""
    clock = time.process_time if threads == 1 else time.perf_counter
    calls, samples = {}, {name: [] for name in runners}  # type: dict[str, int], dict[str, list[float]]
    for name, run in runners.items():
        run(*inputs)
        start = clock()
        run(*inputs)
        calls[name] = max(1, round(_LEAST_SECONDS / max(clock() - start, 1e-9)))
    order, draw = list(runners), random.Random(0)
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            start = clock()
            for _ in range(calls[name]):
                runners[name](*inputs)
            samples[name].append((clock() - start) / calls[name])
    timings = []
    for name, run in runners.items():
        median = statistics.median(samples[name])
        low, _, high = statistics.quantiles(samples[name], n=4) if rounds > 1 else (median, median, median)
        kernels = getattr(run, "kernels", None)
        memory = _peak(lambda run=run: run(*inputs))  # type: ignore[misc]
        timings.append(
            Timing(name, batch, median, high - low, batch / median, memory, kernels.summary if kernels else "")
        )
    return timings


def _runners(
    static: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    backends: Sequence[str] | None,
    threads: int,
    refused: dict[str, str],
    tell: Callable[[str, float], None],
) -> dict[str, Runner]:
    runners = {}
    for name in backends or BACKENDS.entries():
        tell(f"prepare {name}", 0.1)
        try:
            runners[name] = runner(static, inputs, name, threads=threads)
        except BackendError as error:
            if backends is not None:
                raise
            refused[name] = str(error)
    if has_vnni() is False:
        refused["int8 dot products"] = (
            "this processor has none (VNNI): int8 kernels run at about the speed of float; results stay exact"
        )
    return runners


def _layers(run: Runner, static: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[LayerTime, ...]:
    """One row per layer with weights, and one for the rest."""
    assert run.profile is not None
    seconds = dict(run.profile(*inputs))
    integer = run.kernels.integer if run.kernels else ()
    rows = []
    nodes = {node.name: node for node in static.graph.nodes}
    for name in [name for name in layer_names(static) if name in seconds]:
        weight = weight_name(nodes[name])
        stored = static_of(static).weights.get(weight)
        bits = "32" if stored is None else str(stored.bits) if isinstance(stored.bits, int) else "mixed"
        channels = len(attribute(static, weight)) if weight else 0
        label = weight.removesuffix(".weight") or name
        rows.append(LayerTime(label, seconds.pop(name), "int8" if name in integer else "float", bits, channels))
    return (*rows, LayerTime("the rest", sum(seconds.values()), "", "", 0))


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _peak(call: Callable[[], Any]) -> int | None:
    """Bytes by which a call raises the resident memory of the process at most; None where Linux does not say."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, StopIteration):
        return None


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
