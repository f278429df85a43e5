"""The CUDA interface by pycuda, for where cuda-core can't be installed; it has no graphs.

pycuda keeps a stack of contexts for each thread, beside CUDA's own, and ends the process where a
thread ends while its stack holds one. So what is pushed on a thread is popped when that thread
ends. Streams and events are destroyed when nobody holds them.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import importlib.util
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.cuda.base import (
    Argument,
    CapturedGraph,
    Cuda,
    DeviceFacts,
    Event,
    Graph,
    Kernel,
    MappedMemory,
    Memory,
    Stream,
    native_error,
    no_graphs,
)
from edge_runtime.errors import BackendUnavailable, CudaError, missing_package

#: The first CUDA version of a driver that we support.
OLDEST_DRIVER = (12, 0)
#: CU_STREAM_NON_BLOCKING, which pycuda has no name for.
NON_BLOCKING = 1
#: Number of the driver's last error code.
LAST_ERROR = 999

_PUSHED = threading.local()


class PyCuda(Cuda):
    """One GPU by pycuda, in the primary context; `pycuda.autoinit` would make a second one.

    Args:
        device: Index of the device, among those that CUDA_VISIBLE_DEVICES leaves.
    """

    name: ClassVar[str] = "pycuda"

    def __init__(self, device: int = 0) -> None:
        self._index = device
        # The module pycuda.driver and a pycuda Context, once opened.
        self._driver: Any = None
        self._context: Any = None
        self._kernels: weakref.WeakSet[_Kernel] = weakref.WeakSet()

    def open(self) -> PyCuda:
        """See `Cuda.open`."""
        driver = _import_driver()
        self.facts = _facts(driver, self._index)
        with ExitStack() as undo, _explained(driver, "opening the device"):
            context = driver.Device(self._index).retain_primary_context()
            undo.callback(context.detach)
            _enter(driver, context, self._index)
            undo.pop_all()
        self._driver, self._context = driver, context
        # pycuda ends a process by abort() that exits with a context pushed.
        atexit.register(self.close)
        return self

    def close(self) -> None:
        """See `Cuda.close`; on other threads the context goes when they end."""
        context, self._context = self._context, None
        if context is None:
            return
        atexit.unregister(self.close)
        for kernel in list(self._kernels):
            kernel.drop()
        with _explained(self._driver, "closing the device"):
            if pushed := _pushed().pop(context.handle, None):
                pushed.pop()
            context.detach()

    def make_current(self) -> None:
        """See `Cuda.make_current`."""
        with _explained(self._driver, "making the device current"):
            _enter(self._driver, self._context, self._index)

    def why_no_graphs(self) -> str:
        """See `Cuda.why_no_graphs`."""
        return "pycuda has no graph API; cuda-core has"

    def memory(self, nbytes: int) -> Memory:
        """See `Cuda.memory`."""
        driver = self._driver
        with ExitStack() as undo, _explained(driver, f"allocating {nbytes} bytes"):
            allocation = driver.mem_alloc(max(nbytes, 1))
            undo.callback(allocation.free)
            driver.memset_d8(int(allocation), 0, max(nbytes, 1))
            # The memset is asynchronous, and our streams don't wait for the default one.
            driver.Context.synchronize()
            undo.pop_all()
        return _Memory(driver, allocation, int(allocation), nbytes)

    def mapped_memory(self, nbytes: int) -> MappedMemory:
        """See `Cuda.mapped_memory`."""
        driver = self._driver
        flags = driver.host_alloc_flags.PORTABLE | driver.host_alloc_flags.DEVICEMAP
        with ExitStack() as undo, _explained(driver, f"allocating {nbytes} bytes of pinned memory"):
            host = driver.pagelocked_empty((max(nbytes, 1),), np.uint8, mem_flags=flags)
            undo.callback(host.base.free)
            address = int(host.base.get_device_pointer())
            undo.pop_all()
        return _MappedMemory(driver, host.base, address, host[:nbytes])

    def stream(self) -> Stream:
        """See `Cuda.stream`."""
        with _explained(self._driver, "making a stream"):
            return _Stream(self, self._driver, self._driver.Stream(NON_BLOCKING))

    def event(self) -> Event:
        """See `Cuda.event`."""
        with _explained(self._driver, "making an event"):
            return _Event(self._driver.Event())

    def seconds_between(self, start: Event, end: Event) -> float:
        """See `Cuda.seconds_between`."""
        with _explained(self._driver, "taking the time"):
            return float(_native_event(end).time_since(_native_event(start))) / 1000

    def kernels(
        self, source: str, names: Sequence[str], *, conditionals: bool = False
    ) -> dict[str, Kernel]:
        """See `Cuda.kernels`; nvcc compiles them."""
        if conditionals:
            raise no_graphs(self)
        driver = self._driver
        code = _compile(driver, source, self.facts.compute_capability)
        with _explained(driver, "loading the kernels"):
            module = driver.module_from_buffer(code)
        kernels: dict[str, Kernel] = {}
        try:
            for name in names:
                with _explained(driver, f"loading the kernel {name}"):
                    kernel = _Kernel(name, module, module.get_function(name))
                self._kernels.add(kernel)
                kernels[name] = kernel
        finally:
            del module  # an error's traceback would keep it beyond the context
        return kernels

    def graph(self) -> Graph:
        """See `Cuda.graph`."""
        raise no_graphs(self)


class _Pushed:
    """A context that is pushed on a thread until `pop`, which the thread's end calls too."""

    def __init__(self, driver: Any, context: Any) -> None:
        self._thread = 0
        self._driver = driver
        context.push()
        self._context = context
        self._thread = threading.get_ident()

    def pop(self) -> None:
        """Pop it, once."""
        thread, self._thread = self._thread, 0
        if thread == threading.get_ident():
            self._context.pop()

    def __del__(self) -> None:
        # Where the device was closed before, pycuda has popped it already, and refuses.
        with suppress(self._driver.Error):
            self.pop()


