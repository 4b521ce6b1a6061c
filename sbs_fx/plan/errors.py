"""Every exception that sbs-fx raises on purpose, in one tree.

* SbsError
  + TraceError                the model cannot be exported
  + InputError                example inputs: wrong shape or device, or none derivable   (also a ValueError)
  + SettingsError             a setting that means nothing, such as an unknown field         (also a ValueError)
  + GraphError                an invariant of an analysis or a pass does not hold
  + BudgetError               a budget that means nothing                                (also a ValueError)
    - InfeasibleBudget        a budget below what the search space can reach
  + ConstraintError           a constraint that means nothing, or nothing of the model   (also a ValueError)
  + PolicyError               a policy that contradicts itself                           (also a ValueError)
    - PolicyMismatch          a policy that belongs to another model
  + DataError                 calibration or training data                               (also a ValueError)
  + WeightsError              NaN or Inf in the model's weights                          (also a ValueError)
  + MethodError               an unknown method                                          (also a ValueError)
  + FileError                 truncated or altered file, output that cannot be written   (also an OSError)
  + CheckpointMismatch        a checkpoint of another run                                (also a ValueError)
  + BackendError              a backend that is not installed, or cannot hold the graph
  + TrainingError             training that cannot go on, such as a loss that is NaN
  + Interrupted               stopped from outside, with everything saved

Comes in: a message that repeats the offending value, says what was expected and what to do next; attributes by keyword.
Holds: every class can be built from its message alone, so that an exception survives the way between processes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self


class SbsError(Exception):
    """Base of all errors of this package; ``except SbsError`` catches every one and nothing else.

    >>> try:
    ...     sbs_fx.compress(net, images, budget="nothing")
    ... except sbs_fx.SbsError as error:
    ...     type(error).__name__
    'BudgetError'
    """


class TraceError(SbsError):
    """The model cannot be captured by ``torch.export``.

    Attributes:
        submodule: qualified name of the sub-module in which capture stopped, "" for the model itself or if unknown.
        reason: what stopped it, in one line.
        parts: paths of sub-modules that can be captured, the largest first: values of ``compress(..., part=)``.
    """

    def __init__(self, message: str, *, submodule: str = "", reason: str = "", parts: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.submodule = submodule
        self.reason = reason or message
        self.parts = tuple(parts)


class InputError(SbsError, ValueError):
    """Example inputs have the wrong shape, dtype or device, or none were given and none can be derived."""


class SettingsError(SbsError, ValueError):
    """Settings, such as those of `Config`, with unknown fields or values out of range.

    Attributes:
        problems: one dict each with "loc" (names that lead to the field), "msg" and "input" (what was given).
    """

    def __init__(self, message: str, *, problems: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class GraphError(SbsError):
    """An invariant of an analysis or a pass does not hold.

    Attributes:
        pass_name: the pass that found it, such as "slim"; "" if none.
        node: name of the graph node, "" if it concerns the whole graph.
    """

    def __init__(self, message: str, *, pass_name: str = "", node: str = "") -> None:
        place = " at ".join(part for part in (pass_name, f"node {node!r}" if node else "") if part)
        super().__init__(f"{place}: {message}" if place else message)
        self.pass_name = pass_name
        self.node = node


class BudgetError(SbsError, ValueError):
    """A budget that is empty, NaN, zero, negative, above one, or cannot be parsed."""


class InfeasibleBudget(BudgetError):
    """A budget below what the search space can reach.

    Attributes:
        least: measure ("bops", "size", "macs", "params") -> the least share of the float model that can be reached.
        binding: constraints and settings without which less could be reached.
    """

    def __init__(self, message: str, *, least: Mapping[str, float] | None = None, binding: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.least: dict[str, float] = dict(least or {})
        self.binding = tuple(binding)

    @classmethod
    def of(
        cls,
        limits: Mapping[str, float],
        least: Mapping[str, float],
        reached: str,
        binding: Iterable[str],
        in_float: Iterable[str] = (),
    ) -> Self:
        """With the text that says which limits, the least shares that were reached, and what keeps them from less;
        `in_float`: operators that no rule knows, with their shares."""
        asked = ", ".join(f"{measure} {share:.4g}" for measure, share in limits.items())
        shares = ", ".join(f"{measure} {least[measure]:.4g}" for measure in limits)
        binding = tuple(binding)
        if floats := ", ".join(in_float):
            shares += f", of which {floats}, which has no rule and stays in float (docs/extending.md: rules)"
        remedy = f", or give up what binds: {'; '.join(binding)}" if binding else ""
        return cls(
            f"the budget ({asked}) cannot be met: the least that {reached} is {shares}; raise the budget{remedy}",
            least=least,
            binding=binding,
        )


class ConstraintError(SbsError, ValueError):
    """A constraint that asks for nothing or for bits that do not exist, or that matches nothing of the model."""


class PolicyError(SbsError, ValueError):
    """A policy with unknown, duplicated or out-of-range entries, or of a format that this version does not read."""

    @classmethod
    def unknown_name(cls, kind: str, name: str, known: Iterable[str]) -> Self:
        """For a name that the model has not, with the nearest that it has."""
        names = list(known)
        near = difflib.get_close_matches(name, names, 3) or names[:3]
        return cls(f"the model has no {kind} {name!r}; it has {', '.join(map(repr, near)) or 'none'}")


class PolicyMismatch(PolicyError):
    """A policy that was made for another model, or for another version of it.

    Attributes:
        unknown: names that the policy has and the model has not.
        missing: names that the model has and the policy has not.
        different: names that both have, with different values (such as the size of a group, or "fingerprint").
    """

    def __init__(
        self,
        message: str,
        *,
        unknown: Iterable[str] = (),
        missing: Iterable[str] = (),
        different: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.unknown = tuple(unknown)
        self.missing = tuple(missing)
        self.different = tuple(different)


class DataError(SbsError, ValueError):
    """Data that is empty, stops midway, holds NaN or Inf, or has labels out of range."""


class WeightsError(SbsError, ValueError):
    """NaN or Inf in the model's weights or statistics.

    Attributes:
        names: the parameters and buffers concerned.
    """

    def __init__(self, message: str, *, names: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.names = tuple(names)


class MethodError(SbsError, ValueError):
    """A search method that does not exist.

    Attributes:
        known: the methods that do.
    """

    def __init__(self, message: str, *, known: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.known = tuple(known)


class FileError(SbsError, OSError):
    """A file that is truncated or altered, or an output that cannot be written (a file where a directory is expected,
    no permission, disk full). Nothing half-written is left under the final name."""


class BackendError(SbsError):
    """A backend that is not installed, that cannot express the graph, or that computes something else."""


class CheckpointMismatch(SbsError, ValueError):
    """A checkpoint that another model, method, budget, setting or version has left.

    Attributes:
        different: the fields that differ.
    """

    def __init__(self, message: str, *, different: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.different = tuple(different)


class TrainingError(SbsError):
    """Training that cannot go on.

    Attributes:
        step: of the stage, from 0. batch: index within its epoch. checkpoint: file of the last good state, or None.
    """

    def __init__(self, message: str, *, step: int = 0, batch: int = 0, checkpoint: str | None = None) -> None:
        super().__init__(message)
        self.step, self.batch, self.checkpoint = step, batch, checkpoint


class Interrupted(SbsError):
    """Stopped by SIGINT or SIGTERM after a whole step; the message says how to go on."""
