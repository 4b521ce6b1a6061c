"""What a `model.pt2` from a stranger may hold, checked before torch sees any of it.

In: the bytes of a file. Out: an archive written anew from members that are allowed by name, form and content. Holds:
nothing that torch would unpickle, import, open as a library or evaluate as Python comes through: members are those that
`save_pt2` writes, tensors are raw bytes as large as they say, operators are registered ones of known libraries, and
expressions are sizes.
"""

from __future__ import annotations

import ast
import io
import json
import keyword
import math
import operator
import os
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch.utils._sympy import functions

from sbs_fx.plan.errors import FileError

LIBRARIES = ("aten", "prims", "quantized_decomposed", "torchvision")
NATIVE = "data/aotinductor/"  # begins the names of libraries and their sources
_MEMBERS = {
    ".data/version", "archive_format", "archive_version", "byteorder", "data/constants/model_constants_config.json",
    "data/sample_inputs/model.pt", "data/weights/model_weights_config.json", "extra/sbs_fx.json", "models/model.json",
}  # fmt: skip
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}")
_CONFIGS = {"data/weights/": "weight_", "data/constants/": "tensor_"}
_TENSOR_NAMES = {"parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name"}
_NO_NAME = re.compile(r"[\"\\\x00-\x1f\x7f]")
_TEXTS = 1 << 28  # bytes of all texts together, at most
_OPERATOR = re.compile(r"torch\.ops\.(\w+)\.(\w+)\.\w+")
_READ_FILES = {"from_file"}  # operators of aten that open what they are told to
_NO_SIZES = {"attrgetter", "itemgetter", "methodcaller", "call", "setitem", "delitem"}  # which reach or change objects
_PYTHON = {f"_operator.{name}" for name in set(operator.__all__) - _NO_SIZES}
_PYTHON |= {f"math.{name}" for name in ("floor", "ceil", "trunc", "sqrt")}
_SIZES = {
    *functions.__all__, "Symbol", "Integer", "Rational", "Float", "Add", "Mul", "Pow", "Max", "Min", "Eq", "Ne",
    "Equality", "Unequality", "Lt", "Le", "Gt", "Ge", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan",
    "And", "Or", "Not", "floor", "ceiling", "Abs", "Piecewise", "ExprCondPair", "true", "false", "oo", "positive",
    "integer", "real", "nonnegative",
}  # fmt: skip
_SYMBOL = re.compile(r"[suz]\w?\w?\d+")
_EXPRESSIONS = (
    ast.Expression, ast.Call, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare, ast.BoolOp,
    ast.keyword, ast.Tuple, ast.operator, ast.unaryop, ast.cmpop, ast.boolop,
)  # fmt: skip


class Refused(FileError):
    """A file that holds what a saved model does not."""


