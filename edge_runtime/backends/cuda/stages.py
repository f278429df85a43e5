"""What brings the work between the image and the logits: torch modules, TensorRT engines.

The modes put stages on a stream one by one, or embed what they captured into one graph; both are
asked of the same object. Boundary tensors belong to it and keep their addresses until it is closed.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edge_runtime.backends.cuda.base import Cuda, Memory, Stream
from edge_runtime.cascade import Stage
from edge_runtime.errors import CudaError
from edge_runtime.tensors import TensorSpec


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is to be prepared.

    Attributes:
        stages: In order of execution; every axis but the batch has its length.
        variants: Stage name -> precision, for stages that don't run at their first variant.
        batch: Samples that every run takes.
        image: Spec of the cascade's input.
        images: Device address of the image in each slot. With two slots a frame is brought to the
            device while another is in flight.
        ahead: Names of the stages that run as soon as the image has arrived, on a stream of their
            own where there are two slots. Their outputs exist once per slot.
    """

    stages: tuple[Stage, ...]
    variants: Mapping[str, str]
    batch: int
    image: TensorSpec
    images: tuple[int, ...]
    ahead: frozenset[str]

    @property
    def slotted(self) -> frozenset[str]:
        """Names of the tensors that exist once per slot."""
        made = (s.outputs for s in self.stages if s.name in self.ahead)
        return frozenset({self.image.name, *(spec.name for specs in made for spec in specs)})

    def slots_of(self, stage: Stage) -> range:
        """The slots for which a stage differs: all where it reads or writes a slotted tensor."""
        named = {spec.name for spec in (*stage.inputs, *stage.outputs)}
        return range(len(self.images) if named & self.slotted else 1)

    def nbytes(self, spec: TensorSpec) -> int:
        """Size of a tensor for the whole batch."""
        return self.batch * sample_nbytes(spec)


class DeviceStages(ABC):
    """Stages that run on a CUDA stream."""

    #: Name of the backend, as traces give it.
    name: ClassVar[str]

    @abstractmethod
    def open(self, cuda: Cuda, work: Work, stream: Stream) -> None:
        """Load every stage, and run each once on `stream`, so that nothing is allocated later.

        Raises:
            BackendError: A stage can't be loaded or run; `close` frees what was loaded.
            ConfigError: A stage or variant does not exist.
        """

    @abstractmethod
    def close(self) -> None:
        """Free everything, any number of times."""

    @abstractmethod
    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Put one stage on a stream; it reads and writes the tensors of `slot`."""

    @abstractmethod
    def captured(self, stage: str, slot: int) -> int:
        """The stage as a native CUgraph, captured once; valid until `close`.

        Raises:
            BackendError: The stage does what CUDA can't capture.
        """

    @abstractmethod
    def address(self, tensor: str, slot: int) -> int:
        """Device address of a boundary tensor, shape (batch, ...), contiguous."""

    @abstractmethod
    def precision(self, stage: str) -> str:
        """The precision at which a stage was loaded."""


class LaunchedStages(DeviceStages):
    """Stages that put their work on a stream: brings them their outputs, and captures them."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._memory: dict[tuple[str, int], Memory] = {}
        self._captured: dict[tuple[str, int], int] = {}
        self._stages: dict[str, Stage] = {}
        self._specs: dict[str, TensorSpec] = {}

    def open(self, cuda: Cuda, work: Work, stream: Stream) -> None:
        """Allocate the outputs, load, and run every stage once."""
        self._cuda, self._work = cuda, work
        self._stages = {stage.name: stage for stage in work.stages}
        self._specs = {work.image.name: work.image}
        for stage in work.stages:
            for spec in stage.outputs:
                self._specs[spec.name] = spec
                for slot in range(len(work.images) if spec.name in work.slotted else 1):
                    if (spec.name, slot) in self._memory:
                        continue  # Another variant of the stage writes it too.
                    memory = self._stack.enter_context(cuda.memory(work.nbytes(spec)))
                    self._memory[spec.name, slot] = memory
        try:
            self._load()
            for stage in work.stages:
                for slot in work.slots_of(stage):
                    self.enqueue(stage.name, slot, stream)
            stream.synchronize()
        except BaseException:
            # Nothing may go before what was put on the stream is done.
            with contextlib.suppress(CudaError):
                stream.synchronize()
            raise

    @abstractmethod
    def _load(self) -> None:
        """Get ready for `enqueue`; what `_stack` is given is closed by `close`."""

    def close(self) -> None:
        """Free the outputs and what was captured."""
        self._memory, self._captured = {}, {}
        stack, self._stack = self._stack, ExitStack()
        stack.close()

    def captured(self, stage: str, slot: int) -> int:
        """Capture what `enqueue` does, once."""
        slot = slot if slot in self._work.slots_of(self._stages[stage]) else 0
        if (stage, slot) not in self._captured:
            with self._cuda.stream() as stream:
                graph = stream.capture(lambda: self.enqueue(stage, slot, stream))
            self._stack.enter_context(graph)
            self._captured[stage, slot] = graph.handle
        return self._captured[stage, slot]

    def address(self, tensor: str, slot: int) -> int:
        """Address of an output, or of the image."""
        if tensor == self._work.image.name:
            return self._work.images[slot]
        return self._memory[tensor, slot if tensor in self._work.slotted else 0].address

    def precision(self, stage: str) -> str:
        """The variant that was asked for, else "fp32"."""
        return self._work.variants.get(stage, "fp32")


def sample_nbytes(spec: TensorSpec) -> int:
    """Size of one sample of a tensor."""
    elements = int(np.prod(spec.sample_shape(), dtype=np.int64))
    return elements * np.dtype(spec.dtype).itemsize
