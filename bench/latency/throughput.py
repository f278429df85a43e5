"""Images per second in batches: the cascade, whose easy images make room, against its base."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from bench.latency.frames import Frames
from bench.result import Throughput
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import interleave, ratio, warm_up

#: Calls that are timed at least, and rounds of warm-up.
_LEAST_CALLS = 20
_WARM_UP_CALLS = 5


def check_batches(batches: Sequence[int], scheduler: Scheduler) -> None:
    """Refuse batches that the backend can't take.

    Raises:
        ConfigError: A batch is larger than the backend's largest.
    """
    largest = scheduler.backend.largest_batch
    for batch in batches:
        if largest is not None and batch > largest:
            raise ConfigError(
                f"--batch {batch}: the backend {scheduler.backend.name!r} in the mode "
                f"{scheduler.backend.mode!r}",
                got=batch,
                expected=f"at most {largest}",
            )


def throughput(
    cascade: Scheduler,
    base: Scheduler,
    frames: Frames,
    batch: int,
    seconds: float,
    console: Console,
) -> Throughput:
    """Classify batches of different images with the cascade and its base, in turn.

    Args:
        cascade: At its operating point.
        base: The last exit alone.
        frames: Images, taken in order and over again.
        batch: Images per call.
        seconds: How long about; 20 calls at least.
        console: Shows progress.
    """
    size = len(frames)
    batches = itertools.cycle(
        [frames.images[np.arange(i, i + batch) % size] for i in range(0, size, batch)]
    )
    images = next(batches)

    def both() -> None:
        cascade.classify(images)
        base.classify(images)

    warm_up(both, clock=time.perf_counter, iterations=_WARM_UP_CALLS)
    begin = time.perf_counter()
    both()
    calls = max(_LEAST_CALLS, round(seconds / (time.perf_counter() - begin)))
    ticks = console.progress(range(calls + 1), f"batches of {batch}", calls)

    def draw() -> None:
        nonlocal images
        next(ticks)
        images = next(batches)

    times = interleave(
        {"cascade": lambda: cascade.classify(images), "base": lambda: base.classify(images)},
        rounds=calls,
        clock=time.perf_counter,
        each_round=draw,
    )
    return Throughput(
        batch=batch,
        calls=calls,
        cascade=batch / float(times["cascade"].mean()),
        base=batch / float(times["base"].mean()),
        speed_up=ratio(times["base"], times["cascade"], statistic=np.mean, block=5),
    )
