"""TensorRT engines as the stages of a cascade on the GPU.

An engine comes from this device's cache, where `edge-runtime build` has put it; nothing is built
here. Boundary tensors are allocated once and shared by all engines, so a stage reads what another
one wrote where it lies. Stages run one after another, so all of them share one scratch buffer of
the largest need; those that run ahead, beside the others, share another one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.backends.cuda.base import Stream
from edge_runtime.backends.cuda.stages import LaunchedStages
from edge_runtime.backends.tensorrt import api
from edge_runtime.backends.tensorrt.keys import engine_key, precision_of, shape_of
from edge_runtime.blocks import variants_of
from edge_runtime.cascade import Stage
from edge_runtime.engine_cache import EngineCache, EngineDevice
from edge_runtime.errors import BackendError, ConfigError, ManifestError
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

    Of engines that differ in the builder's options only, the newest is taken.

    Args:
        bundle: Where the stages come from.
        cache: Where the engines are; this user's where None.
        module: TensorRT; `api.import_tensorrt` where None.

    Attributes:
        scratch: What the engines use while they run.
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
        self.scratch = Scratch(0, 0)

    def _load(self) -> None:
        trt = self._module or api.import_tensorrt()
        self._log = api.Log(trt)
        self._stack.callback(self._forget)
        device = api.engine_device(trt, self._cuda.facts)
        self._runtime = self._log.checked_call(
            lambda: trt.Runtime(self._log.native), "TensorRT made no runtime"
        )
        for stage in self._work.stages:
            precision = precision_of(self._bundle, stage, self._work.variants)
            self._precisions[stage.name] = precision
            self._load_engine(stage, self._plan(stage, precision, device))
        needs = {name: int(engine.device_memory_size_v2) for name, engine in self._engines.items()}
        addresses = self._allocate_scratch(needs)
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        for stage in self._work.stages:
            for slot in self._work.slots_of(stage):
                context = self._engines[stage.name].create_execution_context(strategy)
                context = self._check(context, stage, "made no execution context")
                self._contexts[stage.name, slot] = context
                if needs[stage.name]:
                    # It answers nothing; if it refuses, the first run does, and quotes why.
                    context.set_device_memory(addresses[stage.name], needs[stage.name])
                self._bind(stage, slot, context)
        separate = sum(needs[name] for name, _ in self._contexts)
        self.scratch = dataclasses.replace(self.scratch, separate=separate)
        logger.info("%s", self.scratch)

    def _forget(self) -> None:
        """In this order TensorRT wants its objects to go."""
        self._contexts.clear()
        self._engines.clear()
        self._runtime = None

    def _plan(self, stage: Stage, precision: str, device: EngineDevice) -> bytes:
        """The serialized engine of a stage.

        Raises:
            BackendError: There is none that fits, or it is broken.
        """
        wanted = engine_key(self._bundle, stage, precision, batch=self._work.batch, device=device)
        try:
            plan, _ = self._cache.load(self._cache.newest(wanted), self._bundle.path)
        except BackendError as error:
            raise BackendError(
                error.what,
                stage=stage.name,
                got=error.got,
                expected=error.expected,
                remedy=f"Build it with: {self._build_command(stage)}",
            ) from error
        return plan

    def _build_command(self, stage: Stage) -> str:
        """What builds the engine of a stage as it is wanted here."""
        words = ["edge-runtime", "build", os.fspath(self._bundle.path)]
        precision = self._precisions[stage.name]
        if stage.kind != "preprocess" and precision not in self._built_by_default(stage):
            words += ["--precision", precision]
        if self._work.batch != 1:
            words += ["--batch", str(self._work.batch)]
        if any(isinstance(axis, str) for axis in self._bundle.cascade.image.shape[1:]):
            words += ["--image-size", "x".join(map(str, self._work.image.shape[1:3]))]
        if self._cuda.facts.index:
            words += ["--device", str(self._cuda.facts.index)]
        return shlex.join(words)

    def _built_by_default(self, stage: Stage) -> set[str]:
        """The precisions at which `edge-runtime build` builds a stage: those of all points."""
        try:
            points = [self._bundle.operating_point(n) for n in self._bundle.operating_points()]
            variants = [some for point in points for some in variants_of(self._bundle, point)]
        except (ConfigError, ManifestError):
            return set()
        named = dataclasses.replace(stage, name=self._bundle.record(stage.name).name)
        return {precision_of(self._bundle, named, some) for some in variants or [{}]}

    def _load_engine(self, stage: Stage, plan: bytes) -> None:
        engine = self._runtime.deserialize_cuda_engine(plan)
        engine = self._check(engine, stage, "can't load its engine", rebuild=True)
        self._engines[stage.name] = engine
        self._check_tensors(stage, engine)

    def _check(self, value: Any, stage: Stage, what: str, *, rebuild: bool = False) -> Any:
        """Refuse None and False as what a native call answers."""
        if value is not None and value is not False:
            return value
        try:
            text = f"stage {stage.name!r}: TensorRT {what}"
            remedy = self._build_anew(stage) if rebuild else None
            return self._log.check(value, text, remedy=remedy)
        except BackendError as error:
            error.stage = stage.name
            raise

    def _build_anew(self, stage: Stage) -> str:
        return f"Build it anew: {self._build_command(stage)} --force"

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
                remedy=self._build_anew(stage),
            )

    def _allocate_scratch(self, needs: Mapping[str, int]) -> dict[str, int]:
        """Memory for the stages that run one after another, and for those that run ahead.

        Args:
            needs: Stage -> bytes.

        Returns:
            Stage -> address.
        """
        addresses: dict[str, int] = {}
        allocated = 0
        for ahead in (False, True):
            group = [name for name in needs if (name in self._work.ahead) == ahead]
            nbytes = max((needs[name] for name in group), default=0)
            if nbytes:
                memory = self._stack.enter_context(self._cuda.memory(nbytes))
                addresses |= dict.fromkeys(group, memory.address)
                allocated += nbytes
        self.scratch = Scratch(allocated, 0)
        return addresses

    def _bind(self, stage: Stage, slot: int, context: Any) -> None:
        """Tell a context where its tensors are and how large."""
        batch = self._work.batch
        engine = self._engines[stage.name]
        for spec in stage.inputs:
            shape = shape_of(spec, stage.name, batch)
            if -1 in tuple(engine.get_tensor_shape(spec.name)):
                done = context.set_input_shape(spec.name, shape)
                what = f"refused the shape {shape} of {spec.name!r}"
                self._check(done, stage, what, rebuild=True)
        try:
            unknown = ", ".join(context.infer_shapes())
        except RuntimeError as error:
            unknown = str(error)
        self._check(not unknown, stage, f"does not know all shapes: {unknown}")
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
                remedy=self._build_anew(stage),
            )

    def enqueue(self, stage: str, slot: int, stream: Stream) -> None:
        """Put the engine's kernels on a stream."""
        key = (stage, slot)
        context = self._contexts[key] if key in self._contexts else self._contexts[stage, 0]
        if not context.execute_async_v3(stream.handle):
            self._check(None, self._stages[stage], "did not run")

    def precision(self, stage: str) -> str:
        """The variant whose engine was loaded."""
        return self._precisions[stage]


def _listed(tensors: dict[str, str]) -> str:
    return ", ".join(f"{name!r} ({kind})" for name, kind in sorted(tensors.items()))
