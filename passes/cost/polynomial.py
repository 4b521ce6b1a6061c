"""`Polynomial`: a cost as a value over kept channels and bitwidths, read in many ways.

In: coefficients by products of variables. Out: numbers, tensors with gradients, slopes, tables of choices, sympy.
Holds: whole numbers in, whole numbers out; every reading is an evaluation of the same terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
_EXACT = 2.0**53  # below it float64 holds every whole number, and so every product and sum on the way to one


class Variable(NamedTuple):
    """What a plan decides: the kept count of a channel group, the bits of a weight or of an activation tensor; and
    whether a weight is quantised (1) or float (0), as its scales are stored then."""

    kind: Literal["channels", "weight", "activation", "quantised"]
    name: str


class Tables(NamedTuple):
    """A polynomial where some variables may take several values, the others one: `constant`, and what comes to it by
    one decision (choices,) or by two together (choices of the first, of the second), by their numbers."""

    constant: float
    single: dict[int, Array]
    pairs: dict[tuple[int, int], Array]


class Polynomial:
    """Sum of coefficient * product of variables.

    `terms` maps the sorted numbers of the variables of a product, repeated where a power is meant, to its coefficient.
    Values of all variables are a vector (variables,); what stands for a mean of whole numbers, such as the bits of a
    layer's channels, is their sum in `x` and their number in `over`.
    """

    def __init__(self, terms: Mapping[tuple[int, ...], Any]) -> None:
        self.terms = dict(terms)

    @classmethod
    def variable(cls, number: int) -> Polynomial:
        return cls({(number,): 1})

    def __add__(self, other: Any) -> Polynomial:
        total = dict(self.terms)
        for key, value in _terms(other).items():
            total[key] = total.get(key, 0) + value
        return Polynomial(total)

    def __mul__(self, other: Any) -> Polynomial:
        total: dict[tuple[int, ...], Any] = {}
        for left, a in self.terms.items():
            for right, b in _terms(other).items():
                key = tuple(sorted(left + right))
                total[key] = total.get(key, 0) + a * b
        return Polynomial(total)

    __radd__, __rmul__ = __add__, __mul__

    # -- numbers -----------------------------------------------------------------------------------------------------

    @cached_property
    def index(self) -> Array:
        """Numbers of the variables of each term, (terms, most factors); -1 stands for one that is always 1."""
        width = max((len(key) for key in self.terms), default=0)
        index = np.full((len(self.terms), width), -1)
        for row, key in enumerate(self.terms):
            index[row, : len(key)] = key
        return index

    @cached_property
    def coefficients(self) -> Array:
        """Of each term, (terms,) float64, which holds whole numbers to 2^53 exactly."""
        return np.array(list(self.terms.values()), float)

    @cached_property
    def is_exact(self) -> bool:
        """Whether all coefficients are whole numbers, and so the values at whole numbers."""
        return all(isinstance(value, int) for value in self.terms.values())

    def __call__(self, x: Array, over: Array | None = None) -> Any:
        """The value at whole numbers; of a polynomial that is exact, a whole number, rounded up where means leave a
        fraction.

        Args:
            x: (variables,) int64. over: (variables,) int64, divisors of x; None: all 1.
        """
        products = self.coefficients * self._factors(x.astype(float)).prod(1)
        if not self.is_exact:
            divisors = 1.0 if over is None else self._factors(over.astype(float)).prod(1)
            return float((products / divisors).sum())
        if not products.sum() < _EXACT:
            return self._large(x, over)
        if over is None:
            return int(products.sum())
        divisors = self._factors(over).prod(1)
        whole, rest = np.divmod(products.astype(np.int64), divisors)
        left = sum((Fraction(int(rest[k]), int(divisors[k])) for k in np.flatnonzero(rest)), Fraction(0))
        return int(whole.sum()) + math.ceil(left)

    def _large(self, x: Array, over: Array | None) -> int:
        """The value where float64 does not hold it."""
        values = [Fraction(int(n), 1 if over is None else int(over[i])) for i, n in enumerate(x)]
        return math.ceil(self.substituted(values.__getitem__))

    def _factors(self, x: Array) -> Array:
        """Factors of each term, (terms, most factors)."""
        return np.append(x, np.ones(1, x.dtype))[self.index]

    # -- other readings ------------------------------------------------------------------------------------------------

    def tensor(self, x: Tensor) -> Tensor:
        """The value at x (variables,), a scalar, differentiable."""
        index = torch.as_tensor(self.index, device=x.device)
        padded = torch.cat([x, x.new_ones(1)])
        total = torch.as_tensor(self.coefficients, dtype=x.dtype, device=x.device)
        for column in index.unbind(1):
            total = total * padded[column]
        return total.sum()

    def slopes(self, x: Array) -> Array:
        """Derivatives by each variable at x, both (variables,) float64."""
        factors = self._factors(x.astype(float))
        slopes = np.zeros(len(x) + 1)
        for k in range(factors.shape[1]):
            others = self.coefficients * np.delete(factors, k, 1).prod(1)
            np.add.at(slopes, self.index[:, k], others)  # -1 is the last place, which is left out below
        return slopes[:-1]

    def along(self, x: Array, varied: Mapping[int, Array], rows: Array) -> Array:
        """What the terms `rows` come to, (choices,) float64, as some variables take their values (choices,)."""
        factors = np.append(x, 1.0)[self.index[rows]][..., None]
        for number, values in varied.items():
            factors = np.where((self.index[rows] == number)[..., None], values, factors)
        return self.coefficients[rows] @ factors.prod(1)

    def rows_of(self, numbers: Sequence[int]) -> Array:
        """Numbers of the terms that hold any of these variables."""
        return np.flatnonzero(np.isin(self.index, list(numbers)).any(1))

    def tables(self, x: Array, decisions: Sequence[Mapping[int, Array]]) -> Tables:
        """The polynomial over decisions, each the values (choices,) of the variables it moves; the others are at x.

        Raises:
            ValueError: a term with more than two decisions.
        """
        owner = {number: i for i, varied in enumerate(decisions) for number in varied}
        owned = np.isin(self.index, list(owner))
        fixed = self.coefficients * np.where(owned, 1.0, self._factors(x.astype(float))).prod(1)
        sums: dict[tuple[int, ...], float] = {}
        for row, numbers in enumerate(np.where(owned, self.index, -1).tolist()):
            key = tuple(n for n in numbers if n >= 0)
            sums[key] = sums.get(key, 0.0) + float(fixed[row])
        constant, single, pairs = 0.0, dict[int, Array](), dict[tuple[int, int], Array]()
        for key, value in sums.items():
            factors: dict[int, Array] = {}
            for number in key:
                i = owner[number]
                factors[i] = factors.get(i, 1.0) * decisions[i][number]
            places = sorted(factors)
            if not places:
                constant += value
            elif len(places) == 1:
                single[places[0]] = single.get(places[0], 0.0) + value * factors[places[0]]
            elif len(places) == 2:
                product = value * np.multiply.outer(factors[places[0]], factors[places[1]])
                pairs[places[0], places[1]] = pairs.get((places[0], places[1]), 0.0) + product
            else:
                raise ValueError(f"{len(places)} decisions in one product; expected at most 2")
        return Tables(constant, single, pairs)

    def substituted(self, value: Callable[[int], Any]) -> Any:
        """The value with anything that adds and multiplies, such as sympy symbols, in the place of variables."""
        total: Any = 0
        for key, coefficient in self.terms.items():
            product: Any = coefficient
            for number in key:
                product = product * value(number)
            total = total + product
        return total


def _terms(value: Any) -> Mapping[tuple[int, ...], Any]:
    return value.terms if isinstance(value, Polynomial) else {(): value}
