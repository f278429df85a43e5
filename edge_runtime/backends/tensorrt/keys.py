"""Which engine a stage needs: the same answer for whoever builds it and whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.cascade import Stage
from edge_runtime.engine_cache import EngineDevice, EngineKey
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.tensors import BATCH, TensorSpec

#: The variant of a preprocessing stage that TensorRT takes: it casts the image before all else.
CAST_FIRST = "fp32_cast_first"


def precision_of(bundle: Bundle, stage: Stage, variants: Mapping[str, str]) -> str:
    """The precision at which TensorRT runs a stage.

    Args:
        bundle: The bundle.
        stage: One of its stages.
        variants: Stage name -> precision, as an operating point has them. A preprocessing stage
            that is not named runs at `CAST_FIRST` where it exists, any other at its first variant.

    Raises:
        ConfigError: There is no such variant.
    """
    own = bundle.record(stage.name).variants
    if stage.kind == "preprocess" and stage.name not in variants and CAST_FIRST in own:
        return CAST_FIRST
    return bundle.precision(stage.name, variants)


def shape_of(spec: TensorSpec, stage: str, batch: int) -> tuple[int, ...]:
    """The shape of a boundary tensor in an engine.

    Args:
        spec: The tensor; every axis but the batch has its length.
        stage: Name of the stage, for the error.
        batch: Samples of every run.

    Raises:
        ConfigError: The stage takes one sample at a time, and `batch` is larger.
    """
    if spec.shape[0] != BATCH and spec.shape[0] != batch:
        raise ConfigError(
            f"stage {stage!r} takes one sample at a time",
            got=f"batch {batch}",
            expected=1,
            remedy="Export it with a symbolic batch, or use batch 1",
        )
    return (batch, *spec.sample_shape())


def engine_key(
    bundle: Bundle,
    stage: Stage,
    precision: str,
    *,
    batch: int,
    device: EngineDevice,
    options: Mapping[str, str | int | bool] | None = None,
) -> EngineKey:
    """All that the engine of a stage depends on.

    Args:
        bundle: The bundle.
        stage: One of its stages; every axis but the batch has its length.
        precision: The precision, see `precision_of`.
        batch: Samples of every run.
        device: What it runs on.
        options: Options of the builder that are not the default.

    Raises:
        ConfigError: See `shape_of`.
    """
    record = bundle.record(stage.name)
    return EngineKey(
        bundle=bundle.hash,
        stage=record.name,
        precision=precision,
        model=record.variants[precision].sha256,
        shapes={spec.name: shape_of(spec, stage.name, batch) for spec in stage.inputs},
        options=dict(options or {}),
        device=device,
    )
