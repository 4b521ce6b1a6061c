"""One row of the zoo benchmark: each promise of the compiler checked on one network, each in a column of its own.

In: the name of a row; it expects a process of its own. Out: plain data: a column is "ok", "refused: TEXT" (an error of
ours, which should say what to do) or "faulty: WHAT" (any other exception, a wrong number); `outcome` is the worst of
them. A column that fails stops only those that need what it makes. Operators without a rule, which pin all that they
touch, are listed and do not count.
"""

from __future__ import annotations

import copy
import math
import os
import pathlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from _coverage_family import compare_codes, equal
from _coverage_graph import random_plan, to_meta
from _coverage_weights import randomise
from _unchanged import difference, state
from _zoo_networks import Inputs, Maker, Network, PlainCall, all_networks, called, tensors_in
from _zoo_plain import ask
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from sbs_fx.compression import compress
from sbs_fx.passes import CostModel, channel_groups, cost_model, finalize, slim, trace
from sbs_fx.passes.oracles.slimming import SlimReport, compare_slim
from sbs_fx.plan import Budget, Cost, Plan
from sbs_fx.plan.errors import InfeasibleBudget, SbsError, TraceError

sys.path.append(str(pathlib.Path(__file__).parent.parent))
from tests.oracles.agreement import cast

COLUMNS = ("build", "trace", "size", "price", "slim", "budget", "static", "file", "unchanged")
EXAMPLE_BATCH, OTHER_BATCH = 2, 3
BUDGET = 0.10  # of BOPs
SLIM_TOLERANCE = 1e-10  # of float64
TIES_OF_SMALL = 2  # codes that may differ by rounding where there are too few for a share to say anything
PLAIN_SECONDS = 120


