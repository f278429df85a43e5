"""TensorRT engines as the stages of a cascade on the GPU.

An engine comes from this device's cache, where `edge-runtime build` has put it; nothing is built
here. Boundary tensors are allocated once and shared by all engines, so a stage reads what another
one wrote where it lies. Stages run one after another, so all of them share one scratch buffer of
the largest need; those that run ahead, beside the others, share another one.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from edge_runtime.backends.cuda.base import Stream
from edge_runtime.backends.cuda.stages import LaunchedStages
from edge_runtime.backends.tensorrt import api
from edge_runtime.backends.tensorrt.keys import engine_key, precision_of, shape_of
from edge_runtime.cascade import Stage
from edge_runtime.engine_cache import EngineCache
from edge_runtime.errors import BackendError
from edge_runtime.manifest import Bundle
from edge_runtime.tensors import TensorSpec

logger = logging.getLogger(__name__)

#: TensorRT's element types by name -> ours.
_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class Scratch:
    """Device memory that engines use while they run.

    Attributes:
        allocated: Bytes that all of them share.
        separate: Bytes that it would take if each had its own.
    """

    allocated: int
    separate: int

    def __str__(self) -> str:
        """As people read it."""
        mib = 2**20
        return (
            f"{self.allocated / mib:.1f} MiB of scratch memory for all engines instead of "
            f"{self.separate / mib:.1f} MiB"
        )


class TensorRTStages(LaunchedStages):
    """Runs the stages of a bundle as TensorRT engines.

    Args:
        bundle: Where the stages come from.
        cache: Where the engines are; this user's where None.
        module: TensorRT; `api.import_tensorrt` where None.
    """

    name = "tensorrt"

    def __init__(
        self, bundle: Bundle, cache: EngineCache | None = None, *, module: Any = None
    ) -> None:
        super().__init__()
        self._bundle = bundle
        self._cache = cache or EngineCache()
        self._module = module
        self._precisions: dict[str, str] = {}
        # (stage, slot) -> its context: addresses are part of what is captured.
        self._contexts: dict[tuple[str, int], Any] = {}
        self._engines: dict[str, Any] = {}
        self._runtime: Any = None
        #: What the engines use while they run.
        self.scratch = Scratch(0, 0)

    def _load(self) -> None:
        trt = self._module or api.import_tensorrt()
        self._log = api.Log(trt)
        self._stack.callback(self._forget)
        device = api.engine_device(trt, self._cuda.facts)
        self._runtime = self._log.check(trt.Runtime(self._log.native), "TensorRT made no runtime")
        for stage in self._work.stages:
            precision = precision_of(self._bundle, stage, self._work.variants)
            key = engine_key(self._bundle, stage, precision, batch=self._work.batch, device=device)
            plan, _ = self._cache.load(key, self._bundle.path)
            engine = self._runtime.deserialize_cuda_engine(plan)
            self._precisions[stage.name] = precision
            self._engines[stage.name] = self._check(engine, stage, "can't load its engine")
            self._check_tensors(stage, engine)
        self._make_contexts(trt)

    def _forget(self) -> None:
        """In this order TensorRT wants its objects to go."""
        self._contexts = {}
        self._engines = {}
        self._runtime = None

    def _check(self, value: Any, stage: Stage, what: str) -> Any:
        remedy = f"Build it anew: edge-runtime build {self._bundle.path} --force"
        return self._log.check(value, f"stage {stage.name!r}: TensorRT {what}", remedy=remedy)

    def _check_tensors(self, stage: Stage, engine: Any) -> None:
        """Refuse an engine whose tensors are not those of the manifest."""
        found = {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name).name
            mode = engine.get_tensor_mode(name).name
            found[name] = f"{mode.lower()} {_DTYPES.get(dtype, dtype)}"
        wanted = {spec.name: f"input {spec.dtype}" for spec in stage.inputs}
        wanted |= {spec.name: f"output {spec.dtype}" for spec in stage.outputs}
        if found != wanted:
            raise BackendError(
                f"stage {stage.name!r}: the engine's tensors",
                stage=stage.name,
                got=_listed(found),
                expected=_listed(wanted),
                remedy=f"Build it anew: edge-runtime build {self._bundle.path} --force",
            )

    def _make_contexts(self, trt: Any) -> None:
        """A context for each stage and slot, all with the same scratch memory."""
        needs = {name: int(engine.device_memory_size_v2) for name, engine in self._engines.items()}
        shared: dict[bool, int] = {}
        allocated = 0
        for ahead in (False, True):
            group = [need for name, need in needs.items() if (name in self._work.ahead) == ahead]
            nbytes = max(group, default=0)
            if nbytes:
                shared[ahead] = self._stack.enter_context(self._cuda.memory(nbytes)).address
                allocated += nbytes
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        separate = 0
        for stage in self._work.stages:
            for slot in self._work.slots_of(stage):
                engine = self._engines[stage.name]
                context = self._check(
                    engine.create_execution_context(strategy), stage, "made no execution context"
                )
                separate += needs[stage.name]
                if needs[stage.name]:
                    address = shared[stage.name in self._work.ahead]
                    context.set_device_memory(address, needs[stage.name])
                self._bind(stage, slot, context)
                self._contexts[stage.name, slot] = context
        self.scratch = Scratch(allocated, separate)
        logger.info("%s", self.scratch)

    def _bind(self, stage: Stage, slot: int, context: Any) -> None:
        """Tell a context where its tensors are and how large."""
        batch = self._work.batch
        for spec in stage.inputs:
            shape = shape_of(spec, stage.name, batch)
            if -1 in tuple(self._engines[stage.name].get_tensor_shape(spec.name)):
                done = context.set_input_shape(spec.name, shape)
                self._check(done, stage, f"refused the shape {shape} of {spec.name!r}")
        missing = context.infer_shapes()
        if missing:
            raise BackendError(
                f"stage {stage.name!r}: TensorRT does not know the shapes of {missing}",
                stage=stage.name,
            )
        for spec in (*stage.inputs, *stage.outputs):
            self._check_shape(stage, spec, tuple(context.get_tensor_shape(spec.name)))
            done = context.set_tensor_address(spec.name, self.address(spec.name, slot))
            self._check(done, stage, f"refused the address of {spec.name!r}")

    def _check_shape(self, stage: Stage, spec: TensorSpec, got: tuple[int, ...]) -> None:
        expected = shape_of(spec, stage.name, self._work.batch)
        if got != expected:
            raise BackendError(
                f"stage {stage.name!r}: shape of {spec.name!r} in the engine",
                stage=stage.name,
                got=got,
                expected=expected,
                remedy=f"Build it anew: edge-runtime build {self._bundle.path} --force",
            )

    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Put the engine's kernels on a stream."""
        key = (stage, slot)
        context = self._contexts[key] if key in self._contexts else self._contexts[stage, 0]
        if not context.execute_async_v3(stream.handle):
            self._log.check(None, f"stage {stage!r}: TensorRT did not run")

    def precision(self, stage: str) -> str:
        """The variant whose engine was loaded."""
        return self._precisions[stage]


def _listed(tensors: dict[str, str]) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in sorted(tensors.items()))
