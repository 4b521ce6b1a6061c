"""Search: problems, the registry of methods, one method a file. Importing it registers the methods that are built
in."""

from sbs_fx.search.ajpq import Ajpq, ajpq
from sbs_fx.search.baselines.bayesian_bits import bayesian_bits
from sbs_fx.search.baselines.multi_path import multi_path
from sbs_fx.search.baselines.prune_then_quantise import prune_then_quantise
from sbs_fx.search.constraints import Keep
from sbs_fx.search.gate_search import Search
from sbs_fx.search.opq import Opq, opq
from sbs_fx.search.problem import Considered, Problem, SearchResult
from sbs_fx.search.registry import Method, Run, method
from sbs_fx.search.sbs import sbs
from sbs_fx.search.space import Choice, Space, SpaceSettings
from sbs_fx.search.two_stage import TwoStage, two_stage
from sbs_fx.search.uniform import uniform

__all__ = [
    "Ajpq", "Choice", "Considered", "Keep", "Method", "Opq", "Problem", "Run", "Search", "SearchResult", "Space",
    "SpaceSettings", "TwoStage", "ajpq", "bayesian_bits", "method", "multi_path", "opq", "prune_then_quantise", "sbs",
    "two_stage", "uniform",
]  # fmt: skip
