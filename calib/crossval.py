"""What a choice of thresholds is worth on data that it has not seen: repeated cross-validation.

Thresholds that lose nothing on the data they were picked on lose something on new data about as
often as not. So the whole procedure, search included, is run on some folds and judged on the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import CostModel, ExitTable
from calib.sweep import measure
from edge_runtime.errors import CalibrationError, ConfigError

#: A procedure: thresholds from a table, one per exit but the last, None where the exit is pruned.
Procedure = Callable[[ExitTable], Sequence[float | None]]
#: The tables of the rows to choose on and of the rows held out, whose signals may depend on the
#: former: temperatures that are fitted to them.
Split = Callable[[NDArray[np.intp], NDArray[np.intp]], tuple[ExitTable, ExitTable]]

_LEVEL = 0.95


@dataclass(frozen=True)
class CrossValidation:
    """Held-out figures of a procedure that chooses thresholds.

    Attributes:
        drop: Mean accuracy of the full model minus that of the cascade, on held-out samples; a
            fraction, positive where the cascade is worse.
        interval: 95 % interval for the drop on all the data there could be (see
            `paired_interval`) of the thresholds that the procedure chooses on the whole table.
        worse: Held-out samples that only the full model answers correctly, mean over the repeats.
        better: Held-out samples that only the cascade answers correctly, mean over the repeats.
        below: Share of held-out folds in which the cascade is less accurate than the full model;
            ties, frequent in small folds, don't count.
        base_alone: Share of folds for which the procedure chose the full model alone.
        cost: Mean cost on held-out samples, in the unit of the cost model.
        exit_rates: Share of held-out samples that leave at each exit.
        samples: Number of samples; each is held out once per repeat.
        repeats: Number of partitions into folds.
        folds: Number of folds of each partition.
        seed: Seed of the partitions.
    """

    drop: float
    interval: tuple[float, float]
    worse: float
    better: float
    below: float
    base_alone: float
    cost: float
    exit_rates: tuple[float, ...]
    samples: int
    repeats: int
    folds: int
    seed: int

    def interval_on(self, samples: int) -> tuple[float, float]:
        """95 % interval for the drop that will be *measured* on new data.

        It is wider than `interval` by the noise of the new sample, and is the one to hold a test
        set against.

        Args:
            samples: Size of the new data set.
        """
        return paired_interval(self.worse, self.better, self.samples, new=samples)


def paired_interval(
    worse: float, better: float, samples: int, new: float = math.inf
) -> tuple[float, float]:
    """95 % interval for the difference of two accuracies on the same samples.

    The Wald interval after one sample was added to each kind of discordant pair. It has a width
    where no pair is discordant, about +- 2.8 / samples; a bootstrap over the samples has none there
    and claims certainty from having seen nothing.

    With counts from `cross_validate` it is meant for the true drop of the thresholds that are
    chosen on all the data. Its variance is therefore that of *one* choice: the mean over repeats
    and folds varies less, but it is the choice's own true drop that has to be covered. It is no
    guarantee: it assumes that new data are like the old, and ignores that folds share their
    training data.

    Measured on seven synthetic populations with 2 or 3 exits, 100 to 2,000 samples and the three
    goals of `calib.thresholds` (60 to 200 draws each): the true drop is covered in 91 to 100 % of
    the draws, and the drop on a second sample of the same size, by the interval with `new`, in 92
    to 100 %. A bootstrap over the samples of differences averaged over the repeats covered them in
    77 to 98 % and 60 to 91 %.

    Args:
        worse: Samples that only the first model answers correctly; a mean over repeats may be
            fractional.
        better: Samples that only the second model answers correctly.
        samples: Number of all samples.
        new: Number of samples of new data on which the difference will be measured; by default it
            is the difference on infinitely many.

    Returns:
        Lower and upper end, in [-1, 1]; positive where the first model is more accurate.

    Reference:
        Bonett and Price, Adjusted Wald Confidence Interval for a Difference of Binomial Proportions
        Based on Paired Data, J. Educ. Behav. Stat. 37(4), 2012; recommended by Fagerland, Lydersen
        and Laake, Statistics in Medicine 33(16), 2014. On what cross-validation estimates: Bates,
        Hastie and Tibshirani, JASA 119, 2024.
    """
    first, second = (worse + 1) / (samples + 2), (better + 1) / (samples + 2)
    variance = first + second - (first - second) ** 2
    z = NormalDist().inv_cdf((1 + _LEVEL) / 2)
    half = z * math.sqrt(variance * (1 / (samples + 2) + 1 / new))
    return max(first - second - half, -1.0), min(first - second + half, 1.0)


def cross_validate(
    table: ExitTable,
    costs: CostModel,
    choose: Procedure,
    repeats: int = 10,
    folds: int = 5,
    seed: int = 0,
    split: Split | None = None,
) -> CrossValidation:
    """Choose thresholds on all folds but one, judge them on that one; every fold, several times.

    Args:
        table: The data.
        costs: The cost of leaving at each exit.
        choose: The procedure, run `repeats * folds` times on `1 - 1 / folds` of the samples.
        repeats: Number of random partitions, >= 1.
        folds: Number of folds, >= 2.
        seed: Seed of the partitions; the result depends on nothing else that is random.
        split: Makes both tables of a partition; by default they are rows of `table`.

    Returns:
        Figures of held-out samples only.

    Raises:
        CalibrationError: There are fewer than two samples per fold.
        ConfigError: Fewer than two folds or no repeat.
    """
    if folds < 2 or repeats < 1:
        raise ConfigError(
            "cross-validation",
            got=f"{folds} folds, {repeats} repeats",
            expected=">= 2 folds, >= 1 repeat",
        )
    if table.samples < 2 * folds:
        raise CalibrationError(
            f"samples for a cross-validation in {folds} folds",
            got=table.samples,
            expected=f">= {2 * folds}",
            remedy="Give more labelled data",
        )
    generator = np.random.default_rng(seed)
    worse = better = below = base_alone = 0
    total_cost = 0.0
    counts = np.zeros(table.exits, np.int64)
    for _ in range(repeats):
        fold_of = generator.permutation(np.arange(table.samples) % folds)
        for fold in range(folds):
            rows = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            training, unseen = split(*rows) if split else map(table.rows, rows)
            thresholds = choose(training)
            point = measure(unseen, costs, thresholds)
            cascade = unseen.correct[np.arange(unseen.samples), unseen.leave_at(thresholds)]
            base = unseen.correct[:, -1]
            worse += int((base & ~cascade).sum())
            better += int((cascade & ~base).sum())
            below += int(cascade.sum() < base.sum())
            base_alone += all(threshold is None for threshold in thresholds)
            total_cost += point.cost * unseen.samples
            counts += point.counts
    seen = repeats * table.samples
    return CrossValidation(
        drop=(worse - better) / seen,
        interval=paired_interval(worse / repeats, better / repeats, table.samples),
        worse=worse / repeats,
        better=better / repeats,
        below=below / (repeats * folds),
        base_alone=base_alone / (repeats * folds),
        cost=total_cost / seen,
        exit_rates=tuple((counts / seen).tolist()),
        samples=table.samples,
        repeats=repeats,
        folds=folds,
        seed=seed,
    )
