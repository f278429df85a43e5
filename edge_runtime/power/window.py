"""Energy of a stretch of work: counters are read around it, power is sampled and integrated."""

from __future__ import annotations

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from edge_runtime.errors import BadReading, ConfigError, PowerError
from edge_runtime.power.base import PowerSource
from edge_runtime.timing import Clock

#: Seconds between two readings of a counter, so that it never wraps twice unseen: the smallest
#: range (65 kJ, AMD) lasts 13 s at the most power that is believed.
_COUNTER_EVERY_S = 5.0
#: Share of the time between two readings by which the next may come too early.
_JITTER = 0.01
#: Share of bad readings above which what is left is not trusted.
_MOST_REJECTED = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowEnergy:
    """What one source told of a window.

    Attributes:
        source: Name of the source.
        joules: Energy; None where it could not be measured.
        seconds: Length that the energy is of.
        samples: Good readings.
        hertz: New values per second that a source of power gave; None for a counter.
        rejected: Readings that were dropped because they can't be believed.
        problem: Why there is no energy; empty where there is.
    """

    source: str
    joules: float | None
    seconds: float
    samples: int
    hertz: float | None
    rejected: int
    problem: str = ""


class EnergyWindow:
    """Measures the energy of a ``with`` block.

    One thread samples all sources of power at the interval; their power is taken as straight lines
    between samples and integrated from the begin to the end of the block. The sources must be open.
    A window is for one block. A sensor that fails raises nothing: its result says so.

    Args:
        sources: Open sources.
        interval_s: Seconds between samples.
        clock: Monotonic seconds.

    Raises:
        ConfigError: The interval is not a positive number.
    """

    def __init__(
        self,
        sources: Sequence[PowerSource],
        *,
        interval_s: float = 0.02,
        clock: Clock = time.perf_counter,
    ) -> None:
        if not (interval_s > 0 and math.isfinite(interval_s)):
            raise ConfigError("interval_s", got=interval_s, expected="a positive number of seconds")
        self._interval_s = interval_s
        self._clock = clock
        self._sources = tuple(sources)
        self._records: list[_Record] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._thread: Future[None] | None = None
        self._begin = 0.0
        self._results: tuple[WindowEnergy, ...] | None = None

    @property
    def results(self) -> tuple[WindowEnergy, ...]:
        """One result per source, in their order; there once the block has ended."""
        if self._results is None:
            raise RuntimeError("the window has not ended")
        return self._results

    def sample(self) -> None:
        """Read every source that is due, as the thread does at each interval."""
        with self._lock:
            for record in self._records:
                record.sample(self._clock)

    def __enter__(self) -> EnergyWindow:
        if self._pool is not None:
            raise RuntimeError("a window is for one block; make another")
        self._pool = ThreadPoolExecutor(1, "energy-window")
        self._records = [
            _CounterRecord(source) if source.counts else _PowerRecord(source)
            for source in self._sources
        ]
        try:
            # Counters last here and first at the end: they can't be cut to the block's length.
            self._read_all(counters_first=False)
            if self._records:
                self._thread = self._pool.submit(self._run)
        except BaseException:
            self._end_thread()
            raise
        self._begin = self._clock()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        end = self._clock()
        self._end_thread()
        self._read_all(counters_first=True)
        self._results = tuple(record.result(self._begin, end) for record in self._records)
        if self._thread is not None and error is None:
            self._thread.result()  # a fault that no sensor explains

    def _run(self) -> None:
        due = self._clock() + self._interval_s
        while not self._stop.wait(max(0.0, due - self._clock())):
            self.sample()
            due = max(due + self._interval_s, self._clock())

    def _end_thread(self) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown()

    def _read_all(self, *, counters_first: bool) -> None:
        with self._lock:
            for record in sorted(
                self._records, key=lambda one: one.source.counts, reverse=counters_first
            ):
                record.sample(self._clock, must=True)


