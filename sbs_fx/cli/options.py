"""Options that several commands share, so that they are called and explained alike; and what `--set` makes of them.

In: options as they were typed. Out: annotated types for typer, and a `Config`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbs_fx.cli.completion import format_names, method_names, model_names, one_of, setting_names
from sbs_fx.cli.settings import nested

if TYPE_CHECKING:
    from sbs_fx.config import Config

# groups of options in help
MODEL, DATA, TRAINING, DECISIONS, OUTPUT = "Model", "Data", "Training", "What may be decided", "Output"

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm name, torchvision/NAME, hf/DIR, package.module:function, FILE.pt2",
        autocompletion=model_names,
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option(metavar="FILE", help="weights; default: the published ones", rich_help_panel=MODEL)
]
RandomWeights = Annotated[
    bool,
    typer.Option(
        "--random-weights", help="not the published weights: to try things out, no use else", rich_help_panel=MODEL
    ),
]
InputSize = Annotated[str | None, typer.Option(metavar="C,H,W", help="default: the model's own", rich_help_panel=MODEL)]
NumClasses = Annotated[int | None, typer.Option(help="default: the model's own", rich_help_panel=MODEL)]
InChans = Annotated[int | None, typer.Option(help="input channels; default: the model's own", rich_help_panel=MODEL)]
PartPath = Annotated[
    str | None,
    typer.Option(metavar="PATH", help="sub-module in place of the whole, such as 'layer3'", rich_help_panel=MODEL),
]
Data = Annotated[
    str | None, typer.Option(help="'digits', a folder, or a timm data set such as torch/cifar100", rich_help_panel=DATA)
]
DataDir = Annotated[str | None, typer.Option(help="where data sets are kept", rich_help_panel=DATA)]
SkipUnreadable = Annotated[
    bool,
    typer.Option(
        "--skip-unreadable", help="leave out files that are no pictures, and say how many", rich_help_panel=DATA
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, rich_help_panel=DATA)]
Workers = Annotated[int, typer.Option(min=0, help="processes that read pictures", rich_help_panel=DATA)]
Device = Annotated[
    str, typer.Option(help="cpu, or cuda: of several processes, each takes its own GPU", rich_help_panel=MODEL)
]
Json = Annotated[bool, typer.Option("--json", help="print JSON", rich_help_panel=OUTPUT)]
Epochs = Annotated[int, typer.Option(help="epochs of fine-tuning with the gates fixed", rich_help_panel=TRAINING)]
Rate = Annotated[float | None, typer.Option(help="learning rate of fine-tuning", rich_help_panel=TRAINING)]
Ranges = Annotated[
    str,
    typer.Option(
        help="how ranges are chosen: mse, percentile or minmax",
        autocompletion=one_of("mse", "percentile", "minmax"),
        rich_help_panel=DECISIONS,
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="ranges, joins and bits that the tool of this format computes, such as tensorrt",
        autocompletion=format_names,
        rich_help_panel=DECISIONS,
    ),
]
Seed = Annotated[int, typer.Option(help="of everything random")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="any other setting, such as training.ema=0.999 or search.lam=0.1",
        autocompletion=setting_names,
    ),
]

Keep = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=BITS",
        help="bits of layers by name, such as 'head.*=32' (float) or 'stem=8/4'",
        rich_help_panel=DECISIONS,
    ),
]
NoPrune = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="layers by name that keep all channels, such as 'layer1'", rich_help_panel=DECISIONS
    ),
]
OutDir = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="where policy, model and report go; default: out/MODEL-BUDGET",
        rich_help_panel=OUTPUT,
    ),
]
Only = Annotated[
    str | None,
    typer.Option(
        metavar="prune|quantise",
        help="do one of the two alone",
        autocompletion=one_of("prune", "quantise"),
        rich_help_panel=DECISIONS,
    ),
]

Limits = Annotated[
    str | None,
    typer.Option(help="5% of the float BOPs (the default), 20x, params=50%, bops=5%,size=20%, 300M, 2MB, 5ms"),
]
MaxDrop = Annotated[
    str | None, typer.Option(metavar="SHARE", help="the smallest that loses no more of the metric, such as 1%")
]
MethodName = Annotated[
    str, typer.Option(help="auto, or a name that `sbs-fx methods` lists", autocompletion=method_names)
]
SearchEpochs = Annotated[int | None, typer.Option(help="epochs of a search that trains", rich_help_panel=TRAINING)]
Precision = Annotated[
    str | None, typer.Option(help="fp32 or bf16", autocompletion=one_of("fp32", "bf16"), rich_help_panel=TRAINING)
]
Compiled = Annotated[bool, typer.Option("--compiled", help="train through torch.compile", rich_help_panel=TRAINING)]
TrackerName = Annotated[
    str | None,
    typer.Option(
        "--tracker",
        metavar="NAME",
        help="also keep steps of training in tensorboard, wandb or another tracker of accelerate",
        rich_help_panel=TRAINING,
    ),
]
Restart = Annotated[bool, typer.Option("--restart", help="forget the checkpoints in --out", rich_help_panel=OUTPUT)]
Candidates = Annotated[
    str | None, typer.Option(help="bitwidths by comma; default: the method's; 32: float", rich_help_panel=DECISIONS)
]
WeightBits = Annotated[
    int | None, typer.Option(help="of all weights; default: the method chooses", rich_help_panel=DECISIONS)
]
ActivationBits = Annotated[
    int | None, typer.Option(help="of all tensors; default: the method chooses", rich_help_panel=DECISIONS)
]
Importance = Annotated[
    str,
    typer.Option(
        help="norm that ranks channels: l1 or l2", autocompletion=one_of("l1", "l2"), rich_help_panel=DECISIONS
    ),
]
RoundTo = Annotated[
    int | None, typer.Option(help="keep multiples of this many channels; 1: any number", rich_help_panel=DECISIONS)
]
MinorGroups = Annotated[
    bool, typer.Option("--minor-groups", help="also prune heads and group widths", rich_help_panel=DECISIONS)
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="what would be done and what is in reach, and stop", rich_help_panel=OUTPUT),
]


def constraints_of(keep: list[str] | None, no_prune: list[str] | None, only: str | None) -> dict[str, Any]:
    """What --keep, --no-prune and --only say, as settings."""
    from sbs_fx.search.constraints import Keep as Constraint

    if only not in (None, "prune", "quantise"):
        raise typer.BadParameter(f"--only {only}: expected prune or quantise")
    constraints = [Constraint.parse(text) for text in keep or ()]
    constraints += [Constraint(pattern, prune=False) for pattern in no_prune or ()]
    return {"constraints": constraints, "quantise": only != "prune", "prune": only != "quantise"}


def parse_share(text: str) -> float:
    """What an option gives as 1% or 0.01."""
    from sbs_fx.plan.budget import share_of

    try:
        return share_of(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: expected a share, such as 1%") from None


def make_config(overrides: Sequence[str] = (), **settings: Any) -> Config:
    """Settings of the options that were given; the others keep their defaults."""
    from sbs_fx.config import Config
    from sbs_fx.plan.errors import SettingsError

    chosen = {name: value for name, value in settings.items() if value is not None}
    try:
        return Config(**{**chosen, **nested(overrides)})
    except SettingsError as error:
        raise typer.BadParameter("; ".join(map(_problem, error.problems)) or str(error)) from error


def _problem(error: Any) -> str:
    """One problem of settings in the words of the command line; of a method's settings the message says which."""
    message = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return message
    option = str(error["loc"][0]).replace("learning_rate", "lr").replace("_", "-")
    return f"--{option} {error['input']}: {message}"
