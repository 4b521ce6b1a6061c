"""The command `replan`: another plan from the losses that an earlier `compress` measured; and `run.json`, which says
what that was.

In: the directory of an earlier run, a budget. Out: `policy.json` for `sbs-fx apply`. Holds: nothing is measured again.
"""

from __future__ import annotations

import os
from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sbs_fx.cli.options import Json, Keep, NoPrune, Only, Overrides, constraints_of, make_config
from sbs_fx.cli.progress import show_progress

if TYPE_CHECKING:
    from sbs_fx.cli.models import NamedModel
    from sbs_fx.config import Config
    from sbs_fx.plan import Budget, Policy

RUN = "run.json"
_MODEL = ("model", "checkpoint", "random_weights", "input_size", "num_classes", "in_chans")


def save_run(directory: str, **options: Any) -> None:
    """Write what a run was asked for and what it depended on, so that it can be taken up again or repeated."""
    from sbs_fx.plan import write_atomic

    write_atomic(os.path.join(directory, RUN), (dumps({"format": 1, **options}, indent=1) + "\n").encode())


def load_run(directory: str) -> dict[str, Any]:
    """Raises FileError: there is none, or it is not one."""
    from sbs_fx.plan.errors import FileError
    from sbs_fx.plan.files import parse_object, read_text

    path = os.path.join(directory, RUN)
    fields = parse_object(read_text(path, "the --out directory of `sbs-fx compress`"), path)
    kinds = {"random_weights": bool, "num_classes": int, "in_chans": int}
    wrong = [name for name in _MODEL if not isinstance(fields.get(name), (kinds.get(name, str), type(None)))]
    if fields.get("format") != 1 or wrong or not isinstance(fields.get("model"), str):
        raise FileError(f"{path!r} is no {RUN} of this version; compress again")
    return fields


def replan(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="the --out of an earlier `sbs-fx compress`")],
    budget: Annotated[str, typer.Option(help="3% of the float model's BOPs, 30x, bops=5%,size=20%, 300M, 2MB, 5ms")],
    keep: Keep = None,
    no_prune: NoPrune = None,
    only: Only = None,
    settings: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", "-o", metavar="DIR", help="where the new policy goes")] = None,
    json: Json = False,
) -> None:
    """Another budget from the losses that an earlier run measured, in seconds."""
    from sbs_fx.cli.models import make_model
    from sbs_fx.compression import replan as run
    from sbs_fx.plan.errors import FileError
    from sbs_fx.plan.files import prepare_directory

    asked = load_run(directory)
    table = os.path.join(directory, "sensitivity.json")
    if not os.path.exists(table):
        raise FileError(
            f"there is no {table!r}, and method {asked.get('method')!r} leaves one only where it measures losses; run "
            "`sbs-fx compress` again, with --method two_stage to have them kept"
        )
    if out is not None:
        prepare_directory(out)
    config = make_config(**constraints_of(keep, no_prune, only), overrides=settings or [])
    made = make_model(*(asked[name] for name in _MODEL))
    with show_progress():
        policy = run(made.module, table, budget, made.example_inputs, part=asked.get("part"), config=config)
    if out is not None:
        policy.save(os.path.join(out, "policy.json"))
        save_run(out, **{**{k: v for k, v in asked.items() if k != "format"}, "budget": budget})
    if json:
        typer.echo(policy.to_json(), nl=False)
        return
    typer.echo(_told(policy))
    if out is not None:
        typer.echo(f"the plan is {os.path.join(out, 'policy.json')}; make it real, with data if there are any:")
        flags = [f"--{name.replace('_', '-')} {asked[name]}" for name in (*_MODEL[1:], "part") if asked.get(name)]
        options = " ".join(flags).replace("--random-weights True", "--random-weights")
        typer.echo(f"  sbs-fx apply {asked['model']} {os.path.join(out, 'policy.json')} {options} --out {out}")


def _told(policy: Policy) -> str:
    gone = sum(policy.sizes[name] - len(kept) for name, kept in policy.kept.items())
    bits = [b for table in (policy.weight_bits, policy.activation_bits) for b in table.values() if isinstance(b, int)]
    counts = ", ".join(f"{bits.count(b)} at {b}" for b in sorted(set(bits)))
    return f"plan: {gone} of {sum(policy.sizes.values())} channels go; bits of weights and tensors: {counts}"


def dry_run(made: NamedModel, limits: Budget, method: str, config: Config, *, has_data: bool) -> None:
    """Print what would be compressed, by which method, and how far the decisions reach. Raises InfeasibleBudget."""
    from rich.console import Console
    from rich.table import Table

    from sbs_fx.passes import channel_groups, cost_model, trace
    from sbs_fx.search import Problem
    from sbs_fx.search.registry import chosen

    entry = chosen(method, has_data, bool(config.epochs))
    graph = trace(made.module, made.example_inputs)
    cost = cost_model(graph, channel_groups(graph, keep_outputs=config.keep_outputs))
    typer.echo(f"method {entry.name}: {entry.help}; needs {entry.needs}")
    if "latency" in {**limits.limits, **limits.amounts}:
        typer.echo("how far a limit on latency reaches is known once layers were timed, which a dry run does not")
        return
    problem = Problem.of(cost, limits, (made.example_inputs,), config.space_of(entry), config.seed)
    rows = problem.price(problem.space.most), problem.price(problem.space.least)
    table = Table("measure", "float", "limit", "all at most bits", "least in reach")
    for measure, limit in problem.limits.items():
        whole = cost.whole[measure]
        shares = [f"{value:,} ({value / whole:.2%})" if whole else f"{value:,}" for value in (r[measure] for r in rows)]
        table.add_row(measure, f"{whole:,}", f"{limit:,} ({limit / whole:.2%})", *shares)
    Console().print(table)
    problem.check_feasible(entry.name)
    typer.echo("within reach; nothing was computed or written")
