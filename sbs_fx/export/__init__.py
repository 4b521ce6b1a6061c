"""Static graphs as files of other tools; each format in a file of its own."""

from sbs_fx.export.pt2 import load_pt2, save_pt2

__all__ = ["load_pt2", "save_pt2"]
