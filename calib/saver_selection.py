"""Which small model saves a large one the most: TinySaver's selection and operating points.

The saver runs on every sample, the base only on those that do not leave. Samples leave by the
saver's signal, those of equal signal together, so everything here is a threshold that the runtime
can use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.ranking import Ranking
from calib.cascade_search.search import CascadePoint
from calib.cascade_search.signals import Judgement

#: Drops of accuracy of TinySaver's Table 5, in points.
DROPS = (1.0, 0.5, 0.1, 0.01)
ZERO_LOSS, MAX_ACCURACY = "zero_loss", "max_accuracy"
#: Name of an operating point -> the largest drop, a fraction; None where accuracy is all.
POINTS: dict[str, float | None] = {
    **{f"drop_{points}": points / 100 for points in DROPS},
    ZERO_LOSS: 0.0,
    MAX_ACCURACY: None,
}


@dataclass(frozen=True, eq=False)
class PairCurve:
    """A saver before a base, at every threshold; row 0 lets nobody leave, the last one everybody.

    Attributes:
        saver: Name of the saver.
        base: Name of the base.
        costs: Cost of a sample, saver and base.
        base_correct: Samples that the base alone answers correctly.
        leaving: Samples that leave, ascending from 0 to N, shape (C,), int64.
        saver_right: Those of them that the saver answers correctly, shape (C,), int64.
        base_right: Those of them that the base answers correctly, shape (C,), int64.
    """

    saver: str
    base: str
    costs: tuple[float, float]
    base_correct: int
    leaving: NDArray[np.int64]
    saver_right: NDArray[np.int64]
    base_right: NDArray[np.int64]
    _threshold: Callable[[int], float | None]

    @classmethod
    def of(
        cls,
        models: Mapping[str, Judgement],
        pair: tuple[str, str],
        costs: Mapping[str, float],
        lowest: float,
        ranking: Ranking | None = None,
    ) -> PairCurve:
        """Sort the saver's signal, and count.

        Args:
            models: What each model says of the samples.
            pair: Saver and base.
            costs: Model -> cost of a sample, > 0.
            lowest: The smallest value of the signal: the threshold by which everybody leaves.
            ranking: The order of the saver's signal, where it is known.
        """
        saver, base = pair
        signal = models[saver].signal
        order = ranking or Ranking.of(signal)
        leaving = np.append(order.cuts, len(signal)).astype(np.int64)

        def threshold(row: int) -> float | None:
            if row == len(leaving) - 1:
                return lowest
            return order.threshold(signal, int(leaving[row]))

        return cls(
            saver=saver,
            base=base,
            costs=(costs[saver], costs[base]),
            base_correct=int(np.count_nonzero(models[base].correct)),
            leaving=leaving,
            saver_right=_counted(models[saver].correct[order.order])[leaving],
            base_right=_counted(models[base].correct[order.order])[leaving],
            _threshold=threshold,
        )

    @property
    def samples(self) -> int:
        """N."""
        return int(self.leaving[-1])

    @cached_property
    def gain(self) -> NDArray[np.int64]:
        """Right answers of the pair more than those of the base, shape (C,)."""
        return self.saver_right - self.base_right

    @property
    def alone(self) -> CascadePoint:
        """The base without a saver."""
        return CascadePoint(
            (), (self.samples,), self.base_correct, self.costs[1], models=(self.base,)
        )

    def row(self, largest_drop: float | None) -> int:
        """The row of an operating point.

        Args:
            largest_drop: The cheapest row that loses at most so much accuracy against the base, a
                fraction, as `calib.thresholds.AccuracyDrop`; None for the most accurate row, of
                equals the cheapest. There always is one, as nobody may leave; its cost is then
                that of both models.
        """
        gain = self.gain
        # A drop of 0.07 of 100 samples is 7 of them, whatever 0.07 * 100 rounds to.
        least = gain.max() if largest_drop is None else -(largest_drop * self.samples + 1e-6)
        # Costs descend: the last row is the cheapest.
        return len(gain) - 1 - int((gain >= least)[::-1].argmax())

    def point(self, row: int) -> CascadePoint:
        """The figures of a row; the threshold is None where nobody leaves."""
        leaving = int(self.leaving[row])
        return CascadePoint(
            thresholds=(self._threshold(row),),
            counts=(leaving, self.samples - leaving),
            correct=self.base_correct + int(self.gain[row]),
            cost=mean_cost(self.costs, leaving, self.samples),
            models=(self.saver, self.base),
        )


@dataclass(frozen=True)
class Candidate:
    """A saver for a base.

    Attributes:
        saver: Name of the saver.
        base: Name of the base.
        delta: Delta C_tr = C_S / C_B - e: what the saver changes in the mean cost, in costs of the
            base, without a loss of accuracy on these samples; negative where it saves.
        cost_ratio: C_S / C_B, below 1.
        exit_ratio: e: the largest share of samples that can leave, so that the saver is at least
            as accurate on them as the base.
        threshold: The matched threshold, by which that share leaves; None where e is 0.
    """

    saver: str
    base: str
    delta: float
    cost_ratio: float
    exit_ratio: float
    threshold: float | None


def rank_savers(
    models: Mapping[str, Judgement],
    costs: Mapping[str, float],
    base: str,
    lowest: float,
    rankings: Mapping[str, Ranking] | None = None,
) -> tuple[Candidate, ...]:
    """Rank all models that are cheaper than a base as its savers.

    Args:
        models: What each model says of the samples to choose on.
        costs: Model -> cost of a sample, > 0.
        base: The base.
        lowest: The smallest value of the signal.
        rankings: Model -> order of its signal, where they are known.

    Returns:
        Savers by ascending `delta`, of equals the cheaper one first; empty where no model is
        cheaper than the base.

    Reference:
        Wang et al., Tiny Models are the Computational Saver for Large Models, ECCV 2024, section
        3.3, and `exit_estimation` of the authors' code.
    """
    found = []
    for saver in models:
        if costs[saver] >= costs[base]:
            continue
        ranking = None if rankings is None else rankings[saver]
        curve = PairCurve.of(models, (saver, base), costs, lowest, ranking)
        point = curve.point(curve.row(0.0))
        ratio = costs[saver] / costs[base]
        exit_ratio = point.exit_rates[0]
        found.append(
            Candidate(saver, base, ratio - exit_ratio, ratio, exit_ratio, point.thresholds[0])
        )
    return tuple(sorted(found, key=lambda one: (one.delta, one.cost_ratio)))


def operating_points(curve: PairCurve) -> dict[str, CascadePoint]:
    """Name of an operating point -> the best threshold for it on the curve's own samples."""
    return {name: curve.point(curve.row(drop)) for name, drop in POINTS.items()}


