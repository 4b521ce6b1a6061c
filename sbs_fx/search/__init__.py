"""Searchers: each turns (groups, cost model, budget, maybe data) into a policy; one method a file."""

from sbs_fx.search.uniform import uniform

__all__ = ["uniform"]
