"""The commands `compare` and `sweep`: several methods on one model, at one budget or at several.

In: options as they were typed. Out: a table, or with `--json` the points; with `--out` also a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from sbs_fx.cli.completion import by_comma, method_names
from sbs_fx.cli.options import (
    BatchSize,
    Checkpoint,
    DataDir,
    Epochs,
    InChans,
    InputSize,
    Json,
    Model,
    NumClasses,
    Overrides,
    PartPath,
    RandomWeights,
    Rate,
    Seed,
    Workers,
    make_config,
)
from sbs_fx.cli.progress import show_progress, show_steps

LabelledData = Annotated[str, typer.Option(help="'digits', a folder, or a timm data set such as torch/cifar100")]
Methods = Annotated[str, typer.Option(help="names as of compress, by comma", autocompletion=by_comma(method_names))]
Out = Annotated[
    str | None,
    typer.Option("--out", "-o", metavar="DIR", help="where points go; the same command again goes on from there"),
]


def compare(
    model: Model,
    data: LabelledData,
    budget: Annotated[
        str, typer.Option(help="5% of the float BOPs, 20x, params=50%, bops=5%,size=20%, 300M, 2MB, 5ms")
    ] = "5%",
    methods: Methods = "uniform,sbs",
    part: PartPath = None,
    epochs: Epochs = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    lr: Rate = None,
    seed: Seed = 0,
    settings: Overrides = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Several methods on one model at one budget: accuracy, costs and time, in one table."""
    model_options = (model, checkpoint, random_weights, input_size, num_classes, in_chans)
    data_options = (data, data_dir, batch_size, seed, False, workers)
    _compare(model_options, data_options, [budget], methods, part, epochs, lr, settings or [], out, json)


def sweep(
    model: Model,
    data: LabelledData,
    budgets: Annotated[
        str, typer.Option(help="by comma: shares of float BOPs, 300M, 2MB, 5ms")
    ] = "10%,5%,3%,2%,1.5%,1%",
    methods: Methods = "uniform,sbs",
    part: PartPath = None,
    epochs: Epochs = 0,
    data_dir: DataDir = None,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    lr: Rate = None,
    seed: Seed = 0,
    settings: Overrides = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """The same at several budgets, with the Pareto front of accuracy over bit operations."""
    model_options = (model, checkpoint, random_weights, input_size, num_classes, in_chans)
    data_options = (data, data_dir, batch_size, seed, False, workers)
    _compare(model_options, data_options, budgets.split(","), methods, part, epochs, lr, settings or [], out, json)


def _compare(
    model: tuple[str, str | None, bool, str | None, int | None, int | None],
    data: tuple[str, str | None, int, int, bool, int],
    budgets: Sequence[str],
    methods: str,
    part: str | None,
    epochs: int,
    lr: float | None,
    settings: list[str],
    out: str | None,
    json: bool,
) -> None:
    from sbs_fx.cli.models import both_splits, make_model
    from sbs_fx.comparing import compare as run

    config = make_config(learning_rate=lr, seed=data[3], overrides=settings)
    made = make_model(*model)
    train, test = both_splits(made, *data)
    assert train is not None
    with show_progress() as progress, show_steps(None, False) as observer:
        comparison = run(
            made.module,
            train,
            list(budgets),
            methods=[name.strip() for name in methods.split(",")],
            example_inputs=made.example_inputs,
            part=part,
            validation=test,
            epochs=epochs,
            config=config,
            output_dir=out,
            progress=progress,
            observer=observer,
        )
    typer.echo(comparison.model_dump_json(indent=1) if json else str(comparison))
    if out is not None and not json:
        typer.echo(f"report.html, comparison.txt, comparison.json and the points are in {out}")
