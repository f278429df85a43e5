"""What all charts of a report share: colours, axes in milliseconds, what may be drawn at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bench.result import QUANTILES, Distribution
from engines.plot_file import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Inches: a chart that a phone shows whole.
WIDTH = 4.4
#: Points.
SMALL, PLAIN = 8.0, 9.0
#: Of text that is not the first thing to read; dark enough on white.
SOFT = "#595959"
FAINT = "#d9d9d9"

_RESULTS = (BLUE, ORANGE, GREEN, PURPLE, "#e69f00", "#56b4e9", BLACK)
_KINDS = {"preprocess": GREY, "saver": GREEN, "segment": BLUE, "head": PURPLE, "decide": ORANGE}
#: Early exits from light to dark.
_EARLY = ("#7cc4ee", "#003a5c")
#: Where the slowest takes this many times as long as the fastest, a linear axis hides one of them.
_LOG_FROM = 8.0
#: Seconds and joules beyond these come from a damaged file, and an axis can't hold them.
_LEAST, _MOST = 1e-9, 1e6


def result_colour(index: int) -> str:
    """Colour of the result at this place."""
    return _RESULTS[index % len(_RESULTS)]


def kind_colour(kind: str) -> str:
    """Colour of a kind of stage."""
    return _KINDS.get(kind, BLACK)


def exit_colours(count: int) -> list[str]:
    """Colours of exits: blues for those that leave early, orange for the whole model."""
    from matplotlib.colors import to_hex, to_rgb

    begin, end = (np.array(to_rgb(colour)) for colour in _EARLY)
    steps = np.linspace(0, 1, max(count - 1, 2))[: max(count - 1, 0)]
    return [*(str(to_hex(begin + step * (end - begin))) for step in steps), ORANGE]


def fits(*values: float | None) -> bool:
    """Whether these times or energies can be drawn: known, above zero and of this world."""
    return all(value is not None and _LEAST <= value <= _MOST for value in values)


def curve_ms(distribution: Distribution | None) -> NDArray[np.float64]:
    """A distribution's curve in milliseconds at `QUANTILES`; empty where it can't be drawn."""
    if distribution is None or len(distribution.curve) != len(QUANTILES):
        return np.empty(0)
    curve = np.asarray(distribution.curve)
    if not fits(float(curve.min()), float(curve.max())):
        return np.empty(0)
    return 1e3 * curve


def scale_ms(axes: Axes, values: Iterable[float], what: str) -> None:
    """Make an x axis of milliseconds, logarithmic where the values are far apart.

    Args:
        axes: Whose.
        values: Milliseconds that are drawn, all above zero.
        what: Of the axis, without its unit.
    """
    drawn = list(values)
    low, high = min(drawn), max(drawn)
    logarithmic = high / low > _LOG_FROM
    if logarithmic:
        plain_log(axes, high / low)
    axes.set_xlabel(f"{what}, ms (logarithmic)" if logarithmic else f"{what}, ms")


def plain_log(axes: Axes, span: float) -> None:
    """Make the x axis logarithmic, with plain numbers: 0.5, 1, 2, not powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    subs = (1.0, 2.0, 5.0) if span < 300 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def calm(axes: Axes, grid: str = "both") -> None:
    """A quiet frame: two spines, a faint grid behind the data, small soft ticks."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)
    axes.tick_params(labelsize=SMALL, color=GREY, labelcolor=BLACK)
    axes.xaxis.label.set_fontsize(SMALL)
    axes.yaxis.label.set_fontsize(SMALL)
    axes.grid(axis=grid, color=FAINT, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def rows_axis(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top, each with its name on the left."""
    axes.set_yticks(range(len(names)), list(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    calm(axes, "x")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
