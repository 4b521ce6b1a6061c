"""`Registry`: entries by name that files, here or in other packages, register when they are imported.

In: a decorator's call. Out: the entry of a name. Holds: a name has one entry; another package's entries come through an
entry point, whose module registers them; one that cannot be loaded is an error that names it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Mapping
from typing import Generic, TypeVar

from sbs_fx.plan.errors import SbsError

Entry = TypeVar("Entry")
_LOADED: set[str] = set()  # groups


class Registry(Generic[Entry]):
    """
    Args:
        what: is registered, such as "method". group: of entry points. builtin: module whose import registers our own.
        error: what is raised, with a message.
    """

    def __init__(self, what: str, group: str, builtin: str, error: type[SbsError]) -> None:
        self.what, self.group, self.builtin, self.error = what, group, builtin, error
        self._entries: dict[str, tuple[Entry, str]] = {}

    def add(self, name: str, entry: Entry, module: str) -> None:
        """Register what a module brings. Raises the registry's error if another one has taken the name."""
        if name in self._entries and self._entries[name][1] != module:
            raise self.error(f"there are two {self.what}s of the name {name!r}: give one of them another")
        self._entries[name] = entry, module

    def entries(self) -> Mapping[str, Entry]:
        """All by name, those of other installed packages included."""
        importlib.import_module(self.builtin)
        load_entry_points(self.group, self.error)
        return {name: entry for name, (entry, _) in self._entries.items()}

    def __getitem__(self, name: str) -> Entry:
        """Raises the registry's error for a name that nothing has."""
        entries = self.entries()
        if not isinstance(name, str) or name not in entries:
            near = difflib.get_close_matches(str(name), entries, n=1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise self.error(f"unknown {self.what} {name!r}; expected one of {', '.join(entries)}{meant}")
        return entries[name]


def load_entry_points(group: str, error: type[SbsError]) -> None:
    """Import what other installed packages name under a group, once."""
    if group in _LOADED:
        return
    _LOADED.add(group)
    for point in importlib.metadata.entry_points(group=group):
        try:
            point.load()
        except Exception as cause:
            _LOADED.discard(group)  # so that it is said each time
            raise error(
                f"{point.name!r} of another package cannot be loaded from {point.value!r}: {type(cause).__name__}: "
                f"{cause}; update or uninstall that package"
            ) from cause
