"""`unchanged`: whatever runs inside, a module is afterwards as it was before.

In: a module. Out: a context. Holds, also where the inside raises: the module, its sub-modules and their classes have
the attributes that they had, containers among them the contents, tensors the values; hooks, modes, random states, the
default dtype and device are those of before. What was cached while tensors were fake is forgotten.
"""

from __future__ import annotations

import random
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence, MutableSet
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_DEPTH = 6  # of containers and plain objects within each other
_PLAIN = (type, str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size)


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Restore a module, and the state of the process that a forward may change, at the end of the context."""
    snapshot = _Snapshot()
    for part in module.modules():
        snapshot.take(part)
        for cls in type(part).__mro__:
            if cls not in (nn.Module, object):
                snapshot.take_class(cls)
    python, numpy, default = random.getstate(), np.random.get_state(), torch.get_default_dtype()
    device = torch.get_default_device()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_default_dtype(default)
        if torch.get_default_device() != device:
            torch.set_default_device(device)
        snapshot.restore()


class _Snapshot:
    """What objects hold, each object once, by its identity."""

    def __init__(self) -> None:
        self._objects: dict[int, Any] = {}  # reason: kept, so that no identity is given out again
        self._restores: list[Callable[[], None]] = []
        self._caches: dict[int, Callable[[], None]] = {}

    def restore(self) -> None:
        for restore in self._restores:
            restore()
        for clear in self._caches.values():
            clear()

    def take(self, value: Any, depth: int = _DEPTH) -> None:
        """Remember what a value holds, and what its parts hold."""
        if depth == 0 or isinstance(value, _PLAIN) or id(value) in self._objects:
            return
        if isinstance(value, Tensor):
            self._once(value, lambda: _restorer_of_tensor(value))
        elif isinstance(value, (MutableMapping, MutableSequence, MutableSet)):
            parts = list(_items(value).values()) if isinstance(value, Mapping) else list(value)
            self._once(value, lambda: _restorer_of_container(value))
            self._take_all(parts, depth)
        elif isinstance(value, (tuple, frozenset)):
            self._objects[id(value)] = value
            self._take_all(value, depth)
        elif not callable(value) or isinstance(value, nn.Module):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                self._objects[id(value)] = value
                self.take(attributes, depth)

    def take_class(self, cls: type) -> None:
        """Remember the attributes of a class, and of the containers and caches of the file that it is written in."""
        if id(cls) in self._objects:
            return
        before = dict(vars(cls))
        self._once(cls, lambda: lambda: _restore_class(cls, before))
        self._take_all(before.values(), _DEPTH)
        for value in [*before.values(), *getattr(sys.modules.get(cls.__module__), "__dict__", {}).values()]:
            cache = getattr(value, "cache_clear", None)
            if callable(cache) and callable(value):
                self._caches[id(value)] = cache
            elif isinstance(value, (dict, list, set)):
                self.take(value, depth=1)

    def _take_all(self, values: Any, depth: int) -> None:
        for value in values:
            self.take(value, depth - 1)

    def _once(self, value: Any, restorer: Callable[[], Callable[[], None]]) -> None:
        self._objects[id(value)] = value
        self._restores.append(restorer())


def _restorer_of_tensor(tensor: Tensor) -> Callable[[], None]:
    """Values are kept of all but parameters, which a forward that was captured does not write."""
    needs_grad, grad = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
    values = None if isinstance(tensor, nn.Parameter) else tensor.detach().clone()
    version = _version(tensor)

    def restore() -> None:
        if values is not None and _version(tensor) != version:
            with torch.no_grad():
                tensor.copy_(values)
        if tensor.is_leaf:
            tensor.requires_grad_(needs_grad)
            tensor.grad = grad

    return restore


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _restorer_of_container(value: Any) -> Callable[[], None]:
    before = _items(value) if isinstance(value, Mapping) else list(value)

    def restore() -> None:
        if isinstance(before, dict):
            after = _items(value)
            if _differ([*before, *before.values()], [*after, *after.values()]):
                value.clear()
                value.update(before)
        elif _differ(before, list(value)):
            if isinstance(value, MutableSequence):
                value[:] = before
            else:
                value.clear()
                for item in before:
                    value.add(item)

    return restore


def _items(value: Mapping[Any, Any]) -> dict[Any, Any]:
    """What a mapping holds; of a kind of dict that makes something else of an entry when it is read, the entries."""
    if not isinstance(value, dict):
        return dict(value)
    kind = OrderedDict if isinstance(value, OrderedDict) else dict  # reason: the order of the one is its own
    return {key: dict.__getitem__(value, key) for key in kind.__iter__(value)}


def _restore_class(cls: type, before: Mapping[str, Any]) -> None:
    after = dict(vars(cls))
    for name in after.keys() - before.keys():
        delattr(cls, name)
    for name, value in before.items():
        if name not in after or after[name] is not value:
            setattr(cls, name, value)


def _differ(before: list[Any], after: list[Any]) -> bool:
    return len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True))
