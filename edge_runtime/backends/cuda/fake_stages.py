"""Stages as numpy functions on the fake device: for tests of everything around the stages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from edge_runtime.backends.cuda.base import Argument, Cuda, Memory, Stream
from edge_runtime.backends.cuda.fake import FakeCuda, FakeKernel
from edge_runtime.backends.cuda.stages import DeviceStages, Work
from edge_runtime.backends.fake import StageFunction, derived
from edge_runtime.cascade import Stage
from edge_runtime.errors import BackendError, CudaError
from edge_runtime.tensors import TensorSpec


class FakeStages(DeviceStages):
    """Runs stages as numpy functions, each a kernel of the fake device.

    Args:
        functions: Stage name -> its function; other stages get one that is derived from their name.
        around: Called with a stage's name and the stream before its kernel is put there, to do what
            real stages might do and should not.
    """

    name = "fake"

    def __init__(
        self,
        functions: Mapping[str, StageFunction] | None = None,
        *,
        around: Callable[[str, Stream], None] = lambda stage, stream: None,
    ) -> None:
        self._functions = dict(functions or {})
        self._around = around
        self._memory: dict[tuple[str, int], Memory] = {}
        self._captured: dict[tuple[str, int], int] = {}
        self._closers: list[Callable[[], None]] = []
        self._stages: dict[str, Stage] = {}
        self._specs: dict[str, TensorSpec] = {}

    def open(self, cuda: Cuda, work: Work, stream: Stream) -> None:
        """Allocate the outputs, and run every stage once."""
        if not isinstance(cuda, FakeCuda):
            raise BackendError("fake stages run on the fake device only", got=cuda.name)
        self._cuda = cuda
        self._work = work
        self._stages = {stage.name: stage for stage in work.stages}
        self._specs = {spec.name: spec for stage in work.stages for spec in stage.outputs}
        for stage in work.stages:
            for spec in stage.outputs:
                slots = len(work.images) if spec.name in work.slotted else 1
                for slot in range(slots):
                    memory = cuda.memory(work.nbytes(spec))
                    self._closers.append(memory.close)
                    self._memory[spec.name, slot] = memory
        for stage in work.stages:
            for slot in work.slots_of(stage):
                self.enqueue(stage.name, slot, stream)
        stream.synchronize()

    def close(self) -> None:
        """Free the outputs and what was captured."""
        errors = []
        while self._closers:
            try:
                self._closers.pop()()
            except CudaError as error:
                errors.append(error)
        self._memory, self._captured = {}, {}
        if errors:
            raise errors[0]

    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Launch the stage's function."""
        known = self._stages[stage]
        self._around(stage, stream)
        function = self._functions.get(stage)

        def run(cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
            inputs = {spec.name: self._array(spec.name, slot) for spec in known.inputs}
            made = function(inputs) if function is not None else {}
            for spec in known.outputs:
                value = made[spec.name] if made else derived(stage, spec, inputs)
                self._array(spec.name, slot)[...] = value

        stream.launch(FakeKernel(stage, run), 1, 1, ())

    def captured(self, stage: str, slot: int) -> int:
        """Capture the launch, once."""
        slot = slot if slot in self._work.slots_of(self._stages[stage]) else 0
        if (stage, slot) not in self._captured:
            with self._cuda.stream() as stream:
                graph = stream.capture(lambda: self.enqueue(stage, slot, stream))
            self._closers.append(graph.close)
            self._captured[stage, slot] = graph.handle
        return self._captured[stage, slot]

    def address(self, tensor: str, slot: int) -> int:
        """Address of an output."""
        return self._memory[tensor, slot if tensor in self._work.slotted else 0].address

    def precision(self, stage: str) -> str:
        """The variant that was asked for, else "fp32"."""
        return self._work.variants.get(stage, "fp32")

    def _array(self, tensor: str, slot: int) -> NDArray[Any]:
        if tensor == self._work.image.name:
            spec, address = self._work.image, self._work.images[slot]
        else:
            spec, address = self._specs[tensor], self.address(tensor, slot)
        return self._cuda.array(address, spec.dtype, self._work.batch, *spec.sample_shape())
