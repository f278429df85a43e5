"""What the scheduler knows of a frame while it runs, and of how long steps take."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.policy import Streak
from edge_runtime.prediction import Ended

#: The rows of a frame of one image.
_ALONE: NDArray[np.intp] = np.zeros(1, np.intp)


class StepRun:
    """What one step did in one frame: on which samples, when each stage ended, what was decided."""

    __slots__ = ("decided", "decision", "marks", "rows")

    def __init__(self, rows: NDArray[np.intp], begin: float) -> None:
        self.rows = rows
        self.marks = [begin]
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
        #: Per sample: index of the step that answered, why it stopped there, and when.
        self.answers: list[tuple[int, Ended, float]] = [(0, "last", start)] * batch

    def begin(self, now: float) -> StepRun:
        """Begin the next step on the samples in flight."""
        run = StepRun(self.rows, now)
        self.runs.append(run)
        return run

    def said(self, index: int, sample: int) -> tuple[int, float, float]:
        """Label, signal and confidence of a sample at the exit of step `index`."""
        run = self.runs[index]
        labels, signal, confidence = run.decision
        if self.alone:
            return int(labels), float(signal), float(confidence)
        row = np.searchsorted(run.rows, sample)
        return int(labels[row]), float(signal[row]), float(confidence[row])

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
