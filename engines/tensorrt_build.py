"""Builds a TensorRT engine of one ONNX stage.

Networks are strongly typed: what precision a tensor has is said in the ONNX graph, by FP16 types or
by QuantizeLinear and DequantizeLinear, and TensorRT keeps to it. Every input gets one fixed shape.
The builder works in a thread of its own, so that Ctrl-C is heard while it does: it ends the build
at its next step.

```
built = build_engine(import_tensorrt(), model, {"pixels": (1, 3, 32, 32)}, stage="head1")
built.plan                      # the engine
built.layers.casts              # layers that do nothing but convert
```
"""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime import files
from edge_runtime.backends.tensorrt import api
from edge_runtime.errors import ConfigError, EngineBuildError
from engines.tensorrt_layers import LayerSummary, from_inspector, from_log, summarize

#: Called with a text that tells how far the build is.
Report = Callable[[str], None]

_LAYERS, _SCRATCH = "Layers:", "Max Scratch Memory:"
#: Seconds between two reports.
_REPORT_EVERY_S = 0.1


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """What changes an engine besides its graph.

    Attributes:
        workspace_mb: Device memory that one layer may use for itself, in MiB; None for as much as
            there is.
        optimization_level: How long TensorRT searches, 0 to 5.
    """

    workspace_mb: int | None = None
    optimization_level: int = 3

    def __post_init__(self) -> None:
        """Refuse what TensorRT would."""
        if self.workspace_mb is not None and self.workspace_mb < 1:
            raise ConfigError("workspace", got=f"{self.workspace_mb} MiB", expected=">= 1 MiB")
        if not 0 <= self.optimization_level <= 5:
            raise ConfigError("optimization level", got=self.optimization_level, expected="0 to 5")

    def plain(self) -> dict[str, str | int | bool]:
        """The options that differ from the defaults, as JSON data."""
        found: dict[str, str | int | bool] = {}
        if self.workspace_mb is not None:
            found["workspace_mb"] = self.workspace_mb
        if self.optimization_level != 3:
            found["optimization_level"] = self.optimization_level
        return found


@dataclass(frozen=True)
class BuiltEngine:
    """An engine, and how it came about.

    Attributes:
        plan: The serialized engine.
        layers: What it consists of; None where this TensorRT does not tell.
        scratch_bytes: Device memory that it needs while it runs, besides its inputs and outputs;
            None where this TensorRT does not tell.
        seconds: How long parsing and building took.
        log: Warnings of TensorRT.
    """

    plan: bytes
    layers: LayerSummary | None
    scratch_bytes: int | None
    seconds: float
    log: tuple[str, ...]


def build_engine(
    trt: Any,
    model: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    stage: str,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    report: Report | None = None,
) -> BuiltEngine:
    """Build an engine; may take minutes.

    Args:
        trt: TensorRT, see `api.import_tensorrt`.
        model: The ONNX file of the stage.
        shapes: Shape of every input with a dynamic axis; others may be named too.
        stage: What is built, for messages.
        options: How.
        timing_cache: File in which measured times are kept from build to build; what it holds is
            used and completed. None for none.
        report: Told ten times a second how far it is.

    Returns:
        The engine.

    Raises:
        EngineBuildError: The parser or the builder refused; the message has the ONNX node and
            TensorRT's reasons.
        KeyboardInterrupt: Ctrl-C, after the builder has stopped.
    """
    build = _Build(trt, model, shapes, stage, options or BuildOptions(), timing_cache)
    thread = threading.Thread(target=build.run, name=f"build {stage}", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_REPORT_EVERY_S)
            if report is not None and thread.is_alive():
                report(build.progress.text())
    except BaseException:
        build.progress.cancelled.set()
        thread.join()
        raise
    if build.error is not None:
        raise build.error
    assert build.built is not None
    return build.built


