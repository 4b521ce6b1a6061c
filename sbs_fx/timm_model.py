"""A compressed model as timm's scripts take models: a module with `pretrained_cfg` and `num_classes`.

In: a saved result, a result, or a static graph. Out: `TimmModel`. Holds: it computes what the graph computes; what
images it takes is what the file says, and nothing is said that the file does not know. There is no `forward_features`:
of a static graph nobody can tell where the features end.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, fx, nn

from sbs_fx.models import PREPARATION
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.passes.dialects import static_of
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import InputError
from sbs_fx.result import Result
from sbs_fx.saved import Saved, load


class TimmModel(nn.Module):
    """A static graph in timm's form.

    Attributes:
        graph: what it runs. num_classes: size of its logits.
        pretrained_cfg: `input_size`, `num_classes`, and of `mean`, `std`, `crop_pct`, `interpolation` and `crop_mode`
            what is known; timm has `default_cfg` for the same.
    """

    def __init__(self, graph: fx.GraphModule, metadata: dict[str, Any], size: tuple[int, int, int]) -> None:
        super().__init__()
        self.graph = graph
        with torch.no_grad():
            logits = graph(torch.zeros(2, *size))
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            raise InputError("this model gives no logits of shape (batch, classes), as timm's scripts expect")
        self.num_classes = int(logits.shape[1])
        known = {name: metadata[name] for name in PREPARATION if name in metadata}
        known = {name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        self.pretrained_cfg = self.default_cfg = {"input_size": size, "num_classes": self.num_classes, **known}

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.graph(x)
        return logits


@boundary("as_timm")
def as_timm(result: Saved | Result | fx.GraphModule | str | os.PathLike[str]) -> TimmModel:
    """A compressed classifier as a module that timm's loaders and validation take.

    >>> model = sbs_fx.as_timm(result)
    >>> model.num_classes, model.pretrained_cfg["input_size"]
    (4, (3, 16, 16))

    Args:
        result: of `compress`, or saved: its directory, its `model.pt2`, or what `load` gives.

    Raises:
        InputError: it takes anything but images of one size, or gives no logits. FileError: as `load`.
    """
    loaded = load(result) if isinstance(result, (str, os.PathLike)) else result
    graph = loaded if isinstance(loaded, fx.GraphModule) else loaded.model
    metadata = {**static_of(graph).metadata, **(loaded.metadata if isinstance(loaded, Result) else {})}
    spec = inputs_of(graph)
    shape = spec.tensors[0].shape if spec is not None and len(spec.tensors) == 1 else ()
    size = tuple(side for side in shape[1:] if isinstance(side, int))
    if len(shape) != 4 or len(size) != 3:
        raise InputError(f"this model takes inputs of shape {shape}; expected images of one size")
    return TimmModel(graph, metadata, (size[0], size[1], size[2]))
