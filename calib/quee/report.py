"""What `edge-runtime gate sweep` says: JSON for machines, tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from calib.quee.study import GATE, AtAccuracy, ColumnStudy, Curve, Interval, Study, verdict
from calib.quee.sweep import CurvePoint, Estimate
from edge_runtime import schema
from edge_runtime.console import Console

#: Points of a curve that are printed; JSON has all.
_SHOWN = 8
#: Column -> unit for people, and how many of them the column's own unit is.
_UNITS = {
    "latency": ("latency, ms", 1e3),
    "energy": ("energy, mJ", 1e3),
    "bit_operations": ("BitOPS", 1.0),
    "macs": ("MACs", 1.0),
}


def unit(column: str) -> tuple[str, float]:
    """Name of a cost with its unit, and the factor that brings its values to that unit."""
    return _UNITS.get(column, (column, 1.0))


def show(study: Study, console: Console) -> None:
    """Print all curves, what an accuracy costs, how good targets are, and what follows."""
    for column in study.columns:
        _show_curves(column, study.samples, console)
        _show_costs(column, console)
        if column.fixed:
            _show_fixed(column, console)
    if study.calibration:
        console.table(
            "calibration of the targets, test samples",
            ("clusters K", "ECE, mean of the paths", "of the worst path"),
            [
                (one.clusters, f"{one.error * 100:.2f} %", f"{max(one.paths) * 100:.2f} %")
                for one in study.calibration
            ],
        )
    for column in study.columns:
        console.line(_near_ties(column, study.samples))
    for sentence in verdict(study):
        console.line(sentence)


def plain(study: Study) -> dict[str, Any]:
    """The study as `--json` writes it, all points included; costs in their columns' own units."""
    return {
        "bundle": study.bundle,
        "levels": list(study.levels),
        "samples": study.samples,
        "resampling": asdict(study.resampling),
        "columns": {one.column: _column_json(one) for one in study.columns},
        "calibration": schema.plain(study.calibration),
        "verdict": list(verdict(study)),
    }


def _column_json(column: ColumnStudy) -> dict[str, Any]:
    return {
        "reference": column.reference.name,
        "curves": {
            one.name: [_point_json(one, point) for point in one.points] for one in column.curves
        },
        "fixed": schema.plain(column.fixed),
        "cost_at_accuracy": [_compared_json(one) for one in column.at_accuracy],
        "gate_against_rivals": [_compared_json(one) for one in column.rivals],
    }


def _point_json(curve: Curve, point: CurvePoint) -> dict[str, Any]:
    named = map(curve.paths.name, curve.paths.paths)
    return {
        "setting": point.setting,
        "accuracy": schema.plain(point.accuracy),
        "cost": schema.plain(point.cost),
        "leaving": curve.leaving(point),
        "paths": dict(zip(named, point.shares, strict=True)),
        "near_ties": point.near_ties,
    }


def _compared_json(one: AtAccuracy) -> dict[str, Any]:
    return {**schema.plain(one), "verdict": one.verdict}


def _show_curves(column: ColumnStudy, samples: int, console: Console) -> None:
    name, factor = unit(column.column)
    rows = [
        (
            curve.name if not i else "",
            f"{point.setting:.4g}",
            _percent(point.accuracy),
            _cost(point.cost, factor),
            " / ".join(f"{share * 100:.0f}" for share in curve.leaving(point).values()),
        )
        for curve in _shown(column)
        for i, point in enumerate(_thinned(curve.points))
    ]
    exits = " / ".join(column.reference.paths.exits)
    console.table(
        f"accuracy against {name}, on {samples} test samples, with 95 % intervals; settings are "
        f"lambda or thresholds; leaving at {exits}",
        ("curve", "setting", "accuracy, %", name, "leaving, %"),
        rows,
    )