class _Record(ABC):
    """Readings of one source.

    Args:
        source: What is read.
    """

    def __init__(self, source: PowerSource) -> None:
        self.source = source
        self.moments: list[float] = []
        self.values: list[float] = []
        self.rejected = 0
        self.bad = ""
        self.lost = ""
        self._every_s = self._pause() * (1 - _JITTER)
        self._last = -math.inf

    @abstractmethod
    def _pause(self) -> float:
        """Seconds between two readings."""

    @abstractmethod
    def result(self, begin: float, end: float) -> WindowEnergy:
        """What the readings tell of the stretch from `begin` to `end`."""

    def sample(self, clock: Clock, *, must: bool = False) -> None:
        """Read the source where it is due, or must be, and was not lost.

        A reading belongs to the middle of the time that it took.
        """
        before = clock()
        if self.lost or not (must or before - self._last >= self._every_s):
            return
        self._last = before
        try:
            value = self.source.read()
        except BadReading as error:
            self.rejected += 1
            self.bad = str(error)
            return
        except PowerError as error:
            self.lost = str(error)
            return
        self.moments.append((before + clock()) / 2)
        self.values.append(value)

    def _told(
        self, joules: float | None, seconds: float, hertz: float | None, problem: str
    ) -> WindowEnergy:
        return WindowEnergy(
            source=self.source.name,
            joules=None if problem else joules,
            seconds=seconds,
            samples=len(self.values),
            hertz=hertz,
            rejected=self.rejected,
            problem=problem,
        )


class _PowerRecord(_Record):
    """Samples of power."""

    def _pause(self) -> float:
        return self.source.update_s

    def result(self, begin: float, end: float) -> WindowEnergy:
        moments, watts = np.asarray(self.moments), np.asarray(self.values)
        span = float(moments[-1] - moments[0]) if len(moments) else 0.0
        hertz = (len(moments) - 1) / span if span > 0 else None
        if hertz is not None and self.source.update_s > 0:
            hertz = min(hertz, 1 / self.source.update_s)  # more readings are the same values again
        problem = self._problem(end - begin)
        if problem:
            return self._told(None, end - begin, hertz, problem)
        inner = moments[(moments > begin) & (moments < end)]
        at = np.concatenate(([begin], inner, [end]))
        power = np.interp(at, moments, watts)
        joules = float(np.sum((power[1:] + power[:-1]) / 2 * np.diff(at)))
        return self._told(joules, end - begin, hertz, "")

    def _problem(self, seconds: float) -> str:
        good = len(self.values)
        if self.lost:
            return f"the sensor was lost while it measured: {self.lost}"
        if self.rejected > _MOST_REJECTED * (good + self.rejected):
            return (
                f"{self.rejected} of {good + self.rejected} readings can't be believed, the last: "
                f"{self.bad}"
            )
        if good < 2 or seconds <= 0:
            return f"{good} good readings in {seconds:.3g} s: at least 2 are needed"
        if seconds < self.source.update_s:
            return (
                f"the window of {seconds:.3g} s is shorter than the {self.source.update_s:.3g} s "
                "in which the sensor takes a new value"
            )
        return ""


class _CounterRecord(_Record):
    """Readings of a counter: the first and the last are its energy, those between undo wraps."""

    def _pause(self) -> float:
        return _COUNTER_EVERY_S

    def __init__(self, source: PowerSource) -> None:
        super().__init__(source)
        self._musts: list[bool] = []

    def sample(self, clock: Clock, *, must: bool = False) -> None:
        before = len(self.values)
        super().sample(clock, must=must)
        if must:
            self._musts.append(len(self.values) > before)

    def result(self, begin: float, end: float) -> WindowEnergy:
        problem = self._problem()
        if problem:
            return self._told(None, end - begin, None, problem)
        joules = self.values[-1] - self.values[0]
        seconds = self.moments[-1] - self.moments[0]
        if joules <= 0:
            problem = (
                f"the counter did not move in {seconds:.3g} s: the window is shorter than the time "
                "in which it takes a new value"
            )
        return self._told(joules, seconds, None, problem)

    def _problem(self) -> str:
        if self.lost:
            return f"the sensor was lost while it measured: {self.lost}"
        if not all(self._musts):
            return f"the counter could not be read at the window's begin or end: {self.bad}"
        return ""
