"""Choose operating points of a bundle on labelled data, and write them into it.

Every exit is run on every image, every stage is timed on this device, and thresholds are searched
for each goal: no loss of accuracy ("zero_loss"), a bounded drop ("drop_0.5"), a time budget
("budget_2ms"). The first figures shown are cross-validated: what to expect on images that the
thresholds were not chosen on. With --guarantee there is also a point whose drop is bounded on all
images that come from where these came, at a confidence that is stated ("guaranteed").
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import CostModel, ExitTable
from calib.guarantee import Certificate, Promise, certify, explain, learning_part
from calib.reliability_plot import plot
from calib.tables import PredictionTable, collect, judge, stage_seconds
from calib.temperature import (
    Reliability,
    fit_temperatures,
    held_out_reliability,
    reliability,
)
from calib.thresholds import AccuracyDrop, Choice, CostBudget, Goal, ZeroLoss, choose, pays
from calib.thresholds_report import Chosen, show, show_guarantee, show_reliability
from edge_runtime import device, options
from edge_runtime.confidence import METRICS, Metric
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from engines.plot_file import check_plot

_DROPS = (0.5, 1.0)
_EPSILON, _DELTA = 0.01, 0.05
_METHOD = (
    "Learn then Test: one threshold for all exits that take part, sinking while an exact paired "
    "test excludes a larger drop"
)


@dataclass(frozen=True)
class _Data:
    """The logits, and how they become signals.

    Attributes:
        table: Logits and labels.
        metric: The signal.
        scaled: Whether temperatures are fitted.
    """

    table: PredictionTable
    metric: Metric
    scaled: bool
    _fitted: dict[bytes, dict[str, float]] = field(default_factory=dict)

    @property
    def everything(self) -> NDArray[np.intp]:
        """All rows."""
        return np.arange(len(self.table.labels))

    def temperatures(self, rows: NDArray[np.intp]) -> dict[str, float]:
        """Those fitted to some of the samples; none where none are asked for."""
        if not self.scaled:
            return {}
        key = rows.tobytes()
        if key not in self._fitted:
            logits = {name: values[rows] for name, values in self.table.logits.items()}
            self._fitted[key] = fit_temperatures(logits, self.table.labels[rows])
        return self._fitted[key]

    def signals(self, rows: NDArray[np.intp]) -> ExitTable:
        """Signals of all samples, at the temperatures of some."""
        return judge(self.table, self.metric, self.temperatures(rows)).exit_table

    def split(
        self, seen: NDArray[np.intp], unseen: NDArray[np.intp]
    ) -> tuple[ExitTable, ExitTable]:
        """For a cross-validation that includes the fitting of temperatures."""
        table = self.signals(seen)
        return table.rows(seen), table.rows(unseen)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime thresholds``."""
    options.add_bundle(parser)
    options.add_data(parser)
    parser.add_argument(
        "--exits",
        metavar="NAME,...",
        help="the exits that may be used, the last one always among them (default: all)",
    )
    parser.add_argument(
        "--suffix", default="", metavar="TEXT", help="ends the points' names, as in zero_loss_TEXT"
    )
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
    parser.add_argument(
        "--temperature",
        action="store_true",
        help="fit a temperature to every exit first, so that confidence means the same at all",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="OUT.png", help="draw how far each exit's confidence is true"
    )
    group = parser.add_argument_group("guarantee")
    group.add_argument(
        "--guarantee",
        action="store_true",
        help="also a point whose drop of accuracy is bounded on new images like these",
    )
    group.add_argument(
        "--epsilon",
        type=float,
        metavar="FRACTION",
        help=f"the bound, 0.01 is one point (default {_EPSILON})",
    )
    group.add_argument(
        "--delta",
        type=float,
        metavar="PROBABILITY",
        help=f"of a calibration that breaks the promise (default {_DELTA})",
    )
    group.add_argument(
        "--guarantee-name", metavar="NAME", help="name of the point (default guaranteed)"
    )
    parser.add_argument("--dry-run", action="store_true", help="show the points, write nothing")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Collect, measure, choose, show, write.

    Raises:
        ConfigError: The options don't fit the bundle, or each other.
        CalibrationError: There is too little data, or no choice meets a goal.
        BackendUnavailable: A package is missing.
    """
    check_plot(args.plot)
    promise = _promise(args)
    goals = _goals(args)
    bundle = Bundle.open(args.bundle)
    cascade = bundle.cascade
    if args.exits is not None:
        cascade = cascade.only(args.exits.split(","))
    if len(cascade.exits) < 2:
        what = f"the bundle {bundle.path} has" if args.exits is None else f"--exits {args.exits} is"
        raise ConfigError(f"{what} one exit: there is nothing to choose")
    images = options.open_data(args, bundle)
    everything = OperatingPoint.all_exits(cascade)
    with options.open_cascade(args, bundle, images, everything, time_stages=True) as scheduler:
        table = collect(scheduler, images, console)
        times = stage_seconds(scheduler, images, console)
    chosen_on = {
        "data": images.hash,
        "samples": len(images),
        "part": args.part,
        "seed": args.seed,
        "backend": args.backend,
        "stage_seconds": times.stages,
        "decide_seconds": times.decide_s,
        "frame_seconds": times.frame_s,
        "device": device.fingerprint(),
    }
    data = _Data(table, args.metric, args.temperature)
    costs = CostModel.from_stages(cascade, *times)
    found = [
        _choose(name, goal, args, data, costs, bundle, chosen_on)
        for name, goal in console.progress(list(goals.items()), "choosing and cross-validating")
    ]
    points = [one.point for one in found]
    texts = {one.point.name: one.text for one in found}
    show(found, console)
    certificate = None
    if promise is not None:
        point, certificate = _guarantee(promise, args, data, costs, bundle, chosen_on)
        points.append(point)
        texts[point.name] = explain(certificate, "images")
        show_guarantee(point.name, certificate, found, texts[point.name], console)
    calibration = _calibration(args, data)
    show_reliability(calibration, data.temperatures(data.everything), args.temperature, console)
    files = [] if args.dry_run else [bundle.write_operating_point(point) for point in points]
    if args.plot is not None:
        plot(args.plot, bundle.manifest.name, calibration)
        files.append(args.plot)
    for file in files:
        console.note(f"wrote {file}")
    return {
        "bundle": bundle.hash,
        "operating_points": [plain(point) for point in points],
        "verdicts": texts,
        "guarantee": None if certificate is None else certificate.record,
        "reliability": {
            name: {when: found.figures for when, found in states.items()}
            for name, states in calibration.items()
        },
        "files": [str(file) for file in files],
    }


def _promise(args: argparse.Namespace) -> Promise | None:
    """What is to be promised, None where nothing is."""
    given = {"epsilon": args.epsilon, "delta": args.delta, "guarantee-name": args.guarantee_name}
    if not args.guarantee:
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"--{name} says nothing without --guarantee")
        return None
    OperatingPoint(name=_name(args))  # refuses a name that is none, before anything long begins
    if _name(args) in _goals(args):
        raise ConfigError(f"--guarantee-name {_name(args)} is the name of another point")
    return Promise(
        epsilon=_EPSILON if args.epsilon is None else args.epsilon,
        delta=_DELTA if args.delta is None else args.delta,
    )


def _name(args: argparse.Namespace) -> str:
    """Name of the guaranteed point."""
    if args.guarantee_name is not None:
        return str(args.guarantee_name)
    return f"guaranteed_{args.suffix}" if args.suffix else "guaranteed"


def _goals(args: argparse.Namespace) -> dict[str, Goal]:
    """Name of each operating point, and what it is to achieve."""
    goals: dict[str, Goal] = {"zero_loss": ZeroLoss()}
    for points in _DROPS if args.drop is None else args.drop:
        goals[f"drop_{points:g}"] = AccuracyDrop(points / 100)
    for budget_ms in args.latency_budget_ms:
        goals[f"budget_{budget_ms:g}ms"] = CostBudget(budget_ms / 1e3)
    named = {f"{name}_{args.suffix}" if args.suffix else name: goal for name, goal in goals.items()}
    for name in named:
        OperatingPoint(name=name)  # refuses a name that is none, before anything long begins
    return named


def _choose(
    name: str,
    goal: Goal,
    args: argparse.Namespace,
    data: _Data,
    costs: CostModel,
    bundle: Bundle,
    chosen_on: Mapping[str, Any],
) -> Chosen:
    choice = choose(
        data.signals(data.everything),
        costs,
        goal,
        repeats=args.repeats,
        folds=args.folds,
        seed=args.seed,
        split=data.split if data.scaled else None,
    )
    verdict = pays(choice)
    point = _point(
        name,
        choice,
        data.temperatures(data.everything),
        args,
        bundle,
        chosen_on={"goal": str(goal), **chosen_on},
        expected={
            "cross_validation": plain(choice.cross_validation),
            "in_sample": choice.in_sample,
            "pays": verdict.pays,
        },
    )
    return Chosen(point, choice, verdict.text)


def _guarantee(
    promise: Promise,
    args: argparse.Namespace,
    data: _Data,
    costs: CostModel,
    bundle: Bundle,
    chosen_on: Mapping[str, Any],
) -> tuple[OperatingPoint, Certificate]:
    """The point that a promise holds for; temperatures see none of the images that are tested."""
    rows = data.everything
    learn = learning_part(len(rows), args.seed) if data.scaled else None
    fitted_on = rows if learn is None else learn
    certificate = certify(data.signals(fitted_on), costs, promise, learn=learn, seed=args.seed)
    point = _point(
        _name(args),
        certificate,
        data.temperatures(fitted_on),
        args,
        bundle,
        chosen_on={"goal": str(promise), "method": _METHOD, **chosen_on},
        expected={
            "guarantee": certificate.record,
            "in_sample": certificate.in_sample,
            "pays": certificate.point.cost < certificate.base.cost,
        },
    )
    return point, certificate


def _point(
    name: str,
    figures: Choice | Certificate,
    temperatures: Mapping[str, float],
    args: argparse.Namespace,
    bundle: Bundle,
    chosen_on: Mapping[str, Any],
    expected: Mapping[str, Any],
) -> OperatingPoint:
    """The operating point that a choice becomes."""
    return OperatingPoint(
        name=name,
        policy="never" if figures.base_alone else "threshold",
        metric=args.metric,
        thresholds=figures.thresholds,
        temperatures=temperatures,
        bundle=bundle.hash,
        chosen_on=chosen_on,
        expected=expected,
    )


def _calibration(args: argparse.Namespace, data: _Data) -> dict[str, dict[str, Reliability]]:
    """Exit -> "before" and, with --temperature, "after" -> its reliability, where asked for."""
    if not args.temperature and args.plot is None:
        return {}
    labels, found = data.table.labels, {}
    for name, logits in data.table.logits.items():
        found[name] = {"before": reliability(logits, labels)}
        if args.temperature:
            found[name]["after"] = held_out_reliability(
                logits, labels, folds=args.folds, seed=args.seed
            )
    return found
