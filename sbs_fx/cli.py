"""The command line: `sbs-fx inspect | compress | apply | evaluate | report`.

In: a timm model name (and maybe weights), a budget or a policy, maybe data. Out: text or, with `--json`, JSON on stdout;
progress and errors on stderr. Holds: an error of ours is one line and exit code 2, nothing half-written is left; importing
this module is light, each command imports what it needs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from torch import Tensor, nn

    from sbs_fx.compress import Config, Result
    from sbs_fx.data import Batches
    from sbs_fx.report import Report

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__.split("\n")[0])
_errors = Console(stderr=True)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="timm model name")]
Checkpoint = Annotated[str | None, typer.Option(help="local file of weights")]
Pretrained = Annotated[bool, typer.Option(help="download the weights that timm names")]
InputSize = Annotated[str | None, typer.Option(metavar="C,H,W", help="default: the model's own")]
NumClasses = Annotated[int | None, typer.Option(help="default: the model's own")]
InChans = Annotated[int | None, typer.Option(help="input channels; default: the model's own")]
Data = Annotated[str | None, typer.Option(help="'digits', a folder, or a timm data set such as torch/cifar100")]
DataDir = Annotated[str | None, typer.Option(help="where data sets are kept")]
BatchSize = Annotated[int, typer.Option(min=1)]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Epochs = Annotated[int, typer.Option(help="epochs of fine-tuning with the gates fixed")]
Rate = Annotated[float | None, typer.Option(help="learning rate of fine-tuning")]
Ranges = Annotated[str, typer.Option(help="how ranges are chosen: mse, percentile or minmax")]
Seed = Annotated[int, typer.Option(help="of everything random")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; always ends in SystemExit: 0, 2 for an error of ours or a wrong option, 130 when interrupted."""
    from sbs_fx.errors import SbsError

    try:
        app(list(arguments) if arguments is not None else None)
    except SbsError as error:
        message = " ".join(str(error).split())
        _errors.print(f"error: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        _errors.print("interrupted")
        raise SystemExit(130) from None


@app.command()
def inspect(
    model: Model, checkpoint: Checkpoint = None, pretrained: Pretrained = False, input_size: InputSize = None,
    num_classes: NumClasses = None, in_chans: InChans = None, json: Json = False,
) -> None:
    """Layers, channel groups, pins with their causes, and costs of a float model."""
    from sbs_fx.passes import channel_groups, cost_model, trace
    from sbs_fx.report import Report

    made = _make(model, checkpoint, pretrained, input_size, num_classes, in_chans)
    with _progress() as progress:
        progress("trace", 0.0)
        graph = trace(made.module, made.example_inputs)
        progress("channel groups", 0.8)
        groups = channel_groups(graph)
        cost = cost_model(graph, groups)
        report = Report.of(groups, cost, None, cost.reference)
    typer.echo(report.to_json() if json else str(report), nl=json)


@app.command()
def compress(
    model: Model,
    budget: Annotated[str, typer.Option(help="share of the float model: 5%, or bops=5%,size=20%")] = "5%",
    data: Data = None, data_dir: DataDir = None, batch_size: BatchSize = 64,
    method: Annotated[str, typer.Option(help="auto or uniform")] = "auto",
    weight_bits: Annotated[int | None, typer.Option(help="2, 4 or 8; default: the method chooses")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="2, 4 or 8; default: the method chooses")] = None,
    epochs: Epochs = 0, lr: Rate = None, ranges: Ranges = "mse",
    importance: Annotated[str, typer.Option(help="norm that ranks channels: l1 or l2")] = "l2",
    round_to: Annotated[int | None, typer.Option(help="keep multiples of this many channels; 1: any number")] = None,
    minor_groups: Annotated[bool, typer.Option(help="also prune heads and group widths")] = False,
    seed: Seed = 0, checkpoint: Checkpoint = None, pretrained: Pretrained = False, input_size: InputSize = None,
    num_classes: NumClasses = None, in_chans: InChans = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="where policy, model and report go")] = None,
    json: Json = False,
) -> None:
    """Prune and quantise a model under a budget."""
    from sbs_fx.compress import compress as run
    from sbs_fx.policy import Budget

    limits = Budget.parse(budget)
    config = _config(
        weight_bits=weight_bits, activation_bits=activation_bits, importance=importance, round_to=round_to,
        minor_groups=minor_groups, ranges=ranges, epochs=epochs, learning_rate=lr, seed=seed,
    )
    _check_output(out)
    made = _make(model, checkpoint, pretrained, input_size, num_classes, in_chans)
    train, test = _both_splits(made, data, data_dir, batch_size, seed)
    with _progress() as progress:
        result = run(made.module, made.example_inputs, budget=limits, data=train, method=method, config=config,
                     progress=progress)
        report = _measured(made.module, result, test, progress)
    _finish(result, report, out, json)


