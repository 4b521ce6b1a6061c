"""One sub-module in place of the whole: what it is called with, what is refused, and the whole with it."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import sbs_fx
from sbs_fx.passes import trace
from sbs_fx.passes.capture.part import Part
from sbs_fx.plan.errors import DataError, InputError, TraceError
from tests.oracles.state import state_of


class Backbone(nn.Module):
    """Two stages, maps by name, and an attribute that the whole reads."""

    def __init__(self, branches: bool = False) -> None:
        super().__init__()
        self.stride, self.branches = 4, branches
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())

    def forward(self, x: Tensor, scale: float = 1.0, *, shift: dict[str, Tensor] | None = None) -> Any:
        low = self.first(x * scale)
        if self.branches and low.mean() < -1:
            low = -low
        if shift is not None:
            low = low + shift["by"]
        return OrderedDict(low=low, high=self.second(low))


class Detector(nn.Module):
    """Takes a list of images; from boxes over a threshold it keeps those that overlap no better one."""

    def __init__(self, branches: bool = False, by_name: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone, self.head, self.by_name = Backbone(branches), nn.Conv2d(32, 5, 1), by_name

    def features(self, x: Tensor) -> Any:
        if self.by_name:
            return self.backbone(x, 0.5, shift={"by": x.mean((1, 2, 3), keepdim=True)})
        return self.backbone(x)

    def forward(self, images: Any, targets: Any = None) -> list[dict[str, Tensor]]:
        assert not self.training
        found = []
        for boxes in self.head(self.features(torch.stack(list(images)))["high"]).flatten(2).transpose(1, 2):
            boxes = boxes[boxes[:, 4] > boxes[:, 4].median()]
            kept: list[int] = []
            for i in boxes[:, 4].argsort(descending=True).tolist():
                if all((boxes[i, 0] - boxes[j, 0]).abs().item() > 0.01 for j in kept):
                    kept.append(i)
            found.append({"boxes": boxes[kept, :4] * self.backbone.stride, "scores": boxes[kept, 4]})
        return found


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def listed(batch: int = 2, seed: int = 0) -> list[Tensor]:
    return list(images(batch, seed))


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are of one structure, with the same values."""
    (left, form), (right, other) = (torch.utils._pytree.tree_flatten(value) for value in (a, b))
    return form == other and all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


# -- the part and the whole --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_name", [False, True])
def test_a_part_is_compressed_and_stands_in_the_whole(by_name: bool, tmp_path: Path) -> None:
    model = Detector(by_name=by_name).train()
    before = state_of(model)
    result = sbs_fx.compress(model, (listed(),), part="backbone", budget=0.1)
    whole = sbs_fx.with_part(model, "backbone", result.model)
    assert state_of(model) == before
    assert "note: this is the part 'backbone' (Backbone), 98.9 % of the model's parameters" in str(result)
    assert not whole.training
    for batch in (1, 2, 3):
        found = whole(listed(batch))
        assert len(found) == batch
        assert all(f["boxes"].shape == (len(f["scores"]), 4) for f in found)
    with pytest.raises(InputError, match="'x' has size 20 in dimension 2.*the graph was made for 16 there"):
        whole([torch.randn(3, 20, 16)])
    result.save(tmp_path)
    again = sbs_fx.apply(model, sbs_fx.Policy.load(tmp_path / "policy.json"), (listed(),), part="backbone")
    assert same(sbs_fx.with_part(model, "backbone", again.model)(listed()), whole(listed()))
    if not by_name:  # a loaded graph takes tensors alone
        loaded = sbs_fx.with_part(model, "backbone", sbs_fx.load(tmp_path / "model.pt2"))
        assert same(loaded(listed()), whole(listed()))


@pytest.mark.parametrize("by_name", [False, True])
def test_the_whole_with_a_float_part_is_the_whole(by_name: bool) -> None:
    model = Detector(by_name=by_name).eval()
    part = Part(model, "backbone", (listed(),))
    whole = sbs_fx.with_part(model, "backbone", trace(part.module, part.call))
    assert same(whole(listed(3, 1)), model(listed(3, 1)))
    assert whole.backbone is not model.backbone
    assert whole.head.weight is not model.head.weight


