"""What the thresholds of a saver and its base are worth on samples that they were not chosen on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.search import CascadePoint
from calib.cascade_search.signals import Judgement
from calib.crossval import CrossValidation, paired_interval
from calib.saver_selection import POINTS, PairCurve, operating_points, replay
from calib.side_by_side import Stopped


@dataclass(frozen=True)
class Repeats:
    """How pairs are cross-validated on the training table.

    Attributes:
        repeats: Number of random partitions; 0 for none.
        folds: Number of folds, >= 2.
        seed: Seed of the partitions.
    """

    repeats: int = 10
    folds: int = 5
    seed: int = 0


def cross_validate_pair(
    models: Mapping[str, Judgement],
    pair: tuple[str, str],
    costs: Mapping[str, float],
    lowest: float,
    repeats: Repeats,
    stop: threading.Event | None = None,
) -> dict[str, CrossValidation]:
    """Choose all operating points of a pair on some folds, judge them on the rest.

    Args:
        models: What saver and base say of the samples.
        pair: Saver and base.
        costs: Model -> cost of a sample, > 0.
        lowest: The smallest value of the signal.
        repeats: How often, with at least one repeat.
        stop: Given up where it is set.

    Returns:
        Name of an operating point -> held-out figures against the base. `base_alone` is the share
        of folds in which nobody was let go; the saver is paid for all the same.
    """
    samples = len(models[pair[0]].signal)
    generator = np.random.default_rng(repeats.seed)
    tallies = {name: _Tally() for name in POINTS}
    for _ in range(repeats.repeats):
        fold_of = generator.permutation(np.arange(samples) % repeats.folds)
        for fold in range(repeats.folds):
            if stop is not None and stop.is_set():
                raise Stopped
            seen = _rows(models, pair, np.flatnonzero(fold_of != fold))
            unseen = _rows(models, pair, np.flatnonzero(fold_of == fold))
            curve = PairCurve.of(seen, pair, costs, lowest)
            for name, point in operating_points(curve).items():
                tallies[name].add(*replay(unseen, pair, curve.costs, point.thresholds[0]))
    return {name: tally.figures(samples, repeats) for name, tally in tallies.items()}


@dataclass
class _Tally:
    """Counts over the folds of one operating point."""

    worse: int = 0
    better: int = 0
    below: int = 0
    nobody: int = 0
    leaving: int = 0
    cost: float = 0.0

    def add(self, point: CascadePoint, worse: int, better: int) -> None:
        self.worse += worse
        self.better += better
        self.below += worse > better
        self.nobody += point.thresholds[0] is None
        self.leaving += point.counts[0]
        self.cost += point.cost * sum(point.counts)

    def figures(self, samples: int, how: Repeats) -> CrossValidation:
        seen, repeats = samples * how.repeats, how.repeats
        return CrossValidation(
            drop=(self.worse - self.better) / seen,
            interval=paired_interval(self.worse / repeats, self.better / repeats, samples),
            worse=self.worse / repeats,
            better=self.better / repeats,
            below=self.below / (repeats * how.folds),
            base_alone=self.nobody / (repeats * how.folds),
            cost=self.cost / seen,
            exit_rates=(self.leaving / seen, 1 - self.leaving / seen),
            samples=samples,
            repeats=repeats,
            folds=how.folds,
            seed=how.seed,
        )


def _rows(
    models: Mapping[str, Judgement], pair: tuple[str, str], index: NDArray[np.intp]
) -> dict[str, Judgement]:
    return {
        name: Judgement(models[name].signal[index], models[name].correct[index]) for name in pair
    }
