"""What was found and what was decided, as data and as text."""

from sbs_fx.report.data import GroupRow, LayerRow, PinRow
from sbs_fx.report.report import Report

__all__ = ["GroupRow", "LayerRow", "PinRow", "Report"]
