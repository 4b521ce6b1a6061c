"""The command line; each command imports what it needs."""

from sbs_fx.cli.app import main

__all__ = ["main"]
