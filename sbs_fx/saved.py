"""What `Result.save` and `sbs-fx compress` leave in a directory, read again as one.

In: a directory, or a `model.pt2` alone. Out: `Saved`, or the graph. Holds: files of different results are told apart
and refused together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from sbs_fx.data.pictures import prepared_picture, timm_transform
from sbs_fx.export import load_pt2
from sbs_fx.export.inductor import run_aoti
from sbs_fx.export.trusted import is_native
from sbs_fx.models import PREPARATION
from sbs_fx.passes.capture.inputs import inputs_of
from sbs_fx.passes.dialects import static_of
from sbs_fx.plan import Policy
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import FileError
from sbs_fx.plan.files import read_as
from sbs_fx.report import Report

MODEL, POLICY, REPORT = "model.pt2", "policy.json", "report.json"
_HUB = "hf-hub:"


@dataclass(frozen=True)
class Saved:
    """A saved result.

    Attributes:
        model: the static graph, in eval mode. policy, report: of the same result.
        preprocess: picture (PIL) -> tensor (channels, height, width), as pictures were prepared when it was made; None
            where nobody said. classes: their names by number, where the data had names.

    >>> saved = sbs_fx.load("out")
    >>> saved.model(images).shape
    torch.Size([2, 4])
    """

    model: fx.GraphModule
    policy: Policy
    report: Report
    preprocess: Callable[[Any], Tensor] | None = None
    classes: tuple[str, ...] = ()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the model gives."""
        return self.model(*inputs, **named)


@boundary("load")
def load(path: str | os.PathLike[str], libraries: Sequence[str] = (), *, trust: bool = False) -> Any:
    """A directory that holds a saved result as `Saved`, a `model.pt2` as its graph alone.

    Args:
        path: also "hf-hub:OWNER/NAME", a repository of the Hugging Face hub that holds such a directory.
        libraries: operator libraries that the graph may call beside torch's own, such as "mine" of `torch.ops.mine`.
        trust: the file is yours; an AOTInductor package, which is native code, is then loaded, as a runner.

    Raises:
        FileError: something is missing, cut, changed, or belongs to another result; see `sbs_fx.export.load_pt2`.

    >>> saved = sbs_fx.load("out")
    >>> saved.model(images).argmax(1).shape
    torch.Size([2])
    """
    path = os.fspath(path)
    if path.startswith(_HUB):
        path = _of_hub(path.removeprefix(_HUB))
    if not os.path.isdir(path):
        return run_aoti(path) if trust and is_native(path) else load_pt2(path, libraries)
    directory = path
    model = load_pt2(os.path.join(directory, MODEL), libraries)
    policy = Policy.load(os.path.join(directory, POLICY))
    report = read_as(os.path.join(directory, REPORT), "the report of a saved result", Report.from_json)
    metadata = static_of(model).metadata
    check_one_result(directory, policy, {MODEL: metadata.get("policy"), REPORT: report.policy})
    return Saved(model, policy, report, _preprocess(model), tuple(metadata.get("classes", ())))


def _of_hub(name: str) -> str:
    """The directory that a repository's files are kept in here."""
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=[MODEL, POLICY, REPORT])
    except Exception as error:  # reason: the hub has exceptions of its own, and those of the network's libraries
        problem = " ".join(str(error).split())[:200]
        raise FileError(f"{_HUB}{name} cannot be had: {problem}; download it and give its directory") from error


def check_one_result(directory: str, policy: Policy, named: dict[str, str | None]) -> None:
    """Refuse files that say that they belong to another policy. named: file -> checksum of the policy that it names."""
    for name, checksum in named.items():
        if checksum and checksum != policy.checksum:
            raise FileError(
                f"{name} and {POLICY} in {directory!r} belong to different results: one was written over, and then "
                "something stopped; compress again, or `sbs-fx apply` the policy"
            )


def _preprocess(model: fx.GraphModule) -> Callable[[Any], Tensor] | None:
    """As the metadata says, for the size that the graph takes."""
    metadata, spec = static_of(model).metadata, inputs_of(model)
    shape = spec.tensors[0].shape if spec is not None and len(spec.tensors) == 1 else ()
    if "mean" not in metadata or "std" not in metadata or len(shape) != 4:
        return None
    channels, *sides = (size for size in shape[1:] if isinstance(size, int))
    if len(sides) != 2:
        return None
    card = {k: metadata[k] for k in PREPARATION if k in metadata}
    return prepared_picture(channels, timm_transform((sides[0], sides[1]), channels, False, **card))
