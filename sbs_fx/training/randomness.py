"""Random numbers of a training run: a function of what they are for, never of what was drawn before."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_everything(*key: int) -> None:
    """One seed for python's, numpy's and torch's generators, made from whole numbers such as (seed, epoch, batch)."""
    number = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


@contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Whatever is seeded or drawn inside, the generators are afterwards where they were: those of all devices in use,
    or of one."""
    python, numpy = random.getstate(), np.random.get_state()
    in_use = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    devices = list(in_use) if device is None else [device] if device.type == "cuda" else []
    try:
        # reason: a fork seeds every device again afterwards, so only those in use are named
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
