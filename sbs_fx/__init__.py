"""sbs-fx: prune and quantise vision models together, under a budget that is met."""

from sbs_fx.compare import compare
from sbs_fx.compress import apply, compress, replan
from sbs_fx.config import Config
from sbs_fx.export import load_pt2 as load
from sbs_fx.passes.capture.part import with_part
from sbs_fx.plan import Budget, Cost, Plan, Policy
from sbs_fx.plan.errors import SbsError
from sbs_fx.result import Result
from sbs_fx.search.constraints import Keep
from sbs_fx.training.task import Task

__all__ = [
    "Budget", "Config", "Cost", "Keep", "Plan", "Policy", "Result", "SbsError", "Task", "apply", "compare",
    "compress", "load", "replan", "with_part",
]  # fmt: skip
