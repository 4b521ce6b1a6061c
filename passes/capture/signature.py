"""`Signature`: how a model is called, and which of its arguments are tensors.

In: example inputs as a caller has them: a tensor, positional arguments, or a dict of keyword arguments; with lists,
dicts, dataclasses, None, numbers and texts in them. Out: the tensors in order, each with a name, and back.
Holds: what is no tensor is part of the graph; calls with another value of it, or of another structure, are refused.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sbs_fx.plan.errors import InputError

_NONE = (
    "no example inputs were given: pass a tensor of shape (batch, ...), a tuple of arguments or a dict of keyword "
    "arguments"
)


@dataclass(frozen=True)
class Call:
    """The arguments of a call as they were made, positional ones and those by name."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Inputs = Tensor | Sequence[Any] | Mapping[str, Any] | Call


@dataclass(frozen=True)
class Signature:
    """The structure of a call.

    Attributes:
        names: of the tensors, in the order in which a graph takes them.
        spec: of (positional arguments, keyword arguments). constants: by the place of a leaf; the rest are tensors.
        plain: whether the call is these tensors, one positional argument each.
    """

    names: tuple[str, ...]
    spec: pytree.TreeSpec
    constants: Mapping[int, Any]
    plain: bool

    @classmethod
    def of(cls, module: nn.Module, example_inputs: Inputs) -> tuple[Signature, tuple[Tensor, ...]]:
        """The structure of a call with these inputs, and the tensors in it. Raises InputError."""
        args, kwargs = call_of(example_inputs)
        if not args and not kwargs:
            raise InputError(_NONE)
        names = argument_names(module, args, kwargs)
        paths, spec = pytree.tree_flatten_with_path((args, kwargs))
        tensors = {i: leaf for i, (_, leaf) in enumerate(paths) if isinstance(leaf, Tensor)}
        constants = {i: leaf for i, (_, leaf) in enumerate(paths) if i not in tensors}
        if not tensors:
            kinds = ", ".join(type(value).__name__ for value in [*args, *kwargs.values()])
            raise InputError(f"there is no tensor of shape (batch, ...) among the example inputs ({kinds}); give one")
        for i, constant in constants.items():
            if not isinstance(constant, (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)):
                raise InputError(
                    f"example input {_name(paths[i][0], names)!r} is a {type(constant).__name__}; expected a "
                    "torch.Tensor of shape (batch, ...), a number, a text, None, or lists, dicts, dataclasses of these"
                )
        called = tuple(_unique([_name(paths[i][0], names) for i in tensors]))
        direct = not kwargs and all(isinstance(x, Tensor) for x in args) and _takes(module, len(args))
        return cls(called, spec, constants, direct), tuple(tensors.values())

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments that hold these tensors."""
        rest = iter(tensors)
        leaves = [self.constants[i] if i in self.constants else next(rest) for i in range(self.spec.num_leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs

    def called(self, module: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """What a module gives for copies of these tensors."""
        args, kwargs = self.call([x.clone() for x in tensors])
        return module(*args, **kwargs)

    def tensors(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The tensors of a call: of its own structure, or the tensors alone, by place or by name. Raises InputError."""
        leaves, spec = pytree.tree_flatten((_registered(tuple(args)), _registered(dict(kwargs))))
        if spec == self.spec:
            for i, constant in self.constants.items():
                both_nan = leaves[i] != leaves[i] and constant != constant
                if type(leaves[i]) is not type(constant) or leaves[i] != constant and not both_nan:
                    raise InputError(
                        f"the graph was made for {constant!r} where the call has {leaves[i]!r}; compress the model "
                        "again with that among the example inputs"
                    )
            return tuple(leaf for i, leaf in enumerate(leaves) if i not in self.constants)
        return by_name(self.names, args, kwargs)


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Arguments in the order of these names, given by place or by name. Raises InputError for others."""
    named = dict(zip(names, args, strict=False)) | dict(kwargs)
    if len(args) + len(kwargs) == len(names) and named.keys() == set(names):
        return tuple(named[name] for name in names)
    given = ", ".join([*(type(x).__name__ for x in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
    raise InputError(f"the graph takes ({', '.join(names)}); it was called with ({given})")


def call_of(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments: a dict is keyword arguments, anything else positional ones."""
    if isinstance(example_inputs, Call):
        named = {str(name): _registered(value) for name, value in example_inputs.kwargs.items()}
        return tuple(_registered(value) for value in example_inputs.args), named
    if isinstance(example_inputs, Mapping):
        return (), {str(name): _registered(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, Tensor) or not isinstance(example_inputs, Sequence):
        return (_registered(example_inputs),), {}
    return tuple(_registered(value) for value in example_inputs), {}


def _registered(value: Any) -> Any:
    """The value, in a form whose tensors torch finds: dataclasses are made known to it, mappings become dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value))
        for field in dataclasses.fields(value):
            _registered(getattr(value, field.name))
        return value
    if isinstance(value, Mapping) and type(value) not in pytree.SUPPORTED_NODES:
        return {key: _registered(each) for key, each in value.items()}
    if type(value) in (list, tuple, dict):
        parts = list(value.values()) if isinstance(value, dict) else list(value)
        new = [_registered(part) for part in parts]
        if any(a is not b for a, b in zip(parts, new, strict=True)):
            return dict(zip(value, new, strict=True)) if isinstance(value, dict) else type(value)(new)
    return value


def argument_names(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Names of positional arguments as `forward` calls them. Raises InputError where it cannot be called so."""
    try:
        signature = inspect.signature(module.forward)
    except (TypeError, ValueError):  # reason: some callables have none
        return [f"input_{i}" for i in range(len(args))]
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values())
        raise InputError(
            f"{type(module).__name__}.forward({takes}) cannot be called with the example inputs: {error}; give a tuple "
            "of positional arguments, or a dict of keyword arguments"
        ) from error
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names


def _takes(module: nn.Module, count: int) -> bool:
    """Whether `forward` has that many positional arguments of a name."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # reason: some callables have none
        return True
    return len([p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) >= count


def _name(path: pytree.KeyPath, arguments: Sequence[str]) -> str:
    """Such as "images", "features_0" or "batch_pixel_values"."""
    (kind, place), *rest = ((type(key), _key(key)) for key in path[1:]) if len(path) > 1 else [(None, "input")]
    first = arguments[place] if _key(path[0]) == 0 and isinstance(place, int) and place < len(arguments) else str(place)
    parts = [first, *(str(key) for _, key in rest)]
    name = re.sub(r"\W+", "_", "_".join(parts)).strip("_")
    return name if name.isidentifier() else f"input_{name}"


def _key(key: Any) -> Any:
    """What stands in one step of a path: an index, a key or the name of a field."""
    return next(getattr(key, field) for field in ("idx", "key", "name") if hasattr(key, field))


def _unique(names: Sequence[str]) -> list[str]:
    result: list[str] = []
    for name in names:
        number, new = 1, name
        while new in result:
            number, new = number + 1, f"{name}_{number}"
        result.append(new)
    return result
