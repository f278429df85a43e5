"""Runs a cascade on a backend until the first confident exit, or the deadline.

The scheduler decides in one place: it runs the stages that an exit needs, asks the backend to judge
the exit's logits, lets the confident samples leave, compacts the rest and goes on. What happened is
in the trace of every prediction.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.base import Backend
from edge_runtime.cascade import Cascade, Plan, Step
from edge_runtime.confidence import Decision
from edge_runtime.errors import BackendError, ConfigError, InputError
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.policy import Streak
from edge_runtime.timing import Clock

#: Why a sample stopped: an exit was confident, it was the last one, or time was up.
Ended = Literal["confident", "last", "deadline"]

#: Blank frames that are run when a cascade is opened: the first allocates, the others are timed.
_WARM_UP_FRAMES = 3


@dataclass(frozen=True, slots=True)
class StageRun:
    """One stage that was run.

    Attributes:
        stage: Its name.
        precision: The variant that was run.
        start_s: Seconds since the call began.
        duration_s: Seconds that the stage took.
        batch: Samples it was run on.
    """

    stage: str
    precision: str
    start_s: float
    duration_s: float
    batch: int


@dataclass(frozen=True, slots=True)
class ExitRun:
    """One exit that was evaluated for one sample.

    Attributes:
        exit: Its name.
        label: What it would have answered, a class index.
        signal: Its confidence by the operating point's metric.
        confidence: Its largest softmax probability, in [0, 1].
    """

    exit: str
    label: int
    signal: float
    confidence: float


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened to one sample.

    Attributes:
        backend: Name of the backend.
        mode: Execution mode: who decided what ran next.
        ended: Why it stopped.
        stages: Stages that were run on it, in order.
        exits: Exits that were evaluated, in order; the last one answered.
    """

    backend: str
    mode: str
    ended: Ended
    stages: tuple[StageRun, ...]
    exits: tuple[ExitRun, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one image.

    Attributes:
        label: Class index.
        name: Class name.
        confidence: Largest softmax probability of the exit that answered, in [0, 1].
        exit: Name of that exit.
        latency_s: Seconds from the call to the answer.
        deadline_missed: Whether the answer came after the deadline.
        trace: What was run.
    """

    label: int
    name: str
    confidence: float
    exit: str
    latency_s: float
    deadline_missed: bool
    trace: Trace


class Scheduler:
    """A cascade that is ready to run.

    Calls from several threads are safe: they run one after another.

    Args:
        cascade: What to run.
        backend: What runs its stages; the scheduler opens and closes it.
        point: Policy, thresholds, temperatures and variants.
        image_size: (height, width) of every image; needed where the cascade leaves them open.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        cascade: Cascade,
        backend: Backend,
        point: OperatingPoint,
        *,
        image_size: tuple[int, int] | None = None,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.cascade = cascade
        self.backend = backend
        self.point = point
        self._image_size = image_size
        self._clock = clock
        self._lock = threading.Lock()
        self._opened = False

    def open(self) -> Scheduler:
        """Load the stages that the operating point can reach, and run a few blank frames.

        Returns:
            The scheduler itself, for use in a with statement.

        Raises:
            ConfigError: The point does not fit the cascade, or the image's size is not known.
            BackendError: A stage can't be loaded or fails on a blank frame.
        """
        self._policy = self.point.policy_for(self.cascade)
        self.plan: Plan = self.cascade.plan(self._policy.evaluated(len(self.cascade.exits)))
        axes = _image_axes(self.plan, self._image_size)
        self.image = self.plan.image.resolve(axes)
        self._temperatures = [
            self.point.temperatures.get(step.exit.name, 1.0) for step in self.plan.steps
        ]
        self._opened = True
        try:
            self.backend.open(self.plan, axes, self.point.variants)
            self._precisions = {s.name: self.backend.precision(s.name) for s in self.plan.stages}
            self._warm_up()
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Free the backend; the scheduler can be opened again."""
        with self._lock:
            self._opened = False
            self.backend.close()

    def __enter__(self) -> Scheduler:
        """Open, unless it is open already."""
        return self if self._opened else self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close."""
        self.close()

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits that are evaluated, in order."""
        return tuple(step.exit.name for step in self.plan.steps)

    def __call__(
        self, image: NDArray[Any], *, deadline_s: float | None = None
    ) -> Prediction | list[Prediction]:
        """Classify one image, or a batch of them.

        Args:
            image: Shape (height, width, channels) uint8 for one image, or with a leading batch
                axis; the size that the cascade was opened for.
            deadline_s: Seconds from now by which an answer is wanted. Stages that are not expected
                to finish in time are not begun, and the deepest exit reached so far answers; the
                first exit is always reached. A late answer says `deadline_missed`.

        Returns:
            One `Prediction`, or a list with one per image of the batch, in order.

        Raises:
            InputError: The image has another shape or dtype, is empty, or has NaN.
            BackendError: A stage failed, or logits are not finite.
        """
        single = isinstance(image, np.ndarray) and image.ndim == len(self.image.shape) - 1
        predictions = self.classify(image[None] if single else image, deadline_s=deadline_s)
        return predictions[0] if single else predictions

    def classify(
        self, images: NDArray[Any], *, deadline_s: float | None = None
    ) -> list[Prediction]:
        """Classify a batch, shape (batch, ...); see `__call__`."""
        if deadline_s is not None and not deadline_s > 0:
            raise InputError("deadline_s", got=deadline_s, expected="seconds > 0")
        with self._lock:
            self._check_open()
            start = self._clock()
            self.image.check(images)
            frame = _Frame(len(images), start)
            self.backend.feed(images)
            self._advance(frame, deadline_s)
        return self._predictions(frame, deadline_s)

    def logits(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Logits of every evaluated exit without leaving anywhere, for tables and checks.

        Args:
            images: A batch, as `classify` takes it.

        Returns:
            Exit name -> logits, shape (batch, classes), float32.
        """
        with self._lock:
            self._check_open()
            self.backend.feed(self.image.check(images))
            found = {}
            for step in self.plan.steps:
                for stage in step.stages:
                    self.backend.run(stage.name)
                found[step.exit.name] = self.backend.read(step.exit.logits).astype(np.float32)
        return found

    def _advance(self, frame: _Frame, deadline_s: float | None) -> None:
        """Run step after step until every sample of the frame has left."""
        last = len(self.plan.steps) - 1
        for index, step in enumerate(self.plan.steps):
            rows = len(frame.rows)
            if index and deadline_s is not None:
                spent = self._clock() - frame.start
                if spent + self._expected.seconds(index, rows) > deadline_s:
                    self._expected.skip(index, rows)
                    frame.answer(index - 1, "deadline", spent)
                    return
            begin = self._clock()
            if not self._run_stages(step, frame, deadline_s if index else None):
                frame.answer(index - 1, "deadline", self._clock() - frame.start)
                return
            decision = self._decide(index, step)
            frame.decided(index, decision)
            now = self._clock()
            self._expected.observe(index, rows, now - begin)
            if index == last:
                frame.answer(index, "last", now - frame.start)
                return
            leaves = self._policy.leaves(step.position, decision, frame.streak)
            if leaves.any():
                staying = frame.leave(index, leaves, now - frame.start)
                if staying.size == 0:
                    return
                self.backend.keep(staying, step.live)

    def _run_stages(self, step: Step, frame: _Frame, deadline_s: float | None) -> bool:
        """Run the stages of a step; False when the deadline passes before one of them."""
        clock, run, rows = self._clock, self.backend.run, len(frame.rows)
        begin = clock()
        for stage in step.stages:
            if deadline_s is not None and begin - frame.start >= deadline_s:
                return False
            run(stage.name)
            end = clock()
            frame.stages.append(
                StageRun(
                    stage.name, self._precisions[stage.name], begin - frame.start, end - begin, rows
                )
            )
            begin = end
        return True

    def _decide(self, index: int, step: Step) -> Decision:
        try:
            return self.backend.decide(
                step.exit.logits, self.point.metric, self._temperatures[index]
            )
        except BackendError as error:
            stage = step.stages[-1].name if step.stages else error.stage
            raise BackendError(f"exit {step.exit.name!r}: {error}", stage=stage) from error

    def _predictions(self, frame: _Frame, deadline_s: float | None) -> list[Prediction]:
        """What the frame found, one prediction per sample."""
        return [
            self._prediction(frame, sample, deadline_s) for sample in range(len(frame.latency_s))
        ]

    def _prediction(self, frame: _Frame, sample: int, deadline_s: float | None) -> Prediction:
        exits = []
        for index in range(frame.exit_index[sample] + 1):
            decision = frame.decisions[index]
            row = frame.row_of(index, sample)
            exits.append(
                ExitRun(
                    self.plan.steps[index].exit.name,
                    int(decision.labels[row]),
                    float(decision.signal[row]),
                    float(decision.confidence[row]),
                )
            )
        answer, latency_s = exits[-1], frame.latency_s[sample]
        trace = Trace(
            self.backend.name,
            self.backend.mode,
            frame.ended[sample],
            tuple(frame.stages[: frame.stages_of[sample]]),
            tuple(exits),
        )
        return Prediction(
            answer.label,
            self.cascade.classes[answer.label],
            answer.confidence,
            answer.exit,
            latency_s,
            deadline_s is not None and latency_s > deadline_s,
            trace,
        )

    def _warm_up(self) -> None:
        """Run blank frames through every step: allocates buffers, and times each step once."""
        self._expected = _ExpectedTimes(len(self.plan.steps))
        blank = np.zeros((1, *self.image.sample_shape()), self.image.dtype)
        for _ in range(_WARM_UP_FRAMES):
            self.backend.feed(blank)
            for index, step in enumerate(self.plan.steps):
                begin = self._clock()
                for stage in step.stages:
                    self.backend.run(stage.name)
                self._decide(index, step)
                self._expected.warm(index, self._clock() - begin)

    def _check_open(self) -> None:
        if not self._opened:
            raise BackendError(
                "the cascade is closed", remedy="Open it: with er.load(...) as cascade"
            )


class _Frame:
    """The samples of one call, and what has been found about each."""

    def __init__(self, batch: int, start: float) -> None:
        self.start = start
        self.rows: NDArray[np.intp] = np.arange(batch)
        self.streak = Streak.start(batch)
        self.stages: list[StageRun] = []
        self.decisions: list[Decision] = []
        self._rows_at: list[NDArray[np.intp]] = []
        self.exit_index = [0] * batch
        self.stages_of = [0] * batch
        self.latency_s = [0.0] * batch
        self.ended: list[Ended] = ["last"] * batch

    def decided(self, index: int, decision: Decision) -> None:
        """Keep what exit `index` said of the samples still in flight."""
        self.decisions.append(decision)
        self._rows_at.append(self.rows)

    def row_of(self, index: int, sample: int) -> int:
        """The row at which exit `index` saw a sample."""
        return int(np.searchsorted(self._rows_at[index], sample))

    def answer(self, index: int, ended: Ended, latency_s: float) -> None:
        """All samples in flight leave with what exit `index` said."""
        for sample in self.rows.tolist():
            self.exit_index[sample] = index
            self.stages_of[sample] = len(self.stages)
            self.latency_s[sample] = latency_s
            self.ended[sample] = ended

    def leave(self, index: int, leaves: NDArray[np.bool_], latency_s: float) -> NDArray[np.intp]:
        """The marked samples leave at exit `index`; returns the rows that stay."""
        everyone, self.rows = self.rows, self.rows[leaves]
        self.answer(index, "confident", latency_s)
        staying = np.flatnonzero(~leaves)
        self.rows = everyone[staying]
        self.streak.keep(staying)
        return staying


class _ExpectedTimes:
    """How long each step will probably take: seen slow, believed at once; seen fast, slowly.

    A step that is skipped because it is believed too slow would never be measured again, so every
    skip moves the belief a little towards what was measured when the cascade was opened.
    """

    _DECAY = 0.1

    def __init__(self, steps: int) -> None:
        self._base = [0.0] * steps
        self._seconds: dict[tuple[int, int], float] = {}

    def warm(self, index: int, seconds: float) -> None:
        """A blank frame took this long; the last one counts."""
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


def _image_axes(plan: Plan, image_size: tuple[int, int] | None) -> Mapping[str, int]:
    """Lengths of the image's named axes."""
    named = [axis for axis in plan.image.shape[1:] if isinstance(axis, str)]
    if image_size is None:
        if named:
            raise ConfigError(
                f"the cascade takes images of any size, {plan.image}: the size is fixed when it "
                "is opened",
                remedy="Give image_size=(height, width), or --image-size HEIGHTxWIDTH",
            )
        return {}
    height, width = image_size
    fixed = plan.image.shape[1:3]
    if not named:
        if fixed != (height, width):
            raise ConfigError("image_size", got=(height, width), expected=fixed)
        return {}
    if named != ["height", "width"] or height < 1 or width < 1:
        raise ConfigError("image_size", got=(height, width), expected=str(plan.image))
    return {"height": height, "width": width}
