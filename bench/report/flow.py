"""Where frames leave: one band per exit, as wide as its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from bench.report.palette import PLAIN, SMALL, SOFT, WIDTH, exit_colours
from bench.report.words import label, milliseconds, percent
from bench.result import ExitFigures, Result
from engines.plot_file import BLACK, GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.path import Path as Outline

#: Inches that all frames together are high, which is the unit of everything below.
_UNIT = 0.76
#: The least width of a column, and that of exits that are not evaluated.
_COLUMN, _PRUNED = 1.3, 0.48
_ENTRY, _BEND, _FOOT, _WORDS, _HEAD = 0.35, 0.1, -0.42, 1.12, 0.32
#: A panel with more columns is no picture any more, and a picture with more panels neither.
_MOST_COLUMNS, _MOST_PANELS = 24, 12


@dataclass(frozen=True)
class _Column:
    """One evaluated exit, or neighbours that are not evaluated, from `left` on."""

    exits: tuple[ExitFigures, ...]
    colour: str
    left: float
    width: float

    @property
    def evaluated(self) -> bool:
        return self.exits[0].evaluated

    @property
    def middle(self) -> float:
        return self.left + self.width / 2


def exit_flow(results: Sequence[Result]) -> Figure | None:
    """Draw which share of the frames leaves where, with accuracy and mean latency there.

    All frames come in at the left; at every evaluated exit a band as thick as its share turns
    down. Exits that are not evaluated are grey.

    Args:
        results: A panel for each, one above the other so that a phone shows them too.

    Returns:
        The picture, None where no result says where frames leave.
    """
    drawn = [result for result in results if _drawable(result)][:_MOST_PANELS]
    if not drawn:
        return None
    panels = [_columns(result.exits) for result in drawn]
    width = max(panel[-1].left + panel[-1].width for panel in panels)
    height = 1 + _HEAD - _FOOT + _WORDS
    figure = new_figure(width * _UNIT + 0.1, len(drawn) * height * _UNIT + 0.1)
    grid = figure.subplots(len(drawn), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_aspect("equal", anchor="W")
        axes.set_xlim(0, width)
        axes.set_ylim(_FOOT - _WORDS, 1 + _HEAD)
    for axes, result, columns in zip(grid.flat, drawn, panels, strict=True):
        _draw(axes, result, columns, named=len(results) > 1)
    return figure


def _drawable(result: Result) -> bool:
    some = any(one.evaluated and one.share > 0 for one in result.exits)
    return some and len(_groups(result.exits)) <= _MOST_COLUMNS


def _groups(exits: Sequence[ExitFigures]) -> list[tuple[ExitFigures, ...]]:
    """Every evaluated exit alone, neighbours that are not evaluated together."""
    found: list[tuple[ExitFigures, ...]] = []
    for evaluated, run in groupby(exits, key=lambda one: one.evaluated):
        together = tuple(run)
        found.extend([(one,) for one in together] if evaluated else [together])
    return found


def _columns(exits: Sequence[ExitFigures]) -> list[_Column]:
    groups = _groups(exits)
    wide = sum(group[0].evaluated for group in groups)
    narrow = _PRUNED * (len(groups) - wide)
    width = max(_COLUMN, (WIDTH / _UNIT - _ENTRY - narrow) / wide)
    colours = iter(exit_colours(wide))
    columns, left = [], _ENTRY
    for group in groups:
        evaluated = group[0].evaluated
        size = width if evaluated else _PRUNED
        columns.append(_Column(group, next(colours) if evaluated else GREY, left, size))
        left += size
    return columns


def _draw(axes: Axes, result: Result, columns: Sequence[_Column], *, named: bool) -> None:
    from matplotlib.patches import PathPatch

    shares = [min(max(column.exits[0].share, 0.0), 1.0) for column in columns]
    whole = max(1.0, sum(s for s, c in zip(shares, columns, strict=True) if c.evaluated))
    bottom = 0.0
    for column, share in zip(columns, shares, strict=True):
        if not column.evaluated:
            axes.plot([column.middle] * 2, [bottom, _FOOT], ":", color=GREY, linewidth=1)
            _name_pruned(axes, column)
            continue
        thick = share / whole
        if thick > 0:
            outline = _band(column.middle, bottom, thick)
            axes.add_patch(
                PathPatch(
                    outline,
                    facecolor=column.colour,
                    edgecolor="white",
                    linewidth=0.7,
                    label=label(column.exits[0].name),
                )
            )
        bottom += thick
        _name_exit(axes, column)
    frames = sum(max(one.count, 0) for one in result.exits)
    count = f"{frames:,} frames" if frames else "all frames"
    words = f"{label(result.name, 40)}: {count}" if named else count
    axes.text(
        0, 1.08, words, fontsize=PLAIN, color=BLACK, va="bottom", weight="bold" if named else None
    )


def _band(middle: float, bottom: float, thick: float) -> Outline:
    """From the left edge to the right, round a bend, and down to the foot."""
    from matplotlib.path import Path

    left, right = middle - thick / 2, middle + thick / 2
    begin, top, low = left - _BEND, bottom + thick, bottom - _BEND
    inner, outer = _BEND * 0.5523, (_BEND + thick) * 0.5523
    move, line, curve = Path.MOVETO, Path.LINETO, Path.CURVE4
    corners = [
        ((0, bottom), move),
        ((0, top), line),
        ((begin, top), line),
        ((begin + outer, top), curve),
        ((right, low + outer), curve),
        ((right, low), curve),
        ((right, _FOOT), line),
        ((left, _FOOT), line),
        ((left, low), line),
        ((left, low + inner), curve),
        ((begin + inner, bottom), curve),
        ((begin, bottom), curve),
        ((0, bottom), Path.CLOSEPOLY),
    ]
    return Path([place for place, _ in corners], [code for _, code in corners])


def _name_exit(axes: Axes, column: _Column) -> None:
    one = column.exits[0]
    longest = round(column.width * _UNIT * 72 / (0.62 * PLAIN))
    lines = [
        (label(one.name, longest), PLAIN, BLACK, "bold"),
        (f"{percent(one.share, 0)} of frames", SMALL, BLACK, "normal"),
    ]
    if one.accuracy is not None:
        lines.append((f"{percent(one.accuracy)} right", SMALL, SOFT, "normal"))
    if one.latency is not None:
        lines.append((milliseconds(one.latency.mean), SMALL, SOFT, "normal"))
    for place, (words, size, colour, weight) in enumerate(lines):
        axes.text(
            column.middle,
            _FOOT - 0.08 - 0.24 * place,
            words,
            fontsize=size,
            color=colour,
            weight=weight,
            ha="center",
            va="top",
        )


def _name_pruned(axes: Axes, column: _Column) -> None:
    """Upright words, because the column is narrow."""
    names = [one.name for one in column.exits]
    words = label(names[0], 14) if len(names) == 1 else f"{len(names)} exits"
    axes.text(
        column.middle,
        _FOOT - 0.08,
        f"{words}\nnot evaluated",
        fontsize=SMALL - 1,
        color=SOFT,
        style="italic",
        rotation=90,
        ha="center",
        va="top",
        linespacing=1.1,
    )
