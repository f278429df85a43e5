"""The bundle: an immutable folder that carries a cascade from the builder to the robot.

my.bundle/
    manifest.json                  everything below, with a hash per file
    stages/<stage>.<precision>.onnx
    operating_points/<name>.json   the one part that grows

The hash of manifest.json names the bundle: it covers every stage, since the manifest has their
hashes. A bundle is untrusted until `Bundle.open` has checked it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_runtime import schema
from edge_runtime.cascade import Cascade, Exit, Stage, StageKind
from edge_runtime.errors import ConfigError, EdgeRuntimeError, ManifestError
from edge_runtime.files import parse_json, read_plain, sha256
from edge_runtime.onnx_guard import refuse_external_data
from edge_runtime.operating_point import GateChoice, OperatingPoint
from edge_runtime.tensors import TensorSpec

if TYPE_CHECKING:
    from edge_runtime.gate_model import GateModel

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
OPERATING_POINTS = "operating_points"

#: A sha256 as hex digits.
HASH = re.compile(r"[0-9a-f]{64}")
#: Both become parts of file names, in the bundle and in the cache of engines.
STAGE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PRECISION = re.compile(r"[a-z0-9_]+")


@dataclass(frozen=True)
class Artifact:
    """One file of a bundle.

    Attributes:
        file: Path relative to the bundle, with forward slashes.
        sha256: Hex digest of its contents.
        size: Length in bytes.
    """

    file: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        """Refuse what can't be a file of the bundle."""
        if not HASH.fullmatch(self.sha256):
            raise ConfigError("sha256", got=repr(self.sha256)[:80], expected="64 hex digits")


@dataclass(frozen=True)
class StageRecord:
    """A stage as the manifest has it: its place in the dataflow, and its files.

    Attributes:
        name: As in `Stage`.
        kind: As in `Stage`.
        inputs: As in `Stage`.
        outputs: As in `Stage`.
        variants: Precision ("fp32", "fp16", "int8", ...) -> file; the first one is the default.
    """

    name: str
    kind: StageKind
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    variants: Mapping[str, Artifact]

    def __post_init__(self) -> None:
        """A stage without a file can't run, and names must not lead out of a folder."""
        if not STAGE_NAME.fullmatch(self.name):
            raise ConfigError(
                f"stage name {self.name!r}", expected="letters, digits, '_', '-' and '.'"
            )
        if not self.variants:
            raise ConfigError(f"stage {self.name!r} has no variant")
        for precision in self.variants:
            if not PRECISION.fullmatch(precision):
                raise ConfigError(
                    f"stage {self.name!r}: precision {precision!r}",
                    expected="lower-case letters, digits and '_'",
                )

    @property
    def stage(self) -> Stage:
        """The stage without its files."""
        return Stage(self.name, self.kind, self.inputs, self.outputs)


