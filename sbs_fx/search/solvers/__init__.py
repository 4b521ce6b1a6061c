"""Solvers of allocation problems; nothing here knows of networks."""
