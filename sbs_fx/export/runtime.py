"""What all backends have in common: a runner, the kernels it reached, and what is said when it cannot be had.

In: a static graph. Out: a callable that computes it with another tool. Holds: a runner's results were compared with
the static graph's before anybody sees it, where `check` was called; a missing tool is named with what installs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.capture.inputs import InputSpec, random_like
from sbs_fx.passes.dialects import static_of
from sbs_fx.passes.folding import CONVOLUTIONS, TRANSPOSED
from sbs_fx.plan.boundary import first_line
from sbs_fx.plan.errors import BackendError

LAYERS = CONVOLUTIONS | TRANSPOSED | {torch.ops.aten.linear.default}
EXTRAS = {
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "torchao": "inductor",
    "executorch": "executorch",
    "litert_torch": "litert",
    "ai_edge_litert": "litert",
    "coremltools": "coreml",
}
PROFILED = 8  # calls that a profile takes the least of
# Share of the output's norm that a backend may be off by. Rounding ties flip one code in 1e5 by one step, which random
# networks of few bits turn into 0.4 at the output (trained ones keep 99 % of their predictions); a layer that is wrong
# gives another output altogether.
TOLERANCE = 0.6


@dataclass(frozen=True)
class Kernels:
    """Layers with weights by what computes them: names of graph nodes.

    >>> Kernels(("conv2d",), ("linear",)).summary
    '1 of 2'
    """

    integer: tuple[str, ...]
    floating: tuple[str, ...]

    @property
    def summary(self) -> str:
        """Such as "20 of 21"."""
        return f"{len(self.integer)} of {len(self.integer) + len(self.floating)}"

    def __str__(self) -> str:
        rest = f"; in float: {', '.join(self.floating)}" if self.floating else ""
        return f"{self.summary} layers reached an int8 kernel{rest}"


@dataclass(frozen=True)
class Runner:
    """A static graph in the hands of a backend.

    Attributes:
        name: of the backend. run: takes and gives what the graph does, on the CPU. kernels: None if it cannot tell.
        profile: inputs -> seconds of one call by layer, and by other operators under names of their own.
        inputs: what each call is checked against. lost: what the file could not keep of the graph, by tensor.
        files: what was written, files or folders.

    >>> Runner("eager", result.model)(images).shape
    torch.Size([2, 4])
    """

    name: str
    run: Callable[..., Any]
    kernels: Kernels | None = None
    profile: Callable[..., Mapping[str, float]] | None = None
    inputs: InputSpec | None = None
    lost: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __call__(self, *inputs: Tensor) -> Any:
        """Raises InputError for inputs that the graph was not made for."""
        if self.inputs is not None:
            self.inputs.check(inputs)
        return self.run(*inputs)


@contextmanager
def failing_as(doing: str) -> Iterator[None]:
    """Whatever a tool raises meanwhile becomes a BackendError of one line: what was being done, and what stopped it."""
    try:
        yield
    except BackendError:
        raise
    except Exception as error:  # whatever the tool and its passes raise
        raise BackendError(f"{doing}: {type(error).__name__}: {first_line(error)}") from error


def of_batch(example_inputs: Sequence[Tensor], batch: int) -> tuple[Tensor, ...]:
    """The first example, so many times."""
    return tuple(x[:1].repeat(batch, *[1] * (x.ndim - 1)) for x in example_inputs)


def in_batches(run: Callable[[Sequence[Tensor]], list[Tensor]], inputs: Sequence[Tensor], batch: int) -> list[Tensor]:
    """The results of a file that takes so many images a call, for any number: some after others, and the last ones
    filled up with copies of one."""
    count = len(inputs[0])
    parts = []
    for start in range(0, count, batch):
        part = [x[start : start + batch] for x in inputs]
        filled = [torch.cat([x, x[:1].expand(batch - len(x), *x.shape[1:])]) for x in part]
        parts.append([y[: len(part[0])] for y in run(filled)])
    return [torch.cat(list(results)) for results in zip(*parts, strict=True)]


def sorted_codes(codes: Tensor) -> bytes:
    """Codes in ascending order, by which a weight is known in a file whatever the order of its dimensions."""
    return codes.flatten().sort().values.numpy().tobytes()


def require(*modules: str) -> list[Any]:
    """The modules of an optional tool. Raises BackendError, which names the extra that installs them."""
    imported = []
    for name in modules:
        try:
            imported.append(importlib.import_module(name))
        except ImportError as error:
            extra = EXTRAS[name.partition(".")[0]]
            raise BackendError(
                f"{name.partition('.')[0]} is not installed ({error}); install it with: pip install 'sbs-fx[{extra}]'"
            ) from error
    return imported


def layer_names(static: fx.GraphModule) -> list[str]:
    """Nodes that multiply by a weight, in graph order."""
    return [node.name for node in static.graph.nodes if node.target in LAYERS]


def weight_name(layer: fx.Node) -> str:
    """The name of the tensor that a layer's weight is read from; "" if it is computed from several."""
    node = layer.args[1]
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        node = node.args[0]
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""


def least(profiles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several profiles of the same call, the least time of each row: what else the machine did only adds to it."""
    return {name: min(profile.get(name, seconds) for profile in profiles) for name, seconds in profiles[0].items()}


def check(runner: Runner, static: fx.GraphModule, example_inputs: Sequence[Tensor]) -> None:
    """Compare with the static graph run by torch, on random inputs of the shapes of the examples.

    Raises:
        BackendError: the results differ; in a graph of `integer_grid(exact=True)`, in any bit.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [random_like(x, generator) for x in example_inputs]
    with torch.no_grad():
        expected, results = flat(static(*inputs)), flat(runner(*inputs))
    exact = static_of(static).exact
    for want, have in zip(expected, results, strict=True):
        have = have.reshape(want.shape)
        if exact and not torch.equal(want, have):
            raise BackendError(
                f"{runner.name} is not bit-equal to torch on this exact graph: {int((want != have).sum())} of "
                f"{want.numel()} outputs differ, by at most {float((want - have).abs().max()):.3g}; operators without "
                "an exact integer form cause this, such as gelu or layer norm, or in ExecuTorch additions: use another "
                "backend, or exact=False"
            )
        error = float((want - have).double().norm() / want.double().norm().clamp_min(1e-12))
        if not error <= TOLERANCE:
            raise BackendError(
                f"{runner.name} computes another function: its outputs are {error:.1%} off in norm, at most "
                f"{TOLERANCE:.0%} can come from rounding; use another backend"
            )


def flat(result: Any) -> list[Tensor]:
    """The tensors of a model's output, in order."""
    if isinstance(result, Tensor):
        return [result]
    parts = result.values() if isinstance(result, dict) else result
    return [tensor for part in parts if part is not None for tensor in flat(part)]


def has_vnni() -> bool | None:
    """Whether the processor multiplies bytes in one instruction; None if that cannot be found out."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    return any(flag in flags for flag in ("avx512_vnni", "avx_vnni", "asimddp"))
