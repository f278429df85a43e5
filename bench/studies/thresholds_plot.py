"""The picture of a study of thresholds: what they cost, what they save, where samples leave."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bench.studies.plots import exit_legend, spread_labels, stacked, text
from bench.studies.thresholds import AtThreshold, Base
from engines.plot_file import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Lines of the panel with exits, at most; more can't be told apart.
_LINES = 5
#: Exits where fewer samples leave are left out there.
_FEW = 10
_STYLES = (("o", BLUE), ("s", ORANGE), ("^", GREEN), ("D", PURPLE), ("v", BLACK))


def plot_thresholds(path: Path, *, title: str, found: Sequence[AtThreshold], base: Base) -> None:
    """Draw a study.

    Args:
        path: The file.
        title: Above all.
        found: The thresholds, ascending.
        base: The last exit alone.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Two panels follow Figures 31 and 33 of the EEVIT thesis.
    """
    tall = max(3.6, 0.24 * len(found) + 1.2)
    figure = new_figure(12, 4.4 + tall)
    panels = figure.subplots(2, 2, height_ratios=[4.0, tall])
    _draw_trade(panels[0, 0], found, base)
    _draw_speed_ups(panels[0, 1], found)
    exits = [at.exit for at in found[0].exits]
    shares = np.array([[at.share for at in one.exits] for one in found])
    stacked(panels[1, 0], [f"{one.threshold!r}" for one in found], shares, exits)
    panels[1, 0].set_ylabel("threshold")
    panels[1, 0].set_title("where samples leave")
    _draw_exits(panels[1, 1], found)
    exit_legend(figure, exits)
    figure.suptitle(text(title, 120))
    save_figure(figure, path)


def _draw_trade(axes: Axes, found: Sequence[AtThreshold], base: Base) -> None:
    """Accuracy against mean time, each threshold a point."""
    axes.set_title("accuracy against time")
    axes.set_ylabel("accuracy, %")
    if base.seconds is None:
        _absent(axes)
        return
    points = {
        f"{one.threshold!r}": (one.seconds * 1e3, 100 * one.accuracy)
        for one in found
        if one.seconds is not None
    }
    x, y = zip(*points.values(), strict=True)
    axes.plot(x, y, "o-", color=BLUE, linewidth=1, label="thresholds")
    place = (base.seconds * 1e3, 100 * base.accuracy)
    axes.plot(*place, "*", color=ORANGE, markersize=13, label="no early exit")
    if len(points) <= 12:
        spread_labels(axes, points)
    else:
        ends = (next(iter(points)), next(reversed(points)))
        spread_labels(axes, {name: points[name] for name in ends})
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean time per image, ms, measured in turn")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _draw_speed_ups(axes: Axes, found: Sequence[AtThreshold]) -> None:
    """Formulas and the measured speed-up beside each other."""
    kinds = {
        "formula, layers": (GREY, [one.layer_speed_up for one in found]),
        "formula, MACs": (GREEN, [one.mac_speed_up for one in found]),
        "measured, with 95 % interval": (
            BLUE,
            [None if one.speed_up is None else one.speed_up.value for one in found],
        ),
    }
    shown = {name: value for name, value in kinds.items() if value[1][0] is not None}
    places = np.arange(len(found))
    width = 0.8 / max(1, len(shown))
    for i, (name, (colour, values)) in enumerate(shown.items()):
        heights = np.array([value or 0.0 for value in values])
        at = places + (i - (len(shown) - 1) / 2) * width
        axes.bar(at, heights, 0.92 * width, color=colour, label=name)
        tops = heights
        if name.startswith("measured"):
            ends = [one.speed_up for one in found if one.speed_up is not None]
            low = np.array([end.low for end in ends])
            tops = np.array([end.high for end in ends])
            axes.errorbar(
                at, heights, (heights - low, tops - heights), fmt="none", ecolor=BLACK, capsize=2
            )
        if len(found) * len(shown) <= 15:
            for x, top, value in zip(at, tops, heights, strict=True):
                axes.annotate(
                    f"{value:.2f}",
                    (x, top),
                    (0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                )
    axes.axhline(1, color=BLACK, linewidth=0.8, linestyle=":")
    few = len(found) <= 12
    axes.set_xticks(
        places, [f"{one.threshold!r}" for one in found], rotation=0 if few else 90, fontsize=8
    )
    axes.set_xlabel("threshold")
    axes.set_ylabel("times faster than without early exits")
    axes.set_title("speed-up, told and measured")
    axes.margins(y=0.3)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8, loc="upper right", ncols=max(1, len(shown)))


def _draw_exits(axes: Axes, found: Sequence[AtThreshold]) -> None:
    """Accuracy of what leaves at each exit against its mean time; the area is the share."""
    axes.set_title(f"exits with {_FEW} samples or more (area: share that leaves)")
    axes.set_ylabel("accuracy of what leaves here, %")
    if found[0].seconds is None:
        _absent(axes)
        return
    rows = np.unique(np.linspace(0, len(found) - 1, min(len(found), _LINES)).astype(int))
    for row, (marker, colour) in zip(rows, _STYLES, strict=False):
        here = [
            (at.seconds * 1e3, 100 * at.accuracy, at.share)
            for at in found[row].exits
            if at.seconds is not None and at.accuracy is not None and at.count >= _FEW
        ]
        if not here:
            continue
        x, y, share = (np.array(column) for column in zip(*here, strict=True))
        label = f"threshold {found[row].threshold!r}"
        axes.plot(x, y, "-", color=colour, linewidth=0.8, alpha=0.6)
        axes.plot([], [], marker=marker, color=colour, linewidth=0.8, label=label)
        axes.scatter(x, y, 12 + 260 * share, color=colour, marker=marker, alpha=0.75, linewidth=0)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("mean time of what leaves here, ms")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")


def _absent(axes: Axes) -> None:
    axes.text(0.5, 0.5, "no time was measured", ha="center", transform=axes.transAxes, color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])
