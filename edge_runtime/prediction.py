"""What comes back for an image: the answer, and a trace of what was run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

#: Why a sample stopped: an exit was confident, it was the last one, or time was up.
Ended = Literal["confident", "last", "deadline"]


class StageRun(NamedTuple):
    """One stage that was run.

    Attributes:
        stage: Its name.
        precision: The variant that was run.
        start_s: Seconds from the call to its begin: where the device measures durations, from the
            call to its end as the host saw it, less the duration. NaN where only the device knows.
        duration_s: Seconds that the stage took; NaN likewise.
        batch: Samples it was run on.
    """

    stage: str
    precision: str
    start_s: float
    duration_s: float
    batch: int


class ExitRun(NamedTuple):
    """One exit that was evaluated for one sample.

    Attributes:
        exit: Its name.
        label: What it would have answered, a class index.
        signal: Its confidence by the operating point's metric.
        confidence: Its largest softmax probability, in [0, 1].
        at_s: Seconds from the call to its decision.
    """

    exit: str
    label: int
    signal: float
    confidence: float
    at_s: float


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
        trace: What was run; put together when it is asked for.
    """

    label: int
    name: str
    confidence: float
    exit: str
    latency_s: float
    deadline_missed: bool
    _trace: Callable[[], Trace] = field(repr=False, compare=False)

    @property
    def trace(self) -> Trace:
        """See the class."""
        return self._trace()
