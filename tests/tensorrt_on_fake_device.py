"""The run-time part of TensorRT's interface on the fake CUDA device, for tests.

A plan is a small container around a stage's ONNX file with its shapes, see `make_plan`. To execute
one puts two kernels on the stream: the first reads the inputs and scribbles over the outputs and
the scratch memory, the second checks that nobody has touched any of them meanwhile, runs the file
in ONNX Runtime and writes the outputs. What TensorRT refuses is refused as TensorRT does it, by
None or False and a line in the log. What on a device would corrupt memory without a word is an
error here, `Misuse`.

`tests.tensorrt_api` holds the names to those that TensorRT has.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from edge_runtime import Bundle, Stage
from edge_runtime.backends.cuda.base import Argument
from edge_runtime.backends.cuda.fake import FakeCuda, FakeKernel, FakeMemory, FakeStream
from edge_runtime.backends.onnxrt import new_session
from edge_runtime.backends.tensorrt import api
from edge_runtime.backends.tensorrt.keys import engine_key, precision_of
from edge_runtime.engine_cache import EngineCache, EngineKey
from edge_runtime.errors import BackendError, CudaError
from edge_runtime.scheduler import image_axes

_MAGIC = b"a plan of the fake TensorRT\n"
_ALIGNMENT = 256
#: What nobody else writes anywhere.
_SCRIBBLES = itertools.count(1)
#: Of streams and graphs of all devices: TensorRT is given a stream, and not whose it is.
_HANDLES = itertools.count(1000)


class Misuse(AssertionError):
    """What on a device corrupts memory, now and then and without a word."""


class DataType(IntEnum):
    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    INT64 = 8


class TensorIOMode(IntEnum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class ExecutionContextAllocationStrategy(IntEnum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class ILogger:
    class Severity(IntEnum):
        INTERNAL_ERROR = 0
        ERROR = 1
        WARNING = 2
        INFO = 3
        VERBOSE = 4

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class Dims:
    """A shape; like TensorRT's it is no tuple."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = tuple(lengths)

    def __len__(self) -> int:
        return len(self._lengths)

    def __getitem__(self, index: int) -> int:
        return self._lengths[index]


_DTYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "int8": DataType.INT8,
    "int32": DataType.INT32,
    "bool": DataType.BOOL,
    "uint8": DataType.UINT8,
    "int64": DataType.INT64,
}


@dataclass(frozen=True)
class _Tensor:
    """An input or output of an engine: with its shape in the file, and the one it is built for."""

    name: str
    is_input: bool
    dtype: str
    declared: tuple[int, ...]
    shape: tuple[int, ...]


def make_plan(
    model: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    scratch_bytes: int = 0,
    version: str = "10.3.0",
) -> bytes:
    """What stands for a serialized engine.

    Args:
        model: The ONNX file.
        shapes: Input -> its shape.
        scratch_bytes: Device memory that it needs while it runs.
        version: Of the TensorRT that can load it.
    """
    graph = onnx.load_from_string(model).graph
    axes = _axes(graph, shapes)
    session = new_session(model, axes=axes)
    zeros = {value.name: np.zeros(shapes[value.name], _dtype(value)) for value in graph.input}
    found = session.run([value.name for value in graph.output], zeros)
    made = {value.name: a.shape for value, a in zip(graph.output, found, strict=True)}
    header = {
        "version": version,
        "scratch_bytes": scratch_bytes,
        "axes": axes,
        "tensors": [
            (v.name, v in graph.input, _dtype(v), _declared(v), {**shapes, **made}[v.name])
            for v in (*graph.input, *graph.output)
        ],
    }
    return _MAGIC + json.dumps(header).encode() + b"\n" + model


def _dtype(value: onnx.ValueInfoProto) -> str:
    return onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name


def _declared(value: onnx.ValueInfoProto) -> list[int]:
    dims = value.type.tensor_type.shape.dim
    return [-1 if dim.dim_param else dim.dim_value for dim in dims]


