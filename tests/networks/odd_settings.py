"""Settings sound and odd, by name: what may be said beside a model and its inputs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbs_fx import Budget, Keep, Task
from sbs_fx.search.registry import names
from sbs_fx.training import Training

BUDGETS: dict[str, Any] = {
    "usual": 0.3, "all": 1, "low": 0.02, "out of reach": 1e-9, "text": "30%", "two": "bops=30%,size=0.5",
    "value": Budget(size=0.3), "macs": Budget(macs=0.5), "three": Budget(bops=0.3, macs=0.7, size=0.4),
    "negative": -1, "zero": 0, "above one": 2, "nan": math.nan, "infinite": math.inf, "word": "abc", "nothing": "",
    "none": None, "bool": True, "percent": "%", "no number": "bops=", "unknown": "flops=5%", "twice": "bops=5%,bops=6%",
    "dict": {"bops": 0.3}, "odd dict": {"flops": 1}, "list": [0.3], "empty list": [], "tensor": torch.tensor(0.3),
    "object": object(), "signs": "=,=", "letters": "bops=5%%", "underscore": "0_1", "unicode": "٣%", "newline": "0.3\n",
}  # fmt: skip

TASKS: dict[str, Any] = {
    "default": None,
    **{name: name for name in ("classification", "segmentation", "matching", "embedding", "regression")},
    "unknown": "magic", "empty": "", "number": 3, "class": Task, "list": ["classification"],
    "own loss": Task(loss=lambda outputs, targets: outputs[0].square().mean()),
    "first output": Task("embedding", outputs=lambda output: [next(iter(_tensors(output)))]),
    "no outputs": Task(outputs=lambda output: []),
}  # fmt: skip

DYNAMIC: dict[str, Any] = {
    "default": None, "batch": ("batch",), "sides": ("batch", "height", "width"), "nothing": (), "height": ["height"],
    "empty dict": {}, "none of x": {"x": {}}, "batch of x": {"x": {0: "batch"}},
    "sides of input": {"input": {2: "height"}},
    "own name": {"x": {0: "batch", 1: "length"}}, "spaces": {"x": {1: "my dim"}}, "no name": {"x": {0: ""}},
    "keyword": {"x": {0: "class"}}, "operator": {"x": {1: "a + b"}}, "number as a name": {"x": {0: 3}},
    "none as a name": {"x": {0: None}}, "two of one name": {"x": {0: "batch", 1: "batch"}}, "far": {"x": {9: "batch"}},
    "negative": {"x": {-1: "width"}}, "name as a place": {"x": {"a": "b"}}, "of none": {"x": None},
    "of a text": {"x": "batch"}, "unknown tensor": {"nope": {}}, "text": "batch", "number": 3, "bool": True,
    "numbers": (0, 1), "dims": {"x": (0, 1)}, "dim": {"x": {0: torch.export.Dim("n")}}, "torch": ({0: "batch"},),
}  # fmt: skip

METHODS: dict[str, Any] = {
    **{name: name for name in names()}, "unknown": "magic", "empty": "", "none": None, "number": 3, "list": ["opq"],
}  # fmt: skip

# So that each method takes a moment.
BRIEF: dict[str, Any] = {
    "reconstruction": {"steps": 2, "images": 4},
    "methods": {
        "ajpq": {"episodes": 2, "group": 1}, "search": {"epochs": 1},
        "two_stage": {"measured": 4, "rounds": 1, "levels": 2},
    },
}  # fmt: skip
# Fields of `Config` with values of every kind; "none": the defaults.
FIELDS: dict[str, tuple[Any, ...]] = {
    "none": (),
    "candidates": ((4,), (2, 3, 5), (8, 32), (32,), (), (7,), "48", 8, None, (8.0, 4), ("8",), (-2,)),
    "constraints": (
        (Keep("0", weight_bits=8),), (Keep("nothing.*", weight_bits=8),), (Keep("*", prune=False),),
        (Keep("*", least=1.0),), (Keep(kind="conv", weight_bits=(2, 4)),), (Keep("[", least=0.5),), ("0",), 3, None,
        (Keep("*", weight_bits=32, activation_bits=32),),
    ),
    "quantise": (False, True, "maybe", None), "prune": (False, True, 3, []), "weight_bits": (8, 32, 7, "8", None, (8,)),
    "activation_bits": (8, 32, 0, "four"), "block": (1, 4, 0, -1, 1000, None, 2.5), "round_to": (1, 8, 0, 10**6),
    "inner_only": (True, "no"), "minor_groups": (True,), "keep_outputs": (False, None),
    "ranges": ("mse", "minmax", "percentile", "magic", 3), "integer_joins": (False,), "exact": (True, 1, "x"),
    "calibration_batches": (1, 0, -1, 2.5, "3", math.inf), "learning_rate": (0.1, 0, -1, math.nan, math.inf, 1e30, "x"),
    "reconstruction": ({}, {"steps": 1}, {"no such": 1}, 3), "uncounted": ("ignore", "x"),
    "seed": (1, -1, 2**70, 1.5, None),
    "training": (
        Training(range_lr=0.0), {"optimizer": "magic"}, {"optimizer": 3}, {"precision": "bf16"}, {"mixup": 0.5},
        {"ema": 0.9}, {"patience": 1}, {"norm_batches": 1}, {"channels_last": True},
        {"schedule": "multistep", "milestones": ()},
        {"distillation": 0.0}, {"sharpness": 0.1}, {"clip": 0.0}, {"label_smoothing": 0.5}, {"frozen_norm_epochs": 1},
        {"milestones": (math.nan, 9)}, {"optimizer": "adamw"}, {"clip": math.inf}, {"weight_decay": math.inf}, 3,
    ),
    "methods": ({}, {"magic": {}}, {"opq": {}}, {"opq": 3}, 3, {"opq": {"prunes": "weights"}}),
    "opq": ({"prunes": "weights"}, {"no such": 1}, 3, None), "search": ({"epochs": 1, "lam": 1.0}, {"epochs": 0}),
    "latency": ({"backend": "magic"}, {"batch": 0}), "no such field": (1,), "epochs": (0, 1, -1, 0.5, "one", None),
}  # fmt: skip


def _raising(batch: Any) -> Any:
    raise KeyError("no such field")


# Functions from a batch to (arguments of the model, targets).
PREPARE: dict[str, Any] = {
    "none": None, "pair": lambda batch: (batch[0], batch[1]), "no targets": lambda batch: (batch, None),
    "named": lambda batch: ({"x": batch[0]}, batch[1]), "raises": _raising, "nothing": lambda batch: None,
    "three": lambda batch: (batch, batch, batch), "text": lambda batch: "ab", "numbers": lambda batch: (3, 4),
    "no function": 3, "no argument": lambda: None,
}  # fmt: skip

OUTPUTS: dict[str, str] = dict.fromkeys(
    ("none", "new", "made", "deep", "file", "under a file", "empty", "null", "number", "policy is a directory", "long"),
    "",
)


def prepare_output(name: str, directory: Path) -> Any:
    """An output directory of a kind, under one that is there."""
    (directory / "file").write_text("no directory")
    if name == "policy is a directory":
        (directory / "made" / "policy.json" / "inner").mkdir(parents=True)
    kinds = {
        "none": None, "new": directory / "new", "made": str(directory), "deep": directory / "a" / "b",
        "file": directory / "file", "under a file": directory / "file" / "out", "empty": "", "null": "a\0b",
        "number": 3.5,
        "policy is a directory": directory / "made", "long": directory / ("n" * 300),
    }  # fmt: skip
    return kinds[name]


def _tensors(output: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
