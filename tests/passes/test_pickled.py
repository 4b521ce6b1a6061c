"""Graphs as bytes: read again they compute the same, under the same names, and share what they shared."""

from __future__ import annotations

import pickle

import torch

from sbs_fx.passes import finalize
from sbs_fx.passes.dialects import dialect_of
from sbs_fx.passes.pickled import dumps
from tests.oracles.gated import Together, bundles, draw_bits, gate


def test_read_again_is_the_same() -> None:
    recipes = next(iter(bundles(size=10).values()))
    gated = gate(Together(recipes), recipes[0].example(2))
    draw_bits(gated, seed=0)
    x = recipes[0].example(3)
    for graph in (gated, finalize(gated)):
        again, tensors = pickle.loads(dumps((graph, dict(graph.named_buffers()))))
        for given, wanted in zip(again(x), graph(x), strict=True):
            assert torch.equal(given, wanted)
        assert [node.name for node in again.graph.nodes] == [node.name for node in graph.graph.nodes]
        assert dialect_of(again) == dialect_of(graph)
        assert all(tensors[name] is buffer for name, buffer in again.named_buffers())
