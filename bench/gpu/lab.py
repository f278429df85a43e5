"""What the checks of `bench.gpu_check` share: one device, a budget of time, opened cascades."""

from __future__ import annotations

import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from bench.gpu import kernel_stages
from edge_runtime.backends.cuda import base, probe
from edge_runtime.backends.cuda.backend import CudaBackend, CudaOptions, Package
from edge_runtime.backends.cuda.base import Cuda
from edge_runtime.backends.cuda.stages import DeviceStages
from edge_runtime.cascade import Cascade
from edge_runtime.errors import CudaError
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Clock, interleave

Times = dict[str, NDArray[np.float64]]

#: How each way to run a cascade is asked for. "nested" has its branches inside each other.
MODES: Mapping[str, Mapping[str, Any]] = {
    "graph": {"mode": "graph"},
    "graph nested": {"mode": "graph", "nested": True},
    "graph overlap": {"mode": "graph", "overlap": True},
    "graph nested overlap": {"mode": "graph", "nested": True, "overlap": True},
    "polling": {"mode": "polling"},
    "polling overlap": {"mode": "polling", "overlap": True},
    "sync": {"mode": "sync"},
    "sync overlap": {"mode": "sync", "overlap": True},
    "run_all": {"mode": "run_all"},
}

#: A margin that any two logits which differ have, and one that none have.
_ALWAYS, _NEVER = 1e-6, float(np.finfo(np.float32).max)
#: Rounds between two looks at the clock, and per block of the bootstrap.
_BLOCK = 25
#: Part of a measurement's time that its warm-up may take.
_WARM_UP_SHARE = 0.25
#: Looks at mapped memory between two questions to the driver.
_ASK_EVERY = 64
_PATIENCE_S = 10.0


class NotRun(Exception):
    """A check whose means are missing; the message says which."""


class SharedCuda(Cuda):
    """One device that many backends open in turn; each source is compiled once.

    Attributes:
        made: How often each thing was made: "graph", "memory", "kernels" and so on.
    """

    name: ClassVar[str] = "shared"

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._compiled: dict[tuple[str, bool], dict[str, base.Kernel]] = {}
        self.made: Counter[str] = Counter()

    def open(self) -> SharedCuda:
        """Open the device at the first call."""
        if not self.made["open"]:
            self._cuda.open()
            self.facts = self._cuda.facts
        self.made["open"] += 1
        return self

    def close(self) -> None:
        """Nothing: see `close_device`."""

    def close_device(self) -> None:
        """Close the device."""
        self._compiled = {}
        self._cuda.close()

    @property
    def package(self) -> str:
        """What reaches the driver."""
        return self._cuda.name

    def make_current(self) -> None:
        """See `Cuda.make_current`."""
        self._cuda.make_current()

    def why_no_graphs(self) -> str:
        """See `Cuda.why_no_graphs`."""
        return self._cuda.why_no_graphs()

    def memory(self, nbytes: int) -> base.Memory:
        """See `Cuda.memory`."""
        self.made["memory"] += 1
        return self._cuda.memory(nbytes)

    def mapped_memory(self, nbytes: int) -> base.MappedMemory:
        """See `Cuda.mapped_memory`."""
        self.made["memory"] += 1
        return self._cuda.mapped_memory(nbytes)

    def stream(self) -> base.Stream:
        """See `Cuda.stream`."""
        self.made["stream"] += 1
        return self._cuda.stream()

    def event(self) -> base.Event:
        """See `Cuda.event`."""
        self.made["event"] += 1
        return self._cuda.event()

    def seconds_between(self, start: base.Event, end: base.Event) -> float:
        """See `Cuda.seconds_between`."""
        return self._cuda.seconds_between(start, end)

    def kernels(
        self, source: str, names: Sequence[str], *, conditionals: bool = False
    ) -> dict[str, base.Kernel]:
        """See `Cuda.kernels`; what was compiled before is used again."""
        known = self._compiled.setdefault((source, conditionals), {})
        missing = [name for name in names if name not in known]
        if missing:
            self.made["kernels"] += 1
            known |= self._cuda.kernels(source, missing, conditionals=conditionals)
        return {name: known[name] for name in names}

    def graph(self) -> base.Graph:
        """See `Cuda.graph`."""
        self.made["graph"] += 1
        return self._cuda.graph()


