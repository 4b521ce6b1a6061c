"""Settings on the command line: what `--set` may name, and a file of options.

In: NAME=VALUE texts, or a YAML file whose names are those of options. Out: nested settings, or options of a command.
Holds: a name that is none is told with the nearest one, in a file with its line; what is typed wins over the file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from json import loads
from typing import Annotated, Any, NamedTuple

import typer


class Setting(NamedTuple):
    """A setting by its dotted name."""

    name: str
    default: Any
    kind: str


def known_settings() -> list[Setting]:
    """All that `Config` and the settings of methods hold, but for what only Python can give."""
    from sbs_fx.config import Config
    from sbs_fx.search.registry import sections

    own = [s for s in _fields(Config, "") if s.name not in ("methods", "executor", "constraints")]
    return own + [s for name, settings in sections().items() for s in _fields(settings, f"{name}.")]


def _fields(model: Any, prefix: str) -> Iterator[Setting]:
    from pydantic import BaseModel

    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _fields(type(default), f"{prefix}{name}.")
        else:
            kind = getattr(field.annotation, "__name__", None) if not hasattr(field.annotation, "__args__") else None
            yield Setting(f"{prefix}{name}", default, kind or str(field.annotation).replace("typing.", ""))


def nested(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE texts as nested settings. Raises BadParameter for a name that is none."""
    names = [setting.name for setting in known_settings()] if texts else []
    chosen: dict[str, Any] = {}
    for text in texts:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals or not path:
            raise typer.BadParameter(f"--set {text}: expected NAME=VALUE, such as training.ema=0.999")
        if path not in names:
            raise typer.BadParameter(
                f"--set {text}: there is no setting {path!r}{_meant(path, names)}; see --list-settings"
            )
        *owners, name = path.split(".")
        place = chosen
        for owner in owners:
            place = place.setdefault(owner, {})
        try:
            place[name] = loads(value)
        except ValueError:
            place[name] = value.strip()
    return chosen


def _meant(name: str, names: Sequence[str]) -> str:
    """The nearest name, by its whole or by its last part."""
    ends = {other.rpartition(".")[2]: other for other in names}
    last = name.rpartition(".")[2]
    near = difflib.get_close_matches(name, names, 1) or [
        ends[end] for end in difflib.get_close_matches(last, list(ends), 1)
    ]
    return f"; did you mean {near[0]!r}?" if near else ""


def _list_settings(asked: bool) -> None:
    if asked:
        from rich.console import Console
        from rich.table import Table

        table = Table("setting", "default", "kind")
        for setting in known_settings():
            table.add_row(setting.name, str(setting.default), setting.kind)
        Console().print(table)
        raise typer.Exit


def _read_options(context: typer.Context, parameter: typer.CallbackParam, path: str | None) -> str | None:
    """Options of a YAML file become the command's defaults."""
    if path is None:
        return None
    import yaml

    from sbs_fx.plan.files import read_text

    text = read_text(path, "a YAML file of options")
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise typer.BadParameter(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not isinstance(tree, yaml.MappingNode):
        raise typer.BadParameter(f"{path}: expected names of options and their values, such as 'budget: 5%'")
    options = {p.name: p for p in context.command.params if p.name and p.name != parameter.name}
    flags = {o.lstrip("-").replace("-", "_"): p for p in options.values() for o in (*p.opts, *p.secondary_opts)}
    defaults: dict[str, Any] = {}
    for key, _ in tree.value:
        place, value = f"{path}:{key.start_mark.line + 1}", values[key.value]
        found = flags.get(str(key.value).replace("-", "_"))
        if found is None:
            near = difflib.get_close_matches(str(key.value), [name.replace("_", "-") for name in flags], 1)
            meant = f"; did you mean {near[0]!r}?" if near else ""
            raise typer.BadParameter(f"{place}: there is no option {key.value!r}{meant}")
        if found.multiple:
            value = [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [*map(str, value)]
        elif not isinstance(value, (bool, int, float, str)):
            raise typer.BadParameter(f"{place}: {key.value} is a {type(value).__name__}; expected one value")
        if not isinstance(value, (bool, list)):
            try:
                found.process_value(context, str(value))
            except typer.BadParameter as error:
                raise typer.BadParameter(f"{place}: {key.value}: {error.message}") from None
        defaults[str(found.name)] = value if isinstance(value, (bool, list)) else str(value)
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


ListSettings = Annotated[
    bool, typer.Option("--list-settings", callback=_list_settings, is_eager=True, help="what --set may name, and stop")
]
OptionsFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE.yaml", callback=_read_options, is_eager=True, help="options by name"),
]
