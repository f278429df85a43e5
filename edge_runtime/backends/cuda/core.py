"""The CUDA interface by cuda-core, NVIDIA's Python package.

cuda-core makes streams, events, kernels and graphs. What it has no way for, such as zeroed and
mapped memory, or a foreign graph as a child, is done by the driver's own calls in cuda-bindings,
and only by those whose signature is the same in CUDA 12 and 13. Stream capture is among them:
cuda-core's builder owns the graph while it is still being captured, and would destroy it a second
time where CUDA has dropped it because the capture became invalid.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda.base import (
    Argument,
    Body,
    CapturedGraph,
    Condition,
    Cuda,
    DeviceFacts,
    Event,
    ExecutableGraph,
    Graph,
    Kernel,
    MappedMemory,
    Memory,
    Stream,
    native_error,
    no_graphs,
)
from edge_runtime.errors import BackendUnavailable, CudaError, missing_package

#: The first CUDA version of a driver that runs anything of ours, and conditional nodes.
OLDEST_DRIVER = (12, 0)
OLDEST_DRIVER_FOR_GRAPHS = (12, 4)

#: (source, architecture, conditionals) -> code; compiling takes some tenths of a second, and
#: opening a cascade needs the same kernels twice.
_cubins: dict[tuple[str, str, bool], bytes] = {}
#: The same, loaded. cuda-core never unloads what it has loaded, so nothing is loaded twice.
_loaded: dict[tuple[str, str, bool], Any] = {}


class CudaCore(Cuda):
    """One GPU by cuda-core.

    Args:
        device: Index of the device, among those that CUDA_VISIBLE_DEVICES leaves.
    """

    name: ClassVar[str] = "cuda-core"

    def __init__(self, device: int = 0) -> None:
        self._index = device
        # A _Native, cuda-core's Device and a CUcontext, once opened.
        self._native: Any = None
        self._device: Any = None
        self._context: Any = None

    def open(self) -> CudaCore:
        """See `Cuda.open`."""
        native = _Native()
        self.facts = native.facts(self._index, native.start())
        driver = native.driver
        with ExitStack() as undo:
            context = native.call(
                "opening the device", driver.cuDevicePrimaryCtxRetain, self._index
            )
            undo.callback(driver.cuDevicePrimaryCtxRelease, self._index)
            self._device = native.enter(self._index, context)
            undo.pop_all()
        self._native, self._context = native, context
        return self

    def close(self) -> None:
        """See `Cuda.close`; the context stays current on the threads where it is."""
        native, self._native, self._device = self._native, None, None
        if native is not None:
            native.call("closing the device", native.driver.cuDevicePrimaryCtxRelease, self._index)

    def make_current(self) -> None:
        """See `Cuda.make_current`."""
        self._native.enter(self._index, self._context)

    def why_no_graphs(self) -> str:
        """See `Cuda.why_no_graphs`."""
        if self.facts.driver < OLDEST_DRIVER_FOR_GRAPHS:
            return (
                f"the driver is for CUDA {_dotted(self.facts.driver)}; conditional nodes need "
                f"{_dotted(OLDEST_DRIVER_FOR_GRAPHS)} (JetPack 6.1)"
            )
        if not hasattr(self._native.graphs, "GraphDefinition"):
            return f"cuda-core {self._native.core.__version__} is too old; graphs need 1.1"
        return ""

    def memory(self, nbytes: int) -> Memory:
        """See `Cuda.memory`."""
        native, driver = self._native, self._native.driver
        what = f"allocating {nbytes} bytes"
        with ExitStack() as undo:
            address = int(native.call(what, driver.cuMemAlloc, max(nbytes, 1)))
            undo.callback(driver.cuMemFree, address)
            native.call(what, driver.cuMemsetD8, address, 0, max(nbytes, 1))
            # The memset is asynchronous, and our streams don't wait for the default one.
            native.call(what, driver.cuStreamSynchronize, 0)
            undo.pop_all()
        return _Memory(native, address, nbytes)

    def mapped_memory(self, nbytes: int) -> MappedMemory:
        """See `Cuda.mapped_memory`."""
        native, driver = self._native, self._native.driver
        what = f"allocating {nbytes} bytes of pinned memory"
        flags = driver.CU_MEMHOSTALLOC_PORTABLE | driver.CU_MEMHOSTALLOC_DEVICEMAP
        with ExitStack() as undo:
            pointer = int(native.call(what, driver.cuMemHostAlloc, max(nbytes, 1), flags))
            undo.callback(driver.cuMemFreeHost, pointer)
            address = int(native.call(what, driver.cuMemHostGetDevicePointer, pointer, 0))
            undo.pop_all()
        return _MappedMemory(native, address, nbytes, pointer)

    def stream(self) -> Stream:
        """See `Cuda.stream`."""
        with self._native.explained("making a stream"):
            return _Stream(self._native, self._device.create_stream())

    def event(self) -> Event:
        """See `Cuda.event`."""
        # cuda-core makes one too, but does not say why it failed.
        driver = self._native.driver
        flags = driver.CUevent_flags.CU_EVENT_DEFAULT
        return _Event(
            self._native, self._native.call("making an event", driver.cuEventCreate, flags)
        )

    def seconds_between(self, start: Event, end: Event) -> float:
        """See `Cuda.seconds_between`."""
        events = [_native_event(event) for event in (start, end)]
        elapsed = self._native.driver.cuEventElapsedTime
        return float(self._native.call("taking the time", elapsed, *events)) / 1000

    def kernels(
        self, source: str, names: Sequence[str], *, conditionals: bool = False
    ) -> dict[str, Kernel]:
        """See `Cuda.kernels`."""
        native = self._native
        code = native.compile(source, self.facts.compute_capability, conditionals)
        kernels: dict[str, Kernel] = {}
        try:
            for name in names:
                with native.explained(f"loading the kernel {name}"):
                    kernels[name] = _Kernel(name, code.get_kernel(name))
        except CudaError as error:
            compiler = native.compiler_version()
            if compiler[0] > self.facts.driver[0]:
                raise BackendUnavailable(
                    f"kernels compiled by NVRTC of CUDA {_dotted(compiler)} can't be loaded by a "
                    f"driver for CUDA {_dotted(self.facts.driver)}",
                    remedy="Update the driver, or install the packages for its CUDA: "
                    f"pip install 'cuda-core[cu{self.facts.driver[0]}]'",
                ) from error
            raise
        return kernels

    def graph(self) -> Graph:
        """See `Cuda.graph`."""
        if self.why_no_graphs():
            raise no_graphs(self)
        with self._native.explained("making a graph"):
            return _Graph(self._native, self._native.graphs.GraphDefinition())


class _Native:
    """cuda-core and cuda-bindings, and the one place where their errors become ours."""

    def __init__(self) -> None:
        try:
            self.core: Any = importlib.import_module("cuda.core")
            self.graphs: Any = importlib.import_module("cuda.core.graph")
            self.driver: Any = importlib.import_module("cuda.bindings.driver")
            self.nvrtc: Any = importlib.import_module("cuda.bindings.nvrtc")
            utilities: Any = importlib.import_module("cuda.core._utils.cuda_utils")
        except ImportError as error:
            raise missing_package("cuda-core", "tensorrt") from error
        self.error: type[Exception] = utilities.CUDAError

    def start(self) -> tuple[int, int]:
        """Initialise the driver.

        Returns:
            The CUDA version that it is for.

        Raises:
            BackendUnavailable: It is missing or too old, or finds no device.
        """
        try:
            answer = self.driver.cuDriverGetVersion()
        except RuntimeError as error:  # cuda-bindings can't load the library
            raise BackendUnavailable(
                "no NVIDIA driver is installed: libcuda.so.1 is missing",
                remedy="Install the driver, or use a machine with a GPU",
            ) from error
        number = self.checked("asking for the driver's version", answer)
        version = (number // 1000, number % 1000 // 10)
        if version < OLDEST_DRIVER:
            raise BackendUnavailable(
                "the NVIDIA driver is too old",
                got=f"one for CUDA {_dotted(version)}",
                expected=f"{_dotted(OLDEST_DRIVER)} or newer",
                remedy="Update it; on a Jetson, to JetPack 6.1 or newer",
            )
        answer = self.driver.cuInit(0)
        if answer[0] == self.driver.CUresult.CUDA_ERROR_NO_DEVICE:
            raise _no_device()
        self.checked("starting the driver", answer)
        return version

    def facts(self, index: int, version: tuple[int, int]) -> DeviceFacts:
        """What the device is.

        Raises:
            BackendUnavailable: There is no device of that index.
        """
        what, driver = "asking what the device is", self.driver
        count = self.call(what, driver.cuDeviceGetCount)
        if count == 0:
            raise _no_device()
        if not 0 <= index < count:
            raise BackendUnavailable(
                "no such GPU",
                got=f"device {index}",
                expected=f"0 to {count - 1}",
                remedy="nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide them",
            )
        device = self.call(what, driver.cuDeviceGet, index)
        attribute = driver.CUdevice_attribute
        major, minor, integrated = (
            int(self.call(what, driver.cuDeviceGetAttribute, wanted, device))
            for wanted in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                attribute.CU_DEVICE_ATTRIBUTE_INTEGRATED,
            )
        )
        name = self.call(what, driver.cuDeviceGetName, 256, device)
        return DeviceFacts(
            name=name.split(b"\0")[0].decode(errors="replace"),
            compute_capability=(major, minor),
            driver=version,
            integrated=bool(integrated),
            memory_bytes=int(self.call(what, driver.cuDeviceTotalMem, device)),
            index=index,
        )

    def enter(self, index: int, context: Any) -> Any:
        """Make the primary context of a device current.

        Returns:
            cuda-core's Device, for this thread.

        Raises:
            CudaError: Another context is current.
        """
        what = "making the device current"
        current = int(self.call(what, self.driver.cuCtxGetCurrent))
        if current not in (0, int(context)):
            raise CudaError(
                f"another CUDA context than the primary one of device {index} is current on this "
                "thread",
                remedy="Pop it first; where pycuda.autoinit made it, import pycuda.autoprimaryctx "
                "instead",
            )
        with self.explained(what):
            device = self.core.Device(index)
            device.set_current()
        return device

    def compile(self, source: str, compute_capability: tuple[int, int], conditionals: bool) -> Any:
        """Compile CUDA C++ to cuda-core's ObjectCode, once per process."""
        arch = "sm_{}{}".format(*compute_capability)
        key = (source, arch, conditionals)
        if key not in _cubins:
            options = self.core.ProgramOptions(
                name="edge_runtime",
                std="c++17",
                arch=arch,
                define_macro="GRAPH_CONDITIONALS" if conditionals else None,
            )
            _cubins[key] = self._compiled(source, options)
        if key not in _loaded:
            _loaded[key] = self.core.ObjectCode.from_cubin(_cubins[key])
        return _loaded[key]

    def _compiled(self, source: str, options: Any) -> bytes:
        try:
            return bytes(self.core.Program(source, "c++", options).compile("cubin").code)
        except self.error as error:
            lines = str(error).splitlines()
            first = next((line for line in lines if ": error" in line), lines[0])
            raise CudaError(f"compiling the kernels: {first.strip()}") from error
        except RuntimeError as error:  # cuda-bindings can't load the library
            version = importlib.import_module("cuda.bindings").__version__.split(".")[0]
            raise BackendUnavailable(
                "NVRTC is not found, the library that compiles kernels",
                remedy="CUDA's toolkit and JetPack have it, and so has: "
                f"pip install 'cuda-core[cu{version}]'",
            ) from error

    def compiler_version(self) -> tuple[int, int]:
        """CUDA version of the compiler."""
        _, major, minor = self.nvrtc.nvrtcVersion()
        return major, minor

    def call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the driver.

        Returns:
            What it returns beside its status: None, one value or a tuple.

        Raises:
            CudaError: It refused, or lacks the function.
        """
        try:
            answer = function(*arguments)
        except RuntimeError as error:
            raise self.translated(what, error) from error
        return self.checked(what, answer)

    def checked(self, what: str, answer: tuple[Any, ...]) -> Any:
        """As `call`, for a call that was made."""
        status, *values = answer
        if status != self.driver.CUresult.CUDA_SUCCESS:
            error = self.error(f"{getattr(status, 'name', status)}: {self._description(status)}")
            raise self.translated(what, error) from error
        if not values:
            return None
        return values[0] if len(values) == 1 else tuple(values)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Turn cuda-core's errors into ours."""
        try:
            yield
        except (self.error, RuntimeError) as error:
            raise self.translated(what, error) from error

    def translated(self, what: str, error: Exception) -> CudaError:
        """Our error for one of cuda-core, whose text begins with the driver's name for it."""
        text = str(error).partition("\n")[0]
        name = text.partition(":")[0].strip()
        if name.startswith("CUDA_ERROR_"):
            status = getattr(self.driver.CUresult, name, None)
            return native_error(what, name, self._description(status))
        return CudaError(f"{what}: {text}")

    def _description(self, status: Any) -> str:
        """The driver's description of an error; empty if it has none."""
        if not isinstance(status, self.driver.CUresult):
            return ""
        told, text = self.driver.cuGetErrorString(status)
        told_well = told == self.driver.CUresult.CUDA_SUCCESS and text is not None
        return text.decode(errors="replace") if told_well else ""


