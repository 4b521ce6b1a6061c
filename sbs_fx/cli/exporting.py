"""The commands `export` and `bench`: a saved result as a file of another tool, and how fast it is.

In: a `model.pt2` and options as they were typed. Out: a file, or tables of times (JSON with `--json`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sbs_fx.cli.completion import backend_names, by_comma, format_names, model_names
from sbs_fx.cli.options import Checkpoint, Json
from sbs_fx.cli.progress import show_progress
from sbs_fx.cli.results import saved_file

if TYPE_CHECKING:
    from sbs_fx.report.targets import TargetRow

_PICTURES = 64  # that ranges of results are taken from

Saved = Annotated[
    str, typer.Argument(metavar="SAVED", help="what `sbs-fx compress` has saved: a directory or model.pt2")
]


def export(
    model: Saved,
    out: Annotated[
        str,
        typer.Option("--out", "-o", metavar="FILE", help="its suffix says the format: model.onnx, .xml, .pte, .tflite"),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            help="where the suffix is not enough: tensorrt for an .onnx, aoti for a .pt2", autocompletion=format_names
        ),
    ] = None,
    low_bits: Annotated[bool, typer.Option("--low-bits", help="onnx, litert: weights of 2 to 4 bits as int4")] = False,
    preprocess: Annotated[
        str | None,
        typer.Option(metavar="LAYOUT", help="take uint8 pictures, NHWC or NCHW: scaled, mean and std applied inside"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA", help="litert, executorch: pictures by which layers get results of 8 bits; as for compress"
        ),
    ] = None,
    script: Annotated[
        bool, typer.Option("--script", help="also leave run.py and cases.npz beside it, to compare on the device")
    ] = False,
) -> None:
    """Write a saved result as a file of another tool, run it there and compare."""
    from sbs_fx.cli.models import of_saved, open_split
    from sbs_fx.export import TARGETS, load_saved, write_script
    from sbs_fx.export import export as run
    from sbs_fx.export.preprocessing import with_preprocessing
    from sbs_fx.passes.dialects import static_of
    from sbs_fx.plan.errors import BackendError
    from sbs_fx.report.targets import TargetRow, compared

    format = format or format_of(out)
    with show_progress() as progress:
        progress("read", 0.0)
        static, inputs = load_saved(saved_file(model))
        options: dict[str, Any] = {"metadata": static_of(static).metadata, "progress": progress}
        options |= {"low_bits": low_bits, "preprocess": preprocess}
        if data is not None:
            batches = open_split(of_saved(model, static, inputs), data, None, "train", _PICTURES, 0)
            options["calibration"] = next(iter(batches))[0]
        try:
            written = run(static, inputs, format, out, **options)
        except BackendError as error:
            record(model, [TargetRow(tool=format, reason=" ".join(str(error).split()))])
            raise
        if preprocess:  # what the file was made of
            static, inputs, _ = with_preprocessing(static, inputs, preprocess, static_of(static).metadata)
        if script:
            write_script(static, inputs, format, out)
        told: dict[str, Any] = {"reason": TARGETS[format].help}
        if TARGETS[format].runs:
            progress("compare outputs", 0.9)
            examples, same, difference = compared(written, static, inputs)
            told = {"examples": examples, "same": same, "difference": difference}
        kernels = {} if written.kernels is None else {"kernels": written.kernels.summary}
        told |= {"file": os.path.basename(out), "stored": sum(map(_size, written.files)), **kernels}
        record(model, [TargetRow(tool=written.name, **told)])
    exactly = "bit for bit" if static_of(static).exact else "up to rounding ties"
    part = static_of(static).metadata.get("part")
    of_part = "" if part is None else f"the part {part!r} of the model, "
    if TARGETS[format].runs:
        typer.echo(f"{out}: {of_part}computes what torch computes, {exactly}")
    else:
        typer.echo(f"{out}: {of_part}written, not run: {TARGETS[format].help}")
    if written.lost:
        typer.echo(f"not kept, by tensor: {'; '.join(written.lost)}")
    if written.kernels is not None and not TARGETS[format].runs:
        typer.echo(f"{written.name}: {written.kernels.summary} layers are held as int8 codes and read int8 codes")
    elif written.kernels is not None:
        typer.echo(f"{written.name}: {written.kernels}")


def _size(path: str) -> int:
    """Bytes of a file, or of all files of a folder."""
    if os.path.isdir(path):
        return sum(os.path.getsize(os.path.join(at, each)) for at, _, names in os.walk(path) for each in names)
    return os.path.getsize(path)


def record(model: str, rows: Sequence[TargetRow]) -> None:
    """Keep what was found beside the result that it is of, and show it on its page; nothing where there is none."""
    from sbs_fx.plan.files import read_as
    from sbs_fx.report import Report
    from sbs_fx.report.targets import record_targets
    from sbs_fx.saved import REPORT

    directory = os.path.dirname(os.path.abspath(saved_file(model)))
    report = os.path.join(directory, REPORT)
    if not os.path.exists(report):
        return
    record_targets(directory, rows)
    page = os.path.join(directory, "report.html")
    read_as(report, "the report of a saved result", Report.from_json).save(page)


def format_of(path: str) -> str:
    """The format whose files end like this; of several the one whose name is the suffix. Raises BadParameter."""
    from sbs_fx.export.registry import TARGETS

    targets = TARGETS.entries()
    fitting = [name for name, target in targets.items() if path.endswith(target.suffix)]
    chosen = [name for name in fitting if targets[name].suffix == f".{name}"] or fitting
    if len(chosen) == 1:
        return chosen[0]
    known = ", ".join(f"{target.suffix} ({name})" for name, target in targets.items())
    what = f"may be {' or '.join(chosen)}; say which with --format" if chosen else f"ends in no suffix of {known}"
    raise typer.BadParameter(f"--out {path}: {what}")


def bench(
    model: Saved,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="timm model to time beside it, or its part", autocompletion=model_names),
    ] = None,
    checkpoint: Checkpoint = None,
    backends: Annotated[
        str | None,
        typer.Option(help="by comma; default: all that are installed", autocompletion=by_comma(backend_names)),
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="by comma")] = "1,8",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="samples of each")] = 15,
    layers: Annotated[bool, typer.Option(help="also show where the time goes")] = True,
    json: Json = False,
) -> None:
    """Latency of a saved result on the backends at hand, side by side, and where the time goes."""
    from sbs_fx.export import BACKENDS, load_saved
    from sbs_fx.export.benchmark import benchmark
    from sbs_fx.models import create_model
    from sbs_fx.passes.capture.part import submodule
    from sbs_fx.passes.dialects import static_of
    from sbs_fx.plan.errors import InputError
    from sbs_fx.report.targets import TargetRow

    static, inputs = load_saved(saved_file(model))
    beside = create_model(against, pretrained=False, checkpoint=checkpoint) if against else None
    if beside is not None and (part := static_of(static).metadata.get("part")):
        beside = submodule(beside, part)
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch-sizes {batch_sizes!r}; expected whole numbers by comma, such as 1,8")
    with show_progress() as progress:
        timings = benchmark(
            static,
            inputs,
            float_model=beside,
            backends=backends.split(",") if backends else None,
            batch_sizes=sizes,
            threads=threads,
            rounds=rounds,
            layers=layers,
            progress=progress,
        )
    rows = [TargetRow(tool=name, reason=why) for name, why in timings.refused.items() if name in BACKENDS.entries()]
    for name in dict.fromkeys(timing.backend for timing in timings.timings):
        own = [timing for timing in timings.timings if timing.backend == name]
        spent = {str(timing.batch): 1e3 * timing.seconds for timing in own}
        kernels = {"kernels": own[0].kernels} if own[0].kernels else {}
        rows.append(TargetRow(tool=name, milliseconds=spent, **kernels))
    record(model, rows)
    if json:
        typer.echo(timings.to_json())
        return
    for table in timings.tables():
        Console().print(table)
    for batch, backend in timings.best.items():
        typer.echo(f"fastest at batch {batch}: {backend}")
    for name, reason in timings.refused.items():
        typer.echo(f"not run: {name}: {reason}")