def mean_cost(costs: Sequence[float], leaving: int, samples: int) -> float:
    """Mean cost of a sample: everyone pays for the saver, those that stay for the base too.

    Args:
        costs: Cost of a sample, saver and base.
        leaving: Samples that leave.
        samples: All samples.
    """
    return costs[0] + (samples - leaving) / samples * costs[1]


def _counted(right: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Right answers among the first k, for k from 0 on."""
    return np.concatenate(([0], np.cumsum(right, dtype=np.int64)))


def replay(
    models: Mapping[str, Judgement],
    pair: tuple[str, str],
    costs: Sequence[float],
    threshold: float | None,
) -> tuple[CascadePoint, int, int]:
    """What a threshold that was chosen elsewhere does on some samples.

    Args:
        models: What each model says of them.
        pair: Saver and base.
        costs: Cost of a sample, saver and base.
        threshold: Samples leave whose signal is at least this; None: nobody leaves, though the
            saver runs.

    Returns:
        Its figures, how many samples only the base alone answers correctly, and how many only the
        pair does.
    """
    saver, base = models[pair[0]], models[pair[1]]
    leaves = np.zeros(len(saver.signal), bool)
    if threshold is not None:
        leaves = saver.signal >= np.float32(threshold)
    worse = int(np.count_nonzero(leaves & base.correct & ~saver.correct))
    better = int(np.count_nonzero(leaves & saver.correct & ~base.correct))
    gone, stay = int(np.count_nonzero(leaves)), int(np.count_nonzero(~leaves))
    point = CascadePoint(
        thresholds=(threshold,),
        counts=(gone, stay),
        correct=int(np.count_nonzero(base.correct)) + better - worse,
        cost=mean_cost(costs, gone, gone + stay),
        models=pair,
    )
    return point, worse, better