def _product_with_vector(a: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(a)


_UNCOUNTED: dict[Any, Any] = {torch.ops.aten.mv: _product_with_vector}  # by torch's own counter


class Wrong(Exception):
    """A number that is not what it should be."""


class Case(NamedTuple):
    """A network in the form that is compressed, and what it is called with; a plain process listens at `address`."""

    network: Network
    model: nn.Module
    address: str
    plain: bool

    def inputs(self, batch: int = EXAMPLE_BATCH, maker: Maker | None = None) -> Inputs:
        """As a user has them, or the tensors in them where the call is to be plain."""
        made = (maker or self.network.inputs)(batch)
        return tensors_in(made) if self.plain else made


class Task(NamedTuple):
    """The name of a row, the address of a plain process (`_zoo_plain.py`), whether only tensors are passed, and whether
    the columns are left out that need a whole compression."""

    name: str
    address: str
    plain: bool = False
    quick: bool = False


def check_network(task: Task) -> dict[str, Any]:
    """The row of one network."""
    begun, name = time.perf_counter(), task.name
    network = all_networks()[name]
    row: dict[str, Any] = {"kind": network.kind, "model": name, "outcome": "", "seconds": {}}
    with _column(row, "build"):
        torch.manual_seed(0)
        model, example = network.build().eval(), network.inputs(EXAMPLE_BATCH)
        row["parameters"] = sum(p.numel() for p in model.parameters())
        call = PlainCall(model, example if isinstance(example, dict | tuple) else (example,))
        randomise(call, *tensors_in(example))
        plain = task.plain and isinstance(example, dict)
        case = Case(network, call.eval() if plain else model, task.address, plain)
        with torch.no_grad():
            outputs = tensors_in(called(case.model, case.inputs()))
        row["outputs"] = len(outputs)
        if not all(bool(torch.isfinite(x).all()) for x in outputs if x.is_floating_point()):
            raise Wrong("the float model gives NaN or Inf: the row is wrong")
    if row["build"] == "ok":
        with suppress(Exception):
            copy.deepcopy(case.model)  # reason: Python notes in a class that its objects were copied, as is done below
        _check(row, case, task.quick)
    row["outcome"] = _worst(row)
    row["wall_seconds"] = round(time.perf_counter() - begun, 1)
    return row


def _check(row: dict[str, Any], case: Case, quick: bool) -> None:
    with _column(row, "trace"), torch.no_grad():
        with _unchanged(row, case.model):
            try:
                graph = trace(case.model, case.inputs())
            except TraceError:
                compress(case.model, case.inputs(), budget=BUDGET)  # reason: its error names what can be compressed
                raise
        row["nodes"] = len(graph.graph.nodes)
        for batch in (EXAMPLE_BATCH, OTHER_BATCH):
            _compare_outputs(graph, case.model, case.inputs(batch), f"at batch {batch}")
    if case.network.other_size is not None:
        with _column(row, "size"), torch.no_grad():
            _check_size(case, case.network.other_size)
    if "refused" in row["trace"] or row["trace"].startswith("faulty") and "nodes" not in row:
        return
    with _column(row, "price"):
        _check_price(row, case, graph)
    with _column(row, "slim"):
        _check_slim(row, case, graph)
    if quick:
        return
    result = None
    with _column(row, "budget"):
        with _unchanged(row, case.model):
            result, budget = _compressed(row, case)
        row["shares"] = {name: round(share, 4) for name, share in budget.shares(result.cost).items()}
        if not budget.is_satisfied_by(result.cost):
            raise Wrong(f"over budget: {row['shares']}, {budget} was asked for")
    if result is None:
        return
    with _column(row, "static"):
        errors: dict[str, Any] = {"errors": []}
        codes = compare_codes(errors, result.gated, finalize(result.gated), tensors_in(case.inputs(OTHER_BATCH)))
        row["codes"] = codes
        few = codes["step"] <= 1 and codes["share"] * sum(x.numel() for x in tensors_in(case.inputs())) <= TIES_OF_SMALL
        if errors["errors"] and not (few and codes["bits_real"]):
            raise Wrong("; ".join(errors["errors"]))
    with _column(row, "file"):
        _check_file(case, result)


# -- columns -----------------------------------------------------------------------------------------------------------


def _check_size(case: Case, other: Maker) -> None:
    """Traced once for any height and width, bitwise at two sizes."""
    graph = trace(case.model, case.inputs(), dynamic=("batch", "height", "width"))
    for maker in (case.network.inputs, other):
        inputs = case.inputs(OTHER_BATCH, maker)
        _compare_outputs(graph, case.model, inputs, f"at shape {tuple(tensors_in(inputs)[0].shape)}")


def _check_price(row: dict[str, Any], case: Case, graph: fx.GraphModule) -> None:
    """Priced MACs are those that torch counts, of the float model and of a slim graph; differences by operator."""
    groups = channel_groups(graph)
    row["groups"] = len(groups)
    row["unknown_operators"] = sorted(set(groups.inference.unknown.values()))
    cost, kept = cost_model(graph, groups), random_plan(groups)
    row["macs"] = cost.reference.macs
    row["prunable_share"] = round(cost.prunable_share(), 4)
    price = cost.evaluate(Plan(kept))
    row["mac_reduction"] = round(1 - price.macs / max(1, cost.reference.macs), 4)
    single = case.inputs(1)
    problems = []
    row["uncounted"] = sorted(cost.uncounted.values())
    counted, priced = _by_operator(graph, tensors_in(single), _by_node(cost, cost.reference), cost.uncounted)
    row["by_formula"] = sorted(set(priced) - set(counted))  # torch's counter does not know these operators
    row["dead_macs"] = _counted(case.model, single) - sum(counted.values())  # of what no output needs
    if different := _difference(counted, priced):
        problems.append(f"of the float model: {different}")
    if row["dead_macs"] < 0:
        problems.append(f"the graph has {-row['dead_macs']} MACs more than the float model")
    slimmed = slim(graph, groups, kept)
    if different := _difference(*_by_operator(slimmed, tensors_in(single), _by_node(cost, price), cost.uncounted)):
        problems.append(f"of the slim graph: {different}")
    if problems:
        raise Wrong("; ".join(problems))


def _counted(module: nn.Module, inputs: Inputs) -> int:
    """MACs that torch counts on one example, on the meta device if the module runs there.

    reason: there, an LSTM and attention are made of the products that they stand for, so nothing is left uncounted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    module = copy.deepcopy(module).requires_grad_(False)  # reason: the counter's hooks expect a gradient function
    try:
        moved = copy.deepcopy(module).to("meta")
        with counter, torch.no_grad():
            called(moved, pytree.tree_map_only(Tensor, lambda x: x.to("meta"), inputs))
    except Exception:
        counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
        with sdpa_kernel(SDPBackend.MATH), counter, torch.no_grad():
            called(module, inputs)
    return counter.get_total_flops() // 2


def _by_operator(
    graph: fx.GraphModule, inputs: Sequence[Tensor], priced: dict[str, int], uncounted: Collection[str]
) -> tuple[Counter[str], Counter[str]]:
    """MACs by operator, as counted and as priced; without those that have none."""
    found: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    interpreter = _Counting(to_meta(copy.deepcopy(graph)))
    with torch.no_grad():
        try:
            interpreter.run(*(x.to("meta") for x in inputs))
        except (NotImplementedError, RuntimeError):  # reason: shapes that depend on data need some
            interpreter = _Counting(copy.deepcopy(graph))
            interpreter.run(*inputs)
    for node in graph.graph.nodes:
        if node.name not in uncounted:
            found[str(node.target)] += interpreter.macs.get(node.name, 0)
            asked[str(node.target)] += priced.get(node.name, 0)
    return +found, +asked


def _difference(counted: Counter[str], priced: Counter[str]) -> str:
    """By operator, of those that torch counts."""
    return "; ".join(
        f"{name} {n} MACs counted, {priced[name]} priced" for name, n in counted.items() if n != priced[name]
    )


def _by_node(model: CostModel, cost: Cost) -> dict[str, int]:
    """Priced MACs by graph node; not of what the cost model says that it cannot count."""
    priced = zip(model.layers, cost.layers, strict=True)
    return {layer.node: row.macs for layer, row in priced if layer.node not in model.uncounted}


class _Counting(fx.Interpreter):
    """MACs by node."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
            value = super().run_node(n)
        self.macs[n.name] = counter.get_total_flops() // 2
        return value


def _check_slim(row: dict[str, Any], case: Case, graph: fx.GraphModule) -> None:
    """Mask = slim, node by node, in float64; the plan is drawn again until it changes the output."""
    exact = cast(graph, torch.float64)
    inputs = [x.double() if x.is_floating_point() else x for x in tensors_in(case.inputs(OTHER_BATCH))]
    with _default_dtype(torch.float64):
        groups = channel_groups(exact)
        report = SlimReport({}, 0.0, 0.0)
        for seed, share in enumerate((0.7, 0.4, 0.4)):
            report = compare_slim(exact, groups, random_plan(groups, share, seed), inputs)
            if report.differs_from_dense > 1e-6:
                break
    row["slim_error"], row["nodes_compared"] = report.worst_error, report.nodes
    row["differs_from_dense"] = report.differs_from_dense
    if first := report.first_above(SLIM_TOLERANCE):
        node = next(n for n in graph.graph.nodes if n.name == first)
        raise Wrong(f"slim differs from masked by {report.worst_error:.1e}, first at {first} ({node.target})")


def _compressed(row: dict[str, Any], case: Case) -> tuple[Any, Budget]:
    """Without data, under the budget; where that cannot be met, under the least that can, as the refusal says."""
    budget = Budget(bops=BUDGET)
    try:
        return compress(case.model, case.inputs(), budget=budget, method="uniform"), budget
    except InfeasibleBudget as error:
        row["infeasible"] = str(error)
        budget = Budget(bops=min(1.0, 1.05 * error.least["bops"]))
        return compress(case.model, case.inputs(), budget=budget, method="uniform"), budget


def _check_file(case: Case, result: Any) -> None:
    """Saved, loaded by a process that has torch alone, run at another batch, the same bits."""
    inputs = case.inputs(OTHER_BATCH)
    with tempfile.TemporaryDirectory() as directory:
        result.save(directory)
        with torch.no_grad():
            expected = pytree.tree_leaves(called(result.model, inputs))
        torch.save((tensors_in(inputs), expected), os.path.join(directory, "run.pt"))
        if problem := ask(case.address, directory, case.network.imports, PLAIN_SECONDS):
            raise Wrong(f"a plain process: {problem}")


# -- measures ----------------------------------------------------------------------------------------------------------


def _compare_outputs(graph: fx.GraphModule, model: nn.Module, inputs: Inputs, where: str) -> None:
    with _plain_attention():
        actual, expected = pytree.tree_leaves(graph(*tensors_in(inputs))), pytree.tree_leaves(called(model, inputs))
    if len(actual) != len(expected):
        raise Wrong(f"trace gives {len(actual)} outputs and the model {len(expected)}, {where}")
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if isinstance(b, Tensor) and a.shape != b.shape:
            raise Wrong(f"trace has shape {tuple(a.shape)} and the model {tuple(b.shape)} at output {i}, {where}")
        if not (equal(a, b) if isinstance(b, Tensor) else a == b):
            error = float((a.double() - b.double()).abs().max()) if isinstance(b, Tensor) else 1.0
            raise Wrong(f"trace is not bitwise at output {i}, {where}: off by {error:.1e}")


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the kernel that takes the place of all of attention where nothing is trained: it sums in another order,
    and is none of the operators that a graph can hold."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _unchanged(row: dict[str, Any], model: nn.Module) -> Iterator[None]:
    """Into the column "unchanged": whether the model is as it was before the inside, also if that raises."""
    before = state(model)
    try:
        yield
    finally:
        if row.get("unchanged", "ok") == "ok":
            with _column(row, "unchanged"):
                if changed := difference(before, state(model)):
                    raise Wrong(changed)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _column(row: dict[str, Any], name: str) -> Iterator[None]:
    """ "ok", or what stopped the inside; its seconds."""
    begun = time.process_time()
    row[name] = "ok"
    try:
        yield
    except Wrong as problem:
        row[name] = f"faulty: {problem}"
    except SbsError as error:
        text = " ".join(str(error).split())
        text = text if len(text) <= 800 else f"{text[:400]} ... {text[-400:]}"  # reason: what to do stands at the end
        row[name] = f"refused: {type(error).__name__}: {text}"
    except Exception as error:
        text = " ".join(str(error).split())[:400]
        row[name] = f"faulty: {type(error).__name__}: {text}{_place(error)}"
    finally:
        row["seconds"][name] = round(time.process_time() - begun, 2)


def _place(error: BaseException) -> str:
    """Where in our files it was raised."""
    place, traceback = "", error.__traceback__
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if "sbs_fx" in file or "/passes/" in file:
            place = f" [{'/'.join(file.rsplit('/', 2)[-2:])}:{traceback.tb_lineno}]"
        traceback = traceback.tb_next
    return place


def _worst(row: dict[str, Any]) -> str:
    """ "ok", or the first column that is faulty, or else refused."""
    for worst in ("faulty", "refused"):
        for column in COLUMNS:
            if row.get(column, "").startswith(worst):
                return f"{worst}: {column}: {row[column].removeprefix(worst + ': ')}"
    return "ok"
