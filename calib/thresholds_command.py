"""Choose operating points of a bundle on labelled data, and write them into it.

Every exit is run on every image, every stage is timed on this device, and thresholds are searched
for each goal: no loss of accuracy ("zero_loss"), a bounded drop ("drop_0.5"), a time budget
("budget_2ms"). The first figures shown are cross-validated: what to expect on images that the
thresholds were not chosen on.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calib.exit_table import CostModel, ExitTable
from calib.tables import collect, exit_table, stage_seconds
from calib.thresholds import AccuracyDrop, Choice, CostBudget, Goal, ZeroLoss, choose, pays
from edge_runtime import device, options
from edge_runtime.confidence import METRICS
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain

_DROPS = (0.5, 1.0)


@dataclass(frozen=True, slots=True)
class _Chosen:
    """An operating point, the choice behind it, and what to say of it."""

    point: OperatingPoint
    choice: Choice
    text: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime thresholds``."""
    options.add_bundle(parser)
    options.add_data(parser)
    parser.add_argument("--metric", choices=METRICS, default="max_softmax", help="the signal")
    parser.add_argument(
        "--drop",
        type=float,
        action="append",
        metavar="POINTS",
        help="also a point that loses at most this much accuracy, in percentage points; "
        f"repeatable (default {' and '.join(map(str, _DROPS))})",
    )
    parser.add_argument(
        "--latency-budget-ms",
        type=options.positive,
        action="append",
        default=[],
        metavar="MS",
        help="also the most accurate point with this mean time per image; repeatable",
    )
    parser.add_argument(
        "--folds", type=options.count, default=5, help="folds of the cross-validation"
    )
    parser.add_argument("--repeats", type=options.whole, default=10, help="times it is repeated")
    parser.add_argument("--dry-run", action="store_true", help="show the points, write nothing")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collect, measure, choose, show, write."""
    bundle = Bundle.open(args.bundle)
    if len(bundle.cascade.exits) < 2:
        raise ConfigError(f"the bundle {bundle.path} has one exit: there is nothing to choose")
    goals = _goals(args)
    data = options.open_data(args, bundle)
    everything = OperatingPoint.all_exits(bundle.cascade)
    with options.open_cascade(args, bundle, data, everything, time_stages=True) as scheduler:
        table = collect(scheduler, data, console)
        seconds, decide_s = stage_seconds(scheduler, data, console)
    chosen_on = {
        "data": data.hash,
        "samples": len(data),
        "part": args.part,
        "seed": args.seed,
        "backend": args.backend,
        "stage_seconds": seconds,
        "decide_seconds": decide_s,
        "device": device.fingerprint(),
    }
    costs = CostModel.from_stages(bundle.cascade, seconds, decide_s)
    found = [
        _choose(name, goal, args, exit_table(table, args.metric), costs, bundle, chosen_on)
        for name, goal in console.progress(list(goals.items()), "choosing and cross-validating")
    ]
    _show(found, console)
    files = [] if args.dry_run else [_write(bundle, one.point, console) for one in found]
    return {
        "bundle": bundle.hash,
        "operating_points": [plain(one.point) for one in found],
        "verdicts": {one.point.name: one.text for one in found},
        "files": [str(file) for file in files],
    }


def _goals(args: argparse.Namespace) -> dict[str, Goal]:
    """Name of each operating point, and what it is to achieve."""
    goals: dict[str, Goal] = {"zero_loss": ZeroLoss()}
    for points in _DROPS if args.drop is None else args.drop:
        goals[f"drop_{points:g}"] = AccuracyDrop(points / 100)
    for budget_ms in args.latency_budget_ms:
        goals[f"budget_{budget_ms:g}ms"] = CostBudget(budget_ms / 1e3)
    return goals


def _choose(
    name: str,
    goal: Goal,
    args: argparse.Namespace,
    table: ExitTable,
    costs: CostModel,
    bundle: Bundle,
    chosen_on: Mapping[str, Any],
) -> _Chosen:
    choice = choose(table, costs, goal, repeats=args.repeats, folds=args.folds, seed=args.seed)
    verdict = pays(choice)
    point = OperatingPoint(
        name=name,
        policy="never" if choice.base_alone else "threshold",
        metric=args.metric,
        thresholds=choice.thresholds,
        bundle=bundle.hash,
        chosen_on={"goal": str(goal), **chosen_on},
        expected={
            "cross_validation": plain(choice.cross_validation),
            "in_sample": choice.in_sample,
            "pays": verdict.pays,
        },
    )
    return _Chosen(point, choice, verdict.text)


def _show(found: list[_Chosen], console: Console) -> None:
    rows = []
    for one in found:
        held_out = one.choice.cross_validation
        base = one.choice.base
        if held_out is not None:
            low, high = held_out.interval
            rows.append(
                (
                    one.point.name,
                    f"{held_out.drop * 100:.2f} [{low * 100:.2f}, {high * 100:.2f}]",
                    percent(held_out.below),
                    milliseconds(held_out.cost),
                    f"{base.cost / held_out.cost:.2f}",
                    _rates(one.choice.exits, held_out.exit_rates),
                )
            )
    if rows:
        console.table(
            "expected on new images (cross-validated)",
            (
                "point",
                "accuracy drop, points [95 %]",
                "folds below base",
                "mean ms",
                "faster",
                "leaving at",
            ),
            rows,
        )
    console.table(
        f"on the {sum(found[0].choice.base.counts)} images they were chosen on; "
        f"base alone: {percent(found[0].choice.base.accuracy)}, "
        f"{milliseconds(found[0].choice.base.cost)} ms",
        ("point", "accuracy", "mean ms", "faster", "leaving at", "thresholds"),
        [
            (
                one.point.name,
                percent(one.choice.point.accuracy),
                milliseconds(one.choice.point.cost),
                f"{one.choice.base.cost / one.choice.point.cost:.2f}",
                _rates(one.choice.exits, one.choice.point.exit_rates),
                ", ".join(
                    f"{name} {'never' if value is None else f'{value:.4g}'}"
                    for name, value in one.choice.thresholds.items()
                ),
            )
            for one in found
        ],
    )
    for one in found:
        console.line(f"{one.point.name}: {one.text}")


def _rates(exits: tuple[str, ...], rates: tuple[float, ...]) -> str:
    return ", ".join(f"{name} {rate:.0%}" for name, rate in zip(exits, rates, strict=True))


def _write(bundle: Bundle, point: OperatingPoint, console: Console) -> Path:
    path = bundle.write_operating_point(point)
    console.note(f"wrote {path}")
    return path
