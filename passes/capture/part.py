"""`Part`: one sub-module in place of the whole model, and `with_part`: the whole with what became of it.

In: a model, the dotted path of a sub-module, inputs of the whole. Out: the sub-module, the arguments that it gets, and
batches of them. Holds: the part is called once in a forward of the whole, which runs in eval mode, without gradients,
and is afterwards as it was.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sbs_fx.data.prepared import Prepare, prepared
from sbs_fx.passes.capture.inputs import guarded
from sbs_fx.passes.capture.models import looked_through, put_in_eval_mode, unwrapped
from sbs_fx.passes.capture.signature import Call, Inputs, Signature, argument_names, call_of
from sbs_fx.passes.capture.unchanged import unchanged
from sbs_fx.passes.graph import copy_graph
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import DataError, InputError

_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.Size)


class _Reached(BaseException):
    """Ends a forward of the whole at its part; a model that catches any `Exception` does not catch it."""


class Part:
    """A sub-module and how the whole calls it.

    Attributes:
        whole: the model, without wrappers around it. name: path of the part in it. module: the part.
        call: the arguments that the part gets when the whole runs on its example inputs.
    """

    def __init__(self, model: Any, name: str, example_inputs: Inputs) -> None:
        """Raises InputError for a path that is none, inputs that the whole does not take, or a part that is not called
        once; TraceError for a part that is scripted or quantised."""
        if not isinstance(model, nn.Module):
            raise InputError(f"the model is a {type(model).__name__}; parts are sub-modules of an nn.Module: give that")
        self.whole, self.name, self.module = looked_through(model), name, submodule(model, name)
        unwrapped(self.module)
        self.example = Call(*call_of(example_inputs))
        calls: list[Call] = []
        counts = counted_calls(self.whole, self.example, {self.module: calls.append})
        if len(calls) != 1:
            raise InputError(_not_once(name, calls, counts))
        self.call = calls[0]
        try:
            self.signature, _ = Signature.of(self.module, self.call)
        except InputError as error:
            raise InputError(f"the part {name!r} cannot be called alone: {error}") from error

    def __str__(self) -> str:
        return (
            f"this is the part {self.name!r} ({type(self.module).__name__}), {100 * self.share:.1f} % of the model's "
            "parameters; the rest stays as it is, and all below is of the part alone"
        )

    @property
    def share(self) -> float:
        """Of the whole's parameters."""
        return parameters(self.module) / max(1, parameters(self.whole))

    def data(self, data: Iterable[Any] | None, prepare: Prepare | None = None, validation: Any = None) -> Any:
        """Batches of the whole as batches of the part, without labels, read as they are asked for; None stays None.
        Raises InputError for validation data."""
        if validation is not None:
            raise InputError("validation= is judged by labels, which do not belong to a part's outputs; leave it out")
        if data is None:
            return None
        return (_SizedPartData if isinstance(data, Sized) else _PartData)(self, data, prepare)

    def tensors(self, call: Call, index: int) -> tuple[Tensor, ...]:
        """The tensors that the part gets when the whole runs on batch `index`. Raises DataError."""
        calls: list[Call] = []

        def stop(reached: Call) -> None:
            calls.append(reached)
            raise _Reached

        try:
            counted_calls(self.whole, call, {self.module: stop})
        except _Reached:
            pass
        except InputError as error:
            raise DataError(f"batch {index}: {error}; or give prepare=, a function from a batch to (arguments of the "
                            "model, targets)") from error  # fmt: skip
        if not calls:
            raise DataError(f"batch {index}: the model's forward ends without a call of its part {self.name!r}")
        try:
            return self.signature.tensors(calls[0].args, calls[0].kwargs)
        except InputError as error:
            raise DataError(f"batch {index}, at the part {self.name!r}: {error}") from error


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The sub-module of that path, in a model or in what its wrappers hold. Raises InputError."""
    for root in (model, looked_through(model)):
        found = dict(root.named_modules(remove_duplicate=False)).get(name) if name else None
        if found is not None:
            return found
    paths = [path for path, _ in looked_through(model).named_modules() if path]
    near = difflib.get_close_matches(name, paths, 3) or [path for path in paths if "." not in path]
    raise InputError(f"the model has no sub-module {name!r} to be its part; there are {', '.join(near[:8])}")


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def counted_calls(
    whole: nn.Module, call: Call, at_call: Mapping[nn.Module, Callable[[Call], None]] | None = None
) -> dict[str, int]:
    """How often each sub-module is called in one forward; `at_call` is handed the arguments, tensors copied.

    Raises:
        InputError: the model does not run on these inputs.
    """
    counts: dict[str, int] = {}

    def hook_of(name: str, function: Callable[[Call], None] | None) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            counts[name] = counts.get(name, 0) + 1
            if function is not None:
                function(_copied(Call(*call_of(Call(args, kwargs)))))

        return hook

    with unchanged(whole), torch.no_grad(), ExitStack() as hooks:
        put_in_eval_mode(whole)
        for name, module in whole.named_modules():
            if name and not isinstance(module, torch.jit.ScriptModule):
                hook = hook_of(name, (at_call or {}).get(module))
                # reason: before the part's own hooks, which run again when it is captured
                hooks.enter_context(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        copied = _copied(call)
        try:
            whole(*copied.args, **copied.kwargs)
        except Exception as error:
            text = next(iter(str(error).strip().splitlines()), "")
            raise InputError(
                f"the model does not run on {_shapes(call)}: {type(error).__name__}: {text}; give inputs that the "
                "whole model accepts"
            ) from error
    return counts


def _copied(call: Call) -> Call:
    """With tensors of its own: a forward may write into what it is given."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (call.args, call.kwargs))
    return Call(args, kwargs)