class _Memory(Memory):
    """Device memory."""

    def __init__(self, native: _Native, address: int, nbytes: int) -> None:
        self._native = native
        self._open = True
        self.address = address
        self.nbytes = nbytes

    def close(self) -> None:
        """See `Resource.close`."""
        was_open, self._open = self._open, False
        if was_open:
            self._free()

    def _free(self) -> None:
        what = f"freeing {self.nbytes} bytes"
        self._native.call(what, self._native.driver.cuMemFree, self.address)


class _MappedMemory(_Memory, MappedMemory):
    """Pinned host memory."""

    def __init__(self, native: _Native, address: int, nbytes: int, pointer: int) -> None:
        super().__init__(native, address, nbytes)
        self._pointer = pointer
        self.host: NDArray[np.uint8] = np.ctypeslib.as_array(
            (ctypes.c_uint8 * nbytes).from_address(pointer)
        )
        self.host[:] = 0

    def _free(self) -> None:
        what = f"freeing {self.nbytes} bytes of pinned memory"
        self._native.call(what, self._native.driver.cuMemFreeHost, self._pointer)


class _Event(Event):
    """An event of the driver's."""

    def __init__(self, native: _Native, event: Any) -> None:
        self._native = native
        self.native = event

    def close(self) -> None:
        """See `Resource.close`."""
        event, self.native = self.native, None
        if event is not None:
            self._native.call("closing an event", self._native.driver.cuEventDestroy, event)


