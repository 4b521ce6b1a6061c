"""`Budget`: how much of the float model may be left, as shares or amounts; frozen, read from text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, field_validator, model_validator

from sbs_fx.plan.cost import Cost
from sbs_fx.plan.errors import BudgetError, SbsError
from sbs_fx.plan.value import Value

MEASURES = ("bops", "size", "macs", "params", "latency")
OF_CHANNELS = ("macs", "params", "latency")  # what fewer bits do not change


class Budget(Value):
    """How much of the float model may be left; every limit that is given must hold.

    | usage                            | meaning                                                        |
    |----------------------------------|----------------------------------------------------------------|
    | `Budget(bops=0.05)`              | at most 5 % of the bit operations                              |
    | `Budget(size=0.1)`               | at most a tenth of the stored bits                             |
    | `Budget(macs=0.5)`               | at most half the multiply-accumulates                          |
    | `Budget(params=0.5)`             | at most half the parameters, whatever their bits               |
    | `Budget(latency=0.25)`           | at most a quarter of the float model's time on this machine    |
    | `Budget(bops=0.05, size=0.2)`    | both                                                           |
    | `Budget(amounts={"macs": 3e8})`  | at most 300 million multiply-accumulates; size in bits,        |
    |                                  | latency in seconds                                             |
    | `Budget.parse("5%")`             | `Budget(bops=0.05)`; so are `"0.05"`, `"1/20"` and `"20x"`     |
    | `Budget.parse("bops=5%,size=.2")`| `Budget(bops=0.05, size=0.2)`                                  |
    | `Budget.parse("300M")`           | so many MACs; with K, M, G, T, and `"bops=2G"`                 |
    | `Budget.parse("2MB")`            | stored bytes: B, kB, MB, GB, KiB, MiB, GiB                     |
    | `Budget.parse("5ms")`            | time on this machine: us, ms, s                                |
    | `budget.is_satisfied_by(cost)`   | does the cost keep every limit?                                |
    | `budget.shares(cost)`            | `{"bops": 0.049, "size": 0.13, ...}`, limited or not           |
    | `budget.limits`                  | `{"bops": 0.05}`, the shares that were given                   |
    | `budget.asked`                   | `{"bops": 0.05, "amounts": {"macs": 3e8}}`, all that was given |

    Raises:
        BudgetError: no limit, or one that is NaN, zero, negative, no number, or, of a share, above 1.

    >>> sbs_fx.Budget.parse("bops=5%,size=10%").limits
    {'bops': 0.05, 'size': 0.1}
    """

    model_config = ConfigDict(strict=True)
    _error: ClassVar[type[SbsError]] = BudgetError

    bops: float | None = None
    size: float | None = None
    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    amounts: dict[str, float] = {}

    @field_validator(*MEASURES)
    @classmethod
    def _is_share(cls, share: float | None) -> float | None:
        if share is not None and not 0 < share <= 1:  # NaN fails both comparisons
            raise ValueError("expected a share of the float model, above 0 and at most 1, such as 0.05 for 5 %")
        return share

    @field_validator("amounts")
    @classmethod
    def _are_amounts(cls, amounts: dict[str, float]) -> dict[str, float]:
        if not amounts.keys() <= set(MEASURES) or not all(0 < x < math.inf for x in amounts.values()):
            raise ValueError(f"expected numbers above 0 by measure, of {MEASURES}")
        return amounts

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if both := sorted(self.limits.keys() & self.amounts.keys()):
            raise ValueError(f"{both[0]} is limited by a share and by an amount; expected one of them")
        if not self.asked:
            raise ValueError(
                f"no limit given; expected at least one of {', '.join(MEASURES)}, such as Budget(bops=0.05)"
            )
        return self

    @classmethod
    def of(cls, budget: Budget | float | str) -> Budget:
        """A budget as it is, or from a number or text. Raises BudgetError."""
        return budget if isinstance(budget, Budget) else cls.parse(str(budget))

    @property
    def limits(self) -> dict[str, float]:
        return {name: share for name in MEASURES if (share := getattr(self, name)) is not None}

    @property
    def asked(self) -> dict[str, Any]:
        """The fields that were given, to the last digit."""
        return self.model_dump(exclude_defaults=True)

    def absolute(self, whole: Mapping[str, Any]) -> dict[str, Any]:
        """The limits in the measures' own units: the largest number, whole but for seconds, whose share of the float
        model's cost is at most that, as numbers are divided here.

        Args:
            whole: measure -> cost of the float model.

        Raises:
            BudgetError: a limit on what was not measured.
        """
        for measure in {**self.limits, **self.amounts}:
            if measure not in whole:
                raise BudgetError(f"a limit on {measure}, which was not measured; give the cost model a timing")
        limits = {measure: _largest(share, whole[measure]) for measure, share in self.limits.items()}
        for measure, amount in self.amounts.items():
            limits[measure] = min(whole[measure], amount if measure == "latency" else math.floor(amount))
        return limits

    def shares(self, cost: Cost) -> dict[str, float]:
        """Measure -> share of `cost.reference`, for all measures. Raises ValueError if there is no reference."""
        reference = cost.reference
        if reference is None:
            raise ValueError("this cost has no reference; compare with Cost(..., reference=cost_of_the_float_model)")
        price, whole = cost.by_measure, reference.by_measure
        return {m: price[m] / whole[m] if whole[m] else (math.inf if price[m] else 0.0) for m in price}

    def is_satisfied_by(self, cost: Cost) -> bool:
        """True if every limit holds. Raises ValueError if the cost has no reference, or not what a limit measures."""
        if cost.reference is None:
            raise ValueError("this cost has no reference; compare with Cost(..., reference=cost_of_the_float_model)")
        price = cost.by_measure
        return all(price[measure] <= limit for measure, limit in self.absolute(cost.reference.by_measure).items())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a budget from text; see the table above. Raises BudgetError."""
        limits: dict[str, float] = {}
        amounts: dict[str, float] = {}
        for part in text.split(","):
            name, separator, number = (piece.strip() for piece in part.rpartition("="))
            unit = _UNIT.fullmatch(number)
            measures, factor = _UNITS[unit[2]] if unit else (("bops",), 1.0)
            name = name if separator else measures[0]
            if name not in MEASURES or name in limits or name in amounts:
                problem = f"is unknown; expected one of {MEASURES}" if name not in MEASURES else "more than once"
                raise BudgetError(f"budget {text!r}: measure {name!r} {problem}. Write it like bops=5%,size=20%.")
            if unit and name not in measures:
                raise BudgetError(f"budget {text!r}: {number!r} is no amount of {name}, but of {' or '.join(measures)}")
            try:
                if unit:
                    amounts[name] = float(unit[1]) * factor
                else:
                    limits[name] = share_of(number)
            except ValueError:
                raise BudgetError(
                    f"budget {text!r}: {number!r} is no share or amount; expected 5%, 1/20, 20x, 300M, 2MB or 5ms"
                ) from None
        return cls(**limits, amounts=amounts)