@dataclass(frozen=True)
class Manifest:
    """Contents of manifest.json.

    Attributes:
        schema_version: Version of this format; others are refused.
        name: Name of the bundle, for people.
        classes: Class names in the order of the logits.
        image: Spec of the input.
        boundary_dtype: Dtype of the floating-point tensors between stages.
        stages: In order of execution.
        exits: In order of evaluation.
        provenance: What it was made from, by which versions, and what was verified.
    """

    schema_version: int
    name: str
    classes: tuple[str, ...]
    image: TensorSpec
    boundary_dtype: str
    stages: tuple[StageRecord, ...]
    exits: tuple[Exit, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a boundary that no variant could have."""
        if self.boundary_dtype not in ("float32", "float16"):
            raise ConfigError(
                "boundary_dtype", got=repr(self.boundary_dtype), expected="float32 or float16"
            )

    @property
    def cascade(self) -> Cascade:
        """The dataflow, validated.

        Raises:
            ConfigError: The parts don't fit; see `Cascade`.
        """
        return Cascade(
            self.classes, self.image, tuple(record.stage for record in self.stages), self.exits
        )


@dataclass(frozen=True)
class Bundle:
    """A checked bundle on disk.

    Attributes:
        path: The folder.
        manifest: Its contents.
        hash: sha256 of manifest.json, the identity of the bundle.
        cascade: The validated dataflow.
    """

    path: Path
    manifest: Manifest
    hash: str
    cascade: Cascade

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Read a bundle and check every part of it: contents, paths, sizes and hashes.

        Raises:
            ManifestError: Something is missing, altered, unknown or leaves the folder.
        """
        root = Path(path)
        if not root.is_dir():
            raise ManifestError(
                f"the bundle {root} does not exist",
                remedy="Make one with: edge-runtime export CONFIG.yaml --out my.bundle",
            )
        file = _inside(root, MANIFEST)
        text = read_plain(file, "manifest")
        data = parse_json(text, f"manifest {file}")
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ManifestError(
                f"manifest {file}: schema version",
                got=repr(version)[:80],
                expected=SCHEMA_VERSION,
                remedy="The bundle is of another version of edge-runtime: export it again",
            )
        try:
            manifest = schema.read(Manifest, data, f"manifest {file}")
        except ConfigError as error:
            raise ManifestError(str(error)) from error
        try:
            cascade = manifest.cascade
        except ConfigError as error:
            raise ManifestError(f"manifest {file}: {error}") from error
        bundle = cls(root, manifest, sha256(text), cascade)
        for record in manifest.stages:
            for precision in record.variants:
                bundle.stage_model(record.name, precision)
        return bundle

    def record(self, stage: str) -> StageRecord:
        """The manifest's entry of a stage.

        Args:
            stage: Its name; or that of one of its variants, such as "segment1.int8", whose entry
                has this variant alone.

        Raises:
            ConfigError: The bundle has no such stage.
        """
        for record in self.manifest.stages:
            if record.name == stage:
                return record
        name, _, precision = stage.rpartition(".")
        for record in self.manifest.stages:
            if record.name == name and precision in record.variants:
                return replace(record, variants={precision: record.variants[precision]})
        raise ConfigError(
            f"the bundle has no stage {stage!r}",
            remedy=schema.nearest(stage, [record.name for record in self.manifest.stages]),
        )

    def precision(self, stage: str, variants: Mapping[str, str]) -> str:
        """The precision at which a stage runs.

        Args:
            stage: Name of the stage.
            variants: Choices of an operating point; others run at their first variant.

        Raises:
            ConfigError: There is no such variant.
        """
        record = self.record(stage)
        chosen = variants.get(stage, next(iter(record.variants)))
        if chosen not in record.variants:
            raise ConfigError(
                f"stage {stage!r}: variant",
                got=repr(chosen),
                expected=", ".join(record.variants),
            )
        return chosen

    def stage_model(self, stage: str, precision: str) -> bytes:
        """The ONNX model of a stage, checked on every read.

        Raises:
            ManifestError: The file is missing, altered, leaves the bundle or has external data.
        """
        artifact = self.record(stage).variants[precision]
        data = self._read(artifact)
        digest = sha256(data)
        if digest != artifact.sha256:
            raise self._altered(artifact, "sha256", digest, artifact.sha256)
        refuse_external_data(data, str(self.path / artifact.file))
        return data

    def operating_points(self) -> dict[str, Path]:
        """Files of the operating points in the bundle, by name, sorted.

        Raises:
            ManifestError: Their folder leaves the bundle.
        """
        folder = _inside(self.path, OPERATING_POINTS)
        return {path.stem: path for path in sorted(folder.glob("*.json"))}

    def operating_point(self, name: str) -> OperatingPoint:
        """Read an operating point of this bundle.

        Args:
            name: Name of a point in the bundle, or the path of a file that ends in .json.

        Raises:
            ManifestError: It is not there, not whole, or was chosen on another bundle.
        """
        points = self.operating_points()
        if name.endswith(".json"):
            path = Path(name)
        elif name in points:
            path = _inside(self.path, OPERATING_POINTS, points[name].name)
        else:
            raise ManifestError(
                f"the bundle {self.path} has no operating point {name!r}",
                remedy=f"{schema.nearest(name, points)}. Choose some with: "
                f"edge-runtime thresholds {self.path} --data DIR",
            )
        point = OperatingPoint.from_file(path)
        if point.bundle and point.bundle != self.hash:
            raise ManifestError(
                f"operating point {path} was chosen on another bundle",
                got=point.bundle[:12],
                expected=self.hash[:12],
                remedy=f"Choose it again with: edge-runtime thresholds {self.path} --data DIR",
            )
        return point

    def write_operating_point(self, point: OperatingPoint) -> Path:
        """Write a point into the bundle, atomically; a point of the same name is replaced.

        Returns:
            The file that was written.

        Raises:
            ConfigError: The point belongs to another bundle, or does not fit this cascade or its
                variants.
            ManifestError: The folder of operating points leaves the bundle.
            EdgeRuntimeError: The file can't be written; an old one of this name is still there.
        """
        if point.bundle != self.hash:
            raise ConfigError(
                f"operating point {point.name!r}: bundle",
                got=repr(point.bundle[:12]),
                expected=self.hash[:12],
            )
        point.policy_for(self.cascade)
        for stage in point.variants:
            self.precision(stage, point.variants)
        folder = _inside(self.path, OPERATING_POINTS)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise EdgeRuntimeError(f"{folder} can't be made: {error.strerror}") from error
        path = folder / f"{point.name}.json"
        point.write(path)
        return path

    def gate(self, choice: GateChoice) -> GateModel:
        """A fitted gate of this bundle.

        Raises:
            ManifestError: Its file is missing, altered or not whole.
            ConfigError: It was fitted for another bundle.
        """
        path = _inside(self.path, OPERATING_POINTS, choice.file)
        data = read_plain(path, "gate")
        if sha256(data) != choice.sha256:
            raise ManifestError(
                f"gate {path} was altered: sha256",
                got=sha256(data),
                expected=choice.sha256,
                remedy=f"Restore it, or fit it again: edge-runtime gate fit {self.path}",
            )
        from edge_runtime.gate_model import GateModel

        model = GateModel.read(path)
        model.check(self.hash, self.cascade)
        return model

    def _read(self, artifact: Artifact) -> bytes:
        """Read a file of the bundle, refusing every path that could lead out of it."""
        parts = artifact.file.split("/")
        if artifact.file.startswith("/") or "\\" in artifact.file or ".." in parts:
            raise ManifestError(
                f"manifest {self.path / MANIFEST}: the path {artifact.file!r} leaves the bundle"
            )
        try:
            path = _inside(self.path, *parts)
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise ManifestError(f"{path} is not a plain file")
            if info.st_size != artifact.size:
                raise self._altered(artifact, "size", info.st_size, artifact.size)
            return path.read_bytes()
        except FileNotFoundError as error:
            raise ManifestError(
                f"{path} is missing", remedy="Restore it or export the bundle again"
            ) from error
        except (OSError, ValueError) as error:
            raise ManifestError(f"{self.path}: {artifact.file!r} can't be read: {error}") from error

    def _altered(
        self, artifact: Artifact, what: str, got: object, expected: object
    ) -> ManifestError:
        return ManifestError(
            f"{self.path / artifact.file} was altered: {what}",
            got=got,
            expected=expected,
            remedy="Restore the file or export the bundle again",
        )


def _inside(root: Path, *parts: str) -> Path:
    """A path inside the bundle, refusing links, which could lead out of it."""
    path = root
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ManifestError(
                f"{path} is a symbolic link; a bundle holds plain files only",
                remedy="Copy what it points to into its place, or export the bundle again",
            )
    return path
