"""`RealAttributes`: what is read from tensors that a module keeps as plain attributes is read while it is captured.

In: calls inside a capture. Out: numbers and parts of tensors that are neither parameters nor buffers, such as strides,
as they are; torch would make each a number that nobody knows, on which no size or branch may depend. Holds: parameters,
buffers and whatever depends on an input are left to torch; nothing is written.
"""

from __future__ import annotations

from collections.abc import Callable
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
