"""What operating points of a bundle will take on a device that isn't here.

On the device:  edge-runtime bench BUNDLE --data DATA --json device.json
At the desk:    edge-runtime simulate BUNDLE --latency-table device.json --data DATA

The logits of all exits are collected here, on the data. They say where every image leaves; the
device's latency table says what leaving there takes. Percentiles need as many rows of the table and
as many images as a measured percentile needs frames.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.table import Table, show
from bench.result import Distribution, LatencyTable, Result, frames_for, read_result
from bench.simulate.simulation import (
    BASE,
    Simulated,
    base_point,
    check_columns,
    check_no_gate,
    check_table,
    precisions,
    readable_points,
    replay,
    seconds_of_base,
    simulate,
)
from calib.tables import PredictionTable, collect
from edge_runtime import options
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError, ManifestError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from engines.plot_file import check_plot

_BENCH = "edge-runtime bench BUNDLE --data DATA --json FILE"


@dataclass(frozen=True)
class Measured:
    """What the device's file has of a point that was simulated.

    Attributes:
        latency: Measured there.
        mean_ratio: Simulated mean over it.
        p99_ratio: Simulated p99 over it; None where one of them is not known.
        other: How its frames differ from those that were simulated; empty where they don't.
    """

    latency: Distribution
    mean_ratio: float
    p99_ratio: float | None
    other: str = ""


@dataclass(frozen=True)
class Row:
    """A point with all that is said about it.

    Attributes:
        simulated: Its figures.
        best: Whether no other point is both as fast and as accurate.
        speed_up: Mean of the base over its own.
        measured: What was measured there, None where it was not.
    """

    simulated: Simulated
    best: bool
    speed_up: float | None
    measured: Measured | None


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime simulate``."""
    options.add_bundle(parser)
    options.add_data(parser)
    parser.add_argument(
        "--latency-table",
        required=True,
        type=Path,
        metavar="FILE",
        help="what edge-runtime bench --json wrote on the device",
    )
    parser.add_argument(
        "--operating-point",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"points of the bundle, .json files, or {BASE} (default: all of the bundle)",
    )
    parser.add_argument(
        "--deadline-ms",
        type=options.positive,
        metavar="D",
        help="show the share of frames that would be late, if nothing cuts them short",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT", help="draw accuracy against latency (png, svg, pdf)"
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Simulate, show, draw.

    Raises:
        ManifestError: The bundle, a point or the file of the device is not whole, or not of the
            bundle.
        ConfigError: The device's table lacks what a point needs, or an option doesn't fit.
        BackendUnavailable: A package is missing.
    """
    check_plot(args.plot)
    bundle = Bundle.open(args.bundle)
    device, table = read_device(args.latency_table, bundle)
    points, left_out = _points(args.operating_point, bundle, device, table)
    data = options.open_data(args, bundle)
    found = _simulate_all(args, bundle, table, points, data, console)
    rows = _rows(found, points, bundle, device, table, data.hash)
    title = (
        f"{bundle.manifest.name} on {device.name} ({device.backend or 'backend unknown'}), "
        f"simulated on {len(data)} images"
    )
    show([_table(rows, title, data, table)], console)
    _remarks(rows, left_out, device, console)
    if args.plot is not None:
        from bench.simulate.plot import plot

        plot(args.plot, title=title, rows=rows)
        console.note(f"wrote {args.plot}")
    return {
        "bundle": bundle.hash,
        "data": data.hash,
        "samples": len(data),
        "latency_table": {
            "file": str(args.latency_table),
            "device": device.name,
            "backend": device.backend,
            "mode": device.mode,
            "rows": len(table.around_us),
            "unstable": list(device.unstable),
        },
        "deadline_ms": args.deadline_ms,
        "points": [
            {**plain(row), "operating_point": plain(point)}
            for row, point in zip(rows, points, strict=True)
        ],
        "left_out": left_out,
    }


def read_device(path: Path, bundle: Bundle) -> tuple[Result, LatencyTable]:
    """What a device's bench wrote of a bundle.

    Args:
        path: The file.
        bundle: The bundle.

    Raises:
        ManifestError: It is no result of a bench, is of another bundle, or has no latency table.
        ConfigError: Its table does not fit the bundle.
    """
    device = read_result(path)
    if device.kind != "bench":
        raise ManifestError(
            f"result {path}: kind",
            got=f"{device.kind}, figures of {device.name} that somebody published",
            expected="bench",
            remedy=f"Only a device on which this was run can be simulated: {_BENCH}",
        )
    if device.bundle != bundle.hash:
        raise ManifestError(
            f"result {path} is of another bundle",
            got=f"{device.bundle[:12]} ({device.bundle_name})",
            expected=f"{bundle.hash[:12]} ({bundle.manifest.name})",
            remedy=f"Measure this bundle on the device with: {_BENCH}",
        )
    if device.latency_table is None:
        raise ManifestError(
            f"result {path} has no latency table",
            remedy=f"Measure again on the device, until the end: {_BENCH}",
        )
    check_table(device.latency_table, bundle.cascade, path)
    return device, device.latency_table


def _points(
    names: Sequence[str] | None, bundle: Bundle, device: Result, table: LatencyTable
) -> tuple[list[OperatingPoint], dict[str, str]]:
    """Points to simulate, and, by name, why others are left out; what is named must be possible."""
    base = base_point(_base_variants(bundle, device, table))
    if names is not None:
        named = [_point(name, bundle, base) for name in dict.fromkeys(names)]
        for point in named:
            check_no_gate(point)
            check_columns(table, bundle, point)
        return named, {}
    readable, left_out = readable_points(bundle)
    points = []
    for point in ([] if BASE in bundle.operating_points() else [base]) + readable:
        try:
            check_columns(table, bundle, point)
            points.append(point)
        except ConfigError as error:
            left_out[point.name] = str(error)
    if not points:
        raise ConfigError(
            "no operating point of the bundle can be simulated: " + "; ".join(left_out.values())
        )
    return points, left_out


def _point(name: str, bundle: Bundle, base: OperatingPoint) -> OperatingPoint:
    if name == BASE and name not in bundle.operating_points():
        return base
    return bundle.operating_point(name)


def _base_variants(bundle: Bundle, device: Result, table: LatencyTable) -> Mapping[str, str]:
    """Those at which the base can be simulated: the first ones, or what ran on the device."""
    if device.operating_point is None or seconds_of_base(table, bundle, {}) is not None:
        return {}
    return device.operating_point.variants


def _simulate_all(
    args: argparse.Namespace,
    bundle: Bundle,
    table: LatencyTable,
    points: Sequence[OperatingPoint],
    data: ImageDataset,
    console: Console,
) -> list[Simulated]:
    """All points; logits are collected once for all that run the same variants."""
    collected: dict[tuple[str, ...], PredictionTable] = {}
    deadline_s = None if args.deadline_ms is None else args.deadline_ms / 1e3
    found = []
    for point in points:
        key = tuple(precisions(bundle, point.variants).values())
        if key not in collected:
            every = OperatingPoint.all_exits(bundle.cascade, variants=point.variants)
            with options.open_cascade(args, bundle, data, every) as scheduler:
                collected[key] = collect(scheduler, data, console)
        outcome = replay(collected[key], point)
        found.append(simulate(table, bundle, point, outcome, deadline_s=deadline_s))
    return found


def _rows(
    found: Sequence[Simulated],
    points: Sequence[OperatingPoint],
    bundle: Bundle,
    device: Result,
    table: LatencyTable,
    data_hash: str,
) -> list[Row]:
    base_s = seconds_of_base(table, bundle, _base_variants(bundle, device, table))
    rows = []
    for one, point in zip(found, points, strict=True):
        mean = one.latency.mean
        rows.append(
            Row(
                one,
                best=not any(_beats(other, one) for other in found),
                speed_up=base_s / mean if base_s is not None and mean > 0 else None,
                measured=_measured(one, point, bundle, device, data_hash),
            )
        )
    return rows


def _beats(one: Simulated, other: Simulated) -> bool:
    """Whether a point is as fast and as accurate as another, and one of both is better."""
    mine, its = (one.accuracy, -one.latency.mean), (other.accuracy, -other.latency.mean)
    return mine != its and mine[0] >= its[0] and mine[1] >= its[1]


def _measured(
    one: Simulated, point: OperatingPoint, bundle: Bundle, device: Result, data_hash: str
) -> Measured | None:
    """What the device's file has of this point: as the cascade or as its base."""
    own = device.operating_point
    if own is None:
        return None
    latency = None
    base = device.subject("base")
    if _same(point, own, bundle):
        latency = device.end_to_end
    elif base is not None and _same(point, base_point(own.variants), bundle):
        latency = base.latency
    if latency is None or not latency.mean > 0:
        return None
    p99s = one.latency.p99, latency.p99
    return Measured(
        latency,
        mean_ratio=one.latency.mean / latency.mean,
        p99_ratio=p99s[0] / p99s[1] if p99s[0] is not None and p99s[1] else None,
        other=_other_frames(device, data_hash, latency is device.end_to_end),
    )


def _same(point: OperatingPoint, other: OperatingPoint, bundle: Bundle) -> bool:
    """Whether two points run alike, whatever they are called."""
    return _rule(point, bundle) == _rule(other, bundle)


def _rule(point: OperatingPoint, bundle: Bundle) -> tuple[object, ...]:
    policy = point.policy_for(bundle.cascade)
    exits = bundle.cascade.exits
    plan = bundle.cascade.plan(policy.evaluated(len(exits)))
    runs = tuple((s.name, bundle.precision(s.name, point.variants)) for s in plan.stages)
    if len(plan.steps) == 1:
        return (plan.steps[0].exit.name, runs)
    temperatures = [point.temperatures.get(exit_.name, 1.0) for exit_ in exits]
    return (policy, point.metric, tuple(temperatures), runs)


def _other_frames(device: Result, data_hash: str, cascade: bool) -> str:
    """How the frames that the device measured differ from those that were simulated."""
    found = []
    if device.data != data_hash:
        found.append("on other images" if device.data else "on noise")
    if cascade and device.deadline is not None and device.deadline.cut_short:
        found.append(f"{device.deadline.cut_short} frames cut short by a deadline")
    return ", ".join(found)


def _table(rows: Sequence[Row], title: str, data: ImageDataset, table: LatencyTable) -> Table:
    """One line per point; energy and lateness only where they are known."""
    columns = ["operating point", "accuracy", "leave early", "mean", "p50", "p90", "p99"]
    joules = any(row.simulated.joules is not None for row in rows)
    late = any(row.simulated.late is not None for row in rows)
    columns += ["mJ"] * joules + ["late"] * late + ["faster than base"]
    cells = []
    for row in rows:
        one, latency = row.simulated, row.simulated.latency
        line = [
            one.point + " *" * row.best,
            percent(one.accuracy),
            percent(one.early),
            milliseconds(latency.mean),
            *(
                "-" if value is None else milliseconds(value)
                for value in (latency.p50, latency.p90, latency.p99)
            ),
        ]
        if joules:
            line.append("-" if one.joules is None else f"{one.joules * 1e3:.3g}")
        if late:
            line.append("-" if one.late is None else percent(one.late))
        line.append("-" if row.speed_up is None else f"{row.speed_up:.2f}")
        cells.append(tuple(line))
    notes = ["* no other point is both as fast and as accurate"]
    rows_, images = len(table.around_us), len(data)
    if min(rows_, images) < frames_for(0.99):
        notes.append(
            f"p99 needs {frames_for(0.99)} rows of the table and as many images: there are "
            f"{rows_} and {images}"
        )
    return Table(f"{title}; times in ms", tuple(columns), tuple(cells), tuple(notes))


def _remarks(
    rows: Sequence[Row], left_out: Mapping[str, str], device: Result, console: Console
) -> None:
    """What was measured there, and what is doubtful."""
    for row in rows:
        if row.measured is not None:
            console.line(f"{row.simulated.point} {_words(row.measured)}")
    for name, why in left_out.items():
        console.line(f"{name}: not simulated: {why}")
    for why in device.unstable:
        console.line(f"the run on the device was unstable: {why}")


def _words(measured: Measured) -> str:
    latency = measured.latency
    other = f" {measured.other}" if measured.other else ""
    text = (
        f"measured there{other}: mean {milliseconds(latency.mean)} ms "
        f"(simulated / measured = {measured.mean_ratio:.2f})"
    )
    if latency.p99 is None:
        return f"{text}, p99 not known from {latency.count} frames"
    beside = "" if measured.p99_ratio is None else f" ({measured.p99_ratio:.2f})"
    return f"{text}, p99 {milliseconds(latency.p99)} ms{beside}"
