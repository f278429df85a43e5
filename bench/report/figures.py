"""The charts of a report, as pictures without a window: for the page and as PNG files.

```
for chart in charts([read_result(Path("orin.json"))]):
    chart.figure.savefig(f"{chart.name}.png")
```

Every function takes the results that belong into one picture and returns None where they have
nothing to show. Names come from files that anybody may have written: they are cut, and never taken
for formulas.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.report.flow import exit_flow
from bench.report.palette import (
    PLAIN,
    SMALL,
    SOFT,
    WIDTH,
    calm,
    curve_ms,
    exit_colours,
    fits,
    plain_log,
    result_colour,
    rows_axis,
    scale_ms,
)
from bench.report.places import place_words
from bench.report.waterfall import waterfall
from bench.report.words import label, milliseconds, number
from bench.result import QUANTILES, Distribution, Result
from edge_runtime.errors import EdgeRuntimeError, missing_package
from engines.plot_file import BLACK, BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

#: More than these in one picture are no picture any more; the tables have them all.
_MOST_LINES, _MOST_ROWS, _MOST_RESULTS, _MOST_POINTS = 14, 40, 12, 200
_MOST_NAMED = 12
#: Cascade and base, where colours do not tell results apart.
_PAIR = (BLUE, ORANGE)


@dataclass(frozen=True)
class Chart:
    """One picture of a report.

    Attributes:
        name: Of its file, and of its place on the page.
        title: What it shows.
        caption: What to read from it, one sentence.
        figure: The picture.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def charts(results: Sequence[Result]) -> list[Chart]:
    """All charts that the results have something to show for, in the order of a page.

    Args:
        results: One or more.

    Raises:
        BackendUnavailable: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise missing_package("matplotlib", "calib") from error
    found = []
    for name, title, caption, draw in _CHARTS:
        with without_glyph_warnings():
            figure = draw(results)
        if figure is not None:
            found.append(Chart(name, title, caption, figure))
    return found


def write_pngs(folder: Path, results: Sequence[Result]) -> list[Path]:
    """Write every chart as a PNG file.

    Args:
        folder: Made where it does not exist; files of the same names are replaced.
        results: One or more.

    Returns:
        The files, in the order of a page.

    Raises:
        BackendUnavailable: matplotlib is not installed.
        EdgeRuntimeError: The folder or a file can't be written.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise EdgeRuntimeError(
            f"the folder {folder} can't be made: {error.strerror or error}",
            remedy="Give a folder whose parent exists",
        ) from error
    paths = []
    for chart in charts(results):
        path = folder / f"{chart.name}.png"
        with without_glyph_warnings():
            save_figure(chart.figure, path)
        paths.append(path)
    return paths


