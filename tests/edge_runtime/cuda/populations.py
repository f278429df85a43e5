"""The cascade of bench.gpu.kernel_stages, whose images say what each exit sees, on two fakes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bench.gpu.kernel_stages import NAN, cascade, images
from edge_runtime import Cascade, Prediction, Scheduler
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.backends.cuda.fake import FakeCuda
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.operating_point import OperatingPoint

__all__ = ["NAN", "cascade", "functions", "images", "on_device", "on_host", "said"]


def functions(of: Cascade) -> dict[str, Any]:
    """What its stages compute: everything is passed on, head k reads row k."""
    made: dict[str, Any] = {}
    for stage in of.stages:
        (source,), (target,) = stage.inputs, stage.outputs
        if stage.kind == "head":
            k = int(stage.name.removeprefix("head"))
            made[stage.name] = lambda inputs, s=source.name, t=target, k=k: {
                t.name: _logits(inputs[s][:, k]).astype(t.dtype)
            }
        else:
            made[stage.name] = lambda inputs, s=source.name, t=target.name: {t: inputs[s].copy()}
    return made


def _logits(values: np.ndarray) -> np.ndarray:
    return np.where(values == values.dtype.type(NAN), np.nan, values)


def said(prediction: Prediction) -> tuple[Any, ...]:
    """All that must not depend on the mode."""
    trace = prediction.trace
    return (
        prediction.label,
        prediction.name,
        prediction.exit,
        prediction.confidence,
        trace.ended,
        [run[:4] for run in trace.exits],
        [(run.stage, run.precision, run.batch) for run in trace.stages],
    )


def on_host(of: Cascade, point: OperatingPoint) -> Scheduler:
    """The cascade on the fake backend of the host."""
    return Scheduler(of, FakeBackend(functions(of)), point).open()


def on_device(
    of: Cascade,
    point: OperatingPoint,
    *,
    cuda: FakeCuda | None = None,
    device: Mapping[str, Any] | None = None,
    stages: FakeStages | None = None,
    clock: Any = None,
    **options: Any,
) -> Scheduler:
    """The cascade on the fake device; not opened."""
    backend = CudaBackend(
        stages or FakeStages(functions(of)),
        CudaOptions(**options),
        cuda=cuda or FakeCuda(**(device or {})),
    )
    more = {} if clock is None else {"clock": clock}
    return Scheduler(of, backend, point, **more)