class Lab:
    """Where checks are made.

    Args:
        cuda: The device, open.
        make: Makes another of its kind, for what must not share it.
        device: Index of the GPU.
        package: What reaches the driver, as the user asked for it.
        scale: Size of all counts and budgets, 1 for the whole check.
        only: The execution modes that are wanted, all where empty; run_all is always there, for
            the others to be compared with.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        cuda: SharedCuda,
        make: Callable[[], Cuda],
        *,
        device: int = 0,
        package: Package = "any",
        scale: float = 1.0,
        only: Sequence[str] = (),
        clock: Clock = time.perf_counter,
    ) -> None:
        self.cuda = cuda
        self.make = make
        self.device = device
        self.package = package
        self.scale = scale
        self._only = only
        self.clock = clock
        self._reasons: dict[str, str] | None = None
        self.begin(math.inf)

    def begin(self, seconds: float) -> None:
        """Start a check that may take about this long."""
        self._end = self.clock() + seconds

    @property
    def left_s(self) -> float:
        """Seconds that are left to the running check."""
        return self._end - self.clock()

    def count(self, full: int, least: int = 1) -> int:
        """How many of something, in proportion to the size of the whole check."""
        return max(least, round(full * self.scale))

    @property
    def reasons(self) -> dict[str, str]:
        """Why each execution mode is not run, empty where it is."""
        if self._reasons is None:
            self._reasons = probe.why_not(self.cuda, 1)
        wanted = {*(self._only or probe.MODES), "run_all"}
        reasons = self._reasons.items()
        return {mode: why if mode in wanted else "not asked for" for mode, why in reasons}

    def modes(self, *names: str) -> list[str]:
        """Those of `names`, keys of `MODES`, that work here; all where none is named."""
        return [name for name in names or MODES if not self.reasons[str(MODES[name]["mode"])]]

    def missing(self, *names: str) -> dict[str, str]:
        """Those of `names` that don't work here, and why."""
        modes = {name: str(MODES[name]["mode"]) for name in names or MODES}
        return {n: f"not run: {self.reasons[m]}" for n, m in modes.items() if self.reasons[m]}

    def need_graphs(self) -> None:
        """Give the check up where the mode graph is not available.

        Raises:
            NotRun: It is not.
        """
        if self.reasons["graph"]:
            raise NotRun(f"the mode graph is not run: {self.reasons['graph']}")

    def scheduler(
        self,
        cascade: Cascade,
        point: OperatingPoint,
        mode: str,
        *,
        stages: DeviceStages | None = None,
        steps: int = 0,
        preprocess_steps: int = 0,
        **options: Any,
    ) -> Scheduler:
        """A cascade on the device, not opened; of kernels, unless stages are given."""
        own = stages or kernel_stages.KernelStages(steps=steps, preprocess_steps=preprocess_steps)
        settings = CudaOptions(**{**MODES[mode], **options})
        return Scheduler(cascade, CudaBackend(own, settings, cuda=self.cuda), point)

    def schedulers(
        self, stack: ExitStack, cascade: Cascade, point: OperatingPoint, *names: str, **options: Any
    ) -> dict[str, Scheduler]:
        """The same cascade in each of the named modes that works, open."""
        return {
            name: stack.enter_context(self.scheduler(cascade, point, name, **options))
            for name in self.modes(*names)
        }

    def measure(
        self,
        subjects: Mapping[str, Callable[[], object]],
        *,
        rounds: int,
        seconds: float,
        pause_s: float = 0.0,
    ) -> Times:
        """Time subjects in turn, until all rounds are done or the time is up.

        Args:
            subjects: Name -> what to time.
            rounds: Rounds that are wanted.
            seconds: Time that may be used; the warm-up gets a quarter of it at most.
            pause_s: Seconds before each subject. A graph's answer arrives before its last nodes
                are done, which would be taken for a part of what comes next.

        Returns:
            Name -> durations in seconds, shape (rounds done,), at least one block.
        """
        turn: dict[str, Callable[[], object]] = {}
        for name, subject in subjects.items():
            if pause_s:
                turn[f"before {name}"] = functools.partial(self._pause, pause_s)
            turn[name] = subject
        begin, warm_ups = self.clock(), 0
        while self._is_cold(warm_ups, self.clock() - begin, seconds):
            for subject in turn.values():
                subject()
            warm_ups += 1
        parts: list[Times] = []
        done = 0
        while done < rounds and (not parts or self.clock() - begin < seconds):
            block = min(_BLOCK, rounds - done)
            parts.append(interleave(turn, rounds=block, clock=self.clock))
            done += block
        return {name: np.concatenate([part[name] for part in parts]) for name in subjects}

    def _pause(self, seconds: float) -> None:
        """Wait without sleeping: a processor that slept is slow to begin again."""
        end = self.clock() + seconds
        while self.clock() < end:
            pass

    def _is_cold(self, rounds: int, spent_s: float, seconds: float) -> bool:
        """Whether a warm-up goes on: to 200 rounds and 0.2 s, as everywhere, if there is time."""
        enough = rounds >= self.count(200, least=2) and spent_s >= 0.2 * self.scale
        return rounds == 0 or not (enough or spent_s > seconds * _WARM_UP_SHARE)

    def spin(self, stream: base.Stream, ready: Callable[[], bool]) -> None:
        """Poll until something has arrived from the device.

        Raises:
            CudaError: The stream is done and it has not, or it takes too long.
        """
        end, polls = self.clock() + _PATIENCE_S, 0
        while not ready():
            polls += 1
            if polls % _ASK_EVERY:
                continue
            if stream.is_done() and not ready():
                raise CudaError("the host does not see what a kernel wrote to mapped memory")
            if self.clock() > end:
                raise CudaError(f"a kernel did not answer within {_PATIENCE_S:g} s")


def leaving_at(cascade: Cascade, exit: int, name: str = "") -> OperatingPoint:
    """The point at which every exit is evaluated up to `exit`, where every sample leaves.

    All points of a cascade evaluate the same exits, so a scheduler can switch between them.
    """
    names = [found.name for found in cascade.exits]
    thresholds = {found: _ALWAYS if k == exit else _NEVER for k, found in enumerate(names[:-1])}
    return OperatingPoint(
        name or f"leave-at-{names[exit]}", metric="logits_margin", thresholds=thresholds
    )


def microseconds(seconds: Any) -> float:
    """The median of some durations, in microseconds, to a hundredth."""
    return round(float(np.median(seconds)) * 1e6, 2)


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope of the least-squares line."""
    slope, intercept = np.polyfit(np.asarray(x, np.float64), np.asarray(y, np.float64), 1)
    return float(intercept), float(slope)
