"""`explicit_attention`: the same to rounding, and probabilities with a gate, a price and codes of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sbs_fx
from sbs_fx.passes import channel_groups, cost_model, explicit_attention, trace
from sbs_fx.passes.dialects import QUANTIZE

TOKENS = torch.randn(3, 5, 8)
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    def __init__(self, queries: int = 2, **how: Any) -> None:
        super().__init__()
        self.read, self.keys, self.back = nn.Linear(8, 4 * queries), nn.Linear(8, 16), nn.Linear(4 * queries, 8)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        q = self.read(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = self.keys(x).unflatten(-1, (4, 4)).transpose(1, 2).chunk(2, 1)
        return self.back(scaled_dot_product_attention(q, k, v, **self.how).transpose(1, 2).flatten(2))


def _attentions(graph: Any) -> int:
    return len(graph.graph.find_nodes(op="call_function", target=SDPA))


@pytest.mark.parametrize("how", [{}, {"scale": 0.3}, {"attn_mask": torch.randn(5, 5)}], ids=["plain", "scale", "mask"])
def test_same_to_rounding_and_same_groups(how: dict[str, Any]) -> None:
    net = Attention(**how).double().eval()
    x = TOKENS.double()
    graph = trace(net, x)
    apart = explicit_attention(graph)
    assert (_attentions(graph), _attentions(apart)) == (1, 0)
    torch.testing.assert_close(apart(x), net(x), rtol=1e-12, atol=1e-12)
    groups = [{name: group.size for name, group in channel_groups(each).items()} for each in (graph, apart)]
    assert groups[0] == groups[1]
    costs = [cost_model(each, channel_groups(each)).reference for each in (graph, apart)]
    assert costs[0].macs == costs[1].macs


@pytest.mark.parametrize(
    ("how", "queries"),
    [({"is_causal": True}, 2), ({"attn_mask": torch.ones(5, 5).tril() > 0}, 2), ({"enable_gqa": True}, 4)],
    ids=["causal", "booleans", "shared keys"],
)
def test_what_is_more_stays_whole(how: dict[str, Any], queries: int) -> None:
    graph = trace(Attention(queries, **how).eval(), TOKENS)
    assert explicit_attention(graph) is graph


def test_probabilities_are_priced_at_their_bits_and_stored_as_codes() -> None:
    net = Attention().eval()
    result = sbs_fx.compress(net, TOKENS, budget=1 / 16, method="uniform", config=sbs_fx.Config(keep_outputs=True))
    assert result.cost.bops * 16 == result.baseline_cost.bops, "a product of probabilities stayed in float"
    steps = [
        node.args[1]
        for node in result.model.graph.nodes
        if node.target is QUANTIZE and "probabilities" in str(node.args[0])
    ]
    (step,) = steps
    assert 0 < step <= 1 / 255