def _axes(graph: onnx.GraphProto, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Lengths of the named axes but the batch, which `OnnxRuntimeBackend` folds in too."""
    found = {}
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        for dim, length in list(zip(dims, shapes[value.name], strict=True))[1:]:
            if dim.dim_param:
                found[dim.dim_param] = length
    return found


class _Device(FakeCuda):
    """A fake device whose handles no other device has."""

    def handle(self) -> int:
        return next(_HANDLES)


class FakeTensorRT:
    """TensorRT, and the devices that it knows.

    Args:
        name: Of the module.
        version: Of TensorRT.
        refuse: Index in `calls` of a call that is refused.
        device: Arguments of `FakeCuda`, for every device.

    Attributes:
        module: What `import tensorrt` would give.
        calls: Names of the calls that TensorRT may refuse, in order.
        devices: All that were made, each with its streams and memory.
        problems: What was destroyed while it was in use.
        objects: Runtimes, engines and contexts that somebody holds.
    """

    def __init__(
        self,
        *,
        name: str = "tensorrt",
        version: str = "10.3.0",
        refuse: int | None = None,
        **device: Any,
    ) -> None:
        self.calls: list[str] = []
        self.devices: list[FakeCuda] = []
        self.problems: list[str] = []
        self.objects: weakref.WeakSet[Any] = weakref.WeakSet()
        self._refuse = refuse
        self._device = device

        class Runtime(_Runtime):
            _fake = self

        self.module = ModuleType(name)
        self.module.__spec__ = ModuleSpec(name, None)
        self.module.__version__ = version
        offered = (
            *(DataType, TensorIOMode, ExecutionContextAllocationStrategy, ILogger, Dims),
            *(Runtime, ICudaEngine, IExecutionContext),
        )
        for one in offered:
            setattr(self.module, one.__name__, one)

    def open_cuda(self, package: str = "any", device: int = 0) -> FakeCuda:
        """In place of `edge_runtime.backends.cuda.backend.open_cuda`."""
        self.devices.append(_Device(**self._device))
        return self.devices[-1]

    def check_all_is_closed(self) -> None:
        """Fail where anything is left on a device, or was destroyed too early."""
        left = [resource for device in self.devices for resource in device.live]
        assert not left, left
        assert not self.problems, self.problems

    def refuses(self, call: str, logger: ILogger) -> bool:
        """Take note of a call; True where it is the one to refuse."""
        self.calls.append(call)
        if self._refuse != len(self.calls) - 1:
            return False
        logger.log(ILogger.ERROR, f"{call}: the refusal that a test asked for")
        return True

    def stream(self, handle: int) -> FakeStream | None:
        """The stream of a handle."""
        return next(
            (
                resource
                for device in self.devices
                for resource in device.live
                if isinstance(resource, FakeStream) and resource.handle == handle
            ),
            None,
        )

    def memory(self, address: int) -> FakeMemory | None:
        """The allocation that an address is in."""
        return next(
            (
                resource
                for device in self.devices
                for resource in device.live
                if isinstance(resource, FakeMemory)
                and resource.address <= address < resource.address + resource.nbytes
            ),
            None,
        )


class _Runtime:
    _fake: FakeTensorRT

    def __init__(self, logger: ILogger) -> None:
        if self._fake.refuses("Runtime", logger):
            # So tell the bindings that a constructor got nothing.
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger
        self._fake.objects.add(self)

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        if self._fake.refuses("deserialize_cuda_engine", self._logger):
            return None
        problem = self._why_not(serialized_engine)
        if not problem:
            header, _, model = serialized_engine.removeprefix(_MAGIC).partition(b"\n")
            try:
                return ICudaEngine(self._fake, self._logger, json.loads(header), model)
            except (BackendError, ValueError) as error:
                problem = f"the plan is corrupt: {error}"
        self._logger.log(ILogger.ERROR, f"deserializeCudaEngine: {problem}")
        return None

    def _why_not(self, plan: bytes) -> str:
        if not any(device.is_open for device in self._fake.devices):
            return "CUDA initialization failure"
        if not plan.startswith(_MAGIC):
            return "the serialized engine has another magic tag"
        try:
            built_with = json.loads(plan.split(b"\n")[1])["version"]
        except ValueError as error:
            return f"the plan is corrupt: {error}"
        if built_with != self._fake.module.__version__:
            return f"the engine is of version {built_with}"
        return ""


class ICudaEngine:
    def __init__(
        self, fake: FakeTensorRT, logger: ILogger, header: Mapping[str, Any], model: bytes
    ) -> None:
        self._fake, self._logger = fake, logger
        fake.objects.add(self)
        self._session = new_session(model, axes=header["axes"])
        tensors = [
            _Tensor(name, is_input, dtype, tuple(declared), tuple(shape))
            for name, is_input, dtype, declared, shape in header["tensors"]
        ]
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._scratch_bytes = header["scratch_bytes"]

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def device_memory_size_v2(self) -> int:
        return self._scratch_bytes

    def get_tensor_name(self, index: int) -> str | None:
        if 0 <= index < len(self._tensors):
            return list(self._tensors)[index]
        return self._error(f"getIOTensorName: there is no tensor {index}")

    def get_tensor_dtype(self, name: str) -> DataType:
        tensor = self._find("getTensorDataType", name)
        return DataType.FLOAT if tensor is None else _DTYPES[tensor.dtype]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        tensor = self._find("getTensorIOMode", name)
        if tensor is None:
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if tensor.is_input else TensorIOMode.OUTPUT

    def get_tensor_shape(self, name: str) -> Dims:
        tensor = self._find("getTensorShape", name)
        return Dims(() if tensor is None else tensor.declared)

    def create_execution_context(
        self,
        strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC,
    ) -> IExecutionContext | None:
        if self._fake.refuses("create_execution_context", self._logger):
            return None
        return IExecutionContext(self, strategy)

    def _find(self, call: str, name: str) -> _Tensor | None:
        if name not in self._tensors:
            return self._error(f"{call}: no input or output is called {name!r}")
        return self._tensors[name]

    def _error(self, text: str) -> None:
        self._logger.log(ILogger.ERROR, text)


class _Use:
    """How far a context is used; outlives it, for what is still on a stream."""

    def __init__(self, fake: FakeTensorRT) -> None:
        self.alive = True
        self.unfinished = 0
        self.cuda: FakeCuda | None = None
        self._problems = fake.problems

    def end(self) -> None:
        self.alive = False
        if self.unfinished and self.cuda is not None and not self.cuda._lost:
            self._problems.append("a context was destroyed before its work was done")


class IExecutionContext:
    def __init__(self, engine: ICudaEngine, strategy: ExecutionContextAllocationStrategy) -> None:
        # It keeps its engine, as in the bindings.
        self._engine, self._fake, self._logger = engine, engine._fake, engine._logger
        self._managed = strategy == ExecutionContextAllocationStrategy.USER_MANAGED
        self._shapes = {
            t.name: t.shape for t in engine._tensors.values() if t.is_input and -1 not in t.declared
        }
        self._addresses: dict[str, int] = {}
        self._scratch: int | None = None
        self._has_run = False
        self._use = _Use(self._fake)
        self._fake.objects.add(self)
        weakref.finalize(self, self._use.end).atexit = False

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if self._fake.refuses("set_input_shape", self._logger):
            return False
        tensor = self._engine._find("setInputShape", name)
        if tensor is None:
            return False
        if not tensor.is_input or tuple(shape) != tensor.shape:
            return self._false(
                f"setInputShape: {tuple(shape)} for {name!r}, the profile has {tensor.shape}"
            )
        self._shapes[name] = tensor.shape
        return True

    def infer_shapes(self) -> list[str]:
        if self._fake.refuses("infer_shapes", self._logger):
            raise RuntimeError("infer_shapes error code: -1")
        return self._without_shape()

    def get_tensor_shape(self, name: str) -> Dims:
        tensor = self._engine._find("getTensorShape", name)
        if tensor is None:
            return Dims(())
        known = name in self._shapes or (not tensor.is_input and not self._without_shape())
        return Dims(tensor.shape if known else tensor.declared)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._fake.refuses("set_tensor_address", self._logger):
            return False
        if self._engine._find("setTensorAddress", name) is None:
            return False
        if memory % _ALIGNMENT:
            return self._false(f"setTensorAddress: {memory:#x} for {name!r} is not aligned")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        """Says nothing but in the log, as in TensorRT."""
        if self._fake.refuses("set_device_memory", self._logger):
            return
        need = self._engine._scratch_bytes
        if not self._managed or size < need or memory % _ALIGNMENT:
            self._false(f"setDeviceMemoryV2: {size} bytes at {memory:#x}, {need} are needed")
            return
        self._scratch = memory

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._fake.refuses("execute_async_v3", self._logger):
            return False
        stream = self._fake.stream(stream_handle)
        problem = self._why_not()
        if stream is None or problem:
            return self._false(f"enqueueV3: {problem or 'there is no such stream'}")
        capturing = stream.cuda._capturing is stream
        if capturing and not self._has_run:
            raise Misuse("the first time that a context runs it must not be captured")
        work = _Enqueued(self, counted=not capturing)
        self._use.cuda = stream.cuda
        try:
            stream.launch(FakeKernel("begin of an engine", work.begin), 1, 1, ())
            stream.launch(FakeKernel("end of an engine", work.end), 1, 1, ())
        except CudaError as error:
            return self._false(f"enqueueV3: Cuda Runtime: {error}")
        self._use.unfinished += not capturing
        self._has_run = True
        return True

    def _why_not(self) -> str:
        """Why it can't run."""
        if missing := self._without_shape():
            return f"the shapes of {missing} are not known"
        if missing := [name for name in self._engine._tensors if name not in self._addresses]:
            return f"the addresses of {missing} are not set"
        if self._managed and self._engine._scratch_bytes and self._scratch is None:
            return "the device memory is not set"
        return ""

    def _without_shape(self) -> list[str]:
        tensors = self._engine._tensors.values()
        return [t.name for t in tensors if t.is_input and t.name not in self._shapes]

    def _false(self, text: str) -> bool:
        self._logger.log(ILogger.ERROR, text)
        return False


class _Enqueued:
    """An engine's work on a stream, or in a graph that runs it again and again.

    What it needs of the context is taken when it is enqueued, as kernels take their arguments.
    """

    def __init__(self, context: IExecutionContext, *, counted: bool) -> None:
        engine = context._engine
        self._use, self._session = context._use, engine._session
        self._counted = counted
        self._inputs = [tensor for tensor in engine._tensors.values() if tensor.is_input]
        self._outputs = [tensor for tensor in engine._tensors.values() if not tensor.is_input]
        self._addresses = dict(context._addresses)
        self._scratch_bytes = engine._scratch_bytes
        if context._scratch is not None:
            self._addresses["scratch memory"] = context._scratch
        # Another allocation may get the address of one that was freed.
        memory = context._fake.memory
        self._memories = {name: memory(address) for name, address in self._addresses.items()}
        self._before: dict[str, bytes] = {}

    def begin(self, cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
        if not self._use.alive:
            raise Misuse("an engine ran after its context was destroyed")
        scribble = np.frombuffer(next(_SCRIBBLES).to_bytes(8, "little"), np.uint8)
        writes = {tensor.name for tensor in self._outputs} | {"scratch memory"}
        for name, view in self._views(cuda).items():
            if name in writes:
                view[:] = np.resize(scribble, view.size)
            self._before[name] = view.tobytes()

    def end(self, cuda: FakeCuda, grid: int, arguments: Sequence[Argument]) -> None:
        views = self._views(cuda)
        for name, view in views.items():
            if view.tobytes() != self._before[name]:
                raise Misuse(f"{name!r} was written to by another while an engine used it")
        arrays = {
            tensor.name: views[tensor.name].view(tensor.dtype).reshape(tensor.shape)
            for tensor in (*self._inputs, *self._outputs)
        }
        names = [tensor.name for tensor in self._outputs]
        made = self._session.run(names, {t.name: arrays[t.name] for t in self._inputs})
        for name, value in zip(names, made, strict=True):
            arrays[name][...] = value
        self._use.unfinished -= self._counted

    def _views(self, cuda: FakeCuda) -> dict[str, np.ndarray]:
        """The bytes of all that it reads or writes."""
        sizes = {
            tensor.name: int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
            for tensor in (*self._inputs, *self._outputs)
        }
        sizes["scratch memory"] = self._scratch_bytes
        views = {}
        for name, address in self._addresses.items():
            memory = self._memories[name]
            if memory is not None and memory.closed:
                raise Misuse(f"an engine used {name!r} in memory that was freed")
            views[name] = cuda.view(address, sizes[name])
        return views


def store_engines(
    fake: FakeTensorRT,
    cache: EngineCache,
    bundle: Bundle,
    *,
    batch: int = 1,
    image_size: tuple[int, int] | None = None,
    variants: Mapping[str, str] | None = None,
    scratch: Mapping[str, int] | None = None,
    options: Mapping[str, str | int | bool] | None = None,
) -> dict[str, EngineKey]:
    """Put an engine of every stage into a cache, as `edge-runtime build` does.

    Args:
        fake: What they are for.
        cache: Where they are put.
        bundle: Whose stages.
        batch: Samples of every run.
        image_size: (height, width), where the bundle leaves it open.
        variants: Stage -> precision, as an operating point has them.
        scratch: Stage -> bytes; 1000 and more where absent, no two alike.
        options: Of the builder.

    Returns:
        Stage -> what its engine is found by.
    """
    device = api.engine_device(fake.module, FakeCuda(**fake._device).facts)
    plan = bundle.cascade.plan(range(len(bundle.cascade.exits)))
    axes = image_axes(plan, image_size)
    keys = {}
    for index, stage in enumerate(plan.stages):
        resolved = Stage(
            stage.name,
            stage.kind,
            tuple(spec.resolve(axes) for spec in stage.inputs),
            tuple(spec.resolve(axes) for spec in stage.outputs),
        )
        precision = precision_of(bundle, stage, variants or {})
        key = engine_key(bundle, resolved, precision, batch=batch, device=device, options=options)
        model = bundle.stage_model(stage.name, precision)
        need = (scratch or {}).get(stage.name, 1000 + 10 * index)
        version = fake.module.__version__
        plan_bytes = make_plan(model, key.shapes, scratch_bytes=need, version=version)
        cache.store(key, plan_bytes, {"seconds": 0.1})
        keys[stage.name] = key
    return keys
