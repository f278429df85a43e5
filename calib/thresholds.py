"""Choosing one point from the front: no loss, a bounded drop of accuracy, or a cost budget.

```
table = ExitTable(signals, correct, confidence.bounds(metric, classes))
costs = CostModel.from_stages(cascade, seconds_per_stage)
choice = choose(table, costs, AccuracyDrop(0.01))
choice.thresholds               # {"saver": 0.8731, "middle": None}
choice.cross_validation.drop    # on samples that the choice has not seen
pays(choice).text
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from calib.crossval import CrossValidation, Split, cross_validate
from calib.exit_table import CostModel, ExitTable, Point
from calib.sweep import Front, sweep
from edge_runtime.errors import CalibrationError, ConfigError


class Goal(Protocol):
    """What is wanted of a point; its text completes "the best choice for ..."."""

    def pick(
        self, correct: NDArray[np.int64], cost: NDArray[np.float64], base: Point
    ) -> int | None:
        """Row of the best candidate, the first of equals; None where none is admissible.

        Args:
            correct: Right answers of each candidate, shape (P,).
            cost: Mean cost of each candidate, shape (P,).
            base: The full model alone.
        """
        ...


@dataclass(frozen=True)
class AccuracyDrop:
    """Lowest cost with an accuracy of at least that of the full model minus `drop`.

    Attributes:
        drop: Fraction, 0.01 is one point of accuracy; in [0, 1].

    Raises:
        ConfigError: From the constructor, for another drop.
    """

    drop: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 <= self.drop <= 1:
            raise ConfigError("accuracy drop", got=self.drop, expected="a fraction from 0 to 1")

    def __str__(self) -> str:
        return f"an accuracy drop of at most {100 * self.drop:g} points"

    def pick(
        self, correct: NDArray[np.int64], cost: NDArray[np.float64], base: Point
    ) -> int | None:
        """The cheapest that is accurate enough, of equals the most accurate."""
        # A drop of 0.07 of 100 samples is 7 of them, whatever 0.07 * 100 rounds to.
        lost = self.drop * sum(base.counts) + 1e-6
        return _first(correct >= base.correct - lost, (cost, -correct))


@dataclass(frozen=True)
class ZeroLoss:
    """Lowest cost with an accuracy of at least that of the full model."""

    def __str__(self) -> str:
        return "no loss of accuracy"

    def pick(
        self, correct: NDArray[np.int64], cost: NDArray[np.float64], base: Point
    ) -> int | None:
        """As `AccuracyDrop` with a drop of 0."""
        return AccuracyDrop(0).pick(correct, cost, base)


@dataclass(frozen=True)
class CostBudget:
    """Highest accuracy with a mean cost of at most `cost`.

    Attributes:
        cost: In the unit of the cost model; > 0.

    Raises:
        ConfigError: From the constructor, for another cost.
    """

    cost: float

    def __post_init__(self) -> None:
        """Check the range."""
        if not self.cost > 0:
            raise ConfigError("cost budget", got=self.cost, expected="> 0")

    def __str__(self) -> str:
        return f"a mean cost of at most {self.cost:g}"

    def pick(
        self, correct: NDArray[np.int64], cost: NDArray[np.float64], base: Point
    ) -> int | None:
        """The most accurate that is cheap enough, of equals the cheapest."""
        # The mean of equal costs may differ from them in the last bit.
        return _first(cost <= self.cost * (1 + 1e-12), (-correct, cost))


@dataclass(frozen=True)
class ByExit:
    """Figures of thresholds, by the names of the exits.

    Attributes:
        exits: Names of the exits.
        point: Thresholds, samples that leave at each exit, right answers, mean cost.
        base: The full model alone, on the same data.
    """

    exits: tuple[str, ...]
    point: Point
    base: Point

    @property
    def thresholds(self) -> dict[str, float | None]:
        """Exit name -> threshold, None where the exit is pruned; without the last exit."""
        return dict(zip(self.exits[:-1], self.point.thresholds, strict=True))

    @property
    def exit_rates(self) -> dict[str, float]:
        """Exit name -> share of samples that leave there."""
        return dict(zip(self.exits, self.point.exit_rates, strict=True))

    @property
    def base_alone(self) -> bool:
        """Whether no early exit is active."""
        return all(threshold is None for threshold in self.point.thresholds)

    @property
    def in_sample(self) -> dict[str, Any]:
        """What an operating point records of the samples it was chosen on; times in seconds."""
        return {
            "accuracy": self.point.accuracy,
            "base_accuracy": self.base.accuracy,
            "exit_rates": self.exit_rates,
            "mean_s": self.point.cost,
            "base_s": self.base.cost,
        }


@dataclass(frozen=True)
class Choice(ByExit):
    """A chosen point with all its figures, on the data that it was chosen on.

    Attributes:
        goal: What was asked for.
        best_cascade: The best point with at least one early exit; `point` itself unless the base
            alone was chosen, None where no cascade meets the goal.
        exact: Whether all thresholds were searched (`sweep.Front.exact`).
        cross_validation: The figures to trust; None where it was not asked for. Where a cascade was
            chosen, they are of the procedure that chooses the best cascade, also in folds that
            would prefer the base alone.
    """

    goal: Goal
    best_cascade: Point | None
    exact: bool
    cross_validation: CrossValidation | None

    @property
    def in_sample(self) -> dict[str, Any]:
        """The same, and whether the search was exact."""
        return {**super().in_sample, "exact": self.exact}


@dataclass(frozen=True)
class Verdict:
    """Whether a cascade is worth having, against the full model alone.

    Attributes:
        pays: Whether the choice costs less than the base.
        saved: Share of the base's mean cost that the choice saves; negative where it costs more.
        cascade_saved: The same of the best point with an early exit, None where none is admissible.
        cascade_drop: Accuracy that this point loses against the base, a fraction, or None.
        text: The verdict in a sentence or two.
    """

    pays: bool
    saved: float
    cascade_saved: float | None
    cascade_drop: float | None
    text: str


def choose(
    table: ExitTable,
    costs: CostModel,
    goal: Goal,
    *,
    repeats: int = 10,
    folds: int = 5,
    seed: int = 0,
    split: Split | None = None,
) -> Choice:
    """Choose thresholds for a goal, and cross-validate the choosing.

    The full model alone is among the choices, and wins where no cascade is better.

    Args:
        table: The data to choose on.
        costs: The cost of leaving at each exit.
        goal: `ZeroLoss()`, `AccuracyDrop(0.01)`, `CostBudget(0.002)` or another `Goal`.
        repeats: See `cross_validate`; 0 for none.
        folds: See `cross_validate`.
        seed: See `cross_validate`.
        split: See `cross_validate`; needed where signals depend on what was fitted to `table`.

    Returns:
        The point with its figures.

    Raises:
        CalibrationError: No choice meets the goal, or there is too little data to cross-validate.
        ConfigError: As `sweep` and `cross_validate`.

    Reference:
        Lebovitz et al., Efficient Inference With Model Cascades, TMLR 2023, section 3
        ("Threshold selection").
    """
    front = sweep(table, costs)
    point, best_cascade = _pick(front, goal)

    def procedure(part: ExitTable) -> tuple[float | None, ...]:
        best, cascade = _pick(sweep(part, costs), goal)
        return (best if cascade is None else cascade).thresholds

    def base_alone(_: ExitTable) -> tuple[float | None, ...]:
        return front.base.thresholds

    # Where a cascade barely pays, some folds prefer the base alone, whose drop is none: a mean over
    # both would be the drop of neither. With 5,000 CIFAR-10 images and a drop of 0.5 points, the
    # interval of the mean covered what was measured on 5,000 others in 64 % of 50 splits.
    chosen = base_alone if point is front.base else procedure

    return Choice(
        goal=goal,
        exits=costs.exits,
        point=point,
        base=front.base,
        best_cascade=best_cascade,
        exact=front.exact,
        cross_validation=(
            cross_validate(table, costs, chosen, repeats, folds, seed, split) if repeats else None
        ),
    )


def pays(choice: Choice) -> Verdict:
    """Say plainly what a choice saves against the base alone, or why nothing is saved.

    The figures are those of the data that the choice was made on; the text adds the held-out ones.
    """
    base, cascade = choice.base, choice.best_cascade

    def saved(point: Point) -> float:
        return 1 - point.cost / base.cost

    def drop(point: Point) -> float:
        return base.accuracy - point.accuracy

    gain = saved(choice.point)
    if not choice.base_alone:
        text = (
            f"The cascade {'pays' if gain > 0 else 'does not pay'}: it "
            f"{_cost_change(gain)} and {_accuracy_change(drop(choice.point))}."
        )
        held_out = choice.cross_validation
        if held_out is not None:
            low, high = held_out.interval
            text += (
                f" On samples that thresholds were not chosen on, it "
                f"{_cost_change(1 - held_out.cost / base.cost)} and "
                f"{_accuracy_change(held_out.drop)} (drop of {100 * low:.2f} to {100 * high:.2f} "
                "points, 95% interval)."
            )
    else:
        text = f"The cascade does not pay: the base alone is the best choice for {choice.goal}. "
        if cascade is None:
            text += "No cascade with an early exit achieves it."
        else:
            text += (
                f"The best cascade with an early exit {_cost_change(saved(cascade))} and "
                f"{_accuracy_change(drop(cascade))}."
            )
    return Verdict(
        pays=gain > 0,
        saved=gain,
        cascade_saved=None if cascade is None else saved(cascade),
        cascade_drop=None if cascade is None else drop(cascade),
        text=text,
    )


def _pick(front: Front, goal: Goal) -> tuple[Point, Point | None]:
    """The best of everything, and the best with an early exit."""
    base = front.base
    # The base comes first, so that it wins where a cascade is only as good.
    row = goal.pick(
        np.concatenate(([base.correct], front.correct)),
        np.concatenate(([base.cost], front.cost)),
        base,
    )
    if row is None:
        cheapest = min([base, front.point(0)], key=lambda point: point.cost)
        raise CalibrationError(
            f"nothing achieves {goal}",
            remedy=f"The cheapest choice costs {cheapest.cost:.6g} on average, at an accuracy of "
            f"{cheapest.accuracy:.2%}",
        )
    cascade = goal.pick(front.correct, front.cost, base)
    best_cascade = None if cascade is None else front.point(cascade)
    return base if row == 0 else front.point(row - 1), best_cascade


def _first(
    admissible: NDArray[np.bool_], keys: tuple[NDArray[np.generic], NDArray[np.generic]]
) -> int | None:
    """The admissible row with the smallest keys, the first key first."""
    rows = np.flatnonzero(admissible)
    if not len(rows):
        return None
    return int(rows[np.lexsort((keys[1][rows], keys[0][rows]))[0]])


def _cost_change(saved: float) -> str:
    """A share of the base's cost, saved or lost, in words."""
    if saved > 0:
        return f"saves {saved:.1%} of the base's mean cost"
    return f"costs {-saved:.1%} more than the base"


def _accuracy_change(drop: float) -> str:
    """A drop of accuracy in words."""
    if drop == 0:
        return "is as accurate"
    return f"is {100 * abs(drop):.2f} points {'less' if drop > 0 else 'more'} accurate"
