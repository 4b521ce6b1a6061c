"""Static graphs as files of other tools; each format in a file of its own."""

from sbs_fx.export.formats import BACKENDS, FORMATS, export, runner
from sbs_fx.export.pt2 import load_pt2, load_saved, save_pt2
from sbs_fx.export.runtime import Kernels, Runner

load = load_pt2  # the one format that a graph can be read back from

__all__ = ["BACKENDS", "FORMATS", "Kernels", "Runner", "export", "load", "load_pt2", "load_saved", "runner", "save_pt2"]