class _Progress:
    """Where the builder is, and whether it shall go on; called from its threads."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self._begin = time.monotonic()
        self._lock = threading.Lock()
        self._phases: dict[str, tuple[int, int]] = {}

    def start(self, phase: str, steps: int) -> None:
        with self._lock:
            self._phases[phase] = (0, steps)

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)

    def step(self, phase: str, step: int) -> bool:
        with self._lock:
            if phase in self._phases:
                self._phases[phase] = (step + 1, self._phases[phase][1])
        return not self.cancelled.is_set()

    def text(self) -> str:
        with self._lock:
            phases = [f"{name} {done}/{steps}" for name, (done, steps) in self._phases.items()]
        where = " > ".join(phases) or "parsing"
        return f"{time.monotonic() - self._begin:.0f} s, {where}"

    def monitor(self, trt: Any) -> Any:
        """As an object for TensorRT."""
        progress = self

        class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)

            def phase_start(self, name: str, parent: str | None, steps: int) -> None:
                progress.start(name, steps)

            def phase_finish(self, name: str) -> None:
                progress.finish(name)

            def step_complete(self, name: str, step: int) -> bool:
                return progress.step(name, step)

        return Monitor()


class _Build:
    """One build; `run` leaves `built` or `error`."""

    def __init__(
        self,
        trt: Any,
        model: bytes,
        shapes: Mapping[str, tuple[int, ...]],
        stage: str,
        options: BuildOptions,
        timing_cache: Path | None,
    ) -> None:
        self.progress = _Progress()
        self.built: BuiltEngine | None = None
        self.error: BaseException | None = None
        self._trt, self._model, self._shapes = trt, model, shapes
        self._stage, self._options = stage, options
        self._timing_cache = timing_cache if api.has(trt, "timing cache") else None
        self._log = api.Log(trt, watch=(_LAYERS, _SCRATCH))

    def run(self) -> None:
        """Parse and build."""
        try:
            self.built = self._run()
        except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
            self.error = error
            # The error would keep TensorRT's objects in a cycle, to be freed at any time: inside
            # of another call of TensorRT too, whose lock their destructors wait for, for ever.
            traceback.clear_frames(error.__traceback__)

    def _run(self) -> BuiltEngine:
        begin = time.monotonic()
        trt, log = self._trt, self._log
        builder = self._call(lambda: trt.Builder(log.native), "made no builder")
        flags = 0
        if api.has(trt, "strongly typed by a flag"):
            flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._call(lambda: builder.create_network(flags), "made no network")
        parser = self._call(lambda: trt.OnnxParser(network, log.native), "made no parser")
        if not parser.parse(self._model):
            raise self._refused(parser)
        config = self._call(builder.create_builder_config, "made no configuration")
        self._configure(config)
        self._fix_shapes(builder, network, config)
        monitor = self.progress.monitor(trt)
        config.progress_monitor = monitor
        host_memory = builder.build_serialized_network(network, config)
        if host_memory is None and self.progress.cancelled.is_set():
            raise KeyboardInterrupt
        plan = bytes(self._check(host_memory, "built no engine", self._remedy()))
        if self._timing_cache is not None:
            self._keep_times(config, self._timing_cache)
        scratch = log.details.get(_SCRATCH, "").removeprefix(_SCRATCH).split()
        return BuiltEngine(
            plan,
            self._layers(plan),
            int(scratch[0]) if scratch else None,
            time.monotonic() - begin,
            tuple(log.lines),
        )

    def _call(self, call: Callable[[], Any], what: str) -> Any:
        text = f"stage {self._stage!r}: TensorRT {what}"
        return self._log.checked_call(call, text, error=EngineBuildError)

    def _check(self, value: Any, what: str, remedy: str | None = None) -> Any:
        text = f"stage {self._stage!r}: TensorRT {what}"
        return self._log.check(value, text, error=EngineBuildError, remedy=remedy)

    def _remedy(self) -> str | None:
        """What to do about a build that failed."""
        said = " ".join(self._log.lines).lower()
        if "workspace" not in said and "could not find any implementation" not in said:
            return None
        allowed = self._options.workspace_mb
        if allowed is not None:
            return f"A layer needs more than --workspace-mb {allowed}: allow more, or set no limit"
        return "A layer finds too little device memory: end what else runs on the device"

    def _refused(self, parser: Any) -> EngineBuildError:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        reasons = [f"{e.node_operator()} {e.node_name()!r}: {e.desc()}" for e in errors]
        return EngineBuildError(
            f"stage {self._stage!r}: TensorRT's parser refused the model: "
            + ("; ".join(reasons) or "without a reason"),
            remedy="Export the stage without this operator; edge-runtime lint-qdq names what an "
            "INT8 model does wrong",
        )

    def _configure(self, config: Any) -> None:
        trt, options = self._trt, self._options
        if options.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
        config.builder_optimization_level = options.optimization_level
        # Streams of TensorRT's own would make the capture more than a row of kernels.
        config.max_aux_streams = 0
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if self._timing_cache is not None:
            known = self._timing_cache.read_bytes() if self._timing_cache.is_file() else b""
            cache = config.create_timing_cache(known)
            if cache is None or not config.set_timing_cache(cache, False):
                # Of another version or device: begin anew.
                cache = self._check(config.create_timing_cache(b""), "made no timing cache")
                self._check(config.set_timing_cache(cache, False), "took no timing cache")

    def _fix_shapes(self, builder: Any, network: Any, config: Any) -> None:
        """Pin every dynamic input to its shape."""
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        dynamic = {tensor.name: tuple(tensor.shape) for tensor in inputs if -1 in tensor.shape}
        named = {tensor.name for tensor in inputs}
        if not set(dynamic) <= set(self._shapes) <= named:
            raise EngineBuildError(
                f"stage {self._stage!r}: the dynamic inputs are {sorted(dynamic)}",
                got=f"shapes for {sorted(self._shapes)}",
            )
        if not dynamic:
            return
        what = f"refused the shapes {dict(self._shapes)}"
        profile = self._call(builder.create_optimization_profile, "made no profile")
        for name in dynamic:
            self._call(functools.partial(_pin, profile, name, self._shapes[name]), what)
        self._check(config.add_optimization_profile(profile) >= 0, what)

    def _keep_times(self, config: Any, file: Path) -> None:
        """Write what was measured; a file that can't be written is no reason to fail."""
        cache = config.get_timing_cache()
        if cache is not None:
            files.write_bytes(file, bytes(cache.serialize()))

    def _layers(self, plan: bytes) -> LayerSummary | None:
        """From the builder's log, or from the engine itself where there is a device."""
        text = self._log.details.get(_LAYERS)
        try:
            if text is not None:
                return summarize(from_log(text))
            return self._inspected(plan)
        except EngineBuildError as error:
            # A wording that nobody has seen yet is no reason to lose the engine.
            self._log.lines.append(f"WARNING: {error}")
            return None

    def _inspected(self, plan: bytes) -> LayerSummary | None:
        trt = self._trt
        runtime = self._call(lambda: trt.Runtime(self._log.native), "made no runtime")
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return None
        inspector = engine.create_engine_inspector()
        return summarize(
            from_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
        )


def _pin(profile: Any, name: str, shape: tuple[int, ...]) -> bool:
    """Give an input one shape; what TensorRT does not like raises."""
    profile.set_shape(name, shape, shape, shape)
    return True
