"""Decisions as nodes of the graph."""