class _Stream(Stream):
    """A stream; cuda-core destroys it when nobody holds it."""

    def __init__(self, native: _Native, stream: Any) -> None:
        self._native = native
        self._driver = native.driver
        self.native = stream
        self._handle = stream.handle
        self.handle = int(self._handle)

    def close(self) -> None:
        """See `Resource.close`."""
        self.native.close()

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        with self._native.explained("waiting for a stream"):
            self.native.sync()

    def is_done(self) -> bool:
        """See `Stream.is_done`."""
        answer = self._driver.cuStreamQuery(self._handle)
        if answer[0] == self._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        self._native.checked("asking whether a stream is done", answer)
        return True

    def record(self, event: Event) -> None:
        """See `Stream.record`."""
        record = self._driver.cuEventRecord
        self._native.call("recording an event", record, _native_event(event), self._handle)

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        wait = self._driver.cuStreamWaitEvent
        self._native.call("waiting for an event", wait, self._handle, _native_event(event), 0)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `Stream.copy`."""
        what = f"copying {nbytes} bytes"
        copy = self._driver.cuMemcpyAsync
        self._native.call(what, copy, target, source, nbytes, self._handle)

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """See `Stream.launch`."""
        core = self._native.core
        with self._native.explained(f"launching the kernel {kernel.name}"):
            config = core.LaunchConfig(grid=grid, block=block)
            core.launch(self.native, config, _native_kernel(kernel), *_values(arguments))

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """See `Stream.capture`."""
        driver, handle = self._driver, self._handle
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._native.call("beginning a capture", driver.cuStreamBeginCapture, handle, mode)
        try:
            work()
        except BaseException:
            status, graph = driver.cuStreamEndCapture(handle)
            if status == driver.CUresult.CUDA_SUCCESS:
                driver.cuGraphDestroy(graph)
            raise
        graph = self._native.call("ending a capture", driver.cuStreamEndCapture, handle)
        return _CapturedGraph(self._native, graph)


class _Kernel(Kernel):
    """A kernel."""

    def __init__(self, name: str, kernel: Any) -> None:
        self.name = name
        self.native = kernel


class _Condition(Condition):
    """A condition."""

    def __init__(self, condition: Any) -> None:
        self.native = condition
        self.value = np.uint64(int(condition.handle))


class _CapturedGraph(CapturedGraph):
    """A graph of the driver's, that cuda-core knows nothing of."""

    def __init__(self, native: _Native, graph: Any) -> None:
        self._native = native
        self._graph = graph
        self.handle = int(graph)

    def close(self) -> None:
        """See `Resource.close`."""
        graph, self._graph = self._graph, None
        if graph is not None:
            self._native.call("closing a graph", self._native.driver.cuGraphDestroy, graph)