def members_of(data: bytes, unread: Collection[str] = ()) -> dict[str, bytes]:
    """Members by name, without the folder that all are in. unread: names of members that are left out.

    Raises:
        Refused: a member that no saved model has, one twice, in other letters, of another folder, or too large.
        zipfile.BadZipFile and kin: no whole archive.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        root = entries[0].filename.partition("/")[0] if entries else ""
        entries = [entry for entry in entries if entry.filename.removeprefix(f"{root}/") not in unread]
        names = [entry.filename.removeprefix(f"{root}/") for entry in entries]
        if not all(entry.filename.startswith(f"{root}/") for entry in entries):
            raise Refused("has members in several folders")
        if len({name.casefold() for name in names}) < len(names):
            raise Refused("has a member twice")
        texts = 0
        for name, entry in zip(names, entries, strict=True):
            is_tensor = _TENSORS.fullmatch(name) is not None
            if name.casefold().startswith(NATIVE):
                raise Refused(
                    "holds native code of AOTInductor, which runs as a program does; if it is yours: "
                    "sbs_fx.load(..., trust=True)"
                )
            if not is_tensor and name not in _MEMBERS:
                kind = "pickles" if name.endswith((".pt", ".pkl")) else "what no saved model has"
                raise Refused(f"holds {kind} ({name[:80]!r})")
            if entry.compress_type != zipfile.ZIP_STORED and is_tensor or entry.flag_bits & 1:
                raise Refused(f"has {name!r} compressed or locked")
            texts += 0 if is_tensor else entry.file_size
        if texts > _TEXTS or sum(entry.compress_size for entry in entries) > len(data):
            raise Refused(f"says that it holds {texts} bytes of text, at most {_TEXTS} are read")
        return {name: archive.read(entry) for name, entry in zip(names, entries, strict=True)}


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether a file is an archive with native code in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2].casefold().startswith(NATIVE) for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return False


def check(members: Mapping[str, bytes], libraries: Collection[str] = ()) -> None:
    """Look at everything that torch would interpret. Raises Refused, or ValueError and kin where it is no text of
    ours.

    Args:
        libraries: names of further operator libraries, such as "mine" of `torch.ops.mine`, that graphs may call.
    """
    if members.get("data/sample_inputs/model.pt"):
        raise Refused("holds pickles ('data/sample_inputs/model.pt')")
    for folder, prefix in _CONFIGS.items():
        name = f"{folder}model_{folder.split('/')[1]}_config.json"
        for tensor, entry in (json.loads(members[name])["config"] if name in members else {}).items():
            path = entry["path_name"]
            if entry["use_pickle"] is not False or not isinstance(path, str):
                raise Refused(f"holds pickles ({tensor!r})")
            content = members.get(f"{folder}{path}") if re.fullmatch(rf"{prefix}\d+", path) else None
            if content is None or entry["tensor_meta"] is None:
                raise Refused(f"has {path!r} for {tensor!r}, which is no tensor of the file")
            _check_tensor(tensor, entry["tensor_meta"], len(content))
    allowed = {*LIBRARIES, *libraries}
    for entry in _objects(json.loads(members["models/model.json"])):
        _check_names(entry)
        if isinstance(entry.get("target"), str) and "inputs" in entry:
            _check_operator(entry["target"], allowed)
        if "expr_str" in entry:
            _check_sizes(entry["expr_str"])


def archive_of(members: Mapping[str, bytes]) -> io.BytesIO:
    """An archive of these members and nothing else. reason: programs differ in how they read a crooked archive."""
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), content)
    result.seek(0)
    return result


def _check_tensor(name: str, meta: Mapping[str, Any], length: int) -> None:
    sizes = [size["as_int"] for size in meta["sizes"]]
    if not all(type(size) is int and size >= 0 for size in sizes) or math.prod(sizes) > length:
        raise Refused(f"says that {name!r} has shape {sizes}, of which it holds {length} bytes")


def _check_names(entry: Mapping[str, Any]) -> None:
    """Names of values and of arguments become Python's, in the text of a function; those of tensors strings in it."""
    names = entry.get("forward_arg_names") or []
    for name in [*names, *([entry["name"]] if entry.get("name") is not None else [])]:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise Refused(f"has {str(name)[:80]!r} in the place of a name")
    for key in _TENSOR_NAMES & entry.keys():
        if not isinstance(entry[key], str) or _NO_NAME.search(entry[key]):
            raise Refused(f"names a tensor {str(entry[key])[:80]!r}, which no model can")


def _check_operator(target: str, libraries: Collection[str]) -> None:
    match = _OPERATOR.fullmatch(target)
    if match is None:
        if target in _PYTHON or re.fullmatch(r"torch\.sym_\w+", target):
            return
        raise Refused(f"calls {target[:80]!r}, which is no operator of a saved model")
    if match[1] not in libraries or match[2] in _READ_FILES:
        raise Refused(
            f"calls {target!r}; operators of {sorted(libraries)} are allowed. If you trust it: "
            f"load(..., libraries=({match[1]!r},))"
        )


def _check_sizes(text: Any) -> None:
    """A size is an expression of numbers, symbols and functions of sizes: torch evaluates it as Python."""
    if not isinstance(text, str) or len(text) > 10_000:
        raise Refused("has a size that is no text")
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        fits = isinstance(node, _EXPRESSIONS)
        if isinstance(node, ast.Name):
            fits = node.id in _SIZES or _SYMBOL.fullmatch(node.id) is not None
        elif isinstance(node, ast.Call):
            fits = isinstance(node.func, ast.Name)
        elif isinstance(node, ast.Constant):
            fits = not isinstance(node.value, str) or _SYMBOL.fullmatch(node.value) is not None
        if not fits:
            raise Refused(f"has the size {text[:80]!r}, which is no expression of sizes")


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects inside a JSON value."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield item
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
