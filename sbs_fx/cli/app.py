"""The command line, `sbs-fx`: inspect, compress, replan, apply, compare, sweep, evaluate, export, bench, report.

In: a timm model name (and maybe weights), a budget or a policy, maybe data. Out: text or, with `--json`, JSON on
stdout; progress and errors on stderr. Holds: an error of ours is one line and exit code 2, with nothing half-written
left; importing this module is light, each command imports what it needs.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from json import dumps
from typing import Annotated, Any

import typer
from rich.console import Console

from sbs_fx.cli.comparing import compare, sweep
from sbs_fx.cli.completion import model_names
from sbs_fx.cli.dialogue import init
from sbs_fx.cli.exporting import bench, export
from sbs_fx.cli.options import (
    ActivationBits,
    BatchSize,
    Candidates,
    Checkpoint,
    Compiled,
    Data,
    DataDir,
    Device,
    DryRun,
    Epochs,
    Importance,
    InChans,
    InputSize,
    Json,
    Keep,
    Limits,
    MaxDrop,
    MethodName,
    MinorGroups,
    Model,
    NoPrune,
    NumClasses,
    Only,
    OutDir,
    Overrides,
    PartPath,
    Precision,
    RandomWeights,
    Ranges,
    Rate,
    Restart,
    RoundTo,
    SearchEpochs,
    Seed,
    SkipUnreadable,
    TargetName,
    TrackerName,
    WeightBits,
    Workers,
    constraints_of,
    make_config,
    parse_share,
)
from sbs_fx.cli.planning import dry_run, replan, save_run
from sbs_fx.cli.progress import VERBOSE, errors, say, show_progress, show_steps, verbosity, with_verbosity
from sbs_fx.cli.reporting import report as show_report
from sbs_fx.cli.results import check_output, finish, measured, saved_file
from sbs_fx.cli.running import circumstances, default_directory, rerun, typed
from sbs_fx.cli.settings import ListSettings, OptionsFile

app = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune and quantise vision models together, under a budget that is met.",
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from importlib.metadata import version as of

        typer.echo(f"sbs-fx {of('sbs_fx')}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; always ends in SystemExit: 0, 2 for an error of ours or a wrong option, 130 when interrupted."""
    before = verbosity.set(verbosity.get())
    try:
        given = sys.argv[1:] if arguments is None else list(arguments)
        app(given, obj=given)
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        from sbs_fx.plan.boundary import translated
        from sbs_fx.plan.errors import Interrupted, SbsError

        if isinstance(error, Interrupted):
            errors.print(str(error), highlight=False, markup=False, soft_wrap=True)
            raise SystemExit(130) from None
        if verbosity.get() == VERBOSE:
            errors.print_exception()
        if not isinstance(error, SbsError):
            error = translated(error, "the command")
        message = " ".join(str(error).split())
        if parts := getattr(error, "parts", ()):
            message += f"; here: --part {parts[0]}"
        errors.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    finally:
        verbosity.reset(before)


def inspect(
    model: Model,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    json: Json = False,
) -> None:
    """Layers, channel groups, pins with their causes, and costs of a float model."""
    from sbs_fx.cli.models import make_model
    from sbs_fx.passes import channel_groups, cost_model, trace
    from sbs_fx.report import Report

    # reason: what is shown depends on no weight, so that none need be fetched
    made = make_model(model, checkpoint, random_weights or checkpoint is None, input_size, num_classes, in_chans)
    with show_progress() as progress:
        progress("trace", 0.0)
        graph = trace(made.module, made.example_inputs)
        progress("channel groups", 0.8)
        groups = channel_groups(graph)
        cost = cost_model(graph, groups)
        report = Report.of(groups, cost, None, cost.reference)
    typer.echo(report.to_json() if json else str(report), nl=json)


def methods() -> None:
    """The methods of `compress`: what each does and needs."""
    from rich.table import Table

    from sbs_fx.search.registry import methods as registered

    table = Table("method", "what it does", "needs", "auto")
    for entry in registered().values():
        needs = f"{entry.needs}{', training' if entry.trains else ''}"
        table.add_row(entry.name, entry.help, needs, entry.automatic or "")
    Console().print(table)