def test_the_image_size_of_a_part_may_change() -> None:
    model = Detector().eval()
    result = sbs_fx.compress(model, (listed(),), part="backbone", budget=0.1, dynamic=("batch", "height", "width"))
    assert len(sbs_fx.with_part(model, "backbone", result.model)([torch.randn(3, 24, 32)])) == 1


def test_wrappers_and_names_of_timm() -> None:
    model = nn.DataParallel(Detector()).eval()
    for path in ("backbone", "module.backbone"):
        part = Part(model, path, (listed(),))
        assert part.module is model.module.backbone
        whole = sbs_fx.with_part(model, path, trace(part.module, part.call))
        assert isinstance(whole, nn.DataParallel)
        assert same(whole(listed()), model(listed()))
    result = sbs_fx.compress(timm.create_model("test_resnet"), part="layer2", budget=0.2)
    assert "this is the part 'layer2'" in str(result)


def test_a_part_that_the_model_holds_twice_is_replaced_twice() -> None:
    model = Detector().eval()
    model.other, model.call = model.backbone, model.backbone.forward  # type: ignore[assignment]
    part = Part(model, "other", (listed(),))
    whole = sbs_fx.with_part(model, "other", trace(part.module, part.call))
    assert whole.other is whole.backbone
    assert same(whole(listed()), model(listed()))


def test_inputs_that_a_forward_writes_into_stay_as_they_are() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = x.mul_(2)
            z = self.part(y)
            y.zero_()
            return z

    x = images()
    part = Part(Writes().eval(), "part", x)
    assert torch.equal(x, images())
    assert torch.equal(part.call.args[0], 2 * x)


# -- data of the whole -------------------------------------------------------------------------------------------------


def prepared(batch: dict[str, Any]) -> Any:
    return (batch["pictures"],), None


BATCHES: dict[str, tuple[Any, Callable[[Tensor], Any], Any]] = {
    "a list": ((listed(),), lambda x: list(x), None),
    "a list and targets": ((listed(),), lambda x: (list(x), [{"boxes": torch.zeros(0, 4)}] * len(x)), None),
    "a list of both": ((listed(),), lambda x: [list(x), [{}] * len(x)], None),
    "one tensor for a list": ((listed(),), lambda x: (x, torch.zeros(len(x))), None),
    "a tensor": (images(), lambda x: x, None),
    "a tensor and labels": (images(), lambda x: (x, torch.zeros(len(x))), None),
    "arguments": (images(), lambda x: ((x,), torch.zeros(len(x))), None),
    "by the argument's name": ((listed(),), lambda x: {"images": list(x), "file": "a.png"}, None),
    "by a usual name": ({"images": images()}, lambda x: {"pixel_values": x, "labels": torch.zeros(len(x))}, None),
    "prepared": ((listed(),), lambda x: {"pictures": list(x)}, prepared),
}  # fmt: skip


OPTIONS: dict[str, Any] = {"budget": 0.1, "method": "uniform"}


@pytest.fixture(scope="module")
def alone() -> sbs_fx.Result:
    data = [images(3, seed) for seed in (1, 2)]
    return sbs_fx.compress(Detector().eval().backbone, images(), data=data, task="matching", **OPTIONS)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_the_whole_are_batches_of_the_part(name: str, alone: sbs_fx.Result) -> None:
    """As if the part had been compressed by itself, on what it gets."""
    inputs, batch, prepare = BATCHES[name]
    model = Detector().eval()
    seen = [images(3, seed) for seed in (1, 2)]
    before = state_of(model)
    of_whole = [batch(x) for x in seen]
    result = sbs_fx.compress(model, inputs, part="backbone", data=of_whole, prepare=prepare, **OPTIONS)
    assert state_of(model) == before
    assert same(result.model(images(4, 3)), alone.model(images(4, 3)))


