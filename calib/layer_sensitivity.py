"""What each layer of an INT8 stage does to the exits.

One layer at a time is INT8, everything else is as in the base: the model is made in memory, run on
the data and forgotten. Nothing is written, and of a layer only its effect is kept.

```
names = stages_with_layers(bundle, "segment1,head1")
effects = layer_effects(mixes, names, thresholds, open_bundle)
worst_first(effects)[0].node              # "node_Conv_90"
```
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from calib.sensitivity import Mixes, StageEffect, compare, stages_with
from calib.tables import JudgedTable, PredictionTable, judge
from edge_runtime.errors import ConfigError
from edge_runtime.files import sha256
from edge_runtime.manifest import Artifact, Bundle, StageRecord
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler

if TYPE_CHECKING:
    from calib.layer_models import Layer, LayerModels

#: Opens any bundle at an operating point; the caller closes what it gets.
OpenBundle = Callable[[Bundle, OperatingPoint], Scheduler]

#: The precision whose layers are looked at, and the one they are compared with.
INT8, FLOAT = "int8", "fp32"
#: Images per call.
_BATCH = 64


@dataclass(frozen=True, slots=True)
class LayerEffect(StageEffect):
    """What one layer of a stage does alone, thresholds unchanged.

    Attributes:
        node: Name of the layer's node.
        operator: Its type; Add stands for the skip input of a residual one.
    """

    node: str
    operator: str


def stages_with_layers(
    bundle: Bundle,
    layers: str,
    base: Mapping[str, str] | None = None,
    stages: Sequence[str] | None = None,
) -> tuple[str, ...]:
    """Stages whose layers are asked for, each with models that can be told apart.

    Args:
        bundle: The bundle.
        layers: Names of stages with commas between them, or "all".
        base: Stage name -> precision, for stages that do not run at their first variant.
        stages: Which ones "all" are; None for all that have the variant.

    Raises:
        ConfigError: There is none, or one has no such variant, none in FP32, or an INT8 variant
            that is not made of the FP32 one; see `stages_with` too.
    """
    base = base or {}
    if layers != "all":
        stages = [name.strip() for name in layers.split(",") if name.strip()]
        if not stages:
            raise ConfigError("--layers", got=repr(layers), expected="names of stages, or all")
    records = [r for r in bundle.manifest.stages if stages is None or r.name in stages]
    with_int8 = [record for record in records if INT8 in record.variants]
    without = [record for record in with_int8 if FLOAT not in record.variants]
    if without and (layers != "all" or len(without) == len(with_int8)):
        raise _no_float(without[0])
    names = stages_with(bundle, INT8, base, stages)
    for name in names:
        layer_models(bundle, name, base)
    return names


def layer_models(bundle: Bundle, stage: str, base: Mapping[str, str]) -> LayerModels:
    """The INT8 variant of a stage, taken apart.

    Args:
        bundle: The bundle.
        stage: A stage with an INT8 variant.
        base: Stage name -> precision, for stages that do not run at their first variant.

    Raises:
        ConfigError: It is not compared with FP32, or the variant is not made of the FP32 one.
        BackendUnavailable: The package onnx is missing.
    """
    from calib.layer_models import LayerModels

    record = bundle.record(stage)
    if FLOAT not in record.variants:
        raise _no_float(record)
    if bundle.precision(stage, base) != FLOAT:
        raise ConfigError(
            f"the layers of stage {stage!r} are compared with its {FLOAT} variant; it runs at",
            got=bundle.precision(stage, base),
            remedy=f"Compare with a point that runs it at {FLOAT}",
        )
    try:
        return LayerModels(bundle.stage_model(stage, FLOAT), bundle.stage_model(stage, INT8))
    except ConfigError as error:
        raise ConfigError(f"stage {stage!r}: {error}") from error


def _no_float(record: StageRecord) -> ConfigError:
    return ConfigError(
        f"stage {record.name!r} has no {FLOAT} variant that its layers could be compared with",
        got=", ".join(record.variants),
        remedy="Start from the bundle that its INT8 variant was made of",
    )


def layer_effects(
    mixes: Mixes,
    stages: Sequence[str],
    thresholds: Mapping[str, float | None],
    open_bundle: OpenBundle,
) -> tuple[LayerEffect, ...]:
    """Run each layer of some stages alone in INT8, against the base.

    Args:
        mixes: Bundle, data, signal and base.
        stages: As `stages_with_layers` returns them.
        thresholds: Exit name -> threshold at which the base runs.
        open_bundle: Opens a bundle at an operating point.

    Returns:
        One effect per layer, in order of execution.

    Raises:
        ConfigError: See `layer_models`.
        BackendError: A stage failed.
    """
    mixes.judged({})  # with a progress of its own, before that of the layers
    total = sum(len(layer_models(mixes.bundle, stage, mixes.base).layers) for stage in stages)
    found = []
    for stage, layer, model in mixes.console.progress(_each(mixes, stages), "layer", total):
        after = run_model(mixes, stage, model, open_bundle)
        columns = compare(mixes, after, thresholds)
        found.append(LayerEffect((stage,), INT8, *columns, layer.node, layer.operator))
    return tuple(found)


def worst_first(effects: Collection[LayerEffect]) -> tuple[LayerEffect, ...]:
    """Effects in order of the labels that they change, then of who leaves elsewhere."""
    return tuple(
        sorted(
            effects,
            key=lambda e: (e.agreement_loss, 1 - e.exit_agreement, e.suffering.signal_shift),
            reverse=True,
        )
    )


def run_model(mixes: Mixes, stage: str, model: bytes, open_bundle: OpenBundle) -> JudgedTable:
    """What the exits say when a stage runs another model.

    Args:
        mixes: Bundle, data, signal and base.
        stage: The stage, which has an INT8 variant.
        model: The model that it runs, an ONNX file.
        open_bundle: Opens a bundle at an operating point.

    Raises:
        BackendError: A stage failed.
    """
    variants = {**mixes.base, stage: INT8}
    point = OperatingPoint.all_exits(mixes.bundle.cascade, variants=variants)
    with open_bundle(_with_model(mixes.bundle, stage, model), point) as scheduler:
        parts = [
            judge(
                PredictionTable(scheduler.cascade, scheduler.logits(images), labels),
                mixes.metric,
                mixes.temperatures,
            )
            for images, labels in mixes.data.batches(_BATCH)
        ]
    return JudgedTable(
        labels=np.concatenate([part.labels for part in parts]),
        signals=np.concatenate([part.signals for part in parts]),
        truth=np.concatenate([part.truth for part in parts]),
        bounds=parts[0].bounds,
    )


def _each(mixes: Mixes, stages: Sequence[str]) -> Iterator[tuple[str, Layer, bytes]]:
    """Each layer with its model; of one stage at a time."""
    for stage in stages:
        models = layer_models(mixes.bundle, stage, mixes.base)
        for layer in models.layers:
            yield stage, layer, models.build([layer.node])


@dataclass(frozen=True)
class _Altered(Bundle):
    """A bundle whose INT8 variant of one stage is a model in memory."""

    stage: str
    model: bytes

    def stage_model(self, stage: str, precision: str) -> bytes:
        """That model, or what the bundle has."""
        if (stage, precision) == (self.stage, INT8):
            return self.model
        return super().stage_model(stage, precision)


def _with_model(bundle: Bundle, stage: str, model: bytes) -> Bundle:
    """The bundle with another INT8 variant, and with a manifest and a hash that say so."""
    digest = sha256(model)

    def altered(record: StageRecord) -> StageRecord:
        if record.name != stage:
            return record
        artifact = Artifact(record.variants[INT8].file, digest, len(model))
        return replace(record, variants={**record.variants, INT8: artifact})

    manifest = replace(bundle.manifest, stages=tuple(map(altered, bundle.manifest.stages)))
    name = sha256(f"{bundle.hash} {stage} {digest}".encode())
    return _Altered(bundle.path, manifest, name, bundle.cascade, stage, model)
