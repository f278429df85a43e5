"""How well a simulation predicts a measurement, on one machine.

Each run measures the cascade and, in the same rounds, a scheduler that fills a latency table. The
order of the two is drawn anew in every round, and before each an image goes through the base model,
untimed: both find the caches as another model has left them. Then each run is simulated, from its
own table and from the one of the run before, for the images that it measured. The runs are of the
same cascade, so that the spread of their p99 is what any measured p99 is worth here; the simulated
p99 should lie within it.

    python -m bench.simulate.check BUNDLE --data DATA --runs 10 --seconds 5
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.report.table import Table, show
from bench.result import Distribution, LatencyTable
from bench.simulate.simulation import Outcome, Simulated, base_point, replay, simulate
from bench.simulate.table import TableRows, table_points
from bench.studies.turns import shuffled_rows
from calib.tables import collect
from edge_runtime import device, options
from edge_runtime.cli import run_command
from edge_runtime.console import Console, milliseconds
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendError, ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain
from edge_runtime.timing import warm_up

#: A run needs this many rounds for a p99 (`bench.result.frames_for`).
_ROUNDS = 300


@dataclass(frozen=True)
class Run:
    """What one run measured.

    Attributes:
        rows: Index of the image of each round, shape (rounds,).
        seconds: Of the cascade, shape (rounds,).
        exits: Index of the exit where each left, shape (rounds,).
        table: Of the same rounds.
    """

    rows: NDArray[np.int64]
    seconds: NDArray[np.float64]
    exits: NDArray[np.intp]
    table: LatencyTable


@dataclass(frozen=True)
class Compared:
    """One run beside its simulations.

    Attributes:
        rounds: How many.
        measured: The cascade.
        own: Simulated from the run's own table.
        other: Simulated from the table of the run before.
        own_ratio: Simulated mean over the measured one, own table.
        other_ratio: The same, table of the run before.
    """

    rounds: int
    measured: Distribution
    own: Simulated
    other: Simulated
    own_ratio: float
    other_ratio: float


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``python -m bench.simulate.check``."""
    options.add_bundle(parser)
    options.add_data(parser)
    options.add_operating_point(parser)
    parser.add_argument("--runs", type=options.count, default=10, help="default 10")
    parser.add_argument(
        "--seconds", type=options.positive, default=5.0, help="of each run, at least (default 5)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, simulate, compare.

    Raises:
        ConfigError: There are fewer than two runs.
        BackendError: A frame did not leave where its logits say.
    """
    if args.runs < 2:
        raise ConfigError("--runs", got=args.runs, expected=">= 2, whose p99 span an interval")
    bundle = Bundle.open(args.bundle)
    data = options.open_data(args, bundle)
    with ExitStack() as stack:
        cascade = stack.enter_context(
            options.open_cascade(args, bundle, data, args.operating_point, time_stages=True)
        )
        point = cascade.point
        points = table_points(bundle.cascade, point.metric, point.variants)
        every = stack.enter_context(
            options.open_cascade(args, bundle, data, points[-1], time_stages=True)
        )
        outcome = replay(collect(every, data, console), point)
        base = base_point(point.variants)
        between = stack.enter_context(options.open_cascade(args, bundle, data, base))
        measure = _Measurement(data, cascade, every, between, points, args.seed)
        runs = [
            measure.run(args.seconds)
            for _ in console.progress(range(args.runs), "measuring", args.runs)
        ]
    _check_exits(runs, outcome, bundle)
    found = compare(runs, bundle, point, outcome)
    p99s = [one.measured.p99 or 0.0 for one in found]
    pooled = simulate(pool([one.table for one in runs]), bundle, point, outcome)
    inside = pooled.latency.p99 is not None and min(p99s) <= pooled.latency.p99 <= max(p99s)
    _show(found, pooled, p99s, inside, f"{bundle.manifest.name} at {point.name}", console)
    return {
        "bundle": bundle.hash,
        "data": data.hash,
        "operating_point": plain(point),
        "seconds": args.seconds,
        "runs": [plain(one) for one in found],
        "pooled": plain(pooled),
        "p99_interval": [min(p99s), max(p99s)],
        "p99_inside": inside,
        "device": device.fingerprint(),
    }


class _Measurement:
    """The cascade and the scheduler of the table in turn, and another model between the two."""

    def __init__(
        self,
        data: ImageDataset,
        cascade: Scheduler,
        every: Scheduler,
        between: Scheduler,
        points: Sequence[OperatingPoint],
        seed: int,
    ) -> None:
        self._data = data
        self._cascade = cascade
        self._every = every
        self._between = between
        self._points = points
        self._places = shuffled_rows(data, len(data), seed)
        self._rng = np.random.default_rng(seed)
        self._done = 0
        warm_up(self._round, clock=time.perf_counter)

    def run(self, seconds: float) -> Run:
        """Go on through the images for some time."""
        table = TableRows(self._every.plan)
        least = _ROUNDS
        rows: list[int] = []
        took: list[float] = []
        exits: list[str] = []
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds or len(rows) < least:
            row, call_s, exit_ = self._round(table)
            rows.append(row)
            took.append(call_s)
            exits.append(exit_)
        names = [exit_.name for exit_ in self._cascade.cascade.exits]
        return Run(
            np.array(rows),
            np.array(took),
            np.array([names.index(name) for name in exits], np.intp),
            table.finish(),
        )

    def _round(self, table: TableRows | None = None) -> tuple[int, float, str]:
        """One image for both; returns its index, and seconds and exit of the cascade."""
        row = int(self._places[self._done % len(self._places)])
        self._done += 1
        images = self._data.image(row)[None]
        self._every.switch(self._points[int(self._rng.integers(len(self._points)))])
        call_s, name = 0.0, ""
        for scheduler in self._rng.permutation([0, 1]).tolist():
            self._between.classify(images)
            begin = time.perf_counter()
            (prediction,) = (self._every if scheduler else self._cascade).classify(images)
            seconds = time.perf_counter() - begin
            if not scheduler:
                call_s, name = seconds, prediction.exit
            elif table is not None:
                table.add(prediction, seconds)
        return row, call_s, name


def compare(
    runs: Sequence[Run], bundle: Bundle, point: OperatingPoint, outcome: Outcome
) -> list[Compared]:
    """Simulate each run for the images that it measured.

    Args:
        runs: What was measured.
        bundle: The bundle.
        point: How it ran.
        outcome: What becomes of each image of the data.
    """
    found = []
    for i, one in enumerate(runs):
        here = Outcome(outcome.at[one.rows], outcome.right[one.rows])
        measured = Distribution.of(one.seconds)
        own, other = (
            simulate(table, bundle, point, here) for table in (one.table, runs[i - 1].table)
        )
        ratios = [simulated.latency.mean / measured.mean for simulated in (own, other)]
        found.append(Compared(len(one.rows), measured, own, other, *ratios))
    return found


def pool(tables: Sequence[LatencyTable]) -> LatencyTable:
    """All rows of tables with the same columns, in one."""
    first = tables[0]
    return LatencyTable(
        stages=first.stages,
        precisions=first.precisions,
        exits=first.exits,
        stage_us=tuple(row for table in tables for row in table.stage_us),
        decide_us=tuple(row for table in tables for row in table.decide_us),
        around_us=tuple(value for table in tables for value in table.around_us),
    )


def _check_exits(runs: Sequence[Run], outcome: Outcome, bundle: Bundle) -> None:
    """Refuse to compare where a frame left elsewhere than its logits say."""
    for one in runs:
        wrong = np.flatnonzero(one.exits != outcome.at[one.rows])
        if wrong.size:
            names = [exit_.name for exit_ in bundle.cascade.exits]
            raise BackendError(
                f"{wrong.size} of {len(one.rows)} frames left elsewhere than their logits say: "
                f"image {one.rows[wrong[0]]}",
                got=names[one.exits[wrong[0]]],
                expected=names[outcome.at[one.rows[wrong[0]]]],
            )


def _show(
    found: Sequence[Compared],
    pooled: Simulated,
    p99s: Sequence[float],
    inside: bool,
    title: str,
    console: Console,
) -> None:
    def ms(value: float | None) -> str:
        return "-" if value is None else milliseconds(value)

    rows = [
        (
            str(i),
            str(one.rounds),
            milliseconds(one.measured.mean),
            f"{one.own_ratio:.3f}",
            f"{one.other_ratio:.3f}",
            ms(one.measured.p99),
            ms(one.own.latency.p99),
            ms(one.other.latency.p99),
        )
        for i, one in enumerate(found, 1)
    ]
    columns = ("run", "rounds", "mean", "sim/meas", "other table", "p99", "sim", "other table")
    ratios = {
        "own table": [one.own_ratio for one in found],
        "table of the run before": [one.other_ratio for one in found],
    }
    notes = [
        f"simulated mean / measured mean, {name}: {min(values):.3f} to {max(values):.3f}, "
        f"median {np.median(values):.3f}"
        for name, values in ratios.items()
    ]
    notes.append(
        f"p99 of {len(found)} runs: {ms(min(p99s))} to {ms(max(p99s))} ms; simulated from all "
        f"tables: {ms(pooled.latency.p99)} ms, {'inside' if inside else 'OUTSIDE'}"
    )
    show(
        [Table(f"{title}: measured and simulated, ms", columns, tuple(rows), tuple(notes))], console
    )


if __name__ == "__main__":
    sys.exit(run_command("python -m bench.simulate.check", sys.modules[__name__], sys.argv[1:]))