def test_the_forward_ends_at_the_part_and_labels_are_not_read() -> None:
    class Guarded(Detector):
        reached = 0

        def forward(self, images: Any, targets: Any = None) -> Any:
            try:
                found = super().forward(images)
            except Exception as error:  # reason: the end of a forward passes by
                raise AssertionError from error
            type(self).reached += 1
            return found

    model = Guarded().eval()
    data = [(listed(2, seed), "no labels") for seed in range(3)]
    config = sbs_fx.Config(epochs=1)
    result = sbs_fx.compress(
        model, (listed(),), part="backbone", data=data, method="uniform", budget=0.2, config=config
    )
    assert Guarded.reached == 0  # as it was before: what counts is restored
    assert "note" in str(result)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((images()[0], 0), r"batch 0 does not begin with what the example inputs have, \(\(a tensor of 3 dimensions, "),
        ({"pictures": images()}, "batch 0 holds pictures; the model takes images"),
        (
            [images()[0], torch.randn(3, 20, 16)],
            r"batch 0: the model does not run on \(3, 16, 16\), \(3, 20, 16\): RuntimeError: .*or give prepare=",
        ),
        ([torch.randn(3, 12, 16)], "batch 0.*16, 16"),
    ],
)
def test_batches_that_the_whole_does_not_take(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sbs_fx.compress(Detector(), (listed(),), part="backbone", data=[batch], method="uniform", budget=0.1)


def test_validation_data_are_refused() -> None:
    with pytest.raises(InputError, match="validation= is judged by labels, which do not belong to a part's outputs"):
        sbs_fx.compress(Detector(), (listed(),), part="backbone", data=[listed()], validation=[listed()])


# -- parts that are none -----------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """Calls its parts not at all, twice on one shape, twice on two, or once."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.pair, self.pyramid, self.once = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.blocks = nn.ModuleList([nn.Conv2d(3, 3, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.pair(self.pair(x)) + self.pyramid(x)
        return self.once(x).mean() + self.pyramid(x[..., ::2]).mean() + self.blocks[0](x).mean()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("unused", "the model's forward does not call its part 'unused' (lists of modules are never called, and a "
         "method other than its forward does not count); a part is called once: name one that is, such as 'once', "
         "'blocks.0'"),
        ("blocks", "the model's forward does not call its part 'blocks'"),
        ("pair", "the model's forward calls its part 'pair' 2 times, each time on (2, 3, 16, 16); a part is "
         "called once: "),
        ("pyramid", "calls its part 'pyramid' 2 times, on differing shapes: (2, 3, 16, 16) and (2, 3, 16, 8); a part "
         "is called once: name one that is, such as 'once', 'blocks.0'"),
        ("ponce", "the model has no sub-module 'ponce' to be its part; there are once"),
        ("", "the model has no sub-module '' to be its part; there are unused, pair, pyramid, once, blocks"),
    ],
)  # fmt: skip
def test_parts_that_are_not_called_once(path: str, message: str) -> None:
    model = Calls().train()
    before = state_of(model)
    with pytest.raises(InputError, match=re.escape(message)):
        sbs_fx.compress(model, images(), part=path)
    assert state_of(model) == before


