"""Several processes that train one network: each reads its part of every batch, gradients and gates are averaged.

In: the environment that `torchrun` or `accelerate launch` makes. Out: collectives that do nothing where there is one
process. Holds: a batch means the same images however many processes there are, so results agree to rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather_object, reduce
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from sbs_fx.data.batches import Tensors
from sbs_fx.plan.errors import DataError
from sbs_fx.quantizer.superbit import SuperBitQuantizer


class Processes:
    """Which of how many processes this is."""

    def __init__(self) -> None:
        self._state = PartialState(cpu=not torch.cuda.is_available() or None)
        self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def device(self) -> torch.device:
        """This process's GPU, or the CPU where there is none."""
        return self._state.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, index: int, inputs: Tensors, *others: Any) -> tuple[Any, ...]:
        """This process's part of inputs and others (lists, tensors, None, or dicts of these) of batch `index`, as many
        rows as the first input has; what does not divide evenly is left out."""
        if self.count == 1:
            return inputs, *others
        images = len(inputs[0])
        size = images // self.count
        if not size:
            raise DataError(f"batch {index} holds fewer images than there are processes ({self.count})")

        def part(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: part(each) for name, each in value.items()}
            rows = isinstance(value, (Tensor, Sequence)) and not isinstance(value, str) and len(value) == images
            return value[self.rank * size : (self.rank + 1) * size] if rows else value

        return tuple(part(x) for x in inputs), *(part(x) for x in others)

    def start_equal(self, network: nn.Module) -> None:
        """The first process's tensors everywhere; activation gates decide over all processes from now on."""
        if self.count == 1:
            return
        with torch.no_grad():
            for tensor in (*network.parameters(), *network.buffers()):
                tensor.copy_(broadcast(tensor.detach()))
        for module in network.modules():
            if isinstance(module, SuperBitQuantizer):
                module.across_processes = True

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean over processes, all gradients in one message."""
        if self.count == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            flat = reduce(_flatten_dense_tensors(gradients), reduction="mean")
            for gradient, mean in zip(gradients, _unflatten_dense_tensors(flat, gradients), strict=True):
                gradient.copy_(mean)

    def mean(self, value: Tensor) -> Tensor:
        """Mean over processes of a detached tensor."""
        return value if self.count == 1 else reduce(value.clone(), reduction="mean")

    def any(self, flag: bool) -> bool:
        """Whether it holds in any process."""
        return flag if self.count == 1 else any(gather_object([flag]))
