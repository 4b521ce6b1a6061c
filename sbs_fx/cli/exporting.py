"""The commands `export` and `bench`: a saved result as a file of another tool, and how fast it is.

In: a `model.pt2` and options as they were typed. Out: a file, or tables of times (JSON with `--json`).
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from sbs_fx.cli.options import Checkpoint, Json

Saved = Annotated[str, typer.Argument(metavar="MODEL.pt2", help="what `sbs-fx compress --out` has saved")]


def export(
    model: Saved,
    out: Annotated[
        str,
        typer.Option("--out", "-o", help="the file: .onnx, .xml (openvino), .pte (executorch), .tflite or .pt2"),
    ],
    format: Annotated[str, typer.Option(help="or openvino, aoti, executorch, litert, tensorrt, coreml, pt2")] = "onnx",
    low_bits: Annotated[bool, typer.Option("--low-bits", help="onnx: weights of 2 to 4 bits as int4")] = False,
    script: Annotated[
        bool, typer.Option("--script", help="also leave run.py and cases.npz beside it, to compare on the device")
    ] = False,
) -> None:
    """Write a saved result as a file of another tool, run it there and compare."""
    from sbs_fx.export import TARGETS, load_saved, write_script
    from sbs_fx.export import export as run
    from sbs_fx.passes.dialects import static_of

    static, inputs = load_saved(model)
    written = run(static, inputs, format, out, metadata=static_of(static).metadata, low_bits=low_bits)
    if script:
        write_script(static, inputs, format, out)
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


def bench(
    model: Saved,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="timm model to time beside it, or its part")
    ] = None,
    checkpoint: Checkpoint = None,
    backends: Annotated[str | None, typer.Option(help="by comma; default: all that are installed")] = None,
    batch_sizes: Annotated[str, typer.Option(help="by comma")] = "1,8",
    threads: Annotated[int, typer.Option(min=1)] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="samples of each")] = 15,
    layers: Annotated[bool, typer.Option(help="also show where the time goes")] = True,
    json: Json = False,
) -> None:
    """Latency of a saved result on the backends at hand, side by side, and where the time goes."""
    from sbs_fx.export import load_saved
    from sbs_fx.export.benchmark import benchmark
    from sbs_fx.models import create_model
    from sbs_fx.passes.capture.part import submodule
    from sbs_fx.passes.dialects import static_of
    from sbs_fx.plan.errors import InputError

    static, inputs = load_saved(model)
    beside = create_model(against, pretrained=False, checkpoint=checkpoint) if against else None
    if beside is not None and (part := static_of(static).metadata.get("part")):
        beside = submodule(beside, part)
    try:
        sizes = [int(size) for size in batch_sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise InputError(f"--batch-sizes {batch_sizes!r}; expected whole numbers by comma, such as 1,8")
    timings = benchmark(
        static,
        inputs,
        float_model=beside,
        backends=backends.split(",") if backends else None,
        batch_sizes=sizes,
        threads=threads,
        rounds=rounds,
        layers=layers,
    )
    if json:
        typer.echo(timings.to_json())
        return
    for table in timings.tables():
        Console().print(table)
    for batch, backend in timings.best.items():
        typer.echo(f"fastest at batch {batch}: {backend}")
    for name, reason in timings.refused.items():
        typer.echo(f"not run: {name}: {reason}")
