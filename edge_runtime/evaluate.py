"""Accuracy, exits and measured latency of an operating point on labelled data.

Every image is classified one at a time by the cascade and by its base model (the last exit alone),
in turn, so that their ratio holds while the machine's speed drifts.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime import device, options
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.schema import plain
from edge_runtime.timing import Clock, Latency, Ratio, ratio, warm_up


@dataclass(frozen=True, slots=True)
class Series:
    """What one subject did, image by image.

    Attributes:
        seconds: Duration of each call, shape (passes, images).
        labels: Class index that it answered in the last pass, shape (images,); -1 where the
            subject answers nothing.
        exits: Name of the exit that answered, one per image; empty where there is none.
    """

    seconds: NDArray[np.float64]
    labels: NDArray[np.int64]
    exits: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExitFigures:
    """What left at one exit.

    Attributes:
        exit: Its name.
        share: Share of the samples that left here, in [0, 1].
        accuracy: Share of these that were right; None where nobody left.
        latency: Durations of these, in seconds; None where nobody left.
    """

    exit: str
    share: float
    accuracy: float | None
    latency: Latency | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An operating point against the base model, the last exit alone.

    Attributes:
        samples: Number of images.
        accuracy: Of the cascade, in [0, 1].
        base_accuracy: Of the base model on the same images.
        exits: One entry per evaluated exit.
        latency: Of the cascade, in seconds.
        base_latency: Of the base model.
        time_ratio: Mean time of the cascade / mean time of the base, with its interval.
        pays: Whether the whole interval lies below 1.
    """

    samples: int
    accuracy: float
    base_accuracy: float
    exits: tuple[ExitFigures, ...]
    latency: Latency
    base_latency: Latency
    time_ratio: Ratio
    pays: bool


def classify_in_turn(
    data: ImageDataset,
    subjects: Mapping[str, Callable[[NDArray[Any]], object]],
    console: Console,
    *,
    passes: int = 1,
    clock: Clock = time.perf_counter,
) -> dict[str, Series]:
    """Give every image to every subject in turn, timed, after a warm-up.

    Args:
        data: Images.
        subjects: Name -> what classifies one image, shape (height, width, channels) uint8.
        console: Shows progress.
        passes: How often the whole data is gone through.
        clock: Monotonic seconds.

    Returns:
        Name -> durations and answers.
    """
    some = itertools.cycle([data.image(i) for i in range(min(len(data), 32))])

    def each_subject() -> None:
        image = next(some)
        for subject in subjects.values():
            subject(image)

    warm_up(each_subject, clock=clock)
    seconds = {name: np.empty((passes, len(data))) for name in subjects}
    answers: dict[str, list[object]] = {name: [None] * len(data) for name in subjects}
    turns = ((p, i) for p in range(passes) for i in range(len(data)))
    for p, i in console.progress(turns, "measuring", passes * len(data)):
        image = data.image(i)
        for name, subject in subjects.items():
            begin = clock()
            answer = subject(image)
            seconds[name][p, i] = clock() - begin
            answers[name][i] = answer
    return {name: _series(seconds[name], answers[name]) for name in subjects}


def _series(seconds: NDArray[np.float64], answers: list[object]) -> Series:
    predictions = [answer for answer in answers if isinstance(answer, Prediction)]
    if len(predictions) != len(answers):
        return Series(seconds, np.full(len(answers), -1, np.int64), ())
    labels = np.array([prediction.label for prediction in predictions], np.int64)
    return Series(seconds, labels, tuple(prediction.exit for prediction in predictions))


def figures(
    cascade: Series, base: Series, labels: NDArray[np.int64], exits: tuple[str, ...]
) -> Evaluation:
    """Sum up what the cascade and its base did on the same images.

    Args:
        cascade: Series of the cascade.
        base: Series of the last exit alone.
        labels: True class indices, shape (images,).
        exits: Names of the evaluated exits, in order.
    """
    left = np.array(cascade.exits)
    correct = cascade.labels == labels
    per_exit = []
    for name in exits:
        here = left == name
        some = bool(here.any())
        per_exit.append(
            ExitFigures(
                name,
                float(here.mean()),
                float(correct[here].mean()) if some else None,
                Latency.of(cascade.seconds[:, here]) if some else None,
            )
        )
    time_ratio = ratio(cascade.seconds.ravel(), base.seconds.ravel(), statistic=np.mean)
    return Evaluation(
        samples=len(labels),
        accuracy=float(correct.mean()),
        base_accuracy=float((base.labels == labels).mean()),
        exits=tuple(per_exit),
        latency=Latency.of(cascade.seconds),
        base_latency=Latency.of(base.seconds),
        time_ratio=time_ratio,
        pays=time_ratio.high < 1,
    )


