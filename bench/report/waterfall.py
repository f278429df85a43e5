"""What one frame did when: its stages and decisions as bars in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from bench.report.palette import PLAIN, SMALL, SOFT, WIDTH, calm, fits, kind_colour
from bench.report.words import label, milliseconds, number
from bench.result import FrameTrace, Result
from engines.plot_file import BLACK, GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Inches per bar.
_ROW = 0.19
#: More bars than these are no picture any more; of one frame, and of all.
_MOST_SPANS, _MOST_ROWS, _MOST_RESULTS = 60, 110, 8


class _Row(NamedTuple):
    """A line of the picture: a heading, or a bar from `begin` on, in milliseconds."""

    words: str
    kind: str = ""
    begin: float = 0.0
    length: float = 0.0
    whole: float = 0.0


def waterfall(results: Sequence[Result]) -> Figure | None:
    """Draw the recorded frames of one result, or the longest one of each of several.

    Args:
        results: One: all its recorded frames. Several: of each the one with the most stages, on
            one scale.

    Returns:
        The picture, None where no frame was recorded.
    """
    rows: list[_Row] = []
    for heading, frame in _chosen(results):
        more = _rows(heading, frame)
        if rows and len(rows) + len(more) > _MOST_ROWS:
            break
        rows.extend(more)
    if not rows:
        return None
    figure = new_figure(WIDTH, max(1.6, _ROW * len(rows) + 0.8))
    axes = figure.subplots()
    _draw(axes, rows)
    return figure


def _chosen(results: Sequence[Result]) -> list[tuple[str, FrameTrace]]:
    """What to draw, with what it is."""
    usable = [(result, frames) for result in results if (frames := _usable(result.frames))]
    if len(results) == 1:
        return [(frame.what, frame) for _, frames in usable for frame in frames]
    chosen = []
    for result, frames in usable[:_MOST_RESULTS]:
        frame = max(frames, key=lambda frame: len(frame.spans))
        chosen.append((f"{label(result.name, 26)}: {frame.what}", frame))
    return chosen


def _usable(frames: Sequence[FrameTrace]) -> list[FrameTrace]:
    """Frames with the spans that can be drawn."""
    found = []
    for frame in frames:
        spans = [one for one in frame.spans if fits(one.seconds) and 0 <= one.begin <= 1e6]
        if spans and fits(frame.seconds):
            found.append(replace(frame, spans=tuple(spans[:_MOST_SPANS])))
    return found


def _rows(heading: str, frame: FrameTrace) -> list[_Row]:
    words = f"{label(heading, 48)}, {milliseconds(frame.seconds)}"
    bars = [
        _Row(span.name, span.kind, 1e3 * span.begin, 1e3 * span.seconds, 1e3 * frame.seconds)
        for span in frame.spans
    ]
    return [_Row(words), *bars]


def _draw(axes: Axes, rows: Sequence[_Row]) -> None:
    from matplotlib.patches import Patch

    end = max(max(row.begin + row.length, row.whole) for row in rows)
    places, place = [], 0.0
    for i, row in enumerate(rows):
        place += 0.35 if i and not row.kind else 0.0
        places.append(place)
        place += 1
    for row, y in zip(rows, places, strict=True):
        if not row.kind:
            axes.text(-0.02 * end, y, row.words, fontsize=SMALL, weight="bold", va="center")
            continue
        thin = row.kind == "decide"
        axes.barh(y, row.length, 0.3 if thin else 0.72, row.begin, color=kind_colour(row.kind))
        words = number(row.length)
        left = row.begin + row.length > 0.82 * end and row.begin > 0.18 * end
        axes.annotate(
            words,
            (row.begin if left else row.begin + row.length, y),
            (-3 if left else 3, 0),
            textcoords="offset points",
            fontsize=SMALL - 1,
            color=SOFT if thin else BLACK,
            ha="right" if left else "left",
            va="center_baseline",
        )
    bars = [(row, y) for row, y in zip(rows, places, strict=True) if row.kind]
    calm(axes, "x")
    axes.set_yticks([y for _, y in bars], [label(row.words, 18) for row, _ in bars])
    for tick, (row, _) in zip(axes.get_yticklabels(), bars, strict=True):
        tick.set_color(SOFT if row.kind == "decide" else BLACK)
        tick.set_fontsize(SMALL - 0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(place - 0.3, -0.8)
    axes.set_xlim(-0.02 * end, 1.02 * end)
    axes.set_xlabel("from the frame's begin, ms")
    kinds = dict.fromkeys(row.kind for row, _ in bars)
    axes.figure.legend(
        handles=[Patch(color=kind_colour(kind), label=label(kind, 12)) for kind in list(kinds)[:6]],
        loc="outside lower center",
        ncols=min(len(kinds), 6),
        fontsize=SMALL,
        frameon=False,
        handlelength=1,
        columnspacing=1.2,
        labelcolor=BLACK,
        edgecolor=GREY,
        title_fontsize=PLAIN,
    )
