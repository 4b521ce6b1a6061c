"""Our passes inside torch's `PassManager`.

In: one of our passes and its options. Out: a callable GraphModule -> PassResult. Groups and cost model travel in
`graph_module.meta`, so that a later pass of the same pipeline finds them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from sbs_fx.passes.channels.groups import ChannelGroups, channel_groups
from sbs_fx.passes.cost.model import CostModel


def as_pass(function: Callable[..., Any], **options: Any) -> Callable[[fx.GraphModule], PassResult]:
    """Wrap a pass for `torch.fx.passes.infra.pass_manager.PassManager`.

    A pass that takes `groups` gets those that an earlier `as_pass(channel_groups)` of the same graph left, or finds
    them. An analysis (`channel_groups`, `cost_model`) leaves its result in `graph_module.meta` under its name.

        PassManager([as_pass(channel_groups), as_pass(slim, kept=policy.kept)])(graph_module)
    """

    def run(graph_module: fx.GraphModule) -> PassResult:
        arguments = dict(options)
        if "groups" in inspect.signature(function).parameters and "groups" not in arguments:
            groups = graph_module.meta.get("channel_groups")
            if groups is None or groups.inference.graph_module is not graph_module:
                groups = channel_groups(graph_module)
            arguments["groups"] = groups
        result = function(graph_module, **arguments)
        if isinstance(result, (ChannelGroups, CostModel)):
            graph_module.meta[function.__name__] = result
            return PassResult(graph_module, False)
        return PassResult(result, True)

    run.__name__ = function.__name__
    return run
