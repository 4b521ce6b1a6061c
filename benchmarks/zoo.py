"""Does the compiler go all the way on vision models that are not timm's?

`python benchmarks/zoo.py --out FILE` builds each network of the `_zoo_*` files with random weights, small, in a
process of its own, and checks each promise in a column of its own: a trace that is bitwise the model at two batches
(and another image size, where the row has one), slim = masked, price = counted, budget met, static = gated, the saved
file run by a process that has torch alone, the float model unchanged. A row is "ok", "refused: TEXT" (an error of
ours) or "faulty: WHAT". Rows are appended to FILE's side file (.jsonl) as they come, so that `--resume` goes on; FILE
itself is a JSON list. Needs torchvision, transformers and segmentation-models-pytorch; rows of what is not installed
are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from _coverage_workers import Failed, read_rows, run_tasks
from _zoo_networks import Network, all_networks, is_installed

PRELOAD = ("_zoo_check", "torchvision", "transformers.modeling_utils", "segmentation_models_pytorch")  # if installed


def main() -> int:
    options = _options()
    networks = _networks(options)
    side = options.out.with_suffix(".jsonl")
    side.parent.mkdir(parents=True, exist_ok=True)
    rows = {row["model"]: row for row in read_rows(side)} if options.resume else {}
    rows = {name: row for name, row in rows.items() if options.retry is None or options.retry not in row["outcome"]}
    if not options.resume:
        side.write_text("")
    waiting = [network.name for network in networks if network.name not in rows]
    print(f"{len(networks)} networks, {len(networks) - len(waiting)} already done", flush=True)
    from _zoo_check import Task, check_network

    kinds = {network.name: network.kind for network in networks}
    with _plain_process() as address:
        tasks = [Task(name, address, options.plain, options.quick) for name in waiting]
        results = run_tasks(check_network, tasks, jobs=options.jobs, timeout=options.timeout, preload=PRELOAD)
        for (name, *_), result in results:
            row: dict[str, Any] = result
            if isinstance(result, Failed):
                row = {"kind": kinds[name], "model": name, "outcome": f"faulty: {result}", "seconds": {}}
            rows[name] = row
            with side.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{len(rows):4d}/{len(networks)}  {row['kind']:14s} {name:36s} {row['outcome'][:150]}", flush=True)
    done = [rows[name] for name in kinds if name in rows]
    options.out.write_text(json.dumps(done, indent=1) + "\n")
    from _zoo_table import causes, summary, table

    text = f"{summary(done)}\n\n{table(done)}\n\n{causes(done)}\n"
    print(text)
    if options.table:
        options.table.write_text(text)
    return 1 if any(row["outcome"].startswith("faulty") for row in done) else 0


@contextmanager
def _plain_process() -> Iterator[str]:
    """The address at which a process listens that has torch and nothing of ours."""
    script = str(pathlib.Path(__file__).parent / "_zoo_plain.py")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as directory:
        address = os.path.join(directory, "socket")
        process = subprocess.Popen(
            [sys.executable, script, address], cwd=directory, env=environment, stdin=subprocess.PIPE
        )
        try:
            while not os.path.exists(address):
                if process.poll() is not None:
                    sys.exit(f"{script} ended with code {process.returncode}")
                time.sleep(0.1)
            yield address
        finally:
            process.kill()
            process.wait()


def _networks(options: argparse.Namespace) -> list[Network]:
    """Those that were asked for and whose package is there; the process ends if there is no such name or kind."""
    everything = list(all_networks().values())
    kinds, names = {network.kind for network in everything}, {network.name for network in everything}
    for asked, existing in ((options.kinds or [], kinds), (options.models or [], names)):
        if unknown := [name for name in asked if name not in existing]:
            sys.exit(f"there is no {unknown}; expected some of {sorted(existing)}")
    chosen = [
        network
        for network in everything
        if (not options.kinds or network.kind in options.kinds)
        and (not options.models or network.name in options.models)
    ]
    missing = [network for network in chosen if not is_installed(network)]
    for package in sorted({network.package for network in missing}):
        print(f"{sum(n.package == package for n in missing)} networks are left out: {package} is not installed")
    return [network for network in chosen if network not in missing]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON list of rows")
    parser.add_argument("--kinds", type=lambda text: text.split(","), help="only these kinds of rows, by comma")
    parser.add_argument("--models", type=lambda text: text.split(","), help="only these rows, by comma")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a network may take")
    parser.add_argument("--resume", action="store_true", help="keep the rows of an earlier run")
    parser.add_argument("--retry", help="with --resume: but not those whose outcome holds this text, such as faulty")
    parser.add_argument("--quick", action="store_true", help="without what needs a whole compression")
    parser.add_argument("--plain", action="store_true", help="pass tensors alone, nothing by name")
    parser.add_argument("--table", type=pathlib.Path, help="also write the table as markdown")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
