"""What is decided, what is allowed and what it costs: values without graphs."""

from sbs_fx.plan.budget import MEASURES, OF_CHANNELS, Budget
from sbs_fx.plan.cost import Cost, LayerCost
from sbs_fx.plan.files import write_atomic
from sbs_fx.plan.plan import Plan
from sbs_fx.plan.policy import Policy, current_versions
from sbs_fx.plan.value import Settings, Value

__all__ = [
    "MEASURES",
    "OF_CHANNELS",
    "Budget",
    "Cost",
    "LayerCost",
    "Plan",
    "Policy",
    "Settings",
    "Value",
    "current_versions",
    "write_atomic",
]