@contextmanager
def without_glyph_warnings() -> Iterator[None]:
    """Draw a name in a script that matplotlib's font lacks without a warning; browsers have it."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font", category=UserWarning
        )
        warnings.filterwarnings(
            "ignore", message="Matplotlib currently does not support .* natively"
        )
        yield


def latency(results: Sequence[Result]) -> Figure | None:
    """Draw how many frames are answered within a time: cascade and base of each result.

    Args:
        results: One: cascade and base in a colour each. Several: a colour each, base dashed.
    """
    lines: list[_Line] = []
    several = len(results) > 1
    for i, result in enumerate(results):
        base = result.subject("base")
        name = f"{label(result.name, 22)}, " if several else ""
        colour = result_colour(i)
        lines += _line(result.end_to_end, f"{name}cascade", colour, "-")
        if base is not None:
            lines += _line(base.latency, f"{name}base", colour if several else ORANGE, "--")
    if not lines:
        return None
    figure = new_figure(WIDTH, 2.9 + 0.19 * min(len(lines), _MOST_LINES))
    _cumulative(figure.subplots(), lines[:_MOST_LINES])
    return figure


def latency_per_exit(results: Sequence[Result]) -> Figure | None:
    """Draw how long the frames of each exit took.

    Args:
        results: A panel for each, one above the other on one scale.
    """
    panels = []
    for result in results:
        colours = iter(exit_colours(sum(one.evaluated for one in result.exits)))
        lines = [
            line
            for one in result.exits
            if one.evaluated
            for line in _line(one.latency, label(one.name), next(colours), "-")
        ]
        if lines:
            panels.append((result, lines[:_MOST_LINES]))
    if not panels:
        return None
    panels = panels[:_MOST_RESULTS]
    legend = max(len(lines) for _, lines in panels)
    high = 2.7 if len(panels) == 1 else 2.2
    figure = new_figure(WIDTH, len(panels) * (high + 0.19 * legend))
    grid = figure.subplots(len(panels), squeeze=False)
    figure.set_layout_engine("constrained", hspace=0.06)
    extent = np.concatenate([line.curve[[0, -1]] for _, lines in panels for line in lines])
    for axes, (result, lines) in zip(grid.flat, panels, strict=True):
        _cumulative(axes, lines, extent)
        if len(results) > 1:
            axes.set_title(label(result.name, 40), fontsize=PLAIN, weight="bold", loc="left")
    return figure


@dataclass(frozen=True)
class _Line:
    """A cumulative curve, in milliseconds."""

    curve: NDArray[np.float64]
    words: str
    colour: str
    style: str
    marks: tuple[tuple[float, float], ...]


def _line(distribution: Distribution | None, words: str, colour: str, style: str) -> list[_Line]:
    """The one line of a distribution, none where it has no curve."""
    curve = curve_ms(distribution)
    if distribution is None or not curve.size:
        return []
    known = [(q, p) for q, p in ((0.5, distribution.p50), (0.99, distribution.p99)) if fits(p)]
    marks = tuple((1e3 * p, 100 * q) for q, p in known if p is not None)
    p99 = f", p99 {milliseconds(distribution.p99)}" if distribution.p99 is not None else ""
    return [
        _Line(curve, f"{words}: p50 {milliseconds(distribution.p50)}{p99}", colour, style, marks)
    ]


def _cumulative(
    axes: Axes, lines: Sequence[_Line], extent: NDArray[np.float64] | None = None
) -> None:
    share = 100 * np.array(QUANTILES)
    for line in lines:
        axes.plot(line.curve, share, line.style, color=line.colour, linewidth=1.6, label=line.words)
        for x, y in line.marks:
            axes.plot([x], [y], "o", color=line.colour, markersize=4)
    drawn = np.concatenate([line.curve[[0, -1]] for line in lines]) if extent is None else extent
    scale_ms(axes, drawn.tolist(), "latency of a frame, end to end")
    low, high = float(drawn.min()), float(drawn.max())
    axes.set_xlim(0.93 * low, 1.07 * high)
    axes.set_ylim(0, 101.5)
    axes.set_yticks([0, 25, 50, 75, 99], ["0", "25", "50", "75", "99"])
    axes.set_ylabel("frames answered by then, %")
    calm(axes)
    _legend_below(axes)


def _below(axes: Axes) -> Transform:
    """Places under the ticks and the name of the x axis, however high the axes are."""
    from matplotlib.transforms import offset_copy

    return offset_copy(axes.transAxes, axes.get_figure(root=True), y=-36, units="points")


def _legend_below(axes: Axes) -> None:
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(-0.02, 0),
        bbox_transform=_below(axes),
        fontsize=SMALL,
        frameon=False,
        handlelength=2.2,
        borderaxespad=0,
        labelspacing=0.35,
    )


def accuracy_latency(results: Sequence[Result]) -> Figure | None:
    """Draw accuracy against mean latency: what was measured, the base, and simulated points.

    Args:
        results: One: its points by name. Several: a colour each.

    Returns:
        The picture, None where there are no two points to compare.
    """
    panels = [(i, result) for i, result in enumerate(results) if _spots(result)]
    panels = panels[:_MOST_RESULTS]
    if sum(len(_spots(result)) for _, result in panels) < 2:
        return None
    several = len(results) > 1
    figure = new_figure(WIDTH, 3.5 + (0.19 * len(panels) if several else 0))
    axes = figure.subplots()
    drawn: list[tuple[float, float, str]] = []
    for i, result in panels:
        spots = _spots(result)
        colour = result_colour(i)
        front = _front([(x, y) for _, _, x, y in spots])
        axes.plot(*zip(*front, strict=True), "-", color=colour, linewidth=0.8, alpha=0.4)
        for words, mark, x, y in spots:
            face = "white" if mark == "o" else colour
            size = {"D": 8, "s": 7}.get(mark, 5)
            axes.plot(x, y, mark, markerfacecolor=face, color=colour, markersize=size)
            if not several:
                drawn.append((x, y, words))
    xs = [x for _, result in panels for _, _, x, _ in _spots(result)]
    scale_ms(axes, xs, "mean latency of a frame")
    axes.set_ylabel("right, %")
    axes.margins(0.16, 0.18)
    calm(axes)
    _legend_marks(axes, panels, several=several)
    place_words(axes, drawn[:_MOST_NAMED], SMALL)
    return figure


def _front(spots: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is left of and above, from left to right."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(spots, key=lambda spot: (spot[0], -spot[1])):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found


def _spots(result: Result) -> list[tuple[str, str, float, float]]:
    """Name, mark, milliseconds and accuracy in percent of everything that can be placed."""
    base = result.subject("base")
    found = []
    if result.accuracy is not None and fits(result.end_to_end.mean):
        words = "measured" if result.operating_point is None else result.operating_point.name
        found.append((label(words), "D", result.end_to_end.mean, result.accuracy))
    if base is not None and result.base_accuracy is not None and fits(base.latency.mean):
        found.append(("base", "s", base.latency.mean, result.base_accuracy))
    named = {words for words, *_ in found}
    for point in result.points[:_MOST_POINTS]:
        if label(point.name) not in named and fits(point.seconds):
            mark = "s" if point.name == "base" else "o"
            found.append((label(point.name), mark, point.seconds, point.accuracy))
    return [
        (words, mark, 1e3 * seconds, 100 * accuracy)
        for words, mark, seconds, accuracy in found
        if 0 <= accuracy <= 1
    ]


def _legend_marks(axes: Axes, panels: Sequence[tuple[int, Result]], *, several: bool) -> None:
    from matplotlib.lines import Line2D

    shown = {mark for _, result in panels for _, mark, *_ in _spots(result)}
    shapes = (
        ("D", "cascade, measured", GREY),
        ("s", "base model", GREY),
        ("o", "other points, simulated", "white"),
    )
    handles = [
        Line2D([], [], ls="", marker=m, color=SOFT, markerfacecolor=face, markersize=6, label=words)
        for m, words, face in shapes
        if m in shown
    ]
    if several:
        handles += [
            Line2D([], [], color=result_colour(i), linewidth=3, label=label(result.name, 40))
            for i, result in panels
        ]
    axes.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(-0.02, 0),
        bbox_transform=_below(axes),
        fontsize=SMALL,
        frameon=False,
        borderaxespad=0,
        ncols=1 if several else 2,
    )


@dataclass(frozen=True)
class _Bar:
    """A value in a row: which row, whose, how large, the interval, its words and its colour."""

    row: str
    owner: int
    value: float
    low: float
    high: float
    words: str
    colour: str


def ratios(results: Sequence[Result]) -> Figure | None:
    """Draw the time of each other subject over the cascade's, with its 95 % interval."""
    found = []
    for i, result in enumerate(results[:_MOST_RESULTS]):
        for one in result.subjects:
            ratio = one.over_cascade
            if one.name == "cascade" or ratio is None or not fits(ratio.value):
                continue
            low, high = _interval(ratio.low, ratio.value, ratio.high)
            words = f"{number(ratio.value)} [{number(low)}, {number(high)}]"
            found.append(_Bar(one.name, i, ratio.value, low, high, words, result_colour(i)))
    if not found:
        return None
    figure, axes, kept = _grouped(results, found, dots=True)
    low, high = min(bar.low for bar in kept), max(bar.high for bar in kept)
    if high / low > 20:
        plain_log(axes, high / low)
    axes.axvline(1, color=BLACK, linewidth=1)
    axes.set_xlabel("time over the cascade's time")
    axes.margins(x=0.08)
    return figure


