"""Runs saved files where there is torch and nothing of ours, and compares.

`python _zoo_plain.py ADDRESS` listens at a socket; for each request, (folder, modules to import), a copy of the process
that has not seen another file imports them, loads `model.pt2`, runs it on the inputs in `run.pt` and answers with what
is wrong, "" if nothing is. It is a server because importing torch takes longer than all the rest.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from multiprocessing.connection import Client, Listener
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
import torch.export.pt2_archive._package
from torch.utils import _pytree as pytree


def serve(address: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # reason: nobody waits for the copies
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    with Listener(address) as listener:
        while True:
            connection = listener.accept()
            if os.fork() == 0:
                connection.send(problem_of(*connection.recv()))
                os._exit(0)
            connection.close()


def _end_with_parent() -> None:
    sys.stdin.read()  # reason: the other end is closed when the process that started this one ends, however it does
    os._exit(0)


def ask(address: str, directory: str, imports: Sequence[str], timeout: float) -> str:
    """The server's answer about one folder, "" if the file does what it should."""
    with Client(address) as connection:
        connection.send((directory, list(imports)))
        try:
            return str(connection.recv()) if connection.poll(timeout) else f"no answer in {timeout} s"
        except EOFError:
            return "its process ended"


def problem_of(directory: str, imports: Sequence[str]) -> str:
    try:
        for name in imports:
            importlib.import_module(name)
        inputs, expected = torch.load(os.path.join(directory, "run.pt"), weights_only=False)
        module: Any = torch.export.load(os.path.join(directory, "model.pt2")).module()
        with torch.no_grad():
            outputs = pytree.tree_leaves(module(*inputs))
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if any(name.startswith("sbs_fx") for name in sys.modules):
        return "the file needs sbs_fx"
    if len(outputs) != len(expected):
        return f"{len(outputs)} outputs, not {len(expected)}"
    pairs = enumerate(zip(outputs, expected, strict=True))
    same = {i: torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b for i, (a, b) in pairs}
    different = [i for i, equal in same.items() if not equal]
    return f"outputs {different} differ from those of the graph that was saved" if different else ""


if __name__ == "__main__":
    serve(sys.argv[1])
