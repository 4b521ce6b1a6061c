"""`Policy`: everything that turns one float model into one static quantised graph, as a value and as a file.

In: plain numbers and names. Out: a frozen value that is written as JSON and read back equal. Holds: a policy that
exists is valid; a file that was cut short or altered is refused; nothing here knows of graphs.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, field_validator, model_validator

from sbs_fx.plan.bits import BITS, FLOAT_BITS
from sbs_fx.plan.errors import FileError, PolicyError, PolicyMismatch
from sbs_fx.plan.files import checksum_of, parse_object, read_as, write_atomic
from sbs_fx.plan.plan import Bits, Plan
from sbs_fx.plan.value import Value

FORMAT: Final = 2
LAYER_BITS: Final = (*BITS, FLOAT_BITS)  # of a whole layer or tensor; 32 leaves it in float
CHANNEL_BITS: Final = (0, *BITS)  # of one output channel; 0 prunes it


def current_versions() -> dict[str, str]:
    """Versions that a policy records: python, torch, sbs_fx, and timm if it has been imported.

    >>> "torch" in current_versions()
    True
    """
    versions = {"python": platform.python_version()}
    for name in ("torch", "sbs_fx", *(["timm"] if "timm" in sys.modules else [])):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            versions[name] = "unknown"
    return versions


class Policy(Value):
    """Everything that turns one float model into one static quantised graph.

    Attributes:
        format: number of the file format. fingerprint: of the traced float model; a policy fits no other.
        method: what found it, such as "uniform". seed: of the random numbers that method used.
        versions: package -> version at the time of writing; see `current_versions`.
        kept: channel group -> coordinates that stay, ascending, at least one.
        sizes: channel group -> its size in the float model; the same groups as `kept`.
        weight_bits: layer -> one of `LAYER_BITS`, or a list with one of `CHANNEL_BITS` for every output channel.
        activation_bits: tensor (graph node) -> one of `LAYER_BITS`.
        nonzeros: layer -> how many of its single weights stay, the largest, where the others are pruned.

    Raises:
        PolicyError: on construction, if any of that does not hold; kept coordinates may come in any order.

    >>> policy = sbs_fx.Policy.load("out/policy.json")
    >>> policy.method
    'opq'
    """

    model_config = ConfigDict(strict=True)

    format: Literal[2] = FORMAT
    fingerprint: str
    method: str
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=current_versions)
    kept: dict[str, list[int]] = Field(default_factory=dict)
    sizes: dict[str, int] = Field(default_factory=dict)
    weight_bits: dict[str, int | list[int]] = Field(default_factory=dict)
    activation_bits: dict[str, int] = Field(default_factory=dict)
    nonzeros: dict[str, PositiveInt] = Field(default_factory=dict)

    @field_validator("weight_bits", "activation_bits")
    @classmethod
    def _known_bits(cls, table: dict[str, int | list[int]]) -> dict[str, int | list[int]]:
        for name, bits in table.items():
            allowed = LAYER_BITS if isinstance(bits, int) else CHANNEL_BITS
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

    @classmethod
    def of(cls, plan: Plan, fingerprint: str, sizes: Mapping[str, int], method: str, seed: int) -> Self:
        """A plan with the identity of the model that it is for: the model's fingerprint and its groups' sizes."""
        return cls(
            fingerprint=fingerprint,
            method=method,
            seed=seed,
            kept={name: list(plan.kept.get(name, range(size))) for name, size in sizes.items()},
            sizes=dict(sizes),
            weight_bits={n: bits if isinstance(bits, int) else list(bits) for n, bits in plan.weight_bits.items()},
            activation_bits=dict(plan.activation_bits),
            nonzeros=dict(plan.nonzeros),
        )

    @property
    def plan(self) -> Plan:
        """What was decided."""
        kept = {name: tuple(kept) for name, kept in self.kept.items()}
        bits = {name: each if isinstance(each, int) else tuple(each) for name, each in self.weight_bits.items()}
        return Plan(kept, bits, self.activation_bits, self.nonzeros)

    def changed(
        self,
        kept: Mapping[str, Sequence[int]] | None = None,
        weight_bits: Mapping[str, Bits] | None = None,
        activation_bits: Mapping[str, int] | None = None,
    ) -> Self:
        """This policy with some decisions made by hand; `apply(budget=)` checks what they cost.

        Raises:
            PolicyError: a name that this policy does not have, or a decision that cannot be.
        """
        tables: dict[str, Any] = {"kept": kept, "weight_bits": weight_bits, "activation_bits": activation_bits}
        fields = self.model_dump()
        for field, changes in tables.items():
            for name, value in (changes or {}).items():
                if name not in fields[field]:
                    near = difflib.get_close_matches(name, fields[field], n=3, cutoff=0.0)
                    raise PolicyError(f"{field} has no {name!r}; the nearest names are {near}")
                fields[field][name] = value if isinstance(value, int) else list(value)
        return type(self)(**fields)

    @property
    def checksum(self) -> str:
        """sha256 (hex) of the canonical JSON of all fields."""
        return checksum_of(self.model_dump(mode="json"))

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
        fields = parse_object(text, "policy")
        if (written_format := fields.get("format")) not in (1, FORMAT):
            raise PolicyError(
                f"policy has format {written_format!r}, expected {FORMAT}; read it with the version that wrote it"
            )
        written = fields.pop("checksum", None)
        if written != (computed := checksum_of(fields)):
            raise FileError(
                f"policy was altered: its checksum says {written!r}, its contents give {computed!r}. Restore the file, "
                "or build the changed plan with sbs_fx.plan.Policy(...) and save that."
            )
        if written_format == 1:  # which had one field more
            if fields.pop("grid", "symmetric") != "symmetric":
                raise PolicyError("policy has the zero-free grid of format 1, which is gone; search again")
            fields["format"] = FORMAT
        return cls(**fields)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy to `path`; all of it or nothing. Raises FileError."""
        write_atomic(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy that `save` wrote. Raises FileError or PolicyError, with the path in the message."""
        return read_as(path, "a policy.json that `save` wrote", cls.from_json)

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


def _short(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