class _Memory(Memory):
    """Device memory."""

    def __init__(self, driver: Any, allocation: Any, address: int, nbytes: int) -> None:
        self._driver = driver
        self._allocation = allocation
        self.address = address
        self.nbytes = nbytes

    def close(self) -> None:
        """See `Resource.close`."""
        allocation, self._allocation = self._allocation, None
        if allocation is not None:
            with _explained(self._driver, f"freeing {self.nbytes} bytes"):
                allocation.free()


class _MappedMemory(_Memory, MappedMemory):
    """Pinned host memory."""

    def __init__(self, driver: Any, allocation: Any, address: int, host: NDArray[np.uint8]) -> None:
        super().__init__(driver, allocation, address, host.nbytes)
        self.host = host
        self.host[:] = 0


class _Event(Event):
    """An event."""

    def __init__(self, event: Any) -> None:
        self.native = event

    def close(self) -> None:
        """See `Resource.close`."""
        self.native = None


class _Stream(Stream):
    """A stream."""

    def __init__(self, cuda: PyCuda, driver: Any, stream: Any) -> None:
        self._cuda = cuda
        self._driver = driver
        self.native = stream
        self.handle = int(stream.handle)

    def close(self) -> None:
        """See `Resource.close`."""
        self.native = None

    def synchronize(self) -> None:
        """See `Stream.synchronize`."""
        with _explained(self._driver, "waiting for a stream"):
            self.native.synchronize()

    def is_done(self) -> bool:
        """See `Stream.is_done`."""
        with _explained(self._driver, "asking whether a stream is done"):
            return bool(self.native.is_done())

    def record(self, event: Event) -> None:
        """See `Stream.record`."""
        with _explained(self._driver, "recording an event"):
            _native_event(event).record(self.native)

    def wait(self, event: Event) -> None:
        """See `Stream.wait`."""
        with _explained(self._driver, "waiting for an event"):
            self.native.wait_for_event(_native_event(event))

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """See `Stream.copy`; mapped memory has an address like the device's own."""
        with _explained(self._driver, f"copying {nbytes} bytes"):
            self._driver.memcpy_dtod_async(target, source, nbytes, self.native)

    def launch(self, kernel: Kernel, grid: int, block: int, arguments: Sequence[Argument]) -> None:
        """See `Stream.launch`."""
        assert isinstance(kernel, _Kernel)
        with _explained(self._driver, f"launching the kernel {kernel.name}"):
            kernel.native.prepare([type(argument) for argument in arguments])
            kernel.native.prepared_async_call((grid, 1), (block, 1, 1), self.native, *arguments)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """See `Stream.capture`."""
        raise no_graphs(self._cuda)


class _Kernel(Kernel):
    """A kernel and the module it is in, which must not outlive the context."""

    def __init__(self, name: str, module: Any, function: Any) -> None:
        self.name = name
        self.native = function
        self._module = module

    def drop(self) -> None:
        """Let go of everything native."""
        self.native = self._module = None


def _import_driver() -> Any:
    """pycuda.driver, initialised.

    Raises:
        BackendUnavailable: The package or the driver is missing or too old, or finds no device.
    """
    if importlib.util.find_spec("pycuda") is None:
        raise missing_package("pycuda", "jetson")
    try:
        driver: Any = importlib.import_module("pycuda.driver")
    except ImportError as error:
        raise BackendUnavailable(
            f"pycuda can't be imported: {error}",
            remedy="It needs the NVIDIA driver, and libraries of the CUDA that it was built with",
        ) from error
    with _explained(driver, "asking for the driver's version"):
        version = _version(driver.get_driver_version())
    if version < OLDEST_DRIVER:
        raise BackendUnavailable(
            "the NVIDIA driver is too old",
            got="one for CUDA {}.{}".format(*version),
            expected="{}.{} or newer".format(*OLDEST_DRIVER),
            remedy="Update it; on a Jetson, to JetPack 6.1 or newer",
        )
    try:
        driver.init()
    except driver.Error as error:
        refused = _translated("starting the driver", error)
        raise (_no_device() if "NO_DEVICE" in str(refused) else refused) from error
    return driver


