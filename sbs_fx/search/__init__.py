"""Searchers: each turns (groups, cost model, budget, maybe data) into a policy; one method a file."""

from sbs_fx.search.ajpq import Ajpq, ajpq
from sbs_fx.search.baselines.bayesian_bits import bayesian_bits
from sbs_fx.search.baselines.multi_path import multi_path
from sbs_fx.search.baselines.prune_then_quantise import prune_then_quantise
from sbs_fx.search.gate_search import Search
from sbs_fx.search.opq import Opq, opq
from sbs_fx.search.sbs import sbs
from sbs_fx.search.searched import Searched
from sbs_fx.search.two_stage import TwoStage, two_stage
from sbs_fx.search.uniform import uniform

# method -> searcher that trains
SEARCHES = {
    "sbs": sbs,
    "prune_then_quantise": prune_then_quantise,
    "multi_path": multi_path,
    "bayesian_bits": bayesian_bits,
}

__all__ = [
    "SEARCHES",
    "Ajpq",
    "Opq",
    "Search",
    "Searched",
    "TwoStage",
    "ajpq",
    "bayesian_bits",
    "multi_path",
    "opq",
    "prune_then_quantise",
    "sbs",
    "two_stage",
    "uniform",
]