@app.command()
def apply(
    model: Model, policy: Annotated[str, typer.Argument(metavar="POLICY", help="policy.json of an earlier run")],
    data: Data = None, data_dir: DataDir = None, batch_size: BatchSize = 64, epochs: Epochs = 0, lr: Rate = None,
    ranges: Ranges = "mse", seed: Seed = 0, checkpoint: Checkpoint = None, pretrained: Pretrained = False,
    input_size: InputSize = None, num_classes: NumClasses = None, in_chans: InChans = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="where policy, model and report go")] = None,
    json: Json = False,
) -> None:
    """Apply a saved policy to the float model again."""
    from sbs_fx.compress import apply as run
    from sbs_fx.policy import Policy

    plan = Policy.load(policy)
    config = _config(ranges=ranges, epochs=epochs, learning_rate=lr, seed=seed)
    _check_output(out)
    made = _make(model, checkpoint, pretrained, input_size, num_classes, in_chans)
    train, test = _both_splits(made, data, data_dir, batch_size, seed)
    with _progress() as progress:
        result = run(made.module, plan, made.example_inputs, data=train, config=config, progress=progress)
        report = _measured(made.module, result, test, progress)
    _finish(result, report, out, json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="timm model name, or a model.pt2")],
    data: Annotated[str, typer.Option(help="'digits', a folder, or a timm data set such as torch/cifar100")],
    data_dir: DataDir = None, batch_size: BatchSize = 64, checkpoint: Checkpoint = None, pretrained: Pretrained = False,
    input_size: InputSize = None, num_classes: NumClasses = None, in_chans: InChans = None, json: Json = False,
) -> None:
    """Top-1 accuracy of a model or of a saved result on the held-out part of the data."""
    from sbs_fx.training import evaluate as run

    if model.endswith(".pt2"):
        made = _load(model)
    else:
        made = _make(model, checkpoint, pretrained, input_size, num_classes, in_chans)
    accuracy = run(made.module, _open(made, data, data_dir, "test", batch_size, 0))
    typer.echo(f'{{"model": "{model}", "accuracy": {accuracy}}}' if json else f"{model}: {accuracy:.2f} % top-1")


@app.command()
def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the --out of an earlier run")], json: Json = False
) -> None:
    """Show the report of an earlier run."""
    from sbs_fx.errors import FileError
    from sbs_fx.report import Report

    path = os.path.join(directory, "report.json")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"cannot read {path!r}: {error}; expected the --out directory of `sbs-fx compress`") from error
    found = Report.from_json(text)
    typer.echo(found.to_json() if json else str(found), nl=json)


# -- models and data -------------------------------------------------------------------------------------------------------


class _Made(NamedTuple):
    """A model, what it takes, and how images are normalised for it."""

    module: nn.Module
    example_inputs: Tensor
    normalisation: dict[str, Any]


def _make(name: str, checkpoint: str | None, pretrained: bool, input_size: str | None, num_classes: int | None,
          in_chans: int | None) -> _Made:
    """A timm model and example inputs of the size that it is to run at."""
    import torch

    from sbs_fx.errors import FileError, InputError
    from sbs_fx.models import create_model, input_config

    options = {k: v for k, v in (("num_classes", num_classes), ("in_chans", in_chans)) if v is not None}
    size = _parse_size(input_size)
    if size is not None:
        options["in_chans"] = size[0]
        if in_chans not in (None, size[0]):
            raise InputError(f"--in-chans {in_chans} and --input-size {input_size} disagree; give one of them")
    if checkpoint is not None and not os.path.isfile(checkpoint):
        raise FileError(f"there is no checkpoint {checkpoint!r}; expected a file of weights")

    def create(**more: Any) -> nn.Module:
        try:
            return create_model(name, pretrained=pretrained, checkpoint=checkpoint, **options, **more)
        except RuntimeError as error:
            if checkpoint is None:
                raise
            raise InputError(f"the weights in {checkpoint!r} do not fit {name!r}: {str(error).splitlines()[0]}; check "
                             "--num-classes, --in-chans and the model's name") from error

    if size is None:
        module = create()
    else:
        try:
            module = create(img_size=size[1:])  # reason: tables of positions have the size of the image
        except TypeError:
            module = create()
    known = input_config(module)
    if size is None:
        if "input_size" not in known:
            raise InputError(f"{name!r} does not say which images it takes; give --input-size C,H,W")
        size = (in_chans or known["input_size"][0], *known["input_size"][1:])
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    return _Made(module, images, {k: known[k] for k in ("mean", "std") if k in known})


