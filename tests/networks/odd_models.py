"""Small models of every odd kind, each with the inputs that it takes: what may be given to the public calls.

`ODD[name]()` is a new model in training mode as its maker left it, with example inputs; those of `PLAIN` compress.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from tests.networks.models import Recipe, step


class Odd(NamedTuple):
    model: Any
    inputs: Any


class Made(nn.Module):
    """A linear layer from 4 to 8 features, and a function of it, the input and whatever else comes in."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 8), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.layer(x), x)


class Several(nn.Module):
    """Two tensors, one of which may be missing, and settings by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0, mask: Any = None) -> Tensor:
        y = self.left(x) * scale
        y = y if other is None else y + self.right(other)
        return self.head(torch.relu(y if mask is None else y * mask))


class Variadic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, *xs: Tensor, **more: Tensor) -> Tensor:
        return self.layer(sum([*xs, *more.values()]))  # type: ignore[arg-type]


class NoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))

    def forward(self) -> Tensor:
        return self.weight * 2


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Unsound(nn.Module):
    """Fails while it runs, in a way of its own."""

    def __init__(self, error: BaseException, batch: int | None = None) -> None:
        super().__init__()
        self.layer, self.error, self.batch = nn.Linear(4, 3), error, batch

    def forward(self, x: Tensor) -> Tensor:
        if self.batch is None or len(x) == self.batch:
            raise self.error
        return self.layer(x)


class Uncopied(nn.Module):
    """Holds what can be neither copied nor pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.lock = nn.Linear(4, 3), threading.Lock()
        self.stream = (i for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with self.lock:
            return self.layer(x)


class Counted(nn.Module):
    """Buffers of whole numbers, bools and complex numbers, and one that each call changes."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.layer, self.reads = nn.Linear(4, 3), reads
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("turn", torch.tensor([1j]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) + self.calls if self.reads else self.layer(x)


@dataclass
class Answer:
    logits: Tensor
    note: str | None = None


def _spoilt(name: str, value: float) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3))
    net(torch.randn(2, 3, 5, 5))
    with torch.no_grad():
        dict([*net.named_parameters(), *net.named_buffers()])[name].view(-1)[0] = value
    return net


def _filled(value: float) -> nn.Module:
    net = classifier()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def classifier() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def images() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _hooked() -> nn.Module:
    net = classifier()
    net[0].register_forward_hook(lambda module, inputs, output: output * 2)
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return net


def _speaking(y: Tensor, x: Tensor) -> Tensor:
    sys.stderr.write("spoken")
    warnings.warn("warned", stacklevel=1)
    return y


def _random(y: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return F.dropout(y, 0.5, training=True) + torch.rand(8)


def _contexts(y: Tensor, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return y @ y.t()


def _default_dtype(y: Tensor, x: Tensor) -> Tensor:
    torch.set_default_dtype(torch.float64)
    return y + torch.ones(8, dtype=y.dtype)


def _in_place(y: Tensor, x: Tensor) -> Tensor:
    x.mul_(2)
    return y.relu_().add_(1)


def _made(function: Callable[..., Any]) -> Callable[[], Odd]:
    return lambda: Odd(Made(function), torch.randn(2, 4))


def _plain(make: Callable[[], Any], *shape: int) -> Callable[[], Odd]:
    return lambda: Odd(make(), torch.randn(shape or (2, 4)))


_RECIPES = (
    Recipe((step("conv"),)), Recipe((step("residual"), step("squeeze_excite")), stem="conv"),
    Recipe((step("attention"), step("mlp")), head="norm"), Recipe((step("depthwise"),), head="features"),
    Recipe((step("class_token"), step("linear")), channels=4), Recipe((step("dense"),), head="flatten", height=9),
)  # fmt: skip

# Models that can be compressed.
PLAIN: dict[str, Callable[[], Odd]] = {
    "classifier": _plain(classifier),
    "images": _plain(images, 2, 3, 8, 8),
    **{f"recipe {i}": (lambda r=r: Odd(r.build(), r.example())) for i, r in enumerate(_RECIPES)},  # type: ignore[misc]
    "several": lambda: Odd(Several(), (torch.randn(2, 4), torch.randn(2, 4))),
    "keywords": lambda: Odd(Several(), {"x": torch.randn(2, 4), "scale": 2.0, "mask": torch.ones(2, 8)}),
    "none": lambda: Odd(Several(), (torch.randn(2, 4), None)),
    "variadic": lambda: Odd(Variadic(), (torch.randn(2, 4), torch.randn(2, 4), torch.randn(2, 4))),
    "recurrent": lambda: Odd(Recurrent(), torch.randn(2, 6, 4)),
    "embedded": lambda: Odd(
        nn.Sequential(nn.Embedding(9, 8), nn.Flatten(), nn.Linear(32, 3)), torch.arange(8).view(2, 4)
    ),
    "one channel": _plain(lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)), 2, 1, 4, 4),
    "frozen": _plain(lambda: classifier().requires_grad_(False)),
    "parametrised": _plain(lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.Linear(8, 3))),
    "data parallel": _plain(lambda: nn.DataParallel(classifier())),
    "hooked": _plain(_hooked),
    "uncopied": _plain(Uncopied),
    "counting": _plain(lambda: Counted(False)),
    "dict": _made(lambda y, x: {"logits": y, "features": {"mean": y.mean(1)}}),
    "nested": _made(lambda y, x: [y, (y + 1, None), {"a": [y.sum(1)]}, 3]),
    "twice": _made(lambda y, x: (y, y, x)),
}  # fmt: skip

_ODDER: dict[str, Callable[[], Odd]] = {
    "nan weight": _plain(lambda: _spoilt("0.weight", torch.nan), 2, 3, 5, 5),
    "infinite bias": _plain(lambda: _spoilt("3.bias", torch.inf), 2, 3, 5, 5),
    "nan statistic": _plain(lambda: _spoilt("1.running_mean", torch.nan), 2, 3, 5, 5),
    "negative variance": _plain(lambda: _spoilt("1.running_var", -1.0), 2, 3, 5, 5),
    "huge": _plain(lambda: _filled(1e30)),
    "tiny": _plain(lambda: _filled(1e-40)),
    "zero": _plain(lambda: _filled(0.0)),
    "half": lambda: Odd(classifier().half(), torch.randn(2, 4).half()),
    "bfloat16": lambda: Odd(classifier().bfloat16(), torch.randn(2, 4).bfloat16()),
    "double": lambda: Odd(images().double(), torch.randn(2, 3, 8, 8).double()),
    "mixed": lambda: Odd(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3).half()), torch.randn(2, 4)),
    "complex": lambda: Odd(nn.Linear(4, 3, dtype=torch.complex64), torch.randn(2, 4, dtype=torch.complex64)),
    "meta": _plain(lambda: classifier().to("meta")),
    "lazy": _plain(lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())),
    "no channel": _plain(lambda: nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))),
    "no parameter": _plain(nn.ReLU),
    "identity": _plain(nn.Identity),
    "empty": _plain(nn.Sequential),
    "no forward": _plain(lambda: nn.ModuleList([nn.Linear(4, 3)])),
    "bare": _plain(nn.Module),
    "no input": lambda: Odd(NoInput(), ()),
    "scripted": _plain(lambda: torch.jit.script(classifier())),
    "scripted within": _plain(lambda: nn.Sequential(nn.Linear(4, 4), torch.jit.script(classifier()))),
    "traced": _plain(lambda: torch.jit.trace(classifier().eval(), torch.randn(2, 4))),
    "compiled": _plain(lambda: torch.compile(classifier())),
    "graph": _plain(lambda: torch.fx.symbolic_trace(classifier())),
    "program": _plain(lambda: torch.export.export(classifier().eval(), (torch.randn(2, 4),))),
    "no model": _plain(lambda: None),
    "function": _plain(lambda: torch.relu),
    "unknown name": _plain(lambda: "no_such_model_of_anyone"),
    "state": _plain(lambda: classifier().state_dict()),
    "raises": _plain(lambda: Unsound(RuntimeError("as asked"))),
    "raises nothing to say": _plain(lambda: Unsound(KeyError())),
    "asserts": _plain(lambda: Unsound(AssertionError("a\nb"))),
    "stops": _plain(lambda: Unsound(StopIteration())),
    "raises at one": _plain(lambda: Unsound(ValueError("one"), batch=1)),
    "raises at two": _plain(lambda: Unsound(ValueError("two"), batch=2)),
    "counting on": _plain(lambda: Counted(True)),
    "constant": _made(lambda y, x: torch.ones(2, 3)),
    "constant of a batch": _made(lambda y, x: torch.zeros(len(x), 3)),
    "same for all": _made(lambda y, x: y * 0 + 1),
    "whole numbers": _made(lambda y, x: y.argmax(1)),
    "bools": _made(lambda y, x: y > 0),
    "dataclass": _made(lambda y, x: Answer(y, "note")),
    "nothing": _made(lambda y, x: None),
    "number": _made(lambda y, x: 3),
    "text": _made(lambda y, x: "text"),
    "no outputs": _made(lambda y, x: ()),
    "object": _made(lambda y, x: object()),
    "scalar": _made(lambda y, x: y.mean()),
    "item": _made(lambda y, x: y.mean().item()),
    "complex output": _made(lambda y, x: torch.fft.fft(y)),
    "nan output": _made(lambda y, x: y / 0 * 0),
    "the input": _made(lambda y, x: x),
    "no batch": _made(lambda y, x: y.sum(0)),
    "batch last": _made(lambda y, x: y.t()),
    "by data": _made(lambda y, x: y if y.sum() > 0 else -y),
    "by rows": _made(lambda y, x: y[y[:, 0] > 0]),
    "by batch": _made(lambda y, x: y * 2 if len(x) > 3 else y),
    "one batch": _made(lambda y, x: y.view(2, 8)),
    "even batches": _made(lambda y, x: y.view(-1, 2, 8).mean(1)),
    "changed input": _made(_in_place),
    "speaking": _made(_speaking),
    "random": _made(_random),
    "contexts": _made(_contexts),
    "default dtype": _made(_default_dtype),
    "numpy": _made(lambda y, x: torch.from_numpy(y.detach().numpy() + 1)),
    "gradient": _made(lambda y, x: torch.autograd.grad(y.sum(), x.requires_grad_())[0]),
    "sparse": _made(lambda y, x: y.to_sparse()),
    "sorted": _made(lambda y, x: torch.sort(y, 1)),
    "unknown size": _made(lambda y, x: torch.unique(y)),
}  # fmt: skip

ODD: dict[str, Callable[[], Odd]] = {**PLAIN, **_ODDER}


def made(name: str) -> Odd:
    """The same model and inputs each time, whatever the random state, which stays as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return ODD[name]()
