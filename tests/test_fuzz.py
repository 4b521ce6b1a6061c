"""Random calls of what people call: odd models, inputs, data and settings. Each succeeds and keeps what it promises, or
raises an error of ours; see `tests/oracles/promises.py`.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st

import sbs_fx
from sbs_fx.data.batches import read_batches
from sbs_fx.data.prepared import prepared
from sbs_fx.export import load_saved
from sbs_fx.passes import channel_groups, cost_model, trace
from sbs_fx.passes.capture.export import dynamic_dims
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.passes.capture.signature import Signature, call_of
from sbs_fx.plan.errors import SbsError
from sbs_fx.report import Report
from sbs_fx.search.registry import names as method_names
from sbs_fx.training import evaluate
from tests.networks.odd_inputs import BATCHES, CALLS, STREAMS, TENSORS, loaders, odd_data, odd_inputs
from tests.networks.odd_models import ODD, PLAIN, Odd, made
from tests.networks.odd_settings import (
    BRIEF,
    BUDGETS,
    DYNAMIC,
    FIELDS,
    METHODS,
    OUTPUTS,
    PREPARE,
    TASKS,
    prepare_output,
)
from tests.oracles.promises import check_result, configured, float_output, outcome

LONG = settings.default.max_examples > 1000  # type: ignore[union-attr]
COMPRESSED = list(PLAIN) if LONG else ["classifier", "several", "keywords", "none", "dict", "embedded"]
QUICK = settings.default.max_examples < 300  # type: ignore[union-attr]


def examples(few: int, many: int) -> settings:
    """A number of examples in the usual profiles and in the long one, in which they sum to more than 20,000."""
    return settings(
        max_examples=many if LONG else max(1, few // 3) if QUICK else few,
        suppress_health_check=[*HealthCheck],
        # reason: names out of tables are as small as they get
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
    )


def named(table: Any, *, usual: str | None = None) -> st.SearchStrategy[str]:
    """A name of a table, half of the time the first, or the usual one."""
    return st.one_of(st.just(usual or next(iter(table))), st.sampled_from(list(table)))


def silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert not capfd.readouterr().err


@cache
def compressed(name: str) -> tuple[sbs_fx.Result, Odd]:
    odd = made(name)
    return sbs_fx.compress(odd.model, odd.inputs, budget=0.3), odd


@cache
def loaded(name: str) -> torch.fx.GraphModule:
    with tempfile.TemporaryDirectory() as directory:
        compressed(name)[0].save(directory)
        return sbs_fx.load(Path(directory) / "model.pt2")


@examples(60, 6000)
@given(
    st.sampled_from(COMPRESSED),
    named(CALLS),
    named(TENSORS),
    st.integers(0, 2),
    st.sampled_from(("", "file", "gated")),
)
def test_calls_of_results(name: str, call: str, tensor: str, place: int, kind: str) -> None:
    result, odd = compressed(name)
    given_inputs = odd_inputs(odd.inputs, call, tensor, place)
    args, kwargs = (given_inputs, {}) if kind == "file" else _called(given_inputs)
    model = loaded(name) if kind == "file" else result.model
    if kind == "file" and not isinstance(args, tuple):
        args = (args,)
    answer = outcome(lambda: model(*args, **kwargs), model, given_inputs)
    if kind == "file" and not isinstance(answer, SbsError):
        expected = result.model(*args)
        same = torch.utils._pytree.tree_map(
            lambda a, b: torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b,
            answer,
            expected,
        )
        assert all(torch.utils._pytree.tree_leaves(same))


def _called(inputs: Any) -> Any:
    try:
        return call_of(inputs)
    except SbsError:
        return (inputs,), {}


@examples(60, 4500)
@given(st.sampled_from(list(ODD)), named(CALLS), named(TENSORS), st.integers(0, 2), named(DYNAMIC))
def test_signatures(name: str, call: str, tensor: str, place: int, dynamic: str) -> None:
    """What is said of example inputs, before anything is captured."""
    odd = made(name)
    if not isinstance(odd.model, torch.nn.Module):
        return
    inputs = odd_inputs(odd.inputs, call, tensor, place)
    answer = outcome(lambda: Signature.of(odd.model, inputs), odd.model, inputs)
    if not isinstance(answer, SbsError):
        signature, tensors = answer
        assert len(signature.names) == len(tensors) == len(set(signature.names))
        args, kwargs = signature.call(tensors)
        assert all(a is b for a, b in zip(signature.tensors(args, kwargs), tensors, strict=True))
        dims = outcome(lambda: dynamic_dims(signature, tensors, DYNAMIC[dynamic]))
        assert isinstance(dims, SbsError) or len(dims) == len(tensors)


@examples(60, 5000)
@given(
    st.sampled_from(("classifier", "several")),
    named(STREAMS),
    named(BATCHES),
    named(TENSORS),
    st.integers(1, 3),
    named(PREPARE),
)
def test_reading_of_data(name: str, stream: str, batch: str, tensor: str, count: int, prepare: str) -> None:
    _, odd = compressed(name)
    data = odd_data(odd.inputs, stream, batch, tensor, count)
    names = ["x", "other"][: 1 + (name == "several")]

    def read() -> Any:
        return [*read_batches(prepared(data, names, PREPARE[prepare]), inputs=len(names), max_batches=4)]

    answer = outcome(read)
    if not isinstance(answer, SbsError):
        assert all(len(each.inputs) == len(names) and len(each.inputs[0]) for each in answer)


@examples(40, 3000)
@given(
    st.sampled_from(("classifier", "images", "dict", "several")),
    named(STREAMS),
    named(BATCHES),
    named(TENSORS),
    st.booleans(),
)
def test_evaluation(name: str, stream: str, batch: str, tensor: str, floats: bool) -> None:
    result, odd = compressed(name)
    data = odd_data(odd.inputs, stream, batch, tensor, 2)
    model = odd.model if floats else result.model
    answer = outcome(lambda: evaluate(model, data, max_batches=3), model)
    assert isinstance(answer, SbsError) or 0 <= answer <= 100


@examples(40, 1500)
@given(st.sampled_from(list(BUDGETS)), named(FIELDS), st.integers(0, 9))
def test_budgets_and_settings(budget: str, field: str, place: int) -> None:
    outcome(lambda: sbs_fx.Budget.of(BUDGETS[budget]))
    values = FIELDS[field]
    configured(**({field: values[place % len(values)]} if values else {}))


@examples(6, 400)
@given(st.sampled_from(list(ODD)), named(CALLS), named(TENSORS), st.integers(0, 2), named(DYNAMIC))
def test_captures(capfd: Any, name: str, call: str, tensor: str, place: int, dynamic: str) -> None:
    odd = made(name)
    inputs = odd_inputs(odd.inputs, call, tensor, place)
    capfd.readouterr()

    def inspected() -> Any:
        graph = trace(odd.model, inputs, dynamic=DYNAMIC[dynamic])
        groups = channel_groups(graph)
        cost = cost_model(graph, groups)
        return graph, str(Report.of(groups, cost, None, cost.reference)), str(inputs_of(graph))

    answer = outcome(inspected, odd.model, inputs)
    silent(capfd)
    if not isinstance(answer, SbsError):
        graph, text, takes = answer
        assert text
        assert takes


TABLES: dict[str, Any] = {
    "model": ODD, "call": CALLS, "tensor": TENSORS, "budget": BUDGETS, "task": TASKS, "method": METHODS,
    "dynamic": DYNAMIC, "field": FIELDS, "prepare": PREPARE, "output": OUTPUTS, "stream": STREAMS, "batch": BATCHES,
    "images": TENSORS,
}  # fmt: skip
SEARCHES = [name for name in METHODS if name in method_names()]


@st.composite
def whole_calls(draw: st.DrawFn) -> dict[str, Any]:
    """Names of everything that a call of `compress` is given; but for three of them the usual ones, to get far."""
    names = {name: next(iter(table)) for name, table in TABLES.items()}
    names |= {"model": draw(st.sampled_from(list(PLAIN))), "method": draw(st.sampled_from(SEARCHES))}
    for name in draw(st.lists(st.sampled_from(list(TABLES)), max_size=3)):
        names[name] = draw(st.sampled_from(list(TABLES[name])))
    return {
        **names,
        "place": draw(st.integers(0, 9)),
        "count": draw(st.integers(1, 3)),
        "epochs": draw(st.sampled_from((0, 0, 1))),
        "with data": draw(st.integers(0, 3)) > 0,
        "validation": draw(st.booleans()),
    }


def whole_call(names: dict[str, Any], output: Any) -> None:
    """One call of `compress`, and of what can be done with its result."""
    odd = made(names["model"])
    inputs = odd_inputs(odd.inputs, names["call"], names["tensor"])
    values = FIELDS[names["field"]]
    field = {names["field"]: values[names["place"] % len(values)]} if values else {}
    config = configured(**{**BRIEF, "epochs": names["epochs"], **field})
    data = None
    if names["with data"]:
        data = odd_data(odd.inputs, names["stream"], names["batch"], names["images"], names["count"])
    budget = BUDGETS[names["budget"]]
    answer = outcome(
        lambda: sbs_fx.compress(
            odd.model, inputs, dynamic=DYNAMIC[names["dynamic"]], task=TASKS[names["task"]], budget=budget,
            data=data, prepare=PREPARE[names["prepare"]], method=METHODS[names["method"]], config=config,
            output_dir=output, validation=data if names["validation"] else None,
        ),
        odd.model, inputs,
    )  # fmt: skip
    note(f"{type(answer).__name__}: {str(answer)[:500]}")
    if isinstance(answer, SbsError):
        return
    module = made(names["model"]).model
    reference = float_output(module.module() if isinstance(module, torch.export.ExportedProgram) else module, inputs)
    check_result(answer, budget, reference, inputs)
    if names["place"] == 0:
        again = outcome(
            lambda: sbs_fx.apply(odd.model, answer.policy, inputs, dynamic=DYNAMIC[names["dynamic"]]), odd.model
        )
        assert not isinstance(again, SbsError), again
        with tempfile.TemporaryDirectory() as directory:
            saved = outcome(lambda: answer.save(directory))
            assert not isinstance(saved, SbsError), saved
            graph, zeros = load_saved(Path(directory) / "model.pt2")
            expected = torch.utils._pytree.tree_leaves(answer.model(*zeros))
            for a, b in zip(torch.utils._pytree.tree_leaves(graph(*zeros)), expected, strict=True):
                assert torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b


@examples(12, 600)
@given(whole_calls())
def test_whole_calls(capfd: Any, tmp_path_factory: Any, names: dict[str, Any]) -> None:
    directory = tmp_path_factory.mktemp("whole")
    capfd.readouterr()
    whole_call(names, prepare_output(names["output"], directory))
    silent(capfd)


@examples(2, 100)
@given(
    st.sampled_from(("classifier", "images", "dict", "several")),
    named(STREAMS),
    named(BATCHES),
    named(TENSORS),
    named(BUDGETS),
    st.sampled_from(("uniform", "opq", "two_stage", "magic")),
)
def test_comparisons(capfd: Any, name: str, stream: str, batch: str, tensor: str, budget: str, method: str) -> None:
    odd = made(name)
    data = odd_data(odd.inputs, stream, batch, tensor, 2)
    capfd.readouterr()
    answer = outcome(
        lambda: sbs_fx.compare(odd.model, data, BUDGETS[budget], methods=(method,), example_inputs=odd.inputs),
        odd.model,
    )
    silent(capfd)
    assert isinstance(answer, SbsError) or answer.points


@pytest.mark.parametrize("name", ["batched", "single", "samples"])
def test_loaders_of_torch(name: str) -> None:
    odd, data = made("classifier"), loaders()[name]
    answer = outcome(lambda: sbs_fx.compress(odd.model, odd.inputs, data=data, budget=0.3), odd.model)
    assert isinstance(answer, SbsError) == (name == "samples")
