"""The picture of ``edge-runtime precision --plot``: signals of each exit, and exit rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calib.precision import at_thresholds
from calib.precision_work import Work
from engines.plot_file import BLUE, GREY, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Charts side by side.
_COLUMNS = 3
_BEFORE, _FORGOTTEN, _AFTER = BLUE, GREY, ORANGE


def plot(path: Path, work: Work) -> None:
    """Draw signals of each exit with both thresholds, and exit rates.

    Where nothing was chosen it shows what all variants together would do.
    """
    found, mixes = work.found, work.mixes
    exits = found.before.exits
    variants = found.variants or dict.fromkeys(work.times.ratios, found.precision)
    tables = (mixes.judged({}), mixes.judged(variants))
    columns = min(len(exits), _COLUMNS)
    rows = -(-len(exits) // columns)
    figure = new_figure(4.4 * columns, 3.8 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, name in enumerate(exits[:-1]):
        _plot_signals(axes[i], [table.signals[:, i] for table in tables], work, name)
    _plot_rates(axes[len(exits) - 1], work, variants)
    for unused in axes[len(exits) :]:
        unused.set_axis_off()
    chosen = "" if found.variants else " (measured, not chosen)"
    figure.suptitle(
        f"{mixes.bundle.manifest.name}: {', '.join(variants)} at {found.precision}{chosen}"
    )
    save_figure(figure, path)


def _plot_signals(
    axes: Axes, signals: Sequence[NDArray[np.float32]], work: Work, name: str
) -> None:
    """Cumulative shares of the signal at one exit, with a line for each threshold."""
    found = work.found
    for values, label, figures, colour, style in (
        (signals[0], "now", found.before, _BEFORE, "-"),
        (signals[1], found.precision, found.after, _AFTER, "--"),
    ):
        share = np.arange(1, len(values) + 1) / len(values)
        axes.plot(np.sort(values), 100 * share, style, color=colour, label=label)
        threshold = figures.thresholds[name]
        if threshold is not None and (found.variants or figures is found.before):
            text = f"threshold {label}: {threshold:.3g}"
            axes.axvline(threshold, color=colour, linestyle=":", linewidth=2, label=text)
    axes.set_title(f"exit {name}")
    axes.set_xlabel(f"signal ({work.start.metric})")
    axes.set_ylabel("samples with a lower signal, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", framealpha=1)


def _plot_rates(axes: Axes, work: Work, variants: Mapping[str, str]) -> None:
    """Bars of the exit rates."""
    found = work.found
    exits, what = found.before.exits, found.precision
    old = at_thresholds(work.mixes, work.times, variants, found.before.thresholds)
    bars = [("now", found.before, _BEFORE), (f"{what}, old thresholds", old, _FORGOTTEN)]
    if found.variants:
        bars.append((f"{what}, new thresholds", found.after, _AFTER))
    middle = np.arange(len(exits))
    for i, (label, figures, colour) in enumerate(bars):
        rates = [100 * figures.exit_rates[name] for name in exits]
        places = middle + (i - (len(bars) - 1) / 2) * 0.28
        drawn = axes.bar(places, rates, 0.26, color=colour, label=label)
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.set_xticks(middle, exits)
    axes.set_title("exit rates")
    axes.set_ylabel("samples that leave here, %")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylim(0, 140)  # room above the bars for the legend
    axes.legend(fontsize=8, loc="upper right")
