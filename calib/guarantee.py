"""Thresholds with a promise: with confidence 1 - delta the accuracy drop is at most epsilon.

```
table = ExitTable(signals, correct, confidence.bounds(metric, classes))
costs = CostModel.from_stages(cascade, seconds_per_stage)
certificate = certify(table, costs, Promise(epsilon=0.01, delta=0.05))
certificate.thresholds          # {"saver": 0.8731, "middle": 0.8731}
explain(certificate)            # in plain words
```

The samples of the table are taken for independent draws of what the cascade will see. The promise
is about the draw: of a hundred tables, at most 100 * delta lead to thresholds whose true drop, on
all that could be drawn, is above epsilon.

**Method.** All early exits that take part share one threshold, which sinks from where nobody leaves
to where everybody leaves at the first of them. At every value an exact test (`calib.paired_test`)
asks whether the drop is below epsilon, and the first value that fails ends the walk. The cheapest
of the values before it is chosen.

**Why it is valid.** Signals are float32 numbers, so the walk has a highest threshold t* whose true
drop is above epsilon. It belongs to the population and not to the data, so the test at t* is one
test, and passed with a probability of at most delta. Whoever chooses a threshold that breaks the
promise has walked past t*, and so passed it. Hence no correction for the number of thresholds is
due; that of all float32 numbers only those between the signals at hand are looked at changes
nothing, for in between the counts are the same; and the drop need not grow as the threshold sinks.
Thresholds at quantiles of the data would not do, for t* would then depend on the data; nor would
the front that `calib.sweep` finds on them.

Which exits take part may be learnt, and temperatures must be, from samples that are not tested:
to the tested ones the walk is then as good as fixed beforehand. That costs samples, so it is done
only where it pays. Exits that share all they compute with the full model cost little when nobody
leaves there; then all take part, and all samples are tested. Sharing a threshold loses little: on
three synthetic tables of 40,000 samples with 3 or 4 exits, and on the digits, the cheapest cascade
with a drop of 1 point is dearer by at most 1.2 % of the full model's cost than with a threshold of
its own for each exit.

Reference:
    Angelopoulos, Bates, Candes, Jordan and Lei, Learn then Test: Calibrating Predictive Algorithms
    to Achieve Risk Control, Annals of Applied Statistics 19(2), 2025 (arXiv 2110.01052): fixed
    sequence testing. Jazbec et al., Fast yet Safe: Early-Exiting with Risk Control, NeurIPS 2024:
    one threshold for all exits. Laufer-Goldshtein et al., Efficiently Controlling Multiple Risks
    with Pareto Testing, ICLR 2023: what is tested is learnt on other samples.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import CostModel, ExitTable
from calib.paired_test import PairedTest, fewest_samples, paired_test, samples_for
from calib.sweep import measure, midway
from calib.thresholds import ByExit
from edge_runtime.errors import CalibrationError, ConfigError

# Measured on five tables (four synthetic ones with 3 or 4 exits, 449 to 3,000 samples of them, and
# the digits; 150 draws each): shares of 10 to 30 % lead to mean costs within 3 % of the full
# model's. Learning costs up to 4 % where exits along one backbone are free, and gains 1 to 19 %
# where they are models of their own.
_LEARN_SHARE = 0.2
#: Learn which exits take part where all of them together make the full model dearer by more.
_DEAR = 0.1
#: Up to this many early exits every combination is tried, beyond it those of one, two and all.
_ALL_COMBINATIONS = 6


@dataclass(frozen=True)
class Promise:
    """What is to be promised.

    Attributes:
        epsilon: Largest drop of accuracy against the full model, a fraction in (0, 0.5).
        delta: Largest probability that the promise is broken, from 0.001 to below 0.5.

    Raises:
        ConfigError: From the constructor, for other values.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.epsilon < 0.5:
            raise ConfigError(
                "epsilon of a guarantee",
                got=self.epsilon,
                expected="a fraction above 0 and below 0.5",
                remedy="0.01 is one point of accuracy",
            )
        if not 0.001 <= self.delta < 0.5:
            raise ConfigError(
                "delta of a guarantee",
                got=self.delta,
                expected="a probability from 0.001 to below 0.5",
                remedy="0.05 is a confidence of 95 %",
            )

    def __str__(self) -> str:
        return (
            f"a drop of at most {100 * self.epsilon:g} points with "
            f"{100 * (1 - self.delta):g} % confidence"
        )


