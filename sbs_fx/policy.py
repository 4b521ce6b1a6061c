"""Policy, Budget and Cost: what was decided, how much was allowed, what it comes to.

In: plain numbers and names. Out: frozen values that are written as JSON and read back equal.
Holds: a value that exists is valid; a file that was cut short or altered is refused; nothing here knows of graphs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import reprlib
import secrets
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, field_validator, model_validator

from sbs_fx.errors import BudgetError, FileError, PolicyError, PolicyMismatch, SbsError

FORMAT: Final = 1
BITS = (2, 4, 8, 32)  # of a whole layer or tensor; 32 leaves it in float
CHANNEL_BITS = (0, 2, 4, 8)  # of one output channel; 0 prunes it
MEASURES = ("bops", "size", "macs", "latency")


def current_versions() -> dict[str, str]:
    """Versions that a policy records: python, torch, sbs_fx, and timm if it has been imported."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "sbs_fx", *(["timm"] if "timm" in sys.modules else [])):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            versions[name] = "unknown"
    return versions


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that the final name holds either all of it or what it held before.

    Raises:
        FileError: the directory is missing or not writable, `path` is a directory, the disk is full.
    """
    path = os.fspath(path)
    temporary = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(
            f"cannot write {path!r}: {error.strerror or error}; expected a writable path in an existing directory with "
            f"{len(data)} bytes free. Nothing was written under that name."
        ) from error
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _explain(owner: str, error: ValidationError) -> str:
    """One line per problem: where, what, and the value that was given."""
    lines = []
    for problem in error.errors(include_url=False):
        message = problem["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in problem["loc"])
        lines.append(f"{place}: {message} (given {reprlib.repr(problem['input'])})" if place else message)
    return f"invalid {owner}: " + "; ".join(lines)


class Value(BaseModel):
    """A frozen pydantic value whose constructor raises an error of ours."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    _error: ClassVar[type[SbsError]] = PolicyError

    if not TYPE_CHECKING:  # the type checker keeps the signature made from the fields

        def __init__(self, /, **data: Any) -> None:
            try:
                super().__init__(**data)
            except ValidationError as error:
                raise self._error(_explain(type(self).__name__, error)) from None


