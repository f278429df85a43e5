"""What cascades save against single models of equal accuracy.

The baseline is the Pareto front of single models, interpolated linearly: between two of them it is
what choosing one of the two at random costs. Cascades are not interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import Point
from edge_runtime.errors import ConfigError

#: A peak of the improvement counts beside a higher one if the curve falls to less than this share
#: of it between the two.
_VALLEY = 0.9


@dataclass(frozen=True, eq=False)
class Improvement:
    """By which factor a front is cheaper than single models, over an accuracy range.

    Attributes:
        accuracy: Accuracies of the points of the front and of the single models within the range,
            shape (P,), ascending, at least one.
        baseline: Cost of the interpolated single models there, shape (P,).
        cost: Cost of the cheapest cascade that is at least as accurate, shape (P,). It is the
            cheapest for all accuracies down to the entry before, where the baseline costs less.

    Reference:
        Lebovitz et al., TMLR 2023, section 3 ("Cost" and "Evaluation").
    """

    accuracy: NDArray[np.float64]
    baseline: NDArray[np.float64]
    cost: NDArray[np.float64]

    @property
    def factor(self) -> NDArray[np.float64]:
        """Baseline over cost, shape (P,); between two entries it grows towards the second."""
        ratio: NDArray[np.float64] = self.baseline / self.cost
        return ratio

    @property
    def average(self) -> float:
        """Mean of the factor over the range, exact."""
        width = np.diff(self.accuracy)
        if not len(width):
            return float(self.factor[0])
        # On each piece the baseline is a line and the cascade one and the same.
        area = (self.baseline[1:] + self.baseline[:-1]) / 2 / self.cost[1:] * width
        return float(area.sum() / width.sum())

    @property
    def line(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Accuracies and factors to draw: at each entry the factor falls to that of the next."""
        after = self.baseline[:-1] / self.cost[1:]
        factor = np.empty(2 * len(self.accuracy) - 1)
        factor[0::2], factor[1::2] = self.factor, after
        return np.repeat(self.accuracy, 2)[:-1], factor

    @property
    def maximum(self) -> float:
        """The largest factor."""
        return float(self.factor.max())

    @property
    def best_accuracy(self) -> float:
        """The accuracy at which the factor is largest, the highest of equals."""
        factor = self.factor
        return float(self.accuracy[np.flatnonzero(factor == factor.max())[-1]])

    def peaks(self, count: int) -> list[float]:
        """Accuracies at which the factor is locally largest, in ascending order.

        Args:
            count: How many at most; the highest are taken.
        """
        factor = self.factor
        chosen: list[int] = []
        for i in np.argsort(-factor, kind="stable").tolist():
            if len(chosen) == count:
                break
            valleys = [factor[min(i, other) : max(i, other) + 1].min() for other in chosen]
            if all(valley < _VALLEY * factor[i] for valley in valleys):
                chosen.append(i)
        return sorted(float(self.accuracy[i]) for i in chosen)


def improvement(
    front: Sequence[Point],
    singles: Sequence[Point],
    low: float | None = None,
    high: float | None = None,
) -> Improvement:
    """Compare cascades with single models along the accuracy.

    Args:
        front: Cascades, in any order; at least one. Points that others beat change nothing.
        singles: The Pareto front of single models, by ascending accuracy and cost; at least one.
        low: Where the range begins, in [0, 1]; by default, and at the earliest, at the least
            accurate of the single models.
        high: Where it ends; by default, and at the latest, at the most accurate one or, where no
            cascade reaches that, at the most accurate cascade.

    Returns:
        The curve and its mean.

    Raises:
        ConfigError: There is no accuracy in that range which both single models and cascades have.
    """
    base = np.array([(point.accuracy, point.cost) for point in singles])
    points = np.array(sorted((point.accuracy, point.cost) for point in front))
    begin = max(base[0, 0], -np.inf if low is None else low)
    end = min(base[-1, 0], points[-1, 0], np.inf if high is None else high)
    if begin > end:
        raise ConfigError(
            "an accuracy range for the improvement",
            got=f"{begin:.4f}..{end:.4f}",
            expected=f"one within {base[0, 0]:.4f}..{min(base[-1, 0], points[-1, 0]):.4f}",
        )
    inner = np.unique(np.concatenate((base[:, 0], points[:, 0], [begin, end])))
    accuracy = inner[(inner >= begin) & (inner <= end)]
    baseline = np.interp(accuracy, base[:, 0], base[:, 1])
    cheapest = np.minimum.accumulate(points[::-1, 1])[::-1]
    cost = cheapest[np.searchsorted(points[:, 0], accuracy)]
    return Improvement(accuracy, baseline, cost)
