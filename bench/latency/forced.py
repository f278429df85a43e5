"""Operating points at which every frame leaves at one exit, after those before it were judged.

They evaluate the exits that a scheduler was opened for, so it can switch to them between two
frames, and judge by the same metric and temperatures, so that judging costs the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.cascade import Cascade
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.policy import Policy, Threshold
from edge_runtime.scheduler import Scheduler

_LARGEST = float(np.finfo(np.float32).max)
#: A margin that all logits have which are not equal.
_SMALLEST = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class LeaveAt(OperatingPoint):
    """A point that evaluates some exits and leaves at one of them, whatever the logits are.

    Its rule is a threshold, which costs what the thresholds of other points do. It is for backends
    on which the host decides: a device takes finite thresholds only.

    Attributes:
        evaluated: Positions of the exits, ascending.
        position: The one at which frames leave.
    """

    evaluated: tuple[int, ...] = ()
    position: int = 0

    def policy_for(self, cascade: Cascade) -> Policy:
        """Thresholds that no signal reaches, up to one that every signal does."""
        last = len(cascade.exits) - 1
        thresholds: list[float | None] = [None] * last
        for i in self.evaluated:
            if i < last:
                thresholds[i] = math.inf if i < self.position else -_LARGEST
        if self.evaluated[-1] < last:
            thresholds[self.evaluated[-1]] = -math.inf  # Nothing after it is evaluated.
        return Threshold(tuple(thresholds), -math.inf)


def leave_at(point: OperatingPoint, evaluated: Sequence[int], position: int) -> LeaveAt:
    """The point that leaves at one exit, and judges and runs as another does.

    Args:
        point: Its metric, temperatures and variants are taken.
        evaluated: Positions of the exits that are evaluated, ascending.
        position: The one at which frames leave.
    """
    return LeaveAt(
        name=f"leave-at-{position}",
        metric=point.metric,
        temperatures=point.temperatures,
        variants=point.variants,
        evaluated=tuple(evaluated),
        position=position,
    )


def always(scheduler: Scheduler, exit_name: str) -> OperatingPoint:
    """The point at which every frame of a scheduler leaves at one exit.

    Args:
        scheduler: Open.
        exit_name: One of its exits.
    """
    names = [exit_.name for exit_ in scheduler.cascade.exits]
    evaluated = [names.index(name) for name in scheduler.exits]
    position = names.index(exit_name)
    if not scheduler.backend.decides:
        return leave_at(scheduler.point, evaluated, position)
    early = [i for i in evaluated if i < len(names) - 1]
    thresholds = {names[i]: _LARGEST if i < position else _SMALLEST for i in early}
    if early == evaluated:
        thresholds[names[early[-1]]] = 0.0  # Nothing after it is evaluated.
    return OperatingPoint(
        name=f"leave-at-{position}",
        metric="logits_margin",
        thresholds=thresholds,
        variants=scheduler.point.variants,
    )
