"""What the shell completes: names of models, methods, formats, backends and settings.

In: what was typed of a word. Out: words that begin so. Holds: names are asked of the registries that commands read, so
that those of other installed packages are among them; nothing heavy is imported before a word is completed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

Complete = Callable[[str], list[str]]


def one_of(*words: str) -> Complete:
    """A few words."""
    return lambda incomplete: _beginning(incomplete, words)


def by_comma(complete: Complete) -> Complete:
    """The last word of several."""

    def last(incomplete: str) -> list[str]:
        before, comma, word = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in complete(word)]

    return last


def model_names(incomplete: str) -> list[str]:
    """Of timm, and of torchvision behind its prefix; directories and files are the shell's own."""
    if incomplete.startswith("torchvision/"):
        from torchvision.models import list_models

        return _beginning(incomplete, (f"torchvision/{name}" for name in list_models()))
    import timm

    return _beginning(incomplete, timm.list_models())


def method_names(incomplete: str) -> list[str]:
    from sbs_fx.search.registry import methods

    return _beginning(incomplete, ["auto", *methods()])


def format_names(incomplete: str) -> list[str]:
    from sbs_fx.export.registry import TARGETS

    return _beginning(incomplete, TARGETS.entries())


def backend_names(incomplete: str) -> list[str]:
    from sbs_fx.export.registry import BACKENDS

    return _beginning(incomplete, BACKENDS.entries())


def setting_names(incomplete: str) -> list[str]:
    """As --set takes them, up to the value."""
    from sbs_fx.cli.settings import known_settings

    return _beginning(incomplete, (f"{setting.name}=" for setting in known_settings()))


def _beginning(incomplete: str, words: Iterable[str]) -> list[str]:
    return [word for word in words if word.startswith(incomplete)]
