"""What takes turns in a bench: anything that classifies one image and can be timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from bench.latency.other_process import OtherProcess
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler


class Answer(NamedTuple):
    """What a subject said of one image.

    Attributes:
        seconds: How long it took.
        exit: Where it left; empty where the subject does not tell.
        label: Class index; -1 where it does not tell.
        prediction: The whole answer, of a scheduler of this process.
    """

    seconds: float
    exit: str = ""
    label: int = -1
    prediction: Prediction | None = None


class Subject(Protocol):
    """One of those that take turns."""

    @property
    def name(self) -> str:
        """As tables show it."""
        ...

    @property
    def what(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def apart(self) -> bool:
        """Whether it lives in a process of its own."""
        ...

    def prepare(self, turn: int) -> None:
        """Get ready for a frame, untimed.

        Args:
            turn: Number of the frame.
        """
        ...

    def classify(self, image: NDArray[np.uint8]) -> Answer:
        """Classify one image, shape (height, width, channels)."""
        ...


@dataclass(frozen=True)
class Staged:
    """A scheduler at an operating point; subjects may share the scheduler.

    Attributes:
        name: As tables show it.
        what: What it is.
        scheduler: Opened for the exits of the points.
        points: Which point is used at which turn; the first for all of them where there is one.
        deadline_s: Deadline of every frame.
    """

    name: str
    what: str
    scheduler: Scheduler
    points: Sequence[OperatingPoint]
    deadline_s: float | None = None
    apart: ClassVar[bool] = False

    def prepare(self, turn: int) -> None:
        """Switch to the point, where the scheduler is at another one."""
        point = self.points[turn % len(self.points)]
        if self.scheduler.point is not point:
            self.scheduler.switch(point)

    def classify(self, image: NDArray[np.uint8]) -> Answer:
        """Time one call."""
        begin = time.perf_counter()
        prediction = self.scheduler(image, deadline_s=self.deadline_s)
        seconds = time.perf_counter() - begin
        assert isinstance(prediction, Prediction)
        return Answer(seconds, prediction.exit, prediction.label, prediction)


@dataclass(frozen=True)
class Session:
    """A model in one ONNX Runtime session.

    Attributes:
        name: As tables show it.
        what: What it is.
        run: Takes an image; returns the session's outputs.
        exits: Names of the exits that the second output counts; empty for a model without exits.
    """

    name: str
    what: str
    run: Callable[[NDArray[np.uint8]], Any]
    exits: tuple[str, ...] = ()
    apart: ClassVar[bool] = False

    def prepare(self, turn: int) -> None:
        """There is nothing to do."""

    def classify(self, image: NDArray[np.uint8]) -> Answer:
        """Time one run."""
        begin = time.perf_counter()
        outputs = self.run(image)
        seconds = time.perf_counter() - begin
        left = self.exits[int(outputs[1][0])] if self.exits else ""
        return Answer(seconds, left, int(outputs[0][0].argmax()))


@dataclass(frozen=True)
class Elsewhere:
    """A cascade in a process of its own, timed there.

    Attributes:
        name: As tables show it.
        what: What it is.
        process: The process.
    """

    name: str
    what: str
    process: OtherProcess
    apart: ClassVar[bool] = True

    def prepare(self, turn: int) -> None:
        """There is nothing to do."""

    def classify(self, image: NDArray[np.uint8]) -> Answer:
        """Let the process classify it."""
        timed = self.process.classify(image)
        return Answer(timed.seconds, timed.exit, timed.label)
