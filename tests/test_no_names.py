"""The compiler knows operators, not models: no timm model, module or class is named outside the timm adapter."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import timm
import timm.models
from torch import nn

import sbs_fx

# The timm adapter and data loading, which exist to know such names.
ALLOWED = {"models.py", "datasets.py"}
# Words of the field that are also the name of some class.
GENERIC = {"Attention", "Pooling", "nest"}


def model_names() -> set[str]:
    classes = {
        name
        for module in vars(timm.models).values()
        if inspect.ismodule(module)
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("timm.models")
    }
    return {*timm.list_models(), *timm.list_modules(), *classes} - GENERIC


def test_no_timm_name_in_the_product_or_the_passes() -> None:
    known = model_names()
    assert {"resnet18", "swin_transformer", "VisionTransformer"} <= known
    root = Path(sbs_fx.__file__).parent
    files = [p for p in [*root.rglob("*.py"), *(root / "passes").rglob("*.py")] if p.name not in ALLOWED]
    assert len(files) > 20
    found = {(path.name, word) for path in files for word in re.findall(r"\w+", path.read_text()) if word in known}
    assert not found
