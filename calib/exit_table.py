"""What thresholds are chosen from: signals and costs of every exit, and a point made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_runtime import schema
from edge_runtime.cascade import Cascade
from edge_runtime.errors import CalibrationError, ConfigError


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
        decide_cost: Cost of judging an exit, in the same unit, one for all or one per exit; paid
            at every evaluated exit, the last one included; >= 0.
        frame_cost: What every sample costs besides, wherever it leaves, in the same unit; >= 0.

    Raises:
        ConfigError: From the constructor, for a part without a cost, a cost that is negative or not
            finite, or a full model that costs nothing.
    """

    exits: tuple[str, ...]
    needs: tuple[frozenset[str], ...]
    part_cost: Mapping[str, float]
    decide_cost: float | tuple[float, ...] = 0.0
    frame_cost: float = 0.0

    def __post_init__(self) -> None:
        """Refuse costs that mean nothing."""
        if len(self.exits) != len(self.needs):
            raise ConfigError(
                "exits of a cost model", got=len(self.needs), expected=len(self.exits)
            )
        for part in sorted(frozenset().union(*self.needs)):
            if part not in self.part_cost:
                raise ConfigError(f"no cost for {part!r}", remedy="Every stage needs one")
        if len(self._deciding) != len(self.exits):
            raise ConfigError(
                "costs of decisions", got=len(self._deciding), expected=len(self.exits)
            )
        rest = [("a decision", cost) for cost in self._deciding]
        for name, cost in (*self.part_cost.items(), *rest, ("a frame", self.frame_cost)):
            if not (math.isfinite(cost) and cost >= 0):
                raise ConfigError(f"cost of {name!r}", got=cost, expected="a finite number >= 0")
        if not self.base > 0:
            raise ConfigError("cost of the full model", got=self.base, expected="> 0")

    @classmethod
    def from_stages(
        cls,
        cascade: Cascade,
        stage_cost: Mapping[str, float],
        decide_cost: float | tuple[float, ...] = 0.0,
        frame_cost: float = 0.0,
    ) -> CostModel:
        """The cost model of a cascade of stages.

        Args:
            cascade: Its `plan` says which stages each exit needs.
            stage_cost: Stage name -> cost of one sample, in seconds or any other unit.
            decide_cost: See `CostModel`.
            frame_cost: See `CostModel`.

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
        return cls(exits, tuple(needs), dict(stage_cost), decide_cost, frame_cost)

    @classmethod
    def from_models(cls, cost: Mapping[str, float]) -> CostModel:
        """The cost model of independent models, each an exit, in the order of the mapping."""
        return cls(tuple(cost), tuple(frozenset([name]) for name in cost), dict(cost))

    @property
    def _deciding(self) -> tuple[float, ...]:
        """Cost of judging each exit."""
        one = self.decide_cost
        return one if isinstance(one, tuple) else (one,) * len(self.exits)

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
        deciding: list[float] = []
        for k in (*active, len(self.exits) - 1):
            parts |= self.needs[k]
            deciding.append(self._deciding[k])
            paid = [self.part_cost[part] for part in parts]
            costs.append(math.fsum([*paid, *deciding, self.frame_cost]))
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
