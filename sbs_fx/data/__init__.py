"""Batches as they come, and data sets by name."""
