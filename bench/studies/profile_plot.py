"""The picture of a profile: groups beside each other, stages, and the rounds as they came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.studies.plots import group_colours, text
from bench.studies.profile import Group, Rounds
from engines.plot_file import BLACK, GREY, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Points of a line over the rounds, at most, and rounds behind each, at least.
_DRAWN, _TOGETHER = 100, 5


def plot_profile(
    path: Path, *, title: str, rounds: Rounds, groups: Sequence[Group], kinds: Mapping[str, str]
) -> None:
    """Draw a profile.

    Args:
        path: The file.
        title: Above all.
        rounds: Every round of every stage.
        groups: What is compared.
        kinds: Stage -> its kind.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        The first and the third panel follow the profiling tables and timelines of the EEVIT thesis,
        section 5.3.1.
    """
    height = max(3.4, 0.26 * len(rounds.stages) + 1.3)
    figure = new_figure(12, height + 3.6)
    panels = figure.subplot_mosaic(
        [["groups", "stages"], ["rounds", "rounds"]], height_ratios=[height, 3.2]
    )
    _draw_groups(panels["groups"], groups)
    _draw_stages(panels["stages"], rounds, kinds)
    _draw_rounds(panels["rounds"], groups)
    figure.suptitle(text(title, 110))
    save_figure(figure, path)


def _draw_groups(axes: Axes, groups: Sequence[Group]) -> None:
    """Boxes from quartile to quartile, whiskers over 90 %, the median written."""
    colours = group_colours([group.name for group in groups])
    series = [group.rounds.ravel() * 1e3 for group in groups]
    boxes = axes.boxplot(
        series,
        orientation="horizontal",
        whis=(5, 95),
        widths=0.55,
        patch_artist=True,
        flierprops={"marker": ".", "markersize": 2, "markeredgecolor": GREY, "alpha": 0.4},
        medianprops={"color": BLACK},
    )
    for box, group in zip(boxes["boxes"], groups, strict=True):
        box.set_facecolor(colours[group.name])
        box.set_alpha(0.8)
    for place, values in enumerate(series, start=1):
        words = f"median {np.median(values):.3g} ms"
        edge = float(np.percentile(values, 75))
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "bottom", "fontsize": 8}
        axes.annotate(words, (edge, place), (6, 2), **beside)
    axes.set_yticks(
        range(1, len(groups) + 1), [f"{text(g.name)}\n{text(g.members, 20)}" for g in groups]
    )
    axes.set_ylim(len(groups) + 0.6, 0.4)
    _limit_x(axes, series)
    axes.set_xlabel("time, ms (box: quartiles, whiskers: 5 to 95 %)")
    axes.set_title("by group")
    axes.grid(axis="x", alpha=0.3)


def _limit_x(axes: Axes, series: Sequence[np.ndarray]) -> None:
    """A few far rounds must not squeeze the boxes; how many are beyond is said."""
    far = 1.2 * max(float(np.percentile(values, 95)) for values in series)
    limit = min(far, 4 * max(float(np.median(values)) for values in series))
    beyond = sum(int((values > limit).sum()) for values in series)
    axes.set_xlim(0, limit)
    if beyond:
        words = f"{beyond} rounds beyond"
        axes.text(0.99, 0.01, words, transform=axes.transAxes, ha="right", fontsize=7, color=GREY)


def _draw_stages(axes: Axes, rounds: Rounds, kinds: Mapping[str, str]) -> None:
    """Medians in order of execution, with the quartiles as a line."""
    colours = group_colours(list(dict.fromkeys(kinds[name] for name in rounds.stages)))
    places = np.arange(len(rounds.stages))
    low, middle, high = (
        np.array([np.percentile(rounds.of(name), share) * 1e3 for name in rounds.stages])
        for share in (25, 50, 75)
    )
    drawn = set()
    for place, name in enumerate(rounds.stages):
        kind = kinds[name]
        label = kind if kind not in drawn else None
        drawn.add(kind)
        axes.barh(place, middle[place], 0.7, color=colours[kind], label=label)
    axes.hlines(places, low, high, color=BLACK, linewidth=1.2)
    for place, value in enumerate(middle):
        end = max(value, high[place])
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axes.annotate(f"{value:.3g}", (end, float(place)), (4, 0), **beside)
    axes.set_yticks(places, [text(name) for name in rounds.stages], fontsize=8)
    axes.set_ylim(len(places) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("median, ms (line: quartiles)")
    axes.set_title("stages, in order of execution")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)


def _draw_rounds(axes: Axes, groups: Sequence[Group]) -> None:
    """The median member of each group over the rounds, the warm-up shaded."""
    colours = group_colours([group.name for group in groups])
    top = 0.0
    step = max(_TOGETHER, groups[0].seconds.shape[1] // _DRAWN)
    for group in groups:
        line = np.median(group.seconds, axis=0) * 1e3
        starts = np.arange(0, len(line), step)
        medians = [float(np.median(line[begin : begin + step])) for begin in starts]
        axes.plot(
            starts + (step - 1) / 2,
            medians,
            color=colours[group.name],
            linewidth=1.2,
            label=text(group.name),
        )
        top = max(top, 1.5 * float(np.percentile(medians, 98)))
    warm_up = groups[0].warm_up
    if warm_up:
        axes.axvspan(0, warm_up, color=GREY, alpha=0.2, label="warm-up", linewidth=0)
    axes.set_xlim(0, groups[0].seconds.shape[1])
    axes.set_ylim(0, top)
    axes.set_xlabel(f"round (medians of {step})")
    axes.set_ylabel("time, ms")
    axes.set_title("the rounds as they came: flat behind the warm-up where it was long enough")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=4, loc="upper right")
