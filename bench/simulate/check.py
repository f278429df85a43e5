"""How well a simulation predicts a bench, on one machine.

Each run is a bench of the cascade, its base, its forced exits and the frames of the latency table,
all in turn. Then the cascade is simulated, from the run's own table and from the one of the run
before, for the images that it classified. The runs are alike, so that the spread of their p99 is
what any measured p99 is worth here; the simulated p99 should lie within it.

    python -m bench.simulate.check BUNDLE --data DATA --runs 10 --seconds 5
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.latency.frames import Frames, open_frames
from bench.latency.lineup import Lineup, chosen_point, open_lineup
from bench.latency.rounds import WARM_UP_ROUNDS, Measurement, Take
from bench.latency.run import take_row
from bench.report.table import Table, show
from bench.result import Distribution, LatencyTable, frames_for
from bench.simulate.simulation import Outcome, Simulated, replay, simulate
from bench.simulate.table import TableRows, merge
from calib.tables import PredictionTable, images_per_call
from edge_runtime import device, options
from edge_runtime.cli import run_command
from edge_runtime.console import Console, milliseconds
from edge_runtime.errors import BackendError, ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler
from edge_runtime.schema import plain


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
    parser.set_defaults(precision=None, deadline_ms=None)
    parser.add_argument("--runs", type=options.count, default=10, help="default 10")
    parser.add_argument(
        "--seconds", type=options.positive, default=5.0, help="of each run (default 5)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, simulate, compare.

    Raises:
        ConfigError: There are fewer than two runs, or they are too short for a p99.
        BackendError: A frame did not leave where its logits say.
    """
    if args.runs < 2:
        raise ConfigError("--runs", got=args.runs, expected=">= 2, whose p99 span an interval")
    bundle = Bundle.open(args.bundle)
    frames = open_frames(args, bundle, console)
    point = chosen_point(args, bundle)
    with ExitStack() as stack:
        lineup = open_lineup(args, bundle, frames, point, (), stack)
        outcome = replay(_predictions(lineup.every, frames, bundle), point)
        names = [exit_.name for exit_ in bundle.cascade.exits]
        measurement = Measurement(frames, lineup.subjects, names, seed=args.seed)
        measurement.warm_up(WARM_UP_ROUNDS, console)
        runs = [
            _measure(measurement, lineup, args.seconds, console)
            for _ in console.progress(range(args.runs), "measuring", args.runs)
        ]
    _check_exits(runs, outcome, names)
    found = compare(runs, bundle, point, outcome)
    pooled = simulate(pool([one.table for one in runs]), bundle, point, outcome)
    p99s = [p99 for one in found if (p99 := one.measured.p99) is not None]
    inside = pooled.latency.p99 is not None and min(p99s) <= pooled.latency.p99 <= max(p99s)
    _show(found, pooled, p99s, inside, f"{bundle.manifest.name} at {point.name}", console)
    return {
        "bundle": bundle.hash,
        "data": "" if frames.data is None else frames.data.hash,
        "operating_point": plain(point),
        "seconds": args.seconds,
        "runs": [plain(one) for one in found],
        "pooled": plain(pooled),
        "p99_interval": [min(p99s), max(p99s)],
        "p99_inside": inside,
        "device": device.fingerprint(),
    }


def _predictions(scheduler: Scheduler, frames: Frames, bundle: Bundle) -> PredictionTable:
    """Logits of all exits on the frames."""
    assert frames.labels is not None
    size = images_per_call(scheduler)
    parts = [
        scheduler.logits(frames.images[begin : begin + size])
        for begin in range(0, len(frames), size)
    ]
    logits = {name: np.concatenate([part[name] for part in parts]) for name in scheduler.exits}
    return PredictionTable(bundle.cascade, logits, frames.labels)


def _measure(measurement: Measurement, lineup: Lineup, seconds: float, console: Console) -> Run:
    """One bench.

    Raises:
        ConfigError: It had too few rounds for a p99.
    """
    tables = {name: TableRows(lineup.every.plan) for name in lineup.tables}
    takes: dict[str, list[Take]] = {
        name: [functools.partial(take_row, rows)] for name, rows in tables.items()
    }
    rounds = measurement.measure(seconds, console, takes)
    if rounds.interrupted:
        raise KeyboardInterrupt
    if len(rounds) < frames_for(0.99):
        raise ConfigError(
            f"--seconds {seconds:g}: rounds of a run",
            got=len(rounds),
            expected=f">= {frames_for(0.99)}, which a p99 needs",
        )
    cascade = rounds.recordings["cascade"]
    table = merge([rows.finish() for rows in tables.values()])
    return Run(rounds.rows, cascade.seconds, cascade.exits, table)


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


def _check_exits(runs: Sequence[Run], outcome: Outcome, exits: Sequence[str]) -> None:
    """Refuse to compare where a frame left elsewhere than its logits say."""
    for one in runs:
        said = outcome.at[one.rows]
        wrong = np.flatnonzero(one.exits != said)
        if wrong.size:
            first = wrong[0]
            raise BackendError(
                f"{wrong.size} of {len(said)} frames left elsewhere than their logits say, "
                f"first that of image {one.rows[first]}",
                got=exits[one.exits[first]],
                expected=exits[said[first]],
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
