"""`Config`: settings of `compress` and of everything that it calls, each in one place."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, SerializeAsAny, field_validator, model_validator

from sbs_fx.calibration.reconstruction import Reconstruction
from sbs_fx.export import TARGETS, Numerics
from sbs_fx.export.latency import Latency
from sbs_fx.plan.bits import FLOAT_BITS
from sbs_fx.search.registry import Method, sections
from sbs_fx.search.space import SpaceSettings
from sbs_fx.training import Training


class Config(SpaceSettings):
    """Settings of `compress`; every field has a sensible default. What may be decided and what must stay are the fields
    of `SpaceSettings`, which every method obeys.

    Attributes:
        methods: settings of methods by name, such as `methods={"opq": Opq(...)}`; `opq=Opq(...)` says the same.
        keep_outputs: False lets the output features of a headless model shrink.
        ranges: how activation and weight ranges are chosen: "mse", "percentile" or "minmax".
        integer_joins: adds, products, concatenations and pools of convolutional blocks work on 8-bit codes too, as
            integer kernels want it; False leaves them in float.
        target: the name of a format, such as "tensorrt", whose tool is to compute the result: ranges, joins and bits
            are those that it has kernels for. None: what suits the CPU tools.
        exact: all scales are powers of two, so that every backend computes the same bits; costs accuracy below 8 bits.
        calibration_batches: batches of `data` that calibration reads.
        epochs, learning_rate: fine-tuning with the gates fixed; 0 epochs: none.
        reconstruction: on the data, where nothing is fine-tuned: layers are refitted to give what they gave.
        uncounted: what to do about operators whose cost nobody knows under a budget of BOPs or MACs: "error", or
            "ignore", which leaves them out of the cost and says so in the report.
        latency: how time is measured if the budget limits it.
        training: how search and fine-tuning train.
        executor: of `concurrent.futures` or of its form, such as a `ProcessPoolExecutor` or Dask's; plans are measured
            by its workers (`two_stage`). No part of what identifies a run.
        seed: of everything random.

    >>> sbs_fx.Config(constraints=[sbs_fx.Keep("4", weight_bits=8)], seed=1).seed
    1
    """

    methods: dict[str, SerializeAsAny[BaseModel]] = Field(default_factory=dict)
    keep_outputs: bool = True
    ranges: Literal["mse", "percentile", "minmax"] = "mse"
    integer_joins: bool = True
    target: str | None = None
    exact: bool = False
    calibration_batches: int = Field(default=8, ge=1)
    epochs: int = Field(default=0, ge=0)
    learning_rate: float = Field(default=0.01, gt=0)
    reconstruction: Reconstruction = Reconstruction()
    uncounted: Literal["error", "ignore"] = "error"
    latency: Latency = Latency()
    training: Training = Training()
    executor: Any = Field(default=None, exclude=True, repr=False)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _settings_of_methods(cls, fields: Any) -> Any:
        """Settings by the names under which methods have registered their classes."""
        if not isinstance(fields, dict) or not ("methods" in fields or fields.keys() - cls.model_fields.keys()):
            return fields
        classes = sections()
        fields = dict(fields)
        if not isinstance(fields.get("methods", {}), dict):
            raise ValueError(f"methods={fields['methods']!r}; expected a dict of settings by name of method")
        settings = {**fields.pop("methods", {}), **{name: fields.pop(name) for name in [*fields] if name in classes}}
        if unknown := sorted(settings.keys() - classes.keys()):
            raise ValueError(f"no method has settings called {unknown[0]!r}; expected some of {sorted(classes)}")
        fields["methods"] = {
            name: classes[name](**value) if isinstance(value, dict) else value for name, value in settings.items()
        }
        return fields

    @model_validator(mode="after")
    def _computed_by_target(self) -> Config:
        bits, computed = self.activation_bits, self.numerics.activation_bits
        if bits is not None and bits != FLOAT_BITS and bits not in computed:
            raise ValueError(
                f"activation_bits={bits}, which target {self.target!r} does not compute; it has {computed}"
            )
        return self

    @property
    def numerics(self) -> Numerics:
        """What the target computes; raises BackendError for one that nobody has registered."""
        return Numerics() if self.target is None else TARGETS[self.target].numerics

    @field_validator("executor")
    @classmethod
    def _submits(cls, executor: Any) -> Any:
        if executor is not None and not callable(getattr(executor, "submit", None)):
            raise ValueError(f"a {type(executor).__name__} is no executor; expected one of concurrent.futures")
        return executor

    def for_target(self, target: str | None) -> Config:
        """The same settings for another target; for its own where that is None. Raises BackendError as `numerics`."""
        if target is None:
            return self
        return Config(**{name: getattr(self, name) for name in self.model_fields_set} | {"target": target})

    def space_of(self, method: Method) -> SpaceSettings:
        """What may be decided, with the bitwidths that a method chooses from where none were asked for."""
        update: dict[str, Any] = {}
        if method.candidates and "candidates" not in self.model_fields_set:
            update["candidates"] = method.candidates
        if self.activation_bits is None and len(self.numerics.activation_bits) == 1:
            update["activation_bits"] = self.numerics.activation_bits[0]
        return self.model_copy(update=update) if update else self

    def of(self, method: Method) -> BaseModel | None:
        """The settings of a method; its defaults where none were given."""
        if method.settings is None:
            return None
        return self.methods.get(method.section or method.name) or method.settings()
