"""Does the compiler go all the way on every timm family?

`python benchmarks/coverage.py --out FILE` takes the smallest model of every timm module, each in a process of its own,
from `trace` to a saved file that runs again, and checks every equality on the way. `--all` takes every name of the
registry, graph work only. Rows are appended to FILE's side file (.jsonl) as they come, so that `--resume` goes on where
a run stopped; FILE itself is a JSON list of rows with at least `family`, `model` and `outcome` ("ok" or the first
error).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
from typing import Any

from _coverage_models import Task, all_models, smallest_models
from _coverage_workers import Failed, read_rows, run_tasks

# reason: glibc would keep large blocks that were freed, more or fewer by chance; what a model needs is what is measured
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(1 << 18))  # for the processes that start from now on


def main() -> int:
    options = _options()
    tasks = _tasks(options)
    side = options.out.with_suffix(".jsonl")
    side.parent.mkdir(parents=True, exist_ok=True)
    # reason: a model that failed is tried again
    rows = {row["model"]: row for row in read_rows(side) if row["outcome"] == "ok"} if options.resume else {}
    if not options.resume:
        side.write_text("")
    waiting = [task for task in tasks if task.model not in rows]
    print(f"{len(tasks)} models, {len(tasks) - len(waiting)} already done", flush=True)
    if options.all:
        from _coverage_graph import check_graph as check
    elif options.product:
        from _coverage_family import check_product as check
    else:
        from _coverage_family import check_family as check
    results = run_tasks(
        check, waiting, jobs=options.jobs, timeout=options.timeout, tasks_per_process=25 if options.all else 1
    )
    for task, result in results:
        row = _failure(task, result) if isinstance(result, Failed) else result
        rows[task.model] = row
        with side.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{len(rows):5d}/{len(tasks)}  {task.family:24s} {task.model:44s} {row['outcome']}", flush=True)
    done = [rows[task.model] for task in tasks if task.model in rows]
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    if options.product:
        return 0 if all(row["outcome"] == "ok" for row in done) else 1
    from _coverage_table import summary, table

    text = f"{table(done, graph_only=options.all)}\n\n{summary(done, graph_only=options.all)}\n"
    print(text)
    if options.table:
        options.table.write_text(text)
    return 0 if all(row["outcome"] == "ok" for row in done) else 1


def _tasks(options: argparse.Namespace) -> list[Task]:
    """The models that were asked for; the process ends if there is no such family or model."""
    everything = all_models()
    families, models = {task.family for task in everything}, {task.model for task in everything}
    for asked, known in ((options.families or [], families), (options.models or [], models)):
        if unknown := [name for name in asked if name not in known]:
            sys.exit(f"timm does not have {unknown}; see timm.list_modules() and timm.list_models()")
    if options.families:
        everything = [task for task in everything if task.family in options.families]
    if options.models:
        return [task for task in everything if task.model in options.models]
    return everything if options.all else smallest_models(everything, options.cache)


def _failure(task: Task, reason: Failed) -> dict[str, Any]:
    return {"family": task.family, "model": task.model, "outcome": str(reason), "seconds": {}}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON list of rows")
    parser.add_argument("--all", action="store_true", help="every name of the registry, graph work only")
    parser.add_argument("--product", action="store_true", help="only compress, save, load and run; no table")
    parser.add_argument("--families", type=lambda text: text.split(","), help="only these timm modules, by comma")
    parser.add_argument("--models", type=lambda text: text.split(","), help="only these models, by comma")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a model may take")
    parser.add_argument("--cache", type=pathlib.Path, help="file that keeps the parameter counts of all models")
    parser.add_argument("--resume", action="store_true", help="keep the good rows of an interrupted run")
    parser.add_argument("--table", type=pathlib.Path, help="also write the table as markdown")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
