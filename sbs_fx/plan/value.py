"""`Value`: what is decided or measured, as frozen data whose constructor raises an error of ours; `Settings`: what is
asked for, likewise."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from sbs_fx.plan.errors import PolicyError, SbsError, SettingsError


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
                raise self._refusal(error) from error

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """As pydantic's, but for the error."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise cls._refusal(error) from error

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """As pydantic's, but for the error."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise cls._refusal(error) from error

    @classmethod
    def _refusal(cls, error: ValidationError) -> SbsError:
        inner = error.errors(include_url=False)[0].get("ctx", {}).get("error")
        if isinstance(inner, SbsError) and str(inner).startswith(f"invalid {cls.__name__}: "):
            return inner  # reason: of the constructor, which pydantic has called
        return cls._error(explain(cls.__name__, error))


class Settings(Value):
    """A value that users choose: a wrong one is a `SettingsError`.

    >>> class Mine(Settings):
    ...     share: float = 0.5
    >>> Mine(share=0.25).share
    0.25
    """

    _error: ClassVar[type[SbsError]] = SettingsError

    @classmethod
    def _refusal(cls, error: ValidationError) -> SbsError:
        refusal = super()._refusal(error)
        if isinstance(refusal, SettingsError) and not refusal.problems:
            refusal.problems = tuple(dict(problem) for problem in error.errors(include_url=False))
        return refusal


def explain(owner: str, error: ValidationError) -> str:
    """One line per problem: where, what, and the value that was given."""
    lines = []
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in problem["loc"])
        lines.append(f"{place}: {message} (given {reprlib.repr(problem['input'])})" if place else message)
    return f"invalid {owner}: " + "; ".join(lines)
