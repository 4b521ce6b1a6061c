"""`model.pt2`: the static graph as a file that torch alone can run.

In: a static graph from `finalize`. Out: an archive of `torch.export` with the weights at their bitwidth, and back.

    import torch, torch.ao.quantization.fx._decomposed   # the second registers the quantised operators
    program = torch.export.load("model.pt2")

Holds: a loaded graph computes what the saved one does, bit for bit; nothing in the file is a pickle; the final name
holds a whole file or what it held before; a file that was cut or changed is refused.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import StrictBool, StrictInt, StrictStr
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sbs_fx.export.packing import pack, unpack
from sbs_fx.export.program import exported_program
from sbs_fx.export.program_members import program_members
from sbs_fx.export.registry import target
from sbs_fx.export.runtime import Runner
from sbs_fx.export.schema import read_graph
from sbs_fx.export.trusted import Refused, archive_of, check, members_of
from sbs_fx.passes.capture.canonical import canonicalise
from sbs_fx.passes.capture.export import quiet_torch
from sbs_fx.passes.capture.inputs import InputSpec, guarded, inputs_of, set_inputs
from sbs_fx.passes.capture.unlift import unlifted
from sbs_fx.passes.dialects import DEQUANTIZE, Static, StaticActivation, StoredWeight, set_dialect, static_of, verify
from sbs_fx.plan import Value, write_atomic
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import FileError, GraphError, PolicyError

FORMAT = 2
INFORMATION = "extra/sbs_fx.json"  # what we know beside the graph, with a digest of all other members
_SAMPLE_INPUTS = "data/sample_inputs/"
_PICKLED = f"{_SAMPLE_INPUTS}model.pt"
_WEIGHTS = "data/weights/weight_"
_ROOT = "archive"  # the folder that all members are in
_IDENTITY = ".data/serialization_id"  # depends on the example inputs; left out


@boundary("save_pt2")
def save_pt2(
    static: fx.GraphModule,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a static graph to `path`.

    Args:
        static: from `finalize`; it states the bits that codes are stored at.
        example_inputs: as the graph takes them; only shapes and dtypes matter. Dimensions that were dynamic stay so.
        path: usually ends in ".pt2".
        metadata: what JSON can hold; comes back in the `Static` of the loaded graph.

    Raises:
        GraphError: `torch.export` cannot capture the graph, or read it again.
        FileError: `path` cannot be written or the disk is full; what `path` held before is still there.

    >>> save_pt2(result.model, (images,), "model.pt2")
    """
    dialect = static_of(static)
    (output,) = static.graph.find_nodes(op="output")
    if texts := [leaf for leaf in pytree.tree_leaves(output.args) if isinstance(leaf, str)]:
        raise GraphError(
            f"the text {texts[0]!r} is among the outputs, which torch.export writes and cannot read again; return "
            "tensors, numbers and None alone",
            pass_name="save_pt2",
        )
    packed = pack(static)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    with quiet_torch():
        members = program_members(packed, inputs)
    if members is None:
        members = _captured(packed, inputs)
    information = {
        "format": FORMAT,
        "metadata": dict(metadata or {}),
        "exact": dialect.exact,
        "inputs": None if (spec := inputs_of(static)) is None else spec.to_json(),
        "weights": {name: _row(stored) for name, stored in dialect.weights.items()},
        "activations": [[name, a.bits, a.zero_point] for name, a in dialect.activations.items()],
    }
    write_atomic(path, _sealed(members, information))


