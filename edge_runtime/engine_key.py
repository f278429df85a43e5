"""What an engine depends on: the device and its software, the model, shapes and options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.errors import ConfigError
from edge_runtime.files import sha256
from edge_runtime.manifest import HASH, PRECISION, STAGE_NAME
from edge_runtime.schema import plain

#: Hex digits of a digest in a file name, and of a hash in a message.
_DIGEST = 16
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class EngineDevice:
    """What an engine runs on and was built with; "" where something does not apply.

    Attributes:
        gpu: Name of the GPU.
        compute_capability: "8.7".
        driver: Release of the GPU's driver.
        cuda: The newest CUDA that the driver knows, "12.6".
        module: "tensorrt" or "tensorrt_rtx".
        tensorrt: Version of that module, "11.4.0.106".
        system: "Linux".
        machine: Architecture of the processor, "aarch64".
    """

    gpu: str
    compute_capability: str
    driver: str
    cuda: str
    module: str
    tensorrt: str
    system: str
    machine: str

    def __post_init__(self) -> None:
        """Refuse what could not be shown on one line."""
        for name, value in plain(self).items():
            _check_printable(f"device of an engine: {name}", value)

    @property
    def digest(self) -> str:
        """Short hex digest of all fields: the name of the device's folder."""
        return digest(self)

    def differences(self, expected: EngineDevice) -> tuple[str, ...]:
        """Names of the fields in which two devices differ."""
        other = plain(expected)
        return tuple(name for name, value in plain(self).items() if value != other[name])


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that one engine depends on.

    Attributes:
        bundle: Hash of the bundle, 64 hex digits.
        stage: Name of the stage.
        precision: Its variant: "fp32", "fp16", "int8", ...
        model: sha256 of the variant's ONNX file, which has graph and weights.
        shapes: Input -> its shape, batch included.
        options: Options of the builder that change the plan.
        device: What it runs on and is built with.

    Raises:
        ConfigError: From the constructor, for names that could lead out of a folder and for shapes
            that no engine has.
    """

    bundle: str
    stage: str
    precision: str
    model: str
    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, str | int | bool]
    device: EngineDevice

    def __post_init__(self) -> None:
        """Refuse what can't be part of a path or shown on one line."""
        for name, value, pattern, expected in (
            ("bundle", self.bundle, HASH, "64 hex digits"),
            ("stage", self.stage, STAGE_NAME, "letters, digits, '_', '-' and '.'"),
            ("precision", self.precision, PRECISION, "lower-case letters, digits and '_'"),
            ("model", self.model, HASH, "64 hex digits"),
        ):
            if not pattern.fullmatch(value):
                raise ConfigError(
                    f"key of an engine: {name}", got=repr(value)[:80], expected=expected
                )
        for name, shape in self.shapes.items():
            _check_printable("key of an engine: name of an input", name)
            if not all(type(length) is int and length >= 1 for length in shape):
                raise ConfigError(
                    f"key of an engine: shape of input {name!r}",
                    got=repr(shape)[:80],
                    expected="whole numbers >= 1",
                )
        for name, option in self.options.items():
            _check_printable(f"key of an engine: option {name!r}", f"{name}{option}")

    @property
    def name(self) -> str:
        """First part of the names of its files, unique within bundle and device."""
        rest = digest({"model": self.model, "shapes": self.shapes, "options": self.options})
        return f"{self.stage}.{self.precision}.{rest}"

    def matches(self, other: EngineKey) -> bool:
        """Whether both are of the same engine; unlike `==`, an option 1 is not an option True."""
        return digest(self) == digest(other)

    def differences(self, expected: EngineKey) -> dict[str, tuple[str, str]]:
        """What differs, by name: what this key has and what is expected, as texts."""
        have, want = self._facts(), expected._facts()
        return {
            name: (_shown(have.get(name, "none")), _shown(want.get(name, "none")))
            for name in {**want, **have}
            if have.get(name) != want.get(name)
        }

    def _facts(self) -> dict[str, str]:
        return {
            "bundle": self.bundle,
            "stage": self.stage,
            "precision": self.precision,
            "model": self.model,
            **{field.replace("_", " "): value for field, value in plain(self.device).items()},
            **{f"shape of {name}": str(tuple(shape)) for name, shape in self.shapes.items()},
            **{f"option {name}": json.dumps(value) for name, value in self.options.items()},
        }


def digest(value: object) -> str:
    """Short hex digest of a dataclass or of JSON data, whatever the order of its keys."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return sha256(text.encode())[:_DIGEST]


def _shown(fact: str) -> str:
    return fact[:_SHOWN] if HASH.fullmatch(fact) else fact or "unknown"


def _check_printable(what: str, text: str) -> None:
    if not text.isprintable():
        raise ConfigError(what, got=repr(text)[:80], expected="printable text")
