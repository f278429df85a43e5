"""What `edge-runtime search` says of an outcome: JSON for machines, tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib.cascade_search.improvement import Improvement
from calib.cascade_search.points import at_accuracy, why_not_deployable
from calib.cascade_search.search import CascadePoint
from calib.cascade_search.shift import Shift
from calib.cascade_search.study import Outcome, Study
from edge_runtime.console import Console, percent
from edge_runtime.schema import plain

_PEAKS = 3


def models_json(singles: Sequence[CascadePoint]) -> dict[str, Any]:
    """Model -> accuracy and cost."""
    return {point.models[0]: {"accuracy": point.accuracy, "cost": point.cost} for point in singles}


def outcome_json(study: Study, outcome: Outcome, *, front: bool = True) -> dict[str, Any]:
    """An outcome as `--json` writes it.

    Args:
        study: What was searched.
        outcome: What came of one method.
        front: Whether all points of the front are written.
    """
    result, reference = outcome.result, outcome.result.reference
    method = outcome.method
    found: dict[str, Any] = {
        "method": {
            "metric": method.metric,
            "ensemble": method.ensemble,
            "temperatures": study.temperatures if method.scaled else {},
        },
        "reference": {
            "model": reference.models[0],
            "accuracy": reference.accuracy,
            "cost": reference.cost,
        },
        "single_front": [point.models[0] for point in result.single_front],
        "improvement": {
            **_improvement_json(outcome.improvement),
            "ranges": [
                {"from": low, "to": high, "average": average}
                for (low, high), average in outcome.averages.items()
            ],
        },
        "operating_points": {
            name: point and _operating_point_json(study, outcome, name, point)
            for name, point in outcome.points.points.items()
        },
        "unreached": dict(outcome.points.unreached),
    }
    if front:
        found["front"] = [_point_json(study, outcome, point) for point in result.front]
    if outcome.shift is not None:
        found["shift"] = _shift_json(study, outcome, outcome.shift, front)
    return found


def show_outcome(study: Study, outcome: Outcome, console: Console) -> None:
    """Print the operating points of one method, and what it improves on."""
    result, reference = outcome.result, outcome.result.reference
    gain = outcome.improvement
    cascades = sum(len(point.models) > 1 for point in result.front)
    console.facts(
        {
            "table": f"{study.table.path}, {len(study.table)} samples, "
            f"{len(result.singles)} models, {study.table.classes or 'unknown'} classes",
            "method": str(outcome.method),
            "single models on their front": ", ".join(p.models[0] for p in result.single_front),
            "front": f"{len(result.front)} points, {cascades} of them cascades",
            "drops are counted from": f"{reference.models[0]}, {percent(reference.accuracy)}, "
            f"cost {reference.cost:.4g}",
            "cheaper than single models": f"{gain.average:.3f} times on average from "
            f"{percent(gain.accuracy[0])} to {percent(gain.accuracy[-1])}, "
            f"{gain.maximum:.3f} times at most",
            **{
                f"  from {percent(low)} to {percent(high)}": f"{average:.3f} times on average"
                for (low, high), average in outcome.averages.items()
            },
        }
    )
    _show_held_out(outcome, console)
    _show_points(study, outcome, console)
    for name, reason in outcome.points.unreached.items():
        console.line(f"{name}: not reached: {reason}")
    reasons = [
        why_not_deployable(point, outcome.method, study.settings.top, study.table.with_logits)
        for point in result.front
    ]
    if any(reasons):
        first = next(reason for reason in reasons if reason)
        console.line(
            f"{sum(map(bool, reasons))} of {len(reasons)} points can't be deployed: {first}"
        )
    if outcome.shift is not None:
        _show_shift(study, outcome, outcome.shift, console)


def show_comparison(study: Study, outcomes: Sequence[Outcome], console: Console) -> None:
    """Print all methods side by side, and the best points of the best of them."""
    ranges = study.settings.ranges
    console.table(
        f"improvement over single models, {study.settings.longest} models at most; "
        "TS: temperature-scaled",
        (
            "method",
            "average",
            *(f"{low:.0%} to {high:.0%}" for low, high in ranges),
            "largest",
            "at accuracy",
            "highest accuracy",
            *(["average on --shift"] if study.shift else []),
        ),
        [
            (
                outcome.method,
                f"{outcome.improvement.average:.3f}",
                *(f"{outcome.averages[one]:.3f}" for one in ranges),
                f"{outcome.improvement.maximum:.3f}",
                _accuracy(outcome.improvement.best_accuracy),
                _accuracy(outcome.result.front[-1].accuracy),
                *([f"{outcome.shift.improvement.average:.3f}"] if outcome.shift else []),
            )
            for outcome in outcomes
        ],
    )
    best = max(outcomes, key=lambda outcome: outcome.improvement.average)
    show_peaks(best, console)


def show_peaks(outcome: Outcome, console: Console) -> None:
    """Print the points at which the improvement is locally largest, as Table 1 of the paper.

    Reference:
        Lebovitz et al., TMLR 2023, Table 1.
    """
    front, gain = outcome.result.front, outcome.improvement
    points = [at_accuracy(front, accuracy) for accuracy in gain.peaks(_PEAKS)]
    other = {} if outcome.shift is None else dict(zip(front, outcome.shift.front, strict=True))
    rows = []
    for accuracy, point in zip(gain.peaks(_PEAKS), points, strict=True):
        factor = float(gain.factor[gain.accuracy.searchsorted(accuracy)])
        elsewhere = other.get(point)
        shift = () if elsewhere is None else (_accuracy(elsewhere.accuracy), _cost(elsewhere))
        rows.append(
            (
                " -> ".join(point.models),
                _accuracy(point.accuracy),
                _cost(point),
                *shift,
                _thresholds(point),
                f"{factor:.3f}",
            )
        )
    console.table(
        f"locally largest improvement, {outcome.method}",
        (
            "cascade",
            "accuracy",
            "cost",
            *(("accuracy, --shift", "cost, --shift") if other else ()),
            "thresholds",
            "improvement",
        ),
        rows,
    )


def _improvement_json(gain: Improvement) -> dict[str, Any]:
    return {
        "average": gain.average,
        "max": gain.maximum,
        "curve": [
            [accuracy, factor]
            for accuracy, factor in zip(gain.accuracy.tolist(), gain.factor.tolist(), strict=True)
        ],
    }


def _figures_json(point: CascadePoint) -> dict[str, Any]:
    return {
        "models": list(point.models),
        "thresholds": list(point.thresholds),
        "accuracy": point.accuracy,
        "cost": point.cost,
        "exit_rates": list(point.exit_rates),
    }


def _point_json(study: Study, outcome: Outcome, point: CascadePoint) -> dict[str, Any]:
    why_not = why_not_deployable(point, outcome.method, study.settings.top, study.table.with_logits)
    return {**_figures_json(point), "deployable": why_not is None, "why_not": why_not}


def _operating_point_json(
    study: Study, outcome: Outcome, name: str, point: CascadePoint
) -> dict[str, Any]:
    reference = outcome.result.reference
    held_out = plain(outcome.held_out.get(name))
    if held_out is not None:
        del held_out["exit_rates"]
    return {
        **_point_json(study, outcome, point),
        "drop": reference.accuracy - point.accuracy,
        "cheaper": reference.cost / point.cost,
        "cross_validation": held_out,
    }


def _shift_json(study: Study, outcome: Outcome, shift: Shift, front: bool) -> dict[str, Any]:
    assert study.shift is not None
    elsewhere = dict(zip(outcome.result.front, shift.front, strict=True))
    found: dict[str, Any] = {
        "table": str(study.shift.path),
        "table_hash": study.shift.hash,
        "samples": len(study.shift),
        "models": models_json(shift.singles),
        "single_front": [point.models[0] for point in shift.single_front],
        "improvement": _improvement_json(shift.improvement),
        "operating_points": {
            name: point and _changed_json(point, elsewhere[point])
            for name, point in outcome.points.points.items()
        },
    }
    if front:
        found["front"] = [_changed_json(*pair) for pair in elsewhere.items()]
    return found


def _changed_json(before: CascadePoint, after: CascadePoint) -> dict[str, Any]:
    rates = zip(before.exit_rates, after.exit_rates, strict=True)
    return {
        **_figures_json(after),
        "change": {
            "accuracy": after.accuracy - before.accuracy,
            "cost": after.cost - before.cost,
            "exit_rates": [there - here for here, there in rates],
        },
    }


def _show_held_out(outcome: Outcome, console: Console) -> None:
    if not outcome.held_out:
        return
    reference = outcome.result.reference
    rows = []
    for name, one in outcome.held_out.items():
        low, high = one.interval
        rows.append(
            (
                name,
                f"{one.drop * 100:.2f} [{low * 100:.2f}, {high * 100:.2f}]",
                percent(one.below),
                f"{one.cost:.4g}",
                f"{reference.cost / one.cost:.2f}",
            )
        )
    console.table(
        "expected on new samples (the whole search cross-validated)",
        ("point", "accuracy drop, points [95 %]", "folds below reference", "cost", "cheaper"),
        rows,
    )


def _show_points(study: Study, outcome: Outcome, console: Console) -> None:
    reference = outcome.result.reference
    console.table(
        f"on the {len(study.table)} samples they were chosen on; "
        f"{reference.models[0]} alone: {_accuracy(reference.accuracy)}, {reference.cost:.4g}",
        ("point", "accuracy", "drop", "cost", "cheaper", "leaving at", "thresholds"),
        [
            (
                name,
                _accuracy(point.accuracy),
                f"{(reference.accuracy - point.accuracy) * 100:.3f}",
                _cost(point),
                f"{reference.cost / point.cost:.2f}",
                _rates(point),
                _thresholds(point),
            )
            for name, point in outcome.points.points.items()
            if point is not None
        ],
    )


def _show_shift(study: Study, outcome: Outcome, shift: Shift, console: Console) -> None:
    assert study.shift is not None
    elsewhere: Mapping[CascadePoint, CascadePoint] = dict(
        zip(outcome.result.front, shift.front, strict=True)
    )
    rows = []
    for name, point in outcome.points.points.items():
        if point is not None:
            other = elsewhere[point]
            change = (other.accuracy - point.accuracy) * 100
            cells = (_accuracy(other.accuracy), f"{change:+.2f}", _cost(other), _rates(other))
            rows.append((name, *cells))
    console.table(
        f"the same on {study.shift.path}, {len(study.shift)} samples",
        ("point", "accuracy", "change, points", "cost", "leaving at"),
        rows,
    )
    gain = shift.improvement
    console.line(
        f"there cheaper than single models: {gain.average:.3f} times on average from "
        f"{percent(gain.accuracy[0])} to {percent(gain.accuracy[-1])}, {gain.maximum:.3f} at most"
    )


def _accuracy(accuracy: float) -> str:
    return f"{accuracy * 100:.2f} %"


def _cost(point: CascadePoint) -> str:
    return f"{point.cost:.4g}"


def _rates(point: CascadePoint) -> str:
    return ", ".join(
        f"{name} {rate:.0%}" for name, rate in zip(point.models, point.exit_rates, strict=True)
    )


def _thresholds(point: CascadePoint) -> str:
    return ", ".join("never" if t is None else f"{t:.4g}" for t in point.thresholds) or "-"
