"""Static graphs as files of other tools, one target a file. Importing it registers those that are built in."""

from sbs_fx.export import (  # noqa: F401  reason: they register themselves
    coreml,
    executorch,
    inductor,
    litert,
    onnx,
    openvino,
    qnn,
    tensorrt,
)
from sbs_fx.export.device import write_script
from sbs_fx.export.formats import export, runner
from sbs_fx.export.pt2 import load_pt2, load_saved, save_pt2
from sbs_fx.export.registry import BACKENDS, TARGETS, Backend, Numerics, Target, backend, target
from sbs_fx.export.runtime import Kernels, Runner

load = load_pt2  # the one format that a graph can be read back from

__all__ = [
    "BACKENDS", "TARGETS", "Backend", "Kernels", "Numerics", "Runner", "Target", "backend", "export", "load",
    "load_pt2", "load_saved", "runner", "save_pt2", "target", "write_script",
]  # fmt: skip
