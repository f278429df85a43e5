"""Reliability diagrams: how often each exit is right, against how confident it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calib.temperature import Reliability
from engines.plot_file import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Charts side by side.
_COLUMNS = 3
#: Colour, and how far to the side bars stand.
_STATES = {"before": (ORANGE, -0.25), "after": (BLUE, 0.25)}
_95_PERCENT = 1.96


def plot(path: Path, title: str, calibration: Mapping[str, Mapping[str, Reliability]]) -> None:
    """Draw a diagram per exit.

    Args:
        path: A file that `check_plot` has passed.
        title: What the exits belong to.
        calibration: Exit -> "before" and perhaps "after" -> its reliability.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    columns = min(len(calibration), _COLUMNS)
    rows = -(-len(calibration) // columns)
    figure = new_figure(4.2 * columns, 4.2 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for at, (name, states) in zip(axes, calibration.items(), strict=False):
        _diagram(at, name, states)
    for unused in axes[len(calibration) :]:
        unused.set_axis_off()
    figure.suptitle(f"{title}: is confidence true?")
    save_figure(figure, path)


def _diagram(axes: Axes, name: str, states: Mapping[str, Reliability]) -> None:
    """Accuracy of each bin with its 95 % interval, and as shades the share of samples in it."""
    axes.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="as it should be")
    for state, found in states.items():
        colour, aside = _STATES[state]
        bins = len(found.counts)
        middle = (np.arange(bins) + 0.5 + aside) / bins
        axes.bar(middle, found.counts / found.samples, 0.5 / bins, color=colour, alpha=0.25)
        some = found.counts > 0
        confidence, accuracy = found.confidence[some], found.accuracy[some]
        low, high = _wilson(accuracy, found.counts[some])
        axes.errorbar(
            confidence,
            accuracy,
            yerr=np.clip([accuracy - low, high - accuracy], 0, None),
            fmt="o",
            color=colour,
            markersize=4,
            elinewidth=1,
            label=f"{state}: ECE {100 * found.ece:.1f} %, NLL {found.nll:.3f}",
        )
    axes.set_title(f"exit {name}")
    axes.set_xlabel("confidence (bars: share of samples)")
    axes.set_ylabel("share that is right")
    axes.set_xlim(0, 1)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_ylim(0, 1.35)  # room for the legend
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", framealpha=1)


def _wilson(
    share: NDArray[np.float64], count: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Wilson's 95 % interval of a share."""
    z2 = _95_PERCENT**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = np.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    half *= _95_PERCENT
    return middle - half, middle + half
