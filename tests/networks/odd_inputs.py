"""Odd inputs and odd data, made from sound ones: what may be given to a call in their place, by name."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

# -- tensors -----------------------------------------------------------------------------------------------------------


def _spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    if x.is_floating_point() and x.numel():
        x.view(-1)[0] = value
    return x


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def _first(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x, x])[:count] if x.ndim else x


# What stands in the place of a tensor. The first ones are as good as it.
TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "same": lambda x: x,
    "batch of 5": lambda x: _first(x, 5),
    "batch of 1": lambda x: _first(x, 1),
    "strided": _strided,
    "expanded": lambda x: x[:1].expand(x.shape) if x.ndim else x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "parameter": lambda x: torch.nn.Parameter(x.clone()) if x.is_floating_point() else x,
    "requires grad": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
    "no leaf": lambda x: x.clone().requires_grad_() * 2 if x.is_floating_point() else x,
    "zeros": torch.zeros_like,
    "batch of 0": lambda x: _first(x, 0),
    "numpy": lambda x: x.numpy(),
    "list": lambda x: x.tolist(),
    "half": lambda x: x.half(),
    "double": lambda x: x.double(),
    "whole": lambda x: x.to(torch.int64),
    "bytes": lambda x: x.to(torch.uint8),
    "bools": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "nan": lambda x: _spoilt(x, torch.nan),
    "infinite": lambda x: _spoilt(x, torch.inf),
    "huge": lambda x: x * 1e38 if x.is_floating_point() else x,
    "0-d": lambda x: x.flatten()[0],
    "1-d": lambda x: x.flatten(),
    "no batch dimension": lambda x: x[0] if x.ndim else x,
    "a dimension more": lambda x: x[None],
    "a dimension after": lambda x: x[..., None],
    "wider": lambda x: torch.cat([x, x], -1) if x.ndim else x,
    "narrower": lambda x: x[..., :1],
    "no width": lambda x: x[..., :0],
    "fewer channels": lambda x: x[:, :1] if x.ndim > 1 else x,
    "wrapped": lambda x: (x,),
    "in a dict": lambda x: {"x": x},
    "none": lambda x: None,
    "number": lambda x: 3,
    "nan number": lambda x: float("nan"),
    "text": lambda x: "x",
    "object": lambda x: object(),
    "type": lambda x: torch.Tensor,
    "generator": lambda x: (row for row in x),
    "set": lambda x: {x},
    "nested": lambda x: [[x], {"a": (x, None)}],
}


def _call(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) and inputs else (inputs,)


# What stands in the place of all example inputs.
CALLS: dict[str, Callable[[Any], Any]] = {
    "same": lambda inputs: inputs,
    "nothing": lambda inputs: None,
    "no argument": lambda inputs: (),
    "no name": lambda inputs: {},
    "one more": lambda inputs: (*_call(inputs), torch.randn(2, 4)),
    "none more": lambda inputs: (*_call(inputs), None),
    "one less": lambda inputs: _call(inputs)[:-1],
    "as a list": lambda inputs: list(_call(inputs)),
    "by name": lambda inputs: {"x": _call(inputs)[0]},
    "by input": lambda inputs: {"input": _call(inputs)[0]},
    "by a wrong name": lambda inputs: {"no such name": _call(inputs)[0]},
    "by a number": lambda inputs: {3: _call(inputs)[0]},
    "number": lambda inputs: 3,
    "text": lambda inputs: "text",
    "bytes": lambda inputs: b"bytes",
    "shape": lambda inputs: (2, 4),
    "object": lambda inputs: object(),
    "generator": lambda inputs: iter(_call(inputs)),
}


def odd_inputs(inputs: Any, call: str, tensor: str, place: int = 0) -> Any:
    """Example inputs with one of their tensors in another form, and then the whole call. What cannot be made stays."""
    leaves, spec = pytree.tree_flatten(inputs)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if places:
        at = places[place % len(places)]
        with contextlib.suppress(RuntimeError, TypeError, IndexError):
            leaves[at] = TENSORS[tensor](leaves[at])
    return CALLS[call](pytree.tree_unflatten(leaves, spec))


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    pixel_values: Any
    labels: Any


class Pair(NamedTuple):
    x: Any
    y: Any


class Loader:
    """Batches that say more of themselves than a list does, and may be wrong."""

    def __init__(self, batches: list[Any], length: Any = None, fails: str = "") -> None:
        self.batches, self.length, self.fails = batches, length, fails

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return len(self.batches) if self.length is None else self.length

    def __iter__(self) -> Iterator[Any]:
        if self.fails == "iter":
            raise OSError("the disk is gone")
        yield from self.batches[:1]
        if self.fails == "midway":
            raise KeyError("a file is missing")
        yield from self.batches[1:]

    def set_epoch(self, epoch: int) -> None:
        if self.fails == "epoch":
            raise RuntimeError("no epochs here")


class Indexed:
    """Batches by index, until one that is not there."""

    def __init__(self, batches: list[Any], error: type[Exception]) -> None:
        self.batches, self.error = batches, error

    def __getitem__(self, index: int) -> Any:
        if index < len(self.batches):
            return self.batches[index]
        raise self.error(index)


# A batch of (images, labels) in another form.
BATCHES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pair": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "images": lambda x, y: x,
    "alone": lambda x, y: (x,),
    "dict": lambda x, y: {"pixel_values": x, "labels": y},
    "other dict": lambda x, y: {"image": x, "label": y, "file": ["a"] * len(x)},
    "by argument": lambda x, y: {"x": x, "y": y},
    "odd keys": lambda x, y: {0: x, None: y, (1, 2): y},
    "dict of odd": lambda x, y: {"pixel_values": x.tolist(), "labels": object()},
    "empty dict": lambda x, y: {},
    "dict in a pair": lambda x, y: ({"x": x}, y),
    "dataclass": lambda x, y: Sample(x, y),
    "named tuple": lambda x, y: Pair(x, y),
    "several": lambda x, y: (x, x, y),
    "several together": lambda x, y: ((x, x), y),
    "label list": lambda x, y: (x, y.tolist()),
    "label numpy": lambda x, y: (x, y.numpy()),
    "label texts": lambda x, y: (x, ["a"] * len(y)),
    "label none": lambda x, y: (x, None),
    "label float": lambda x, y: (x, y.float() + 0.5),
    "label nan": lambda x, y: (x, y.float() * torch.nan),
    "label shares": lambda x, y: (x, torch.full((len(y), 3), 1 / 3)),
    "label complex": lambda x, y: (x, y + 0j),
    "label bools": lambda x, y: (x, y > 0),
    "label high": lambda x, y: (x, y + 100),
    "label negative": lambda x, y: (x, y - 100),
    "label huge": lambda x, y: (x, [2**70] * len(y)),
    "label scalar": lambda x, y: (x, 1),
    "label matrix": lambda x, y: (x, y[:, None].expand(-1, 2)),
    "label meta": lambda x, y: (x, y.to("meta")),
    "label few": lambda x, y: (x, y[:-1]),
    "label of nothing": lambda x, y: (x, y[:0]),
    "label dicts": lambda x, y: (x, [{"boxes": y}]),
    "none": lambda x, y: None,
    "empty": lambda x, y: (),
    "nones": lambda x, y: (None, None),
    "number": lambda x, y: 3,
    "text": lambda x, y: "text",
    "set": lambda x, y: {1, 2},
    "object": lambda x, y: object(),
}

# Sound batches, and those of another form, as a whole.
STREAMS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda batches: (batch for batch in batches),
    "empty": lambda batches: [],
    "empty generator": lambda batches: iter(()),
    "loader": Loader,
    "longer than said": lambda batches: Loader(batches, 1),
    "shorter than said": lambda batches: Loader(batches, 9),
    "no length": lambda batches: Loader(batches, TypeError("no length")),
    "no length, not said": lambda batches: Loader(batches, NotImplementedError()),
    "raises at once": lambda batches: Loader(batches, fails="iter"),
    "raises midway": lambda batches: Loader(batches, fails="midway"),
    "raises by epoch": lambda batches: Loader(batches, fails="epoch"),
    "by index": lambda batches: Indexed(batches, IndexError),
    "by index, wrong": lambda batches: Indexed(batches, KeyError),
    "a dict": lambda batches: dict(enumerate(batches)),
    "first": lambda batches: batches[0] if batches else None,
    "map": lambda batches: (batch["no such key"] for batch in batches),
    "chain": lambda batches: itertools.chain(batches, [None]),
    "number": lambda batches: 3,
    "text": lambda batches: "text",
    "function": lambda batches: lambda: batches,
    "class": lambda batches: list,
    "file": lambda batches: np.zeros((2, 3)),
}


def odd_data(inputs: Any, stream: str, batch: str, tensor: str, count: int) -> Any:
    """`count` batches made from the first tensor of example inputs, the last one of another form."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    x = leaves[0] if leaves else torch.randn(2, 4)
    y = torch.arange(len(x)) % 3
    batches: list[Any] = [(x, y) for _ in range(count - 1)]
    try:
        other = TENSORS[tensor](x)
    except (RuntimeError, TypeError, IndexError):
        other = x
    y = torch.arange(len(other)) % 3 if isinstance(other, Tensor) and other.ndim else y
    try:
        batches.append(BATCHES[batch](other, y))
    except (AttributeError, TypeError, RuntimeError):  # reason: not every form can be made of what is no plain tensor
        batches.append(other)
    return STREAMS[stream](batches)


def loaders() -> dict[str, Any]:
    """Those of torch, over four sound images of four features."""
    data = TensorDataset(torch.randn(4, 4), torch.arange(4) % 3)
    return {"batched": DataLoader(data, 2, shuffle=True), "single": DataLoader(data, 1), "samples": data}
