"""A build from a clone without symbolic links is refused: its wheel would lack the passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class PassesAreThere(BuildHookInterface):  # type: ignore[type-arg]
    """Run before anything is built, editable installations included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if not Path(self.root, "sbs_fx", "passes", "__init__.py").is_file():
            raise RuntimeError(
                "sbs_fx/passes is no folder: this clone was made without symbolic links; on Windows turn on developer "
                "mode, then `git config --global core.symlinks true` and clone again"
            )
