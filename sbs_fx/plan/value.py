"""`Value`: what is decided or measured, as frozen data whose constructor raises an error of ours."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sbs_fx.plan.errors import PolicyError, SbsError


class Value(BaseModel):
    """A frozen pydantic value whose constructor raises an error of ours.

    >>> sbs_fx.Budget(bops=0.05) == sbs_fx.Budget.parse("20x")
    True
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    _error: ClassVar[type[SbsError]] = PolicyError

    if not TYPE_CHECKING:  # the type checker keeps the signature made from the fields

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise self._error(explain(type(self).__name__, error)) from None


def explain(owner: str, error: ValidationError) -> str:
    """One line per problem: where, what, and the value that was given."""
    lines = []
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in problem["loc"])
        lines.append(f"{place}: {message} (given {reprlib.repr(problem['input'])})" if place else message)
    return f"invalid {owner}: " + "; ".join(lines)
