"""What was found and what was decided, as data and as text."""

from sbs_fx.report.report import GroupRow, LayerRow, PinRow, Report

__all__ = ["GroupRow", "LayerRow", "PinRow", "Report"]
