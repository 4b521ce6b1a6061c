"""The reading of any iterable of batches.

In: whatever a caller has: a list, a loader, a generator. Out: batches as a model takes them. Holds: everything that can
be wrong with data surfaces as a `DataError` that names the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sbs_fx.plan.errors import DataError

Tensors = tuple[Tensor, ...]  # of a model, by place
_NUMBERS_IN_CACHE = 8 * 3 * 224 * 224  # of inputs


class Batch(NamedTuple):
    """One batch as a model takes it. `targets`: what lies behind the images, None if nothing does; what makes a tensor
    is one, whole numbers int64. They are checked where they are read (`check_labels`, `Task.readable`)."""

    number: int
    inputs: Tensors
    targets: Any


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
        raise DataError(f"data is of type {type(data).__name__}; expected an iterable of (images, labels)") from error
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
    """Tensors and labels of one item, by its form."""
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
    return tensors, _targets(parts[inputs], len(tensors[0]), index) if len(parts) > inputs else None


def _targets(value: Any, images: int, index: int) -> Any:
    """A tensor if it makes one; else what it is, such as file names and boxes. Raises DataError for another number of
    classes."""
    try:
        targets = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value
    if targets.is_quantized or targets.is_meta or targets.layout is not torch.strided:
        return None
    if targets.is_floating_point() or targets.is_complex():
        return targets
    if targets.ndim == 1 and len(targets) != images:
        raise DataError(f"batch {index} has {images} images and {len(targets)} labels; expected one an image")
    return targets.to(torch.int64)


def has_rows(targets: Any, images: int) -> bool:
    """Whether targets are a tensor with a row for each image."""
    return isinstance(targets, Tensor) and targets.shape[:1] == (images,)


def split_inputs(inputs: Tensors, size: int) -> list[Tensors]:
    """Parts of `size` examples each, the last maybe of fewer; a tensor that has no row an example is whole in each."""
    count = len(inputs[0])
    return [
        tuple(x[start : start + size] if x.shape[:1] == (count,) else x for x in inputs)
        for start in range(0, count, size)
    ]


def in_cache(inputs: Tensors) -> list[Tensors]:
    """Examples in parts so small that what a network makes of them stays in the caches of a CPU; images channels last,
    as convolutions are fastest: half the time of batches of 32 and 224 x 224."""
    largest = max(x[:1].numel() for x in inputs)
    parts = split_inputs(inputs, max(1, _NUMBERS_IN_CACHE // largest))
    return [
        tuple(x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in part) for part in parts
    ]


def joined_inputs(batches: Sequence[Tensors]) -> Tensors:
    """Several batches as one: the inverse of `split_inputs`."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        in_rows = all(x.shape[:1] == batch[0].shape[:1] for x, batch in zip(parts, batches, strict=True))
        return torch.cat(list(parts)) if in_rows else parts[0]

    return tuple(join(parts) for parts in zip(*batches, strict=True))


def _form(item: Any) -> str:
    if isinstance(item, Tensor):
        return f"a tensor of shape {tuple(item.shape)}"
    if isinstance(item, (tuple, list)):
        return f"({', '.join(_form(part) for part in item[:4])}{', ...' if len(item) > 4 else ''})"
    return f"a {type(item).__name__}"


def check_labels(labels: Any, classes: int | None, index: int) -> Tensor:
    """The labels of batch `index`, all of them in [0, classes). Raises DataError if missing or out of range."""
    if not isinstance(labels, Tensor):
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