def test_models_and_inputs_that_have_no_parts() -> None:
    program = torch.export.export(nn.Sequential(nn.Conv2d(3, 4, 1)), (images(),))
    with pytest.raises(InputError, match=r"the model is a ExportedProgram; parts are sub-modules of an nn.Module"):
        sbs_fx.compress(program, images(), part="0")
    with pytest.raises(
        InputError, match=r"the model does not run on \(2, 4, 16, 16\): RuntimeError: .*whole model acc"
    ):
        sbs_fx.compress(Detector(), torch.randn(2, 4, 16, 16), part="backbone")

    class Opaque(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Identity()

        def forward(self, x: Tensor) -> Any:
            return self.part({1, 2}), x

    with pytest.raises(InputError, match="the part 'part' cannot be called alone: there is no tensor"):
        sbs_fx.compress(Opaque(), images(), part="part")


def test_a_model_that_cannot_be_copied() -> None:
    model = Detector().eval()
    model.cache = model.head.weight * 2
    with pytest.raises(InputError, match=r"Detector cannot be copied \(RuntimeError.*model.set_submodule\('backbone'"):
        sbs_fx.with_part(model, "backbone", model.backbone)


# -- what a refusal names ----------------------------------------------------------------------------------------------


def test_a_refusal_names_what_can_be_compressed() -> None:
    model = Detector().train()
    before = state_of(model)
    with pytest.raises(TraceError) as caught:
        sbs_fx.compress(model, (listed(),))
    assert state_of(model) == before
    assert str(caught.value).endswith(
        ". What can be compressed of this model is its part 'backbone', 99 % of its parameters: "
        'sbs_fx.compress(model, example_inputs, part="backbone")'
    )
    assert caught.value.parts == ("backbone",)
    assert caught.value.reason
    sbs_fx.compress(model, (listed(),), part=caught.value.parts[0], budget=0.1)


@pytest.mark.parametrize("part", [None, "backbone"])
def test_a_stage_within_a_part_that_depends_on_data(part: str | None) -> None:
    model = Detector(branches=True).eval()
    with pytest.raises(TraceError, match=r"sub-module Backbone at test_part.py:\d+") as caught:
        sbs_fx.compress(model, (listed(),), part=part)
    assert "its part 'backbone.second', 95 % of its parameters: sbs_fx.compress(model, example_inputs, part=\"backbone."
    assert caught.value.parts == ("backbone.second",)
    result = sbs_fx.compress(model, (listed(),), part=caught.value.parts[0], budget=0.1)
    assert len(sbs_fx.with_part(model, "backbone.second", result.model)(listed(3))) == 3


def test_two_parts_are_named_where_both_are_large() -> None:
    class Sides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.small = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(3, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x) if x.mean() > 9 else self.right(x).mean() + self.left(x) + self.small(x).mean()

    with pytest.raises(TraceError) as caught:
        sbs_fx.compress(Sides(), images())
    assert str(caught.value).endswith('part="left"); or part="right", 42 % of its parameters')
    assert caught.value.parts == ("left", "right")


def test_nothing_is_added_where_nothing_can_be_captured() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight if x.sum() > 0 else -x

    model = nn.Sequential(Branch(), Branch())
    with pytest.raises(TraceError) as caught:
        sbs_fx.compress(model, images())
    assert caught.value.parts == ()
    assert str(caught.value).endswith("put torch.where or torch.cond where a branch depends on values")


def test_a_bounded_number_of_parts_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    class Branch(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > -1e9 else -x

    model: nn.Module = nn.Conv2d(3, 4, 1)
    for _ in range(6):
        model = Branch(model)
    tried: list[str] = []
    import sbs_fx.passes.capture.part_search as search

    def counted(*args: Any) -> Part:
        tried.append(args[1])
        return Part(*args)

    monkeypatch.setattr(search, "Part", counted)
    monkeypatch.setattr(search, "_TRIES", 3)
    with pytest.raises(TraceError) as caught:
        sbs_fx.compress(model, images())
    assert not caught.value.parts
    assert tried == ["inner", "inner.inner", "inner.inner.inner"]


# -- a detector of a library -------------------------------------------------------------------------------------------


def test_a_detector_from_elsewhere() -> None:
    """Regions are proposed, chosen by non-maximum suppression, pooled, classified and chosen again."""
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1))
    backbone.out_channels = 32  # type: ignore[assignment]
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
    sizes = {"min_size": 64, "max_size": 64, "box_head": detection.faster_rcnn.TwoMLPHead(32 * 49, 8)}
    sizes["box_predictor"] = detection.faster_rcnn.FastRCNNPredictor(8, 5)
    model = detection.FasterRCNN(backbone, None, rpn_anchor_generator=anchors, **sizes).eval()
    pictures = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
    with pytest.raises(TraceError) as caught:
        sbs_fx.compress(model, (pictures,))
    assert caught.value.parts == ("roi_heads.box_head", "rpn.head")  # the backbone is small here
    data = [(pictures, [{"boxes": torch.zeros(0, 4)}] * 2)]
    result = sbs_fx.compress(model, (pictures,), part="backbone", budget=0.1, data=data, method="uniform")
    found = sbs_fx.with_part(model, "backbone", result.model)(pictures)
    assert [sorted(each) for each in found] == [["boxes", "labels", "scores"]] * 2
