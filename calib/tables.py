"""Prediction tables: what every exit of a bundle says about labelled images, and what it costs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import ExitTable
from edge_runtime import confidence
from edge_runtime.cascade import Cascade, Plan
from edge_runtime.confidence import Metric
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendError
from edge_runtime.prediction import Prediction, Trace
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import warm_up

#: Images per call while logits are collected, where the backend takes as many.
_BATCH = 64
#: Images that stage times are measured on, at most.
_TIMED = 200


@dataclass(frozen=True, slots=True)
class PredictionTable:
    """Logits of every exit on labelled data.

    Attributes:
        cascade: Whose exits they are.
        logits: Exit name -> logits, shape (samples, classes), float32; in order of evaluation.
        labels: True class indices, shape (samples,), int64.
    """

    cascade: Cascade
    logits: Mapping[str, NDArray[np.float32]]
    labels: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class JudgedTable:
    """What every exit says about every sample, by one signal.

    Attributes:
        labels: Index of the largest logit, shape (samples, exits), int64.
        signals: Confidence, the last exit's too, shape (samples, exits), float32.
        truth: True class indices, shape (samples,), int64.
        bounds: Smallest and largest value of the signal.
    """

    labels: NDArray[np.int64]
    signals: NDArray[np.float32]
    truth: NDArray[np.int64]
    bounds: tuple[float, float]

    @property
    def exit_table(self) -> ExitTable:
        """What thresholds are chosen from."""
        return ExitTable(self.signals[:, :-1], self.correct, self.bounds)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each exit is right, shape (samples, exits)."""
        right: NDArray[np.bool_] = self.labels == self.truth[:, None]
        return right


def judge(
    table: PredictionTable, metric: Metric, temperatures: Mapping[str, float] | None = None
) -> JudgedTable:
    """Labels and signals of every exit, from its logits.

    Args:
        table: The logits.
        metric: The signal.
        temperatures: Exit name -> temperature of its logits; 1 where absent.
    """
    own = temperatures or {}
    decisions = [
        confidence.decide(table.logits[exit_.name], metric, own.get(exit_.name, 1.0))
        for exit_ in table.cascade.exits
    ]
    return JudgedTable(
        labels=np.stack([decision.labels for decision in decisions], axis=1),
        signals=np.stack([decision.signal for decision in decisions], axis=1),
        truth=table.labels,
        bounds=confidence.bounds(metric, len(table.cascade.classes)),
    )


def exit_table(table: PredictionTable, metric: Metric) -> ExitTable:
    """Signals and correctness of every exit, from its logits."""
    return judge(table, metric).exit_table


def collect(scheduler: Scheduler, data: ImageDataset, console: Console) -> PredictionTable:
    """Run every exit on every image.

    Args:
        scheduler: Opened at `OperatingPoint.all_exits`, of the cascade or of some of its exits.
        data: Labelled images.
        console: Shows progress.
    """
    parts: dict[str, list[NDArray[np.float32]]] = {name: [] for name in scheduler.exits}
    size = images_per_call(scheduler)
    batches = data.batches(size)
    for images, _ in console.progress(batches, "collecting logits", -(-len(data) // size)):
        for name, logits in scheduler.logits(images).items():
            parts[name].append(logits)
    together = {name: np.concatenate(part) for name, part in parts.items()}
    return PredictionTable(scheduler.cascade.only(scheduler.exits), together, data.labels)


def images_per_call(scheduler: Scheduler) -> int:
    """Images per call while logits are collected."""
    return min(_BATCH, scheduler.backend.largest_batch or _BATCH)


class StageTimes(NamedTuple):
    """What a frame's time consists of, medians in seconds.

    Attributes:
        stages: Stage name -> its own time.
        decide_s: What goes to deciding, of each exit. Behind a large stage the caches are cold.
        frame_s: What every frame takes besides: checks, taking the image in, giving the answer.
    """

    stages: dict[str, float]
    decide_s: tuple[float, ...]
    frame_s: float


def stage_seconds(scheduler: Scheduler, data: ImageDataset, console: Console) -> StageTimes:
    """Measure what each stage costs on this device, one image at a time.

    Args:
        scheduler: Opened at `OperatingPoint.all_exits`.
        data: Images; the first few hundred are used.
        console: Shows progress.

    Raises:
        BackendError: The backend does not tell how long a stage took.
    """
    images = [data.image(i) for i in range(min(len(data), _TIMED))]
    warm_up(lambda: scheduler(images[0]), clock=time.perf_counter)
    stages: dict[str, list[float]] = {stage.name: [] for stage in scheduler.plan.stages}
    deciding, around = [], []
    for image in console.progress(images, "timing stages"):
        begin = time.perf_counter()
        (prediction,) = scheduler.classify(image[None])
        around.append(around_seconds(prediction, time.perf_counter() - begin))
        trace = prediction.trace
        for name, seconds in durations(trace).items():
            stages[name].append(seconds)
        deciding.append(deciding_seconds(scheduler.plan, trace))
    return StageTimes(
        {name: float(np.median(times)) for name, times in stages.items()},
        tuple(np.median(deciding, axis=0).tolist()),
        float(np.median(around)),
    )


def around_seconds(prediction: Prediction, call_s: float) -> float:
    """What a call spends before its first stage and behind its answer.

    Args:
        prediction: Its answer; the stages' times are known.
        call_s: Seconds that the call took.
    """
    return prediction.trace.stages[0].start_s + call_s - prediction.latency_s


def durations(trace: Trace) -> dict[str, float]:
    """How long each stage took that was run, in order.

    Returns:
        Stage name -> seconds.

    Raises:
        BackendError: The backend does not tell.
    """
    found = {run.stage: run.duration_s for run in trace.stages}
    if any(map(math.isnan, found.values())):
        raise BackendError(
            f"the backend {trace.backend!r} does not tell how long a stage took",
            remedy="On a GPU open it with CudaOptions(time_stages=True)",
        )
    return found


def deciding_seconds(plan: Plan, trace: Trace) -> list[float]:
    """How long it took to judge each of the exits that were evaluated.

    That is the time from the end of an exit's last stage to its decision. What the host spends on
    a stage beside the stage's own time, or on taking in the image, is none of it.

    Args:
        plan: What was run.
        trace: What happened to a sample; the stages' times are known.
    """
    ends = {run.stage: run.start_s + run.duration_s for run in trace.stages}
    found, before = [], 0.0
    for step, exit_ in zip(plan.steps, trace.exits, strict=False):
        begin = ends[step.stages[-1].name] if step.stages else before
        found.append(max(0.0, exit_.at_s - begin))
        before = exit_.at_s
    return found