@dataclass(frozen=True)
class Certificate(ByExit):
    """Thresholds that a promise holds for, with the counts that show it.

    `point` and `base` are of the whole table. Without a cascade that both passed and is cheaper
    than the full model, `point` is the full model alone, for which any promise holds.

    Attributes:
        promise: What is promised.
        certified: Whether any threshold passed the test.
        taking_part: Names of the exits that share the threshold.
        tested: Number of samples that the test saw.
        learnt: Number of samples that were kept from it, to learn from.
        lost: Tested samples that only the full model has right.
        won: Tested samples that only the cascade has right.
        allowed: The most samples that might have been lost among as many disagreements.
        needed: About how many samples would do with a chance of 90 % for half of what the cheapest
            threshold saves that lost nothing on balance, if they disagree like these; None where
            the promise is certified, or none of those thresholds saves anything.
    """

    promise: Promise
    certified: bool
    taking_part: tuple[str, ...]
    tested: int
    learnt: int
    lost: int
    won: int
    allowed: int
    needed: int | None

    @property
    def record(self) -> dict[str, Any]:
        """What an operating point records of the promise."""
        names = ("certified", "taking_part", "tested", "learnt", "lost", "won", "allowed", "needed")
        return {**vars(self.promise), **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class _Walk:
    """One threshold for some exits, from the highest signal down.

    Attributes:
        active: Indices of the exits.
        signals: Distinct signals, descending: at step j every sample leaves that has signal j or
            a higher one at an active exit; shape (J,), float32.
        lost: Samples that only the full model has right, shape (J,), int64.
        won: Samples that only the cascade has right, shape (J,), int64.
        cost: Mean cost of a sample, shape (J,), float64.
    """

    active: tuple[int, ...]
    signals: NDArray[np.float32]
    lost: NDArray[np.int64]
    won: NDArray[np.int64]
    cost: NDArray[np.float64]

    def cheapest(self, admissible: NDArray[np.bool_], below: float) -> int | None:
        """The admissible step that costs least, None where none costs less than `below`."""
        costs = np.where(admissible, self.cost, np.inf)
        step = int(costs.argmin())
        return step if costs[step] < below else None

    def thresholds(self, step: int, table: ExitTable) -> list[float | None]:
        """Thresholds of all early exits at a step, midway to the next signal."""
        found: list[float | None] = [None] * (table.exits - 1)
        if step + 1 == len(self.signals):
            # Nobody passes the first of them.
            found[self.active[0]] = table.bounds[0]
            return found
        threshold = float(midway(self.signals[[step]], self.signals[[step + 1]])[0])
        for k in self.active:
            found[k] = threshold
        return found


def certify(
    table: ExitTable,
    costs: CostModel,
    promise: Promise,
    *,
    learn: NDArray[np.intp] | None = None,
    seed: int = 0,
) -> Certificate:
    """Choose the cheapest thresholds that a promise can be given for.

    Args:
        table: Samples drawn independently from what the cascade will see.
        costs: The cost of leaving at each exit; must not be fitted to the labels.
        promise: What is to be promised.
        learn: Rows that are not tested: those that signals' temperatures were fitted on, or an
            empty array for none. By default a random fifth where it pays to learn which exits take
            part, else none.
        seed: Seed of that fifth.

    Returns:
        The thresholds, or the full model alone, with what they were shown on.

    Raises:
        CalibrationError: No sample is left to test, or there are too many for `paired_test`.
        ConfigError: The cost model has another number of exits than the table, or `learn` is not
            rows of it.
    """
    if len(costs.exits) != table.exits:
        raise ConfigError("exits of the cost model", got=len(costs.exits), expected=table.exits)
    early = tuple(range(table.exits - 1))
    selects = len(early) > 1 and costs.leaving(early)[-1] > (1 + _DEAR) * costs.base
    if learn is None:
        share = learning_part(table.samples, seed) if selects else np.arange(0)
        # A test on too few shows nothing, however good the exits.
        left = table.samples - len(share)
        learn = share if left >= fewest_samples(promise.epsilon, promise.delta) else share[:0]
    tested = _others(table.samples, learn)
    learnt = table.samples - len(tested)
    active = early
    if selects and learnt:
        active = _cheapest_exits(table.rows(np.unique(learn)), costs, promise)
    seen = table.rows(tested)
    test = paired_test(seen.samples, promise.epsilon, promise.delta)
    walk = _walk(seen, costs, active)
    passed = np.logical_and.accumulate(test.passes(walk.lost, walk.won))
    step = walk.cheapest(passed, costs.base)
    none: list[float | None] = [None] * len(early)
    lost, won = (0, 0) if step is None else (int(walk.lost[step]), int(walk.won[step]))
    return Certificate(
        exits=costs.exits,
        point=measure(table, costs, none if step is None else walk.thresholds(step, table)),
        base=measure(table, costs, none),
        promise=promise,
        certified=bool(passed[0]),
        taking_part=tuple(costs.exits[k] for k in active),
        tested=seen.samples,
        learnt=learnt,
        lost=lost,
        won=won,
        allowed=int(test.allowed[lost + won]),
        needed=None if passed[0] else _needed(walk, costs, test),
    )


def learning_part(samples: int, seed: int) -> NDArray[np.intp]:
    """A random fifth of the rows of a table, to learn from what is then not tested."""
    rows = np.random.default_rng(seed).permutation(samples)
    return np.sort(rows[: int(samples * _LEARN_SHARE)])


def explain(certificate: Certificate, samples: str = "samples") -> str:
    """Say plainly what is promised, what showed it and what it assumes.

    Args:
        certificate: What was certified, or not.
        samples: What the samples are called, in the plural.
    """
    promise = certificate.promise
    points = f"{100 * promise.epsilon:g} point{'' if promise.epsilon == 0.01 else 's'}"
    confidence = f"{100 * (1 - promise.delta):g} % confidence"
    if not certificate.certified:
        return f"Nothing can be promised here: {_not_shown(certificate, points, samples)}"
    if certificate.base_alone:
        return (
            f"A drop of at most {points} can be promised with {confidence}, but no threshold that "
            "it holds for is cheaper than the full model: the full model alone is the choice."
        )
    kept = f" (and none of the {certificate.learnt} learnt from)" if certificate.learnt else ""
    return (
        f"With {confidence} the cascade is at most {points} less accurate than the full model on "
        f"new {samples}. Shown on {certificate.tested} {samples}{kept}: it lost "
        f"{certificate.lost} that the full model has right and won {certificate.won} that the full "
        "model has wrong.\n"
        f"This holds if new {samples} come from where these came (same camera, places, light and "
        f"classes, labels as good) and each of these was drawn by itself: frames of one video "
        f"count as one. Of other {samples} nothing is promised. At most {100 * promise.delta:g} in "
        f"100 such calibrations break their promise; one that is repeated until it succeeds "
        "promises nothing."
    )


def _not_shown(certificate: Certificate, points: str, samples: str) -> str:
    """Why nothing was certified, and what would help."""
    promise, tested = certificate.promise, certificate.tested
    fewest = fewest_samples(promise.epsilon, promise.delta)
    text = (
        f"{tested} {samples} do not show with {100 * (1 - promise.delta):g} % confidence that any "
        f"threshold loses at most {points}, so all go through the full model."
    )
    if tested < fewest:
        text += f" It takes at least {fewest}, even if none is lost."
    if certificate.needed is not None and certificate.needed > max(fewest, tested):
        text += (
            f" About {_rounded(certificate.needed)} would do for half of what the cascade could "
            "save, if they are like these."
        )
    if certificate.learnt:
        text += f" ({certificate.learnt} more were learnt from and can't be tested.)"
    return text


def _rounded(number: int) -> int:
    """Two digits of it: it is an estimate."""
    return int(float(f"{number:.1e}"))


def _others(samples: int, learn: NDArray[np.intp]) -> NDArray[np.intp]:
    """The rows that are not learnt from."""
    if not np.issubdtype(learn.dtype, np.integer) or np.any((learn < 0) | (learn >= samples)):
        raise ConfigError("rows to learn from", expected=f"whole numbers from 0 to {samples - 1}")
    others: NDArray[np.intp] = np.setdiff1d(np.arange(samples), learn)
    if not len(others):
        raise CalibrationError(f"all {samples} samples are learnt from: none is left to test")
    return others


def _needed(walk: _Walk, costs: CostModel, test: PairedTest) -> int | None:
    """See `Certificate.needed`."""
    kept = walk.lost <= walk.won
    cheapest = walk.cheapest(kept, costs.base)
    if cheapest is None:
        return None
    enough = kept & (walk.cost <= (walk.cost[cheapest] + costs.base) / 2)
    # The fewer disagreements the fewer samples; one of each kind more than were seen, for none
    # that was seen does not mean that there are none.
    disagreements = np.where(enough, walk.lost + walk.won, test.samples)
    step = int(disagreements.argmin())
    lost, won = ((count[step] + 1) / (test.samples + 2) for count in (walk.lost, walk.won))
    return samples_for(lost, won, test.epsilon, test.delta)


def _cheapest_exits(table: ExitTable, costs: CostModel, promise: Promise) -> tuple[int, ...]:
    """The exits that save most with one threshold, at half the promised drop on these samples."""
    best, cheapest = tuple(range(table.exits - 1)), math.inf
    for active in _combinations(table.exits - 1):
        walk = _walk(table, costs, active)
        kept = walk.lost - walk.won <= promise.epsilon / 2 * table.samples
        step = walk.cheapest(np.logical_and.accumulate(kept), cheapest)
        if step is not None:
            best, cheapest = active, float(walk.cost[step])
    return best


def _combinations(early: int) -> list[tuple[int, ...]]:
    """Exits that may share a threshold."""
    sizes: Sequence[int] = range(1, early + 1)
    if early > _ALL_COMBINATIONS:
        sizes = (1, 2, early)
    return [active for size in sizes for active in itertools.combinations(range(early), size)]


def _walk(table: ExitTable, costs: CostModel, active: tuple[int, ...]) -> _Walk:
    """What every threshold does that exits share.

    A sample leaves at exit k from the step at which its signal there is reached until that at
    which its signal at an exit before it is: each count is a sum of beginnings and ends.
    """
    signals = np.unique(table.signals[:, active])[::-1]
    steps, base = len(signals), table.correct[:, -1]
    lost, won = np.zeros(steps + 1, np.int64), np.zeros(steps + 1, np.int64)
    counts = np.zeros((steps + 1, len(active) + 1), np.int64)
    end = np.full(table.samples, steps)
    for i, k in enumerate(active):
        reached = steps - 1 - np.searchsorted(signals[::-1], table.signals[:, k])
        begin = np.minimum(reached, end)
        right = table.correct[:, k]
        for total, these in (
            (lost, base & ~right),
            (won, right & ~base),
            (counts[:, i], np.ones(table.samples, bool)),
        ):
            total += np.bincount(begin[these], minlength=steps + 1)
            total -= np.bincount(end[these], minlength=steps + 1)
        end = begin
    counts = np.cumsum(counts, axis=0)[:-1]
    counts[:, -1] = table.samples - counts.sum(axis=1)
    cost = (counts * costs.leaving(active)).sum(axis=1) / table.samples
    return _Walk(active, signals, np.cumsum(lost)[:-1], np.cumsum(won)[:-1], cost)
