"""`naming_parts`: the refusal of a model that cannot be captured, with the parts of it that can.

In: a `TraceError`, the model, its example inputs. Out: the same error, which names the largest sub-modules that can be
captured on the arguments that the model calls them with. Holds: a bounded number of captures; the model is left as it
was; where nothing can be captured nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from sbs_fx.passes.capture.export import Dynamic
from sbs_fx.passes.capture.part import Part, counted_calls, parameters
from sbs_fx.passes.capture.signature import Call, Inputs, call_of
from sbs_fx.passes.capture.trace import trace
from sbs_fx.plan.errors import SbsError, TraceError

_TRIES = 12  # captures
_SHOWN = 2  # parts
_LEAST = 0.05  # of the parameters, for a part that is named beside a larger one


@contextmanager
def naming_parts(
    module: nn.Module, example_inputs: Inputs, dynamic: Dynamic | None, outer: Part | None = None
) -> Iterator[None]:
    """A context in which `module` is captured: a TraceError says what can be compressed instead.

    Args:
        module, example_inputs, dynamic: as `trace` is given them.
        outer: the module itself, where it is a part.
    """
    try:
        yield
    except TraceError as error:
        parts = list(_parts(module, example_inputs, dynamic))
        if not parts:
            raise
        whole = module if outer is None else outer.whole
        names = {inner: name for name, inner in whole.named_modules()}
        paths = [names[part.module] for part in parts]
        shares = [f"{100 * parameters(part.module) / parameters(whole):.0f} % of its parameters" for part in parts]
        also = "".join(f'; or part="{path}", {share}' for path, share in zip(paths[1:], shares[1:], strict=True))
        raise TraceError(
            f"{error}. What can be compressed of this model is its part {paths[0]!r}, {shares[0]}: "
            f'sbs_fx.compress(model, example_inputs, part="{paths[0]}"){also}',
            submodule=error.submodule,
            reason=error.reason,
            parts=paths,
        ) from error


def _parts(module: nn.Module, example_inputs: Inputs, dynamic: Dynamic | None) -> Iterator[Part]:
    """The largest sub-modules that can be captured, none within another."""
    try:
        counts = counted_calls(module, Call(*call_of(example_inputs)))
    except SbsError:
        return
    sizes = {name: parameters(m) for name, m in module.named_modules() if counts.get(name) == 1}
    whole, found = max(1, parameters(module)), list[str]()
    tries = 0
    for name in sorted(sizes, key=lambda name: -sizes[name]):  # reason: of one size, the outer one comes first
        if any(f"{name}.".startswith(f"{other}.") for other in found):
            continue
        if tries == _TRIES or len(found) == _SHOWN or sizes[name] < (_LEAST * whole if found else 1):
            return
        tries += 1
        try:
            part = Part(module, name, example_inputs)
            trace(part.module, part.call, dynamic=None if isinstance(dynamic, Mapping) else dynamic)
        except SbsError:
            continue
        found.append(name)
        yield part
