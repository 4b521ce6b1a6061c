"""Policy, Budget and Cost: what is written is read back equal, and what means nothing is refused with its name."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import math
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbs_fx.plan import Budget, Cost, LayerCost, Plan, Policy, current_versions, errors
from sbs_fx.plan.errors import BudgetError, FileError, InfeasibleBudget, PolicyError, PolicyMismatch, SbsError
from sbs_fx.plan.files import checksum_of
from sbs_fx.plan.policy import CHANNEL_BITS, LAYER_BITS

NAMES = st.text(min_size=1, max_size=12)
WEIGHT_BITS = st.sampled_from(LAYER_BITS) | st.lists(st.sampled_from(CHANNEL_BITS), min_size=1, max_size=9)


@st.composite
def policies(draw: st.DrawFn) -> Policy:
    sizes = draw(st.dictionaries(NAMES, st.integers(1, 40), max_size=5))
    kept = {name: draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True)) for name, size in sizes.items()}
    return Policy(
        fingerprint=draw(st.text(max_size=20)),
        method=draw(NAMES),
        seed=draw(st.integers(-(2**70), 2**70)),
        kept=kept,
        sizes=sizes,
        weight_bits=draw(st.dictionaries(NAMES, WEIGHT_BITS, max_size=5)),
        activation_bits=draw(st.dictionaries(NAMES, st.sampled_from(LAYER_BITS), max_size=5)),
        nonzeros=draw(st.dictionaries(NAMES, st.integers(1, 2**60), max_size=3)),
    )


def example(**changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "fingerprint": "abc",
        "method": "uniform",
        "kept": {"stem": [0, 2, 3], "stage": [1]},
        "sizes": {"stem": 4, "stage": 2},
        "weight_bits": {"conv": 8, "fc": [0, 2, 4]},
        "activation_bits": {"conv": 8, "relu": 4},
    }
    return Policy(**{**fields, **changes})


# Policy


@given(policies())
def test_policy_json_policy(policy: Policy) -> None:
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert again.to_json() == policy.to_json()
    assert again.plan == policy.plan
    assert all(isinstance(bits, (int, tuple)) for bits in again.plan.weight_bits.values())  # as methods give them
    assert copy.deepcopy(policy) == policy


def test_policy_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text("what was there before")
    example().save(path)
    assert Policy.load(path) == example()
    assert os.listdir(tmp_path) == ["policy.json"]
    assert json.loads(path.read_text())["checksum"] == example().checksum


def test_policy_is_a_value() -> None:
    kept = {"stem": [3, 0, 2], "stage": [1]}
    policy = example(kept=kept)
    assert policy == example(), "kept coordinates are sorted"
    assert kept["stem"] == [3, 0, 2], "the caller's list is left alone"
    with pytest.raises(ValueError, match="frozen"):
        policy.seed = 1  # type: ignore[misc]
    assert policy.versions == current_versions()
    assert {"python", "torch", "sbs_fx"} <= policy.versions.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kept": {"stem": [0, 0], "stage": [1]}}, ["'stem'", "[0]", "more than once"]),
        ({"kept": {"stem": [0, 4, 9], "stage": [1]}}, ["'stem'", "[4, 9]", "0 to 3"]),
        ({"kept": {"stem": [-1], "stage": [1]}}, ["'stem'", "[-1]"]),
        ({"kept": {"stem": [], "stage": [1]}}, ["'stem'", "at least one"]),
        ({"kept": {"stem": [0]}}, ["['stage']", "only one of"]),
        ({"kept": {"stem": [0.0], "stage": [1]}}, ["kept.stem.0", "0.0"]),
        ({"sizes": {"stem": 0, "stage": 2}}, ["'stem'"]),
        ({"weight_bits": {"conv": 7}}, ["'conv'", "[7]", "(2, 3, 4, 5, 6, 8, 32)"]),
        ({"weight_bits": {"conv": [2, 32]}}, ["'conv'", "[32]", "(0, 2, 3, 4, 5, 6, 8)"]),
        ({"weight_bits": {"conv": []}}, ["'conv'", "empty"]),
        ({"activation_bits": {"relu": 0}}, ["'relu'", "[0]"]),
        ({"activation_bits": {"relu": True}}, ["activation_bits.relu"]),
        ({"nonzeros": {"fc": 0}}, ["nonzeros.fc", "greater than 0"]),
        ({"grid": "symmetric"}, ["grid", "symmetric"]),
        ({"format": 1}, ["format", "2"]),
        ({"colour": "red"}, ["colour", "red"]),
        ({"seed": "0"}, ["seed", "'0'"]),
    ],
)
def test_policy_that_contradicts_itself(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PolicyError) as caught:
        example(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


@given(policies(), st.data())
def test_truncated_policy(policy: Policy, data: st.DataObject) -> None:
    text = policy.to_json().rstrip()
    with pytest.raises(FileError):
        Policy.from_json(text[: data.draw(st.integers(0, len(text) - 1))])


@given(policies(), st.data())
def test_altered_policy_is_never_another_policy(policy: Policy, data: st.DataObject) -> None:
    text = policy.to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    altered = text[:place] + data.draw(st.characters()) + text[place + 1 :]
    with contextlib.suppress(FileError, PolicyError):
        assert Policy.from_json(altered) == policy  # white space, or another spelling of the same character


def test_altered_policy_says_so(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    text = example().to_json()
    for changed, error, word in [
        (text.replace('"conv": 8', '"conv": 4', 1), FileError, "altered"),
        (text.replace('"checksum"', '"chequesum"'), FileError, "altered"),
        (text.replace('"method"', '"seed": 0, "method"'), FileError, "seed"),
        (text.replace('"format": 2', '"format": 7'), PolicyError, "format 7"),
        ("[1]", FileError, "list"),
        ("[" * 100_000, FileError, "JSON"),
        ("", FileError, "truncated"),
    ]:
        path.write_text(changed)
        with pytest.raises(error, match=word) as caught:
            Policy.load(path)
        assert str(path) in str(caught.value)
    path.write_bytes(b"\xff\xfe" + text.encode())
    with pytest.raises(FileError):
        Policy.load(path)


@pytest.mark.parametrize("grid", ["symmetric", "paper", None])
def test_files_of_the_first_format(grid: str | None) -> None:
    """They had one field more: of the two grids one is gone."""
    fields = example().model_dump(mode="json", exclude={"nonzeros"}) | {"format": 1} | ({"grid": grid} if grid else {})
    text = json.dumps({**fields, "checksum": checksum_of(fields)})
    if grid == "paper":
        with pytest.raises(PolicyError, match="zero-free grid of format 1"):
            Policy.from_json(text)
    else:
        assert Policy.from_json(text) == example()
        with pytest.raises(FileError, match="altered"):
            Policy.from_json(text.replace('"seed": 0', '"seed": 1'))


def test_a_policy_is_a_plan_with_an_identity() -> None:
    policy = example(nonzeros={"conv": 5})
    plan = Plan({"stem": (0, 2, 3), "stage": (1,)}, {"conv": 8, "fc": (0, 2, 4)}, {"conv": 8, "relu": 4}, {"conv": 5})
    assert policy.plan == plan
    assert Policy.of(plan, "abc", {"stem": 4, "stage": 2}, "uniform", 0) == policy
    unnamed = Policy.of(Plan(), "abc", {"stem": 4}, "uniform", 0)
    assert unnamed.kept == {"stem": [0, 1, 2, 3]}, "a group that a plan does not name keeps all"


def test_a_policy_changed_by_hand() -> None:
    policy = example()
    changed = policy.changed({"stem": (1, 0)}, {"conv": 4, "fc": (8, 8, 0)}, {"relu": 8})
    assert changed.kept == {"stem": [0, 1], "stage": [1]}
    assert changed.weight_bits == {"conv": 4, "fc": [8, 8, 0]}
    assert changed.activation_bits == {"conv": 8, "relu": 8}
    assert policy == example(), "the policy itself stays"
    assert changed.changed({"stem": [0, 2, 3]}, {"conv": 8, "fc": [0, 2, 4]}, {"relu": 4}) == policy
    with pytest.raises(PolicyError, match="weight_bits has no 'convs'; the nearest names are .'conv'"):
        policy.changed(weight_bits={"convs": 4})
    for wrong in ({"kept": {"stem": []}}, {"kept": {"stem": [4]}}, {"activation_bits": {"relu": 7}}):
        with pytest.raises(PolicyError):
            policy.changed(**wrong)


def test_whole_file_of_an_invalid_policy() -> None:
    fields = example().model_dump(mode="json")
    fields["kept"]["stem"] = [0, 0]
    broken = Policy.model_construct(**fields)
    with pytest.raises(PolicyError, match="more than once"):
        Policy.from_json(broken.to_json())


def test_paths_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("a file")
    for path in (tmp_path, tmp_path / "file" / "policy.json", tmp_path / "nowhere" / "policy.json"):
        with pytest.raises(FileError) as caught:
            example().save(path)
        assert str(path) in str(caught.value)
    with pytest.raises(FileError):
        Policy.load(tmp_path / "nowhere")

    def disk_full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    (tmp_path / "policy.json").write_text("before")
    with pytest.raises(FileError, match="No space left"):
        example().save(tmp_path / "policy.json")
    assert (tmp_path / "policy.json").read_text() == "before"
    assert sorted(os.listdir(tmp_path)) == ["file", "policy.json"]


def test_policy_of_another_model() -> None:
    policy = example()
    model: dict[str, Any] = {
        "fingerprint": "abc",
        "group_sizes": {"stem": 4, "stage": 2},
        "layers": ["conv", "fc"],
        "tensors": iter(["conv", "relu"]),
    }
    policy.check(**model)
    names = {"group_sizes": {"stem": 5, "new": 3}, "layers": ["conv", "relu"], "tensors": ["conv", "relu"]}
    with pytest.raises(PolicyMismatch) as caught:
        policy.check("abc", **names)  # type: ignore[arg-type]
    assert caught.value.unknown == ("stage", "fc")
    assert caught.value.missing == ("new", "relu"), "a layer is missing even if a tensor has its name"
    assert caught.value.different == ("stem",)
    assert all(repr(name) in str(caught.value) for name in ("stage", "fc", "new", "relu", "stem"))

    old = example(versions={**current_versions(), "torch": "1.0"})
    with pytest.raises(PolicyMismatch, match=r"torch 1\.0 -> ") as caught:
        old.check(**{**model, "tensors": ["conv", "relu"], "fingerprint": "xyz"})
    assert caught.value.different == ("fingerprint",)


# Cost and Budget

COUNTS = st.integers(0, 10**15)
LAYERS = st.builds(
    LayerCost,
    name=NAMES,
    kind=st.sampled_from(["conv", "linear", "matmul", "attention", "lstm", "gru", "rnn"]),
    macs=COUNTS,
    weight_bits=st.floats(0, 32),
    activation_bits=st.floats(0, 32),
    bops=COUNTS,
    params=COUNTS,
    stored_bits=COUNTS,
)


def costs(reference: st.SearchStrategy[Cost] | st.SearchStrategy[None] = st.none()) -> st.SearchStrategy[Cost]:  # noqa: B008
    layers = st.lists(LAYERS, max_size=5).map(tuple)
    return st.builds(Cost, layers=layers, other_params=COUNTS, other_stored_bits=COUNTS, reference=reference)


@given(costs(reference=costs()))
def test_cost_json_and_sums(cost: Cost) -> None:
    assert Cost.from_json(cost.to_json()) == cost
    table = [(c.macs, c.bops, c.params, c.stored_bits) for c in cost.layers]
    macs, bops, params, stored = (sum(column) for column in zip(*table, (0, 0, 0, 0), strict=True))
    assert (cost.macs, cost.bops) == (macs, bops)
    assert (cost.params, cost.stored_bits) == (params + cost.other_params, stored + cost.other_stored_bits)


def test_cost_that_is_none() -> None:
    with pytest.raises(FileError):
        Cost.from_json(Cost().to_json()[:-3])
    with pytest.raises(PolicyError, match="colour"):
        Cost.from_json('{"colour": 1}')
    with pytest.raises(PolicyError, match="other_params"):
        Cost(other_params=-1)


def one_layer(macs: int, weight_bits: int, activation_bits: int, params: int = 0, **rest: Any) -> Cost:
    layer = LayerCost(
        name="layer",
        kind="conv",
        macs=macs,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        bops=macs * weight_bits * activation_bits,
        params=params,
        stored_bits=params * weight_bits,
    )
    return Cost(layers=(layer,), **rest)


def test_budget_holds_or_not() -> None:
    base = one_layer(100, 32, 32, params=10, other_params=2, other_stored_bits=64)
    cost = one_layer(50, 8, 4, params=5, other_params=2, other_stored_bits=64, reference=base)
    shares = {"bops": 1600 / 102400, "size": 104 / 384, "macs": 0.5, "params": 7 / 12}
    assert Budget(bops=1).shares(cost) == shares
    for measure, share in shares.items():
        assert Budget(**{measure: share}).is_satisfied_by(cost)
        assert not Budget(**{measure: math.nextafter(share, 0)}).is_satisfied_by(cost)
    assert Budget(**shares).is_satisfied_by(cost)
    assert not Budget(**{**shares, "macs": 0.4}).is_satisfied_by(cost), "every limit must hold"
    assert Budget(macs=0.3).is_satisfied_by(one_layer(3, 8, 8, reference=one_layer(10, 8, 8))), "3 of 10 is 30 %"
    with pytest.raises(ValueError, match="reference"):
        Budget(bops=1).is_satisfied_by(base)


def test_share_of_nothing() -> None:
    nothing, something = one_layer(0, 8, 8), one_layer(1, 8, 8)
    assert Budget(macs=0.1).is_satisfied_by(nothing.model_copy(update={"reference": nothing}))
    assert not Budget(macs=0.1).is_satisfied_by(something.model_copy(update={"reference": nothing}))
    assert Budget(macs=0.1).shares(nothing.model_copy(update={"reference": nothing}))["macs"] == 0
    assert Budget(macs=0.1).shares(something.model_copy(update={"reference": nothing}))["macs"] == math.inf


@given(st.sampled_from(["bops", "size", "macs", "params"]), st.floats() | st.integers())
def test_budget_is_a_share(measure: str, share: float) -> None:
    if 0 < share <= 1:
        assert Budget(**{measure: share}).limits == {measure: share}
    else:
        with pytest.raises(BudgetError) as caught:
            Budget(**{measure: share})
        assert measure in str(caught.value)


def test_budget_that_means_nothing() -> None:
    bad: list[dict[str, Any]] = [{}, {"bops": None}, {"bop": 0.5}, {"bops": "5%"}, {"bops": True}, {"bops": [0.5]}]
    bad += [{"bops": 0.5, "size": value} for value in (0, -0.1, math.nan, math.inf, -math.inf, 1.0001)]
    for fields in bad:
        with pytest.raises(BudgetError):
            Budget(**fields)


def test_what_was_asked_for_is_kept_to_the_last_digit() -> None:
    assert Budget(bops=0.05, macs=None).asked == {"bops": 0.05}
    assert Budget(size=math.nextafter(0.1, 1)).asked != Budget(size=0.1).asked
    assert Budget(latency=0.01).asked != Budget(amounts={"latency": 0.01}).asked


def test_budget_from_text() -> None:
    assert Budget.parse("5%") == Budget.parse("0.05") == Budget.parse(" bops = 5 % ") == Budget(bops=0.05)
    assert Budget.parse("bops=5%,size=20%, macs=.5") == Budget(bops=0.05, size=0.2, macs=0.5)
    assert Budget.parse("100%") == Budget(bops=1.0)
    assert Budget.parse("20x") == Budget.parse("1/20") == Budget.parse("bops = 20 x ") == Budget(bops=0.05)
    for text in (
        *("", "%", "5", "0", "-5%", "nan", "101%", "inf", "bop=5%", "bops=", "bops=5%,", "5%,bops=4%", "a=b=1"),
        *("0x", "x", "1/0", "/2", "1/", "2/1", "M", "-3M", "0M", "nanMB", "5 Mb", "size=3M", "2MB,size=5%", "3M,4M"),
    ):
        with pytest.raises(BudgetError):
            Budget.parse(text)
    with pytest.raises(BudgetError, match="'bop'"):
        Budget.parse("bop=5%")


@pytest.mark.parametrize(
    ("text", "amounts"),
    [
        ("300M", {"macs": 3e8}),
        ("bops=2G", {"bops": 2e9}),
        ("params=2.5M", {"params": 2.5e6}),
        ("1.5 k", {"macs": 1500.0}),
        ("2MB", {"size": 16e6}),
        ("100 B", {"size": 800.0}),
        ("size=1 MiB", {"size": 8 * 2.0**20}),
        ("5ms", {"latency": 5e-3}),
        ("300M, 2kB, 0.1 s", {"macs": 3e8, "size": 16e3, "latency": 0.1}),
    ],
)
def test_budget_of_amounts_from_text(text: str, amounts: dict[str, float]) -> None:
    budget = Budget.parse(text)
    assert budget == Budget(amounts=amounts)
    assert budget.limits == {}
    whole = {"macs": 10**9, "bops": 10**13, "size": 10**8, "params": 10**6, "latency": 0.02}
    limits = budget.absolute(whole)
    assert limits == {measure: min(amount, whole[measure]) for measure, amount in amounts.items()}
    with pytest.raises(BudgetError, match="5M' is no amount of size, but of macs or bops or params"):
        Budget.parse("size=5M")
    with pytest.raises(BudgetError, match="limited by a share and by an amount"):
        Budget(macs=0.5, amounts={"macs": 5})


# Errors


def test_one_tree_of_errors() -> None:
    tree = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    drawn = re.findall(r"^ *[*+-] (\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    assert sorted(drawn) == sorted(kind.__name__ for kind in tree)
    for kind in tree:
        assert issubclass(kind, SbsError)
        again = pickle.loads(pickle.dumps(kind("what happened")))
        assert type(again) is kind
        assert str(again) == "what happened"


def test_errors_carry_what_failed() -> None:
    table: list[tuple[SbsError, dict[str, Any]]] = [
        (errors.TraceError("m", submodule="blocks.0", reason="r"), {"submodule": "blocks.0", "reason": "r"}),
        (errors.GraphError("m", pass_name="slim", node="conv"), {"pass_name": "slim", "node": "conv"}),
        (InfeasibleBudget("m", least={"bops": 0.1}, binding=["b"]), {"least": {"bops": 0.1}, "binding": ("b",)}),
        (errors.WeightsError("m", names=["w"]), {"names": ("w",)}),
        (errors.MethodError("m", known=["uniform"]), {"known": ("uniform",)}),
    ]
    for error, fields in table:
        again = pickle.loads(pickle.dumps(error))
        assert {name: getattr(again, name) for name in fields} == fields
        assert str(again) == str(error)
    assert str(errors.GraphError("m", pass_name="slim", node="conv")) == "slim at node 'conv': m"
