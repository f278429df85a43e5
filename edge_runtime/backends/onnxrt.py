"""ONNX Runtime: the backend of machines without TensorRT.

Sessions that share nothing get in each other's way: their thread pools spin against each other (a
ViT-Tiny in 8 stages takes 7 times as long as in one piece on 2 cores, ``python -m bench.staging``).
Here all sessions of a process share one pool, and one memory arena, so that a stage works in the
memory that the one before has left in the cache. Both belong to the process: they are set up once,
by the first session, and the number of threads can't change afterwards.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edge_runtime.backends.base import HostBackend
from edge_runtime.cascade import Plan, Stage
from edge_runtime.device import usable_cores
from edge_runtime.errors import BackendError, BackendUnavailable, ConfigError, missing_package
from edge_runtime.manifest import Bundle
from edge_runtime.onnx_guard import may_cast
from edge_runtime.tensors import BATCH, TensorSpec

if TYPE_CHECKING:
    import onnxruntime

Optimization = Literal["none", "basic", "extended", "all"]
Threading = Literal["shared", "per_session"]

_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
}

#: What keeps a model with casts from killing the process while it is loaded: seen in 1.31.1,
#: reported of 1.24 and 1.25 (github.com/microsoft/onnxruntime/issues/28392). This optimiser
#: exchanges Transpose and Cast before a MatMul. Where it then can't fuse them, as with a batch axis
#: that moves, it leaves nodes that nobody has resolved, and the NchwcTransformer of the level "all"
#: reads what they lack. FP16 models get their casts from ONNX Runtime. Disabling NchwcTransformer
#: instead would slow convolutions down (FP16 ones too), and once in 2000 random models left one
#: that could not be loaded. The key exists since 1.18; before, it is ignored.
_NO_MATMUL_TRANSPOSE_FUSION = (
    "optimization.disable_specified_optimizers",
    "MatmulTransposeFusion",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OnnxRuntimeOptions:
    """How sessions are made.

    Attributes:
        provider: Execution provider, as `onnxruntime.get_available_providers` names it.
        threads: Threads of the pool; 0 takes one per core that this process may use.
        optimization: Graph optimisation level.
        threading: "shared" uses one pool for all sessions. "per_session" is for comparisons: it
            is how sessions behave when nobody takes care, and excludes "shared" in one process.
    """

    provider: str = "CPUExecutionProvider"
    threads: int = 0
    optimization: Optimization = "all"
    threading: Threading = "shared"

    def __post_init__(self) -> None:
        """Refuse what no session could have."""
        if self.threads < 0:
            raise ConfigError("threads", got=self.threads, expected=">= 1, or 0 for all cores")

    @property
    def thread_count(self) -> int:
        """Threads of the pool, with 0 resolved."""
        return self.threads or usable_cores()


class _Process:
    """What ONNX Runtime keeps once per process; set up by the first session."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads: int | None = None
        self.shared_arena = False

    def prepare(self, ort: Any, options: OnnxRuntimeOptions) -> bool:
        """Set up the shared pool and arena; returns whether sessions use the shared pool."""
        if options.threading == "per_session" or not shared_pool_available(ort):
            return False
        with self._lock:
            if self._threads is None:
                ort.set_global_thread_pool_sizes(options.thread_count, 1)
                self._share_arena(ort)
                self._threads = options.thread_count
        if self._threads != options.thread_count:
            raise ConfigError(
                "threads: the pool of this process is already running",
                got=options.thread_count,
                expected=self._threads,
                remedy="ONNX Runtime has one pool per process: use another process",
            )
        return True

    def _share_arena(self, ort: Any) -> None:
        info = ort.OrtMemoryInfo(
            "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
        )
        ort.create_and_register_allocator(info, None)
        self.shared_arena = True


_process = _Process()


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BackendUnavailable: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise missing_package("onnxruntime", "cpu") from error
    return onnxruntime


def shared_pool_available(ort: Any) -> bool:
    """Whether this onnxruntime can share one thread pool between sessions."""
    return hasattr(ort, "set_global_thread_pool_sizes")


def new_session(
    model: bytes,
    options: OnnxRuntimeOptions | None = None,
    axes: Mapping[str, int] | None = None,
) -> onnxruntime.InferenceSession:
    """Load an ONNX model the way every tool here does.

    Args:
        model: The model's bytes, without external data.
        options: How; defaults as in `OnnxRuntimeOptions`.
        axes: Lengths of named axes ("height", "width"), folded into the graph.

    Raises:
        BackendUnavailable: onnxruntime or the execution provider is missing.
        BackendError: ONNX Runtime refuses the model.
    """
    ort = import_onnxruntime()
    options = options or OnnxRuntimeOptions()
    if options.provider not in ort.get_available_providers():
        raise BackendUnavailable(
            "execution provider",
            got=repr(options.provider),
            expected=", ".join(ort.get_available_providers()),
        )
    settings = _session_options(ort, options, _process.prepare(ort, options))
    if may_cast(model):
        settings.add_session_config_entry(*_NO_MATMUL_TRANSPOSE_FUSION)
    for name, length in (axes or {}).items():
        settings.add_free_dimension_override_by_name(name, length)
    try:
        session = ort.InferenceSession(model, settings, providers=[options.provider])
    except native_exceptions() as error:
        raise native_error(error, "the model can't be loaded") from error
    if session.get_providers()[0] != options.provider:
        raise BackendError(
            "ONNX Runtime fell back to another execution provider",
            got=session.get_providers()[0],
            expected=options.provider,
        )
    return session


