"""The small CUDA interface: all that the scheduler needs of a GPU, and nothing else.

Two packages implement it, cuda-core (`core`) and pycuda (`pycuda`), and a fake (`fake`) that
executes on the CPU and refuses what CUDA forbids. Everything happens in the device's primary
context, which torch and TensorRT use too, so that addresses mean the same to all of them.

Work is asynchronous: what is put on a stream runs later, in order, and reads its arguments then.
Whoever enqueues keeps memory and kernels alive until the stream has been waited for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import BackendUnavailable, CudaError

#: What a kernel takes: addresses and handles as `numpy.uint64`, numbers as the numpy scalar of
#: their width, and a `Condition`.
Argument = Any


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceFacts:
    """What a GPU is.

    Attributes:
        name: As the driver gives it.
        index: Among the devices that this process sees.
        compute_capability: (major, minor), (8, 7) on Orin.
        driver: CUDA version of the driver, (major, minor).
        integrated: Whether it shares the host's memory, as on a Jetson.
        memory_bytes: Size of its memory.
    """

    name: str
    compute_capability: tuple[int, int]
    driver: tuple[int, int]
    integrated: bool
    memory_bytes: int
    index: int = 0


class Resource(ABC):
    """Something that the driver made for us; closing it twice is allowed."""

    @abstractmethod
    def close(self) -> None:
        """Free it.

        Raises:
            CudaError: The driver refused; it counts as closed all the same.
        """

    def __enter__(self) -> Any:
        """The resource itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()


class Memory(Resource):
    """Device memory, zeroed.

    Attributes:
        address: As the device sees it; aligned to 256 bytes.
        nbytes: Size.
    """

    address: int
    nbytes: int


class MappedMemory(Memory):
    """Pinned host memory that the device can read and write, zeroed.

    Attributes:
        host: The same bytes for the host, shape (nbytes,), uint8. No view of it may be used after
            `close`.
    """

    host: NDArray[np.uint8]


class Event(Resource):
    """A moment on a stream."""


class Stream(Resource):
    """A queue of work that does not wait for the default stream.

    Attributes:
        handle: The native CUstream as a number, for torch and TensorRT.
    """

    handle: int

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until all its work is done.

        Raises:
            CudaError: Some of the work failed.
        """

    @abstractmethod
    def is_done(self) -> bool:
        """Whether all its work is done, without waiting.

        Raises:
            CudaError: Some of the work failed.
        """

    @abstractmethod
    def record(self, event: Event) -> None:
        """Let `event` stand for all work that was put here so far."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """Let later work here wait for what `event` stands for now."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two addresses, each of device or mapped memory."""

    @abstractmethod
    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """Run a kernel on `grid` blocks of `block` threads."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Record the work that `work` puts here instead of running it.

        The capture is thread-local: other threads are not disturbed.

        Raises:
            CudaError: `work` did what can't be captured, such as waiting or allocating.
            BackendUnavailable: This implementation has no graphs.
        """


class Kernel(ABC):
    """A compiled kernel."""

    name: str


class Condition:
    """Decides whether one branch of a graph runs; 0 (no) at the begin of every launch.

    Passed to a kernel it is the 64-bit handle for `cudaGraphSetConditional`.
    """


class CapturedGraph(Resource):
    """Recorded work that can be embedded into other graphs.

    Attributes:
        handle: The native CUgraph as a number.
    """

    handle: int


class Body(ABC):
    """Nodes that run one after another: a whole graph, or a branch of one."""

    @abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Add a copy, as `Stream.copy`."""

    @abstractmethod
    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """Add a kernel, as `Stream.launch`; its arguments may hold conditions."""

    @abstractmethod
    def embed(self, graph: int) -> None:
        """Add a copy of a native graph, given by its handle."""

    @abstractmethod
    def branch(self, condition: Condition) -> Body:
        """Add a branch that runs if a kernel before it has set `condition`; returns its body.

        It must not stay empty: before CUDA 12.8 an empty branch hangs the device.
        """


class Graph(Body, Resource):
    """A graph under construction; `instantiate` ends it."""

    @abstractmethod
    def condition(self) -> Condition:
        """A new condition; it belongs to one `branch` of this graph, at any depth."""

    @abstractmethod
    def instantiate(self) -> ExecutableGraph:
        """Make the graph executable; it may be closed afterwards."""


class ExecutableGraph(Resource):
    """A graph that can be launched again and again, though not twice at the same time."""

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Put the whole graph on a stream."""

    @abstractmethod
    def upload(self, stream: Stream) -> None:
        """Prepare the first launch."""


