"""`Result`: what `compress` gives back, and what can be done with it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import fx

from sbs_fx.export import Runner, export, runner, save_pt2
from sbs_fx.export.benchmark import Benchmark, benchmark
from sbs_fx.passes import on_device
from sbs_fx.plan import Budget, Cost, Policy
from sbs_fx.plan.boundary import boundary
from sbs_fx.plan.errors import MethodError
from sbs_fx.plan.files import prepare_directory
from sbs_fx.report import Report
from sbs_fx.report.targets import forget_targets
from sbs_fx.report.text import html_table
from sbs_fx.search.problem import Problem
from sbs_fx.search.replan import replanned
from sbs_fx.search.sensitivities import Sensitivities


@dataclass(repr=False)
class Result:
    """What `compress` gives back.

    Attributes:
        model: the static quantised graph, eval mode, plain ATen and `quantized_decomposed` operators, on the device of
            the float model; what is saved, exported, compiled or timed is on the CPU.
        policy: the plan it was made from. cost, baseline_cost: of the graph and of the float model.
        report: layers, groups and pins as text and as data.
        gated: the same network with fake quantisation, for further training; `finalize` turns it into `model` again.
        metadata: kept in files: "mean" and "std" of images, where the model's configuration has them; "part": the path
            of the sub-module that was compressed in place of the whole.
        seconds: time spent per stage.
        sensitivities: what each decision was measured to cost, of methods that measure; for `replan`.
        problem: what was solved, on the float model, with `settings` of the method.

    >>> result = sbs_fx.compress(net, images, budget="5%")
    >>> result.save("out")
    >>> result
    Result(opq: BOPs ...x, MACs ...x, ... kB, 3 layers)
    """

    model: fx.GraphModule
    policy: Policy
    cost: Cost
    report: Report
    gated: fx.GraphModule
    example_inputs: tuple[torch.Tensor, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    sensitivities: Sensitivities | None = field(default=None, repr=False)
    problem: Problem | None = field(default=None, repr=False)
    settings: Any = field(default=None, repr=False)

    @property
    def baseline_cost(self) -> Cost:
        assert self.cost.reference is not None
        return self.cost.reference

    @boundary("replan")
    def replan(self, budget: Budget | float | str, **settings: Any) -> Policy:
        """A plan for another budget, for `sbs_fx.apply`: in seconds, as nothing is measured again.

        Args:
            settings: fields of `Config` that say what may be decided, such as `constraints=`, `round_to=` or `prune=`.

        Raises:
            MethodError: the method measures nothing that could be used again. As `sbs_fx.replan`.
        """
        if self.problem is None:
            raise MethodError("this result holds no problem to solve again; call sbs_fx.replan with the float model")
        problem = self.problem.under(Budget.of(budget), **settings)
        return replanned(problem, self.policy.method, self.sensitivities, self.settings)

    @boundary("save")
    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `policy.json`, `model.pt2`, the report (`.txt`, `.json`, `.html`) and, where losses were measured,
        `sensitivity.json` into `directory`, each whole or not at all.

        Raises:
            FileError: the directory is a file or cannot be written, or the disk is full.
        """
        path = prepare_directory(directory)
        of_policy = {"policy": self.policy.checksum}  # reason: by which a set of files is known to be of one result
        forget_targets(path)
        save_pt2(*self._on_cpu(), os.path.join(path, "model.pt2"), {**self.metadata, **of_policy})
        self.policy.save(os.path.join(path, "policy.json"))
        if self.sensitivities is not None:
            self.sensitivities.save(os.path.join(path, "sensitivity.json"))
        for name in ("report.txt", "report.json", "report.html"):
            self.report.model_copy(update=of_policy).save(os.path.join(path, name))

    @boundary("export")
    def export(self, format: str, path: str | os.PathLike[str], **options: Any) -> Runner:
        """Write `model` as a file of another tool; see `sbs_fx.export.export`."""
        return export(*self._on_cpu(), format, path, **{"metadata": self.metadata, **options})

    @boundary("compiled")
    def compiled(self) -> Runner:
        """`model` under torch's compiler with int8 kernels; `kernels` says which layers reached one.

        Raises:
            BackendError: torchao is not installed, or the compiler fails or computes something else.
        """
        return runner(*self._on_cpu(), "inductor")

    @boundary("benchmark")
    def benchmark(self, **options: Any) -> Benchmark:
        """Latency on the backends at hand and the fastest of them; see `sbs_fx.export.benchmark.benchmark`."""
        return benchmark(*self._on_cpu(), **options)

    def _on_cpu(self) -> tuple[fx.GraphModule, tuple[torch.Tensor, ...]]:
        if all(x.device.type == "cpu" for x in self.example_inputs):
            return self.model, self.example_inputs
        return on_device(self.model, "cpu"), tuple(x.cpu() for x in self.example_inputs)

    def _repr_html_(self) -> str:
        return f"<p><code>{escape(repr(self))}</code></p>{html_table(self.report)}"

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        cost, before = self.cost, self.baseline_cost
        times = ", ".join(
            f"{name} {was / now:.1f}x" if now else f"{name} 0"
            for name, was, now in (("BOPs", before.bops, cost.bops), ("MACs", before.macs, cost.macs))
        )
        stored, layers = f"{cost.stored_bits / 8e3:.0f} kB", f"{len(self.policy.weight_bits)} layers"
        return f"Result({self.policy.method}: {times}, {stored}, {layers})"
