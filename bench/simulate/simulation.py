"""An operating point on a device that isn't here: its latency table, and where samples leave.

Whether a sample leaves at an exit depends on its logits alone, so the shares of the exits can be
found anywhere. What leaving there takes follows from the device's table: its stages up to that exit
in the plan of the point, the decisions on the way, and what every frame takes besides. Each row of
the table gives one such time per exit; together, weighted by the shares, they are the distribution
that is to be expected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bench.result import QUANTILES, Distribution, LatencyTable, Point, frames_for
from calib.tables import PredictionTable
from edge_runtime import confidence
from edge_runtime.cascade import Cascade
from edge_runtime.errors import ConfigError, EdgeRuntimeError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.policy import Streak

#: Name of the point at which only the last exit is evaluated.
BASE = "base"


@dataclass(frozen=True)
class Outcome:
    """What becomes of each sample of the data.

    Attributes:
        at: Index in the cascade's exits of the one where it leaves, shape (samples,).
        right: Whether that exit is right, shape (samples,).
    """

    at: NDArray[np.intp]
    right: NDArray[np.bool_]


@dataclass(frozen=True)
class SimulatedExit:
    """One exit that an operating point evaluates.

    Attributes:
        name: Of the exit.
        share: Share of the samples that leave here, in [0, 1].
        seconds: Mean time of a frame that does.
        joules: Mean energy of one; None where the table does not tell.
    """

    name: str
    share: float
    seconds: float
    joules: float | None


@dataclass(frozen=True)
class Simulated:
    """What is to be expected of an operating point.

    Attributes:
        point: Its name.
        accuracy: On the data, in [0, 1].
        early: Share of the samples that leave before the last exit of the cascade.
        exits: Those that are evaluated, in order.
        latency: Of a frame. `count` is the smaller of the table's rows and the data's samples:
            percentiles that it does not support are None.
        joules: Mean energy of a frame; None where the table does not tell.
        late: Share of the frames that end after the deadline, if nothing cuts them short; None
            without a deadline.
    """

    point: str
    accuracy: float
    early: float
    exits: tuple[SimulatedExit, ...]
    latency: Distribution
    joules: float | None = None
    late: float | None = None


def base_point(variants: Mapping[str, str]) -> OperatingPoint:
    """The last exit alone."""
    return OperatingPoint(BASE, policy="never", variants=variants)


def replay(table: PredictionTable, point: OperatingPoint) -> Outcome:
    """Let every sample leave as the scheduler would at an operating point.

    Args:
        table: Logits of all exits.
        point: Its policy, metric and temperatures are applied.

    Raises:
        ConfigError: The point does not fit the cascade or has a gate, or there is no sample.
    """
    check_no_gate(point)
    samples = len(table.labels)
    if samples == 0:
        raise ConfigError("the data has no sample", expected="one or more")
    policy = point.policy_for(table.cascade)
    steps = table.cascade.plan(policy.evaluated(len(table.cascade.exits))).steps
    at = np.full(samples, steps[-1].position)
    answers = np.empty(samples, np.int64)
    staying, streak = np.arange(samples), Streak()
    for step in steps:
        name = step.exit.name
        logits = table.logits[name][staying]
        decision = confidence.decide(logits, point.metric, point.temperatures.get(name, 1.0))
        answers[staying] = decision.labels
        if step is steps[-1] or not len(staying):
            break
        leaves = np.asarray(policy.leaves(step.position, decision, streak))
        at[staying[leaves]] = step.position
        rows = np.flatnonzero(~leaves)
        staying = staying[rows]
        streak.keep(rows)
    return Outcome(at, answers == table.labels)


def check_no_gate(point: OperatingPoint) -> None:
    """Refuse a gate: what it does hangs on the answers of all paths, which no table here has.

    Raises:
        ConfigError: The point has one.
    """
    if point.gate is not None:
        raise ConfigError(
            f"operating point {point.name!r} has a gate, which can't be simulated from the logits "
            "of one precision",
            remedy="Simulate it with: edge-runtime gate sweep",
        )


def simulate(
    table: LatencyTable,
    bundle: Bundle,
    point: OperatingPoint,
    outcome: Outcome,
    *,
    deadline_s: float | None = None,
) -> Simulated:
    """What an operating point takes on the device of a table.

    Args:
        table: Of the device, for the exits of the bundle: see `check_table`.
        bundle: Whose stages are in the table.
        point: The operating point.
        outcome: What becomes of the samples there.
        deadline_s: Seconds within which a frame should end.

    Raises:
        ConfigError: The table lacks a stage at the precision of the point, or the point does not
            fit the bundle.
    """
    cascade = bundle.cascade
    seconds, joules = _by_exit(table, bundle, point)
    positions = _evaluated(cascade, point)
    counts = np.bincount(outcome.at, minlength=len(cascade.exits))[list(positions)]
    shares = counts / counts.sum()
    means = seconds.mean(axis=0)
    energies = [None] * len(means) if joules is None else joules.mean(axis=0).tolist()
    late = None
    if deadline_s is not None:
        late = float(shares @ (seconds > deadline_s).mean(axis=0))
    return Simulated(
        point=point.name,
        accuracy=float(outcome.right.mean()),
        early=float((outcome.at < len(cascade.exits) - 1).mean()),
        exits=tuple(
            SimulatedExit(cascade.exits[position].name, share, mean, energy)
            for position, share, mean, energy in zip(
                positions, shares.tolist(), means.tolist(), energies, strict=True
            )
        ),
        latency=_mixture(seconds, counts, min(len(seconds), len(outcome.at))),
        joules=None if joules is None else float(shares @ joules.mean(axis=0)),
        late=late,
    )


def check_columns(table: LatencyTable, bundle: Bundle, point: OperatingPoint) -> None:
    """Refuse a point whose stages the table lacks, or that does not fit the bundle.

    Args:
        table: Of the device.
        bundle: The bundle.
        point: The operating point.

    Raises:
        ConfigError: See above.
    """
    having = set(zip(table.stages, table.precisions, strict=True))
    precisions(bundle, point.variants)
    for stage in bundle.cascade.plan(_evaluated(bundle.cascade, point)).stages:
        key = (stage.name, bundle.precision(stage.name, point.variants))
        if key not in having:
            raise _no_column(table, point, *key)


def seconds_of_base(
    table: LatencyTable, bundle: Bundle, variants: Mapping[str, str]
) -> float | None:
    """Mean time of the last exit alone, None where the table lacks a stage or all take no time."""
    try:
        check_columns(table, bundle, base_point(variants))
    except ConfigError:
        return None
    return float(_by_exit(table, bundle, base_point(variants))[0].mean()) or None


def simulated_points(
    bundle: Bundle,
    table: LatencyTable,
    predictions: PredictionTable,
    variants: Mapping[str, str],
) -> tuple[Point, ...]:
    """The bundle's operating points on the device of a table, and the base.

    Left out are points that can't be read, whose stages the table lacks, or whose variants are not
    those that the predictions were collected with.

    Args:
        bundle: The bundle.
        table: Of the device.
        predictions: Logits of all exits.
        variants: Stage name -> precision, of the predictions.

    Returns:
        The base first, then the points by name.
    """
    points = [base_point(variants), *readable_points(bundle)[0]]
    found = []
    for point in points:
        try:
            if precisions(bundle, point.variants) != precisions(bundle, variants):
                continue
            one = simulate(table, bundle, point, replay(predictions, point))
        except EdgeRuntimeError:
            continue
        found.append(Point(name=one.point, accuracy=one.accuracy, seconds=one.latency.mean))
    return tuple(found)


def readable_points(bundle: Bundle) -> tuple[list[OperatingPoint], dict[str, str]]:
    """Operating points of a bundle, and, by name, what is wrong with the others."""
    found, wrong = [], {}
    for name in bundle.operating_points():
        try:
            point = bundle.operating_point(name)
            check_no_gate(point)
            point.policy_for(bundle.cascade)
            precisions(bundle, point.variants)
            found.append(point)
        except EdgeRuntimeError as error:
            wrong[name] = str(error)
    return found, wrong


def precisions(bundle: Bundle, variants: Mapping[str, str]) -> dict[str, str]:
    """The precision at which each stage of a bundle runs.

    Raises:
        ConfigError: There is no such variant.
    """
    return {stage.name: bundle.precision(stage.name, variants) for stage in bundle.cascade.stages}


def check_table(table: LatencyTable, cascade: Cascade, path: Path) -> None:
    """Refuse a table that says nothing of a cascade.

    Args:
        table: Of the device.
        cascade: Of the bundle.
        path: The table's file.

    Raises:
        ConfigError: It is of other exits, all of its times are zero, or a power is negative.
    """
    remedy = "Measure again on the device with: edge-runtime bench BUNDLE --json FILE"
    exits = [exit_.name for exit_ in cascade.exits]
    if list(table.exits) != exits:
        raise ConfigError(
            f"exits of the latency table of {path}",
            got=", ".join(table.exits) or "none",
            expected=", ".join(exits),
            remedy=remedy,
        )
    if not np.any(table.stage_us):
        raise ConfigError(f"the latency table of {path}: no stage takes any time", remedy=remedy)
    for stage, power in table.watts.items():
        if power < 0:
            raise ConfigError(
                f"the latency table of {path}: watts of stage {stage!r}",
                got=power,
                expected=">= 0",
                remedy=remedy,
            )


def _evaluated(cascade: Cascade, point: OperatingPoint) -> tuple[int, ...]:
    return point.policy_for(cascade).evaluated(len(cascade.exits))


def _by_exit(
    table: LatencyTable, bundle: Bundle, point: OperatingPoint
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Seconds and joules of a frame that leaves at each evaluated exit, shape (rows, evaluated)."""
    cascade = bundle.cascade
    check_columns(table, bundle, point)
    columns = {key: i for i, key in enumerate(zip(table.stages, table.precisions, strict=True))}
    stage_s, decide_s = (np.array(us, np.float64) / 1e6 for us in (table.stage_us, table.decide_us))
    seconds = np.array(table.around_us, np.float64) / 1e6
    watts = np.mean([*table.watts.values()]) if table.watts else None
    joules = None if watts is None else watts * seconds
    found, energies = [], []
    for step in cascade.plan(_evaluated(cascade, point)).steps:
        for stage in step.stages:
            precision = bundle.precision(stage.name, point.variants)
            took = stage_s[:, columns[stage.name, precision]]
            seconds = seconds + took
            own = table.watts.get(stage.name)
            joules = None if joules is None or own is None else joules + own * took
        deciding = decide_s[:, step.position]
        seconds = seconds + deciding
        joules = None if joules is None or watts is None else joules + watts * deciding
        found.append(seconds)
        energies.append(joules)
    known = [one for one in energies if one is not None]
    return np.stack(found, axis=1), np.stack(known, axis=1) if len(known) == len(found) else None


