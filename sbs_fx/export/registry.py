"""The registries of export targets and of backends: each is a file that registers itself.

In: decorated functions, here or in another package (entry point group "sbs_fx.targets": a module that registers as it
is imported). Out: entries by name, which `export`, `runner`, the command line and the documentation read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sbs_fx.export.runtime import Runner
from sbs_fx.plan.bits import BITS
from sbs_fx.plan.errors import BackendError
from sbs_fx.plan.registry import Registry

Write = Callable[[fx.GraphModule, Sequence[Tensor], str, Mapping[str, Any]], Runner]
Run = Callable[[fx.GraphModule, Sequence[Tensor], int], Runner]


@dataclass(frozen=True)
class Numerics:
    """What a tool computes in integers, by which `Config(target=)` chooses; the defaults suit the CPU tools here.

    Attributes:
        zero_points: codes may stand for zero anywhere; False: activations are symmetric, signed codes.
        joins: additions, products, concatenations and pools have kernels for codes.
        activation_bits: bitwidths that have kernels.

    >>> TARGETS["tensorrt"].numerics.zero_points
    False
    """

    zero_points: bool = True
    joins: bool = True
    activation_bits: tuple[int, ...] = BITS


@dataclass(frozen=True)
class Target:
    """A file format.

    Attributes:
        write: (static graph, example inputs, path, options) -> the file as it was loaded again.
        suffix: of its files. help: what it is and what runs it. options: that it takes. numerics: what it computes.
        script: Python that defines `load(path)` -> (inputs (1, ...) -> outputs), arrays of numpy; "" if there is none.
        runs: whether files can be run on any computer, and so are compared.

    >>> TARGETS["pt2"].suffix
    '.pt2'
    """

    name: str
    write: Write
    suffix: str
    help: str
    options: tuple[str, ...] = ()
    numerics: Numerics = Numerics()
    script: str = ""
    runs: bool = True


@dataclass(frozen=True)
class Backend:
    """A tool that computes a static graph here.

    Attributes:
        run: (static graph, example inputs, threads or 0) -> runner. profiles: whether it tells the time of layers.

    >>> BACKENDS["eager"].profiles
    False
    """

    name: str
    run: Run
    profiles: bool = True


TARGETS = Registry[Target]("format", "sbs_fx.targets", "sbs_fx.export", BackendError)
BACKENDS = Registry[Backend]("backend", "sbs_fx.targets", "sbs_fx.export", BackendError)


def target(name: str, **entry: Any) -> Callable[[Write], Write]:
    """Register a function as a target; `entry` has the other fields of `Target`.

    >>> @target("text", suffix=".txt", help="the code of the graph")
    ... def text(static, example_inputs, path, options):
    ...     with open(path, "w") as file:
    ...         size = file.write(static.code)
    ...     return Runner("text", static)
    >>> export(result.model, (images,), "text", "model.txt").name
    'text'
    """

    def register(write: Write) -> Write:
        TARGETS.add(name, Target(name, write, **entry), write.__module__)
        return write

    return register


def backend(name: str, **entry: Any) -> Callable[[Run], Run]:
    """Register a function as a backend; `entry` has the other fields of `Backend`.

    >>> @backend("twice", profiles=False)
    ... def twice(static, example_inputs, threads):
    ...     return Runner("twice", lambda *inputs: (static(*inputs), static(*inputs))[1])
    >>> runner(result.model, (images,), "twice")(images).shape
    torch.Size([2, 4])
    """

    def register(run: Run) -> Run:
        BACKENDS.add(name, Backend(name, run, **entry), run.__module__)
        return run

    return register
