"""Writes bundles: whole, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.errors import ConfigError
from edge_runtime.files import replacing_folder, sha256, write_json
from edge_runtime.manifest import MANIFEST, SCHEMA_VERSION, Artifact, Bundle, Manifest, StageRecord
from edge_runtime.onnx_guard import refuse_external_data
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from edge_runtime.tensors import TensorSpec


@dataclass(frozen=True)
class BuiltStage:
    """A stage and its ONNX models.

    Attributes:
        stage: Its place in the dataflow.
        models: Precision ("fp32", "fp16", "int8", ...) -> ONNX file; the first one is the default.
    """

    stage: Stage
    models: Mapping[str, bytes]

    @property
    def default(self) -> bytes:
        """The model that runs where nobody chose another."""
        return next(iter(self.models.values()))


def write_bundle(
    out: Path,
    *,
    name: str,
    classes: Sequence[str],
    image: TensorSpec,
    stages: Sequence[BuiltStage],
    exits: Sequence[Exit],
    provenance: Mapping[str, Any],
    boundary_dtype: str = "float32",
    overwrite: bool = False,
    operating_points: Sequence[OperatingPoint] = (),
) -> Bundle:
    """Write a bundle in a folder beside `out`, check it there, and move it in place.

    Args:
        out: The bundle's folder.
        name: Name of the bundle, for people.
        classes: Class names in the order of the logits.
        image: Spec of the cascade's input.
        stages: In order of execution.
        exits: In order of evaluation.
        provenance: What it was made from, as plain JSON data.
        boundary_dtype: Dtype of every floating-point tensor between stages: float32 or float16.
        overwrite: Whether a bundle that is already at `out` may be replaced. It stays whole until
            the new one is complete.
        operating_points: Points to put into the bundle; one without a bundle hash gets this one's.

    Returns:
        The bundle, opened and checked.

    Raises:
        ConfigError: The parts don't fit (see `Cascade`), a name is no file name, `out` exists and
            `overwrite` is False, or a point belongs to another bundle.
        ManifestError: A model is no ONNX file or has external data.
        EdgeRuntimeError: The disk is full, or the folder can't be written; nothing is left behind.
    """
    cascade = Cascade(tuple(classes), image, tuple(s.stage for s in stages), tuple(exits))
    for built in stages:
        for precision, model in built.models.items():
            refuse_external_data(model, f"stage {built.stage.name!r} ({precision})")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        classes=cascade.classes,
        image=image,
        boundary_dtype=boundary_dtype,
        stages=tuple(_record(built) for built in stages),
        exits=cascade.exits,
        provenance=provenance,
    )
    _check_boundaries(cascade, boundary_dtype)
    with replacing_folder(out, overwrite=overwrite) as folder:
        (folder / "stages").mkdir()
        for built, record in zip(stages, manifest.stages, strict=True):
            for precision, artifact in record.variants.items():
                (folder / artifact.file).write_bytes(built.models[precision])
        write_json(folder / MANIFEST, plain(manifest))
        bundle = Bundle.open(folder)
        for point in operating_points:
            own = dataclasses.replace(point, bundle=point.bundle or bundle.hash)
            bundle.write_operating_point(own)
    return dataclasses.replace(bundle, path=out)


def with_variants(
    bundle: Bundle,
    models: Mapping[str, Mapping[str, bytes]],
    out: Path,
    *,
    provenance: Mapping[str, Any],
    overwrite: bool = False,
) -> Bundle:
    """Write a bundle with more variants of stages; its default variants are the old one's.

    Args:
        bundle: The old bundle, which stays as it is unless it is at `out`.
        models: Stage name -> precision -> ONNX file; they come behind the stage's own variants.
        out: The new bundle's folder.
        provenance: How the variants were made, as plain JSON data.
        overwrite: Whether a bundle that is already at `out` may be replaced.

    Returns:
        The new bundle, opened and checked. Its provenance is the old one's with "made_of", the old
        hash, and `provenance` at the end of the list "conversions". It has the old operating
        points but those with a gate, which is fitted for one bundle: the variants that they name
        are the same files.

    Raises:
        ConfigError: There is no such stage, it has such a variant, nothing is added, or `out`
            exists and `overwrite` is False.
        ManifestError: A model is no ONNX file or has external data, or the old bundle or one of
            its operating points is not whole.
        EdgeRuntimeError: The disk is full, or the folder can't be written; nothing is left behind.
    """
    for stage, added in models.items():
        for precision in added:
            if precision in bundle.record(stage).variants:
                raise ConfigError(
                    f"stage {stage!r} has a variant {precision!r} already",
                    remedy="Start from a bundle without it",
                )
    if not any(models.values()):
        raise ConfigError("no variant to add")
    manifest = bundle.manifest
    stages = [
        BuiltStage(
            record.stage,
            {name: bundle.stage_model(record.name, name) for name in record.variants}
            | dict(models.get(record.name, {})),
        )
        for record in manifest.stages
    ]
    old = manifest.provenance
    made_of = {"made_of": bundle.hash}
    return write_bundle(
        out,
        name=manifest.name,
        classes=manifest.classes,
        image=manifest.image,
        stages=stages,
        exits=manifest.exits,
        provenance={
            **old,
            **made_of,
            "conversions": [*old.get("conversions", ()), {**provenance, **made_of}],
        },
        boundary_dtype=manifest.boundary_dtype,
        overwrite=overwrite,
        operating_points=[
            _carried(bundle, point)
            for point in map(bundle.operating_point, bundle.operating_points())
            if point.gate is None
        ],
    )


def _carried(bundle: Bundle, point: OperatingPoint) -> OperatingPoint:
    """A point of a bundle, for one with the same default variants."""
    chosen_on = {**point.chosen_on, "carried_from": bundle.hash}
    return dataclasses.replace(point, bundle="", chosen_on=chosen_on)


def _record(built: BuiltStage) -> StageRecord:
    stage = built.stage
    variants = {
        precision: Artifact(f"stages/{stage.name}.{precision}.onnx", sha256(model), len(model))
        for precision, model in built.models.items()
    }
    return StageRecord(stage.name, stage.kind, stage.inputs, stage.outputs, variants)


def _check_boundaries(cascade: Cascade, dtype: str) -> None:
    for stage in cascade.stages:
        for spec in stage.outputs:
            if spec.dtype.startswith("float") and spec.dtype != dtype:
                raise ConfigError(
                    f"stage {stage.name!r}: output {spec.name!r} is not of the boundary's dtype",
                    got=spec.dtype,
                    expected=dtype,
                )
