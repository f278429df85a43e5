"""What the pictures of all studies share: colours of exits and kinds, names, stacked bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engines.plot_file import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Two more of the colours of `engines.plot_file`, for groups.
_SKY, _AMBER = "#56b4e9", "#e69f00"
_CYCLE = (BLUE, ORANGE, GREEN, PURPLE, _AMBER, _SKY, BLACK)
#: Entries of a legend in one row.
_IN_A_ROW = 6


def exit_colours(exits: Sequence[str]) -> dict[str, tuple[float, float, float]]:
    """A colour per exit, from dark and early to bright and late, the same for any colour vision."""
    from matplotlib import colormaps

    places = np.linspace(0.05, 0.95, len(exits)) if len(exits) > 1 else np.array([0.3])
    colours = [colormaps["viridis"](float(place)) for place in places]
    return {
        name: (red, green, blue) for name, (red, green, blue, _) in zip(exits, colours, strict=True)
    }


def group_colours(groups: Sequence[str]) -> dict[str, str]:
    """A colour per group; grey for the layers without an exit."""
    others = [name for name in groups if name != "none"]
    found = {name: _CYCLE[i % len(_CYCLE)] for i, name in enumerate(others)}
    return {name: found.get(name, GREY) for name in groups}


def text(name: str, longest: int = 24) -> str:
    """A name as matplotlib shows it: cut where it is long, and never taken for a formula."""
    cut = name if len(name) <= longest else name[: longest - 1] + "…"
    return cut.replace("$", r"\$")


def stacked(
    axes: Axes, rows: Sequence[str], shares: NDArray[np.float64], exits: Sequence[str]
) -> None:
    """Draw horizontal bars of which share leaves at which exit, the first row on top.

    Args:
        axes: Where.
        rows: Label of each bar.
        shares: In [0, 1], shape (rows, exits).
        exits: Names, in order of evaluation.
    """
    colours = exit_colours(exits)
    places = np.arange(len(rows))
    left = np.zeros(len(rows))
    for k, name in enumerate(exits):
        width = 100 * shares[:, k]
        axes.barh(places, width, 0.8, left=left, color=colours[name], label=text(name))
        for place, (begin, size) in enumerate(zip(left, width, strict=True)):
            if size >= 8 and len(rows) <= 40:
                _inside(axes, begin + size / 2, place, f"{size:.0f}", colours[name])
        left = left + width
    axes.set_yticks(places, rows)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("samples that leave here, %")


def exit_legend(figure: Figure, exits: Sequence[str]) -> None:
    """One legend of all exits below the whole picture, in order of evaluation."""
    from matplotlib.patches import Patch

    colours = exit_colours(exits)
    figure.legend(
        handles=[Patch(color=colours[name], label=text(name)) for name in exits],
        loc="outside lower center",
        ncols=min(len(exits), 2 * _IN_A_ROW),
        fontsize=8,
        title="exit, in order of evaluation",
        title_fontsize=8,
    )


def spread_labels(
    axes: Axes, points: Mapping[str, tuple[float, float]], fontsize: float = 8
) -> None:
    """Write labels above and below points in turn, from left to right."""
    order = sorted(points, key=lambda name: points[name])
    for i, name in enumerate(order):
        offset, where = ((0, -7), "top") if i % 2 else ((0, 6), "bottom")
        axes.annotate(
            name,
            points[name],
            xytext=offset,
            textcoords="offset points",
            fontsize=fontsize,
            ha="center",
            va=where,
        )


def _inside(axes: Axes, x: float, y: float, words: str, colour: tuple[float, float, float]) -> None:
    """Write on a colour, in black or white, whichever stands out."""
    red, green, blue = colour
    light = 0.299 * red + 0.587 * green + 0.114 * blue > 0.5
    axes.text(
        x, y, words, ha="center", va="center", fontsize=7, color="black" if light else "white"
    )
