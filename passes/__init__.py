"""Graph passes, each a callable that can be used alone or inside torch's `PassManager` (see `as_pass`)."""

from sbs_fx.passes.attention import explicit_attention
from sbs_fx.passes.capture.trace import trace
from sbs_fx.passes.channels.facts import Facts, always, any_of, keeps
from sbs_fx.passes.channels.groups import ChannelGroup, ChannelGroups, channel_groups
from sbs_fx.passes.channels.inference import Inference, Term, rule
from sbs_fx.passes.channels.slim import slim
from sbs_fx.passes.cost.model import CostModel, cost_model
from sbs_fx.passes.dialects import Gated, Searchable, Static, Traced, verify
from sbs_fx.passes.equalisation import equalise
from sbs_fx.passes.gates.insertion import activation_gates, apply_bits, channel_gates, insert_gates, weight_gates
from sbs_fx.passes.graph import on_device
from sbs_fx.passes.pass_manager import as_pass
from sbs_fx.passes.static.finalize import finalize
from sbs_fx.passes.static.fused import fused
from sbs_fx.passes.static.integer_grid import integer_grid
from sbs_fx.passes.static.integer_joins import integer_joins

__all__ = [
    "ChannelGroup",
    "ChannelGroups",
    "CostModel",
    "Facts",
    "Gated",
    "Inference",
    "Searchable",
    "Static",
    "Term",
    "Traced",
    "activation_gates",
    "always",
    "any_of",
    "apply_bits",
    "as_pass",
    "channel_gates",
    "channel_groups",
    "cost_model",
    "equalise",
    "explicit_attention",
    "finalize",
    "fused",
    "insert_gates",
    "integer_grid",
    "integer_joins",
    "keeps",
    "on_device",
    "rule",
    "slim",
    "trace",
    "verify",
    "weight_gates",
]