def compress(
    context: typer.Context,
    model: Model,
    budget: Limits = None,
    max_drop: MaxDrop = None,
    data: Data = None,
    data_dir: DataDir = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "cpu",
    part: PartPath = None,
    method: MethodName = "auto",
    keep: Keep = None,
    no_prune: NoPrune = None,
    only: Only = None,
    search_epochs: SearchEpochs = None,
    precision: Precision = None,
    compiled: Compiled = False,
    tracker: TrackerName = None,
    restart: Restart = False,
    settings: Overrides = None,
    candidates: Candidates = None,
    weight_bits: WeightBits = None,
    activation_bits: ActivationBits = None,
    epochs: Epochs = 0,
    lr: Rate = None,
    ranges: Ranges = "mse",
    importance: Importance = "l2",
    round_to: RoundTo = None,
    minor_groups: MinorGroups = False,
    target: TargetName = None,
    seed: Seed = 0,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    out: OutDir = None,
    dry: DryRun = False,
    options_file: OptionsFile = None,
    list_settings: ListSettings = False,
    json: Json = False,
) -> None:
    """Prune and quantise a model under a budget.

    sbs-fx compress MODEL --budget 5%

    sbs-fx compress MODEL --checkpoint mine.pth --num-classes 3 --data pictures/ --budget 20x -o small
    """
    from sbs_fx.cli.models import both_splits, make_model
    from sbs_fx.compression import compress as run
    from sbs_fx.plan import Budget
    from sbs_fx.search.registry import METHODS

    limits = None if budget is None else Budget.parse(budget)
    if method != "auto":
        METHODS[method]  # reason: a name that is none is told before weights are fetched
    config = make_config(
        **constraints_of(keep, no_prune, only),
        candidates=None if candidates is None else candidates.split(","),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        importance=importance,
        round_to=round_to,
        minor_groups=minor_groups,
        target=target,
        ranges=ranges,
        epochs=epochs,
        learning_rate=lr,
        seed=seed,
        overrides=[
            *([f"search.epochs={search_epochs}"] if search_epochs is not None else []),
            *([f"training.precision={precision}"] if precision is not None else []),
            *(["training.compiled=true"] if compiled else []),
            *(settings or []),
        ],
    )
    out = out or default_directory(model, budget, typed(context))
    if not dry:
        check_output(out)
    told_to = None
    if tracker is not None:
        from sbs_fx.report.trackers import Tracker

        told_to = Tracker(tracker, os.path.basename(os.path.abspath(out)), out, config.model_dump(mode="json"))
    made = make_model(model, checkpoint, random_weights, input_size, num_classes, in_chans, device)
    say(f"weights: {made.weights}")
    train, test = both_splits(made, data, data_dir, batch_size, seed, skip_unreadable, workers)
    made = made._replace(classes=tuple(getattr(train, "classes", ())))
    if dry:
        dry_run(made, limits or Budget.parse("5%"), method, config, has_data=train is not None)
        return
    options: dict[str, Any] = {"checkpoint": checkpoint and os.path.abspath(checkpoint)}
    options |= {"random_weights": random_weights, "weights": made.weights}
    options |= {"input_size": input_size, "num_classes": num_classes, "in_chans": in_chans, "part": part}
    options |= {"model": model, "budget": budget, "seed": seed, "settings": config.model_dump(mode="json")}
    options |= circumstances(typed(context), train, test)
    save_run(out, method=method, **options)  # reason: the directory is this command's, also if it is stopped
    with show_progress() as progress, show_steps(out, restart, told_to) as observer:
        result = run(
            made.module,
            made.example_inputs,
            part=part,
            budget=limits,
            max_drop=None if max_drop is None else parse_share(max_drop),
            data=train,
            method=method,
            config=config,
            output_dir=out,
            validation=test if part is None else None,
            restart=restart,
            progress=progress,
            observer=observer,
        )
        report = measured(made.module, result, test, progress, part)
    # reason: before the report, whose page tells of it
    save_run(out, method=result.policy.method, seconds=result.seconds, **options)
    told = {"model": model, "weights": made.weights, "command": shlex.join(["sbs-fx", *typed(context)])}
    told["data"] = "" if data is None else f"{data}, {options['data']['train']} pictures to calibrate or train on"
    finish(made, result, report.model_copy(update=told), out, json)


