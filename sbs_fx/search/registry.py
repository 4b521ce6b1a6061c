"""The registry of methods: a method is one file that registers itself.

In: a decorated function, here or in another package (entry point group "sbs_fx.methods": a module that registers as it
is imported). Out: entries by name, which `compress`, `compare`, the command line and "auto" read. Holds: nothing else
depends on a method's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel
from torch import Tensor

from sbs_fx.plan import Plan
from sbs_fx.plan.errors import DataError, MethodError
from sbs_fx.plan.registry import Registry
from sbs_fx.search.problem import Problem, SearchResult
from sbs_fx.training import Checkpoints, Training
from sbs_fx.training.progress import Observer

Needs = Literal["nothing", "images", "labels"]
Occasion = Literal["without data", "with data", "with training"]


@dataclass(frozen=True)
class Run:
    """What a method is given beside the problem.

    Attributes:
        data: iterable of batches, more than once; None: there is none.
        settings: of the method, of the class that it registered.
        training: how weights are trained. ranges: how ranges are chosen, as in `calibrate`.
        fine_tunes: whether training follows, so that what is lost may be won back.
        checkpoints, observer: of a method that takes long. executor: whose workers may measure. step:
            to be called with (number, how many) of what the search does one by one, for what is shown.

    >>> Run(data=batches).fine_tunes
    False
    """

    data: Any = None
    settings: Any = None
    training: Training = field(default_factory=Training)
    ranges: str = "mse"
    fine_tunes: bool = False
    checkpoints: Checkpoints | None = None
    observer: Observer | None = None
    executor: Executor | None = None
    step: Callable[[int, int], None] | None = None


@dataclass(frozen=True)
class Method:
    """One entry.

    Attributes:
        search: the method itself. help: its one line.
        needs: "nothing", "images" or "labels". trains: whether weights are trained while it searches.
        settings: class of its settings; section: their name in `Config`, which several methods may share.
        resumes: it leaves checkpoints of its own and goes on from them.
        automatic: when "auto" means this one.
        candidates: bitwidths that it chooses from where none are asked for; none: those of `SpaceSettings`.
        restore: tensors that follow from a plan of this method and the float model alone, for `apply`.

    >>> from sbs_fx.search.registry import METHODS
    >>> METHODS["opq"].needs
    'nothing'
    """

    name: str
    search: Callable[[Problem, Run], SearchResult]
    help: str
    needs: Needs = "nothing"
    trains: bool = False
    settings: type[BaseModel] | None = None
    section: str = ""
    resumes: bool = False
    automatic: Occasion | None = None
    candidates: tuple[int, ...] = ()
    restore: Callable[[Problem, Plan, Any], Mapping[str, Tensor]] | None = None

    @property
    def needs_data(self) -> bool:
        return self.needs != "nothing"


Search = Callable[[Problem, Run], SearchResult]
_NEEDS: tuple[Needs, ...] = ("nothing", "images", "labels")
METHODS = Registry[Method]("method", "sbs_fx.methods", "sbs_fx.search", MethodError)


def method(name: str, **entry: Any) -> Callable[[Search], Search]:
    """Register a function as a method; `entry` has the other fields of `Method`. Raises MethodError if the name is
    taken.

    >>> @method("least", help="as little as may be")
    ... def least(problem, run):
    ...     return SearchResult(problem.space.least)
    >>> sbs_fx.compress(net, images, method="least").policy.method
    'least'
    """

    def register(search: Search) -> Search:
        METHODS.add(name, Method(name, search, **entry), search.__module__)
        return search

    return register


def methods() -> Mapping[str, Method]:
    """All methods by name, those of other installed packages included; what needs least comes first."""
    entries = METHODS.entries().items()
    return dict(sorted(entries, key=lambda item: (_NEEDS.index(item[1].needs), item[1].trains, item[0])))


def names() -> tuple[str, ...]:
    """What `method=` may be."""
    return ("auto", *methods())


def sections() -> dict[str, type[BaseModel]]:
    """Names of settings in `Config` -> their classes."""
    return {m.section or m.name: m.settings for m in methods().values() if m.settings is not None}


def chosen(name: str, has_data: bool, fine_tunes: bool) -> Method:
    """The method of a name, or what "auto" stands for.

    Raises:
        MethodError: an unknown name. DataError: it needs data and there is none.
    """
    if name == "auto":
        occasion = ("with training" if fine_tunes else "with data") if has_data else "without data"
        return next(entry for entry in methods().values() if entry.automatic == occasion)
    entry = METHODS[name]
    if entry.needs_data and not has_data:
        without = tuple(other.name for other in methods().values() if not other.needs_data)
        raise DataError(f"method {name!r} needs data; give it, or use one of {without}")
    return entry
