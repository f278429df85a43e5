"""Names beside points of a chart, put where they cover nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Where a name may stand, in turn: offset in points, and what of the name is there.
_SIDES = (
    ((7, 0), "left", "center"),
    ((0, 7), "center", "bottom"),
    ((0, -7), "center", "top"),
    ((-7, 0), "right", "center"),
    ((6, 6), "left", "bottom"),
    ((6, -6), "left", "top"),
    ((-6, 6), "right", "bottom"),
    ((-6, -6), "right", "top"),
)

_Box = tuple[float, float, float, float]


def place_words(
    axes: Axes, words: Sequence[tuple[float, float, str]], fontsize: float
) -> list[str]:
    """Write each name at the first side of its point where it meets no other name or point.

    Args:
        axes: Scales and limits are settled.
        words: x, y and the name.
        fontsize: Points.

    Returns:
        The names that found a place; the others are left out.
    """
    axes.figure.canvas.draw()
    frame = axes.get_window_extent()
    points = axes.figure.dpi / 72
    marks = [tuple(axes.transData.transform((x, y))) for x, y, _ in words]
    taken: list[_Box] = [_around(x, y, 4 * points) for x, y in marks]
    placed = []
    for (x, y, name), at in zip(words, marks, strict=True):
        wide, high = 0.6 * fontsize * len(name) * points, 1.1 * fontsize * points
        for offset, across, up in _SIDES:
            centre = (at[0] + offset[0] * points, at[1] + offset[1] * points)
            box = _box(centre, (wide, high), across, up)
            inside = frame.x0 <= box[0] and box[2] <= frame.x1
            inside = inside and frame.y0 <= box[1] and box[3] <= frame.y1
            if inside and not any(_meet(box, other) for other in taken):
                axes.annotate(
                    name,
                    (x, y),
                    offset,
                    textcoords="offset points",
                    ha=across,
                    va=up,
                    fontsize=fontsize,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                )
                taken.append(box)
                placed.append(name)
                break
    return placed


def _around(x: float, y: float, half: float) -> _Box:
    return (x - half, y - half, x + half, y + half)


def _box(at: tuple[float, float], size: tuple[float, float], across: str, up: str) -> _Box:
    left = at[0] - size[0] * {"left": 0.0, "center": 0.5, "right": 1.0}[across]
    bottom = at[1] - size[1] * {"bottom": 0.0, "center": 0.5, "top": 1.0}[up]
    return (left, bottom, left + size[0], bottom + size[1])


def _meet(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