def _shapes(call: Call) -> str:
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return ", ".join(str(tuple(leaf.shape)) for leaf in leaves if isinstance(leaf, Tensor)) or "no tensor"


def _not_once(name: str, calls: list[Call], counts: Mapping[str, int]) -> str:
    once = ", ".join(repr(other) for other in [path for path, count in counts.items() if count == 1][:5])
    instead = f"name one that is, such as {once}" if once else "compress the whole model"
    if not calls:
        return (
            f"the model's forward does not call its part {name!r} (lists of modules are never called, and a method "
            f"other than its forward does not count); a part is called once: {instead}"
        )
    shapes = list(dict.fromkeys(map(_shapes, calls)))
    of = f"each time on {shapes[0]}" if len(shapes) == 1 else f"on differing shapes: {' and '.join(shapes)}"
    return f"the model's forward calls its part {name!r} {len(calls)} times, {of}; a part is called once: {instead}"


# -- batches of the whole ----------------------------------------------------------------------------------------------


class _PartData:
    """Each batch runs through the whole up to the part."""

    def __init__(self, part: Part, data: Iterable[Any], prepare: Prepare | None) -> None:
        example = part.example
        names = argument_names(part.whole, example.args, example.kwargs)
        self.part = part
        # Arguments without a tensor are those of the example inputs; batches hold the others, in order.
        self.places = [i for i, value in enumerate(example.args) if _first_tensor(value) is not None]
        self.keys = [key for key, value in example.kwargs.items() if _first_tensor(value) is not None]
        self.examples = [*(example.args[i] for i in self.places), *(example.kwargs[key] for key in self.keys)]
        self.data = prepared(data, [*(names[i] for i in self.places), *self.keys], prepare)

    def __iter__(self) -> Iterator[tuple[tuple[Tensor, ...]]]:
        for index, batch in enumerate(self.data):
            yield (self.part.tensors(self._call(batch, index), index),)

    def set_epoch(self, epoch: int) -> None:
        self.data.set_epoch(epoch)

    def _call(self, batch: Any, index: int) -> Call:
        """A call of the whole with what leads a batch: (arguments, ...), ((arguments), ...), or the one argument."""
        parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        forms = [parts, (batch,)]
        if parts and isinstance(parts[0], (tuple, list)):
            forms.insert(0, (*parts[0], *parts[1:]))
        count = len(self.examples)
        values = next((f[:count] for f in forms if len(f) >= count and all(map(_fits, f, self.examples))), None)
        if values is None:
            raise DataError(
                f"batch {index} does not begin with what the example inputs have, {_form(self.examples)}; give batches "
                "of the whole model in that form, or prepare=, a function from a batch to (arguments of the model, "
                "targets)"
            )
        tensor = _first_tensor(self.examples)
        assert tensor is not None
        values = pytree.tree_map_only(Tensor, lambda x: x.to(tensor.device), values)
        args, kwargs = list(self.part.example.args), dict(self.part.example.kwargs)
        for place, value in zip(self.places, values, strict=False):
            args[place] = value
        kwargs.update(zip(self.keys, values[len(self.places) :], strict=True))
        return Call(*call_of(Call(tuple(args), kwargs)))


