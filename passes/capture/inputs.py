"""`InputSpec`: which inputs a graph was made for, and the check of a call against it.

In: the tensors of a call. Out: nothing, or an `InputError` that names the input, its dimension, what is allowed, and
what to ask for when the model is captured. Holds: all that capture assumed of sizes is in here; as JSON it comes back
equal.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, fx

from sbs_fx.passes.capture.signature import Signature, by_name
from sbs_fx.plan.errors import InputError

_KEY = "sbs_fx_inputs"
_NODES = (ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Constant, ast.Name, ast.Load)
_FUNCTIONS: Mapping[str, Any] = {"max": max, "min": min}
_OPERATORS = (ast.operator, ast.unaryop, ast.boolop, ast.cmpop)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that a graph takes: each dimension is a number, or the name of one that may change."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class InputSpec:
    """What a graph takes.

    Attributes:
        tensors: in order. ranges: name of a dimension -> least and greatest size, None if there is none.
        guards: comparisons between dimensions, by the names in `tensors`.
        signature: the structure of a call; None: the tensors are the arguments.
    """

    tensors: tuple[TensorSpec, ...]
    ranges: Mapping[str, tuple[int, int | None]] = field(default_factory=dict)
    guards: tuple[str, ...] = ()
    signature: Signature | None = field(default=None, compare=False)

    def check(self, tensors: Sequence[Any]) -> None:
        """Raises InputError for tensors that the graph was not made for."""
        names = [spec.name for spec in self.tensors]
        if len(tensors) != len(names):
            raise InputError(f"the graph takes {len(names)} tensors ({', '.join(names)}); the call has {len(tensors)}")
        sizes: dict[str, int] = {}
        for spec, x in zip(self.tensors, tensors, strict=True):
            if not isinstance(x, Tensor):
                raise InputError(f"{spec.name!r} is a {type(x).__name__}; expected a tensor: {spec}")
            if x.layout is not torch.strided:
                raise InputError(
                    f"{spec.name!r} has layout {x.layout}; the graph takes dense tensors: give x.to_dense()"
                )
            if str(x.dtype).removeprefix("torch.") != spec.dtype:
                raise InputError(f"{spec.name!r} has dtype {x.dtype}; the graph takes {spec}: convert it")
            if x.ndim != len(spec.shape):
                raise InputError(f"{spec.name!r} has {x.ndim} dimensions, {tuple(x.shape)}; the graph takes {spec}")
            for place, (allowed, size) in enumerate(zip(spec.shape, x.shape, strict=True)):
                self._check_size(spec, place, allowed, size, sizes, x)
        for guard in self.guards:
            if not evaluated(guard, sizes):
                raise InputError(
                    f"the graph was made for inputs with {guard}; these have "
                    f"{', '.join(f'{name} {size}' for name, size in sizes.items())}: a branch in the model depends on "
                    "it. Compress with example inputs of such a size"
                )

    def _check_size(
        self, spec: TensorSpec, place: int, allowed: int | str, size: int, sizes: dict[str, int], x: Tensor
    ) -> None:
        if not isinstance(allowed, str):
            problem = None if size == allowed else self._of_another_size(spec, place, allowed)
        else:
            least, most = self.ranges.get(allowed, (1, None))
            problem = None
            if size < least or most is not None and size > most:
                upper = " or more" if most is None else f" to {most}"
                problem = f"; the graph takes a {allowed} of {least}{upper} ({spec})"
            elif sizes.setdefault(allowed, size) != size:
                problem = (
                    f", where another input's {allowed} is {sizes[allowed]}; the graph was made for one {allowed}. "
                    f'If {spec.name!r} has none, compress with dynamic={{"{spec.name}": {{}}}}'
                )
        if problem is not None:
            where = f"{spec.name!r} has size {size} in dimension {place}, shape {tuple(x.shape)}"
            raise InputError(where + problem)

    @staticmethod
    def _of_another_size(spec: TensorSpec, place: int, allowed: int) -> str:
        named = {i: n for i, n in enumerate(spec.shape) if isinstance(n, str)}
        side = {1: "width", 2: "height"}.get(len(spec.shape) - place, f"dimension_{place}")
        return (
            f"; the graph was made for {allowed} there ({spec}). Give inputs of that size, or compress the model with "
            f"dynamic={ {spec.name: named | {place: side}}!r} for a size that may change"
        )

    def relates_sizes(self) -> bool:
        """Whether torch found that dimensions, told apart, depend on one another."""
        return any(len(set(_checked_names(guard)) & self.ranges.keys()) > 1 for guard in self.guards)

    def to_json(self) -> dict[str, Any]:
        return {"tensors": [asdict(t) for t in self.tensors], "ranges": dict(self.ranges), "guards": [*self.guards]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Raises KeyError, TypeError or ValueError for anything but what `to_json` gives."""
        tensors = tuple(TensorSpec(str(t["name"]), str(t["dtype"]), tuple(t["shape"])) for t in data["tensors"])
        ranges = {
            str(name): (int(low), None if high is None else int(high)) for name, (low, high) in data["ranges"].items()
        }
        for guard in data["guards"]:
            list(_checked_names(guard))
        return cls(tensors, ranges, tuple(data["guards"]))


