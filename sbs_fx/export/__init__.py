"""Static graphs as files of other tools; each format in a file of its own."""

from sbs_fx.export.pt2 import load_pt2, save_pt2

load = load_pt2  # the one format that a graph can be read back from

__all__ = ["load", "load_pt2", "save_pt2"]
