"""A cascade whose images carry the logits of every exit, so that a test says what an exit sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_runtime import Cascade, Exit, Scheduler, Stage, TensorSpec
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions
from edge_runtime.backends.cuda.fake import FakeCuda
from edge_runtime.backends.cuda.fake_stages import FakeStages
from edge_runtime.backends.fake import FakeBackend
from edge_runtime.operating_point import OperatingPoint

#: A pixel of this value is a logit that is not a number: images themselves must be finite.
NAN = np.float32(1e30)


def cascade(exits: int = 4, classes: int = 5, dtype: str = "float32") -> Cascade:
    """Preprocess, then a segment and a head per exit."""
    image = TensorSpec("image", ("batch", exits, classes), "float32")
    pixels = TensorSpec("pixels", ("batch", exits, classes), "float32")
    stages = [Stage("preprocess", "preprocess", (image,), (pixels,))]
    found, before = [], pixels
    for k in range(exits):
        after = TensorSpec(f"features{k}", ("batch", exits, classes), "float32")
        logits = TensorSpec(f"logits{k}", ("batch", classes), dtype)
        stages.append(Stage(f"segment{k}", "segment", (before,), (after,)))
        stages.append(Stage(f"head{k}", "head", (after,), (logits,)))
        found.append(Exit(f"exit{k}", logits.name))
        before = after
    names = tuple(f"class{i}" for i in range(classes))
    return Cascade(names, image, tuple(stages), tuple(found))


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
    return np.where(values == NAN, np.float32(np.nan), values)


def images(of: Cascade, count: int, *, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    """Random logits for every exit, shape (count, exits, classes)."""
    shape = (count, *of.image.sample_shape())
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


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