class _Body(Body):
    """A graph definition that grows at its end."""

    def __init__(self, native: _Native, definition: Any) -> None:
        self._native = native
        self._definition = definition
        # Each depends on the one before; the definition itself stands for the begin. cuda-core
        # knows the nodes that are held, and would have to ask the driver what the others are.
        self._nodes = [definition]
        self._branches: list[_Body] = []

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `Body.copy`."""
        with self._native.explained(f"adding a copy of {nbytes} bytes to a graph"):
            self._nodes.append(self._nodes[-1].memcpy(target, source, nbytes))

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """See `Body.launch`."""
        with self._native.explained(f"adding the kernel {kernel.name} to a graph"):
            config = self._native.core.LaunchConfig(grid=grid, block=block)
            native_kernel = _native_kernel(kernel)
            last = self._nodes[-1]
            self._nodes.append(last.launch(config, native_kernel, *_values(arguments)))

    def embed(self, graph: int) -> None:
        """See `Body.embed`."""
        what, driver = "embedding a graph", self._native.driver
        if not self._native.call(what, driver.cuGraphGetNodes, driver.CUgraph(graph))[1]:
            return  # A stage that does nothing; empty graphs in branches hang before CUDA 12.8.
        before = [node.handle for node in self._nodes[1:][-1:]]
        added = self._native.call(
            what,
            driver.cuGraphAddChildGraphNode,
            self._definition.handle,
            before,
            len(before),
            driver.CUgraph(graph),
        )
        with self._native.explained(what):
            nodes = self._definition.nodes()
            self._nodes.append(next(node for node in nodes if int(node.handle) == int(added)))

    def branch(self, condition: Condition) -> Body:
        """See `Body.branch`."""
        assert isinstance(condition, _Condition)
        with self._native.explained("adding a branch to a graph"):
            self._nodes.append(self._nodes[-1].if_then(condition.native))
            body = _Body(self._native, self._nodes[-1].then)
        self._branches.append(body)
        return body

    def _drop(self) -> None:
        """Let go of everything native."""
        for branch in self._branches:
            branch._drop()
        self._branches.clear()
        self._nodes.clear()
        self._definition = None


class _Graph(_Body, Graph):
    """A graph; cuda-core destroys it when nobody holds it or a part of it."""

    def condition(self) -> Condition:
        """See `Graph.condition`."""
        with self._native.explained("making a condition"):
            return _Condition(self._definition.create_condition(default_value=0))

    def instantiate(self) -> ExecutableGraph:
        """See `Graph.instantiate`."""
        with self._native.explained("making a graph executable"):
            return _ExecutableGraph(self._native, self._definition.instantiate())

    def close(self) -> None:
        """See `Resource.close`."""
        self._drop()


class _ExecutableGraph(ExecutableGraph):
    """An executable graph; cuda-core destroys it when nobody holds it."""

    def __init__(self, native: _Native, graph: Any) -> None:
        self._native = native
        self._graph = graph

    def launch(self, stream: Stream) -> None:
        """See `ExecutableGraph.launch`."""
        with self._native.explained("launching a graph"):
            self._graph.launch(_native_stream(stream))

    def upload(self, stream: Stream) -> None:
        """See `ExecutableGraph.upload`."""
        with self._native.explained("uploading a graph"):
            self._graph.upload(_native_stream(stream))

    def close(self) -> None:
        """See `Resource.close`."""
        self._graph.close()


def _native_event(event: Event) -> Any:
    assert isinstance(event, _Event)
    return event.native


def _native_stream(stream: Stream) -> Any:
    assert isinstance(stream, _Stream)
    return stream.native


def _native_kernel(kernel: Kernel) -> Any:
    assert isinstance(kernel, _Kernel)
    return kernel.native


def _values(arguments: Sequence[Argument]) -> list[Any]:
    """Arguments as cuda-core takes them."""
    return [a.value if isinstance(a, _Condition) else a for a in arguments]


def _no_device() -> BackendUnavailable:
    return BackendUnavailable(
        "the NVIDIA driver finds no GPU",
        remedy="nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide them",
    )


def _dotted(version: tuple[int, int]) -> str:
    return "{}.{}".format(*version)
