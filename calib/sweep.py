"""The Pareto front of mean cost and accuracy over all thresholds of a cascade, from arrays alone.

With all exits but one fixed, one sort of the signals yields every threshold of the free exit at
once; that is exact. Two exits have one threshold, and nothing else is needed. With more exits the
earlier ones run over a grid of their values and the last free one is solved for each; where the
grid had to skip values, each threshold of each point is then solved again with the others fixed,
until nothing improves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.exit_table import CostModel, ExitTable, Point
from edge_runtime.errors import ConfigError

#: In arrays of thresholds: every sample that reaches the exit leaves, or the exit is pruned.
ALWAYS, NEVER = -math.inf, math.inf

# Work of one `sweep` by default: how often one exit is solved, so that about as many samples are
# looked at. Measured on one core of a small server, on synthetic tables: 450 samples with 3 exits
# take 20 ms and are solved exactly; 50,000 take 0.4 s, and cost at equal accuracy is then above
# that of a search 40 times as long by 0.04 % on average and by 0.2 % at most.
_SAMPLES_SEEN = 5_000_000
_FEWEST_SOLUTIONS, _MOST_SOLUTIONS = 100, 2_000


@dataclass(frozen=True)
class Front:
    """The best cascades: none of them is both dearer and no more accurate than another.

    Every row has at least one active early exit; the full model alone is kept apart, so that a
    choice can say what a cascade would gain or lose against it.

    Attributes:
        thresholds: Shape (P, E - 1), float32; `NEVER` where an exit is pruned, `ALWAYS` where it
            answers everything that reaches it.
        counts: Samples that leave at each exit, shape (P, E), int64.
        correct: Samples answered correctly, shape (P,), int64, strictly ascending.
        cost: Mean cost, shape (P,), float64, strictly ascending.
        base: The full model alone.
        lowest: Smallest value of the signal, the threshold of an exit that always answers.
        exact: Whether all thresholds were searched, so that no better cascade exists; False where
            a grid skipped values.
    """

    thresholds: NDArray[np.float32]
    counts: NDArray[np.int64]
    correct: NDArray[np.int64]
    cost: NDArray[np.float64]
    base: Point
    lowest: float
    exact: bool

    @property
    def accuracy(self) -> NDArray[np.float64]:
        """Share of samples answered correctly, shape (P,)."""
        return self.correct / sum(self.base.counts)

    @property
    def exit_rates(self) -> NDArray[np.float64]:
        """Share of samples that leave at each exit, shape (P, E)."""
        return self.counts / sum(self.base.counts)

    def point(self, row: int) -> Point:
        """One row of the front."""
        return Point(
            thresholds=_public(self.thresholds[row], self.lowest),
            counts=tuple(self.counts[row].tolist()),
            correct=int(self.correct[row]),
            cost=float(self.cost[row]),
        )


def sweep(table: ExitTable, costs: CostModel, solutions: int | None = None) -> Front:
    """Find the thresholds that are cheapest at each accuracy.

    Thresholds lie midway, in float32, between neighbouring distinct signals of the samples that
    reach the exit; samples of equal signal leave together. Two exits are solved exactly, and more
    exits too where the values of the earlier ones fit into the grid (`Front.exact`).

    Args:
        table: The data.
        costs: The cost of leaving at each exit.
        solutions: How many times one exit may be solved with the others fixed, once for the grid
            and as many times again for the polish; >= 1. By default 2,000, fewer for more than
            2,500 samples, at least 100.

    Returns:
        The Pareto front of mean cost and accuracy.

    Raises:
        ConfigError: The cost model has another number of exits than the table, or no solutions are
            allowed.

    Reference:
        Lebovitz et al., Efficient Inference With Model Cascades, TMLR 2023, section 3
        ("Evaluation") and, for three models, section 4.1.
    """
    if len(costs.exits) != table.exits:
        raise ConfigError("exits of the cost model", got=len(costs.exits), expected=table.exits)
    if solutions is not None and solutions < 1:
        raise ConfigError("solutions of a sweep", got=solutions, expected=">= 1")
    if solutions is None:
        affordable = _SAMPLES_SEEN // table.samples
        solutions = min(max(affordable, _FEWEST_SOLUTIONS), _MOST_SOLUTIONS)
    search = _Search(table, costs)
    free = table.exits - 1
    per_exit = int(solutions ** (1 / (free - 1)) + 1e-9) if free > 1 else 1
    exact = search.grid(0, [NEVER] * free, per_exit)
    if not exact:
        search.polish(solutions)
    return search.front(exact)


def measure(table: ExitTable, costs: CostModel, thresholds: Sequence[float | None]) -> Point:
    """What given thresholds do on a table.

    Args:
        table: The data.
        costs: The cost of leaving at each exit.
        thresholds: Per exit but the last; None where the exit is pruned.

    Returns:
        The same figures as `sweep` reports for a point of its front.
    """
    at = table.leave_at(thresholds)
    counts = np.bincount(at, minlength=table.exits)
    active = [k for k, threshold in enumerate(thresholds) if threshold is not None]
    return Point(
        thresholds=tuple(thresholds),
        counts=tuple(counts.tolist()),
        correct=int(table.correct[np.arange(table.samples), at].sum()),
        cost=float(_mean_cost(counts, active, costs.leaving(active))),
    )


def _mean_cost(
    counts: NDArray[np.int64], active: Sequence[int], leaving: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean cost of a sample from counts of shape (..., E), shape (...,)."""
    paid = counts[..., [*active, -1]] * leaving
    mean: NDArray[np.float64] = paid.sum(axis=-1) / counts.sum(axis=-1)
    return mean


