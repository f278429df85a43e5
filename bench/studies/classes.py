"""Which classes leave early, which are right, and what they look like.

The cascade classifies every image alone, in random order, so that a drift of the machine's speed is
not taken for a difference between classes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bench.studies.files import StudyResult, Table
from bench.studies.points import check_threshold, require_early_exit, same_everywhere
from bench.studies.turns import Subject, measure, shuffled_rows
from edge_runtime import options
from edge_runtime.confidence import Metric
from edge_runtime.console import Console, milliseconds, percent
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.evaluate import Series
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain

#: Classes at each end of a ranking.
_ENDS = 5
#: Pictures of each of these classes, as in the EEVIT thesis.
_PICTURES = 15
#: Rows that a table on the screen may have.
_ROWS = 100
#: Normal quantile of a 95 % interval.
_Z = 1.959964

Order = Literal["accuracy", "latency"]


@dataclass(frozen=True)
class ClassFigures:
    """What happens to the images of one class.

    Attributes:
        name: Of the class.
        index: Its index.
        samples: Images of it.
        accuracy: Share that is right, in [0, 1].
        low: Lower end of its 95 % interval (Wilson).
        high: Upper end.
        mean: Mean time of an image, in seconds.
        median: Median of the same.
        most_common_exit: Where most of them leave; the earliest of several.
        shares: Share that leaves at each exit, in order of evaluation.
    """

    name: str
    index: int
    samples: int
    accuracy: float
    low: float
    high: float
    mean: float
    median: float
    most_common_exit: str
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Samples:
    """Pictures of one class.

    Attributes:
        figures: Of the class.
        images: Shape (n, height, width, channels), uint8.
        right: Whether each was classified right, shape (n,).
        exits: Where each left.
    """

    figures: ClassFigures
    images: NDArray[np.uint8]
    right: NDArray[np.bool_]
    exits: tuple[str, ...]


def run(args: argparse.Namespace, bundle: Bundle, console: Console) -> StudyResult:
    """Measure, rank, show."""
    point = _point(args, bundle)
    data = options.open_data(args, bundle)
    rows = shuffled_rows(data, len(data), args.seed)
    with options.open_cascade(args, bundle, data, point) as cascade:
        point = cascade.point
        turns = measure(data, rows, {"cascade": Subject(cascade, point)}, console)
        exits = cascade.exits
    series = turns.series["cascade"]
    truth = data.labels[turns.rows]
    classes = class_figures(series, truth, data.classes, exits)
    missing = sorted(set(range(len(data.classes))) - {one.index for one in classes})
    _show(classes, exits, [data.classes[i] for i in missing], point.name, console)
    pictures: Mapping[str, Any] = {}
    if args.out is not None:
        pictures = _pictures(bundle, data, turns.rows, series, classes, exits, point.name, args)
    result = {
        "data": data.hash,
        "samples": len(data),
        "measured": len(turns.rows),
        "operating_point": plain(point),
        "exits": list(exits),
        "classes": [plain(one) for one in classes],
        "missing": [data.classes[i] for i in missing],
        "ends": {
            order: {
                end: [one.name for one in part]
                for end, part in zip(("top", "bottom"), ends(classes, order), strict=True)
            }
            for order in ("accuracy", "latency")
        },
        "interrupted": turns.interrupted,
    }
    tables = {"classes": _table(classes, exits)}
    return StudyResult(result, tables, pictures, turns.interrupted)


def class_figures(
    series: Series, truth: NDArray[np.int64], names: Sequence[str], exits: Sequence[str]
) -> list[ClassFigures]:
    """Figures of each class that has images, by index.

    Args:
        series: What the cascade did.
        truth: True class indices of the same images, shape (n,).
        names: Class names.
        exits: Names of the evaluated exits.
    """
    left = np.array([exits.index(name) for name in series.exits])
    seconds = series.seconds.ravel()
    found = []
    for index in np.unique(truth).tolist():
        here = truth == index
        count = int(here.sum())
        right = int((series.labels[here] == index).sum())
        low, high = wilson(right, count)
        at = np.bincount(left[here], minlength=len(exits))
        found.append(
            ClassFigures(
                name=names[index],
                index=index,
                samples=count,
                accuracy=right / count,
                low=low,
                high=high,
                mean=float(seconds[here].mean()),
                median=float(np.median(seconds[here])),
                most_common_exit=exits[int(at.argmax())],
                shares=tuple((at / count).tolist()),
            )
        )
    return found


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share.

    Args:
        right: Successes.
        count: Trials, >= 1.

    Reference:
        Wilson, Probable inference, the law of succession, and statistical inference, 1927.
    """
    share, z = right / count, _Z**2 / count
    middle = share + z / 2
    half = _Z * np.sqrt(share * (1 - share) / count + z / (4 * count))
    low, high = (middle - half) / (1 + z), (middle + half) / (1 + z)
    return max(0.0, float(low)), min(1.0, float(high))


