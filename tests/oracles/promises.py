"""What every public call promises, whatever it is given: it succeeds, or raises one of our errors that says something;
it writes nothing to stderr; and models, inputs and the state of the process are afterwards what they were.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import sbs_fx
from sbs_fx.passes.capture.signature import call_of
from sbs_fx.plan.errors import SbsError
from tests.oracles.state import state_of


class _Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@contextmanager
def silent() -> Iterator[None]:
    """Asserts that nothing is warned of or logged, which a process of its own would write to stderr."""
    records = _Records()
    logging.getLogger().addHandler(records)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            yield
    finally:
        logging.getLogger().removeHandler(records)
    assert not [f"{w.category.__name__}: {w.message}" for w in caught]
    assert not records.texts


def outcome(call: Callable[[], Any], *watched: Any) -> Any:
    """What a call gives, or the error of ours that it raises.

    Anything else that is raised passes through. Asserts that what is watched, models and values with tensors in them,
    is as it was, and that all is silent.
    """
    before = [_state(each) for each in watched]
    result: Any
    try:
        with silent():
            result = call()
    except SbsError as error:
        result = error
    assert not isinstance(result, SbsError) or str(result).strip(), type(result).__name__
    for each, was in zip(watched, before, strict=True):
        now = _state(each)
        assert now == was, _difference(was, now)
    return result


def configured(**settings: Any) -> sbs_fx.Config | None:
    """`Config` of these settings; None where it refuses them with a text."""
    try:
        return sbs_fx.Config(**settings)
    except SbsError as error:
        text = str(error)
    assert text.strip()
    return None


def check_result(result: sbs_fx.Result, budget: Any, reference: Any, example_inputs: Any) -> None:
    """The budget holds, and the graph gives what the float model gave: the same structure and shapes, finite values
    where those were finite."""
    assert sbs_fx.Budget.of(budget).is_satisfied_by(result.cost)
    args, kwargs = call_of(example_inputs)
    with torch.no_grad():
        output = result.model(*args, **kwargs)
    expected, found = pytree.tree_flatten(reference), pytree.tree_flatten(output)
    assert found[1] == expected[1], (found[1], expected[1])
    for a, b in zip(found[0], expected[0], strict=True):
        assert type(a) is type(b), (a, b)
        if isinstance(a, Tensor):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            if bool(torch.isfinite(b).all()):
                assert bool(torch.isfinite(a).all())
        elif not isinstance(a, float):
            assert a == b


def float_output(module: nn.Module, example_inputs: Any) -> Any:
    """In eval mode, on copies of the inputs; for a model that may be changed."""
    example_inputs = pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example_inputs)
    args, kwargs = call_of(example_inputs)
    dtype = torch.get_default_dtype()
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return module.eval()(*args, **kwargs)
    finally:
        torch.set_default_dtype(dtype)


def _state(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return state_of(value)
    return [_of_leaf(leaf) for leaf in pytree.tree_leaves(value)]


def _of_leaf(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return id(leaf)
    plain = leaf.layout is torch.strided and leaf.device.type != "meta" and not leaf.is_quantized
    values = bytes(leaf.detach().contiguous().flatten().view(torch.uint8).numpy()) if plain and leaf.numel() else b""
    return id(leaf), leaf.dtype, leaf.shape, leaf.requires_grad, values


def _difference(before: Any, after: Any) -> str:
    if isinstance(before, dict) and isinstance(after, dict):
        return "; ".join(f"{k}: {_difference(before[k], after.get(k))}" for k in before if before[k] != after.get(k))
    return f"{str(before)[:300]} -> {str(after)[:300]}"
