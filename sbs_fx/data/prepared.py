"""Batches of any form as a model takes them.

In: an iterable whose batches are tensors, tuples, dicts, dataclasses or what `prepare` reads. Out: the same batches as
(tensors, targets). Holds: an input that is not there is a `DataError` that names the batch, what it holds and what is
looked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

from torch import Tensor

from sbs_fx.plan.errors import DataError

Prepare = Callable[[Any], tuple[Any, Any]]  # batch -> (arguments of the model, targets or None)

# What data sets call images and targets, in the order in which they are looked for.
IMAGES = ("pixel_values", "images", "image", "img", "inputs", "input", "x", "data")
TARGETS = ("labels", "label", "targets", "target", "y", "masks", "mask", "class", "classes", "fine_label")


def prepared(data: Iterable[Any] | None, names: Sequence[str], prepare: Prepare | None = None) -> Any:
    """The data, read by the names of a model's tensors; None stays None."""
    if data is None:
        return None
    return (_SizedPrepared if isinstance(data, Sized) else _Prepared)(data, names, prepare)


class _Prepared:
    def __init__(self, data: Iterable[Any], names: Sequence[str], prepare: Prepare | None) -> None:
        # reason: asked for an iterator, a loader starts its workers and draws from the random state
        if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
            raise DataError(f"data is of type {type(data).__name__}; expected an iterable of (images, labels)")
        self.data, self.names, self.prepare = data, tuple(names), prepare

    def __iter__(self) -> Iterator[Any]:
        for index, batch in enumerate(self.data):
            yield self._read(batch, index)

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def _read(self, batch: Any, index: int) -> Any:
        if self.prepare is not None:
            arguments, targets = self.prepare(batch)
            fields = _fields(arguments)
            if fields is not None:
                tensors = self._named(fields, index)
            else:
                tensors = (arguments,) if isinstance(arguments, Tensor) else tuple(arguments)
            return (tensors,) if targets is None else (tensors, targets)
        first = batch[0] if isinstance(batch, (tuple, list)) and batch and _fields(batch) is None else None
        if (fields := _fields(first)) is not None:  # (a dict of inputs, targets)
            return (self._named(fields, index), *batch[1:])
        if (fields := _fields(batch)) is None:
            return batch
        targets = next((fields[name] for name in TARGETS if name in fields and name not in self.names), None)
        tensors = self._named(fields, index)
        return (tensors,) if targets is None else (tensors, targets)

    def _named(self, fields: Mapping[str, Any], index: int) -> tuple[Tensor, ...]:
        """The model's tensors among the fields of a batch."""
        if all(name in fields for name in self.names):
            return tuple(fields[name] for name in self.names)
        if len(self.names) == 1 and (name := next((name for name in IMAGES if name in fields), None)) is not None:
            return (fields[name],)
        raise DataError(
            f"batch {index} holds {', '.join(map(str, fields))}; the model takes {', '.join(self.names)}. Rename the "
            "fields, or give prepare=, a function from a batch to (arguments of the model, targets)"
        )


class _SizedPrepared(_Prepared):
    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]


def _fields(value: Any) -> Mapping[str, Any] | None:
    """A batch that has names, by its names."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None
