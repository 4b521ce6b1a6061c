"""Worker processes with a time limit each task, so that a crash or a hang costs one row and not the run.

In: an importable function and its tasks. Out: (task, result or the reason why there is none), in order of completion.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_CONTEXT = multiprocessing.get_context("spawn")  # reason: a forked torch shares locks and memory with its parent


class Failed(Exception):
    """A task without a result: out of time, or its process died."""


class Worker:
    """A process that runs one function on the tasks it is sent."""

    def __init__(self, function: Callable[[Any], Any], context: Any = _CONTEXT) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.tasks = 0

    def ask(self, task: Any, timeout: float) -> Any:
        """The function's result. Raises Failed, and ends the process, after `timeout` seconds or if it dies."""
        self.tasks += 1
        try:
            self.connection.send(task)
            if not self.connection.poll(timeout):
                raise Failed(f"out of time: over {timeout:.0f} s")
            return self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(10)
            code = self.process.exitcode
            raise Failed(f"its process ended with code {code}" + (" (out of memory?)" if code == -9 else "")) from error

    def stop(self) -> None:
        """End the process: by itself if it is waiting for a task, else by force."""
        self.connection.close()
        self.process.join(1)
        self.process.kill()
        self.process.join()


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    jobs: int,
    timeout: float,
    tasks_per_process: int = 1,
    preload: Sequence[str] = (),
) -> Iterator[tuple[Any, Any]]:
    """Yield (task, result or Failed) as results come; each process is replaced after `tasks_per_process` tasks.

    Args:
        preload: files that one process imports, of which the others are then copies; most of the time of a small task
            goes into imports.
    """
    context: Any = _CONTEXT
    if preload:
        context = multiprocessing.get_context("forkserver")  # reason: its process has imported, and computed nothing
        context.set_forkserver_preload(list(preload))
    local = threading.local()
    workers: list[Worker] = []

    def run(task: Any) -> Any:
        worker: Worker | None = getattr(local, "worker", None)
        if worker is not None and worker.tasks >= tasks_per_process:
            worker.stop()
            worker = None
        if worker is None:
            worker = local.worker = Worker(function, context)
            workers.append(worker)
        try:
            return worker.ask(task, timeout)
        except Failed as failed:
            worker.stop()
            local.worker = None
            return failed

    executor = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        futures = {executor.submit(run, task): task for task in tasks}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.stop()


def call(task: tuple[Callable[..., Any], Any]) -> Any:
    """Apply a function to an argument: the plainest thing to send a worker."""
    function, argument = task
    return function(argument)


def _serve(connection: Any, function: Callable[[Any], Any]) -> None:
    import warnings

    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        while True:
            connection.send(function(connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):  # the parent is gone or wants no more
        return


def read_rows(side: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Rows of an interrupted run; a line that was cut short is dropped."""
    for line in side.read_text().splitlines() if side.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue
