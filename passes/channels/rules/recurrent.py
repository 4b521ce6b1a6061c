"""Recurrent layers: one node for all steps, layers and directions, or for one step of a cell. Without a rule `trace`
would take them apart, and what they are made of rounds otherwise in another memory layout.

Each parameter has gates x hidden rows; both directions share the width of the initial state. What a gate computes plays
no part: a hidden coordinate reads the others through weights alone, whose columns go with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from sbs_fx.passes.channels import dims as d
from sbs_fx.passes.channels.dims import Const, Dim
from sbs_fx.passes.channels.facts import Facts, always
from sbs_fx.passes.channels.inference import Dims, Inference, Term, rule
from sbs_fx.passes.channels.rules.contraction import extent

aten = torch.ops.aten


@rule(aten.lstm.input, facts=Facts())
def _lstm(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    return _recurrent(t, node, "lstm", 4, node.args[1])


@rule(aten.gru.input, facts=Facts())
def _gru(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    return _recurrent(t, node, "gru", 3, [node.args[1]])


@rule(aten.rnn_tanh.input, facts=Facts())
def _rnn_tanh(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    return _recurrent(t, node, "rnn", 1, [node.args[1]])


@rule(aten.rnn_relu.input, facts=Facts(always))
def _rnn_relu(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    return _recurrent(t, node, "rnn", 1, [node.args[1]])


@rule(aten.gru_cell, facts=Facts())
def _gru_cell(t: Inference, node: fx.Node) -> Dims:
    return _cell(t, node, "gru", 3, [node.args[1]])[0]


@rule(aten.lstm_cell, facts=Facts())
def _lstm_cell(t: Inference, node: fx.Node) -> tuple[Dims, ...]:
    return _cell(t, node, "lstm", 4, node.args[1])


@rule(aten.rnn_tanh_cell, facts=Facts())
def _rnn_tanh_cell(t: Inference, node: fx.Node) -> Dims:
    return _cell(t, node, "rnn", 1, [node.args[1]])[0]


@rule(aten.rnn_relu_cell, facts=Facts(always))
def _rnn_relu_cell(t: Inference, node: fx.Node) -> Dims:
    return _cell(t, node, "rnn", 1, [node.args[1]])[0]


def _cell(t: Inference, node: fx.Node, kind: str, gates: int, initial: Sequence[fx.Node]) -> tuple[Dims, ...]:
    """The states after one step, as many as before it, which stay in float as those inside a layer do."""
    x, states, weights = t[node.args[0]], [t[s] for s in initial], node.args[2:4]
    hidden = states[0][1]
    for state in states:
        t.unify(node, x[0], state[0])
        t.unify(node, hidden, state[1])
    for weight, source in zip(weights, (x[1], hidden), strict=True):
        t.unify(node, t[weight][1], source)
    for parameter in node.args[2:]:
        if t[parameter]:
            _unify_rows(t, node, t[parameter][0], hidden)
    outer = ((x[0], node.args[0].meta["val"].shape[0]), (Const(gates), gates), extent(hidden))
    terms = (Term((*outer, extent(x[1])), ((0,), (2,))), Term((*outer, extent(hidden)), (None, (3,))))
    t.layer(node, kind, *terms)
    return tuple(tuple(d.resolve(dim) for dim in state) for state in states)


def _recurrent(t: Inference, node: fx.Node, kind: str, gates: int, initial: Sequence[fx.Node]) -> tuple[Dims, ...]:
    """The outputs of all steps, and as many last states as there are initial ones."""
    x, states, parameters = t[node.args[0]], [t[s] for s in initial], node.args[2]
    layers, both = node.args[4], 2 if node.args[7] else 1
    per = len(parameters) // (layers * both)
    hidden, cell = states[0][-1], states[-1][-1]
    is_projected = per % 2 == 1  # the hidden state is the cell's, times the last parameter
    if is_projected:  # reason: were the two as wide as each other, kernels would look for no projection
        t.pin(node, "width of a cell with a projection", cell)
    else:
        t.unify(node, hidden, cell)
    time = 1 if node.args[8] and len(x) == 3 else 0
    t.pin(node, "steps follow each other", x[time])
    for state in states:
        t.pin(node, "layers and directions", state[0])
        if len(x) == 3:
            t.unify(node, x[1 - time], state[1])
    terms: list[Term] = []
    source, steps = x[-1], tuple(zip(x[:-1], node.args[0].meta["val"].shape[:-1], strict=True))
    for layer in range(layers):
        for direction in range(both):
            offset = (layer * both + direction) * per
            block = parameters[offset : offset + per]
            t.unify(node, t[block[0]][1], source)
            t.unify(node, t[block[1]][1], hidden)
            for parameter in block[: per - is_projected]:
                _unify_rows(t, node, t[parameter][0], cell)
            outer = (*steps, (Const(gates), gates), extent(cell))
            terms.append(Term((*outer, extent(source)), ((0,) if layer == 0 else None, (2, offset))))
            terms.append(Term((*outer, extent(hidden)), (None, (2, offset + 1))))
            if is_projected:
                t.unify(node, t[block[-1]][0], hidden)
                t.unify(node, t[block[-1]][1], cell)
                terms.append(Term((*steps, extent(hidden), extent(cell)), (None, (2, offset + per - 1))))
        source = d.concatenate([d.resolve(hidden)] * both)
    t.layer(node, kind, *terms)
    return (*x[:-1], d.resolve(source)), *(tuple(d.resolve(dim) for dim in state) for state in states)


def _unify_rows(t: Inference, node: fx.Node, rows: Dim, cell: Dim) -> None:
    gates, row = t.factor(node, rows, d.resolve(cell).size)
    t.pin(node, "gates of a cell", gates)
    t.unify(node, row, cell)
