"""The reading of any iterable of batches.

In: whatever a caller has: a list, a loader, a generator. Out: batches as a model takes them. Holds: everything that can
be wrong with data surfaces as a `DataError` that names the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbs_fx.plan.errors import DataError


class Batch(NamedTuple):
    """One batch as a model takes it. `labels`: what lies behind the images, if it is a tensor of as many rows: int64
    (batch,) for classes; None if there is none. They are checked where they are read (`check_labels`)."""

    number: int
    inputs: tuple[Tensor, ...]
    labels: Tensor | None


def read_batches(data: Iterable[Any], *, inputs: int = 1, max_batches: int | None = None) -> Iterator[Batch]:
    """Go through the first `max_batches` batches of any iterable.

    Args:
        data: yields tensors, (images, labels), or tuples of `inputs` tensors, with labels behind them or not.
        inputs: how many tensors the model takes.
        max_batches: stop after so many; the iterable is not asked for more. None: all.

    Raises:
        DataError: the iterable is empty or raises (chained), or a batch is of another form or holds no image; names
            the batch by its number from 0.
    """
    try:
        iterator = iter(data)
    except TypeError as error:
        raise DataError(f"data is a {type(data).__name__}; expected an iterable of (images, labels)") from error
    index = 0
    while max_batches is None or index < max_batches:
        try:
            item = next(iterator)
        except StopIteration:
            break
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the data raised {type(error).__name__} at batch {index}: {error}; mend the data or give fewer batches"
            ) from error
        yield Batch(index, *_parts(item, inputs, index))
        index += 1
    if not index and max_batches != 0:
        raise DataError(
            "the data holds no batch; expected at least one of (images, labels). An iterator that was read "
            "before is empty: give a list or a loader"
        )


def start_epoch(data: Iterable[Any], epoch: int) -> None:
    """Make the next pass through the data that of epoch `epoch`, whatever was read before, if the data can be told."""
    if not hasattr(data, "set_epoch"):
        return
    try:
        data.set_epoch(epoch)
    except Exception as error:
        raise DataError(
            f"the data raised {type(error).__name__} from set_epoch({epoch}): {error}; mend it, or give data without it"
        ) from error


def _parts(item: Any, inputs: int, index: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """Inputs and labels of one item, by its form."""
    parts = tuple(item) if isinstance(item, (tuple, list)) else (item,)
    if parts and isinstance(parts[0], (tuple, list)):
        parts = (*parts[0], *parts[1:])
    tensors = parts[:inputs]
    if len(tensors) < inputs or not all(isinstance(x, Tensor) for x in tensors):
        raise DataError(
            f"batch {index} is {_form(item)}; expected {inputs} tensor{'s' * (inputs > 1)}, with labels "
            "behind or without"
        )
    if odd := [x for x in tensors if x.layout is not torch.strided or x.is_quantized or x.is_meta]:
        raise DataError(
            f"batch {index} is {_form(item)} of layout {odd[0].layout} and dtype {odd[0].dtype} on {odd[0].device}; "
            "expected dense tensors with values, not quantised"
        )
    if any(x.ndim == 0 or len(x) == 0 for x in tensors):
        raise DataError(f"batch {index} is {_form(item)}; expected at least one image in each batch")
    return tensors, _labels(parts[inputs], len(tensors[0]), index) if len(parts) > inputs else None


def _labels(value: Any, images: int, index: int) -> Tensor | None:
    """A tensor with a row for each image of what lies behind them; None for what is none, such as file names and boxes.
    Raises DataError for another number of classes."""
    try:
        labels = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not labels.is_floating_point() and not labels.is_complex()
    if labels.is_quantized or labels.is_meta or labels.layout is not torch.strided:
        return None
    if labels.shape[:1] != (images,):
        if whole and labels.ndim == 1:
            raise DataError(f"batch {index} has {images} images and {len(labels)} labels; expected one an image")
        return None
    return labels.to(torch.int64) if whole else labels


def _form(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        return f"({', '.join(_form(part) for part in item[:4])}{', ...' if len(item) > 4 else ''})"
    return f"a {type(item).__name__}"


def check_labels(labels: Tensor | None, classes: int | None, index: int) -> Tensor:
    """The labels of batch `index`, all of them in [0, classes). Raises DataError if missing or out of range."""
    if labels is None:
        raise DataError(f"batch {index} has no labels; expected (images, labels)")
    if labels.is_floating_point() or labels.is_complex() or labels.ndim != 1:
        raise DataError(
            f"labels of batch {index} have dtype {labels.dtype} and shape {tuple(labels.shape)}; expected whole "
            "numbers, one an image"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        wrong = low if low < 0 else high
        raise DataError(
            f"label {wrong} in batch {index}; expected 0 to {'...' if classes is None else classes - 1}. "
            "Does the model have another number of classes than the data?"
        )
    return labels
