"""Several operating points that classify the same images in turn, timed, until somebody stops it.

As `edge_runtime.evaluate.classify_in_turn`, with two differences: points that share a cascade's
stages share its memory too (it switches between two calls, untimed), and Ctrl-C keeps the images
that every point has finished.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.evaluate import Series
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Clock, warm_up

#: Fewer images say nothing, so that an interrupted measurement of them is none.
LEAST_IMAGES = 20


@dataclass(frozen=True)
class Subject:
    """A cascade at an operating point.

    Attributes:
        scheduler: Opened for the exits of the point; subjects may share it.
        point: How it runs.
    """

    scheduler: Scheduler
    point: OperatingPoint

    def prepare(self) -> None:
        """Switch to the point, where another subject left the scheduler elsewhere."""
        if self.scheduler.point is not self.point:
            self.scheduler.switch(self.point)


@dataclass(frozen=True)
class Turns:
    """What was measured.

    Attributes:
        rows: Indices of the images in the data, in the order they were measured, shape (n,).
        series: Subject -> its durations, shape (1, n), and answers.
        interrupted: Whether somebody stopped it before the last image.
    """

    rows: NDArray[np.int64]
    series: Mapping[str, Series]
    interrupted: bool


def measure(
    data: ImageDataset,
    rows: NDArray[np.int64],
    subjects: Mapping[str, Subject],
    console: Console,
    *,
    clock: Clock = time.perf_counter,
) -> Turns:
    """Give images to every subject in turn, after a warm-up.

    The order is drawn anew for each image: a subject that always came behind a large model would
    always find the caches cold.

    Args:
        data: Images.
        rows: Indices of those that are measured, in this order.
        subjects: Name -> what classifies.
        console: Shows progress.
        clock: Monotonic seconds.

    Raises:
        KeyboardInterrupt: Fewer than 20 images were finished.
    """
    some = itertools.cycle([data.image(int(row)) for row in rows[:32]])
    names = list(subjects)

    def each_subject() -> None:
        image = next(some)
        for subject in subjects.values():
            subject.prepare()
            subject.scheduler.classify(image[None])

    seconds = {name: np.empty((1, len(rows))) for name in names}
    labels = {name: np.empty(len(rows), np.int64) for name in names}
    exits: dict[str, list[str]] = {name: [""] * len(rows) for name in names}
    rng = np.random.default_rng(0)
    done = 0
    try:
        console.note(f"warming up {len(names)} subject{'s' * (len(names) > 1)}")
        warm_up(each_subject, clock=clock)
        for i, row in enumerate(console.progress(rows.tolist(), "measuring", len(rows))):
            image = data.image(row)
            for name in rng.permutation(names).tolist():
                subjects[name].prepare()
                seconds[name][0, i], labels[name][i], exits[name][i] = _timed(
                    subjects[name].scheduler, image, clock
                )
            done = i + 1
    except KeyboardInterrupt:
        if done < LEAST_IMAGES:
            raise
        console.note(f"interrupted: {done} of {len(rows)} images were measured")
    found = {
        name: Series(seconds[name][:, :done], labels[name][:done], tuple(exits[name][:done]))
        for name in names
    }
    return Turns(rows[:done], found, done < len(rows))


def shuffled_rows(data: ImageDataset, count: int, seed: int) -> NDArray[np.int64]:
    """Which images are timed, as many of each class as possible, in random order.

    Data often comes class by class; in its order a drift of the machine's speed would be taken
    for a difference between classes.
    """
    rng = np.random.default_rng(seed)
    places = rng.permutation(len(data))
    # How many of its class stand before each image in the random order.
    labels = data.labels[places]
    order = np.argsort(labels, kind="stable")
    begins = np.searchsorted(labels[order], labels[order])
    turn = np.empty(len(places), np.int64)
    turn[order] = np.arange(len(places)) - begins
    chosen = np.sort(np.argsort(turn, kind="stable")[:count])
    return places[chosen].astype(np.int64)


def _timed(scheduler: Scheduler, image: NDArray[Any], clock: Clock) -> tuple[float, int, str]:
    begin = clock()
    (prediction,) = scheduler.classify(image[None])
    return clock() - begin, prediction.label, prediction.exit