def _no_column(
    table: LatencyTable, point: OperatingPoint, stage: str, precision: str
) -> ConfigError:
    """The error for a stage whose time is not known."""
    which = "" if point.name == BASE else f"--operating-point {point.name} "
    having = [p for s, p in zip(table.stages, table.precisions, strict=True) if s == stage]
    return ConfigError(
        f"operating point {point.name!r}: the latency table's times of stage {stage!r}",
        got=", ".join(having) or "none",
        expected=precision,
        remedy=f"Measure it on the device with: edge-runtime bench BUNDLE {which}--json FILE",
    )


def _mixture(seconds: NDArray[np.float64], counts: NDArray[np.intp], support: int) -> Distribution:
    """The distribution over rows and exits.

    Args:
        seconds: Per row and exit, shape (rows, exits).
        counts: Samples that leave at each exit, shape (exits,).
        support: How many frames the percentiles may be said to rest on.
    """
    reached = counts > 0
    values = seconds[:, reached].ravel()
    weights = np.tile(counts[reached], len(seconds))
    order = np.argsort(values, kind="stable")
    values, upto = values[order], np.cumsum(weights[order])

    def quantile(q: float) -> float:
        place = np.searchsorted(upto, q * upto[-1] * (1 - 1e-12))
        return float(values[min(place, len(values) - 1)])

    p50, p90, p99, p999 = (
        quantile(q) if support >= frames_for(q) else None for q in (0.5, 0.9, 0.99, 0.999)
    )
    return Distribution(
        count=support,
        mean=float(seconds.mean(axis=0) @ counts / counts.sum()),
        p50=p50,
        p90=p90,
        p99=p99,
        p999=p999,
        max=float(values[-1]),
        curve=tuple(quantile(q) for q in QUANTILES),
    )