class Policy(Value):
    """Everything that turns one float model into one static quantised graph.

    Attributes:
        format: number of the file format. fingerprint: of the traced float model; a policy fits no other.
        method: what found it, such as "uniform". seed: of the random numbers that method used.
        grid: integer levels with zero ("symmetric") or the zero-free one of SBS ("paper").
        versions: package -> version at the time of writing; see `current_versions`.
        kept: channel group -> coordinates that stay, ascending, at least one.
        sizes: channel group -> its size in the float model; the same groups as `kept`.
        weight_bits: layer -> 2, 4, 8 or 32 (float), or a list with 0, 2, 4 or 8 for every output channel.
        activation_bits: tensor (graph node) -> 2, 4, 8 or 32 (float).

    Raises:
        PolicyError: on construction, if any of that does not hold; kept coordinates may come in any order.
    """

    model_config = ConfigDict(strict=True)

    format: Literal[1] = FORMAT
    fingerprint: str
    method: str
    seed: int = 0
    grid: Literal["symmetric", "paper"] = "symmetric"
    versions: dict[str, str] = Field(default_factory=current_versions)
    kept: dict[str, list[int]] = Field(default_factory=dict)
    sizes: dict[str, int] = Field(default_factory=dict)
    weight_bits: dict[str, int | list[int]] = Field(default_factory=dict)
    activation_bits: dict[str, int] = Field(default_factory=dict)

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _known_bits(cls, table: dict[str, int | list[int]]) -> dict[str, int | list[int]]:
        for name, bits in table.items():
            allowed = BITS if isinstance(bits, int) else CHANNEL_BITS
            wrong = ({bits} if isinstance(bits, int) else set(bits)) - set(allowed)
            if wrong or bits == []:
                raise ValueError(f"{name!r} has {sorted(wrong) or 'an empty list of'} bits; expected some of {allowed}")
        return table

    @model_validator(mode="after")
    def _coordinates(self) -> Self:
        if odd := sorted(self.kept.keys() ^ self.sizes.keys()):
            raise ValueError(f"groups {odd} are in only one of kept and sizes; expected the same groups in both")
        for name, kept in self.kept.items():
            kept.sort()
            size = self.sizes[name]
            if not kept:
                raise ValueError(f"group {name!r} keeps no channel; at least one must stay")
            if wrong := [index for index in kept if not 0 <= index < size]:
                raise ValueError(f"group {name!r} keeps unknown indices {wrong}; expected 0 to {size - 1}")
            if twice := [index for index, count in Counter(kept).items() if count > 1]:
                raise ValueError(f"group {name!r} keeps indices {twice} more than once; list each once")
        return self

    @property
    def checksum(self) -> str:
        """sha256 (hex) of the canonical JSON of all fields."""
        return _checksum(self.model_dump(mode="json"))

    def to_json(self) -> str:
        """The policy as JSON, one line per name, with its checksum."""
        entries = []
        for key, value in {**self.model_dump(mode="json"), "checksum": self.checksum}.items():
            text = json.dumps(value)
            if isinstance(value, dict) and value:
                rows = (f"    {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
                text = "{\n" + ",\n".join(rows) + "\n  }"
            entries.append(f"  {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(entries) + "\n}\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            FileError: the text is not whole JSON (truncated), or its checksum does not fit (altered).
            PolicyError: it describes no valid policy, or one of another format.
        """
        fields = _parse_object(text, "policy")
        if (given := fields.get("format")) != FORMAT:
            raise PolicyError(f"policy has format {given!r}, expected {FORMAT}; read it with the version that wrote it")
        written = fields.pop("checksum", None)
        if written != (found := _checksum(fields)):
            raise FileError(
                f"policy was altered: its checksum says {written!r}, its contents give {found!r}. Restore the file, or "
                "build the changed plan with sbs_fx.policy.Policy(...) and save that."
            )
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to `path`; all of it or nothing. Raises FileError."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy that `save` wrote. Raises FileError or PolicyError, with the path in the message."""
        path = os.fspath(path)
        try:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"cannot read {path!r}: {error}; expected a policy.json that `save` wrote") from error
        try:
            return cls.from_json(text)
        except (FileError, PolicyError) as error:
            raise type(error)(f"{path!r}: {error}") from None

    def check(
        self, fingerprint: str, group_sizes: Mapping[str, int], layers: Iterable[str], tensors: Iterable[str]
    ) -> None:
        """Make sure that this policy was made for the model with these names.

        Args:
            fingerprint: of the traced model. group_sizes: channel group -> size, for every group that can be pruned.
            layers, tensors: every layer whose weight has a gate, and every activation that has one.

        Raises:
            PolicyMismatch: names in one of the two only, or with different sizes; or the fingerprint differs.
        """
        mine = [self.sizes.keys(), self.weight_bits.keys(), self.activation_bits.keys()]
        theirs = [group_sizes.keys(), dict.fromkeys(layers).keys(), dict.fromkeys(tensors).keys()]
        unknown = [name for a, b in zip(mine, theirs, strict=True) for name in a if name not in b]
        missing = [name for a, b in zip(mine, theirs, strict=True) for name in b if name not in a]
        sizes = {n: (size, group_sizes[n]) for n, size in self.sizes.items() if group_sizes.get(n, size) != size}
        stale = fingerprint != self.fingerprint
        if not (unknown or missing or sizes or stale):
            return
        parts = [f"only in the policy: {_short(unknown)}"] if unknown else []
        parts += [f"only in the model: {_short(missing)}"] if missing else []
        parts += [f"group {name!r} has {a} channels in the policy, {b} in the model" for name, (a, b) in sizes.items()]
        if stale:
            parts.append(f"fingerprint {self.fingerprint!r} in the policy, {fingerprint!r} of the model")
            now = current_versions()
            changed = [f"{k} {v} -> {now[k]}" for k, v in self.versions.items() if k in now and now[k] != v]
            parts += [f"versions changed since it was written: {', '.join(changed)}"] if changed else []
        raise PolicyMismatch(
            "this policy belongs to another model: " + "; ".join(parts) + ". Use it with the model it was made for.",
            unknown=unknown,
            missing=missing,
            different=[*sizes, *(["fingerprint"] if stale else [])],
        )


