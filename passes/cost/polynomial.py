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
    Values of all variables are a vector x (variables + 1,), whose last number is 1; what stands for a mean of whole
    numbers, such as the bits of a layer's channels, is their sum in `x` and their number in `over`, of the same shape.
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
        """Numbers of the variables of each term, (terms, most factors); -1, the last of a vector, where there are
        fewer."""
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
        """The value; of a polynomial that is exact, at whole numbers, a whole number, rounded up where means leave a
        fraction."""
        products = self.coefficients * x[self.index].prod(1)
        total = products.sum()
        if not self.is_exact:
            return float(total if over is None else (products / over[self.index].prod(1)).sum())
        if not total < _EXACT:
            return self._large(x, over)
        if over is None:
            return int(total)
        whole, rest = np.divmod(products, divisors := over[self.index].prod(1))
        left = sum((Fraction(int(rest[k]), int(divisors[k])) for k in np.flatnonzero(rest)), Fraction(0))
        return int(whole.sum()) + math.ceil(left)

    def _large(self, x: Array, over: Array | None) -> int:
        """The value where float64 does not hold it."""
        values = [Fraction(int(n), 1 if over is None else int(over[i])) for i, n in enumerate(x)]
        return math.ceil(self.substituted(values.__getitem__))

    # -- other readings ------------------------------------------------------------------------------------------------

    def tensor(self, x: Tensor) -> Tensor:
        """The value, a scalar, differentiable."""
        index = torch.as_tensor(self.index, device=x.device)
        total = torch.as_tensor(self.coefficients, dtype=x.dtype, device=x.device)
        for column in index.unbind(1):
            total = total * x[column]
        return total.sum()

    def slopes(self, x: Array) -> Array:
        """Derivatives by each variable, (variables + 1,), of which the last means nothing."""
        factors, slopes = x[self.index], np.zeros(len(x))
        for k in range(factors.shape[1]):
            others = self.coefficients * np.delete(factors, k, 1).prod(1)
            np.add.at(slopes, self.index[:, k], others)
        return slopes

    def tables(self, x: Array, decisions: Sequence[Mapping[int, Array]]) -> Tables:
        """The polynomial over decisions, each the values (choices,) of the variables it moves; the others are at x.

        Raises:
            ValueError: a term with more than two decisions.
        """
        owner = {number: i for i, varied in enumerate(decisions) for number in varied}
        owned = np.isin(self.index, list(owner))
        fixed = self.coefficients * np.where(owned, 1.0, x[self.index]).prod(1)
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


class Together:
    """Several polynomials as one array of terms.

    Attributes:
        index, coefficients: as of `Polynomial`, one after the other. owner: (terms,), which of them a term belongs to.
    """

    def __init__(self, polynomials: Sequence[Polynomial]) -> None:
        self.polynomials = polynomials
        width = max(polynomial.index.shape[1] for polynomial in polynomials)
        padded = [np.pad(p.index, ((0, 0), (0, width - p.index.shape[1])), constant_values=-1) for p in polynomials]
        self.index = np.concatenate(padded)
        self.coefficients = np.concatenate([polynomial.coefficients for polynomial in polynomials])
        self.owner = np.repeat(np.arange(len(polynomials)), [len(p.terms) for p in polynomials])
        self._exact = all(polynomial.is_exact for polynomial in polynomials)

    def sums(self, x: Array, rows: Any = slice(None)) -> Array:
        """What the terms of some rows come to, (polynomials,) float64."""
        products = self.coefficients[rows] * x[self.index[rows]].prod(1)
        return np.bincount(self.owner[rows], products, len(self.polynomials)).astype(float)

    def __call__(self, x: Array, over: Array | None = None) -> list[Any]:
        """The values, as `Polynomial` gives them."""
        if over is None and self._exact and (sums := self.sums(x)).max() < _EXACT:
            return [int(value) for value in sums.tolist()]
        return [polynomial(x, over) for polynomial in self.polynomials]


def _terms(value: Any) -> Mapping[tuple[int, ...], Any]:
    return value.terms if isinstance(value, Polynomial) else {(): value}