def _session_options(ort: Any, options: OnnxRuntimeOptions, shared: bool) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    level = f"ORT_{'DISABLE' if options.optimization == 'none' else 'ENABLE'}_"
    level += "ALL" if options.optimization == "none" else options.optimization.upper()
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    if shared:
        settings.use_per_session_threads = False
        if _process.shared_arena:
            settings.add_session_config_entry("session.use_env_allocators", "1")
    else:
        settings.intra_op_num_threads = options.thread_count
        settings.inter_op_num_threads = 1
        if options.threading == "shared":
            # Asked for but missing in this onnxruntime: pools that sleep at least don't fight.
            settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return settings


def native_exceptions() -> tuple[type[BaseException], ...]:
    """Everything that ONNX Runtime raises."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception))
    return (*own, RuntimeError, ValueError, TypeError)


def native_error(error: BaseException, what: str, stage: str | None = None) -> BackendError:
    """What ONNX Runtime raised as one line; raise it from `error`."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return BackendError(f"{what}: ONNX Runtime says: {first}", stage=stage)


class OnnxRuntimeBackend(HostBackend):
    """Runs a bundle's stages in ONNX Runtime sessions that share threads and memory.

    Args:
        bundle: Where the stages come from.
        options: How sessions are made.
    """

    name = "onnxrt"

    def __init__(self, bundle: Bundle, options: OnnxRuntimeOptions | None = None) -> None:
        super().__init__()
        self._bundle = bundle
        self._options = options or OnnxRuntimeOptions()
        self._stages: dict[str, Stage] = {}
        self._sessions: dict[str, Any] = {}
        self._precisions: dict[str, str] = {}
        # (stage, batch) -> calls of the session, its inputs and outputs bound to our buffers.
        self._bound: dict[tuple[str, int], tuple[Callable[[], None], ...]] = {}
        self._native: tuple[type[BaseException], ...] = ()

    def _open(self, plan: Plan, axes: Mapping[str, int], variants: Mapping[str, str]) -> None:
        ort = import_onnxruntime()
        self._ort = ort
        self._native = native_exceptions()
        self._stages = self._declare(plan, axes)
        for stage in self._stages.values():
            precision = self._bundle.precision(stage.name, variants)
            model = self._bundle.stage_model(stage.name, precision)
            try:
                session = new_session(model, self._options, axes)
            except BackendError as error:
                raise BackendError(f"stage {stage.name!r}: {error}", stage=stage.name) from error
            _check_interface(stage, session)
            self._sessions[stage.name] = session
            self._precisions[stage.name] = precision

    def close(self) -> None:
        """Free sessions, bindings and buffers."""
        self._bound = {}
        self._sessions = {}
        self._stages = {}
        super().close()

    def precision(self, stage: str) -> str:
        """The variant that was loaded."""
        return self._precisions[stage]

    def _moved(self) -> None:
        self._bound = {}

    def run(self, stage: str) -> None:
        """Run the stage's session on the bound buffers; one sample at a time if it takes one."""
        bound = self._bound.get((stage, self._batch))
        if bound is None:
            bound = self._bind(stage)
        try:
            for call in bound:
                call()
        except self._native as error:
            raise native_error(error, f"stage {stage!r} failed", stage) from error

    def _bind(self, stage: str) -> tuple[Callable[[], None], ...]:
        """Bind a stage to the rows of the current frame: one call, or one per sample."""
        known = self._stages.get(stage)
        if known is None:
            raise BackendError(f"stage {stage!r} was not opened", stage=stage)
        if known.inputs[0].shape[0] == BATCH:
            bound: tuple[Callable[[], None], ...] = (self._call(known, 0, self._batch),)
        else:
            bound = tuple(self._call(known, row, 1) for row in range(self._batch))
        self._bound[stage, self._batch] = bound
        return bound

    def _call(self, stage: Stage, first: int, rows: int) -> Callable[[], None]:
        session = self._sessions[stage.name]
        binding = session.io_binding()
        for specs, bind in (
            (stage.inputs, binding.bind_ortvalue_input),
            (stage.outputs, binding.bind_ortvalue_output),
        ):
            for spec in specs:
                # No copy: on the CPU an OrtValue is a view of the array, which we keep alive.
                view = self._buffers[spec.name][first : first + rows]
                bind(spec.name, self._ort.OrtValue.ortvalue_from_numpy(view))
        # Without run options: ONNX Runtime 1.31 spends 26 us per call on any that it is given.
        return functools.partial(session.run_with_iobinding, binding)


def _check_interface(stage: Stage, session: Any) -> None:
    """Check that a model has the inputs and outputs that the manifest promises."""
    for what, specs, nodes in (
        ("input", stage.inputs, session.get_inputs()),
        ("output", stage.outputs, session.get_outputs()),
    ):
        have = {node.name: node for node in nodes}
        if sorted(have) != sorted(spec.name for spec in specs):
            raise BackendError(
                f"stage {stage.name!r}: the {what}s of its file differ from the manifest",
                stage=stage.name,
                got=", ".join(sorted(have)),
                expected=", ".join(sorted(spec.name for spec in specs)),
            )
        for spec in specs:
            _check_tensor(stage, what, spec, have[spec.name])


def _check_tensor(stage: Stage, what: str, spec: TensorSpec, node: Any) -> None:
    dtype = _DTYPES.get(node.type, node.type)
    fits = len(node.shape) == len(spec.shape) and all(
        not isinstance(have, int) or not isinstance(want, int) or have == want
        for have, want in zip(node.shape, spec.shape, strict=True)
    )
    if dtype != spec.dtype or not fits or (isinstance(node.shape[0], int) and spec.shape[0] != 1):
        raise BackendError(
            f"stage {stage.name!r}: {what} {spec.name!r} of its file differs from the manifest",
            stage=stage.name,
            got=f"{node.shape} {dtype}",
            expected=str(spec),
        )
