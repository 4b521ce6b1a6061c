"""`with_preprocessing`: a static graph that takes pictures as they are stored, bytes in place of normalised floats.

In: a static graph of one image tensor, and the mean and standard deviation of its images. Out: a copy that takes uint8
pictures, channels first or last. Holds: it computes what the graph does of (pictures / 255 - mean) / std, bit for bit.
Resizing and cropping are not in it: the caller gives pictures of the graph's size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from sbs_fx.passes.capture.inputs import InputSpec, inputs_of, random_like, set_inputs
from sbs_fx.passes.graph import copy_graph
from sbs_fx.plan.errors import InputError

aten = torch.ops.aten
LAYOUTS = {"NCHW": (0, 1, 2, 3), "NHWC": (0, 2, 3, 1)}  # dimensions of the graph's input, in the order of the pictures
_FIRST = (0, 3, 1, 2)  # channels last -> channels first
LARGEST = 255.0


def with_preprocessing(
    static: fx.GraphModule, example_inputs: Sequence[Tensor], layout: str, metadata: Mapping[str, Any] | None
) -> tuple[fx.GraphModule, tuple[Tensor, ...], dict[str, Any]]:
    """The graph, random pictures for it, and `metadata` with "preprocess": what is inside, and what the caller does.

    Args:
        example_inputs: of `static`: one, of shape (batch, channels, height, width), float32.
        layout: of the pictures, "NCHW" or "NHWC". metadata: with "mean" and "std", a number a channel, or one.

    Raises:
        InputError: another layout, no mean and std of as many channels, or a graph that takes something else.

    >>> known = {"mean": [0.5], "std": [0.25]}
    >>> graph, (pictures,), facts = with_preprocessing(result.model, (images,), "NHWC", known)
    >>> pictures.dtype, facts["preprocess"]["inside"]
    (torch.uint8, '(x / 255 - mean) / std')
    """
    if layout not in LAYOUTS:
        raise InputError(f"pictures of layout {layout!r}; expected one of {list(LAYOUTS)}")
    if len(example_inputs) != 1 or example_inputs[0].ndim != 4 or example_inputs[0].dtype != torch.float32:
        shapes = [f"{x.dtype} {tuple(x.shape)}" for x in example_inputs]
        raise InputError(
            f"pictures are for a graph of one float32 (batch, channels, height, width); this takes {shapes}"
        )
    metadata, channels = dict(metadata or {}), example_inputs[0].shape[1]
    constants = {name: _per_channel(name, metadata.get(name), channels) for name in ("mean", "std")}
    result = copy_graph(static)
    (source,) = result.graph.find_nodes(op="placeholder")
    readers, shape, value = list(source.users), LAYOUTS[layout], source.meta.get("val")
    for name, constant in constants.items():
        result.register_buffer(f"pictures_{name}", constant)
    with result.graph.inserting_after(source):
        x = _nodes(result.graph, source, layout)
    for reader in readers:
        reader.replace_input_with(source, x)
    if value is not None:
        source.meta["val"] = value.permute(shape).to(torch.uint8)
        x.meta["val"] = value
    if (spec := inputs_of(static)) is not None:
        set_inputs(result, _of_pictures(spec, shape))
    result.graph.lint()
    result.recompile()
    pictures = random_like(example_inputs[0].permute(shape).to(torch.uint8), torch.Generator().manual_seed(0))
    inside = {"layout": layout, "dtype": "uint8", "inside": "(x / 255 - mean) / std", "outside": "resize, crop"}
    return result.eval(), (pictures,), {**metadata, "preprocess": inside}


def _per_channel(name: str, values: Any, channels: int) -> Tensor:
    """(channels or 1, 1, 1)."""
    constant = torch.tensor([] if values is None else values, dtype=torch.float32).flatten()
    if len(constant) not in (1, channels) or name == "std" and not bool((constant > 0).all()):
        raise InputError(
            f"pictures need the {name} of images, {channels} numbers; got {values!r}: give "
            f"metadata={{'mean': [...], 'std': [...]}}"
        )
    return constant.reshape(-1, 1, 1)


def _nodes(graph: fx.Graph, source: fx.Node, layout: str) -> fx.Node:
    """(x / 255 - mean) / std, channels first."""
    call = graph.call_function
    first = call(aten.permute.default, (source, list(_FIRST))) if layout == "NHWC" else source
    last = source
    steps: list[fx.Node] = [] if first is source else [first]
    steps.append(call(aten._to_copy.default, (first,), {"dtype": torch.float32}))
    steps.append(call(aten.div.Scalar, (steps[-1], LARGEST)))
    constants = [graph.get_attr(f"pictures_{name}") for name in ("mean", "std")]
    steps.append(call(aten.sub.Tensor, (steps[-1], constants[0])))
    steps.append(call(aten.div.Tensor, (steps[-1], constants[1])))
    for node in (*constants, *steps):
        last.append(node)
        last = node
    return steps[-1]


def _of_pictures(spec: InputSpec, shape: Sequence[int]) -> InputSpec:
    (tensor,) = spec.tensors
    return replace(spec, tensors=(replace(tensor, dtype="uint8", shape=tuple(tensor.shape[i] for i in shape)),))
