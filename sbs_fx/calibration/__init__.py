"""Ranges, rounding and reconstruction of gated graphs, without training."""