def ends(
    classes: Sequence[ClassFigures], order: Order
) -> tuple[list[ClassFigures], list[ClassFigures]]:
    """The classes at both ends of a ranking, five at most, and none at both.

    Args:
        classes: All of them.
        order: "accuracy": from the most accurate, of equal ones the faster first; "latency": from
            the fastest, of equal ones the more accurate first.

    Returns:
        Top and bottom, each in the ranking's order.
    """
    if order == "accuracy":
        ranked = sorted(classes, key=lambda one: (-one.accuracy, one.mean, one.index))
    else:
        ranked = sorted(classes, key=lambda one: (one.mean, -one.accuracy, one.index))
    count = max(1, min(_ENDS, len(ranked) // 2))
    return ranked[:count], ranked[max(count, len(ranked) - count) :]


def samples_of(
    figures: ClassFigures,
    data: ImageDataset,
    rows: NDArray[np.int64],
    series: Series,
    count: int = _PICTURES,
) -> Samples:
    """The first pictures of a class in the order of measurement, which is random."""
    places = np.flatnonzero(data.labels[rows] == figures.index)[:count]
    return Samples(
        figures,
        np.stack([data.image(int(rows[place])) for place in places]),
        series.labels[places] == figures.index,
        tuple(series.exits[place] for place in places.tolist()),
    )


def _pictures(
    bundle: Bundle,
    data: ImageDataset,
    rows: NDArray[np.int64],
    series: Series,
    classes: Sequence[ClassFigures],
    exits: Sequence[str],
    point: str,
    args: argparse.Namespace,
) -> Mapping[str, Any]:
    """What draws each picture; images are read now, while the data is known to be there."""
    from bench.studies.classes_plot import plot_all, plot_ends, plot_samples

    title = f"{bundle.manifest.name} at {point}, {len(rows)} images"
    found: dict[str, Any] = {
        "classes": partial(plot_ends, title=title, classes=classes, exits=exits),
        "classes_all": partial(plot_all, title=title, classes=classes, exits=exits),
    }
    for order in ("accuracy", "latency"):
        top, bottom = ends(classes, order)
        samples = [
            samples_of(one, data, rows, series, args.samples or _PICTURES)
            for one in (*top, *bottom)
        ]
        found[f"classes_samples_{order}"] = partial(
            plot_samples,
            title=f"{title}: {len(top)} classes at each end by {order}",
            samples=samples,
            exits=exits,
        )
    return found


def _point(args: argparse.Namespace, bundle: Bundle) -> str | OperatingPoint | None:
    """What --operating-point or --threshold names."""
    require_early_exit(bundle, "classes")
    if args.threshold is None:
        if args.metric is not None:
            raise ConfigError("--metric says nothing without --threshold")
        name: str | None = args.operating_point
        return name
    if args.operating_point is not None:
        raise ConfigError("--threshold and --operating-point", expected="one of them")
    metric: Metric = args.metric or "max_softmax"
    check_threshold(args.threshold, metric, len(bundle.cascade.classes), "--threshold")
    return same_everywhere(args.threshold, metric, [one.name for one in bundle.cascade.exits])


def _show(
    classes: Sequence[ClassFigures],
    exits: Sequence[str],
    missing: Sequence[str],
    point: str,
    console: Console,
) -> None:
    columns = (
        "class",
        "images",
        "accuracy",
        "95 % interval",
        "mean ms",
        "most common exit",
        "share",
    )
    if len(classes) <= _ROWS:
        console.table(f"classes at {point}", columns, [_row(one, exits) for one in classes])
    else:
        console.line(f"{len(classes)} classes: --out has them all, here are the ends")
    for order in ("accuracy", "latency"):
        top, bottom = ends(classes, order)
        words = ("most", "least accurate") if order == "accuracy" else ("fastest", "slowest")
        console.table(
            f"by {order}: the {len(top)} {words[0]} and the {len(bottom)} {words[1]} classes",
            columns,
            [_row(one, exits) for one in (*top, *bottom)],
        )
    if missing:
        some = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        console.line(f"The data has no image of {len(missing)} of the bundle's classes: {some}")


def _row(one: ClassFigures, exits: Sequence[str]) -> tuple[str, ...]:
    return (
        one.name,
        str(one.samples),
        percent(one.accuracy),
        f"{100 * one.low:.0f}-{100 * one.high:.0f} %",
        milliseconds(one.mean),
        one.most_common_exit,
        percent(one.shares[exits.index(one.most_common_exit)]),
    )


def _table(classes: Sequence[ClassFigures], exits: Sequence[str]) -> Table:
    columns = ["class", "index", "images", "accuracy_percent", "low_percent", "high_percent"]
    columns += ["mean_ms", "median_ms", "most_common_exit"]
    columns += [f"{name}_share_percent" for name in exits]
    rows = [
        [
            one.name,
            one.index,
            one.samples,
            *(100 * value for value in (one.accuracy, one.low, one.high)),
            *(1e3 * value for value in (one.mean, one.median)),
            one.most_common_exit,
            *(100 * share for share in one.shares),
        ]
        for one in classes
    ]
    return Table(columns, rows)