@boundary("load_pt2")
def load_pt2(path: str | os.PathLike[str], libraries: Sequence[str] = ()) -> fx.GraphModule:
    """Read what `save_pt2` wrote: the static graph with its codes as int8 buffers, in eval mode.

    Its `Static` is as `finalize` left it but for `floats`, with the metadata that `save_pt2` was given. A file from a
    stranger runs nothing while it is read (see `sbs_fx.export.trusted`); its digest says that it is whole, not who
    wrote it.

    Args:
        libraries: operator libraries that the graph may call beside torch's own, such as "mine" of `torch.ops.mine`.

    Raises:
        FileError: the file cannot be read, was cut or changed, was not written by `save_pt2`, or holds what no saved
            model does: pickles, libraries, other operators, Python in the place of sizes.

    >>> load_pt2("out/model.pt2")(images).shape
    torch.Size([2, 4])
    """
    import torch.ao.quantization.fx._decomposed  # reason: registers the operators that the graph calls

    data = _read(path)
    information, members = _checked(data, os.fspath(path), libraries)
    try:
        with quiet_torch():
            module = read_graph(members) or unlifted(torch.export.load(archive_of(members)))
    except Exception as error:  # whatever torch raises on an archive that is whole but of another version
        raise FileError(
            f"cannot read {os.fspath(path)!r} with torch {torch.__version__}: {type(error).__name__}: "
            f"{error}; save the model again with this version"
        ) from error
    try:
        result = _told(module, information)
        verify(result, Static)
    except Exception as error:  # whatever graphs raise on what is said of others
        raise FileError(
            f"{os.fspath(path)!r} says what its graph is not ({type(error).__name__}: {error}); it was changed: write "
            "it again"
        ) from error
    return guarded(result.eval())


def load_program(path: str | os.PathLike[str], libraries: Sequence[str] = ()) -> ExportedProgram:
    """A float model that `torch.export.save` wrote, checked as files of ours are but for a digest, which it has not.

    Raises:
        FileError: it cannot be read, or holds what a model of tensors does not; its example inputs are not read.
    """
    data, name = _read(path), os.fspath(path)
    try:
        members = members_of(data, unread=(_IDENTITY, _PICKLED)) | {_PICKLED: b""}
        check(members, libraries)
        with quiet_torch():
            return torch.export.load(archive_of(members))
    except Refused as error:
        raise FileError(f"{name!r} {error}; a model to compress holds tensors and operators alone") from None
    except Exception as error:  # zipfile and torch raise many kinds
        raise FileError(
            f"cannot read {name!r} as a model of torch {torch.__version__} ({type(error).__name__}: {error}); write it "
            "with torch.export.save and this version"
        ) from error


@boundary("load_saved")
def load_saved(path: str | os.PathLike[str]) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """`load_pt2`, and zeros of the shapes that the graph takes, 2 along dynamic dimensions. Raises FileError.

    >>> static, inputs = load_saved("out/model.pt2")
    >>> static(*inputs).shape
    torch.Size([2, 4])
    """
    static = load_pt2(path)
    values = [node.meta["val"] for node in static.graph.find_nodes(op="placeholder")]
    return static, tuple(torch.zeros(example_shape(value), dtype=value.dtype) for value in values)


def example_shape(value: Tensor) -> list[int]:
    """The shape of what a program takes, 2 along dynamic dimensions. value: the fake tensor of its placeholder."""
    return [2 if isinstance(size, torch.SymInt) else int(size) for size in value.shape]


class _Information(Value):
    """What we know beside the graph. weights: name -> bits, or those of each channel as digits; axis; nonzeros."""

    format: StrictInt
    metadata: dict[str, Any]
    exact: StrictBool = False
    inputs: dict[str, Any] | None = None
    weights: dict[str, tuple[StrictInt | StrictStr, StrictInt, StrictInt | None]]
    activations: list[tuple[StrictStr, StrictInt, StrictInt]]


# -- graphs ------------------------------------------------------------------------------------------------------------


def _told(module: fx.GraphModule, information: _Information) -> fx.GraphModule:
    """The graph with its codes as int8 buffers, and with what is known of it."""
    weights = {
        name: StoredWeight(tuple(map(int, bits)) if isinstance(bits, str) else bits, axis, nonzeros)
        for name, (bits, axis, nonzeros) in information.weights.items()
    }
    canonicalise(module)
    result = unpack(module, weights)
    activations = _activations(result, information.activations)
    set_dialect(result, Static(weights, activations, information.exact, information.metadata))
    if information.inputs is not None:
        set_inputs(result, InputSpec.from_json(information.inputs))
    return result


def _row(stored: StoredWeight) -> tuple[int | str, int, int | None]:
    """As JSON: bits by channel are one digit each, half as long as a list."""
    bits = stored.bits if isinstance(stored.bits, int) else "".join(map(str, stored.bits))
    return bits, stored.axis, stored.nonzeros


