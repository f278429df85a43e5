"""Runs a cascade's stages on an NVIDIA GPU, in the best execution mode that works there.

In the modes "polling", "sync" and "run_all" the scheduler drives the backend stage by stage and
decides itself where a frame ends. In the mode "graph" the whole frame is one CUDA graph: the device
decides, and the host launches once and waits once. All modes judge exits with the same kernel, so
they give the same results.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.backends.base import Backend, Collected
from edge_runtime.backends.cuda import decide, probe
from edge_runtime.backends.cuda.base import Cuda, MappedMemory
from edge_runtime.backends.cuda.decide import Verdict
from edge_runtime.backends.cuda.prepared import Prepared
from edge_runtime.backends.cuda.slots import NO_DEADLINE, Slot
from edge_runtime.backends.cuda.stages import DeviceStages
from edge_runtime.cascade import Plan
from edge_runtime.confidence import Decision, Metric
from edge_runtime.errors import BackendError, BackendUnavailable, ConfigError, CudaError, InputError
from edge_runtime.policy import Never, Policy
from edge_runtime.prediction import Ended

logger = logging.getLogger(__name__)

T = TypeVar("T")

Mode = Literal["best", "graph", "polling", "sync", "run_all"]
Package = Literal["any", "cuda-core", "pycuda"]

#: Polls of mapped memory between two questions to the driver whether the stream is still alive.
#: A poll costs some 0.3 us in Python, a question about 2 us.
_ASK_EVERY = 64
#: Why a frame ended, by the status that the device wrote.
_ENDED: dict[int, Ended | Literal["not finite"]] = {
    decide.CONFIDENT: "confident",
    decide.LAST: "last",
    decide.DEADLINE: "deadline",
    decide.NOT_FINITE: "not finite",
}
_LAST_SEQUENCE = 2**32 - 1
#: Why stages can't be timed in a mode.
_UNTIMED = {
    "graph": "its stages can't be timed: the device runs a frame as a whole",
    "run_all": "its stages can't be timed: all are on the stream before one is asked for",
}


#: Modes in which nobody on the host says what runs next -> why.
_ON_ITS_OWN = {
    "graph": "a gate can't run in it: what follows an exit is decided on the device",
    "run_all": "a gate can't run in it: all stages are on the stream before the first exit",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class CudaOptions:
    """How a cascade runs on the GPU.

    Attributes:
        mode: An execution mode, or the best of graph, polling and sync that works here.
        batch: Largest number of images per call; every run computes as many. The mode graph takes
            one.
        overlap: Whether the next frame is copied to the device and preprocessed while one is in
            flight; see `Scheduler.submit`.
        nested: Whether the branches of the mode graph stand inside each other.
        package: What reaches the CUDA driver.
        device: Index of the GPU.
        timeout_s: How long the device may take for an answer, in the modes graph and polling,
            before it counts as hung.
        time_stages: Whether every stage is run between two events of the device and waited for,
            without a limit, so that traces have its duration. The wait is not in it, nor the copy
            of the image to the device, which belongs to no stage; what the device idles while the
            host still puts the stage on the stream is. Frames take longer as a whole. Only in the
            modes polling and sync, of which "best" takes the better one, and without overlap.
    """

    mode: Mode = "best"
    batch: int = 1
    overlap: bool = False
    nested: bool = False
    package: Package = "any"
    device: int = 0
    timeout_s: float = 10.0
    time_stages: bool = False

    def __post_init__(self) -> None:
        """Refuse what no device could do."""
        if self.batch < 1:
            raise ConfigError("batch", got=self.batch, expected=">= 1")
        if self.mode not in ("best", *probe.MODES):
            raise ConfigError(
                "mode", got=repr(self.mode), expected=f"best, {', '.join(probe.MODES)}"
            )
        if self.time_stages and self.mode in _UNTIMED:
            raise ConfigError(
                f"the mode {self.mode!r}: {_UNTIMED[self.mode]}",
                remedy="Time them in the mode polling or sync: 'best' takes one of these",
            )
        if self.time_stages and self.overlap:
            raise ConfigError(
                "stages can't be timed with overlap: another frame's work runs beside them",
                remedy="Set time_stages or overlap, not both",
            )


@dataclass
class _Frame:
    """A frame in flight: its memory, and how far it has come."""

    slot: Slot
    brought: bool = False
    joined: bool = False
    #: Work was queued that nobody has waited for.
    busy: bool = False
    judged: set[int] = field(default_factory=set)
    rows: NDArray[np.intp] | None = None


class _Answered(Collected):
    """A frame that the device has ended, read when somebody asks."""

    __slots__ = ("_last", "_records", "ended", "last")

    def __init__(self, last: int, records: bytes) -> None:
        self._records = records
        self._last = decide.verdict_of(records, last)
        self.last = last
        self.ended = _ENDED[int(self._last.status)]

    def decision(self, index: int) -> Decision:
        if index == self.last:
            return self._last.decision
        return decide.verdict_of(self._records, index).decision

    def seconds_to_end(self, index: int) -> float:
        """By the device's clock, whose lower 32 bits wrap after four seconds."""
        ago = self._last.time_ns - decide.verdict_of(self._records, index).time_ns
        return int(ago) % 2**32 * 1e-9


