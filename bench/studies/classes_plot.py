"""The pictures of a study of classes: both ends of the rankings, all classes, and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bench.studies.classes import ClassFigures, Order, Samples, ends
from bench.studies.plots import exit_colours, exit_legend, stacked, text
from engines.plot_file import BLACK, BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Bars of a picture, at most; of more classes those at both ends are drawn.
_BARS = 100
#: Pixels of a sample's side, of its frame and strip, and of the gap between two.
_SIDE, _FRAME, _GAP = 96, 5, 6


def plot_ends(
    path: Path, *, title: str, classes: Sequence[ClassFigures], exits: Sequence[str]
) -> None:
    """Draw accuracy, time and exits of the classes at both ends of both rankings.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Follows Figures 35 to 37 of the EEVIT thesis.
    """
    count = len(ends(classes, "accuracy")[0])
    figure = new_figure(12, 2 * (0.5 * count + 1.9))
    panels = figure.subplots(2, 3, width_ratios=[1, 1, 1.25])
    rankings: tuple[tuple[Order, tuple[str, str]], ...] = (
        ("accuracy", ("most accurate", "least accurate")),
        ("latency", ("fastest", "slowest")),
    )
    for axes, (order, words) in zip(panels, rankings, strict=True):
        top, bottom = ends(classes, order)
        shown = [*top, *bottom]
        _bars(axes[0], shown, "accuracy")
        _bars(axes[1], shown, "latency")
        shares = np.array([one.shares for one in shown])
        stacked(axes[2], _names(shown), shares, exits)
        axes[2].set_title("where they leave")
        for one in axes:
            one.axhline(len(top) - 0.5, color=BLACK, linewidth=0.8, linestyle="--")
        axes[0].set_ylabel(f"{words[1]}      {words[0]}")
    exit_legend(figure, exits)
    figure.suptitle(text(title, 110))
    save_figure(figure, path)


def plot_all(
    path: Path, *, title: str, classes: Sequence[ClassFigures], exits: Sequence[str]
) -> None:
    """Draw every class: its exits as a bar, its accuracy and time as points, the fastest on top.

    Of more than 100 classes the 50 fastest and the 50 slowest are drawn.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    ranked = sorted(classes, key=lambda one: (one.mean, -one.accuracy, one.index))
    if len(ranked) > _BARS:
        ranked = [*ranked[: _BARS // 2], *ranked[-_BARS // 2 :]]
        title += f", the {_BARS // 2} fastest and the {_BARS // 2} slowest of {len(classes)}"
    figure = new_figure(12, 0.15 * len(ranked) + 2.6)
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
    size = 8 if len(ranked) <= 40 else 6.5
    stacked(left, _names(ranked), np.array([one.shares for one in ranked]), exits)
    left.tick_params("y", labelsize=size)
    left.set_title("where they leave, the fastest class on top")
    places = np.arange(len(ranked))
    accuracy = np.array([100 * one.accuracy for one in ranked])
    low = accuracy - np.array([100 * one.low for one in ranked])
    high = np.array([100 * one.high for one in ranked]) - accuracy
    error = np.maximum((low, high), 0)
    middle.errorbar(
        accuracy, places, xerr=error, fmt="o", color=BLUE, ecolor=GREY, markersize=4, linewidth=1
    )
    middle.set_xlabel("accuracy, % (line: 95 % interval)")
    right.plot([1e3 * one.mean for one in ranked], places, "o", color=ORANGE, markersize=4)
    right.plot([1e3 * one.median for one in ranked], places, "|", color=BLACK, markersize=7)
    right.set_xlabel("time, ms (point: mean, line: median)")
    right.set_xlim(left=0)
    for axes in (middle, right):
        axes.set_ylim(*left.get_ylim())
        axes.set_yticks(places, [])
        axes.grid(alpha=0.3)
    exit_legend(figure, exits)
    figure.suptitle(text(title, 110))
    save_figure(figure, path)


def plot_samples(
    path: Path, *, title: str, samples: Sequence[Samples], exits: Sequence[str]
) -> None:
    """Draw pictures of classes, a row for each; the frame says right or wrong, the strip the exit.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Follows Figures 38 to 41 of the EEVIT thesis.
    """
    most = max(len(one.images) for one in samples)
    rows = [_row(one, most, exits) for one in samples]
    tall = len(rows[0])
    figure = new_figure(0.68 * most + 2.6, 0.76 * len(rows) + 1.5)
    axes = figure.subplots()
    axes.imshow(np.concatenate(rows), interpolation="antialiased")
    labels = [
        f"{text(one.figures.name, 22)}\n{100 * one.figures.accuracy:.1f} % right, "
        f"{1e3 * one.figures.mean:.3g} ms\nmostly {text(one.figures.most_common_exit, 18)}"
        for one in samples
    ]
    axes.set_yticks((np.arange(len(rows)) + 0.5) * tall, labels, fontsize=7.5)
    axes.tick_params("y", length=0)
    axes.set_xticks([])
    axes.axhline(len(rows) // 2 * tall - _GAP / 2, color=BLACK, linewidth=0.8, linestyle="--")
    for side in axes.spines.values():
        side.set_visible(False)
    _sample_legend(figure, exits)
    figure.suptitle(text(title, 110), fontsize=11)
    save_figure(figure, path)


def _bars(axes: Axes, shown: Sequence[ClassFigures], order: Order) -> None:
    """Bars of the accuracy, with intervals, or of the mean time."""
    places = np.arange(len(shown))
    if order == "accuracy":
        values = np.array([100 * one.accuracy for one in shown])
        low = values - np.array([100 * one.low for one in shown])
        high = np.array([100 * one.high for one in shown]) - values
        axes.barh(places, values, 0.7, color=BLUE)
        axes.errorbar(
            values, places, xerr=np.maximum((low, high), 0), fmt="none", ecolor=BLACK, capsize=2
        )
        axes.set_xlim(0, 100)
        axes.set_xlabel("accuracy, % (line: 95 % interval)")
        words, tips = [f"{value:.1f}" for value in values], values + high
    else:
        values = np.array([1e3 * one.mean for one in shown])
        axes.barh(places, values, 0.7, color=ORANGE)
        axes.set_xlabel("mean time per image, ms")
        axes.margins(x=0.15)
        words, tips = [f"{value:.3g}" for value in values], values
    for place, word, value, tip in zip(places, words, values, tips, strict=True):
        # In the bar where it is wide enough for the number, else behind all that is drawn.
        inside = value > 0.25 * axes.get_xlim()[1]
        at, colour = (0.0, "white") if inside else (float(tip), "black")
        more: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(word, (at, float(place)), (4, 0), color=colour, **more)
    axes.set_title("accuracy" if order == "accuracy" else "time")
    axes.set_yticks(places, _names(shown))
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _names(classes: Sequence[ClassFigures]) -> list[str]:
    return [text(one.name, 22) for one in classes]


def _row(samples: Samples, most: int, exits: Sequence[str]) -> NDArray[np.uint8]:
    """The pictures of a class beside each other, with frames and strips, on white."""
    colours = exit_colours(exits)
    cells = [
        _cell(image, _rgb(BLUE if right else ORANGE), colours[exit_])
        for image, right, exit_ in zip(samples.images, samples.right, samples.exits, strict=True)
    ]
    blank = np.full_like(cells[0], 255)
    return np.concatenate([*cells, *[blank] * (most - len(cells))], axis=1)


def _cell(
    image: NDArray[np.uint8], frame: tuple[float, ...], strip: tuple[float, ...]
) -> NDArray[np.uint8]:
    """One picture, as large as it fits into a square."""
    from PIL import Image

    grey = image.shape[2] == 1
    picture = Image.fromarray(np.repeat(image, 3, axis=2) if grey else image)
    height, width = image.shape[:2]
    scale = _SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    way = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    small = np.asarray(picture.resize(size, way))
    side = _SIDE + 2 * _FRAME
    cell = np.full((side + 2 * _FRAME + _GAP, side + _GAP, 3), 255, np.uint8)
    cell[:side, :side] = _bytes(frame)
    inner = cell[_FRAME : _FRAME + _SIDE, _FRAME : _FRAME + _SIDE]
    inner[:] = 255
    top, left = (_SIDE - size[1]) // 2, (_SIDE - size[0]) // 2
    inner[top : top + size[1], left : left + size[0]] = small
    cell[side : side + 2 * _FRAME, :side] = _bytes(strip)
    return cell


def _bytes(colour: tuple[float, ...]) -> NDArray[np.uint8]:
    return np.array([round(255 * part) for part in colour], np.uint8)


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def _sample_legend(figure: Figure, exits: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    colours = exit_colours(exits)
    handles: list[Any] = [
        Patch(facecolor="white", edgecolor=BLUE, linewidth=2, label="frame: right"),
        Patch(facecolor="white", edgecolor=ORANGE, linewidth=2, label="frame: wrong"),
        *(Patch(color=colours[name], label=f"strip: left at {text(name)}") for name in exits),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8)