def _activations(module: fx.GraphModule, rows: Sequence[Any]) -> dict[str, StaticActivation]:
    """Export renames nodes and keeps their order: the nth dequantised tensor is the nth of the rows."""
    nodes = module.graph.find_nodes(op="call_function", target=DEQUANTIZE)
    return {
        name: StaticActivation(bits, zero_point, node.args[0].name, node.name)  # type: ignore[union-attr]
        for (name, bits, zero_point), node in zip(rows, nodes, strict=True)
    }


# -- files -------------------------------------------------------------------------------------------------------------


def _captured(packed: fx.GraphModule, example_inputs: Sequence[Tensor]) -> dict[str, bytes]:
    """The members that `torch.export.save` writes, without the pickled example inputs."""
    program = exported_program(packed, example_inputs)
    archive = io.BytesIO()
    with quiet_torch():
        torch.export.save(program, archive)
    with zipfile.ZipFile(archive) as old:
        members = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    members.pop(_IDENTITY, None)
    return {name: b"" if name.startswith(_SAMPLE_INPUTS) else data for name, data in members.items()}


def _sealed(members: Mapping[str, bytes], information: dict[str, Any]) -> bytes:
    """The archive with its texts compressed, and with a digest of every member."""
    sealed = io.BytesIO()
    with zipfile.ZipFile(sealed, "w") as archive:
        for name, data in members.items():
            _write(archive, f"{_ROOT}/{name}", data, compress=not name.startswith(_WEIGHTS))
        text = json.dumps(information)
        digests = {name: hashlib.sha256(data).digest() for name, data in members.items()}
        outer = json.dumps({"sha256": _digest(digests, text), "content": text})
        _write(archive, f"{_ROOT}/{INFORMATION}", outer.encode(), compress=True)
    return sealed.getvalue()


def _digest(members: Mapping[str, bytes], text: str) -> str:
    """One digest for the names and the SHA-256 of all members and for what is said beside them."""
    total = hashlib.sha256(text.encode())
    for name in sorted(members):
        total.update(name.encode() + b"\0" + members[name])
    return total.hexdigest()


def _write(archive: zipfile.ZipFile, name: str, data: bytes, *, compress: bool) -> None:
    entry = zipfile.ZipInfo(name)  # reason: without a date, equal models are equal files
    entry.compress_type = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    archive.writestr(entry, data, compresslevel=9 if compress else None)


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise FileError(
            f"cannot read {os.fspath(path)!r}: {error.strerror or error}; expected a file that save_pt2 wrote"
        ) from error


def _checked(data: bytes, path: str, libraries: Sequence[str]) -> tuple[_Information, dict[str, bytes]]:
    """What we know beside the graph, and the members, once each is as it was written and none is dangerous."""

    def bad(problem: str) -> FileError:
        return FileError(f"{path!r} {problem}; it was cut, changed, or not written by save_pt2: write it again")

    try:
        members = members_of(data)
        outer = json.loads(members.pop(INFORMATION))
        digests = {name: hashlib.sha256(content).digest() for name, content in members.items()}
        if _digest(digests, outer["content"]) != outer["sha256"]:
            raise Refused("holds other data than was written")
        said = json.loads(outer["content"])
        written = said["format"]
        check(members, libraries)
    except Refused as error:
        raise bad(str(error)) from None
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise bad(f"is no whole archive of a model ({type(error).__name__}: {error})") from error
    if written != FORMAT:
        raise FileError(f"{path!r} has format {written}, this version reads {FORMAT}; save the model again")
    try:
        return _Information(**said), members
    except PolicyError as error:
        raise bad(str(error)) from error


@target("pt2", suffix=".pt2", help="torch.export, weights at their bitwidth; runs in torch alone")
def pt2(static: fx.GraphModule, inputs: Sequence[Tensor], path: str, options: Mapping[str, Any]) -> Runner:
    """`save_pt2`, and the file as it was loaded again."""
    save_pt2(static, inputs, path, options["metadata"])
    called = {node.target.namespace for node in static.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    return Runner("pt2", load_pt2(path, tuple(called)))
