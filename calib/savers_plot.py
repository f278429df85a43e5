"""A picture of savers: accuracy against the early-exit ratio, as TinySaver's Figure 6."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calib.saver_selection import PairCurve
from calib.saver_study import PairFigures
from edge_runtime.errors import ConfigError
from engines.plot_file import BLUE, ORANGE, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
#: A figure of more pairs is too large to draw.
_MOST = 60
#: Points of a line; there may be as many thresholds as samples.
_DRAWN = 1000


def check_pairs(count: int) -> None:
    """Refuse a picture of too many pairs, before anything long begins.

    Raises:
        ConfigError: There are more than 60.
    """
    if count > _MOST:
        raise ConfigError(
            "pairs to draw with --plot",
            got=count,
            expected=f"<= {_MOST}",
            remedy="Name fewer with --base, or leave out --best",
        )


def plot_pairs(path: Path, pairs: Sequence[PairFigures]) -> None:
    """Draw, per pair, how accurate saver and base are on the samples that leave.

    Args:
        path: A file that `check_plot` has passed.
        pairs: What is drawn, one panel each; one at least.

    Raises:
        EdgeRuntimeError: The file can't be written.

    Reference:
        Wang et al., Tiny Models are the Computational Saver for Large Models, Figure 6.
    """
    columns = min(len(pairs), _COLUMNS)
    rows = -(-len(pairs) // columns)
    figure = new_figure(4.6 * columns, 3.8 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, pair in zip(panels, pairs, strict=False):
        _draw(axes, pair.train, "--", "training")
        _draw(axes, pair.test, "-", "test")
        axes.set_title(f"{pair.test.base} - {pair.test.saver}", fontsize=10)
        axes.set_xlabel("early-exit ratio, %")
        axes.set_ylabel("accuracy on samples that leave, %")
        axes.grid(alpha=0.3)
    for axes in panels[len(pairs) :]:
        axes.remove()
    panels[0].legend(fontsize=8)
    save_figure(figure, path)


def _draw(axes: Axes, curve: PairCurve, style: str, of: str) -> None:
    """Both lines of a table, and the ratio e after which the base is the better one."""
    rows = np.unique(np.linspace(1, len(curve.leaving) - 1, _DRAWN).astype(int))
    leaving = curve.leaving[rows]
    ratio = leaving / curve.samples * 100
    for who, right, colour in (
        (curve.saver, curve.saver_right, ORANGE),
        (curve.base, curve.base_right, BLUE),
    ):
        accuracy = right[rows] / leaving * 100
        axes.plot(ratio, accuracy, style, color=colour, linewidth=1.2, label=f"{who}, {of}")
    equal = curve.leaving[curve.row(0.0)] / curve.samples * 100
    axes.axvline(equal, linestyle=style, color="black", linewidth=0.8, label=f"e, {of}")
