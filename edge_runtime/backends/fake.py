"""A deterministic backend without any model: for tests, demos of the scheduler, and its own cost.

Every stage is a pure function of its inputs, sample by sample, so results do not depend on the
batch. Time passes only on the clock that is handed in.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.base import HostBackend
from edge_runtime.cascade import Plan, Stage
from edge_runtime.errors import BackendError
from edge_runtime.tensors import TensorSpec
from edge_runtime.timing import FakeClock

#: Computes the outputs of one stage, name -> (batch, ...), from its inputs.
StageFunction = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


class FakeBackend(HostBackend):
    """Runs stages as numpy functions.

    Args:
        functions: Stage name -> its function; other stages get one that is derived from their name.
        seconds: Stage name -> how long it takes per run, in seconds on `clock`.
        clock: The clock that `seconds` move forward.
    """

    name = "fake"

    def __init__(
        self,
        functions: Mapping[str, StageFunction] | None = None,
        *,
        seconds: Mapping[str, float] | None = None,
        clock: FakeClock | None = None,
    ) -> None:
        super().__init__()
        self._functions = dict(functions or {})
        self._seconds = dict(seconds or {})
        self._clock = clock
        self._stages: dict[str, Stage] = {}
        self._variants: dict[str, str] = {}

    def _open(self, plan: Plan, axes: Mapping[str, int], variants: Mapping[str, str]) -> None:
        self._stages = self._declare(plan, axes)
        self._variants = dict(variants)

    def close(self) -> None:
        """Forget stages and buffers."""
        super().close()
        self._stages = {}

    def precision(self, stage: str) -> str:
        """The variant that was asked for, else "fp32"."""
        return self._variants.get(stage, "fp32")

    def run(self, stage: str) -> None:
        """Apply the stage's function and let its time pass."""
        known = self._stages.get(stage)
        if known is None:
            raise BackendError(f"stage {stage!r} was not opened", stage=stage)
        inputs = {spec.name: self._view(spec.name) for spec in known.inputs}
        function = self._functions.get(stage)
        if function is not None:
            outputs = function(inputs)
            for spec in known.outputs:
                self._view(spec.name)[...] = outputs[spec.name]
        else:
            for spec in known.outputs:
                self._view(spec.name)[...] = derived(stage, spec, inputs)
        if self._clock is not None:
            self._clock.advance(self._seconds.get(stage, 0.0))


def derived(stage: str, spec: TensorSpec, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """What a stage without a function computes.

    Smooth waves over the output's elements, their phase set by each sample's mean input.
    """
    phase = sum(
        value.reshape(len(value), -1).mean(axis=1, dtype=np.float64) for value in inputs.values()
    )
    elements = int(np.prod(spec.sample_shape()))
    seed = zlib.crc32(f"{stage}/{spec.name}".encode()) / 2**32
    wave = np.sin(np.outer(phase, 1 + np.arange(elements) % 97) + 7 * seed) * 3
    shape = (len(wave), *spec.sample_shape())
    return wave.reshape(shape).astype(spec.dtype)
