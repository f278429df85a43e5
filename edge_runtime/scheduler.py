"""Runs a cascade on a backend until the first confident exit, or the deadline.

The scheduler decides in one place: it runs the stages that an exit needs, asks the backend to judge
the exit's logits, lets the confident samples leave, compacts the rest and goes on. A backend that
decides by itself gets the rule and the deepest exit allowed, and tells where the frame ended. What
happened is in the trace of every prediction.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edge_runtime import confidence
from edge_runtime.backends.base import Backend
from edge_runtime.cascade import Cascade, Plan, Step
from edge_runtime.confidence import Decision
from edge_runtime.errors import BackendError, ConfigError, CudaError, InputError
from edge_runtime.frame import UNKNOWN, ExpectedTimes, Frame, StepRun
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.policy import Gated, Policy
from edge_runtime.prediction import ExitRun, Prediction, StageRun, Trace
from edge_runtime.timing import Clock


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

    #: Frames of noise when a cascade is opened: the first allocates, the last is timed.
    warm_up_frames = 3

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
        self._flight: deque[Pending] = deque()

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
        self._policy = self._policy_of(self.point)
        self.plan: Plan = self.cascade.plan(self._policy.evaluated(len(self.cascade.exits)))
        axes = image_axes(self.plan, self._image_size)
        self.image = self.plan.image.resolve(axes)
        self._opened = True
        try:
            self.backend.open(self._loaded(self.plan), axes, self.point.variants)
            self._use(self.point, self._policy)
            self._warm_up()
        except BaseException:
            self.close()
            raise
        return self

    def _policy_of(self, point: OperatingPoint) -> Policy:
        """The rule of a point.

        Raises:
            ConfigError: The point does not fit the cascade, or has a gate.
        """
        policy = point.policy_for(self.cascade)
        if isinstance(policy, Gated):
            raise ConfigError(
                f"operating point {point.name!r} has a gate, which this scheduler does not run",
                remedy=f"Open it with: er.load(bundle, operating_point={point.name!r})",
            )
        return policy

    def _loaded(self, plan: Plan) -> Plan:
        """What the backend loads to run a plan."""
        return plan

    def close(self) -> None:
        """Free the backend; the scheduler can be opened again."""
        with self._lock:
            self._opened = False
            while self._flight:
                self._flight.popleft().error = BackendError("the cascade was closed before")
            self.backend.close()

    def switch(self, point: OperatingPoint) -> None:
        """Go on at another operating point, from the next frame on, without loading anything.

        Args:
            point: Has the same exits and variants; thresholds, metric, temperatures and policy may
                differ.

        Raises:
            ConfigError: It evaluates other exits, or runs other variants, than those loaded, or
                has a gate.
        """
        policy = self._policy_of(point)
        plan = self.cascade.plan(policy.evaluated(len(self.cascade.exits)))
        with self._lock:
            self._check_open()
            self._check_loaded(point, plan)
            self._drain()
            self._use(point, policy)

    def _check_loaded(self, point: OperatingPoint, plan: Plan) -> None:
        """Refuse a point for which other stages would have to be loaded."""
        remedy = "Open the cascade anew with this operating point"
        have, want = ([step.exit.name for step in p.steps] for p in (self.plan, plan))
        if have != want:
            raise ConfigError(
                f"operating point {point.name!r} evaluates other exits than the cascade was "
                "opened for",
                got=", ".join(want),
                expected=", ".join(have),
                remedy=remedy,
            )
        for stage in plan.stages:
            wanted = point.variants.get(stage.name)
            loaded = self.backend.precision(stage.name)
            if wanted not in (self.point.variants.get(stage.name), loaded):
                raise ConfigError(
                    f"operating point {point.name!r}: variant of stage {stage.name!r}",
                    got=wanted or "its first",
                    expected=loaded,
                    remedy=remedy,
                )

    def _use(self, point: OperatingPoint, policy: Policy) -> None:
        temperatures = [point.temperatures.get(name, 1.0) for name in self.exits]
        self.backend.use(policy, point.metric, temperatures)
        self.point, self._policy = point, policy
        self._steps = [self._prepared(step) for step in self.plan.steps]

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

    @property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """Stage name -> the precisions at which it may run, of every stage that is loaded."""
        return {stage.name: (self.backend.precision(stage.name),) for stage in self.plan.stages}

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
        single = self._is_single(image)
        predictions = self.classify(image[None] if single else image, deadline_s=deadline_s)
        return predictions[0] if single else predictions

    def _is_single(self, image: NDArray[Any]) -> bool:
        return isinstance(image, np.ndarray) and image.ndim == len(self.image.shape) - 1

    def classify(
        self, images: NDArray[Any], *, deadline_s: float | None = None
    ) -> list[Prediction]:
        """Classify a batch, shape (batch, ...); see `__call__`."""
        with self._lock:
            self._check_open()
            self._drain()
            frame = self._begin(images, deadline_s)
            self._finish(frame)
        return self._predictions(frame)

    def submit(self, image: NDArray[Any]) -> Pending:
        """Begin a frame and return; `Pending.result` gives its answer.

        A backend that takes frames ahead copies and preprocesses this one while the one before is
        in flight; another has first to finish that one. Frames are finished in order.

        Args:
            image: As `__call__` takes it; copied at once. There is no deadline: when the answer
                is fetched is up to the caller.

        Raises:
            InputError: As `__call__`.
            BackendError: The frame could not be begun.
        """
        single = self._is_single(image)
        with self._lock:
            self._check_open()
            while len(self._flight) > (1 if self.backend.ahead else 0):
                self._finish_oldest()
            try:
                pending = Pending(self, self._begin(image[None] if single else image, None))
            except BaseException:
                # The backend may hold it: when no other is in flight, the next `feed` drops it.
                self._drain()
                raise
            pending.single = single
            self._flight.append(pending)
        return pending

    def each(self, images: Iterable[NDArray[Any]]) -> Iterator[Prediction | list[Prediction]]:
        """Classify frames that are all at hand, each begun before the one before is finished.

        Args:
            images: Each as `__call__` takes it.

        Yields:
            What `__call__` returns, in order.
        """
        before: Pending | None = None
        for image in images:
            pending = self.submit(image)
            if before is not None:
                yield before.result()
            before = pending
        if before is not None:
            yield before.result()

    def _result(self, pending: Pending) -> Prediction | list[Prediction]:
        with self._lock:
            while pending in self._flight:
                self._finish_oldest()
        if pending.error is not None:
            raise pending.error
        predictions = self._predictions(pending.frame)
        return predictions[0] if pending.single else predictions

    def _drain(self) -> None:
        while self._flight:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        """Finish a submitted frame; what goes wrong with it is told by its `result`."""
        pending = self._flight[0]
        try:
            self._flight.popleft()
            self._finish(pending.frame)
        except CudaError as error:
            pending.error = error
            self._give_up(f"the frame before it failed: {error}")
        except BackendError as error:
            pending.error = error
        except BaseException:
            pending.error = BackendError("the frame was interrupted before its answer")
            self._give_up("the frame before it was interrupted")
            raise

    def _give_up(self, why: str) -> None:
        """Forget the frames in flight; the next `feed` waits for what the backend still does."""
        while self._flight:
            self._flight.popleft().error = BackendError(why)

    def _begin(self, images: NDArray[Any], deadline_s: float | None) -> Frame:
        """Check a batch and hand it to the backend."""
        if deadline_s is not None and not deadline_s > 0:
            raise InputError("deadline_s", got=deadline_s, expected="seconds > 0")
        start = self._clock()
        frame = Frame(len(self.image.check(images)), start, deadline_s)
        frame.steps = self._steps
        if self._flight:
            self.backend.feed_ahead(images)
        else:
            self.backend.feed(images)
        if self.backend.decides:
            self.backend.launch(self._deepest(frame))
        return frame

    def _finish(self, frame: Frame) -> None:
        """Bring the oldest frame of the backend to its end."""
        try:
            if self.backend.decides:
                self._collect(frame)
            else:
                self._advance(frame, frame.deadline_s)
        except CudaError:
            raise  # The device may never be done with it.
        except BackendError:
            self.backend.done()
            raise
        self.backend.done()

    def logits(self, images: NDArray[Any]) -> dict[str, NDArray[np.float32]]:
        """Logits of every evaluated exit without leaving anywhere, for tables and checks.

        Args:
            images: A batch, as `classify` takes it.

        Returns:
            Exit name -> logits, shape (batch, classes), float32.
        """
        with self._lock:
            self._check_open()
            self._drain()
            self.backend.feed(self.image.check(images))
            found = {}
            for step in self._steps:
                for stage in step.runs:
                    self.backend.run(stage)
                found[step.exit] = self.backend.read(step.logits).astype(np.float32)
            self.backend.done()
        return found

    def _prepared(self, step: Step) -> PreparedStep:
        """What every frame needs of a step, in one place.

        A stage leaves cold caches behind, and then every object that Python touches costs: looking
        these up frame by frame is what ``python -m bench.staging`` would show as forced exits that
        take longer than their stages.
        """
        return PreparedStep(
            position=step.position,
            exit=step.exit.name,
            logits=step.exit.logits,
            temperature=self.point.temperatures.get(step.exit.name, 1.0),
            stages=tuple(stage.name for stage in step.stages),
            runs=tuple(stage.name for stage in step.stages),
            precisions=tuple(self.backend.precision(stage.name) for stage in step.stages),
            live=step.live,
        )

    def _advance(self, frame: Frame, deadline_s: float | None) -> None:
        """Run step after step until every sample of the frame has left."""
        last = len(self._steps) - 1
        for index, step in enumerate(self._steps):
            run = frame.begin(self._clock())
            if deadline_s is not None and index and self._too_late(index, frame, deadline_s):
                self._expected.skip(index, len(frame.rows))
                frame.answer(index - 1, "deadline", run.marks[0])
                return
            if not self._run_stages(step, frame, run, deadline_s if index else None):
                frame.answer(index - 1, "deadline", run.marks[-1])
                return
            run.decision = self._decide(step)
            run.decided = now = self._clock()
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

    def _collect(self, frame: Frame) -> None:
        """Take over a frame that the backend has brought to its end."""
        found = self.backend.collect()
        now = self._clock()
        if found.ended == "not finite":
            raise _at_exit(self._steps[found.last], confidence.not_finite(0))
        frame.collected = found
        frame.answer(found.last, found.ended, now)
        if frame.deadline_s is not None:
            begin = frame.start
            for index in range(found.last + 1):
                end = now - found.seconds_to_end(index)
                self._expected.observe(index, 1, end - begin)
                begin = end

    def _deepest(self, frame: Frame) -> int:
        """Index of the last step that is expected to end before the deadline; the first at least.

        The whole frame is given away at once, so this is decided before it runs.
        """
        last = len(self._steps) - 1
        if frame.deadline_s is None:
            return last
        end = self._clock() - frame.start + self._expected.seconds(0, 1)
        for index in range(1, last + 1):
            end += self._expected.seconds(index, 1)
            if end > frame.deadline_s:
                self._expected.skip(index, 1)
                return index - 1
        return last

    def _too_late(self, index: int, frame: Frame, deadline_s: float) -> bool:
        """Whether a step that begins now will probably end after the deadline."""
        spent = frame.runs[-1].marks[0] - frame.start
        return spent + self._expected.seconds(index, len(frame.rows)) > deadline_s

    def _run_stages(
        self, step: PreparedStep, frame: Frame, into: StepRun, deadline_s: float | None
    ) -> bool:
        """Run the stages of a step; False when the deadline passes before one of them."""
        clock, run, marks = self._clock, self.backend.run, into.marks
        for stage in step.runs:
            if deadline_s is not None and marks[-1] - frame.start >= deadline_s:
                return False
            measured = run(stage)
            marks.append(clock())
            if measured is not None:
                into.measured += (measured,)
        return True

    def _decide(self, step: PreparedStep) -> Decision:
        try:
            return self.backend.decide(step.logits, self.point.metric, step.temperature)
        except BackendError as error:
            raise _at_exit(step, error) from error

    def _predictions(self, frame: Frame) -> list[Prediction]:
        return [self._prediction(frame, sample) for sample in range(len(frame.answers))]

    def _prediction(self, frame: Frame, sample: int) -> Prediction:
        """What the frame found of one sample."""
        index, _, end = frame.answers[sample]
        label, _, confidence = frame.said(index, sample)
        latency_s = end - frame.start
        return Prediction(
            label,
            self.cascade.classes[label],
            confidence,
            frame.steps[index].exit,
            latency_s,
            frame.deadline_s is not None and latency_s > frame.deadline_s,
            functools.partial(self._trace, frame, sample),
        )

    def _trace(self, frame: Frame, sample: int) -> Trace:
        """What was run on one sample."""
        index, ended, end = frame.answers[sample]
        # A step behind the answering exit was begun for this sample only if the deadline passed
        # while it ran.
        steps = max(index + 1, len(frame.runs)) if ended == "deadline" else index + 1
        stages: list[StageRun] = []
        for at, step in enumerate(frame.steps[:steps]):
            times, batch = frame.times(at, len(step.stages))
            if self.backend.asynchronous:
                times = [UNKNOWN] * len(times)
            stages += [
                StageRun(stage, precision, begin, seconds, batch)
                for stage, precision, (begin, seconds) in zip(
                    step.stages, step.precisions, times, strict=False
                )
            ]
        exits = [
            ExitRun(step.exit, *frame.said(at, sample), frame.decided(at, end))
            for at, step in enumerate(frame.steps[: index + 1])
        ]
        return Trace(self.backend.name, self.backend.mode, ended, tuple(stages), tuple(exits))

    def _warm_up(self) -> None:
        """Run noise through every step: allocates buffers, and times each step once.

        Noise, because a constant image has no variance to divide by.
        """
        self._expected = ExpectedTimes(len(self.plan.steps))
        noise = np.random.default_rng(0).random((1, *self.image.sample_shape())) * 255
        image = noise.astype(self.image.dtype)
        for _ in range(self.warm_up_frames):
            self.backend.feed(image)
            for index, step in enumerate(self._steps):
                begin = self._clock()
                for stage in step.runs:
                    self.backend.run(stage)
                self._decide(step)
                self._expected.warm(index, self._clock() - begin)
            self.backend.done()
        if self.backend.decides:
            self._finish(self._begin(image, None))

    def _check_open(self) -> None:
        if not self._opened:
            raise BackendError(
                "the cascade is closed", remedy="Open it: with er.load(...) as cascade"
            )


class Pending:
    """A frame that was submitted."""

    def __init__(self, scheduler: Scheduler, frame: Frame) -> None:
        self._scheduler = scheduler
        self.frame = frame
        self.single = True
        self.error: BackendError | None = None

    def result(self) -> Prediction | list[Prediction]:
        """Wait for the frame, and for those before it.

        Returns:
            What `Scheduler.__call__` returns for its image; `latency_s` runs from `submit` until
            the answer was taken in, so it holds the caller's own pauses.

        Raises:
            BackendError: A stage failed, its logits are not finite, a frame before it lost the
                device, it was interrupted, or the cascade was closed.
        """
        return self._scheduler._result(self)


class PreparedStep(NamedTuple):
    """A step of the plan, prepared for being run frame after frame.

    Attributes:
        position: Index of the exit in the cascade.
        exit: Its name.
        logits: Name of its logits.
        temperature: Of its logits.
        stages: Names of the stages, in order.
        runs: What the backend calls them.
        precisions: Precision of each.
        live: Tensors that later steps still read.
        level: Of precision, where a gate chooses between several.
    """

    position: int
    exit: str
    logits: str
    temperature: float
    stages: tuple[str, ...]
    runs: tuple[str, ...]
    precisions: tuple[str, ...]
    live: tuple[str, ...]
    level: int = 0


def _at_exit(step: PreparedStep, error: BackendError) -> BackendError:
    """The same error, with the exit at which it came up."""
    kind = CudaError if isinstance(error, CudaError) else BackendError
    stage = step.stages[-1] if step.stages else error.stage
    return kind(f"exit {step.exit!r}: {error}", stage=stage)


def image_axes(plan: Plan, image_size: tuple[int, int] | None) -> Mapping[str, int]:
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