class Cuda(ABC):
    """One GPU in its primary context. The constructor stores; `open` does the work."""

    #: Name of the implementation, as users write it.
    name: ClassVar[str]
    facts: DeviceFacts

    @abstractmethod
    def open(self) -> Cuda:
        """Find the device and make its primary context current on this thread.

        Returns:
            Itself.

        Raises:
            BackendUnavailable: The package, the driver or the device is missing, or too old.
            CudaError: Another context is current on this thread.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the context; everything made here must be closed before."""

    @abstractmethod
    def make_current(self) -> None:
        """Make the context current on the calling thread, which every thread needs once."""

    @abstractmethod
    def why_no_graphs(self) -> str:
        """Why graphs with conditions can't be built here; empty where they can."""

    @abstractmethod
    def memory(self, nbytes: int) -> Memory:
        """Allocate device memory."""

    @abstractmethod
    def mapped_memory(self, nbytes: int) -> MappedMemory:
        """Allocate pinned host memory that the device can reach."""

    @abstractmethod
    def stream(self) -> Stream:
        """A new stream."""

    @abstractmethod
    def event(self) -> Event:
        """A new event, with timing."""

    @abstractmethod
    def seconds_between(self, start: Event, end: Event) -> float:
        """Time between two recorded events whose work is done."""

    @abstractmethod
    def kernels(
        self, source: str, names: Sequence[str], *, conditionals: bool = False
    ) -> dict[str, Kernel]:
        """Compile CUDA C++ for this device.

        Args:
            source: The text; its kernels are `extern "C"`.
            names: Kernels to take from it.
            conditionals: Whether kernels call `cudaGraphSetConditional`, which the source declares
                where the macro GRAPH_CONDITIONALS is defined.

        Returns:
            Name -> kernel.

        Raises:
            CudaError: The compiler refused; its first error is in the message.
        """

    @abstractmethod
    def graph(self) -> Graph:
        """A new, empty graph.

        Raises:
            BackendUnavailable: See `why_no_graphs`.
        """


#: What a driver's error means and how to go on, by the name of its code without CUDA_ERROR_.
_REMEDIES = {
    "OUT_OF_MEMORY": "Close other programs on the GPU, or open fewer stages or a smaller batch",
    "NO_DEVICE": "nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide them",
    "INSUFFICIENT_DRIVER": "Update the NVIDIA driver",
    "INVALID_CONTEXT": "Open and use the cascade in one process, and don't fork after opening",
    "CONTEXT_IS_DESTROYED": "Something reset the device: open the cascade again in a new process",
    "STREAM_CAPTURE_UNSUPPORTED": "A stage does what CUDA can't capture: it waits, or allocates",
    "STREAM_CAPTURE_INVALIDATED": "A stage does what CUDA can't capture: it waits, or allocates",
    "STREAM_CAPTURE_IMPLICIT": "A stage uses the default stream: let it use the stream it is given",
}
#: Codes after which every further call of the process fails.
_LOST = {
    "ILLEGAL_ADDRESS",
    "ILLEGAL_INSTRUCTION",
    "MISALIGNED_ADDRESS",
    "INVALID_ADDRESS_SPACE",
    "INVALID_PC",
    "HARDWARE_STACK_ERROR",
    "LAUNCH_FAILED",
    "LAUNCH_TIMEOUT",
    "ASSERT",
    "ECC_UNCORRECTABLE",
    "UNKNOWN",
    "DEVICE_UNAVAILABLE",
    "SYSTEM_DRIVER_MISMATCH",
}


def native_error(what: str, code: str, explanation: str) -> CudaError:
    """The one place where a refused call becomes an error of ours; raise it from the native one.

    Args:
        what: What was being done: "allocating 512 bytes".
        code: The driver's name for the error, with or without "CUDA_ERROR_".
        explanation: The driver's description.
    """
    short = code.removeprefix("CUDA_ERROR_")
    remedy = _REMEDIES.get(short)
    if short in _LOST:
        remedy = "The device is lost to this process: start it anew"
    return CudaError(f"{what}: CUDA says: {short}: {explanation}".rstrip(": "), remedy=remedy)


def no_graphs(cuda: Cuda) -> BackendUnavailable:
    """The error for a graph that can't be built."""
    return BackendUnavailable(
        f"{cuda.name} can't build CUDA graphs here: {cuda.why_no_graphs()}",
        remedy="The modes polling and sync need none: mode='polling'",
    )
