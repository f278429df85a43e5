"""The picture of `edge-runtime gate sweep --plot`: curves against each cost, and ECE against K."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.quee.report import unit
from calib.quee.study import GATE, ONE_STEP, ColumnStudy, Curve, Study
from calib.quee.targets import TargetError
from engines.plot_file import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_COLUMNS = 2
#: Of thresholds; the first is the reference's.
_COLOURS = (ORANGE, GREEN, PURPLE, GREY)
_STYLES = ("-", "--", ":")
#: Of precisions without exits.
_FACES = (BLACK, GREY, "white", ORANGE, GREEN, PURPLE)


def draw(study: Study, path: Path) -> None:
    """Draw accuracy against each cost, and how good targets are for each number of clusters.

    A gate is drawn weighing the cost of its panel; bands are the 95 % intervals of the accuracy.

    Args:
        study: What is drawn.
        path: A file that `check_plot` has passed.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Regol et al., QuEE, 2024, Figures 4 and 5.
    """
    panels = len(study.columns) + bool(study.calibration)
    columns = min(panels, _COLUMNS)
    rows = -(-panels // columns)
    figure = new_figure(5.4 * columns, 4.2 * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, column in zip(axes, study.columns, strict=False):
        _draw_column(panel, column)
    if study.calibration:
        _draw_calibration(axes[len(study.columns)], study.calibration)
    for unused in axes[panels:]:
        unused.remove()
    known: dict[str, Artist] = {}
    for panel in axes[: len(study.columns)]:
        handles, names = panel.get_legend_handles_labels()
        known |= {name: handle for handle, name in zip(handles, names, strict=True)}
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside lower center",
        ncols=2 if columns == 1 else 4,
        fontsize=8,
    )
    save_figure(figure, path)


def _draw_column(axes: Axes, column: ColumnStudy) -> None:
    label, factor = unit(column.column)
    _draw_curve(axes, column.curves[0], factor, BLUE, "-o", above=True)
    rivals = [one for one in column.curves if not one.name.startswith((GATE, ONE_STEP))]
    for i, rival in enumerate(rivals):
        style = _STYLES[i // len(_COLOURS) % len(_STYLES)]
        _draw_curve(axes, rival, factor, _COLOURS[i % len(_COLOURS)], style)
    for ahead in (one for one in column.curves if one.name == ONE_STEP):
        _draw_one_step(axes, ahead, factor)
    for i, fixed in enumerate(column.fixed):
        axes.plot(
            fixed.cost * factor,
            fixed.accuracy * 100,
            "s",
            markersize=7,
            markerfacecolor=_FACES[i % len(_FACES)],
            markeredgecolor=BLACK,
            zorder=4,
            label=f"{fixed.name}, no exits",
        )
    axes.set_title(f"accuracy against {label.split(',')[0]}", fontsize=10)
    axes.set_xlabel(label)
    axes.set_ylabel("accuracy, %")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def _draw_curve(
    axes: Axes, curve: Curve, factor: float, colour: str, style: str, *, above: bool = False
) -> None:
    points = sorted(curve.points, key=lambda point: point.cost.mean)
    cost = [point.cost.mean * factor for point in points]
    low, mean, high = (
        [100 * getattr(point.accuracy, end) for point in points] for end in ("low", "mean", "high")
    )
    axes.fill_between(cost, low, high, color=colour, alpha=0.12, linewidth=0)
    axes.plot(
        cost,
        mean,
        style,
        color=colour,
        linewidth=1.4,
        markersize=3.5,
        label=curve.name,
        zorder=3 if above else 2,
    )


def _draw_one_step(axes: Axes, curve: Curve, factor: float) -> None:
    cost = [point.cost.mean * factor for point in curve.points]
    mean = [100 * point.accuracy.mean for point in curve.points]
    around = [
        [100 * (point.accuracy.mean - point.accuracy.low) for point in curve.points],
        [100 * (point.accuracy.high - point.accuracy.mean) for point in curve.points],
    ]
    axes.errorbar(
        cost,
        mean,
        around,
        fmt="D",
        color=BLACK,
        markersize=4,
        linewidth=0.8,
        zorder=4,
        label=curve.name,
    )


def _draw_calibration(axes: Axes, found: Sequence[TargetError]) -> None:
    clusters = np.array([one.clusters for one in found], np.float64)
    errors = np.array([100 * one.error for one in found])
    axes.plot(clusters, errors, "o", color=BLUE, markersize=5, label="targets")
    if len(np.unique(clusters)) > 3:
        fit = np.polynomial.Polynomial.fit(clusters, errors, 2)
        x = np.linspace(clusters.min(), clusters.max(), 200)
        axes.plot(x, fit(x), color=ORANGE, linewidth=1.2, label="second-order polynomial")
    axes.set_ylim(bottom=0)
    axes.set_title("calibration error of the targets", fontsize=10)
    axes.set_xlabel("clusters K")
    axes.set_ylabel("expected calibration error, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
