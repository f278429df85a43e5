"""One object that says how a bundle is to be run: policy, thresholds, temperatures, variants.

It also carries what it was chosen on and what to expect of it, so that a number never travels
without its origin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime import policy as policies
from edge_runtime import schema
from edge_runtime.cascade import Cascade
from edge_runtime.confidence import METRICS, Metric, bounds
from edge_runtime.errors import ConfigError, ManifestError
from edge_runtime.files import read_json, write_json

SCHEMA_VERSION = 1

# Signals are compared, and logits divided, in float32.
_SMALLEST = float(np.finfo(np.float32).tiny)
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class GateChoice:
    """A fitted gate, and how it weighs cost against errors.

    Attributes:
        file: Name of its file among the bundle's operating points.
        sha256: Hex digest of that file.
        cost: Column of costs that the gate has of its paths: "bit_operations", "macs", "latency".
        trade_off: lambda: probability of error that the dearest path is worth; >= 0.

    Raises:
        ConfigError: From the constructor, for a file that is none, or lambda negative or NaN.
    """

    file: str
    sha256: str
    cost: str
    trade_off: float

    def __post_init__(self) -> None:
        """Refuse what no gate could have."""
        if not _is_plain_name(self.file) or not self.file.endswith(".npz"):
            raise ConfigError("file of a gate", got=repr(self.file)[:80], expected="a plain .npz")
        if not 0 <= self.trade_off <= _LARGEST:
            raise ConfigError("lambda", got=self.trade_off, expected="a finite number >= 0")


@dataclass(frozen=True)
class OperatingPoint:
    """How to run a cascade.

    Attributes:
        name: Name of the point, also of its file in the bundle.
        policy: The rule, one of `policy.POLICIES`.
        metric: The signal that exits are judged by.
        thresholds: Exit name -> threshold of the signal. An exit that is absent or null can't
            fire and is pruned; the last exit needs none.
        temperatures: Exit name -> temperature of its logits, 1 where absent.
        patience: For the policies that count exits in a row; >= 1.
        variants: Stage name -> precision, for stages that do not run at their first variant.
        gate: Of the policy "gate", which needs it.
        bundle: Hash of the bundle it was chosen on; empty for a point made by hand.
        chosen_on: Provenance: data hash and size, device, method, seed.
        expected: Figures that were found when it was chosen (accuracy, exit rates, cost, ...).
        schema_version: Version of this file format.

    Raises:
        ConfigError: From the constructor, for values that no cascade could run.
    """

    name: str
    policy: policies.PolicyKind = "threshold"
    metric: Metric = "max_softmax"
    thresholds: Mapping[str, float | None] = field(default_factory=dict)
    temperatures: Mapping[str, float] = field(default_factory=dict)
    patience: int = 1
    variants: Mapping[str, str] = field(default_factory=dict)
    gate: GateChoice | None = None
    bundle: str = ""
    chosen_on: Mapping[str, Any] = field(default_factory=dict)
    expected: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        """Refuse what no cascade could run."""
        if not _is_plain_name(self.name):
            raise ConfigError(
                "name of an operating point",
                got=repr(self.name),
                expected="a plain file name without .json",
            )
        if self.schema_version != SCHEMA_VERSION:
            raise _wrong_version(f"operating point {self.name!r}", self.schema_version)
        if self.metric not in METRICS:
            raise ConfigError("metric", got=repr(self.metric), expected=", ".join(METRICS))
        if self.policy not in policies.POLICIES:
            raise ConfigError(
                "policy", got=repr(self.policy), expected=", ".join(policies.POLICIES)
            )
        policies.check_patience(self.patience)
        if (self.gate is None) == (self.policy == "gate"):
            raise ConfigError(
                f"operating point {self.name!r}: gate",
                got="none" if self.gate is None else self.gate.file,
                expected=f"{'one' if self.gate is None else 'none'} for the policy {self.policy}",
            )
        for exit_name, threshold in self.thresholds.items():
            if threshold is not None and not abs(threshold) <= _LARGEST:
                raise ConfigError(
                    f"threshold of exit {exit_name!r}",
                    got=threshold,
                    expected="a float32 number, or null where the exit can't fire",
                )
        for exit_name, temperature in self.temperatures.items():
            if not _SMALLEST <= temperature <= _LARGEST:
                raise ConfigError(
                    f"temperature of exit {exit_name!r}",
                    got=temperature,
                    expected="a float32 number > 0",
                )

    def policy_for(self, cascade: Cascade) -> policies.Policy:
        """The rule for a cascade, with thresholds in the order of its exits.

        Raises:
            ConfigError: A threshold or temperature names an exit, or a variant a stage, that the
                cascade lacks.
        """
        names = [exit_.name for exit_ in cascade.exits]
        self._check_names("exit", (*self.thresholds, *self.temperatures), names)
        self._check_names("stage", self.variants, [stage.name for stage in cascade.stages])
        lowest, highest = bounds(self.metric, len(cascade.classes))
        early = tuple(self._usable(name, highest) for name in names[:-1])
        if self.policy == "never" or (self.policy == "threshold" and not any_set(early)):
            return policies.Never()
        if self.policy == "threshold":
            return policies.Threshold(early, lowest)
        if self.policy == "gate":
            return policies.Gated()
        if self.policy == "patience":
            return policies.Patience(self.patience)
        return policies.PatientAndConfident(early, self.patience)

    def _check_names(self, what: str, used: Iterable[str], valid: Sequence[str]) -> None:
        for name in used:
            if name not in valid:
                raise ConfigError(
                    f"operating point {self.name!r}: the cascade has no {what} {name!r}",
                    remedy=schema.nearest(name, valid),
                )

    def _usable(self, exit_name: str, highest: float) -> float | None:
        """The threshold of an exit, None where no signal can reach it."""
        threshold = self.thresholds.get(exit_name)
        return None if threshold is None or threshold > highest else threshold

    @classmethod
    def forced(cls, cascade: Cascade, exit_name: str, **options: Any) -> OperatingPoint:
        """The point at which every sample leaves at one exit, and only its stages are run."""
        names = [exit_.name for exit_ in cascade.exits]
        if exit_name not in names:
            raise ConfigError(
                f"the cascade has no exit {exit_name!r}", remedy=schema.nearest(exit_name, names)
            )
        point = cls(name=f"forced-{exit_name}", **options)
        if exit_name == names[-1]:
            return replace(point, policy="never")
        lowest, _ = bounds(point.metric, len(cascade.classes))
        return replace(point, thresholds={exit_name: lowest})

    @classmethod
    def all_exits(cls, cascade: Cascade, **options: Any) -> OperatingPoint:
        """The point at which every exit is evaluated and no sample leaves before the last."""
        unreachable = float(np.finfo(np.float32).max)
        thresholds = {exit_.name: unreachable for exit_ in cascade.exits[:-1]}
        return cls(name="all-exits", metric="logits_margin", thresholds=thresholds, **options)

    def write(self, path: Path) -> None:
        """Write the point as JSON, atomically."""
        write_json(path, schema.plain(self))

    @classmethod
    def from_file(cls, path: Path) -> OperatingPoint:
        """Read a point that `write` wrote.

        Raises:
            ManifestError: The file is missing, is not JSON or has other contents.
        """
        where = f"operating point {path}"
        data = read_json(path, "operating point")
        try:
            # First: another version may have other keys.
            version = data.get("schema_version") if isinstance(data, dict) else None
            if isinstance(version, int) and version != SCHEMA_VERSION:
                raise _wrong_version(where, version)
            return schema.read(cls, data, where)
        except ConfigError as error:
            raise ManifestError(str(error)) from error

    def to_json(self) -> str:
        """The point as indented JSON text."""
        return json.dumps(schema.plain(self), indent=2)


def any_set(thresholds: tuple[float | None, ...]) -> bool:
    """Whether at least one exit can fire."""
    return any(threshold is not None for threshold in thresholds)


def _is_plain_name(name: str) -> bool:
    """Whether a name is one file on every system, and not taken for the path of a file."""
    return (
        name.isprintable()
        and name == name.strip()
        and not any(c in name for c in "/\\")
        and not name.startswith(".")
        and not name.endswith(".json")
        and 0 < len(name.encode("utf-8", "replace")) <= 200
    )


def _wrong_version(where: str, version: int) -> ConfigError:
    return ConfigError(
        f"{where}: schema version",
        got=version,
        expected=SCHEMA_VERSION,
        remedy="It was written by another version of edge-runtime: choose it again",
    )