_COUNTED, _STORED, _TIMED = ("macs", "bops", "params"), ("size",), ("latency",)
_UNITS = {  # as written -> the measures that have it, the first where none is named, and what it is in theirs
    **{letter: (_COUNTED, 1000.0**i) for i, letter in enumerate("KMGT", 1)},
    "k": (_COUNTED, 1e3),
    "B": (_STORED, 8.0),
    **{f"{letter}B": (_STORED, 8 * 1000.0**i) for i, letter in enumerate("kMGT", 1)},
    "KB": (_STORED, 8e3),
    **{f"{letter}iB": (_STORED, 8 * 1024.0**i) for i, letter in enumerate("KMGT", 1)},
    "us": (_TIMED, 1e-6),
    "ms": (_TIMED, 1e-3),
    "s": (_TIMED, 1.0),
}
_UNIT = re.compile(rf"(.*?)\s*({'|'.join(_UNITS)})")


def share_of(text: str) -> float:
    """A share as a number: "5%", "0.05", "1/20" and "20x" are the same. Raises ValueError for any other text."""
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        if text.endswith("x"):
            return 1 / float(text[:-1])
        over, _, under = text.partition("/")
        return float(over) / float(under) if under else float(text)
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


def _largest(share: float, whole: Any) -> Any:
    """The largest part of the whole, a whole number or seconds, with part / whole <= share."""
    if not whole:
        return whole
    if isinstance(whole, float):
        part = share * whole
        while part / whole > share:
            part = math.nextafter(part, 0)
        while (more := math.nextafter(part, math.inf)) / whole <= share:
            part = more
        return part
    # reason: what is no farther than half way to the next number is divided to the share itself
    bound = (Fraction(share) + Fraction(math.nextafter(share, math.inf))) / 2
    part = min(whole, math.floor(bound * whole))
    return part if part / whole <= share else part - 1
