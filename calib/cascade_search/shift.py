"""Cascades chosen on one table, as they are, on another: what a shift of the data does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from calib.cascade_search.exits import Exits
from calib.cascade_search.improvement import Improvement, improvement
from calib.cascade_search.search import (
    CascadePoint,
    SearchResult,
    measure_cascade,
    measure_singles,
)


@dataclass(frozen=True)
class Shift:
    """What models and thresholds do on the other table.

    Attributes:
        singles: Each model alone, on the other table.
        single_front: The Pareto front of those.
        front: The points of the front that was searched, in its order, on the other table. They
            need not be a front there.
        improvement: Of `front` against `single_front`.
    """

    singles: tuple[CascadePoint, ...]
    single_front: tuple[CascadePoint, ...]
    front: tuple[CascadePoint, ...]
    improvement: Improvement


def shifted(
    result: SearchResult,
    exits: Exits,
    costs: Mapping[str, float],
    bounds: tuple[float, float],
    measured: Callable[[], None] = lambda: None,
) -> Shift:
    """Evaluate what was found on one table on another.

    Args:
        result: What was found.
        exits: What the exits of its cascades say of the other table's samples; temperatures must be
            those of the first table.
        costs: Model -> cost of a sample.
        bounds: The smallest and largest value that the signal can take.
        measured: Called after each point.

    Returns:
        The same models and thresholds on the other table.

    Reference:
        Lebovitz et al., TMLR 2023, section 4.1 ("Robustness to distribution shifts").
    """
    singles, single_front = measure_singles(exits, costs)
    front = []
    for point in result.front:
        front.append(measure_cascade(exits, costs, bounds, point.models, point.thresholds))
        measured()
    return Shift(singles, single_front, tuple(front), improvement(front, single_front))
