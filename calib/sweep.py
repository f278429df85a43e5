"""The Pareto front of mean cost and accuracy over all thresholds of a cascade, from arrays alone.

With all exits but one fixed, one sort of the signals yields every threshold of the free exit at
once; that is exact. Two exits have one threshold, and nothing else is needed. With more exits the
earlier ones run over a grid of their values and the last free one is solved for each; where the
grid had to skip values, each threshold of each point is then solved again with the others fixed,
until nothing improves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime import schema
from edge_runtime.cascade import Cascade
from edge_runtime.errors import CalibrationError, ConfigError

#: In arrays of thresholds: every sample that reaches the exit leaves, or the exit is pruned.
ALWAYS, NEVER = -math.inf, math.inf

# Work of one `sweep` by default: how often one exit is solved, so that about as many samples are
# looked at. Measured on one core of a small server, on synthetic tables: 450 samples with 3 exits
# take 20 ms and are solved exactly; 50,000 take 0.4 s, and cost at equal accuracy is then above
# that of a search 40 times as long by 0.04 % on average and by 0.2 % at most.
_SAMPLES_SEEN = 5_000_000
_FEWEST_SOLUTIONS, _MOST_SOLUTIONS = 100, 2_000


@dataclass(frozen=True)
class ExitTable:
    """What every exit said about every sample of the data that thresholds are chosen on.

    Attributes:
        signals: Confidence at each exit but the last, shape (N, E - 1), float32, finite.
        correct: Whether each exit is right, shape (N, E), bool; the last exit is the full model.
        bounds: Smallest and largest value of the signal: `confidence.bounds(metric, classes)`.

    Raises:
        CalibrationError: From the constructor, for no sample, fewer than two exits, other shapes
            or dtypes, or a signal that is not finite or not within the bounds.
    """

    signals: NDArray[np.float32]
    correct: NDArray[np.bool_]
    bounds: tuple[float, float]

    def __post_init__(self) -> None:
        """Check the arrays once."""
        arrays = (("signals", self.signals, "float32"), ("correct", self.correct, "bool"))
        for name, array, dtype in arrays:
            if array.ndim != 2 or array.dtype != dtype:
                raise CalibrationError(
                    f"{name} of an exit table",
                    got=f"{array.ndim} axes of {array.dtype}",
                    expected=f"2 axes (samples, exits) of {dtype}",
                )
        samples, exits = self.correct.shape
        if samples < 1 or exits < 2 or self.signals.shape != (samples, exits - 1):
            raise CalibrationError(
                "an exit table",
                got=f"signals {self.signals.shape}, correct {self.correct.shape}",
                expected="signals (N, E - 1), correct (N, E) with N >= 1 samples and E >= 2 exits",
            )
        low, high = np.float32(self.bounds[0]), np.float32(self.bounds[1])
        bad = ~(np.isfinite(self.signals) & (self.signals >= low) & (self.signals <= high))
        if bad.any():
            sample, exit_ = np.argwhere(bad)[0]
            raise CalibrationError(
                f"the signal of sample {sample} at exit {exit_}",
                got=self.signals[sample, exit_],
                expected=f"a finite number from {low} to {high}",
                remedy="Signals and bounds must be of one metric",
            )

    @property
    def samples(self) -> int:
        """N."""
        return len(self.correct)

    @property
    def exits(self) -> int:
        """E."""
        return len(self.correct[0])

    def rows(self, index: NDArray[np.intp]) -> ExitTable:
        """The table of some of the samples."""
        return ExitTable(self.signals[index], self.correct[index], self.bounds)

    def leave_at(self, thresholds: Sequence[float | None]) -> NDArray[np.intp]:
        """Index of the exit at which each sample leaves, shape (N,).

        Args:
            thresholds: Per exit but the last; None where the exit is pruned.
        """
        at = np.full(self.samples, self.exits - 1)
        for k in reversed(range(self.exits - 1)):
            threshold = thresholds[k]
            if threshold is not None:
                at[self.signals[:, k] >= np.float32(threshold)] = k
        return at


@dataclass(frozen=True)
class CostModel:
    """Cost of leaving at an exit, given the early exits that are evaluated.

    An exit needs parts (stages, or whole models). A part is paid for once, when the first evaluated
    exit needs it; the parts that no evaluated exit needs are pruned and cost nothing.

    Attributes:
        exits: Names of the exits, in the order of the cascade.
        needs: Per exit, names of all parts that its logits depend on.
        part_cost: Cost of each part, in seconds or any other unit; >= 0.
        decide_cost: Cost of judging one exit, in the same unit; paid at every evaluated exit,
            the last one included; >= 0.

    Raises:
        ConfigError: From the constructor, for a part without a cost, a cost that is negative or not
            finite, or a full model that costs nothing.
    """

    exits: tuple[str, ...]
    needs: tuple[frozenset[str], ...]
    part_cost: Mapping[str, float]
    decide_cost: float = 0.0

    def __post_init__(self) -> None:
        """Refuse costs that mean nothing."""
        if len(self.exits) != len(self.needs):
            raise ConfigError(
                "exits of a cost model", got=len(self.needs), expected=len(self.exits)
            )
        for part in sorted(frozenset().union(*self.needs)):
            if part not in self.part_cost:
                raise ConfigError(f"no cost for {part!r}", remedy="Every stage needs one")
        for name, cost in (*self.part_cost.items(), ("a decision", self.decide_cost)):
            if not (math.isfinite(cost) and cost >= 0):
                raise ConfigError(f"cost of {name!r}", got=cost, expected="a finite number >= 0")
        if not self.base > 0:
            raise ConfigError("cost of the full model", got=self.base, expected="> 0")

    @classmethod
    def from_stages(
        cls, cascade: Cascade, stage_cost: Mapping[str, float], decide_cost: float = 0.0
    ) -> CostModel:
        """The cost model of a cascade of stages.

        Args:
            cascade: Its `plan` says which stages each exit needs.
            stage_cost: Stage name -> cost of one sample, in seconds or any other unit.
            decide_cost: See `CostModel`.

        Raises:
            ConfigError: As the constructor, and for a cost of a stage that the cascade lacks.
        """
        names = [stage.name for stage in cascade.stages]
        for name in stage_cost:
            if name not in names:
                raise ConfigError(
                    f"a cost names the stage {name!r}, which the cascade lacks",
                    remedy=schema.nearest(name, names),
                )
        needs = [
            frozenset(stage.name for stage in cascade.plan([k]).stages)
            for k in range(len(cascade.exits))
        ]
        exits = tuple(exit_.name for exit_ in cascade.exits)
        return cls(exits, tuple(needs), dict(stage_cost), decide_cost)

    @classmethod
    def from_models(cls, cost: Mapping[str, float]) -> CostModel:
        """The cost model of independent models, each an exit, in the order of the mapping."""
        return cls(tuple(cost), tuple(frozenset([name]) for name in cost), dict(cost))

    @property
    def base(self) -> float:
        """Cost of the full model alone: the last exit with all others pruned."""
        return float(self.leaving(())[0])

    def leaving(self, active: Sequence[int]) -> NDArray[np.float64]:
        """Cost of leaving at each evaluated exit.

        What is paid up to an exit does not depend on the exits after it.

        Args:
            active: Indices of the evaluated early exits, ascending.

        Returns:
            Costs for the active exits and, as the last entry, for the last exit; shape
            (len(active) + 1,), ascending.
        """
        costs = []
        parts: frozenset[str] = frozenset()
        for evaluated, k in enumerate((*active, len(self.exits) - 1), start=1):
            parts |= self.needs[k]
            paid = [self.part_cost[part] for part in parts]
            costs.append(math.fsum([*paid, evaluated * self.decide_cost]))
        return np.array(costs)


@dataclass(frozen=True)
class Point:
    """What thresholds do on a table.

    Attributes:
        thresholds: Per exit but the last, exactly representable in float32; None where the exit is
            pruned, the lower bound of the signal where it answers everything that reaches it.
        counts: Number of samples that leave at each exit.
        correct: Number of samples that are answered correctly.
        cost: Mean cost of a sample, in the unit of the cost model.
    """

    thresholds: tuple[float | None, ...]
    counts: tuple[int, ...]
    correct: int
    cost: float

    @property
    def accuracy(self) -> float:
        """Share of samples that are answered correctly."""
        return self.correct / sum(self.counts)

    @property
    def exit_rates(self) -> tuple[float, ...]:
        """Share of samples that leave at each exit."""
        return tuple(count / sum(self.counts) for count in self.counts)


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


def _midway(upper: NDArray[np.float32], lower: NDArray[np.float32]) -> NDArray[np.float32]:
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
        for value in (NEVER, *_midway(signal[ends], signal[ends + 1]).tolist()):
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
            block[:, k] = _midway(signal[ends], signal[np.minimum(ends + 1, len(rows) - 1)])
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
