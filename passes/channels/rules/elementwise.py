"""Facts of element-wise operators, with a rule in `pointwise.py` or by torch's tag: signs, and identities.

What torch tags as pointwise and is not named here is `POINTWISE`: elementwise, of either sign.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from sbs_fx.passes.channels.facts import POINTWISE, Call, Facts, Sign, always, any_of, keeps, state

aten = torch.ops.aten


def _facts(sign: Sign) -> Facts:
    return Facts(sign, elementwise=True)


# -- activations and other functions of one tensor ---------------------------------------------------------------------

state(
    _facts(always),
    *(aten.relu, aten.relu6, aten.sigmoid, aten.hardsigmoid, aten.abs, aten.square, aten.exp, aten.exp2, aten.sqrt),
    *(aten.rsqrt, aten.cosh, aten.acos, aten.acosh, aten.erfc),
    *(aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge),
    *(aten.logical_not, aten.logical_and, aten.logical_or, aten.logical_xor),
)
state(
    _facts(keeps(0)),
    *(aten.silu, aten.mish, aten.hardswish, aten.gelu, aten.celu, aten.selu, aten.leaky_relu, aten.prelu),
    *(aten.tanh, aten.sinh, aten.asinh, aten.atan, aten.asin, aten.atanh, aten.erf, aten.expm1, aten.log1p),
    *(aten.ceil, aten.floor, aten.round, aten.trunc, aten.frac, aten.sign, aten.sgn, aten.reciprocal),
    *(aten.hardshrink, aten.softshrink, aten.fmod, aten.atan2, aten.positive),
)
state(_facts(keeps(0, 2)), aten.elu, aten.threshold)  # its scale, the value below the threshold
state(_facts(keeps(1, 2)), aten.softplus)  # beta and threshold
state(_facts(keeps(0, 1, 2)), aten.nan_to_num)  # what stands for NaN and infinity
state(POINTWISE, aten.log_sigmoid, aten.lerp)
state(Facts(), aten.real, aten.imag)  # of complex numbers
state(Facts(), aten.rrelu, aten.alpha_dropout)  # random, with a negative slope or shift
state(Facts(), aten.frexp, aten.equal)  # of two results, of one for all: tagged as pointwise all the same

# Identities: dropout is one in eval mode.
state(
    Facts(keeps(0), elementwise=True, moves=True),
    *(aten.clone, aten.contiguous, aten.dropout, aten.feature_dropout),
)
state(Facts(keeps(0)), aten.native_dropout)  # gives the mask as well


def _casts(call: Call) -> bool:
    """Integers wrap around, floats do not."""
    value = call.node.meta.get("val")
    return call.keeps(0) and isinstance(value, Tensor) and value.is_floating_point()


state(Facts(_casts), aten.to, aten._to_copy, aten.type_as)

# -- arithmetic --------------------------------------------------------------------------------------------------------


def _product(call: Call) -> bool:
    return call.keeps(0, 1) or call[0] is call[1]


def _power(call: Call) -> bool:
    return call.keeps(0) or (not isinstance(call[1], fx.Node) and call[1] % 2 == 0)


state(Facts(keeps(0, 1, "alpha"), elementwise=True, codes="join"), aten.add.Tensor)
state(_facts(keeps(0, 1, "alpha")), aten.add.Scalar)
state(Facts(_product, elementwise=True, codes="join"), aten.mul.Tensor)
state(_facts(_product), aten.mul.Scalar)
state(_facts(keeps(0, 1)), aten.div, aten.true_divide, aten.floor_divide)
state(_facts(keeps(0, 1, 2, "value")), aten.addcmul, aten.addcdiv)
state(_facts(keeps(1)), aten.remainder)  # has the sign of the divisor
state(_facts(_power), aten.pow.Tensor_Scalar)
state(_facts(keeps(0)), aten.pow.Tensor_Tensor, aten.pow.Scalar)

# -- bounds and choices ------------------------------------------------------------------------------------------------


def _bounded(call: Call) -> bool:
    """The upper bound wins where it is below the lower one; either may be None."""
    return call.keeps(2) and (call.keeps(0) or (call[1] is not None and call.keeps(1)))


state(_facts(_bounded), aten.clamp, aten.clip, aten.hardtanh)
state(_facts(any_of(0, 1)), aten.clamp_min, aten.maximum, aten.max.other, aten.fmax)
state(_facts(keeps(0, 1)), aten.clamp_max, aten.minimum, aten.min.other, aten.fmin)
state(_facts(keeps(1, 2)), aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)
state(Facts(), aten.where.default)  # gives places
state(_facts(keeps(0, 2)), aten.masked_fill)
state(_facts(keeps(1)), aten.copy, aten.fill)