def _parse_size(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        channels, height, width = (int(part) for part in text.split(","))
    except ValueError:
        channels = height = width = 0
    if min(channels, height, width) < 1:
        raise typer.BadParameter(f"{text!r}; expected channels, height and width, such as 3,224,224",
                                 param_hint="--input-size")
    return channels, height, width


def _load(path: str) -> _Made:
    """A saved result; its file says which images it takes."""
    import torch

    from sbs_fx.export import load_pt2

    module = load_pt2(path)
    shape = next(iter(module.graph.find_nodes(op="placeholder"))).meta["val"].shape
    known = module.meta.get("metadata", {})
    return _Made(module, torch.zeros(2, *(int(n) for n in shape[1:])), {k: known[k] for k in ("mean", "std") if k in known})


def _open(made: _Made, spec: str, data_dir: str | None, split: str, batch_size: int, seed: int) -> Batches:
    from sbs_fx.data import open_data

    channels, height, width = made.example_inputs.shape[1:]
    return open_data(spec, split=split, batch_size=batch_size, image_size=(height, width), channels=channels,
                     shuffle=split == "train", seed=seed, data_dir=data_dir, **made.normalisation)


def _both_splits(made: _Made, spec: str | None, data_dir: str | None, batch_size: int,
                 seed: int) -> tuple[Batches | None, Batches | None]:
    """Training data to calibrate and fine-tune on, held-out data to measure accuracy on."""
    if spec is None:
        return None, None
    return (_open(made, spec, data_dir, "train", batch_size, seed), _open(made, spec, data_dir, "test", batch_size, seed))


# -- settings and results --------------------------------------------------------------------------------------------------


def _config(**settings: Any) -> Config:
    """Settings of the options that were given; the others keep their defaults."""
    from pydantic import ValidationError

    from sbs_fx.compress import Config

    try:
        return Config(**{name: value for name, value in settings.items() if value is not None})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc'])).replace('_', '-')} {p['input']!r}: {p['msg']}" for p in error.errors())
        raise typer.BadParameter("; ".join(problems)) from None


def _check_output(directory: str | None) -> None:
    """An output directory that cannot be written is known before anything is computed."""
    if directory is not None:
        from sbs_fx.compress import prepare_directory

        prepare_directory(directory)


def _measured(module: nn.Module, result: Result, test: Batches | None, progress: Callable[[str, float], None]) -> Report:
    if test is None:
        return result.report
    from sbs_fx.training import evaluate

    progress("evaluate", 0.95)
    return result.report.with_accuracy(evaluate(module, test), evaluate(result.model, test))


def _finish(result: Result, report: Report, directory: str | None, json: bool) -> None:
    """Save, and print the closing table."""
    if directory is not None:
        result.report = report
        result.save(directory)
        report.save(os.path.join(directory, "report.json"))
    if json:
        typer.echo(report.to_json())
        return
    Console().print(closing_table(report))
    if directory is not None:
        typer.echo(f"policy.json, model.pt2 and the report are in {directory}")


def closing_table(report: Report) -> Table:
    """Before, after and ratio of each measure, for a terminal."""
    from sbs_fx.report.text import amount, ratio

    table = Table()
    table.add_column("")
    for name in ("before", "after", "ratio"):
        table.add_column(name, justify="right")
    for name, before, after in report.totals():
        table.add_row(name, amount(before), "" if after is None else amount(after), ratio(name, before, after))
    return table


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A function of (stage, share done): a bar on a terminal, one line a stage elsewhere; on stderr, so that what is
    printed can be piped."""
    if not sys.stderr.isatty():
        yield lambda stage, share: typer.echo(f"{stage} ...", err=True) if stage != "done" else None
        return
    bar = Progress(TextColumn("{task.description:16s}"), BarColumn(), TextColumn("{task.percentage:3.0f} %"),
                   TimeElapsedColumn(), console=_errors, transient=True)
    with bar:
        task = bar.add_task("", total=1.0)
        yield lambda stage, share: bar.update(task, description=stage, completed=share)


if __name__ == "__main__":
    main()
