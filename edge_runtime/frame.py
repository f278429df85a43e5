"""What the scheduler knows of a frame while it runs, and of how long steps take."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.base import Collected
from edge_runtime.policy import Streak
from edge_runtime.prediction import Ended

#: The rows of a frame of one image.
_ALONE: NDArray[np.intp] = np.zeros(1, np.intp)
#: Begin and duration of a stage that the host does not see.
UNKNOWN = (math.nan, math.nan)


class StepRun:
    """What one step did in one frame: on which samples, when each stage ended, what was decided."""

    __slots__ = ("decided", "decision", "marks", "measured", "rows")

    def __init__(self, rows: NDArray[np.intp], begin: float) -> None:
        self.rows = rows
        self.marks = [begin]
        #: Seconds of each stage on the device, where the backend measures them.
        self.measured: tuple[float, ...] = ()
        self.decision: Any = None
        self.decided = begin


class Frame:
    """The samples of one call, and what has been found about each."""

    def __init__(self, batch: int, start: float, deadline_s: float | None) -> None:
        self.start = start
        self.deadline_s = deadline_s
        self.alone = batch == 1
        self.rows: NDArray[np.intp] = _ALONE if self.alone else np.arange(batch)
        self.streak = Streak()
        self.runs: list[StepRun] = []
        #: What the scheduler ran, or would run, for each exit.
        self.steps: list[Any] = []
        #: Where a backend decides, what it brought back instead of `runs`.
        self.collected: Collected | None = None
        #: Per sample: index of the step that answered, why it stopped there, and when.
        self.answers: list[tuple[int, Ended, float]] = [(0, "last", start)] * batch

    def begin(self, now: float) -> StepRun:
        """Begin the next step on the samples in flight."""
        run = StepRun(self.rows, now)
        self.runs.append(run)
        return run

    def said(self, index: int, sample: int) -> tuple[int, float, float]:
        """Label, signal and confidence of a sample at the exit of step `index`."""
        if self.alone:
            label, signal, confidence = self._decision(index)
            return int(label), float(signal), float(confidence)
        run = self.runs[index]
        labels, signals, confidences = run.decision
        row = np.searchsorted(run.rows, sample)
        return int(labels[row]), float(signals[row]), float(confidences[row])

    def _decision(self, index: int) -> Any:
        if self.collected is not None:
            return self.collected.decision(index)
        return self.runs[index].decision

    def times(self, index: int, stages: int) -> tuple[list[tuple[float, float]], int]:
        """When each stage of step `index` began and how long it took, and on how many samples.

        Args:
            index: Of the step.
            stages: How many it has.

        Returns:
            Per stage that was run, seconds from the frame's begin to its own and seconds that it
            took, NaN where only the device knows; and the batch.
        """
        if self.collected is not None:
            return [UNKNOWN] * stages, 1
        run = self.runs[index]
        marks = [mark - self.start for mark in run.marks]
        if run.measured:
            ends = zip(marks[1:], run.measured, strict=True)
            return [(end - took, took) for end, took in ends], len(run.rows)
        return [(begin, end - begin) for begin, end in itertools.pairwise(marks)], len(run.rows)

    def decided(self, index: int, end: float) -> float:
        """Seconds from the frame's begin to the decision of step `index`.

        Args:
            index: Of the step.
            end: When the frame's answer was there.
        """
        if self.collected is not None:
            return end - self.start - self.collected.seconds_to_end(index)
        return self.runs[index].decided - self.start

    def answer(self, index: int, ended: Ended, now: float) -> None:
        """All samples in flight leave with what step `index` said."""
        for sample in self.rows.tolist():
            self.answers[sample] = (index, ended, now)

    def leave(self, index: int, leaves: Any, now: float) -> NDArray[np.intp]:
        """The marked samples leave at step `index`; returns the rows that stay."""
        everyone, self.rows = self.rows, self.rows[leaves]
        self.answer(index, "confident", now)
        staying = np.flatnonzero(~leaves)
        self.rows = everyone[staying]
        self.streak.keep(staying)
        return staying


class ExpectedTimes:
    """How long each step will probably take: seen slow, believed at once; seen fast, slowly.

    A step that is skipped because it is believed too slow would never be measured again, so every
    skip moves the belief a little towards what was measured when the cascade was opened.
    """

    _DECAY = 0.1

    def __init__(self, steps: int) -> None:
        self._base = [0.0] * steps
        self._seconds: dict[tuple[int, int], float] = {}

    def warm(self, index: int, seconds: float) -> None:
        """A frame of noise took this long; the last one counts."""
        self._base[index] = self._seconds[index, 1] = seconds

    def seconds(self, index: int, rows: int) -> float:
        """Expected duration of step `index` on `rows` samples."""
        return self._seconds.get((index, rows), self._base[index])

    def observe(self, index: int, rows: int, seconds: float) -> None:
        """A frame took this long."""
        believed = self._seconds.get((index, rows), seconds)
        faster = believed + self._DECAY * (seconds - believed)
        self._seconds[index, rows] = max(seconds, faster)

    def skip(self, index: int, rows: int) -> None:
        """The step was left out because of `seconds`."""
        believed = self.seconds(index, rows)
        self._seconds[index, rows] = believed + self._DECAY * (self._base[index] - believed)
