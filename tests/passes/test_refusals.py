"""What is said of models that cannot be captured: the sub-module, the line of source and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx.passes import trace
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.plan.errors import GraphError, InputError, SbsError, TraceError


class Head(nn.Module):
    """Features, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)
        self.kept: Any = None

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


class ByNumber(Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).reshape(2, 4, 4).flatten(1))


class ByLength(Head):
    def forward(self, x: Tensor) -> Tensor:
        y = self.features(x)
        return torch.stack([self.linear(y[i]) for i in range(len(x))])


class ByShape(Head):
    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.kept[0] != x.shape:
            self.kept = x.shape, torch.ones(x.shape[0], 16)
        return self.linear(self.features(x) + self.kept[1])


class ByStride(Head):
    """What is kept is made with a number out of a tensor, which no graph can hold."""

    rows: int | None = 1  # of what is kept; None: one an image

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None or self.last != x.shape:
            self.last = x.shape
            self.kept = torch.full((self.rows or len(x), 16), float(torch.tensor([4.0, 8.0])[1])).log()
        return self.linear(self.features(x) + self.kept)


class Pairs(Head):
    """Two images give one row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).view(-1, 2, 16).mean(1))


class Slope(Head):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.features(x).detach().requires_grad_(True)
            (slope,) = torch.autograd.grad(self.linear(y).square().sum(), y, create_graph=True)
        return slope


class Number(Head):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x)) * torch.arange(int((x > 9).sum()) + 1)[-1:]


class Exporting(Head):
    """A head that leaves its scale out while it is exported."""

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(self.features(x))
        return logits if torch.compiler.is_exporting() else 2 * logits


class Compiling(Head):
    """A head with a second output in a call alone."""

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.linear(self.features(x))
        return logits if torch.compiler.is_compiling() else (logits, x.mean((2, 3)))


class Noisy(Head):
    """A head whose every call is another."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x)) + torch.randn(4)


class Named(Head):
    def forward(self, x: Tensor) -> Any:
        return {"scores": self.linear(self.features(x)), "kind": "softmax"}


class ByStrideAndImage(ByStride):
    rows = None


class ByLoop(Head):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.linear(row) for row in self.features(x)])


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


NUMBER = r"takes it as a number, as len\(x\), int\(...\), comparisons and caches of an earlier call do; write -1 or "
FIXED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a number": (ByNumber, r"reshape\(2, 4, 4\).* calls reshape with the number 2; write -1 or x.shape"),
    "len": (ByLength, rf"range\(len\(x\)\)\]\)\) in sub-module 1 {NUMBER}"),
    "a loop": (ByLoop, r"for row in .* takes it apart into 2 tensors, as a loop over it does; write -1 or x.shape"),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_batch_that_the_model_fixes(name: str) -> None:
    build, message = FIXED[name]
    start = "the model takes a batch of 2 alone, that of the example inputs: test_refusals.py:"
    with pytest.raises(TraceError, match=rf"^{start}\d+ .*{message}") as caught:
        trace(nn.Sequential(nn.Identity(), build()).eval(), images())
    assert caught.value.submodule == "1"
    assert caught.value.reason == "batch is fixed to 2"


@pytest.mark.parametrize("kind", [ByShape, ByStride])
@pytest.mark.parametrize("last", [0, 1, 2, 3])
def test_what_is_kept_by_the_shape_of_the_last_input_is_right_at_any_batch(kind: type[Head], last: int) -> None:
    head = kind().eval()
    if last:
        head(images()[:1].repeat(last, 1, 1, 1))
    kept = head.kept
    graph = trace(head, images())
    assert head.kept is kept
    for batch in (1, 2, 3, 5):
        x = torch.randn(batch, 3, 8, 8)
        assert torch.equal(graph(x), head(x))
    spec = inputs_of(graph)
    assert spec is not None
    assert not spec.guards


def test_what_is_kept_by_image_and_cannot_be_computed_is_refused() -> None:
    with pytest.raises(TraceError, match="ByStrideAndImage at test_refusals.py"):
        trace(ByStrideAndImage().eval(), images())


def test_a_side_that_the_model_fixes_is_told_from_the_batch() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            first = x.flatten(1).sum(1)
            if y.shape[2] == 8:
                first = first + 1
            return first + y.flatten(1).sum(1)

    named = {"x": {0: "batch"}, "y": {0: "batch", 2: "height"}}
    with pytest.raises(TraceError, match=r"a height of 8 alone.*test_refusals.py:\d+ \(if y.shape\[2\] == 8:\) takes"):
        trace(Two(), (images(), images()), dynamic=named)


def scripted(inside: bool) -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU())
    if not inside:
        return torch.jit.script(layers)
    layers[0] = torch.jit.script(layers[0])
    return layers


def quantised(exported: bool) -> Any:
    graph = sbs_fx.compress(nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), images(), budget=0.1).model
    return torch.export.export(graph, (images(),)) if exported else graph


AGAIN, FLOAT = (
    "give the nn.Module that it was made from",
    "is quantised already .* give the float model that it was made",
)
NEXT: dict[str, tuple[Callable[[], Any], type[SbsError], str]] = {
    "scripted": (lambda: scripted(False), TraceError, f"a scripted model cannot be captured again; {AGAIN}"),
    "scripted inside": (lambda: scripted(True), TraceError, "the sub-module '0' is scripted; put the nn.Module that"),
    "static": (lambda: quantised(False), TraceError, FLOAT),
    "exported": (lambda: quantised(True), TraceError, FLOAT),
    "double": (lambda: nn.Conv2d(3, 16, 3).double(), GraphError, r"convert the model with model.float\(\)"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", NEXT)
def test_a_model_of_another_kind_says_what_to_give(name: str) -> None:
    build, error, message = NEXT[name]
    with pytest.raises(error, match=message):
        sbs_fx.compress(build(), images().double() if name == "double" else images(), budget=0.1)


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        (
            Pairs,
            GraphError,
            r"\(reshape\) divides the batch, so that examples share a row of .*; write x.view\(len",
        ),
        (Slope, TraceError, "comes back as a constant, as by torch.autograd.grad inside it; write that as operators"),
        (Named, InputError, "the text 'softmax' is among the model's outputs, which cannot be saved; return tensors"),
        (
            Exporting,
            TraceError,
            "something else while it is exported .*: output 0 differs by 0.5 of its norm; a branch",
        ),
        (Compiling, TraceError, "something else while it is exported .*: 1 tensors instead of 2; a branch of forward"),
        (Number, TraceError, r"keep what int\(...\) or .item\(\) reads there as a plain number of the model"),
    ],
)
def test_what_no_graph_can_hold_is_named(kind: type[Head], error: type[SbsError], said: str) -> None:
    with pytest.raises(error, match=said):
        sbs_fx.compress(kind().eval(), torch.randn(4, 3, 8, 8), budget=0.1)


def test_what_draws_random_numbers_is_not_taken_for_a_branch() -> None:
    assert trace(Noisy(), images()).graph.find_nodes(op="call_function", target=torch.ops.aten.randn.default)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_it_is(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 4)).to(dtype)
    x = images().to(dtype)
    result = sbs_fx.compress(model, x, budget=sbs_fx.Budget(bops=0.3))
    assert result.model(x).dtype == dtype
