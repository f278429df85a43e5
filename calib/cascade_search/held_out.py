"""What operating points of a search are worth on samples that they were not chosen on.

The whole search is run on some folds of the samples, models and thresholds are chosen from its
front, and judged on the rest: the best of hundreds of cascades is more of a lucky find than the
best threshold of one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.exits import Exits
from calib.cascade_search.improvement import improvement
from calib.cascade_search.points import MAX_IMPROVEMENT, operating_points
from calib.cascade_search.search import CascadePoint, answers, measure_cascade, search
from calib.crossval import CrossValidation, paired_interval
from edge_runtime.errors import CalibrationError


def held_out(
    exits: Exits,
    costs: Mapping[str, float],
    bounds: tuple[float, float],
    reference: str,
    *,
    longest: int = 2,
    stride: int = 10,
    budgets: Sequence[float] = (),
    improved_at: float | None = None,
    repeats: int = 10,
    folds: int = 5,
    seed: int = 0,
    searched: Callable[[], None] = lambda: None,
) -> dict[str, CrossValidation]:
    """Cross-validate the search together with the choice of its operating points.

    Args:
        exits: What the exits of all cascades say.
        costs: Model -> cost of a sample.
        bounds: The smallest and largest value that the signal can take.
        reference: The single model that drops of accuracy are counted from.
        longest: As of `search`.
        stride: As of `search`.
        budgets: As of `operating_points`.
        improved_at: Drop of accuracy of the point of largest improvement that was chosen. The
            largest factor lies at another accuracy in every fold, and what is promised is the point
            that was chosen: in folds the cheapest one of at most that drop stands for it.
        repeats: Number of random partitions, >= 1.
        folds: Number of folds, >= 2.
        seed: Seed of the partitions.
        searched: Called after each of the `repeats * folds` searches.

    Returns:
        Name of each operating point -> its held-out figures against the reference. Where a fold
        does not reach a point, the reference alone stands for it. `exit_rates` is empty: the
        cascades differ between folds.

    Raises:
        CalibrationError: There are fewer than two samples per fold.
    """
    samples = len(exits.models[reference].correct)
    if samples < 2 * folds:
        raise CalibrationError(
            f"samples for a cross-validation in {folds} folds",
            got=samples,
            expected=f">= {2 * folds}",
            remedy="Give more labelled data, or --repeats 0 for none",
        )
    generator = np.random.default_rng(seed)
    tallies: dict[str, _Tally] = {}
    for _ in range(repeats):
        fold_of = generator.permutation(np.arange(samples) % folds)
        for fold in range(folds):
            seen = exits.rows(np.flatnonzero(fold_of != fold))
            unseen = exits.rows(np.flatnonzero(fold_of == fold))
            result = search(seen, costs, longest=longest, stride=stride)
            base = measure_cascade(seen, costs, bounds, (reference,), ())
            gain = improvement(result.front, result.single_front)
            points = dict(operating_points(result, gain, budgets, base).points)
            if improved_at is not None:
                reached = [p for p in result.front if p.accuracy >= base.accuracy - improved_at]
                points[MAX_IMPROVEMENT] = (reached or result.front[-1:])[0]
            for name, point in points.items():
                tally = tallies.setdefault(name, _Tally())
                tally.add(unseen, costs, bounds, point or base, base)
            searched()
    return {name: tally.figures(samples, repeats, folds, seed) for name, tally in tallies.items()}


@dataclass
class _Tally:
    """Counts over the folds of one operating point."""

    worse: int = 0
    better: int = 0
    below: int = 0
    alone: int = 0
    cost: list[float] = field(default_factory=list)

    def add(
        self,
        unseen: Exits,
        costs: Mapping[str, float],
        bounds: tuple[float, float],
        point: CascadePoint,
        base: CascadePoint,
    ) -> None:
        """Judge what was chosen on one fold."""
        cascade = answers(unseen, bounds, point.models, point.thresholds)
        reference: NDArray[np.bool_] = unseen.after(base.models).correct
        worse = int(np.count_nonzero(reference & ~cascade))
        better = int(np.count_nonzero(cascade & ~reference))
        self.worse += worse
        self.better += better
        self.below += worse > better
        self.alone += point.models == base.models
        found = measure_cascade(unseen, costs, bounds, point.models, point.thresholds)
        self.cost.append(found.cost * len(cascade))

    def figures(self, samples: int, repeats: int, folds: int, seed: int) -> CrossValidation:
        """Means over all folds and repeats."""
        seen = samples * repeats
        return CrossValidation(
            drop=(self.worse - self.better) / seen,
            interval=paired_interval(self.worse / repeats, self.better / repeats, samples),
            worse=self.worse / repeats,
            better=self.better / repeats,
            below=self.below / (repeats * folds),
            base_alone=self.alone / (repeats * folds),
            cost=sum(self.cost) / seen,
            exit_rates=(),
            samples=samples,
            repeats=repeats,
            folds=folds,
            seed=seed,
        )
