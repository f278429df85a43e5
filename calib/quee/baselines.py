"""What a gate is compared with: thresholds at one precision, and one precision without exits.

To compare with all blocks at a lower precision, collect a table of that level alone: the paths of a
gate run their first block at the highest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calib.quee.routing import RoutedTable
from calib.quee.table import PathTable
from edge_runtime.errors import ConfigError

#: Points of a curve of thresholds, where nobody says which.
_POINTS = 41


def route_by_threshold(table: PathTable, threshold: float, *, level: int = 0) -> RoutedTable:
    """Leave at the first exit whose largest probability is at least a threshold.

    Args:
        table: What every path says.
        threshold: The same at each exit but the last, which always answers; 0 or less leaves at
            the first, more than 1 at the last.
        level: The level of all blocks but the first, which runs at level 0.

    Raises:
        ConfigError: The threshold is NaN, there is no such level, or the table lacks such a path.
    """
    if np.isnan(threshold):
        raise ConfigError("threshold", got=threshold, expected="a number")
    columns = _fixed_level(table, level)
    confident = table.probabilities[:, columns].max(axis=2) >= np.float32(threshold)
    confident[:, -1] = True
    path = np.array(columns)[confident.argmax(axis=1)]
    return RoutedTable(table, path, np.zeros(len(table), bool))


def route_fixed(table: PathTable, *, level: int = 0) -> RoutedTable:
    """Run all blocks, without exits; arguments and errors as of `route_by_threshold`."""
    return route_by_threshold(table, np.inf, level=level)


def thresholds(table: PathTable, count: int = _POINTS, *, level: int = 0) -> tuple[float, ...]:
    """Thresholds that let evenly spaced shares of the answers of all early exits be confident.

    Args:
        table: Data to choose on; other data than that of the curve, or the curve knows it.
        count: How many, >= 2.
        level: As of `route_by_threshold`.

    Returns:
        Rising; the first leaves always at the first exit, the last never early.

    Raises:
        ConfigError: `count` < 2, or as of `route_by_threshold`.
    """
    if count < 2:
        raise ConfigError("thresholds of a curve", got=count, expected=">= 2")
    signals = table.probabilities[:, _fixed_level(table, level)[:-1]].max(axis=2)
    if not signals.size:
        return (0.0, 2.0)
    inner: NDArray[np.float32] = np.quantile(signals, np.linspace(0, 1, count)[1:-1])
    return (0.0, *np.unique(inner).tolist(), 2.0)


def threshold_curve(
    table: PathTable, values: Sequence[float], *, level: int = 0
) -> tuple[RoutedTable, ...]:
    """`route_by_threshold` at each of some thresholds."""
    return tuple(route_by_threshold(table, value, level=level) for value in values)


def _fixed_level(table: PathTable, level: int) -> list[int]:
    """The path to each exit, all blocks but the first at one level."""
    if not 0 <= level < len(table.paths.levels):
        raise ConfigError(
            "level", got=level, expected=f"0..{len(table.paths.levels) - 1}, an index of a level"
        )
    exits = range(len(table.paths.exits))
    return [table.paths.index((0, *[level] * e)) for e in exits]