def apply(
    model: Model,
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="of an earlier run: its directory or policy.json")],
    budget: Annotated[
        str | None, typer.Option(help="what the policy must keep, such as 5% or 2MB; default: anything")
    ] = None,
    data: Data = None,
    data_dir: DataDir = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "cpu",
    epochs: Epochs = 0,
    lr: Rate = None,
    ranges: Ranges = "mse",
    seed: Seed = 0,
    settings: Overrides = None,
    part: PartPath = None,
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    out: OutDir = None,
    json: Json = False,
) -> None:
    """Apply a saved policy to the float model again."""
    from sbs_fx.cli.models import both_splits, make_model
    from sbs_fx.compression import apply as run
    from sbs_fx.plan import Policy

    plan = Policy.load(saved_file(policy, "policy.json"))
    config = make_config(ranges=ranges, epochs=epochs, learning_rate=lr, seed=seed, overrides=settings or [])
    check_output(out)
    made = make_model(model, checkpoint, random_weights, input_size, num_classes, in_chans, device)
    train, test = both_splits(made, data, data_dir, batch_size, seed, skip_unreadable, workers)
    made = made._replace(classes=tuple(getattr(train, "classes", ())))
    with show_progress() as progress, show_steps(None, False) as observer:
        result = run(
            made.module,
            plan,
            made.example_inputs,
            part=part,
            budget=budget,
            data=train,
            config=config,
            validation=test if part is None else None,
            progress=progress,
            observer=observer,
        )
        report = measured(made.module, result, test, progress, part)
    finish(made, result, report, out, json)


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm model name, or what compress has saved: a directory or model.pt2",
            autocompletion=model_names,
        ),
    ],
    data: Annotated[str, typer.Option(help="'digits', a folder, or a timm data set such as torch/cifar100")],
    data_dir: DataDir = None,
    skip_unreadable: SkipUnreadable = False,
    batch_size: BatchSize = 64,
    workers: Workers = 0,
    device: Device = "cpu",
    checkpoint: Checkpoint = None,
    random_weights: RandomWeights = False,
    input_size: InputSize = None,
    num_classes: NumClasses = None,
    in_chans: InChans = None,
    with_part: Annotated[
        str | None, typer.Option(metavar="DIR", help="a saved part, put in its place in the model")
    ] = None,
    json: Json = False,
) -> None:
    """Top-1 accuracy of a model or of a saved result on data that were held out."""
    from sbs_fx.cli.models import load_saved, make_model, open_split, with_saved_part
    from sbs_fx.training import evaluate as run

    model, with_part = saved_file(model), with_part and saved_file(with_part)
    if device != "cpu" and (model.endswith(".pt2") or with_part is not None):
        raise typer.BadParameter(f"--device {device}: a saved result runs on the CPU")
    if model.endswith(".pt2"):
        made = load_saved(model)
    else:
        made = make_model(model, checkpoint, random_weights, input_size, num_classes, in_chans, device)
        made = made if with_part is None else with_saved_part(made, with_part)
    accuracy = run(made.module, open_split(made, data, data_dir, "test", batch_size, 0, skip_unreadable, workers))
    typer.echo(dumps({"model": model, "accuracy": accuracy}) if json else f"{model}: {accuracy:.2f} % top-1")


# in the order in which they are used
for command in (
    init, inspect, methods, compress, show_report, evaluate, export, bench, replan, apply, rerun, compare, sweep,
):  # fmt: skip
    app.command()(with_verbosity(command))

if __name__ == "__main__":
    main()
