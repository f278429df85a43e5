"""What one threshold at all early exits does: accuracy, exits, and the speed-up, told and measured.

One pass over the data with all exits says for every threshold where each sample leaves and whether
it is right. The times come from a second one, in which every threshold and the base model, the last
exit alone, classify the same images in turn, one at a time. The formula's speed-up stands beside
the measured one: in layers as in the EEVIT thesis where the bundle says which layers its exits
stand behind and no saver comes first, and in multiply-accumulate operations (MACs), which count
savers, heads and necks too.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from bench.studies.files import StudyResult, Table
from bench.studies.layers import layers_of
from bench.studies.points import check_threshold, require_early_exit, same_everywhere
from bench.studies.speedup import cost_speed_up, layer_speed_up
from bench.studies.turns import Subject, Turns, measure, shuffled_rows
from calib.exit_table import CostModel
from calib.tables import JudgedTable, collect, judge
from edge_runtime import options
from edge_runtime.confidence import Metric
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError, EngineBuildError
from edge_runtime.evaluate import Evaluation, figures
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from edge_runtime.timing import Ratio
from engines.macs import stage_macs

_DEFAULT = "0.8,0.9,0.99"
#: Each threshold is measured on each image, so that a slip of the keyboard could take days.
_MOST = 50
#: Images that are timed by default.
_TIMED = 1000


@dataclass(frozen=True)
class Formula:
    """What the speed-up is computed from.

    Attributes:
        executed: Layers that were executed when a sample leaves at each exit, the last one
            included; None where layers don't tell what an exit costs.
        layers: L, layers of the whole; 0 where `executed` is None.
        macs: MACs of a sample that leaves at each exit; None where they can't be counted.
        base_macs: MACs of the last exit alone.
        why: What is missing, and why; "" where nothing is.
    """

    executed: tuple[int, ...] | None
    layers: int
    macs: tuple[float, ...] | None
    base_macs: float
    why: str

    @classmethod
    def of(cls, bundle: Bundle, image_size: tuple[int, int]) -> Formula:
        """For a bundle.

        Raises:
            ManifestError: What it says of its layers does not fit.
        """
        executed, reason = _executed(bundle)
        reasons = [reason] if reason else []
        count = executed[-1] if executed else 0
        try:
            size = image_size if isinstance(bundle.cascade.image.shape[1], str) else None
            costs = CostModel.from_stages(bundle.cascade, stage_macs(bundle, size))
        except (EngineBuildError, ConfigError) as error:
            return cls(executed, count, None, 0.0, "; ".join([*reasons, f"no MACs: {error}"]))
        active = range(len(bundle.cascade.exits) - 1)
        macs = tuple(costs.leaving(active).tolist())
        return cls(executed, count, macs, costs.base, "; ".join(reasons))

    def in_layers(self, counts: Sequence[int]) -> float | None:
        """Speed-up for the numbers of samples that leave at each exit, in layers."""
        if self.executed is None:
            return None
        samples: dict[int, int] = {}
        for executed, count in zip(self.executed, counts, strict=True):
            samples[executed] = samples.get(executed, 0) + count
        return layer_speed_up(samples, self.layers)

    def in_macs(self, counts: Sequence[int]) -> float | None:
        """The same in MACs."""
        return None if self.macs is None else cost_speed_up(counts, self.macs, self.base_macs)


@dataclass(frozen=True)
class ExitAt:
    """What leaves at one exit.

    Attributes:
        exit: Its name.
        count: Samples.
        share: Of all samples, in [0, 1].
        accuracy: Of these; None where there is none.
        seconds: Mean time of those that were timed; None where none was.
    """

    exit: str
    count: int
    share: float
    accuracy: float | None
    seconds: float | None


@dataclass(frozen=True)
class AtThreshold:
    """What one threshold does.

    Attributes:
        threshold: Of the signal, at every early exit.
        accuracy: On all samples, in [0, 1].
        exits: In order of evaluation.
        layer_speed_up: Formula in layers; None where it says nothing.
        mac_speed_up: Formula in MACs; None where they can't be counted.
        speed_up: Measured: mean time of the base over mean time, with its interval; None where
            nothing was measured.
        seconds: Mean time of a sample; None likewise.
        same_exit: Share of the timed samples that left where the first pass says; None likewise.
    """

    threshold: float
    accuracy: float
    exits: tuple[ExitAt, ...]
    layer_speed_up: float | None
    mac_speed_up: float | None
    speed_up: Ratio | None
    seconds: float | None
    same_exit: float | None


@dataclass(frozen=True)
class Base:
    """The last exit alone.

    Attributes:
        accuracy: On all samples, in [0, 1].
        seconds: Mean time of a sample; None where nothing was measured.
    """

    accuracy: float
    seconds: float | None


def run(args: argparse.Namespace, bundle: Bundle, console: Console) -> StudyResult:
    """Collect, measure, show."""
    require_early_exit(bundle, "thresholds")
    metric: Metric = args.metric or "max_softmax"
    given = _DEFAULT if args.thresholds is None else args.thresholds
    thresholds = parse_thresholds(given, metric, len(bundle.cascade.classes))
    data = options.open_data(args, bundle)
    exits = [exit_.name for exit_ in bundle.cascade.exits]
    height, width, _ = data.image_shape
    formula = Formula.of(bundle, (height, width))
    points = {f"{t!r}": same_everywhere(t, metric, exits) for t in thresholds}
    rows = shuffled_rows(data, args.timed or _TIMED, args.seed)
    with ExitStack() as stack:
        everything = OperatingPoint.all_exits(bundle.cascade)
        cascade = stack.enter_context(options.open_cascade(args, bundle, data, everything))
        judged = judge(collect(cascade, data, console), metric)
        never = OperatingPoint(name="base", policy="never")
        base = stack.enter_context(options.open_cascade(args, bundle, data, never))
        subjects = {"base": Subject(base, never)}
        subjects |= {name: Subject(cascade, point) for name, point in points.items()}
        turns = _measured(data, rows, subjects, console)
    found = [
        at_threshold(t, name, judged, exits, formula, turns)
        for t, name in zip(thresholds, points, strict=True)
    ]
    alone = Base(
        float(judged.correct[:, -1].mean()),
        None if turns is None else float(turns.series["base"].seconds.mean()),
    )
    timed = 0 if turns is None else len(turns.rows)
    interrupted = turns is None or turns.interrupted
    _show(found, alone, formula, (len(data), timed), metric, console)
    pictures = {}
    if args.out is not None:
        from bench.studies.thresholds_plot import plot_thresholds

        title = (
            f"{bundle.manifest.name}: one threshold of {metric} at all early exits, "
            f"{len(data)} images, {timed} timed"
        )
        pictures["thresholds"] = partial(plot_thresholds, title=title, found=found, base=alone)
    result = {
        "data": data.hash,
        "samples": len(data),
        "timed": timed,
        "metric": metric,
        "formula": plain(formula),
        "base": plain(alone),
        "thresholds": [plain(one) for one in found],
        "interrupted": interrupted,
    }
    return StudyResult(result, {"thresholds": _table(found, alone)}, pictures, interrupted)


def parse_thresholds(given: str, metric: Metric, classes: int) -> list[float]:
    """Read --thresholds.

    Args:
        given: Numbers with commas between them.
        metric: The signal.
        classes: Number of classes, which bounds some signals.

    Raises:
        ConfigError: Something is no number, not within the signal's bounds, or does not ascend.
    """
    found = []
    for part in given.split(","):
        try:
            found.append(float(part))
        except ValueError as error:
            raise ConfigError(
                "--thresholds", got=repr(given)[:80], expected="numbers, such as 0.8,0.9,0.99"
            ) from error
    for threshold in found:
        check_threshold(threshold, metric, classes, "--thresholds")
    if any(b <= a for a, b in itertools.pairwise(found)):
        raise ConfigError("--thresholds", got=repr(given)[:80], expected="ascending numbers")
    if len(found) > _MOST:
        raise ConfigError("--thresholds", got=f"{len(found)} numbers", expected=f"<= {_MOST}")
    return found


def at_threshold(
    threshold: float,
    name: str,
    judged: JudgedTable,
    exits: Sequence[str],
    formula: Formula,
    turns: Turns | None,
) -> AtThreshold:
    """Figures of one threshold.

    Args:
        threshold: The threshold.
        name: Its subject in `turns`.
        judged: What every exit says about every sample.
        exits: Names of all exits.
        formula: What an exit costs.
        turns: Measured times; None where there are none.
    """
    at = judged.exit_table.leave_at([threshold] * (len(exits) - 1))
    right = judged.correct[np.arange(len(at)), at]
    counts = np.bincount(at, minlength=len(exits)).tolist()
    measured, same = _evaluation(name, judged, exits, at, turns)
    each = []
    for k, exit_name in enumerate(exits):
        here = at == k
        latency = None if measured is None else measured.exits[k].latency
        each.append(
            ExitAt(
                exit_name,
                counts[k],
                counts[k] / len(at),
                float(right[here].mean()) if counts[k] else None,
                None if latency is None else latency.mean,
            )
        )
    return AtThreshold(
        threshold=threshold,
        accuracy=float(right.mean()),
        exits=tuple(each),
        layer_speed_up=formula.in_layers(counts),
        mac_speed_up=formula.in_macs(counts),
        speed_up=None if measured is None else _inverse(measured.time_ratio),
        seconds=None if measured is None else measured.latency.mean,
        same_exit=same,
    )


def _evaluation(
    name: str,
    judged: JudgedTable,
    exits: Sequence[str],
    at: NDArray[np.intp],
    turns: Turns | None,
) -> tuple[Evaluation | None, float | None]:
    """What was measured, and how often it left where the table says."""
    if turns is None:
        return None, None
    series = turns.series[name]
    truth = judged.truth[turns.rows]
    evaluation = figures(series, turns.series["base"], truth, tuple(exits))
    expected = np.array(exits)[at[turns.rows]]
    return evaluation, float((np.array(series.exits) == expected).mean())


def _measured(
    data: ImageDataset, rows: NDArray[np.int64], subjects: Mapping[str, Subject], console: Console
) -> Turns | None:
    """The times; None where somebody stopped it before they say anything."""
    try:
        return measure(data, rows, subjects, console)
    except KeyboardInterrupt:
        console.note("interrupted: no time was measured")
        return None


def _executed(bundle: Bundle) -> tuple[tuple[int, ...] | None, str]:
    """Layers executed at each exit; or None, and why."""
    layers = layers_of(bundle)
    if layers is None:
        return None, "no layers: the bundle says nothing of them (provenance.model)"
    if len(layers.exits) < len(bundle.cascade.exits) - 1:
        return None, "no layers: a saver comes first, which is none of them"
    return (*(one.layer + 1 for one in layers.exits), layers.count), ""


def _inverse(times: Ratio) -> Ratio:
    return Ratio(1 / times.value, 1 / times.high, 1 / times.low)


def _show(
    found: Sequence[AtThreshold],
    base: Base,
    formula: Formula,
    images: tuple[int, int],
    metric: Metric,
    console: Console,
) -> None:
    rows: list[tuple[str, ...]] = [
        ("none (base)", percent(base.accuracy), _ms(base.seconds), "1", "1", "1")
    ]
    for one in found:
        times = [_times(one.layer_speed_up), _times(one.mac_speed_up)]
        measured = "-" if one.speed_up is None else str(one.speed_up)
        rows.append(
            (f"{one.threshold!r}", percent(one.accuracy), _ms(one.seconds), *times, measured)
        )
    console.table(
        f"{metric} on {images[0]} images, {images[1]} of them timed",
        ("threshold", "accuracy", "mean ms", "speed-up (layers)", "(MACs)", "measured"),
        rows,
    )
    _show_exits(found, console)
    if formula.why:
        console.line(f"The formula has {formula.why}.")
    other = [one for one in found if one.same_exit is not None and one.same_exit < 1]
    if other:
        worst = min(other, key=lambda one: one.same_exit or 0.0)
        console.line(
            f"At {worst.threshold!r} {1 - (worst.same_exit or 0.0):.2%} of the timed images left "
            "at another exit alone than in a batch: they are on the edge."
        )


def _show_exits(found: Sequence[AtThreshold], console: Console) -> None:
    """What leaves at each exit: of thresholds and exits the more go down the page."""
    views: dict[str, Callable[[ExitAt], str]] = {
        "share that leaves here": lambda at: percent(at.share),
        "accuracy of what leaves here": lambda at: _or(at.accuracy, percent),
        "mean ms of what leaves here": lambda at: _ms(at.seconds),
    }
    across = [f"{one.threshold!r}" for one in found]
    down = [at.exit for at in found[0].exits]
    for what, view in views.items():
        cells = [[view(at) for at in one.exits] for one in found]
        if len(across) <= len(down):
            turned = zip(*cells, strict=True)
            rows = [(name, *row) for name, row in zip(down, turned, strict=True)]
            console.table(what, ("exit", *across), rows)
        else:
            rows = [(name, *row) for name, row in zip(across, cells, strict=True)]
            console.table(what, ("threshold", *down), rows)


def _ms(seconds: float | None) -> str:
    return _or(seconds, milliseconds)


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _or(value: float | None, write: Callable[[float], str]) -> str:
    return "-" if value is None else write(value)


def _table(found: Sequence[AtThreshold], base: Base) -> Table:
    """One row per threshold and exit, and one of all exits together."""
    columns = ["threshold", "exit", "count", "share_percent", "accuracy_percent", "mean_ms"]
    columns += ["speed_up_layers", "speed_up_macs", "speed_up_measured", "low", "high"]
    samples = sum(at.count for at in found[0].exits)
    rows: list[list[object]] = [
        [None, "all", samples, 100.0, 100 * base.accuracy, _in_ms(base.seconds), 1.0, 1.0, 1.0]
    ]
    rows[0] += [None, None]
    for one in found:
        for at in one.exits:
            accuracy = None if at.accuracy is None else 100 * at.accuracy
            row = [one.threshold, at.exit, at.count, 100 * at.share, accuracy, _in_ms(at.seconds)]
            rows.append([*row, *[None] * 5])
        measured: list[float | None] = [None] * 3
        if one.speed_up is not None:
            measured = [one.speed_up.value, one.speed_up.low, one.speed_up.high]
        row = [one.threshold, "all", samples, 100.0, 100 * one.accuracy, _in_ms(one.seconds)]
        rows.append([*row, one.layer_speed_up, one.mac_speed_up, *measured])
    return Table(columns, rows)


def _in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