def show(evaluation: Evaluation, point: OperatingPoint, base_exit: str, console: Console) -> None:
    """Print the table of exits and the verdict."""
    rows = [
        (
            e.exit,
            percent(e.share),
            "-" if e.accuracy is None else percent(e.accuracy),
            "-" if e.latency is None else milliseconds(e.latency.p50),
            "-" if e.latency is None else milliseconds(e.latency.p99),
        )
        for e in evaluation.exits
    ]
    total = evaluation.latency
    rows.append(
        (
            "all",
            "100.0 %",
            percent(evaluation.accuracy),
            milliseconds(total.p50),
            milliseconds(total.p99),
        )
    )
    console.table(
        f"{point.name} on {evaluation.samples} images",
        ("exit", "share", "accuracy", "p50 ms", "p99 ms"),
        rows,
    )
    console.line(verdict(evaluation, base_exit))


def verdict(evaluation: Evaluation, base_exit: str) -> str:
    """Whether the cascade pays, in two sentences.

    Args:
        evaluation: What was measured.
        base_exit: Name of the last exit, at which the base model answers.
    """
    if len(evaluation.exits) == 1 and evaluation.exits[0].exit == base_exit:
        return "No early exit is active at this operating point: it is the base model itself."
    return payoff(
        evaluation.accuracy,
        evaluation.base_accuracy,
        evaluation.latency.mean,
        evaluation.base_latency.mean,
        evaluation.time_ratio,
    )


def payoff(
    accuracy: float, base_accuracy: float, mean_s: float, base_mean_s: float, times: Ratio
) -> str:
    """What a cascade costs and brings against its base model, in two sentences.

    Args:
        accuracy: Of the cascade, in [0, 1].
        base_accuracy: Of the base model.
        mean_s: Mean seconds of the cascade.
        base_mean_s: Mean seconds of the base model.
        times: Time of the cascade over that of the base model.
    """
    gain = (accuracy - base_accuracy) * 100
    right = (
        f"The cascade is right on {percent(accuracy)}, its base model alone on "
        f"{percent(base_accuracy)} ({gain:+.1f} points)."
    )
    measured = (
        f"{milliseconds(mean_s)} ms on average against {milliseconds(base_mean_s)} ms: {times} "
        "of the base's time"
    )
    if times.high < 1:
        speed_up = f"{1 / times.value:.2f} times faster [{1 / times.high:.2f}, {1 / times.low:.2f}]"
        return f"{right}\nIt takes {measured}, {speed_up}."
    if times.low > 1:
        return f"{right}\nThis cascade does NOT pay here: {measured}, {times.value - 1:.0%} more."
    return f"{right}\nThis cascade does not clearly pay here: {measured}, no difference shown."


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime evaluate``."""
    options.add_bundle(parser)
    options.add_operating_point(parser)
    options.add_data(parser)
    parser.add_argument(
        "--passes", type=options.count, default=1, help="times the data is gone through"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate one operating point against the base model."""
    bundle = Bundle.open(args.bundle)
    data = options.open_data(args, bundle)
    with ExitStack() as stack:
        cascade, base = options.open_with_base(args, bundle, data, stack)
        series = classify_in_turn(
            data, {"cascade": cascade, "base": base}, console, passes=args.passes
        )
        evaluation = figures(series["cascade"], series["base"], data.labels, cascade.exits)
        point = cascade.point
    show(evaluation, point, bundle.cascade.exits[-1].name, console)
    return {
        "bundle": bundle.hash,
        "data": data.hash,
        "operating_point": plain(point),
        "evaluation": plain(evaluation),
        "device": device.fingerprint(),
    }
