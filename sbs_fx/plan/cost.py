"""`Cost`: what a model costs for one example, layer by layer and in total; plain numbers, kept as JSON."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeInt

from sbs_fx.plan.files import parse_object
from sbs_fx.plan.value import Value


class LayerCost(Value):
    """What one layer costs for one example. BOPs = MACs x weight bits x activation bits (arXiv 2101.04935).

    Attributes:
        name, kind: which layer, and what computes it; "float": an operator without a rule, at full width and 32 bits.
        macs, bops: multiply-accumulates and bit operations.
        weight_bits: mean over the output channels; of a matmul of two activations, the bits of the second.
        activation_bits: bits of the input.
        params, stored_bits: weights that it keeps, and their bits in the file.
        seconds: time that a latency model gives it; 0 without one.

    >>> [layer.name for layer in result.cost.layers]
    ['0 (conv2d)', '3 (conv2d_1)', '8 (linear)']
    """

    name: str
    kind: Literal["conv", "linear", "matmul", "attention", "lstm", "gru", "rnn", "float"]
    macs: NonNegativeInt
    weight_bits: float = Field(ge=0, le=64, allow_inf_nan=False)
    activation_bits: float = Field(ge=0, le=64, allow_inf_nan=False)
    bops: NonNegativeInt
    params: NonNegativeInt
    stored_bits: NonNegativeInt
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Cost(Value):
    """What a model costs for one example: per layer, the rest, and in total.

    Attributes:
        layers: one entry a conv, linear, matmul, attention or recurrent layer, and a further operator that multiplies.
        other_params, other_stored_bits: norms, biases and tables, kept in float32.
        other_seconds: time of what is no layer; 0 without a latency model.
        reference: the float model's cost, to which budgets compare; None if this is that model.
        bops, macs, params, stored_bits: totals, as of `LayerCost`.

    >>> result.cost.bops <= 0.05 * result.cost.reference.bops
    True
    """

    layers: tuple[LayerCost, ...] = ()
    other_params: NonNegativeInt = 0
    other_stored_bits: NonNegativeInt = 0
    other_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    reference: Cost | None = None

    @property
    def bops(self) -> int:
        return sum(layer.bops for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers) + self.other_params

    @property
    def stored_bits(self) -> int:
        return sum(layer.stored_bits for layer in self.layers) + self.other_stored_bits

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers) + self.other_seconds

    @property
    def by_measure(self) -> dict[str, float]:
        """What budgets limit, by the names that they give it; latency only where it was measured."""
        measures: dict[str, float] = {
            "bops": self.bops,
            "size": self.stored_bits,
            "macs": self.macs,
            "params": self.params,
        }
        return {**measures, "latency": self.seconds} if self.seconds else measures

    def to_json(self) -> str:
        """The cost as JSON, `reference` included."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises FileError if the text is no JSON, PolicyError if it is no cost."""
        return cls(**parse_object(text, "cost"))
