"""What `edge-runtime savers` says: JSON for machines, tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calib.cascade_search.methods import Method
from calib.cascade_search.points import why_not_deployable
from calib.cascade_search.search import CascadePoint
from calib.cascade_search.signals import Metric
from calib.crossval import CrossValidation
from calib.model_table import ModelTable
from calib.saver_selection import POINTS, Candidate, PairCurve
from calib.saver_study import BaseFigures, PairFigures, TrainedPoint
from edge_runtime.console import Console, percent
from edge_runtime.schema import plain

#: Savers of a base that are printed; JSON has all.
_SHOWN = 5
_COST_COLUMNS = ("drop", "leaving", "cost", "of base's")


def bases_json(
    bases: Sequence[BaseFigures], table: ModelTable, metric: Metric
) -> dict[str, dict[str, Any]]:
    """Base -> its savers, as `--json` writes it.

    Args:
        bases: What was found.
        table: The training table.
        metric: The savers' signal.
    """
    return {
        one.base: {
            "saver": one.ranking[0].saver if one.ranking else None,
            "ranking": [_candidate_json(candidate) for candidate in one.ranking],
            "pairs": [_pair_json(pair, table, metric) for pair in one.pairs],
        }
        for one in bases
    }


def show_bases(
    bases: Sequence[BaseFigures], table: ModelTable, metric: Metric, console: Console
) -> None:
    """Print, per base, the ranking of savers and the figures of the best, then all side by side."""
    for one in bases:
        if not one.ranking:
            console.line(f"{one.base}: no model is cheaper, so it has no saver")
            continue
        _show_ranking(one, console)
        for pair in one.pairs:
            _show_pair(pair, table, metric, console)
    pairs = [pair for one in bases for pair in one.pairs]
    if len(pairs) > 1:
        _show_side_by_side(pairs, console)
    if any(_is_loss(pair) for pair in pairs):
        console.line(
            "a cost above 100 % of the base's is a loss: the saver runs on every sample, and too "
            "few leave"
        )


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "saver": candidate.saver,
        "delta_c": candidate.delta,
        "cost_ratio": candidate.cost_ratio,
        "exit_ratio": candidate.exit_ratio,
        "threshold": candidate.threshold,
        "saves": candidate.delta < 0,
    }


def _pair_json(pair: PairFigures, table: ModelTable, metric: Metric) -> dict[str, Any]:
    why_not = _why_not(pair, table, metric)
    return {
        "saver": pair.candidate.saver,
        "deployable": why_not is None,
        "why_not": why_not,
        "train": _alone_json(pair.train),
        "test": _alone_json(pair.test),
        "trained": {name: _trained_json(pair, one) for name, one in pair.trained.items()},
        "oracle": {name: _point_json(pair.test, one) for name, one in pair.oracle.items()},
    }


def _alone_json(curve: PairCurve) -> dict[str, Any]:
    row = curve.row(0.0)
    return {
        "samples": curve.samples,
        "base": {"accuracy": curve.alone.accuracy, "cost": curve.costs[1]},
        "saver": {
            "accuracy": int(curve.saver_right[-1]) / curve.samples,
            "cost": curve.costs[0],
        },
        "exit_ratio": int(curve.leaving[row]) / curve.samples,
    }


def _point_json(curve: PairCurve, point: CascadePoint) -> dict[str, Any]:
    return {
        "threshold": point.thresholds[0],
        "exit_ratio": point.exit_rates[0],
        "accuracy": point.accuracy,
        "drop": _drop(curve, point) / 100,
        "cost": point.cost,
        "percent_of_base": _share(curve, point) * 100,
    }


def _trained_json(pair: PairFigures, one: TrainedPoint) -> dict[str, Any]:
    return {
        "train": _point_json(pair.train, one.train),
        "cross_validation": plain(one.held_out),
        "test": {**_point_json(pair.test, one.test), "interval": list(one.interval)},
    }


def _show_ranking(one: BaseFigures, console: Console) -> None:
    first = one.ranking[0]
    console.table(
        f"savers of {one.base} on the training table"
        + (f", the best {_SHOWN} of {len(one.ranking)}" if len(one.ranking) > _SHOWN else ""),
        ("saver", "Delta C", "cost of base's", "exit ratio e", "matched threshold"),
        [
            (
                candidate.saver,
                f"{candidate.delta:+.3f}",
                percent(candidate.cost_ratio),
                percent(candidate.exit_ratio),
                _threshold(candidate.threshold),
            )
            for candidate in one.ranking[:_SHOWN]
        ],
    )
    if first.delta >= 0:
        console.line(f"no saver pays off for {one.base} without a loss of accuracy")


def _show_pair(pair: PairFigures, table: ModelTable, metric: Metric, console: Console) -> None:
    train, test = pair.train, pair.test
    title = f"{train.base} - {train.saver}"
    console.table(
        f"{title}: drops with thresholds from the training table, in points against {train.base}",
        (
            "point",
            "threshold",
            "training",
            *(["cross-validated [95 %]"] if _held_out(pair) else []),
            "test [95 %]",
        ),
        [
            (
                name,
                _threshold(one.train.thresholds[0]),
                f"{_drop(train, one.train):.2f}",
                *_cross_validated(one.held_out),
                _with_interval(_drop(test, one.test) / 100, one.interval),
            )
            for name, one in pair.trained.items()
        ],
    )
    console.table(
        f"{title} on the test table; {train.base} alone: {_accuracy(test.alone)} at "
        f"{test.costs[1]:.4g}, {train.saver} alone: "
        f"{int(test.saver_right[-1]) / test.samples * 100:.2f} % at {test.costs[0]:.4g}",
        ("thresholds from training:", *_COST_COLUMNS, "oracle:", *_COST_COLUMNS),
        [
            (name, *_cost_cells(test, one.test), "", *_cost_cells(test, best))
            for name, (one, best) in zip(pair.trained, _both(pair), strict=True)
        ],
    )
    why_not = _why_not(pair, table, metric)
    if why_not is not None:
        console.line(f"{train.base} - {train.saver} can't be deployed: {why_not}")


def _show_side_by_side(pairs: Sequence[PairFigures], console: Console) -> None:
    console.table(
        "cost on the test table as a share of the base's, with the threshold from training (and "
        "oracle)",
        ("base - saver", *POINTS, "accuracy at max_accuracy"),
        [
            (
                f"{pair.test.base} - {pair.test.saver}",
                *(
                    f"{_share(pair.test, one.test):.0%} ({_share(pair.test, best):.0%})"
                    for one, best in _both(pair)
                ),
                f"{_accuracy(pair.trained['max_accuracy'].test)} "
                f"({_accuracy(pair.oracle['max_accuracy'])})",
            )
            for pair in pairs
        ],
    )


def _both(pair: PairFigures) -> list[tuple[TrainedPoint, CascadePoint]]:
    return [(one, pair.oracle[name]) for name, one in pair.trained.items()]


def _held_out(pair: PairFigures) -> bool:
    return any(one.held_out is not None for one in pair.trained.values())


def _cross_validated(found: CrossValidation | None) -> tuple[str, ...]:
    return () if found is None else (_with_interval(found.drop, found.interval),)


def _with_interval(drop: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{drop * 100:.2f} [{low * 100:.2f}, {high * 100:.2f}]"


def _cost_cells(curve: PairCurve, point: CascadePoint) -> tuple[str, ...]:
    return (
        f"{_drop(curve, point):.2f}",
        percent(point.exit_rates[0]),
        f"{point.cost:.4g}",
        percent(_share(curve, point)),
    )


def _share(curve: PairCurve, point: CascadePoint) -> float:
    return point.cost / curve.costs[1]


def _drop(curve: PairCurve, point: CascadePoint) -> float:
    """Accuracy of the base minus that of a point, in points."""
    return (curve.base_correct - point.correct) / curve.samples * 100


def _is_loss(pair: PairFigures) -> bool:
    points: Mapping[str, CascadePoint] = pair.oracle
    trained = [one.test for one in pair.trained.values()]
    return any(_share(pair.test, point) > 1 for point in (*points.values(), *trained))


def _why_not(pair: PairFigures, table: ModelTable, metric: Metric) -> str | None:
    point = pair.trained["zero_loss"].train
    return why_not_deployable(point, Method(metric), 1, table.with_logits)


def _accuracy(point: CascadePoint) -> str:
    return f"{point.accuracy * 100:.2f} %"


def _threshold(value: float | None) -> str:
    return "nobody leaves" if value is None else f"{value:.4g}"
