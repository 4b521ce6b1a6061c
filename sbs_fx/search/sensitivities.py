"""`Sensitivities`: what each decision was measured to cost, kept as a file; `replan`: a plan from them for any limits.

In: the decisions of a search, later a problem on the same model with limits and constraints of its own. Out: a plan,
in seconds, from no image. Holds: a table fits the model that it was measured on and no other; what is loaded is what
was saved; equal tables give equal plans.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal, Self

from pydantic import ConfigDict, model_validator

from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.plan.errors import ConstraintError, FileError, PolicyMismatch
from sbs_fx.plan.files import checksum_of, parse_object, read_as, write_atomic
from sbs_fx.plan.plan import Kind
from sbs_fx.plan.value import Value
from sbs_fx.search.allocation import Allocator, Decision, considered
from sbs_fx.search.problem import Problem, SearchResult

_FORMAT: Final = 1
_SECONDS = 20.0  # of one run of the solver


class Row(Value):
    """One decision: bits or kept counts, the loss of each in nats an image, and of channels their order, the least
    important first."""

    model_config = ConfigDict(strict=True)

    kind: Kind
    name: str
    choices: list[int]
    losses: list[float]
    order: list[int] = []

    @model_validator(mode="after")
    def _one_loss_each(self) -> Self:
        if len(self.choices) != len(self.losses) or not self.choices:
            raise ValueError(f"{len(self.choices)} choices have {len(self.losses)} losses; expected one each")
        if self.kind == "channels" and (
            sorted(self.order) != list(range(len(self.order))) or not 0 < max(self.choices) <= len(self.order)
        ):
            raise ValueError("the order of channels has each of them once, and no choice keeps more than there are")
        return self


class Sensitivities(Value):
    """The table of one model: `fingerprint` is that of its traced graph, `method` what measured it."""

    model_config = ConfigDict(strict=True)

    format: Literal[1] = _FORMAT
    fingerprint: str
    method: str
    rows: list[Row]

    @classmethod
    def of(cls, problem: Problem, method: str, decisions: Iterable[Decision]) -> Self:
        rows = [
            Row(kind=d.kind, name=d.name, choices=list(d.choices), losses=list(d.losses), order=list(d.order))
            for d in decisions
        ]
        return cls(fingerprint=problem.groups.fingerprint, method=method, rows=rows)

    def to_json(self) -> str:
        fields = self.model_dump(mode="json")
        return json.dumps({**fields, "checksum": checksum_of(fields)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Raises FileError if it was cut short or altered, PolicyError if it is none."""
        fields = parse_object(text, "table of sensitivities")
        if fields.pop("checksum", None) != checksum_of(fields):
            raise FileError("the table of sensitivities was altered: its checksum does not fit; measure again")
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all of it or nothing. Raises FileError."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Raises FileError or PolicyError, with the path in the message."""
        return read_as(path, "a sensitivity.json, which a search that measures losses leaves", cls.from_json)

    def decisions(self, problem: Problem) -> list[Decision]:
        """What is free in a problem, at the measured losses.

        Raises:
            PolicyMismatch: measured on another model. ConstraintError: no choice that the problem leaves was measured.
        """
        if self.fingerprint != problem.groups.fingerprint:
            raise PolicyMismatch(
                f"these sensitivities were measured on another model: fingerprint {self.fingerprint!r}, that of this "
                f"model is {problem.groups.fingerprint!r}; measure again",
                different=["fingerprint"],
            )
        rows = {(row.kind, row.name): row for row in self.rows}
        found = []
        for choice in problem.space.choices:
            row = rows.get((choice.kind, choice.name))
            if len(choice.values) == 1:
                continue
            free = {*choice.values, *((FLOAT_BITS,) if problem.space.may_stay_float(choice.kind, choice.name) else ())}
            places = [] if row is None else [i for i, value in enumerate(row.choices) if value in free]
            if row is None or not places:
                raise ConstraintError(
                    f"{choice.kind} {choice.name!r} may be any of {choice.values}, of which none was measured; "
                    "search again, or leave what the measured search left"
                )
            found.append(_decision(row, places))
        return found


def _decision(row: Row, places: Sequence[int]) -> Decision:
    losses = tuple(row.losses[i] for i in places)
    return Decision(row.kind, row.name, tuple(row.choices[i] for i in places), losses, tuple(row.order))


def replan(problem: Problem, table: Sensitivities) -> SearchResult:
    """The plan of least estimated loss within a problem's limits.

    Raises:
        InfeasibleBudget: the limits are below what the fewest bits and channels cost. As `Sensitivities.decisions`.
    """
    decisions = table.decisions(problem)
    problem.check_feasible("replan")
    if not decisions:
        return SearchResult(problem.space.most, notes=("nothing is left to decide: constraints fix every choice",))
    allocator = Allocator(problem, _SECONDS)
    candidates = allocator.candidates(decisions)
    if not candidates:
        least: Any = problem.space.least
        for decision in decisions:
            least = decision.applied(least, decision.choices.index(min(decision.choices)))
        raise problem.infeasible("replan", least)
    best = min(candidates, key=lambda candidate: candidate.loss)
    made = considered(problem, decisions, [(c.loss, c) for c in candidates], allocator.over, best)
    return SearchResult(best.plan, considered=made, sensitivities=table)
