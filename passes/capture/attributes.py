"""What Python reads from tensors while a module is captured: numbers that attributes hold, and len(x).

In: calls inside a capture. Out: `RealAttributes`: numbers and parts of tensors that are neither parameters nor buffers,
such as strides, as they are; torch would make each a number that nobody knows, on which no size or branch may depend.
`symbolic_len`: len(x) as x.shape[0], which Python would make a fixed number. Holds: parameters, buffers and whatever
else depends on an input are left to torch; nothing is written that stays.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

# Reads of a tensor: of a part, or of a number.
_PARTS = {Tensor.__getitem__, Tensor.unbind, torch.unbind, Tensor.select, torch.select}
_NUMBERS = {Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.__index__, Tensor.item, Tensor.tolist}
# Operators that take a number which may be given as a tensor, and read it themselves.
_FILLS = {torch.full, torch.full_like, Tensor.new_full, torch.fill, Tensor.fill_}
_NO_MODELS = {"torch", "builtins", "typing", "abc"}  # files whose own len(x) is let be


class RealAttributes(TorchFunctionMode):
    """A context for one capture."""

    def __init__(self) -> None:
        super().__init__()
        self.written: set[int] = set()  # storages that the forward changes, which hold other values after that

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PARTS or func in _NUMBERS:
            tensors = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, (Tensor, torch.SymInt))]
            if all(map(self._is_real, tensors)):
                with _disable_current_modes():
                    return func(*args, **kwargs)
        elif func in _FILLS:
            rest, kwargs = pytree.tree_map_only(Tensor, self._number, (args[1:], kwargs))
            args = (*args[:1], *rest)
        if _writes(func) and args and self._is_real(args[0]):
            self.written.add(args[0].untyped_storage().data_ptr())
        return func(*args, **kwargs)

    def _is_real(self, x: Any) -> bool:
        if not isinstance(x, Tensor) or isinstance(x, (FakeTensor, nn.Parameter)) or x.device.type == "meta":
            return False
        return x.layout is torch.strided and x.untyped_storage().data_ptr() not in self.written

    def _number(self, x: Tensor) -> Any:
        if x.ndim or not self._is_real(x):
            return x
        with _disable_current_modes():
            return x.item()


def _writes(func: Callable[..., Any]) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or name.endswith("_") and not name.endswith("__")


@contextmanager
def symbolic_len(module: nn.Module) -> Iterator[None]:
    """In the source files of a module's classes, len(x) of a tensor is x.shape[0], which a capture keeps symbolic."""
    files = {cls.__module__ for inner in module.modules() for cls in type(inner).__mro__ if cls is not object}
    spaces = [
        vars(sys.modules[name]) for name in files if name in sys.modules and name.partition(".")[0] not in _NO_MODELS
    ]
    spaces = [space for space in spaces if "len" not in space]
    for space in spaces:
        space["len"] = _len
    try:
        yield
    finally:
        for space in spaces:
            del space["len"]


def _len(x: Any, /) -> Any:
    return x.shape[0] if isinstance(x, FakeTensor) and x.ndim else builtins.len(x)