def _show_costs(column: ColumnStudy, console: Console) -> None:
    name, factor = unit(column.column)
    console.table(
        f"{name} at equal accuracy, against {column.reference.name}; x: times its cost, paired "
        "95 % intervals",
        ("curve", "at least, %", "reached, %", name, "x [95 %]", "points gained [95 %]"),
        _named_once([_cost_cells(one, factor) for one in _by_curve(column)]),
    )
    if column.rivals:
        console.table(
            f"{name} of the gate at equal accuracy, against other thresholds",
            ("against", "at least, %", "reached, %", name, "x [95 %]", "points gained [95 %]"),
            _named_once([(one.reference, *_cost_cells(one, factor)[1:]) for one in column.rivals]),
        )


def _shown(column: ColumnStudy) -> list[Curve]:
    """Curves whose points are printed: not those of the gate that weighs another cost."""
    return [one for one in column.curves if one.name == GATE or not one.name.startswith(GATE)]


def _by_curve(column: ColumnStudy) -> list[AtAccuracy]:
    names = [one.name for one in column.curves]
    return sorted(column.at_accuracy, key=lambda one: names.index(one.curve))


def _named_once(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Rows without the first cell where it is that of the row before."""
    before = ["", *(row[0] for row in rows)]
    return [
        ("", *row[1:]) if row[0] == name else row for name, row in zip(before, rows, strict=False)
    ]


def _cost_cells(one: AtAccuracy, factor: float) -> tuple[str, ...]:
    target = f"{one.target * 100:.2f}"
    if one.accuracy is None or one.cost is None:
        return one.curve, target, "never", "", "", ""
    reached = f"{one.accuracy * 100:.2f}"
    cost = f"{one.cost * factor:.4g}"
    if one.ratio is None or one.gain is None:
        return one.curve, target, reached, cost, "other never", ""
    return one.curve, target, reached, cost, _interval(one.ratio), _interval(one.gain, 100, "+.2f")


def _show_fixed(column: ColumnStudy, console: Console) -> None:
    name, factor = unit(column.column)
    console.table(
        "one precision without exits",
        ("precision", "accuracy, %", name, f"{name}, gate as accurate"),
        [
            (
                one.name,
                f"{one.accuracy * 100:.2f}",
                f"{one.cost * factor:.4g}",
                "never" if one.gate_cost is None else f"{one.gate_cost * factor:.4g}",
            )
            for one in column.fixed
        ],
    )


def _near_ties(column: ColumnStudy, samples: int) -> str:
    gate = column.curves[0]
    worst = max(gate.points, key=lambda point: point.near_ties)
    name, _ = unit(column.column)
    text = f"near-ties of the gate weighing {name}: "
    if not worst.near_ties:
        return text + f"none in {samples} samples at any lambda"
    return text + f"at most {worst.near_ties} of {samples} samples, at lambda {worst.setting:.4g}"


def _thinned(points: Sequence[CurvePoint]) -> list[CurvePoint]:
    """Points whose costs are spread evenly, in their order."""
    if len(points) <= _SHOWN:
        return list(points)
    costs = np.array([point.cost.mean for point in points])
    wanted = np.linspace(costs.min(), costs.max(), _SHOWN)
    nearest = np.abs(costs[:, None] - wanted).argmin(axis=0)
    return [points[i] for i in np.unique(nearest)]


def _percent(value: Estimate) -> str:
    low, mean, high = (100 * x for x in (value.low, value.mean, value.high))
    return f"{mean:.2f} [{low:.1f}, {high:.1f}]"


def _cost(value: Estimate, factor: float) -> str:
    low, mean, high = (x * factor for x in (value.low, value.mean, value.high))
    return f"{mean:.4g} [{low:.3g}, {high:.3g}]"


def _interval(value: Interval, factor: float = 1, form: str = ".3f") -> str:
    mean, low, high = (format(x * factor, form) for x in (value.value, value.low, value.high))
    return f"{mean} [{low}, {high}]"
