"""torch's own compiler with x86 int8 kernels: in the process, or as a package that needs torch alone.

In: a static graph. Out: a callable, or an AOTInductor package. Holds: weights are frozen into the code, codes unpacked
and packed for the kernel once; results as torch's, in exact mode bit for bit.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.export.program import exported_program
from sbs_fx.export.registry import backend, target
from sbs_fx.export.runtime import PROFILED, Kernels, Runner, failing_as, layer_names, least, require
from sbs_fx.passes.capture.export import quiet_torch

# reason: importing it registers the patterns by which the compiler finds integer layers
_PATTERNS = "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer"
_INTEGER = re.compile(r"^(qconv|qlinear)(?!.*prepack)")
_FLOAT = re.compile(
    r"^(aten\.(convolution|addmm|mm)\.|mkldnn\.(_convolution|_linear|_convolution_transpose)_pointwise)"
)
_EVENTS = {
    *(f"onednn::q{layer}_pointwise" for layer in ("conv", "conv1d", "conv2d", "conv3d", "linear")),
    "mkldnn::_convolution_pointwise",
    "mkldnn::_linear_pointwise",
    "aten::convolution",
    "aten::addmm",
    "aten::mm",
}


class Compiled:
    """A static graph compiled for the shapes that it meets, each batch size once; runs without gradients.

    Attributes:
        kernels: after the first run, the layers with and without an int8 kernel.
    """

    def __init__(self, static: fx.GraphModule) -> None:
        require(_PATTERNS)
        self.static = static
        self.kernels: Kernels | None = None
        self._compiled = torch.compile(static, dynamic=False)
        self._seen: set[tuple[torch.Size, ...]] = set()

    def __call__(self, *inputs: Tensor) -> Any:
        shapes = tuple(x.shape for x in inputs)
        with torch.no_grad():
            if shapes in self._seen:
                return self._compiled(*inputs)
            with _freezing(self._count):
                result = self._compiled(*inputs)
            self._seen.add(shapes)
            return result

    def _count(self, graph: fx.Graph) -> None:
        """Read the compiler's last graph: its layers are in the order of ours."""
        integer = [bool(_INTEGER.match(node.name)) for node in graph.nodes if _is_layer(node)]
        names = layer_names(self.static)
        if len(integer) == len(names):
            pairs = list(zip(names, integer, strict=True))
            self.kernels = Kernels(tuple(n for n, i in pairs if i), tuple(n for n, i in pairs if not i))
        else:  # reason: the compiler has split or merged some; the count is all that is certain
            rest = len(names) - sum(integer)
            self.kernels = Kernels(("?",) * sum(integer), ("?",) * max(0, rest))


def run_inductor(static: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Runner:
    """A static graph compiled for the shapes of the examples, and for others as they come.

    Raises:
        BackendError: torchao is not installed, or the compiler fails.
    """
    compiled = Compiled(static)
    with failing_as("torch.compile fails on this graph"):
        compiled(*example_inputs)
    names = layer_names(static)

    def profile(*inputs: Tensor) -> dict[str, float]:
        return least([_profile(compiled, names, inputs) for _ in range(PROFILED)])

    return Runner("inductor", compiled, compiled.kernels, profile)


def compile_float(module: nn.Module, example_inputs: Sequence[Tensor]) -> Runner:
    """A float model compiled in the same way, for comparison."""
    compiled = torch.compile(module, dynamic=False)

    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return compiled(*inputs)

    with _freezing(None):
        run(*example_inputs)
    return Runner("float", run)


def _profile(compiled: Compiled, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, float]:
    """From torch's profiler: integer kernels run in the order of the layers; everything else is "other"."""
    from torch.profiler import ProfilerActivity, profile

    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        compiled(*inputs)
    events = [event for event in recorded.events() if event.name in _EVENTS]
    if len(events) != len(layers):
        return {"other": time.perf_counter() - start}
    seconds = {name: event.time_range.elapsed_us() / 1e6 for name, event in zip(layers, events, strict=True)}
    whole = max((event.time_range.end for event in recorded.events()), default=0) - min(
        (event.time_range.start for event in recorded.events()), default=0
    )
    return {**seconds, "other": max(0.0, whole / 1e6 - sum(seconds.values()))}


def save_aoti(static: fx.GraphModule, example_inputs: Sequence[Tensor], path: str | os.PathLike[str]) -> None:
    """Write an AOTInductor package (.pt2) for this kind of processor; `torch._inductor.aoti_load_package` loads it.

    Raises:
        BackendError: torchao is not installed, or the compiler fails.
    """
    require(_PATTERNS)
    program = exported_program(static, example_inputs)
    with failing_as("AOTInductor fails on this graph"), quiet_torch():
        torch._inductor.aoti_compile_and_package(
            program, package_path=os.fspath(path), inductor_configs={"freezing": True}
        )


def run_aoti(path: str | os.PathLike[str]) -> Runner:
    """An AOTInductor package as a runner."""
    return Runner("aoti", torch._inductor.aoti_load_package(os.fspath(path)))


@contextmanager
def _freezing(count: Any) -> Iterator[None]:
    from torch._inductor import config

    with quiet_torch(), config.patch(freezing=True, post_grad_custom_post_pass=count):
        yield


def _is_layer(node: fx.Node) -> bool:
    return node.op == "call_function" and bool(_INTEGER.match(node.name) or _FLOAT.match(str(node.target)))


@target("aoti", suffix=".pt2", help="AOTInductor package, weights int8; runs in torch alone, on this kind of processor")
def aoti(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """`save_aoti`, and the package as it was loaded again."""
    save_aoti(static, inputs, path)
    return run_aoti(path)


@backend("inductor")
def inductor(static: fx.GraphModule, inputs: Sequence[Tensor], threads: int) -> Runner:
    """torch's compiler."""
    return run_inductor(static, inputs)
