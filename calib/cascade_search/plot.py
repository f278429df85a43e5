"""Pictures of a search: the fronts and the improvement, and the twelve methods as Figure 3."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calib.cascade_search.methods import Method
from calib.cascade_search.search import CascadePoint
from calib.cascade_search.study import Outcome
from engines.plot_file import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
_STYLES = ("-", "--", "-.", ":")


def plot_outcome(path: Path, outcome: Outcome, cost_name: str) -> None:
    """Draw accuracy against cost of single models and cascades, and the improvement.

    Args:
        path: The file.
        outcome: What came of a method.
        cost_name: What costs are, for the axis.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Lebovitz et al., TMLR 2023, Figures 1 and 6.
    """
    result, shift = outcome.result, outcome.shift
    figure = new_figure(7.5, 8)
    fronts, gains = figure.subplots(2, 1, height_ratios=[2, 1])
    fronts.plot(*_places(result.singles), "o", color=GREY, label="single models")
    fronts.plot(*_places(result.single_front), "-", color=BLACK, label="interpolated")
    fronts.plot(
        *_places(result.front), ".", color=BLUE, markersize=4, label=f"cascades, {outcome.method}"
    )
    if shift is not None:
        label = "the same cascades, --shift"
        fronts.plot(*_places(shift.front), ".", color=ORANGE, markersize=3, label=label)
    chosen = {point for point in outcome.points.points.values() if point is not None}
    marks = sorted(chosen, key=lambda point: point.cost)
    fronts.plot(*_places(marks), "D", color=PURPLE, markersize=5, label="operating points")
    fronts.set_xscale("log")
    fronts.set_xlabel(f"mean {cost_name} per sample")
    fronts.set_ylabel("accuracy, %")
    fronts.grid(alpha=0.3)
    fronts.legend(fontsize=8, loc="lower right")
    _draw_gain(gains, outcome, BLUE, "-", str(outcome.method))
    if shift is not None:
        accuracy, factor = shift.improvement.line
        gains.plot(100 * accuracy, factor, color=ORANGE, linewidth=1.2, label="--shift")
        gains.legend(fontsize=8)
    _finish_gain(gains)
    gains.set_ylabel("times cheaper")
    save_figure(figure, path)


def plot_comparison(path: Path, outcomes: Sequence[Outcome]) -> None:
    """Draw the improvement of the compared methods in three panels.

    Args:
        path: The file.
        outcomes: What came of the methods; the first is drawn in every panel, in black.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Lebovitz et al., TMLR 2023, Figure 3.
    """
    figure = new_figure(15, 4.6)
    panels = figure.subplots(1, 3, sharey=True)
    titles = ("no ensembling", "comparison ensembling", "mean ensembling, max_softmax")
    for axes, title in zip(panels, titles, strict=True):
        same = [outcome for outcome in outcomes if _panel(outcome.method) == title]
        if outcomes[0] not in same:
            _draw_gain(axes, outcomes[0], BLACK, "-", str(outcomes[0].method))
        for outcome, colour, style in zip(same, _COLOURS, _STYLES, strict=False):
            _draw_gain(axes, outcome, colour, style, _label(outcome.method))
        axes.set_title(title)
        axes.legend(fontsize=8, loc="upper left")
        _finish_gain(axes)
    panels[0].set_ylabel("times cheaper than single models")
    save_figure(figure, path)


def _panel(method: Method) -> str:
    if method.means:
        return "mean ensembling, max_softmax"
    return "comparison ensembling" if method.ensemble == "comparison" else "no ensembling"


def _label(method: Method) -> str:
    scaled = ", TS" if method.scaled else ""
    return f"{method.ensemble if method.means else method.metric}{scaled}"


def _draw_gain(axes: Axes, outcome: Outcome, colour: str, style: str, label: str) -> None:
    accuracy, factor = outcome.improvement.line
    axes.plot(100 * accuracy, factor, style, color=colour, linewidth=1.2, label=label)


def _finish_gain(axes: Axes) -> None:
    axes.axhline(1, color=GREY, linewidth=0.8)
    axes.set_xlabel("accuracy, %")
    axes.grid(alpha=0.3)


def _places(points: Sequence[CascadePoint]) -> tuple[list[float], list[float]]:
    return [point.cost for point in points], [100 * point.accuracy for point in points]
