"""Dim types: what the coordinates of one tensor dimension are made of.

A type is `Const(n)`, an axis variable `Axis`, a concatenation `Sum` or a row-major product `Prod` of types. Rules ask
three things of the algebra: `unify` two types that must agree, `split` a type after its first p coordinates, `factor`
a type into major x minor. Each refines axes by binding them (union-find); refinement is monotone, so one forward pass
over a graph suffices. Invariant: the size of a type never changes, however its axes are refined.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch


@dataclass(frozen=True)
class Const:
    """`size` coordinates that all stay. `why` names what pinned them; empty for spatial, token and batch dimensions."""

    size: int
    why: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        return str(self.size)


class Axis:
    """A channel axis: `size` coordinates that may be kept or removed one by one. Bound once it is refined."""

    __slots__ = ("binding", "index", "name", "size")
    _count = itertools.count()

    def __init__(self, size: int) -> None:
        self.size = size
        self.index = next(Axis._count)
        self.binding: Dim | None = None
        self.name = ""

    def __str__(self) -> str:
        return self.name or f"axis{self.index}"

    def __repr__(self) -> str:
        return f"Axis({self}, size={self.size})"


@dataclass(frozen=True)
class Sum:
    """Concatenation of `items`. Build with `concatenate`, which keeps the normal form."""

    items: tuple[Dim, ...]
    size: int

    def __str__(self) -> str:
        return "(" + " + ".join(str(i) for i in self.items) + ")"


@dataclass(frozen=True)
class Prod:
    """Row-major product of `factors`, the last one minor. Build with `product`, which keeps the normal form."""

    factors: tuple[Dim, ...]
    size: int

    def __str__(self) -> str:
        return " x ".join(str(f) for f in self.factors)


Dim: TypeAlias = Const | Axis | Sum | Prod
ONE = Const(1)


class Conflict(Exception):
    """Two types cannot agree; the caller pins both."""


def fresh(size: int) -> Dim:
    """A new axis; a single coordinate is never an axis, since it cannot be removed."""
    return Axis(size) if size > 1 else Const(size)


def concatenate(items: Sequence[Dim]) -> Dim:
    """Normal form of a concatenation: flat, neighbouring constants merged, empty items dropped."""
    flat: list[Dim] = []
    for item in items:
        for part in item.items if isinstance(item, Sum) else (item,):
            if part.size == 0:
                continue
            last = flat[-1] if flat else None
            if isinstance(part, Const) and isinstance(last, Const):
                flat[-1] = Const(last.size + part.size, _merge(last, part))
            else:
                flat.append(part)
    if len(flat) == 1:
        return flat[0]
    return Sum(tuple(flat), sum(f.size for f in flat)) if flat else Const(0)


def product(factors: Sequence[Dim]) -> Dim:
    """Normal form of a row-major product: flat, neighbouring constants merged, ones dropped; never distributed."""
    flat: list[Dim] = []
    size = 1
    for factor_ in factors:
        for part in factor_.factors if isinstance(factor_, Prod) else (factor_,):
            size *= part.size
            if part.size == 1:
                continue
            last = flat[-1] if flat else None
            if isinstance(part, Const) and isinstance(last, Const):
                flat[-1] = Const(last.size * part.size, _merge(last, part))
            else:
                flat.append(part)
    if size == 0:
        return Const(0)
    if len(flat) == 1:
        return flat[0]
    return Prod(tuple(flat), size) if flat else ONE


def _merge(a: Const, b: Const) -> tuple[str, ...]:
    return a.why if not b.why else tuple(dict.fromkeys((*a.why, *b.why)))


def resolve(dim: Dim) -> Dim:
    """The type with every bound axis replaced, in normal form."""
    if isinstance(dim, Const):
        return dim
    if isinstance(dim, Axis):
        if dim.binding is not None:
            dim.binding = resolved = resolve(dim.binding)
            return resolved
        return dim
    parts = dim.items if isinstance(dim, Sum) else dim.factors
    resolved_parts = [resolve(p) for p in parts]
    if all(new is old for new, old in zip(resolved_parts, parts, strict=True)):
        return dim
    return concatenate(resolved_parts) if isinstance(dim, Sum) else product(resolved_parts)


def axes(dim: Dim) -> list[Axis]:
    """The free axes of a type, in order, each once."""
    result: dict[Axis, None] = {}
    stack = [resolve(dim)]
    while stack:
        top = stack.pop()
        if isinstance(top, Axis):
            result.setdefault(top)
        elif not isinstance(top, Const):
            stack.extend(reversed(top.items if isinstance(top, Sum) else top.factors))
    return list(result)


def reasons(dim: Dim) -> tuple[str, ...]:
    """What pinned the constant parts of a type."""
    dim = resolve(dim)
    if isinstance(dim, Const):
        return dim.why
    if isinstance(dim, Axis):
        return ()
    parts = dim.items if isinstance(dim, Sum) else dim.factors
    return tuple(dict.fromkeys(w for p in parts for w in reasons(p)))


def pin(dim: Dim, why: str) -> None:
    """Bind every free axis of a type to a constant, with the reason."""
    for axis in axes(dim):
        axis.binding = Const(axis.size, (why,))


def unify(a: Dim, b: Dim) -> None:
    """Make two types agree by refining their axes. Raises Conflict if no refinement does."""
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if a.size != b.size:
        raise Conflict(f"{a} has {a.size} coordinates, {b} has {b.size}")
    if isinstance(a, Axis) or isinstance(b, Axis):
        axis, other = (a, b) if isinstance(a, Axis) else (b, a)
        assert isinstance(axis, Axis)
        if isinstance(other, Axis) and other.index > axis.index:
            axis, other = other, axis
        if axis in axes(other):
            raise Conflict(f"{axis} occurs in {other}")
        axis.binding = other
    elif isinstance(a, Const) or isinstance(b, Const):
        constant, other = (a, b) if isinstance(a, Const) else (b, a)
        assert isinstance(constant, Const)
        for axis in axes(other):
            axis.binding = Const(axis.size, constant.why)
    elif isinstance(a, Prod) and isinstance(b, Prod):
        _unify_products(a, b)
    else:
        _unify_sums(a, b)


def _unify_products(a: Prod, b: Prod) -> None:
    left, right = list(a.factors), list(b.factors)
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size == y.size:
            unify(x, y)
        elif x.size > y.size:
            major, minor = factor(x, y.size)
            unify(minor, y)
            left.append(major)
        else:
            major, minor = factor(y, x.size)
            unify(x, minor)
            right.append(major)


def _unify_sums(a: Dim, b: Dim) -> None:
    left, right = [a], [b]
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if isinstance(x, Sum) or isinstance(y, Sum):
            left.extend(reversed(x.items if isinstance(x, Sum) else (x,)))
            right.extend(reversed(y.items if isinstance(y, Sum) else (y,)))
        elif x.size == y.size:
            unify(x, y)
        elif x.size > y.size:
            first, rest = split(x, y.size)
            unify(first, y)
            left.append(rest)
        else:
            first, rest = split(y, x.size)
            unify(x, first)
            right.append(rest)


def split(dim: Dim, size: int) -> tuple[Dim, Dim]:
    """The first `size` coordinates and the rest. Raises Conflict where the boundary cuts a product apart."""
    dim = resolve(dim)
    if size == 0:
        return Const(0), dim
    if size == dim.size:
        return dim, Const(0)
    if isinstance(dim, Const):
        return Const(size, dim.why), Const(dim.size - size, dim.why)
    if isinstance(dim, Axis):
        first, rest = fresh(size), fresh(dim.size - size)
        dim.binding = concatenate([first, rest])
        return first, rest
    if isinstance(dim, Sum):
        before: list[Dim] = []
        for i, item in enumerate(dim.items):
            if size < item.size:
                first, rest = split(item, size)
                return concatenate([*before, first]), concatenate([rest, *dim.items[i + 1 :]])
            size -= item.size
            before.append(item)
            if size == 0:
                return concatenate(before), concatenate(dim.items[i + 1 :])
    assert isinstance(dim, Prod)
    major, minor = dim.factors[0], product(dim.factors[1:])
    if size % minor.size == 0:
        first, rest = split(major, size // minor.size)
        return product([first, minor]), product([rest, minor])
    if isinstance(major, Const):
        whole = size // minor.size
        first, rest = split(minor, size % minor.size)
        after = product([Const(major.size - whole - 1, major.why), minor])
        return concatenate([product([Const(whole, major.why), minor]), first]), concatenate([rest, after])
    raise Conflict(f"{dim} cannot be cut after {size} of {dim.size} coordinates")


def factor(dim: Dim, size: int) -> tuple[Dim, Dim]:
    """(major, minor) with dim = major x minor and `size` coordinates in minor. Raises Conflict if there is none."""
    dim = resolve(dim)
    if size == 1:
        return dim, ONE
    if size == dim.size:
        return ONE, dim
    if size == 0 or dim.size % size:
        raise Conflict(f"{dim} of {dim.size} coordinates is no multiple of {size}")
    if isinstance(dim, Const):
        return Const(dim.size // size, dim.why), Const(size, dim.why)
    if isinstance(dim, Axis):
        major, minor = fresh(dim.size // size), fresh(size)
        dim.binding = product([major, minor])
        return major, minor
    if isinstance(dim, Sum):
        pairs = _factor_items(dim.items, size)
        for _, minor in pairs[1:]:
            unify(pairs[0][1], minor)
        return concatenate([resolve(major) for major, _ in pairs]), resolve(pairs[0][1])
    *rest, last = dim.factors
    if size <= last.size:
        major, minor = factor(last, size)
        return product([*rest, major]), minor
    if size % last.size:
        raise Conflict(f"{dim} has no minor factor of {size} coordinates")
    major, minor = factor(product(rest), size // last.size)
    return major, product([minor, last])


def _factor_items(items: Sequence[Dim], size: int) -> list[tuple[Dim, Dim]]:
    """(major, minor) of consecutive parts of a sum: of each item that is a multiple of `size`, else of the shortest run
    of items that is, cut every `size` coordinates; the major side of such a run stays whole."""
    pairs: list[tuple[Dim, Dim]] = []
    run: list[Dim] = []
    for item in items:
        run.append(item)
        whole = concatenate(run)
        if whole.size % size:
            continue
        if len(run) == 1:
            pairs.append(factor(item, size))
        else:
            rest: Dim = whole
            while rest.size:
                chunk, rest = split(rest, size)
                pairs.append((Const(1), chunk))
        run = []
    return pairs


def evaluate(dim: Dim, of_axis: Callable[[Axis], int]) -> int:
    """The size of a type when each free axis has size `of_axis(axis)`; any type with + and * will do."""
    dim = resolve(dim)
    if isinstance(dim, Const):
        return dim.size
    if isinstance(dim, Axis):
        return of_axis(dim)
    if isinstance(dim, Sum):
        total = evaluate(dim.items[0], of_axis)
        for item in dim.items[1:]:
            total = total + evaluate(item, of_axis)
        return total
    total = evaluate(dim.factors[0], of_axis)
    for part in dim.factors[1:]:
        total = total * evaluate(part, of_axis)
    return total


def kept_index(dim: Dim, kept: Mapping[Axis, torch.Tensor]) -> torch.Tensor:
    """Coordinates of a type that survive, ascending: int64 of shape (new size,). Axes not in `kept` stay whole."""
    dim = resolve(dim)
    if isinstance(dim, Const):
        return torch.arange(dim.size)
    if isinstance(dim, Axis):
        return kept[dim] if dim in kept else torch.arange(dim.size)
    if isinstance(dim, Sum):
        offsets = itertools.accumulate((i.size for i in dim.items), initial=0)
        return torch.cat([kept_index(i, kept) + o for i, o in zip(dim.items, offsets, strict=False)])
    index = torch.zeros(1, dtype=torch.int64)
    for part in dim.factors:
        index = (index[:, None] * part.size + kept_index(part, kept)[None, :]).flatten()
    return index
