"""Decide which stages of a bundle run at another precision, and write the operating point.

Every stage is timed at both precisions in turn, and its effect on every exit is measured on
labelled data. Stages whose variant is not clearly faster on this device keep the precision that
they have. With the others at the new precision, thresholds are chosen anew: rounding moves the
signals, so the old ones would let other samples leave. While the cascade loses more accuracy than
the budget allows, stages go back one by one.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calib.sensitivity import (
    Figures,
    Mixes,
    Open,
    PrecisionChoice,
    StageEffect,
    VariantTimes,
    at_thresholds,
    choose_precisions,
    default_choice,
    stage_effects,
    stages_with,
    usable_thresholds,
    variant_times,
)
from calib.thresholds import AccuracyDrop, Goal, ZeroLoss, pays
from edge_runtime import device, options
from edge_runtime.confidence import METRICS
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError, EdgeRuntimeError, missing_package
from edge_runtime.evaluate import classify_in_turn
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from edge_runtime.timing import Ratio, ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PRECISIONS = ("int8", "fp16")
_FP16_ON_CPU = (
    "ONNX Runtime's CPU provider computes FP16 graphs in FP32, so these figures are not "
    "an FP16 device's: choose on the device; `edge-runtime convert` tells how far FP16 rounds."
)
#: Images on which both cascades are timed as a whole.
_TIMED = 1000
_PLOTS = (".pdf", ".png", ".svg")
#: Charts side by side.
_COLUMNS = 3
#: Colours that people with any colour vision tell apart.
_BEFORE, _FORGOTTEN, _AFTER = "#0072b2", "#999999", "#d55e00"


@dataclass(frozen=True)
class _Work:
    """What was measured and chosen.

    Attributes:
        start: The point to compare with, at the precision that stages have.
        given: Whether it was named, not chosen here.
        goal: What thresholds are chosen for.
        mixes: What the exits say.
        times: What each variant takes.
        effects: What each variant does.
        found: The choice.
        measured: Mean time of the chosen cascade over that "before", and over that of its "rival"
            where it has one, measured as a whole; empty where nothing was chosen.
    """

    start: OperatingPoint
    given: bool
    goal: Goal
    mixes: Mixes
    times: VariantTimes
    effects: tuple[StageEffect, ...]
    found: PrecisionChoice
    measured: Mapping[str, Ratio]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``edge-runtime precision``."""
    options.add_bundle(parser)
    options.add_data(parser)
    parser.add_argument("--precision", choices=_PRECISIONS, default="int8")
    parser.add_argument("--stages", metavar="A,B", help="consider these stages only (default: all)")
    parser.add_argument(
        "--budget",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="accuracy that the cascade may lose by it, in percentage points (default 1)",
    )
    parser.add_argument(
        "--goal-drop",
        type=float,
        metavar="POINTS",
        help="thresholds may lose this much accuracy against the last exit alone (default 0, or "
        "what the operating point was chosen for)",
    )
    parser.add_argument(
        "--operating-point",
        metavar="NAME",
        help="compare with this point of the bundle (default: one is chosen on the data)",
    )
    parser.add_argument("--metric", choices=METRICS, help="the signal (default max_softmax)")
    parser.add_argument(
        "--name", help="name of the operating point to write (default: the precision)"
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw signals and exit rates")
    parser.add_argument(
        "--folds", type=options.count, default=5, help="folds of the cross-validation"
    )
    parser.add_argument("--repeats", type=options.whole, default=10, help="times it is repeated")
    parser.add_argument("--dry-run", action="store_true", help="show the choice, write no point")


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Time, collect, choose, compare, show, write.

    Raises:
        ConfigError: The options don't fit the bundle, or it has no such variants.
        CalibrationError: There is too little data.
        BackendUnavailable: A package is missing.
    """
    name = args.name or args.precision
    OperatingPoint(name=name)  # refuses a name that is none, before anything long begins
    _check_plot(args.plot)
    if not args.budget >= 0:
        raise ConfigError("--budget", got=args.budget, expected="points >= 0")
    bundle = Bundle.open(args.bundle)
    data = options.open_data(args, bundle)
    work = _work(args, bundle, data, console)
    _show(work, bundle, console)
    point = _point(name, work, args, bundle, data) if work.found.variants else None
    verdict = _verdict(work, bundle)
    if (args.precision, args.backend) == ("fp16", "onnxrt"):
        verdict.append(_FP16_ON_CPU)
    for line in verdict:
        console.line(line)
    files = []
    if args.plot is not None:
        _plot(args.plot, work)
        files.append(args.plot)
    if point is not None and not args.dry_run:
        files.append(bundle.write_operating_point(point))
    for file in files:
        console.note(f"wrote {file}")
    if point is not None and not args.dry_run:
        console.line(
            "Evaluate it on images that nothing was chosen on: "
            f"edge-runtime evaluate {bundle.path} --operating-point {name} --data OTHER"
        )
    return {
        "bundle": bundle.hash,
        "data": data.hash,
        "precision": args.precision,
        "times": plain(work.times),
        "effects": plain(work.effects),
        "variants": dict(work.found.variants),
        "left": dict(work.found.left),
        "budget": work.found.budget,
        "goal": str(work.goal),
        "before": {"operating_point": plain(work.start), **work.found.before.plain()},
        "old_thresholds": work.found.forgotten.plain(),
        "after": work.found.after.plain(),
        "rival": None if work.found.rival is None else work.found.rival.plain(),
        "loss": {"value": work.found.loss, "interval": list(work.found.interval)},
        "measured_time_ratios": plain(work.measured),
        "verdict": verdict,
        "operating_point": plain(point),
        "files": [str(file) for file in files],
        "device": device.fingerprint(),
    }


def _work(args: argparse.Namespace, bundle: Bundle, data: ImageDataset, console: Console) -> _Work:
    """Everything that takes long."""
    given = args.operating_point is not None
    start = (
        bundle.operating_point(args.operating_point)
        if given
        else OperatingPoint(name="chosen here", metric=args.metric or "max_softmax")
    )
    goal = _goal(args, start if given else None)
    old = usable_thresholds(start, bundle)
    stages = args.stages.split(",") if args.stages else None
    stages_with(bundle, args.precision, start.variants, stages)
    open_scheduler = functools.partial(options.open_cascade, args, bundle, data)
    mixes = Mixes(
        bundle,
        data,
        console,
        open_scheduler,
        start.metric,
        temperatures=start.temperatures,
        base=start.variants,
    )
    times = variant_times(
        bundle,
        args.precision,
        data,
        console,
        open_scheduler,
        base=start.variants,
        stages=stages,
    )
    checks = {"repeats": args.repeats, "folds": args.folds, "seed": args.seed}
    if given:
        before = at_thresholds(mixes, times, {}, old)
    else:
        before = default_choice(mixes, times, goal, **checks)
        start = replace(start, thresholds=before.thresholds)
    effects = stage_effects(mixes, args.precision, before.thresholds, stages=stages)
    console.note("choosing thresholds")
    found = choose_precisions(
        mixes, times, effects, before, goal, budget=args.budget / 100, **checks
    )
    measured = _measure(start, found, data, open_scheduler, args.seed, console)
    return _Work(start, given, goal, mixes, times, effects, found, measured)


def _measure(
    start: OperatingPoint,
    found: PrecisionChoice,
    data: ImageDataset,
    open_scheduler: Open,
    seed: int,
    console: Console,
) -> dict[str, Ratio]:
    """Time the chosen cascade as a whole against those that it is compared with, in turn."""
    if not found.variants:
        return {}
    as_rule = replace(start, policy="threshold")
    points = {
        "before": start,
        "after": replace(
            as_rule,
            thresholds=found.after.thresholds,
            variants={**start.variants, **found.variants},
        ),
    }
    if found.rival is not None:
        points["rival"] = replace(as_rule, thresholds=found.rival.thresholds)
    some = data if len(data) <= _TIMED else data.balanced(_TIMED, seed)
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(open_scheduler(point)) for name, point in points.items()
        }
        series = classify_in_turn(some, subjects, console)
    seconds = {name: one.seconds.ravel() for name, one in series.items()}
    after = seconds.pop("after")
    return {name: ratio(after, other, statistic=np.mean) for name, other in seconds.items()}


def _goal(args: argparse.Namespace, start: OperatingPoint | None) -> Goal:
    """What thresholds are chosen for: as asked, or as the point to compare with was."""
    if start is not None and args.metric not in (None, start.metric):
        raise ConfigError(
            "--metric",
            got=args.metric,
            expected=f"{start.metric}, the signal of operating point {start.name!r}",
        )
    if args.goal_drop is not None:
        return AccuracyDrop(args.goal_drop / 100)
    if start is None:
        return ZeroLoss()
    text = str(start.chosen_on.get("goal", ""))
    if text == str(ZeroLoss()):
        return ZeroLoss()
    match = re.search(r"[0-9.]+", text)
    goal = AccuracyDrop(float(match[0]) / 100) if match and float(match[0]) <= 100 else None
    if goal is None or str(goal) != text:
        raise ConfigError(
            f"operating point {start.name!r} was chosen for no bound on accuracy",
            got=text or "nothing",
            remedy="Say what the new thresholds may lose with --goal-drop POINTS",
        )
    return goal


def _point(
    name: str, work: _Work, args: argparse.Namespace, bundle: Bundle, data: ImageDataset
) -> OperatingPoint:
    """The point to write."""
    found, start = work.found, work.start
    choice = found.choice
    assert choice is not None
    verdict = pays(choice)
    return OperatingPoint(
        name=name,
        policy="never" if choice.base_alone else "threshold",
        metric=start.metric,
        thresholds=choice.thresholds,
        temperatures=start.temperatures,
        variants={**start.variants, **found.variants},
        bundle=bundle.hash,
        chosen_on={
            "goal": str(work.goal),
            "method": f"variants that are clearly faster here, as {args.precision}, within "
            f"{args.budget:g} points of {start.name!r}; thresholds chosen anew",
            "budget": found.budget,
            "left": dict(found.left),
            "data": data.hash,
            "samples": len(data),
            "part": args.part,
            "seed": args.seed,
            "backend": args.backend,
            "stage_seconds": work.times.stage_seconds(found.variants),
            "decide_seconds": work.times.decide_s,
            "stage_time_ratios": plain(work.times.ratios),
            "device": device.fingerprint(),
        },
        expected={
            "cross_validation": plain(choice.cross_validation),
            "in_sample": choice.in_sample,
            "pays": verdict.pays,
            "before": {"operating_point": start.name, **found.before.plain()},
            "old_thresholds": found.forgotten.plain(),
            "loss": {"value": found.loss, "interval": list(found.interval)},
            "measured_time_ratios": plain(work.measured),
        },
    )


def _show(work: _Work, bundle: Bundle, console: Console) -> None:
    """Print the tables."""
    found, times = work.found, work.times
    precision = times.precision
    console.table(
        f"what {precision} does to each exit, stage by stage, at the thresholds of {_name(work)!r}",
        (
            "stage",
            "exit",
            "accuracy drop, points",
            "same label",
            "signal moves by",
            "leaving here, points",
            "same exit and label",
        ),
        [row for effect in work.effects for row in _effect_rows(effect)],
    )
    console.table(
        f"time per stage and image, measured in turn on {times.rounds} images",
        ("stage", "now ms", f"{precision} ms", "ratio [95 %]", "verdict"),
        [
            (
                name,
                milliseconds(times.seconds[name][times.base[name]]),
                milliseconds(times.seconds[name][precision]),
                one,
                "faster" if name in times.faster else times.not_faster[name].partition(":")[0],
            )
            for name, one in times.ratios.items()
        ],
    )
    before = f"{_name(work)}: as it is now"
    rows = [_figure_row(before, found.before)]
    if found.variants:
        rows.append(_figure_row(f"{precision}, old thresholds", found.forgotten))
        rows.append(_figure_row(f"{precision}, new thresholds", found.after))
    if found.rival is not None:
        rows.append(_figure_row("as accurate without it", found.rival))
    console.table(
        f"on the {len(work.mixes.data)} images of the choice; times add up from the stages'",
        ("cascade", "accuracy", "cross-validated", "last exit alone", "mean ms"),
        rows,
    )
    if found.variants:
        console.table(
            "exit by exit",
            (
                "exit",
                "leaving now",
                "old thresholds",
                "new thresholds",
                "threshold now",
                "new threshold",
            ),
            [_exit_row(found, name) for name in found.before.exits],
        )


def _effect_rows(effect: StageEffect) -> list[tuple[str, ...]]:
    name = effect.stages[0] if len(effect.stages) == 1 else "all of them"
    return [
        (
            "" if i else name,
            one.exit,
            f"{one.accuracy_drop * 100:.2f}",
            percent(one.agreement),
            f"{one.signal_shift:.4f}",
            f"{one.rate_shift * 100:+.1f}",
            "" if i else percent(effect.exit_agreement),
        )
        for i, one in enumerate(effect.exits)
    ]


def _figure_row(name: str, figures: Figures) -> tuple[str, ...]:
    held_out = figures.held_out_accuracy
    return (
        name,
        percent(figures.point.accuracy),
        "-" if held_out is None else percent(held_out),
        percent(figures.base.accuracy),
        milliseconds(figures.point.cost),
    )


def _exit_row(found: PrecisionChoice, name: str) -> tuple[str, ...]:
    last = name == found.before.exits[-1]

    def threshold(figures: Figures) -> str:
        value = None if last else figures.thresholds[name]
        return "-" if last else "never" if value is None else f"{value:.4g}"

    return (
        name,
        *(percent(f.exit_rates[name]) for f in (found.before, found.forgotten, found.after)),
        threshold(found.before),
        threshold(found.after),
    )


def _verdict(work: _Work, bundle: Bundle) -> list[str]:
    """Which stages change, why others don't, and whether it pays; line by line."""
    found = work.found
    what = found.precision.upper()
    without = [s.name for s in bundle.manifest.stages if s.name not in work.times.ratios]
    lines = [f"{name} stays at {work.times.base[name]}: {why}." for name, why in found.left.items()]
    if without:
        lines.append(f"Not considered: {', '.join(without)}.")
    if not found.variants:
        return [
            f"{what} does NOT pay here: no stage is worth it, and no operating point is written.",
            *lines,
        ]
    lines.insert(0, f"{what}: {', '.join(found.variants)}.")
    low, high = (100 * end for end in found.interval)
    lines.append(
        f"Against {_name(work)!r} the cascade loses {100 * found.loss:.2f} points of accuracy "
        f"[{low:.2f}, {high:.2f}]; {100 * found.budget:g} are allowed."
    )
    if high > 100 * found.budget:
        lines.append(
            f"{len(work.mixes.data)} images can't tell for sure that it stays within the budget."
        )
    old = found.forgotten.point
    lines.append(
        f"With the old thresholds it would be right on {percent(old.accuracy)} in "
        f"{milliseconds(old.cost)} ms, with the new ones on "
        f"{percent(found.after.point.accuracy)} in {milliseconds(found.after.point.cost)} ms."
    )
    lines.append(_pays(what, work.measured))
    if work.given and work.start.chosen_on.get("data") != work.mixes.data.hash:
        lines.append(
            f"{work.start.name!r} was chosen on other images and the new thresholds on these, "
            "which favours the new ones."
        )
    return lines


def _pays(what: str, measured: Mapping[str, Ratio]) -> str:
    """Whether the chosen cascade takes less time than one without it that is as accurate."""
    text = f"measured as a whole it takes {measured['before']} of the time before"
    decisive = measured["before"]
    if "rival" in measured:
        decisive = measured["rival"]
        text += f", and {decisive} of what the stages as they are take when they are as accurate"
    if decisive.high < 1:
        return f"{what} pays here: {text}."
    if decisive.low > 1:
        return f"{what} does NOT pay here: {text}."
    return f"{what} does not clearly pay here: {text}."


def _name(work: _Work) -> str:
    return work.start.name if work.given else "default"


def _check_plot(path: Path | None) -> None:
    """Refuse a plot that can't be drawn, before anything long begins."""
    if path is None:
        return
    if path.suffix not in _PLOTS or path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(
            f"--plot {path}", expected=f"a file {', '.join(_PLOTS)} in a folder that exists"
        )
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", "calib") from error


def _plot(path: Path, work: _Work) -> None:
    """Draw signals of each exit with both thresholds, and exit rates.

    Where nothing was chosen it shows what all variants together would do.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    found, mixes = work.found, work.mixes
    exits = found.before.exits
    variants = found.variants or dict.fromkeys(work.times.ratios, found.precision)
    tables = (mixes.judged({}), mixes.judged(variants))
    columns = min(len(exits), _COLUMNS)
    rows = -(-len(exits) // columns)
    figure = Canvas(figsize=(4.4 * columns, 3.8 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, name in enumerate(exits[:-1]):
        _plot_signals(axes[i], [table.signals[:, i] for table in tables], work, name)
    _plot_rates(axes[len(exits) - 1], work, variants)
    for unused in axes[len(exits) :]:
        unused.set_axis_off()
    chosen = "" if found.variants else " (measured, not chosen)"
    figure.suptitle(
        f"{mixes.bundle.manifest.name}: {', '.join(variants)} at {found.precision}{chosen}"
    )
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}{path.suffix}")
    try:
        figure.savefig(temporary, dpi=130)
        temporary.replace(path)
    except OSError as error:
        raise EdgeRuntimeError(f"{path} can't be written: {error.strerror or error}") from error
    finally:
        if os.path.lexists(temporary):
            temporary.unlink()


def _plot_signals(
    axes: Axes, signals: Sequence[NDArray[np.float32]], work: _Work, name: str
) -> None:
    """Cumulative shares of the signal at one exit, with a line for each threshold."""
    found = work.found
    for values, label, figures, colour, style in (
        (signals[0], "now", found.before, _BEFORE, "-"),
        (signals[1], found.precision, found.after, _AFTER, "--"),
    ):
        share = np.arange(1, len(values) + 1) / len(values)
        axes.plot(np.sort(values), 100 * share, style, color=colour, label=label)
        threshold = figures.thresholds[name]
        if threshold is not None and (found.variants or figures is found.before):
            text = f"threshold {label}: {threshold:.3g}"
            axes.axvline(threshold, color=colour, linestyle=":", linewidth=2, label=text)
    axes.set_title(f"exit {name}")
    axes.set_xlabel(f"signal ({work.start.metric})")
    axes.set_ylabel("samples with a lower signal, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", framealpha=1)


def _plot_rates(axes: Axes, work: _Work, variants: Mapping[str, str]) -> None:
    """Bars of the exit rates."""
    found = work.found
    exits, what = found.before.exits, found.precision
    old = at_thresholds(work.mixes, work.times, variants, found.before.thresholds)
    bars = [("now", found.before, _BEFORE), (f"{what}, old thresholds", old, _FORGOTTEN)]
    if found.variants:
        bars.append((f"{what}, new thresholds", found.after, _AFTER))
    middle = np.arange(len(exits))
    for i, (label, figures, colour) in enumerate(bars):
        rates = [100 * figures.exit_rates[name] for name in exits]
        places = middle + (i - (len(bars) - 1) / 2) * 0.28
        drawn = axes.bar(places, rates, 0.26, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_xticks(middle, exits)
    axes.set_title("exit rates")
    axes.set_ylabel("samples that leave here, %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 140)  # room above the bars for the legend
    axes.legend(fontsize=8, loc="upper right")
