"""Operating points of a front: what is wanted, whether it is reached, and whether it can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calib.cascade_search.improvement import Improvement
from calib.cascade_search.methods import Method
from calib.cascade_search.search import CascadePoint, SearchResult
from calib.thresholds import AccuracyDrop, CostBudget, Goal, ZeroLoss
from edge_runtime import confidence

#: Drops of accuracy, in points, for which an operating point is looked for.
DROPS = (0.01, 0.1, 0.5, 1.0)
MAX_ACCURACY, MAX_IMPROVEMENT = "max_accuracy", "max_improvement"

_ROUNDING = 1e-9


@dataclass(frozen=True)
class OperatingPoints:
    """Points by their names.

    Attributes:
        points: Name -> point; None where it is not reached.
        unreached: Name -> why it is not.
    """

    points: Mapping[str, CascadePoint | None]
    unreached: Mapping[str, str]


def goals(budgets: Sequence[float] = ()) -> dict[str, Goal]:
    """Name of each operating point that is chosen by a goal -> the goal."""
    found: dict[str, Goal] = {"zero_loss": ZeroLoss()}
    found |= {f"drop_{points}": AccuracyDrop(points / 100) for points in DROPS}
    found |= {f"budget_{cost:g}": CostBudget(cost) for cost in budgets}
    return found


def pick(front: Sequence[CascadePoint], goal: Goal, reference: CascadePoint) -> CascadePoint | None:
    """The best point of a front for a goal, None where none is admissible.

    Args:
        front: By ascending accuracy and cost.
        goal: What is wanted.
        reference: The single model that drops of accuracy are counted from.
    """
    correct = np.array([point.correct for point in front])
    row = goal.pick(correct, np.array([point.cost for point in front]), reference)
    return None if row is None else front[row]


def operating_points(
    result: SearchResult,
    gain: Improvement,
    budgets: Sequence[float] = (),
    reference: CascadePoint | None = None,
) -> OperatingPoints:
    """Choose every operating point from a front.

    Args:
        result: What was found.
        gain: Its improvement over the whole range.
        budgets: Costs for which the most accurate point is wanted too.
        reference: The single model that drops of accuracy are counted from; by default the most
            accurate one.

    Returns:
        `zero_loss`, `drop_0.01` to `drop_1.0`, `budget_<cost>`, `max_accuracy` and
        `max_improvement`. Each may be a single model.
    """
    front, reference = result.front, reference or result.reference
    points: dict[str, CascadePoint | None] = {}
    unreached = {}
    for name, goal in goals(budgets).items():
        points[name] = pick(front, goal, reference)
        if points[name] is None:
            unreached[name] = (
                f"nothing achieves {goal}: the cheapest is {' -> '.join(front[0].models)} at "
                f"{front[0].cost:g}"
            )
    points[MAX_ACCURACY] = front[-1]
    points[MAX_IMPROVEMENT] = None
    if gain.maximum > 1 + _ROUNDING:
        points[MAX_IMPROVEMENT] = at_accuracy(front, gain.best_accuracy)
    else:
        unreached[MAX_IMPROVEMENT] = "no cascade costs less than single models of equal accuracy"
    return OperatingPoints(points, unreached)


def at_accuracy(front: Sequence[CascadePoint], accuracy: float) -> CascadePoint:
    """The cheapest point of a front that is at least so accurate; the front reaches it."""
    return next(point for point in front if point.accuracy >= accuracy)


def why_not_deployable(
    point: CascadePoint, method: Method, top: int, with_logits: Sequence[str]
) -> str | None:
    """Why the runtime can't run a point, None where it can.

    Args:
        point: The point.
        method: How its exits are judged.
        top: Number of largest logits among which the label must be.
        with_logits: Models whose logits the table has.
    """
    if top != 1:
        return f"the runtime answers with one class, not with {top}"
    for name in point.models:
        if name not in with_logits:
            return f"the runtime judges logits, and the table has none of {name!r}"
    if len(point.models) == 1:
        return None
    if method.ensemble != "none":
        return "the runtime does not ensemble: an exit answers with its own logits"
    if method.metric not in confidence.METRICS:
        return f"{method.metric!r} is no metric of the runtime"
    return None
