"""Stages as numpy functions on the fake device: for tests of everything around the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from edge_runtime.backends.cuda.base import Argument, Stream
from edge_runtime.backends.cuda.fake import TICK_NS, FakeCuda, FakeKernel
from edge_runtime.backends.cuda.stages import LaunchedStages
from edge_runtime.backends.fake import StageFunction, derived
from edge_runtime.errors import BackendError


class FakeStages(LaunchedStages):
    """Runs stages as numpy functions, each a kernel of the fake device.

    Args:
        functions: Stage name -> its function; other stages get one that is derived from their name.
        seconds: Stage name -> how long its kernel takes on the fake device's clock.
        around: Called with a stage's name and the stream before its kernel is put there, to do what
            real stages might do and should not.
    """

    name = "fake"

    def __init__(
        self,
        functions: Mapping[str, StageFunction] | None = None,
        *,
        seconds: Mapping[str, float] | None = None,
        around: Callable[[str, Stream], None] = lambda stage, stream: None,
    ) -> None:
        super().__init__()
        self._functions = dict(functions or {})
        self._ns = {stage: round(s * 1e9) for stage, s in (seconds or {}).items()}
        self._around = around

    def _load(self) -> None:
        if not isinstance(self._cuda, FakeCuda):
            raise BackendError("fake stages run on the fake device only", got=self._cuda.name)

    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Launch the stage's function."""
        known, function = self._stages[stage], self._functions.get(stage)
        self._around(stage, stream)

        def run(cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
            inputs = {spec.name: self._array(cuda, spec.name, slot) for spec in known.inputs}
            made = function(inputs) if function is not None else {}
            for spec in known.outputs:
                value = made[spec.name] if made else derived(stage, spec, inputs)
                self._array(cuda, spec.name, slot)[...] = value

        stream.launch(FakeKernel(stage, run, self._ns.get(stage, TICK_NS)), 1, 1, ())

    def _array(self, cuda: FakeCuda, tensor: str, slot: int) -> NDArray[Any]:
        spec = self._specs[tensor]
        shape = (self._work.batch, *spec.sample_shape())
        return cuda.array(self.address(tensor, slot), spec.dtype, *shape)
