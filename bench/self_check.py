"""Whether the bench can be believed: what its recording costs, and whether its intervals hold.

The cascade classifies blocks of frames with everything recorded and blocks with nothing recorded,
in turn. Then it is compared with itself, over and over: of 95 % intervals of the ratio, about 5 in
100 may exclude 1.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.latency.frames import Frames, add_arguments, open_frames
from bench.latency.lineup import chosen_point
from bench.latency.rounds import (
    WARM_UP_ROUNDS,
    Measurement,
    Recording,
    StageRecording,
    Take,
)
from bench.latency.run import take_row, take_stages
from bench.latency.subjects import Staged
from bench.result import BLOCK
from bench.simulate.table import TableRows, table_points
from edge_runtime import device, options
from edge_runtime.cli import run_command
from edge_runtime.console import Console
from edge_runtime.load import load
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain
from edge_runtime.timing import Ratio, ratio, warm_up

_BLOCKS, _COMPARISONS, _ROUNDS = 60, 100, 500


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.self_check``."""
    options.add_bundle(parser)
    options.add_operating_point(parser)
    add_arguments(parser)
    parser.set_defaults(precision=None)
    for name, default, what in (
        ("blocks", _BLOCKS, f"blocks of {BLOCK} frames with recording, and as many without"),
        ("comparisons", _COMPARISONS, "comparisons of the cascade with itself"),
        ("rounds", _ROUNDS, "frames of each comparison"),
    ):
        parser.add_argument(
            f"--{name}", type=options.count, default=default, help=f"{what} (default {default})"
        )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure both and print them."""
    bundle = Bundle.open(args.bundle)
    frames = open_frames(args, bundle, console)
    point = chosen_point(args, bundle)
    with ExitStack() as stack:
        opened = functools.partial(
            load,
            bundle,
            backend=args.backend,
            image_size=frames.size,
            options=options.backend_options(args),
        )
        cascade = stack.enter_context(opened(operating_point=point))
        points = table_points(bundle.cascade, point.metric, point.variants)
        every = stack.enter_context(opened(operating_point=points[-1]))
        cost, frame_s = recording_cost(every, frames, args.blocks, console)
        means, medians = self_comparisons(cascade, frames, args.comparisons, args.rounds, console)
    misses = {name: excludes_one(r) for name, r in (("mean", means), ("median", medians))}
    console.line(
        f"recording on / off: {cost} of the median frame of {frame_s * 1e3:.3f} ms, all exits run"
    )
    for name, count in misses.items():
        console.line(
            f"{count} of {args.comparisons} intervals of the ratio of {name}s exclude 1, in "
            f"comparisons of the cascade with itself over {args.rounds} frames"
        )
    return {
        "bundle": bundle.hash,
        "operating_point": plain(point),
        "recording_on_over_off": plain(cost),
        "frame_s": frame_s,
        "comparisons": args.comparisons,
        "rounds": args.rounds,
        "intervals_that_exclude_1": misses,
        "device": device.fingerprint(),
    }


def recording_cost(
    every: Scheduler, frames: Frames, blocks: int, console: Console
) -> tuple[Ratio, float]:
    """Median time of a frame with everything recorded over that with nothing recorded.

    Recording happens between two frames, so it is the next one that would pay: whole blocks are
    compared.

    Args:
        every: Evaluates all exits, so that every frame is alike.
        frames: What is classified.
        blocks: Blocks with, and as many without recording.
        console: Shows progress.

    Returns:
        The ratio, and the median seconds of a frame without recording.
    """
    rows, stages = TableRows(every.plan), StageRecording(every.plan)
    names = [exit_.name for exit_ in every.cascade.exits]
    recording = Recording(names)
    takes: dict[bool, tuple[Take, ...]] = {
        True: (
            recording.add,
            functools.partial(take_stages, stages),
            functools.partial(take_row, rows),
        ),
        False: (),
    }
    subject = Staged("every", "", every, [every.point])
    images = frames.images
    warm_up(lambda: subject.classify(images[0]), clock=time.perf_counter)
    seconds = {on: np.empty((blocks, BLOCK)) for on in takes}
    order = np.random.default_rng(0)
    for block in console.progress(range(blocks), "recording on and off"):
        for on in order.permutation([True, False]).tolist():
            for i in range(BLOCK):
                answer = subject.classify(images[(block * BLOCK + i) % len(images)])
                seconds[on][block, i] = answer.seconds
                for take in takes[on]:
                    take(answer)
    found = ratio(np.median(seconds[True], axis=1), np.median(seconds[False], axis=1), block=1)
    return found, float(np.median(seconds[False]))


def self_comparisons(
    cascade: Scheduler, frames: Frames, comparisons: int, rounds: int, console: Console
) -> tuple[list[Ratio], list[Ratio]]:
    """Compare the cascade with itself.

    Returns:
        The ratios of means and those of medians, one per comparison.
    """
    names = [exit_.name for exit_ in cascade.cascade.exits]
    subjects = [Staged(name, "", cascade, [cascade.point]) for name in ("a", "b")]
    means, medians = [], []
    Measurement(frames, subjects, names).warm_up(WARM_UP_ROUNDS, console)
    for seed in console.progress(range(comparisons), "comparing the cascade with itself"):
        found = Measurement(frames, subjects, names, seed=seed).count(rounds).recordings
        a, b = (found[name].seconds for name in ("a", "b"))
        means.append(ratio(a, b, statistic=np.mean))
        medians.append(ratio(a, b))
    return means, medians


def excludes_one(ratios: list[Ratio]) -> int:
    """How many intervals do not hold 1."""
    return sum(not one.low <= 1 <= one.high for one in ratios)


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.self_check", sys.modules[__name__], sys.argv[1:]))