def _public(thresholds: NDArray[np.float32], lowest: float) -> tuple[float | None, ...]:
    """Thresholds as a policy takes them."""
    named = {NEVER: None, ALWAYS: lowest}
    return tuple(named.get(t, t) for t in thresholds.tolist())


def midway(upper: NDArray[np.float32], lower: NDArray[np.float32]) -> NDArray[np.float32]:
    """The float32 midway between neighbours lower < upper, above `lower`."""
    middle = ((upper.astype(np.float64) + lower) / 2).astype(np.float32)
    return np.where(middle > lower, middle, upper)


class _Search:
    """The sorted table, and the cheapest cascade found so far for each number of right answers."""

    def __init__(self, table: ExitTable, costs: CostModel) -> None:
        self._table = table
        self._costs = costs
        self._signals = np.ascontiguousarray(table.signals.T)
        self._correct = np.ascontiguousarray(table.correct.T).astype(np.int8)
        # From the most to the least confident; equal signals are neighbours.
        self._order = np.argsort(-self._signals, axis=1)
        self._paid: dict[tuple[int, ...], NDArray[np.float64]] = {}
        rows = table.samples + 1
        self._best_cost = np.full(rows, np.inf)
        self._best_thresholds = np.full((rows, table.exits - 1), NEVER, np.float32)
        self._best_counts = np.zeros((rows, table.exits), np.int64)

    def grid(self, k: int, thresholds: list[float], per_exit: int) -> bool:
        """Solve each exit as the last active one, for combinations of values of those before it.

        Args:
            k: The exit to vary; the ones before it are fixed.
            thresholds: Of all early exits; `NEVER` from k on.
            per_exit: Number of values that are tried at an exit before the last, `NEVER` included.

        Returns:
            Whether no value was skipped.
        """
        self.solve(k, thresholds)
        if k == len(thresholds) - 1:
            return True
        rows = self._reaching(k, self._flow(k, thresholds)[0])
        signal = self._signals[k, rows]
        ends = np.flatnonzero(signal[:-1] != signal[1:])
        exact = len(ends) < per_exit
        if not exact:
            # Evenly spread, without the two ends.
            spread = np.linspace(0, len(ends) - 1, per_exit + 1)[1:-1]
            ends = ends[np.unique(spread.round().astype(int))]
        for value in (NEVER, *midway(signal[ends], signal[ends + 1]).tolist()):
            exact &= self.grid(k + 1, [*thresholds[:k], value, *thresholds[k + 1 :]], per_exit)
        return exact

    def polish(self, solutions: int) -> None:
        """Solve each exit of each point of the front again, until nothing improves."""
        solved: set[tuple[int, tuple[float, ...]]] = set()
        while solutions > 0:
            points = self._best_thresholds[self._front_rows()].tolist()
            tasks: dict[tuple[int, tuple[float, ...]], list[float]] = {}
            for k in range(self._table.exits - 1):
                tasks |= {(k, (*point[:k], *point[k + 1 :])): point for point in points}
            keys = [key for key in tasks if key not in solved]
            if not keys:
                return
            # Where they are too many: evenly spread over the exits and along the front.
            spread = np.linspace(0, len(keys) - 1, min(len(keys), solutions))
            for i in spread.round().astype(int):
                self.prune(keys[i][0], tasks[keys[i]])
                self.solve(keys[i][0], tasks[keys[i]])
                solved.add(keys[i])
            solutions -= len(spread)

    def solve(self, k: int, thresholds: Sequence[float]) -> None:
        """Keep the best cascades over all thresholds of exit k, with those of the others fixed."""
        at, right = self._flow(k, thresholds)
        rows = self._reaching(k, at)
        if not len(rows):
            return
        # One candidate per group of equal signals: everybody up to its end leaves here.
        signal = self._signals[k, rows]
        ends = np.flatnonzero(signal[:-1] != signal[1:])
        gain = np.cumsum(self._correct[k, rows] - right[rows], dtype=np.int64)
        # The more leave here the cheaper. So from the cheapest on, where everybody leaves, only a
        # gain above all gains before it is of interest.
        ends = np.concatenate((ends, [len(rows) - 1]))[::-1]
        best = np.maximum.accumulate(gain[ends])
        ends = ends[np.concatenate(([True], best[1:] > best[:-1]))]

        counts = np.empty((len(ends), self._table.exits), np.int64)
        counts[:] = np.bincount(at, minlength=self._table.exits)
        counts[:, k] = ends + 1
        for later in range(k + 1, len(thresholds)):
            if thresholds[later] < NEVER:
                counts[:, later] -= np.cumsum(at[rows] == later)[ends]
        counts[:, -1] += self._table.samples - counts.sum(axis=1)

        correct = right.sum(dtype=np.int64) + gain[ends]
        better = self._better(counts, correct, [*thresholds[:k], ALWAYS, *thresholds[k + 1 :]])
        if len(better):
            ends, at_ends = ends[better], correct[better]
            block = np.array([thresholds] * len(ends))
            block[:, k] = midway(signal[ends], signal[np.minimum(ends + 1, len(rows) - 1)])
            # Nothing passes an exit that always answers.
            everybody = ends == len(rows) - 1
            block[everybody, k] = ALWAYS
            block[everybody, k + 1 :] = NEVER
            self._best_thresholds[at_ends] = block

    def prune(self, k: int, thresholds: Sequence[float]) -> None:
        """Keep the cascade without exit k, with the thresholds of the other exits fixed."""
        at, right = self._flow(k, thresholds)
        counts = np.bincount(at, minlength=self._table.exits)[None]
        correct = right.sum(dtype=np.int64)[None]
        pruned = [*thresholds[:k], NEVER, *thresholds[k + 1 :]]
        if min(pruned) < NEVER and len(self._better(counts, correct, pruned)):
            self._best_thresholds[correct] = pruned

    def front(self, exact: bool) -> Front:
        """The Pareto front of everything that was kept."""
        rows = self._front_rows()
        return Front(
            thresholds=self._best_thresholds[rows],
            counts=self._best_counts[rows],
            correct=rows.astype(np.int64),
            cost=self._best_cost[rows],
            base=measure(self._table, self._costs, [None] * (self._table.exits - 1)),
            lowest=self._table.bounds[0],
            exact=exact,
        )

    def _flow(
        self, k: int, thresholds: Sequence[float]
    ) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
        """Where each sample leaves with exit k pruned, and whether it is right there; (N,) each."""
        at = np.full(self._table.samples, self._table.exits - 1, np.int8)
        right = self._correct[-1].copy()
        for j in reversed(range(len(thresholds))):
            if j != k and thresholds[j] < NEVER:
                leaves = self._signals[j] >= np.float32(thresholds[j])
                at[leaves] = j
                np.copyto(right, self._correct[j], where=leaves)
        return at, right

    def _reaching(self, k: int, at: NDArray[np.int8]) -> NDArray[np.intp]:
        """The samples that reach exit k, from the most to the least confident there."""
        order: NDArray[np.intp] = self._order[k]
        return order[at[order] > k]

    def _better(
        self, counts: NDArray[np.int64], correct: NDArray[np.int64], thresholds: Sequence[float]
    ) -> NDArray[np.intp]:
        """Keep the cascades that are cheaper than any known one with as many right answers.

        Args:
            counts: Samples that leave at each exit, shape (P, E).
            correct: Right answers, shape (P,), each number once.
            thresholds: Say which exits are active in all of them.

        Returns:
            Rows of those that are better; their thresholds are left to the caller to keep.
        """
        active = tuple(k for k, threshold in enumerate(thresholds) if threshold < NEVER)
        if active not in self._paid:
            self._paid[active] = self._costs.leaving(active)
        cost = _mean_cost(counts, active, self._paid[active])
        better = np.flatnonzero(cost < self._best_cost[correct])
        self._best_cost[correct[better]] = cost[better]
        self._best_counts[correct[better]] = counts[better]
        return better

    def _front_rows(self) -> NDArray[np.intp]:
        """Numbers of right answers that no cheaper cascade reaches or exceeds, ascending."""
        cheapest_above = np.minimum.accumulate(self._best_cost[::-1])[::-1]
        return np.flatnonzero(self._best_cost < np.append(cheapest_above[1:], np.inf))