def energy(results: Sequence[Result]) -> Figure | None:
    """Draw the energy of a frame: of each exit, of the cascade and of the base."""
    found = [
        bar
        for i, result in enumerate(results[:_MOST_RESULTS])
        for bar in _energy_bars(result, i, several=len(results) > 1)
    ]
    if not found:
        return None
    figure, axes, _ = _grouped(results, found, dots=False)
    axes.set_xlabel("energy of one frame, mJ")
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    return figure


def _energy_bars(result: Result, owner: int, *, several: bool) -> Iterator[_Bar]:
    """Of the exits in order, then of the cascade and the base by the first reader that told."""
    exits = [one for one in result.exits if one.evaluated]
    reader = next((one for one in result.energy if one.subjects), None)
    rows: list[tuple[str, float | None, float | None, str]] = [
        (f"left at {one.name}", one.joules, None, colour)
        for one, colour in zip(exits, exit_colours(len(exits)), strict=False)
    ]
    for name, row, colour in zip(
        ("cascade", "base"), ("cascade, mean", "base"), _PAIR, strict=True
    ):
        of = reader.of(name) if reader is not None else None
        if of is not None:
            rows.append((row, of.joules_per_frame, of.spread, colour))
    for row, joules, spread, colour in rows:
        if joules is None or not fits(joules):
            continue
        half = joules * min(max(spread or 0.0, 0.0), 1.0)
        yield _Bar(
            row,
            owner,
            1e3 * joules,
            1e3 * (joules - half),
            1e3 * (joules + half),
            f"{number(1e3 * joules)} mJ",
            result_colour(owner) if several else colour,
        )