class _SizedPartData(_PartData):
    def __len__(self) -> int:
        return len(self.data)


def _first_tensor(value: Any) -> Tensor | None:
    return next((leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)


def _fits(value: Any, example: Any) -> bool:
    """Whether a value can stand where the example stands; a batch of tensors may stand for a list of them."""
    if isinstance(example, Tensor):
        return isinstance(value, Tensor) and value.ndim == example.ndim
    if isinstance(example, (list, tuple)):
        if isinstance(value, Tensor):
            return isinstance(example[0], Tensor) and value.ndim == example[0].ndim + 1
        return isinstance(value, (list, tuple)) and all(any(_fits(v, other) for other in example) for v in value)
    return isinstance(value, Mapping) == isinstance(example, Mapping) and not isinstance(value, Tensor)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.ndim} dimensions"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_form, value[:4]))}{', ...' if len(value) > 4 else ''})"
    return f"a {type(value).__name__}"


# -- the way back ------------------------------------------------------------------------------------------------------


def _copy(graph: nn.Module) -> nn.Module:
    if not isinstance(graph, fx.GraphModule) or graph.graph.find_nodes(op="call_module"):
        return copy.deepcopy(graph)
    result = copy_graph(graph)
    result.recompile()
    return guarded(result)


@boundary("with_part")
def with_part(model: nn.Module, part: str, graph: nn.Module) -> nn.Module:
    """A copy of a whole model, in eval mode, in which a static graph stands in place of one sub-module.

    >>> part = sbs_fx.compress(net, images, part="3", budget="10%").model
    >>> sbs_fx.with_part(net, "3", part)(images).shape
    torch.Size([2, 4])

    Args:
        model: the float model; it is not changed.
        part: path of the sub-module, as `compress(model, ..., part=...)` was given it.
        graph: `result.model` of that call, or what `sbs_fx.load` read, which takes tensors alone and gives plain
            containers (`sbs_fx.apply` with the saved policy gives back the form of the float part). It is copied too.

    The copy takes what the model takes and gives outputs of the same structure; the graph still refuses inputs that it
    was not made for. Numbers and texts that the part has as attributes can still be read there, its methods cannot.

    Raises:
        InputError: no such sub-module, or a model that cannot be copied.
    """
    replaced = submodule(model, part)
    new = _copy(graph)
    for name, value in vars(replaced).items():
        plain = all(isinstance(leaf, _PLAIN) for leaf in pytree.tree_leaves(value))
        if plain and not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, copy.deepcopy(value))
    try:
        # reason: what is in the memo counts as copied already, wherever the model refers to it
        whole = copy.deepcopy(model, {id(replaced): new})
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}); put the graph in its place "
            f"yourself: model.set_submodule({part!r}, graph)"
        ) from error
    put_in_eval_mode(whole)
    return whole
