"""Runs a cascade on a backend until the first confident exit, or the deadline.

The scheduler decides in one place: it runs the stages that an exit needs, asks the backend to judge
the exit's logits, lets the confident samples leave, compacts the rest and goes on. What happened is
in the trace of every prediction.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime.backends.base import Backend
from edge_runtime.cascade import Cascade, Plan, Step
from edge_runtime.confidence import Decision
from edge_runtime.errors import BackendError, ConfigError, InputError
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.policy import Streak
from edge_runtime.prediction import Ended, ExitRun, Prediction, StageRun, Trace
from edge_runtime.timing import Clock

#: Frames of noise that are run when a cascade is opened: the first allocates, the last is timed.
_WARM_UP_FRAMES = 3

#: The rows of a frame of one image.
_ALONE: NDArray[np.intp] = np.zeros(1, np.intp)


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
        """Load the stages that the operating point can reach, and run a few frames of noise.

        Returns:
            The scheduler itself, for use in a with statement.

        Raises:
            ConfigError: The point does not fit the cascade, or the image's size is not known.
            BackendError: It is open already, a stage can't be loaded, or it fails on noise.
        """
        if self._opened:
            raise BackendError("the cascade is open already", remedy="Close it first")
        self._policy = self.point.policy_for(self.cascade)
        self.plan: Plan = self.cascade.plan(self._policy.evaluated(len(self.cascade.exits)))
        axes = _image_axes(self.plan, self._image_size)
        self.image = self.plan.image.resolve(axes)
        self._opened = True
        try:
            self.backend.open(self.plan, axes, self.point.variants)
            self._steps = [self._prepared(step) for step in self.plan.steps]
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
        return [self._prediction(frame, sample, deadline_s) for sample in range(len(images))]

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
            for step in self._steps:
                for stage in step.stages:
                    self.backend.run(stage)
                found[step.exit] = self.backend.read(step.logits).astype(np.float32)
        return found

    def _prepared(self, step: Step) -> _Step:
        """What every frame needs of a step, in one place.

        A stage leaves cold caches behind, and then every object that Python touches costs: looking
        these up frame by frame is what ``python -m bench.staging`` would show as forced exits that
        take longer than their stages.
        """
        return _Step(
            position=step.position,
            exit=step.exit.name,
            logits=step.exit.logits,
            temperature=self.point.temperatures.get(step.exit.name, 1.0),
            stages=tuple(stage.name for stage in step.stages),
            precisions=tuple(self.backend.precision(stage.name) for stage in step.stages),
            live=step.live,
        )

    def _advance(self, frame: _Frame, deadline_s: float | None) -> None:
        """Run step after step until every sample of the frame has left."""
        last = len(self._steps) - 1
        for index, step in enumerate(self._steps):
            run = frame.begin(self._clock())
            if deadline_s is not None and index and self._too_late(index, frame, deadline_s):
                self._expected.skip(index, len(frame.rows))
                frame.answer(index - 1, "deadline", run.marks[0])
                return
            if not self._run_stages(step, frame, run.marks, deadline_s if index else None):
                frame.answer(index - 1, "deadline", run.marks[-1])
                return
            run.decision = self._decide(step)
            now = self._clock()
            if deadline_s is not None:
                self._expected.observe(index, len(frame.rows), now - run.marks[0])
            if index == last:
                frame.answer(index, "last", now)
                return
            leaves = self._policy.leaves(step.position, run.decision, frame.streak)
            if frame.alone:
                if leaves:
                    frame.answer(index, "confident", now)
                    return
            elif leaves.any():
                staying = frame.leave(index, leaves, now)
                if staying.size == 0:
                    return
                self.backend.keep(staying, step.live)

    def _too_late(self, index: int, frame: _Frame, deadline_s: float) -> bool:
        """Whether a step that begins now will probably end after the deadline."""
        spent = frame.runs[-1].marks[0] - frame.start
        return spent + self._expected.seconds(index, len(frame.rows)) > deadline_s

    def _run_stages(
        self, step: _Step, frame: _Frame, marks: list[float], deadline_s: float | None
    ) -> bool:
        """Run the stages of a step; False when the deadline passes before one of them."""
        clock, run = self._clock, self.backend.run
        for stage in step.stages:
            if deadline_s is not None and marks[-1] - frame.start >= deadline_s:
                return False
            run(stage)
            marks.append(clock())
        return True

    def _decide(self, step: _Step) -> Decision:
        try:
            return self.backend.decide(step.logits, self.point.metric, step.temperature)
        except BackendError as error:
            stage = step.stages[-1] if step.stages else error.stage
            raise BackendError(f"exit {step.exit!r}: {error}", stage=stage) from error

    def _prediction(self, frame: _Frame, sample: int, deadline_s: float | None) -> Prediction:
        """What the frame found of one sample."""
        index, _, end = frame.answers[sample]
        label, _, confidence = frame.said(index, sample)
        latency_s = end - frame.start
        return Prediction(
            label,
            self.cascade.classes[label],
            confidence,
            self._steps[index].exit,
            latency_s,
            deadline_s is not None and latency_s > deadline_s,
            functools.partial(self._trace, frame, sample),
        )

    def _trace(self, frame: _Frame, sample: int) -> Trace:
        """What was run on one sample."""
        index, ended, _ = frame.answers[sample]
        # A step behind the answering exit was begun for this sample only if the deadline passed
        # while it ran.
        steps = len(frame.runs) if ended == "deadline" else index + 1
        stages: list[StageRun] = []
        for step, run in zip(self._steps[:steps], frame.runs, strict=False):
            marks = [mark - frame.start for mark in run.marks]
            stages += [
                StageRun(stage, precision, begin, end - begin, len(run.rows))
                for stage, precision, begin, end in zip(
                    step.stages, step.precisions, marks, marks[1:], strict=False
                )
            ]
        exits = [
            ExitRun(step.exit, *frame.said(at, sample))
            for at, step in enumerate(self._steps[: index + 1])
        ]
        return Trace(self.backend.name, self.backend.mode, ended, tuple(stages), tuple(exits))

    def _warm_up(self) -> None:
        """Run noise through every step: allocates buffers, and times each step once.

        Noise, because a constant image has no variance to divide by.
        """
        self._expected = _ExpectedTimes(len(self.plan.steps))
        noise = np.random.default_rng(0).random((1, *self.image.sample_shape())) * 255
        for _ in range(_WARM_UP_FRAMES):
            self.backend.feed(noise.astype(self.image.dtype))
            for index, step in enumerate(self._steps):
                begin = self._clock()
                for stage in step.stages:
                    self.backend.run(stage)
                self._decide(step)
                self._expected.warm(index, self._clock() - begin)

    def _check_open(self) -> None:
        if not self._opened:
            raise BackendError(
                "the cascade is closed", remedy="Open it: with er.load(...) as cascade"
            )


class _Step(NamedTuple):
    """A step of the plan, prepared for being run frame after frame."""

    position: int
    exit: str
    logits: str
    temperature: float
    stages: tuple[str, ...]
    precisions: tuple[str, ...]
    live: tuple[str, ...]


class _StepRun:
    """What one step did in one frame: on which samples, when each stage ended, what was decided."""

    __slots__ = ("decision", "marks", "rows")

    def __init__(self, rows: NDArray[np.intp], begin: float) -> None:
        self.rows = rows
        self.marks = [begin]
        self.decision: Any = None


class _Frame:
    """The samples of one call, and what has been found about each."""

    def __init__(self, batch: int, start: float) -> None:
        self.start = start
        self.alone = batch == 1
        self.rows: NDArray[np.intp] = _ALONE if self.alone else np.arange(batch)
        self.streak = Streak()
        self.runs: list[_StepRun] = []
        #: Per sample: index of the step that answered, why it stopped there, and when.
        self.answers: list[tuple[int, Ended, float]] = [(0, "last", start)] * batch

    def begin(self, now: float) -> _StepRun:
        """Begin the next step on the samples in flight."""
        run = _StepRun(self.rows, now)
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
    if len(plan.image.shape) != 4:
        raise ConfigError("image_size: the cascade takes no image", got=str(plan.image))
    fixed = plan.image.shape[1:3]
    if not named:
        if fixed != (height, width):
            raise ConfigError(
                "size of the images",
                got=f"{height}x{width}",
                expected=f"{fixed[0]}x{fixed[1]}, which the bundle fixes",
                remedy=f"Let the camera deliver it, or give --image-size {fixed[0]}x{fixed[1]}",
            )
        return {}
    if named != ["height", "width"] or height < 1 or width < 1:
        raise ConfigError("image_size", got=(height, width), expected=str(plan.image))
    return {"height": height, "width": width}