def throughput(results: Sequence[Result]) -> Figure | None:
    """Draw images per second of cascade and base, by images per call."""
    found = []
    several = len(results) > 1
    for i, result in enumerate(results[:_MOST_RESULTS]):
        for one in sorted(result.throughput, key=lambda one: one.batch):
            values = (one.cascade, one.base)
            for name, value, single in zip(("cascade", "base"), values, _PAIR, strict=True):
                if not fits(value):
                    continue
                words = number(value)
                if name == "cascade":
                    low, high = number(one.speed_up.low), number(one.speed_up.high)
                    times = f"{number(one.speed_up.value)} times"
                    words += f", {times} base" if several else f"\n{times} base [{low}, {high}]"
                colour = result_colour(i) if several else single
                row = f"batch {one.batch}: {name}"
                found.append(_Bar(row, i, value, value, value, words, colour))
    if not found:
        return None
    figure, axes, _ = _grouped(results, found, dots=False)
    axes.set_xlabel("images per second")
    axes.margins(x=0.6 if several else 0.8)
    axes.set_xlim(left=0)
    return figure


def _interval(low: float, value: float, high: float) -> tuple[float, float]:
    """An interval as it can be drawn; a damaged file's is the value alone."""
    return (low, high) if fits(low, high) and low <= value <= high else (value, value)


def _grouped(
    results: Sequence[Result], found: Sequence[_Bar], *, dots: bool
) -> tuple[Figure, Axes, list[_Bar]]:
    """Rows of bars or dots with whiskers: a row per name, in it one mark per result."""
    names = list(dict.fromkeys(bar.row for bar in found))
    owners = sorted({bar.owner for bar in found})
    several = len(results) > 1
    names = names[: max(3, _MOST_ROWS // len(owners))]
    row = max(0.34, 0.13 + 0.15 * len(owners))
    figure = new_figure(WIDTH, 0.8 + row * len(names) + 0.19 * (len(owners) if several else 0))
    axes = figure.subplots()
    thick = min(0.6, 0.84 / len(owners))
    kept = [bar for bar in found if bar.row in names]
    for bar in kept:
        y = names.index(bar.row) + (owners.index(bar.owner) - (len(owners) - 1) / 2) * thick
        if dots:
            axes.plot([bar.low, bar.high], [y, y], "-", color=bar.colour, linewidth=1.6)
            axes.plot([bar.value], [y], "o", color=bar.colour, markersize=4.5)
        else:
            axes.barh(y, bar.value, 0.9 * thick, color=bar.colour)
            if bar.high > bar.low:
                axes.plot([bar.low, bar.high], [y, y], "-", color=BLACK, linewidth=1)
        if not (dots and several):
            axes.annotate(
                bar.words,
                (bar.high, y),
                (0, 5) if dots else (4, 0),
                textcoords="offset points",
                fontsize=SMALL - (1 if several else 0.5),
                color=BLACK,
                ha="center" if dots else "left",
                va="bottom" if dots else "center_baseline",
            )
    rows_axis(axes, [label(name, 22) for name in names])
    if several:
        _legend_results(axes, results, owners)
    return figure, axes, kept


def _legend_results(axes: Axes, results: Sequence[Result], owners: Sequence[int]) -> None:
    from matplotlib.patches import Patch

    axes.figure.legend(
        handles=[Patch(color=result_colour(i), label=label(results[i].name, 40)) for i in owners],
        loc="outside lower left",
        fontsize=SMALL,
        frameon=False,
        handlelength=1,
    )


_CHARTS: tuple[tuple[str, str, str, Callable[[Sequence[Result]], Figure | None]], ...] = (
    (
        "exit-flow",
        "Where frames leave",
        "Each band is the share of frames that leaves at an exit, with how many of them were right "
        "and how long they took on average; blue bands leave early, the orange one needed the "
        "whole model.",
        exit_flow,
    ),
    (
        "latency",
        "Latency of a frame",
        "The further left a line, the faster: at each latency it tells how many frames were "
        "answered by then; dots mark the median and the 99th percentile.",
        latency,
    ),
    (
        "ratios",
        "Against the baselines",
        "Each dot is a baseline's time over the cascade's in the same run with its "
        "95\u00a0% interval: right of the line it is slower than the cascade.",
        ratios,
    ),
    (
        "accuracy-latency",
        "Accuracy against latency",
        "Up is more accurate and left is faster; the diamond was measured, hollow circles are what "
        "other operating points of the bundle would give, and the line joins the best.",
        accuracy_latency,
    ),
    (
        "latency-per-exit",
        "Latency by exit",
        "Each line holds the frames that left at one exit, so a steep line is a steady latency and "
        "a long tail shows frames that were held up.",
        latency_per_exit,
    ),
    (
        "waterfall",
        "One frame, stage by stage",
        "Each bar is a stage of one recorded frame from its begin to its end, thin bars are the "
        "decisions at exits, and gaps are time in which no stage ran.",
        waterfall,
    ),
    (
        "energy",
        "Energy of a frame",
        "Energy of one frame by where it leaves, and on average of cascade and base; shorter is "
        "better.",
        energy,
    ),
    (
        "throughput",
        "Throughput in batches",
        "Images per second when several are given at once; longer is better.",
        throughput,
    ),
)
