"""Every operator with a rule: masked is slim, channels are free or pinned as tests/networks/operators.py lists them.

Every rule is called by some network there or in tests/models.py, or is listed with a reason.
"""

from __future__ import annotations

from random import Random

import torch

import tests.networks.indexing  # noqa: F401  # reason: enters its networks in CASES
from sbs_fx.passes.channels.inference import RULES
from sbs_fx.passes.oracles.slimming import compare_slim
from sbs_fx.plan.errors import SbsError
from tests.networks.operators import CASES, SIDE, Single
from tests.oracles.agreement import NODE_TOLERANCE, check_signs, random_plan, traced

# Rules that no network above calls, and why.
UNCALLED = {
    "called by networks of tests/models.py": {
        "adaptive_avg_pool2d",
        "avg_pool2d",
        "batch_norm",
        "contiguous",
        "hardsigmoid",
        "lstm",
        "silu",
        "upsample_bilinear2d",
        "zeros_like",
        "dropout",
    },
    "called in slim graphs": {"index_copy"},
    "folded before the rules are asked, unless they depend on an input's size": {
        "full",
        "eye",
        "linspace",
        "ones",
        "meshgrid",
        "tril_indices",
        "triu_indices",
        "scalar_tensor",
        "one_hot",
    },
    "other names of an operator that is called": {
        "_reshape_alias",
        "_softmax",
        "_safe_softmax",
        "_to_copy",
        "_unsafe_index",
        "_unsafe_view",
        "view",
        "view_copy",
        "_adaptive_avg_pool2d",
        "concat",
        "native_dropout",
        "feature_dropout",
        "alpha_dropout",
        "numpy_T",
        "adjoint",
        "real",
        "imag",
        "positive",
        "constant_pad_nd",
        "reflection_pad1d",
        "reflection_pad2d",
        "reflection_pad3d",
        "replication_pad1d",
        "replication_pad2d",
        "replication_pad3d",
        "empty",
        "new_empty",
        "empty_like",
        "upsample_nearest3d",
        "_upsample_nearest_exact3d",
        "take_along_dim",
    },
    "random: another draw for another shape": {
        "bernoulli",
        "rand",
        "randn",
        "rand_like",
        "randn_like",
        "randperm",
        "rrelu",
    },
}


def check(name: str) -> set[str]:
    """Compares under two random plans; gives back the operators called, by name without overload."""
    function, shapes, free = CASES[name]
    case = traced(Single(function, shapes).eval(), lambda batch: torch.randn(batch, 3, SIDE, SIDE))
    assert not case.groups.inference.unknown, f"operators without a rule: {case.groups.inference.unknown}"
    stem = {
        group.name for group in case.groups.values() for m in group.members if (m.tensor, m.dim) == ("stem.weight", 0)
    }
    assert bool(stem) == free, f"the stem's channels: {stem or [p.causes for p in case.groups.pins]}"
    check_signs(case)
    random = Random(0)
    for _ in range(2):
        plan = random_plan(case.groups, random)
        report = compare_slim(case.exact, case.groups, plan, case.inputs())
        assert report.worst_error <= NODE_TOLERANCE, f"{report}; first {report.first_above(NODE_TOLERANCE)}; {plan}"
    return {
        n.target._schema.name.removeprefix("aten::")
        for n in case.graph.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    }


def test_masked_is_slim_for_every_operator() -> None:
    called: set[str] = set()
    failures: dict[str, str] = {}
    for name in CASES:
        try:
            called |= check(name)
        except (AssertionError, RuntimeError, SbsError) as error:
            failures[name] = f"{type(error).__name__}: {error}"
    assert failures == {}
    known = {t._schema.name.removeprefix("aten::") for t in RULES if isinstance(t, torch._ops.OpOverload)}
    assert known - called - set().union(*UNCALLED.values()) == set(), "add a network for these operators"
    assert set().union(*UNCALLED.values()) & called == set(), "these are called: take them off the list"
    assert set().union(*UNCALLED.values()) <= known, "these have no rule: take them off the list"