class CudaBackend(Backend):
    """Runs stages on an NVIDIA GPU.

    Args:
        stages: What brings the stages' work: torch modules, TensorRT engines.
        options: How it is run.
        cuda: What reaches the driver, where it is not to be opened by its name.
    """

    def __init__(
        self,
        stages: DeviceStages,
        options: CudaOptions | None = None,
        *,
        cuda: Cuda | None = None,
    ) -> None:
        self.name = stages.name
        self.options = options or CudaOptions()
        self.asynchronous = not self.options.time_stages
        self.mode = self.options.mode
        self.ahead = self.options.overlap
        self.largest_batch = self.options.batch
        #: Why better modes than the one that runs are not available, by their name.
        self.passed_over: dict[str, str] = {}
        #: How often the host has waited for the device.
        self.waits = 0
        self._given = cuda
        self.stages = stages
        self._stack = ExitStack()
        self._opened = self._hung = False
        self._flight: deque[_Frame] = deque()

    @property
    def decides(self) -> bool:
        """Whether the device decides where a frame ends."""
        return self.mode == "graph"

    def _open(self, plan: Plan, axes: Mapping[str, int], variants: Mapping[str, str]) -> None:
        if self._hung:
            self._need_answers()
            self.close()  # What could not be freed while it hung.
        keep = self._stack.enter_context
        self.cuda = cuda = self._given or open_cuda(self.options.package, self.options.device)
        self._stack.callback(cuda.close)
        cuda.open()
        # A flag per thread; numbers of threads are given to new ones when old ones end.
        self._threads = threading.local()
        self._threads.current = True
        self._choose_mode()
        self._ready = Prepared(cuda, self.stages, self.options.batch, keep)
        timed = self.options.time_stages
        self._ready.open(plan, axes, variants, mode=self.mode, ahead=self.ahead, timed=timed)
        self._stack.callback(self._wait_for_all)
        if self.decides:
            self._ready.build_graphs(plan, nested=self.options.nested)
        self._staging: MappedMemory | None = None
        self._sequence = 0
        self.use(Never(), "max_softmax", [1.0] * len(plan.steps))
        self._opened = True

    def _choose_mode(self) -> None:
        reasons = probe.why_not(self.cuda, self.options.batch)
        if self.options.time_stages:
            reasons |= _UNTIMED
        if self.host_decides:
            reasons |= _ON_ITS_OWN
        if self.options.mode == "best":
            self.mode = next(mode for mode, reason in reasons.items() if not reason)
            self.passed_over = {mode: why for mode, why in reasons.items() if why}
            logger.info("execution mode %s; not available: %s", self.mode, self.passed_over)
            return
        self.mode = self.options.mode
        if reasons[self.mode]:
            remain = ", ".join(mode for mode, reason in reasons.items() if not reason)
            raise BackendUnavailable(
                f"the mode {self.mode!r} is not available here: {reasons[self.mode]}",
                remedy=f"Modes that are: {remain}",
            )

    def close(self) -> None:
        """Free everything on the device."""
        self._flight.clear()
        was_open, self._opened = self._opened, False
        if self._hung and not self._is_back():
            # To free is to wait: a later close can, should the device come back.
            logger.warning("the GPU does not answer: what it holds is not freed now")
            return
        stack, self._stack = self._stack, ExitStack()
        try:
            try:
                if was_open:
                    self._on_this_thread()
            finally:
                stack.close()
        except CudaError as error:
            # Whoever closes after a failure has seen that already, and all was tried.
            logger.debug("closing the GPU's resources: %s", error)

    def _is_back(self) -> bool:
        """Whether a device that was given up has finished its work after all."""
        try:
            self._on_this_thread()
        except CudaError:
            return False  # Nothing can be asked from here.
        try:
            self._hung = not self._ready.main.is_done()
        except CudaError:
            self._hung = False  # Lost, which at least is an answer.
        return not self._hung

    def _need_answers(self) -> None:
        """Refuse what would wait for a device that was given up."""
        if self._hung and not self._is_back():
            raise CudaError("the device has not answered before", remedy="Start the process anew")

    def _wait_for_all(self) -> None:
        self._ready.side.synchronize()
        self._ready.main.synchronize()

    def use(self, policy: Policy, metric: Metric, temperatures: Sequence[float]) -> None:
        """Write the rules of an operating point to the device; no graph is built anew."""
        self._on_this_thread()
        self._need_answers()
        known = policy if self.decides else Never()
        ready = self._ready
        rules = decide.rules(known, metric, temperatures, ready.positions)
        ready.judge.write(rules, ready.main)
        self._rules: list[tuple[Metric, float]] = [(metric, value) for value in temperatures]

    def feed(self, image: NDArray[Any]) -> None:
        """Begin a frame; one that was not brought to its end is waited for."""
        if not self._opened:
            raise BackendError(f"the backend {self.name!r} is not open")
        self._on_this_thread()
        self._need_answers()
        if self._flight:
            self._wait_for_all()
            self._flight.clear()
        self._admit(image)

    def _on_this_thread(self) -> None:
        """CUDA knows a context per thread."""
        if not getattr(self._threads, "current", False):
            self.cuda.make_current()
            self._threads.current = True

    def feed_ahead(self, image: NDArray[Any]) -> None:
        """Bring a frame to the device while another is in flight."""
        if not self.ahead or len(self._flight) >= len(self._ready.slots):
            raise BackendError(
                "no frame can be fed ahead now",
                got=f"{len(self._flight)} in flight",
                expected=f"fewer than {len(self._ready.slots)}, and the option overlap",
            )
        self._on_this_thread()
        self._admit(image)

    def _admit(self, image: NDArray[Any]) -> None:
        if len(image) > self.options.batch:
            raise InputError(
                "images per call",
                got=len(image),
                expected=f"at most {self.options.batch}, which the cascade was opened for",
                remedy="Open it with a larger batch",
            )
        taken = [frame.slot for frame in self._flight]
        slot = next(slot for slot in self._ready.slots if slot not in taken)
        self._sequence = self._sequence % _LAST_SEQUENCE + 1
        slot.write(image, self._sequence)
        frame = _Frame(slot)
        self._flight.append(frame)
        if not self.decides:
            self._bring(frame)
        if self.mode == "run_all":
            self._run_all(frame)

    def _bring(self, frame: _Frame) -> None:
        """Put the image's way to the device on the stream for it."""
        ready, slot = self._ready, frame.slot
        slot.limit(NO_DEADLINE)
        frame.brought = frame.busy = True
        slot.bring(ready.side)
        for stage in ready.run_ahead:
            self.stages.enqueue(stage, slot.number, ready.side)
        if self.ahead:
            ready.side.record(slot.arrived)

    def _current(self) -> _Frame:
        """The frame that is driven by the host, its image under way."""
        if not self._flight:
            raise BackendError(f"the backend {self.name!r} has no frame: feed one first")
        self._on_this_thread()
        self._join(self._flight[0])
        return self._flight[0]

    def _join(self, frame: _Frame) -> None:
        """Let the main stream wait for the frame's image."""
        if not frame.brought:
            self._bring(frame)
        if self.ahead and not frame.joined:
            self._ready.main.wait(frame.slot.arrived)
        frame.joined = True

    def run(self, stage: str) -> float | None:
        """Put one stage on the stream; it is not waited for, unless stages are timed.

        Returns:
            Seconds between its begin and its end on the device; None where stages are not timed.
        """
        if not self._opened or stage not in self._ready.loaded:
            raise BackendError(f"stage {stage!r} was not opened", stage=stage)
        frame = self._current()
        if self.options.time_stages:
            return self._timed(stage, frame)
        if stage not in self._ready.work.ahead and self.mode != "run_all":
            self._enqueue(stage, frame)
        return None

    def _timed(self, stage: str, frame: _Frame) -> float:
        """Run one stage between two events.

        The image's copy stands before the first one, on the same stream.
        """
        stream, (begin, end) = self._ready.main, self._ready.moments
        frame.busy = True
        try:
            stream.record(begin)
            self.stages.enqueue(stage, frame.slot.number, stream)
            stream.record(end)
            self._wait(frame)
            return self.cuda.seconds_between(begin, end)
        except CudaError as error:
            raise _in_stage(stage, error) from error

    def _enqueue(self, stage: str, frame: _Frame) -> None:
        frame.busy = True
        try:
            self.stages.enqueue(stage, frame.slot.number, self._ready.main)
        except CudaError as error:
            raise _in_stage(stage, error) from error

    def _run_all(self, frame: _Frame) -> None:
        ready, slot = self._ready, frame.slot
        self._join(frame)
        for stage in ready.loaded:
            if stage not in ready.work.ahead:
                self._enqueue(stage, frame)
        for k in range(len(ready.exits)):
            self._put_judge(slot, k)
        ready.main.copy(slot.record[0], ready.record(0), len(ready.exits) * ready.stride)

    def decide(self, logits: str, metric: Metric, temperature: float) -> Decision:
        """Judge an exit on the device, and wait for the verdict."""
        frame, k = self._current(), self._ready.exits.index(logits)
        changed = self._rules[k] != (metric, temperature)
        if changed:
            self._change_rule(k, metric, temperature)
        if self.mode == "run_all" and not changed:
            if frame.busy:
                self._wait(frame)
            return self._decision(frame, k, self._read(frame.slot, k))
        return self._decision(frame, k, self._judge_now(frame, k))

    def _wait(self, frame: _Frame) -> None:
        """Wait for all work on the stream."""
        self.waits += 1
        self._ready.main.synchronize()
        frame.busy = False

    def _judge_now(self, frame: _Frame, k: int) -> Verdict:
        ready, slot = self._ready, frame.slot
        if k in frame.judged:
            slot.forget(k)
        frame.judged.add(k)
        self._put_judge(slot, k)
        if self.mode == "polling":
            verdict = self._spin(lambda: slot.records.read(k, slot.samples, slot.sequence))
            frame.busy = False
            return verdict
        ready.main.copy(slot.record[k], ready.record(k), ready.stride)
        self._wait(frame)
        return self._read(slot, k)

    def _put_judge(self, slot: Slot, k: int) -> None:
        """Put an exit's decision on the stream, on as many blocks as the frame has samples.

        A block without a sample could run after all verdicts are in, and see the next frame.
        """
        call = self._ready.calls[slot.number][k]
        if call.grid != slot.samples:
            call = call._replace(grid=slot.samples)
        self._ready.main.launch(*call)

    @staticmethod
    def _read(slot: Slot, k: int) -> Verdict:
        """A verdict that the device has written before what was waited for."""
        for _ in range(_ASK_EVERY):
            verdict = slot.records.read(k, slot.samples, slot.sequence)
            # Loads may pass each other on ARM: then the next look sees it.
            if verdict is not None:
                return verdict
        raise CudaError(f"the device finished a frame without a verdict at exit {k}")

    @staticmethod
    def _decision(frame: _Frame, k: int, verdict: Verdict) -> Decision:
        """The verdict on the samples that have not left."""
        decision, status = verdict.decision, verdict.status
        if isinstance(status, int):  # of one image
            if status == decide.NOT_FINITE:
                raise confidence.not_finite(0)
            return decision
        rows = slice(None) if frame.rows is None else frame.rows
        labels, signal, sure = map(np.asarray, decision)
        decision, status = Decision(labels[rows], signal[rows], sure[rows]), status[rows]
        bad = np.flatnonzero(status == decide.NOT_FINITE)
        if bad.size:
            raise confidence.not_finite(int(bad[0]))
        return decision

    def _change_rule(self, k: int, metric: Metric, temperature: float) -> None:
        rules = self._ready.judge.rules.copy()
        rules[k] = decide.rules(Never(), metric, [temperature], [k])[0]
        self._ready.judge.write(rules, self._ready.main)
        self._rules[k] = (metric, temperature)

    def _spin(self, ready: Callable[[], T | None]) -> T:
        """Poll until something has arrived, and ask the driver now and then whether it can."""
        self.waits += 1
        polls, begin = 0, 0.0
        while True:
            found = ready()
            if found is not None:
                return found
            polls += 1
            if polls % _ASK_EVERY == 0:
                begin = begin or time.monotonic()
                # Other threads, a camera's for one, get their turn.
                time.sleep(0)
                found = self._still_possible(ready, begin)
                if found is not None:
                    return found

    def _still_possible(self, ready: Callable[[], T | None], begin: float) -> T | None:
        if self._ready.main.is_done():
            found = ready()
            if found is None:
                raise CudaError("the device finished a frame without a verdict on it")
            return found
        if time.monotonic() - begin > self.options.timeout_s:
            self._hung = True
            raise CudaError(
                f"the device gave no answer within {self.options.timeout_s:g} s",
                remedy="It hangs, or other programs keep it busy: nvidia-smi shows them",
            )
        return None

    def launch(self, deepest: int) -> None:
        """Start the frame that was fed last; the device decides where it ends.

        Args:
            deepest: Index of the evaluated exit that answers at the latest.
        """
        self._on_this_thread()
        ready, frame = self._ready, self._flight[-1]
        slot = frame.slot
        slot.limit(deepest)
        frame.brought = frame.joined = frame.busy = True
        if self.ahead:
            ready.ahead_graphs[slot.number].launch(ready.side)
            ready.side.record(slot.arrived)
            ready.main.wait(slot.arrived)
        ready.frame_graphs[slot.number].launch(ready.main)

    def collect(self) -> Collected:
        """Wait for the answer to the oldest frame in flight."""
        self._on_this_thread()
        frame = self._flight[0]
        slot = frame.slot
        exit_ = self._spin(lambda: slot.records.answer(slot.sequence))
        frame.busy = False
        for _ in range(_ASK_EVERY):
            records = slot.records.copy(exit_ + 1, slot.sequence)
            # As in `_read`: what was written before may be seen after.
            if records is not None:
                return _Answered(exit_, records)
        raise CudaError("the device finished a frame without a verdict at every exit")

    def done(self) -> None:
        """The current frame is over."""
        frame = self._flight.popleft()
        if frame.busy:
            # It ended between two exits: another image must not overwrite what stages still read.
            if not frame.joined:
                self._ready.side.synchronize()
            self._wait(frame)

    def keep(self, rows: NDArray[np.intp], tensors: Sequence[str]) -> None:
        """Leave the samples that left out of what is said; they are computed all the same."""
        frame = self._current()
        frame.rows = rows if frame.rows is None else frame.rows[rows]

    def read(self, tensor: str) -> NDArray[Any]:
        """A copy of a tensor, on the host."""
        frame, ready = self._current(), self._ready
        spec, work = ready.specs[tensor], ready.work
        nbytes = work.nbytes(spec)
        if self._staging is None:
            largest = max(map(work.nbytes, ready.specs.values()))
            self._staging = self._stack.enter_context(self.cuda.mapped_memory(largest))
        source = frame.slot.image
        if tensor != work.image.name:
            source = self.stages.address(tensor, frame.slot.number)
        ready.main.copy(self._staging.address, source, nbytes)
        self._wait(frame)
        batch = (self.options.batch, *spec.sample_shape())
        values = self._staging.host[:nbytes].view(spec.dtype).reshape(batch)[: frame.slot.samples]
        return np.array(values if frame.rows is None else values[frame.rows])

    def precision(self, stage: str) -> str:
        """The variant that was loaded."""
        return self.stages.precision(stage)


def _in_stage(stage: str, error: CudaError) -> CudaError:
    """The same error, with the stage at which it came up."""
    return CudaError(f"stage {stage!r}: {error}", stage=stage)


def open_cuda(package: Package, device: int) -> Cuda:
    """What reaches the driver, not opened: cuda-core where it is installed, else pycuda.

    Raises:
        BackendUnavailable: The package is not installed.
    """
    import importlib.util

    from edge_runtime.backends.cuda.core import CudaCore
    from edge_runtime.backends.cuda.pycuda import PyCuda

    if package == "pycuda":
        return PyCuda(device)
    core = importlib.util.find_spec("cuda") and importlib.util.find_spec("cuda.core")
    if package == "any" and not core and importlib.util.find_spec("pycuda"):
        return PyCuda(device)
    return CudaCore(device)
