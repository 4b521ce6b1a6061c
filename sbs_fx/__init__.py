"""sbs-fx: prune and quantise vision models together, under a budget that is met.

Each name is imported when it is first used, so that `import sbs_fx` by itself costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sbs_fx.comparing import compare as compare
    from sbs_fx.compression import apply as apply
    from sbs_fx.compression import compress as compress
    from sbs_fx.compression import refresh as refresh
    from sbs_fx.compression import replan as replan
    from sbs_fx.config import Config as Config
    from sbs_fx.passes.capture.part import with_part as with_part
    from sbs_fx.plan import Budget as Budget
    from sbs_fx.plan import Cost as Cost
    from sbs_fx.plan import Plan as Plan
    from sbs_fx.plan import Policy as Policy
    from sbs_fx.plan.errors import SbsError as SbsError
    from sbs_fx.result import Result as Result
    from sbs_fx.saved import Saved as Saved
    from sbs_fx.saved import load as load
    from sbs_fx.search.constraints import Keep as Keep
    from sbs_fx.timm_model import as_timm as as_timm
    from sbs_fx.training.task import Task as Task

    __version__: str

_PLACES = {
    "Budget": "plan", "Config": "config", "Cost": "plan", "Keep": "search.constraints", "Plan": "plan",
    "Policy": "plan", "Result": "result", "Saved": "saved", "SbsError": "plan.errors", "Task": "training.task",
    "apply": "compression", "as_timm": "timm_model", "compare": "comparing", "compress": "compression", "load": "saved",
    "refresh": "compression", "replan": "compression", "with_part": "passes.capture.part",
}  # fmt: skip
__all__ = [
    "Budget", "Config", "Cost", "Keep", "Plan", "Policy", "Result", "Saved", "SbsError", "Task", "apply", "as_timm",
    "compare", "compress", "load", "refresh", "replan", "with_part",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sbs_fx")
    if name not in _PLACES:
        raise AttributeError(f"module 'sbs_fx' has no attribute {name!r}")
    value = getattr(import_module(f"sbs_fx.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "__version__"])