class LayerCost(Value):
    """What one layer costs for one example. BOPs = MACs x weight bits x activation bits (arXiv 2101.04935).

    Attributes:
        name, kind: which layer, and what computes it.
        macs, bops: multiply-accumulates and bit operations.
        weight_bits: mean over the output channels; of a matmul of two activations, the bits of the second.
        activation_bits: bits of the input.
        params, stored_bits: weights that it keeps, and their bits in the file.
        seconds: time that a latency model gives it; 0 without one.
    """

    name: str
    kind: Literal["conv", "linear", "matmul", "attention", "lstm"]
    macs: NonNegativeInt
    weight_bits: float = Field(ge=0, le=64, allow_inf_nan=False)
    activation_bits: float = Field(ge=0, le=64, allow_inf_nan=False)
    bops: NonNegativeInt
    params: NonNegativeInt
    stored_bits: NonNegativeInt
    seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)


class Cost(Value):
    """What a model costs for one example: per layer, the rest, and in total.

    Attributes:
        layers: one entry a conv, linear, matmul, attention or lstm.
        other_params, other_stored_bits: norms, biases and tables, kept in float32.
        other_seconds: time of what is no layer; 0 without a latency model.
        reference: the float model's cost, to which budgets compare; None if this is that model.
        bops, macs, params, stored_bits: totals, as of `LayerCost`.
    """

    layers: tuple[LayerCost, ...] = ()
    other_params: NonNegativeInt = 0
    other_stored_bits: NonNegativeInt = 0
    other_seconds: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    reference: Cost | None = None

    @property
    def bops(self) -> int:
        return sum(layer.bops for layer in self.layers)

    @property
    def macs(self) -> int:
        return sum(layer.macs for layer in self.layers)

    @property
    def params(self) -> int:
        return sum(layer.params for layer in self.layers) + self.other_params

    @property
    def stored_bits(self) -> int:
        return sum(layer.stored_bits for layer in self.layers) + self.other_stored_bits

    @property
    def seconds(self) -> float:
        return sum(layer.seconds for layer in self.layers) + self.other_seconds

    @property
    def by_measure(self) -> dict[str, float]:
        """What budgets limit, by the names that they give it; latency only where it was measured."""
        found: dict[str, float] = {"bops": self.bops, "size": self.stored_bits, "macs": self.macs}
        return {**found, "latency": self.seconds} if self.seconds else found

    def to_json(self) -> str:
        """The cost as JSON, `reference` included."""
        return self.model_dump_json(indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote. Raises FileError if the text is no JSON, PolicyError if it is no cost."""
        return cls(**_parse_object(text, "cost"))


class Budget(Value):
    """How much of the float model may be left; every limit that is given must hold.

    | usage                            | meaning                                                        |
    |----------------------------------|----------------------------------------------------------------|
    | `Budget(bops=0.05)`              | at most 5 % of the bit operations                              |
    | `Budget(size=0.1)`               | at most a tenth of the stored bits                             |
    | `Budget(macs=0.5)`               | at most half the multiply-accumulates                          |
    | `Budget(latency=0.25)`           | at most a quarter of the float model's time on this machine    |
    | `Budget(bops=0.05, size=0.2)`    | both                                                           |
    | `Budget.parse("5%")`             | `Budget(bops=0.05)`; so is `"0.05"`                            |
    | `Budget.parse("bops=5%,size=.2")`| `Budget(bops=0.05, size=0.2)`                                  |
    | `budget.is_satisfied_by(cost)`   | does the cost keep every limit?                                |
    | `budget.shares(cost)`            | `{"bops": 0.049, "size": 0.13, "macs": 0.6}`, limited or not   |
    | `budget.limits`                  | `{"bops": 0.05}`, the limits that were given                   |

    Raises:
        BudgetError: no limit, or one that is NaN, zero, negative, above 1 or no number.
    """

    model_config = ConfigDict(strict=True)
    _error: ClassVar[type[SbsError]] = BudgetError

    bops: float | None = None
    size: float | None = None
    macs: float | None = None
    latency: float | None = None

    @field_validator(*MEASURES)
    @classmethod
    def _is_share(cls, share: float | None) -> float | None:
        if share is not None and not 0 < share <= 1:  # NaN fails both comparisons
            raise ValueError("expected a share of the float model, above 0 and at most 1, such as 0.05 for 5 %")
        return share

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.limits:
            raise ValueError(
                "no limit given; expected at least one of bops, size, macs, latency, such as Budget(bops=0.05)"
            )
        return self

    @property
    def limits(self) -> dict[str, float]:
        return {name: share for name in MEASURES if (share := getattr(self, name)) is not None}

    def shares(self, cost: Cost) -> dict[str, float]:
        """Measure -> share of `cost.reference`, for all measures. Raises ValueError if there is no reference."""
        reference = cost.reference
        if reference is None:
            raise ValueError("this cost has no reference; compare with Cost(..., reference=cost_of_the_float_model)")
        found, whole = cost.by_measure, reference.by_measure
        return {m: found[m] / whole[m] if whole[m] else (math.inf if found[m] else 0.0) for m in found}

    def used_by(self, cost: Cost) -> float:
        """Share of a limit that a cost takes, the largest over all limits: above 1 it exceeds the budget."""
        shares = self.shares(cost)
        return max(shares[measure] / limit for measure, limit in self.limits.items())

    def is_satisfied_by(self, cost: Cost) -> bool:
        """True if every limit holds. Raises ValueError if the cost has no reference, or not what a limit measures."""
        shares = self.shares(cost)
        missing = sorted(self.limits.keys() - shares.keys())
        if missing:
            raise ValueError(f"this cost has no {missing[0]}; give the cost model one, see sbs_fx.latency")
        return all(shares[name] <= limit for name, limit in self.limits.items())

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a budget from text; see the table above. Raises BudgetError."""
        limits: dict[str, float] = {}
        for part in text.split(","):
            name, separator, number = (piece.strip() for piece in part.rpartition("="))
            name = name if separator else "bops"
            if name not in MEASURES or name in limits:
                problem = "more than once" if name in limits else f"is unknown; expected one of {MEASURES}"
                raise BudgetError(f"budget {text!r}: measure {name!r} {problem}. Write it like bops=5%,size=20%.")
            try:
                limits[name] = float(number[:-1]) / 100 if number.endswith("%") else float(number)
            except ValueError:
                raise BudgetError(f"budget {text!r}: {number!r} is no share; expected one like 5% or 0.05") from None
        return cls(**limits)


def _checksum(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _short(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _parse_object(text: str, what: str) -> dict[str, Any]:
    """A JSON object as a dict; FileError if it is cut short, is no object, or repeats a name."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        if len(counts) < len(pairs):
            raise ValueError(f"names {[n for n, c in counts.items() if c > 1]} occur more than once")
        return dict(pairs)

    try:
        fields = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not whole JSON ({error}): it was truncated or altered; write it again") from None
    if not isinstance(fields, dict):
        raise FileError(f"{what} is a JSON {type(fields).__name__}, expected an object; write it again")
    return fields
