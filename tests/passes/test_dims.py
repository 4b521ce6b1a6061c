"""The algebra of dim types against plain index arithmetic: hypothesis draws types, numpy-like arrays answer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Axis, Conflict, Const, Dim, Prod, Sum

SOME = settings(max_examples=settings().max_examples // 3)  # reason: all tests use the algebra


@st.composite
def types(draw: st.DrawFn, depth: int = 2, pool: list[Axis] | None = None) -> Dim:
    """A type of at most a few hundred coordinates, in normal form; over the axes of `pool`, or over new ones."""
    axis = st.integers(2, 4).map(Axis) if pool is None else st.sampled_from(pool)
    kind = draw(st.sampled_from(("sum", "product", "axis", "constant"))) if depth else draw(st.sampled_from("ac"))
    if kind in ("axis", "a"):
        return draw(axis)
    if kind in ("constant", "c"):
        return Const(draw(st.integers(1, 4)))
    parts = [draw(types(depth - 1, pool)) for _ in range(draw(st.integers(2, 3)))]
    if kind == "sum" and draw(st.booleans()):
        parts.append(parts[0])
    whole = d.concatenate(parts) if kind == "sum" else d.product(parts)
    return whole if whole.size <= 400 else parts[0]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Dim, Dim]:
    """Two types of equal size, each a regrouping of the same parts where possible, over axes that they may share."""
    pool = [Axis(size) for size in (2, 2, 3, 4, 4, 6)]
    a, b = draw(types(1, pool)), draw(types(1, pool))
    build = draw(st.sampled_from((d.concatenate, d.product)))
    how = draw(st.sampled_from(("swapped", "free", "one axis", "any")))
    if how == "swapped":
        return build([a, b]), build([b, a])
    if how == "free":
        return build([a, b, a]), build([Axis(part.size) if part.size > 1 else d.ONE for part in (a, a, b)])
    if how == "one axis":
        whole = build([a, b])
        return d.concatenate([whole, whole]), d.concatenate([d.fresh(whole.size), d.fresh(whole.size)])
    return (a, b) if a.size == b.size else (d.product([a, Const(b.size)]), d.product([Const(a.size), b]))


def keep(data: st.DataObject, *dims: Dim) -> dict[Axis, Tensor]:
    """Random non-empty subsets of all free axes of the given types."""
    free = {axis: None for dim in dims for axis in d.axes(dim)}
    return {axis: torch.tensor(sorted(data.draw(st.sets(st.integers(0, axis.size - 1), min_size=1)))) for axis in free}


def brute_force(dim: Dim, kept: dict[Axis, Tensor]) -> Tensor:
    """Kept coordinates of a type by slicing an array that holds the number of every coordinate."""
    dim = d.resolve(dim)
    whole = torch.arange(dim.size)
    if isinstance(dim, Axis):
        return whole[kept[dim]]
    if isinstance(dim, Sum):
        parts = whole.split([item.size for item in dim.items])
        return torch.cat([part[brute_force(item, kept)] for part, item in zip(parts, dim.items, strict=True)])
    if isinstance(dim, Prod):
        array = whole.reshape([part.size for part in dim.factors])
        for i, part in enumerate(dim.factors):
            array = array.index_select(i, brute_force(part, kept))
        return array.flatten()
    return whole


def normal(dim: Dim) -> bool:
    """Flat, no neighbouring constants, no ones in products, no empty items, no singletons, true sizes."""
    if isinstance(dim, (Const, Axis)):
        return True
    parts = dim.items if isinstance(dim, Sum) else dim.factors
    neighbours = zip(parts, parts[1:], strict=False)
    empty = 0 if isinstance(dim, Sum) else 1
    total = torch.tensor([p.size for p in parts])
    return (
        len(parts) > 1
        and not any(type(p) is type(dim) or p.size == empty for p in parts)
        and not any(isinstance(a, Const) and isinstance(b, Const) for a, b in neighbours)
        and dim.size == int(total.sum() if isinstance(dim, Sum) else total.prod())
        and all(normal(p) for p in parts)
    )


def renamed(dim: Dim, names: dict[Axis, Dim]) -> Dim:
    """The same type over other axes."""
    dim = d.resolve(dim)
    if isinstance(dim, Const):
        return dim
    if isinstance(dim, Axis):
        return names.setdefault(dim, Axis(dim.size))
    parts = [renamed(p, names) for p in (dim.items if isinstance(dim, Sum) else dim.factors)]
    return d.concatenate(parts) if isinstance(dim, Sum) else d.product(parts)


def divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]


# Laws


@SOME
@given(types(), st.data())
def test_kept_index_is_slicing(dim: Dim, data: st.DataObject) -> None:
    kept = keep(data, dim)
    index = d.kept_index(dim, kept)
    assert index.tolist() == brute_force(dim, kept).tolist()
    assert len(index) == d.evaluate(dim, lambda axis: len(kept[axis]))
    assert d.kept_index(dim, {}).tolist() == list(range(dim.size))
    assert index.tolist() == sorted(set(index.tolist()))


@SOME
@given(types(), types(), types())
def test_normal_form(a: Dim, b: Dim, c: Dim) -> None:
    for build in (d.concatenate, d.product):
        assert normal(build([a, b, c]))
        assert build([a, build([b, c])]) == build([build([a, b]), c]) == build([a, b, c])
        assert build([a]) == a
    assert d.product([a, d.ONE]) == d.product([d.ONE, a]) == a
    assert d.concatenate([a, Const(0)]) == d.concatenate([Const(0), a]) == a
    assert d.product([a, Const(0)]) == Const(0)


@SOME
@given(types(), st.data())
def test_split_then_concatenate_is_identity(dim: Dim, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, dim.size))
    try:
        first, rest = d.split(dim, size)
    except Conflict:
        assert dim.size == d.resolve(dim).size
        return
    assert (first.size, rest.size, d.resolve(dim).size) == (size, dim.size - size, dim.size)
    whole = d.resolve(d.concatenate([d.resolve(first), d.resolve(rest)]))
    kept = keep(data, dim, whole)
    assert d.kept_index(whole, kept).tolist() == d.kept_index(dim, kept).tolist()


@SOME
@given(types(), st.data())
def test_factor_then_product_is_identity(dim: Dim, data: st.DataObject) -> None:
    size = data.draw(st.sampled_from(divisors(dim.size)))
    try:
        major, minor = d.factor(dim, size)
    except Conflict:
        assert dim.size == d.resolve(dim).size
        return
    assert (major.size, minor.size, d.resolve(dim).size) == (dim.size // size, size, dim.size)
    whole = d.resolve(d.product([d.resolve(major), d.resolve(minor)]))
    kept = keep(data, dim, whole)
    assert d.kept_index(whole, kept).tolist() == d.kept_index(dim, kept).tolist()


@given(pairs(), st.data())
def test_types_that_unify_keep_the_same_coordinates(pair: tuple[Dim, Dim], data: st.DataObject) -> None:
    a, b = pair
    try:
        d.unify(a, b)
    except Conflict:
        assert d.resolve(a).size == d.resolve(b).size == a.size
        return
    kept = keep(data, a, b)
    assert d.kept_index(a, kept).tolist() == d.kept_index(b, kept).tolist()
    assert set(d.axes(a)) == set(d.axes(b))


@SOME
@given(types(), st.data())
def test_a_type_unifies_with_itself_over_other_axes(dim: Dim, data: st.DataObject) -> None:
    other = renamed(dim, {})
    d.unify(dim, other)
    kept = keep(data, dim, other)
    assert d.kept_index(dim, kept).tolist() == d.kept_index(other, kept).tolist()
    assert len(d.axes(dim)) == len(d.axes(other))


@SOME
@given(types(), st.data())
def test_an_axis_takes_any_type_of_its_size(dim: Dim, data: st.DataObject) -> None:
    assume(dim.size > 1)
    axis = Axis(dim.size)
    d.unify(axis, dim)
    kept = keep(data, dim)
    assert d.kept_index(axis, kept).tolist() == brute_force(dim, kept).tolist()


@SOME
@given(types())
def test_pinning_leaves_no_axis_and_gives_the_reason(dim: Dim) -> None:
    had = bool(d.axes(dim))
    d.pin(dim, "because")
    assert d.axes(dim) == []
    assert ("because" in d.reasons(dim)) == had
    assert d.kept_index(dim, {}).tolist() == list(range(dim.size))


@SOME
@given(types(), types())
def test_agreeing_with_a_constant_hands_on_its_reason(dim: Dim, other: Dim) -> None:
    had = bool(d.axes(dim))
    d.unify(dim, Const(dim.size, ("because",)))
    assert d.axes(dim) == []
    assert ("because" in d.reasons(dim)) == had


# Cases that real models meet


def test_refining_reaches_every_occurrence() -> None:
    stream, heads, width = Axis(12), Axis(3), Axis(4)
    both = d.concatenate([stream, stream])
    d.unify(stream, d.product([heads, width]))
    kept = {heads: torch.tensor([0, 2]), width: torch.tensor([1])}
    assert d.kept_index(both, kept).tolist() == [1, 9, 13, 21]
    assert str(d.resolve(both)) == f"({heads} x {width} + {heads} x {width})"


def test_halves_that_must_agree_are_one_axis_twice() -> None:
    whole = Axis(6)
    first, second = d.split(whole, 3)
    d.unify(first, second)
    assert d.axes(whole) == d.axes(first) == d.axes(second)
    assert d.kept_index(whole, {d.axes(first)[0]: torch.tensor([1])}).tolist() == [1, 4]


def test_an_axis_is_never_bound_to_a_type_that_holds_it() -> None:
    axis = Axis(4)
    with pytest.raises(Conflict, match="occurs in"):
        d.unify(axis, d.Sum((axis,), 4))
    d.unify(d.concatenate([axis, Const(2)]), d.concatenate([Const(2), axis]))
    assert d.axes(axis) == []  # two constants, then whatever stood two places before


def test_a_boundary_inside_a_free_product_conflicts() -> None:
    with pytest.raises(Conflict, match="cannot be cut after 4 of 12"):
        d.split(d.product([Axis(4), Const(3)]), 4)


def test_one_coordinate_is_never_an_axis() -> None:
    assert d.fresh(1) == Const(1)
    assert isinstance(d.fresh(2), Axis)


def test_products_and_sums_by_hand() -> None:
    a, b, c = d.Axis(2), d.Axis(3), d.Axis(5)
    assert d.evaluate(d.product([a, b, d.Const(4)]), lambda axis: axis.size) == 2 * 3 * 4
    assert d.evaluate(d.concatenate([a, d.product([a, b])]), lambda axis: axis.size - 1) == 1 + 1 * 2
    major, minor = d.factor(d.product([a, b, c]), 15)
    assert (major, str(minor)) == (a, f"{b} x {c}")
    first, rest = d.split(d.concatenate([a, b, c]), 5)
    assert (str(first), rest) == (f"({a} + {b})", c)
    both = d.concatenate([d.Const(2, ("one",)), d.Const(3, ("other",))])
    assert d.reasons(both) == d.reasons(d.product([d.Const(2, ("one",)), d.Const(3, ("other",))])) == ("one", "other")


def test_a_cut_inside_a_constant_product_by_hand() -> None:
    """Of 4 x 3 after 7: two whole threes and one of the third, then two of it and the last."""
    minor = d.Axis(3)
    first, rest = d.split(d.product([d.Const(4), minor]), 7)
    assert (first.size, rest.size) == (7, 5)
    assert d.evaluate(first, lambda axis: axis.size) + d.evaluate(rest, lambda axis: axis.size) == 12


def test_factors_of_unequal_sizes_agree_by_hand() -> None:
    """6 x 2 with 3 x 4: the minor 4 becomes 2 x 2, so that both are 3 x 2 x 2."""
    x, y = d.product([d.Axis(6), d.Axis(2)]), d.product([d.Axis(3), d.Axis(4)])
    d.unify(x, y)
    assert [part.size for part in d.resolve(x).factors] == [3, 2, 2]  # type: ignore[union-attr]
    assert d.resolve(x) == d.resolve(y)