def _checked_names(guard: str) -> Iterator[str]:
    """The names in a comparison of sizes. Raises ValueError if it holds anything but arithmetic."""
    for node in ast.walk(ast.parse(guard, mode="eval")):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        if not (called or isinstance(node, (*_NODES, *_OPERATORS))) or isinstance(node, ast.Pow):
            raise ValueError(f"{guard!r} is no comparison of sizes")
        if isinstance(node, ast.Name) and node.id not in _FUNCTIONS:
            yield node.id


def is_guard(text: str) -> bool:
    """Whether a text is a comparison of sizes."""
    try:
        return any(True for _ in _checked_names(text))
    except (ValueError, SyntaxError):
        return False


def evaluated(guard: str, sizes: Mapping[str, int]) -> bool:
    """Whether a comparison holds for these sizes of dimensions."""
    names = set(_checked_names(guard))
    values = {**_FUNCTIONS, **{name: sizes[name] for name in names}}
    return bool(eval(guard, {"__builtins__": {}}, values))  # reason: nothing but arithmetic is left in it


def random_like(x: Tensor, generator: torch.Generator) -> Tensor:
    """Normal numbers in place of floats, any bytes in place of bytes; other tensors are themselves."""
    if x.dtype == torch.uint8:
        return torch.randint(256, x.shape, dtype=torch.uint8, generator=generator)
    return torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x


# -- on graphs ---------------------------------------------------------------------------------------------------------


def set_inputs(graph_module: fx.GraphModule, spec: InputSpec) -> None:
    graph_module.meta[_KEY] = spec


def inputs_of(graph_module: fx.GraphModule) -> InputSpec | None:
    """What a graph takes; None for one that was not captured here."""
    return graph_module.meta.get(_KEY)


def guarded(graph_module: fx.GraphModule) -> fx.GraphModule:
    """The graph, which from now on checks each call, and takes the arguments that the float model took."""
    spec = inputs_of(graph_module)
    if spec is None:
        return graph_module

    names = [tensor.name for tensor in spec.tensors]

    def check(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if torch.compiler.is_compiling():  # reason: compilers and exporters have guards of their own
            return args, kwargs
        signature = spec.signature
        tensors = by_name(names, args, kwargs) if signature is None else signature.tensors(args, kwargs)
        spec.check(tensors)
        own = next((b.device for of in (module.buffers(), module.parameters()) for b in of), None)
        for name, x in zip(names, tensors, strict=True):
            if own is not None and x.ndim and x.device != own:
                raise InputError(f"{name!r} is on {x.device} and the graph on {own}; move one of them")
        return tensors, {}

    graph_module.register_forward_pre_hook(check, with_kwargs=True)
    return graph_module