def _facts(driver: Any, index: int) -> DeviceFacts:
    """What the device is.

    Raises:
        BackendUnavailable: There is no device of that index.
    """
    with _explained(driver, "asking what the device is"):
        count = driver.Device.count()
        if count == 0:
            raise _no_device()
        if not 0 <= index < count:
            raise BackendUnavailable(
                "no such GPU",
                got=f"device {index}",
                expected=f"0 to {count - 1}",
                remedy="nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide them",
            )
        device = driver.Device(index)
        major, minor = device.compute_capability()
        return DeviceFacts(
            name=device.name(),
            compute_capability=(major, minor),
            driver=_version(driver.get_driver_version()),
            integrated=bool(device.get_attribute(driver.device_attribute.INTEGRATED)),
            memory_bytes=int(device.total_memory()),
            index=index,
        )


def _enter(driver: Any, context: Any, index: int) -> None:
    """Push the primary context on this thread, once.

    Raises:
        CudaError: Another context is current.
    """
    current = ctypes.c_void_p()
    if status := _libcuda().cuCtxGetCurrent(ctypes.byref(current)):
        raise driver.Error(f"cuCtxGetCurrent failed: {_words(status)[1]}")
    if current.value not in (None, int(context.handle)):
        raise CudaError(
            f"another CUDA context than the primary one of device {index} is current on this "
            "thread",
            remedy="Pop it first; where pycuda.autoinit made it, import pycuda.autoprimaryctx "
            "instead",
        )
    if context.handle not in _pushed():
        _pushed()[context.handle] = _Pushed(driver, context)


def _pushed() -> dict[int, _Pushed]:
    """What is pushed on this thread, by handle."""
    if not hasattr(_PUSHED, "contexts"):
        _PUSHED.contexts = {}
    contexts: dict[int, _Pushed] = _PUSHED.contexts
    return contexts


def _compile(driver: Any, source: str, compute_capability: tuple[int, int]) -> bytes:
    """Compile CUDA C++ to a cubin by nvcc."""
    compiler: Any = importlib.import_module("pycuda.compiler")
    try:
        code: bytes = compiler.compile(
            source,
            options=["-std=c++17"],
            no_extern_c=True,
            arch="sm_{}{}".format(*compute_capability),
        )
    except driver.CompileError as error:
        lines = [line for line in str(error.stderr or error).splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), lines[0])
        raise CudaError(f"compiling the kernels: {first.strip()}") from error
    except OSError as error:
        raise BackendUnavailable(
            "nvcc is not found, by which pycuda compiles kernels",
            remedy="Put the bin folder of the CUDA toolkit on PATH",
        ) from error
    return code


@contextmanager
def _explained(driver: Any, what: str) -> Iterator[None]:
    """Turn pycuda's errors into ours."""
    try:
        yield
    except driver.Error as error:
        # pycuda's frames would keep its objects beyond the context, as long as the error is held.
        traceback.clear_frames(error.__traceback__)
        raise _translated(what, error) from error


def _translated(what: str, error: Exception) -> CudaError:
    """Our error for one of pycuda, whose text is "cuMemAlloc failed: out of memory"."""
    text = str(error).partition("\n")[0]
    # Behind a dash may stand the log of the driver's own compiler.
    description = text.partition(" failed: ")[2].partition(" - ")[0].strip()
    if code := _codes().get(description):
        return native_error(what, code, description)
    return CudaError(f"{what}: {text}")


@functools.cache
def _codes() -> dict[str, str]:
    """The driver's description of each error -> its name, such as CUDA_ERROR_OUT_OF_MEMORY."""
    words = [_words(status) for status in range(1, LAST_ERROR + 1)]
    return {description: name for name, description in words if name and description}


def _words(status: int) -> tuple[str, str]:
    """The driver's name for an error, and its description."""
    name, description = ctypes.c_char_p(), ctypes.c_char_p()
    _libcuda().cuGetErrorName(status, ctypes.byref(name))
    _libcuda().cuGetErrorString(status, ctypes.byref(description))
    return (name.value or b"").decode(), (description.value or b"").decode()


@functools.cache
def _libcuda() -> ctypes.CDLL:
    """The driver, for what pycuda has no call for."""
    return ctypes.CDLL("libcuda.so.1")


def _native_event(event: Event) -> Any:
    assert isinstance(event, _Event)
    return event.native


def _no_device() -> BackendUnavailable:
    return BackendUnavailable(
        "the NVIDIA driver finds no GPU",
        remedy="nvidia-smi lists the devices; CUDA_VISIBLE_DEVICES may hide them",
    )


def _version(number: int) -> tuple[int, int]:
    return number // 1000, number % 1000 // 10
