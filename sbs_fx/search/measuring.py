"""Losses of plans, measured one at a time here or several at a time by the workers of an executor.

In: a predictor, plans. Out: their losses in the order of the plans. Holds: each plan is measured once; the same losses
come back whatever the number of workers, given that each has the same number of threads; with checkpoints, what was
measured before a run was killed is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

from sbs_fx.passes.pickled import dumps
from sbs_fx.plan import Plan
from sbs_fx.plan.errors import InputError, SbsError
from sbs_fx.search.dynamic_norm import Predictor
from sbs_fx.training import Checkpoints

_TOGETHER = 8  # plans that a worker is given at a time
_SECONDS = 10.0  # between savings
_STAGE = "measured"


class Measuring:
    """What a predictor says of plans.

    Args:
        executor: of `concurrent.futures`, whose workers have this package; None: this process.
        checkpoints: where losses are kept, and taken from. step: called with the number of each plan of a call, or of
            each worker's plans, and how many there are.

    Attributes:
        asked: the plans so far, as keys, those that an earlier run has measured too.
    """

    def __init__(
        self,
        predictor: Predictor,
        executor: Executor | None = None,
        checkpoints: Checkpoints | None = None,
        step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.predictor, self.executor, self.checkpoints, self.step = predictor, executor, checkpoints, step
        saved = None if checkpoints is None else checkpoints.load(_STAGE)
        self.known: dict[str, float] = {} if saved is None else dict(saved.state["losses"])
        self.asked: set[str] = set()
        self._saved = time.monotonic()

    def __call__(self, plan: Plan) -> float:
        return self.of([plan])[0]

    def of(self, plans: Sequence[Plan]) -> list[float]:
        """Raises InputError if a worker cannot be given what there is to measure."""
        keys = [_key(plan) for plan in plans]
        self.asked.update(keys)
        waiting = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in self.known}
        if self.executor is None or len(waiting) < 2:
            for i, (key, plan) in enumerate(waiting.items(), 1):
                self._tell(i, len(waiting))
                self._keep({key: self.predictor(plan)})
        else:
            self._spread(self.executor, waiting)
        return [self.known[key] for key in keys]

    def _spread(self, executor: Executor, waiting: dict[str, Plan]) -> None:
        try:
            payload = dumps(self.predictor)
        except Exception as error:  # pickle raises many kinds
            raise InputError(
                f"what is measured cannot be sent to the executor's workers ({type(error).__name__}: {error}); leave "
                "`executor` out, or make the task's functions importable ones"
            ) from error
        names = list(waiting)
        parts = [names[i : i + _TOGETHER] for i in range(0, len(names), _TOGETHER)]
        futures = [executor.submit(losses_of, payload, [waiting[name] for name in part]) for part in parts]
        for i, (part, future) in enumerate(zip(parts, futures, strict=True), 1):
            self._tell(i, len(parts))
            try:
                self._keep(dict(zip(part, future.result(), strict=True)))
            except SbsError:
                raise
            except Exception as error:  # whatever an executor raises for a worker that is gone, or that worker itself
                raise InputError(
                    f"a worker of the executor failed ({type(error).__name__}: {error}); see its own output, or leave "
                    "`executor` out"
                ) from error

    def _tell(self, done: int, total: int) -> None:
        if self.step is not None:
            self.step(done, total)

    def _keep(self, losses: dict[str, float]) -> None:
        self.known |= losses
        if self.checkpoints is not None and time.monotonic() - self._saved > _SECONDS:
            self.checkpoints.save(_STAGE, {}, {"losses": self.known})
            self._saved = time.monotonic()


_OF_THREAD = threading.local()  # reason: a predictor has one state, and workers may be threads


def losses_of(payload: bytes, plans: Sequence[Plan]) -> list[float]:
    """In a worker: what the predictor in the bytes says of plans. The last one that was read is kept."""
    if getattr(_OF_THREAD, "payload", None) != payload:
        _OF_THREAD.predictor, _OF_THREAD.payload = pickle.loads(payload), payload
    predictor: Any = _OF_THREAD.predictor
    return [predictor(plan) for plan in plans]


def _key(plan: Plan) -> str:
    fields = [plan.kept, plan.weight_bits, plan.activation_bits, plan.nonzeros]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
