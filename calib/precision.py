"""Which stages of a bundle run at another precision, and with which thresholds.

A choice of precisions is a choice of thresholds too: those that were chosen at one precision let
other samples leave at another.

```
mixes = Mixes(bundle, data, console, open_scheduler, "max_softmax")
times = variant_times(bundle, "int8", data, console, open_scheduler)
before = default_choice(mixes, times, ZeroLoss())
effects = stage_effects(mixes, "int8", before.thresholds)
found = choose_precisions(mixes, times, effects, before, ZeroLoss(), budget=0.01)
found.variants                  # {"segment1": "int8"}
found.left                      # {"head1": "not clearly faster here: ..."}
found.after.thresholds          # chosen anew
```

Shares and drops are fractions: 0.01 is one point of accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.crossval import CrossValidation, paired_interval
from calib.exit_table import CostModel, Point
from calib.sensitivity import Mixes, StageEffect, Thresholds
from calib.sweep import Front, measure, sweep
from calib.tables import JudgedTable
from calib.thresholds import ByExit, Choice, Goal, choose
from calib.variant_times import VariantTimes
from edge_runtime.confidence import bounds
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint


@dataclass(frozen=True)
class Figures(ByExit):
    """What a cascade does on the data at one mix of precisions and thresholds; costs in seconds.

    Attributes:
        held_out: The same procedure on samples that thresholds were not chosen on; None where
            thresholds were given, or cross-validation was not asked for.
    """

    held_out: CrossValidation | None = None

    @property
    def held_out_accuracy(self) -> float | None:
        """Accuracy on held-out samples: each is held out once per repeat."""
        return None if self.held_out is None else self.base.accuracy - self.held_out.drop

    def plain(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "accuracy": self.point.accuracy,
            "base_accuracy": self.base.accuracy,
            "held_out_accuracy": self.held_out_accuracy,
            "mean_s": self.point.cost,
            "base_s": self.base.cost,
            "exit_rates": self.exit_rates,
            "thresholds": self.thresholds,
        }


@dataclass(frozen=True)
class PrecisionChoice:
    """Which stages run at another precision, with the thresholds that go with it.

    Attributes:
        precision: The precision.
        variants: Stage name -> precision, of the stages that run at it; may be empty.
        left: Stage name -> why it does not, of the other stages that have the variant.
        budget: Accuracy that may be lost, a fraction.
        before: All stages as in the base, with the base's thresholds.
        forgotten: The chosen variants with the base's thresholds: what happens if nobody chooses
            them anew.
        after: The chosen variants with thresholds of their own.
        rival: The base with the cheapest thresholds that are as accurate as `after`; None where
            there are none, or no variant was chosen. Thresholds that may lose something make a
            cascade cheaper at any precision, so this is what a precision has to beat.
        choice: The choice of these; None where no variant was chosen.
        loss: Accuracy that `after` loses against `before`, a fraction; negative where it gains.
        interval: 95 % interval of the loss on all the data there could be.
        at_any_speed: Whether times did not matter.
    """

    precision: str
    variants: Mapping[str, str]
    left: Mapping[str, str]
    budget: float
    before: Figures
    forgotten: Figures
    after: Figures
    rival: Figures | None
    choice: Choice | None
    loss: float
    interval: tuple[float, float]
    at_any_speed: bool = False


def default_choice(
    mixes: Mixes,
    times: VariantTimes,
    goal: Goal,
    *,
    repeats: int = 10,
    folds: int = 5,
    seed: int = 0,
) -> Figures:
    """Choose thresholds for the base; see `calib.thresholds.choose`."""
    table = mixes.judged({}).exit_table
    costs = _costs(mixes, times, {})
    choice = choose(table, costs, goal, repeats=repeats, folds=folds, seed=seed)
    return _figures(choice)


def at_thresholds(
    mixes: Mixes,
    times: VariantTimes,
    variants: Mapping[str, str],
    thresholds: Mapping[str, float | None],
) -> Figures:
    """What given thresholds do at a mix of precisions."""
    table = mixes.judged(variants).exit_table
    costs = _costs(mixes, times, variants)
    early = tuple(thresholds.get(name) for name in mixes.exits[:-1])
    pruned = (None,) * len(early)
    return Figures(
        mixes.exits, measure(table, costs, early), measure(table, costs, pruned), held_out=None
    )


def usable_thresholds(point: OperatingPoint, bundle: Bundle) -> dict[str, float | None]:
    """Thresholds of a point that can fire, None for the others; without the last exit.

    Raises:
        ConfigError: Its policy does not compare one signal with one threshold.
    """
    if point.policy not in ("threshold", "never"):
        raise ConfigError(
            f"operating point {point.name!r}: policy",
            got=point.policy,
            expected="threshold",
            remedy="Thresholds can be chosen for no other: name another point, or none",
        )
    point.policy_for(bundle.cascade)
    highest = bounds(point.metric, len(bundle.cascade.classes))[1]
    found: dict[str, float | None] = {}
    for exit_ in bundle.cascade.exits[:-1]:
        value = None if point.policy == "never" else point.thresholds.get(exit_.name)
        found[exit_.name] = None if value is None or value > highest else value
    return found


def choose_precisions(
    mixes: Mixes,
    times: VariantTimes,
    effects: Sequence[StageEffect],
    before: Figures,
    goal: Goal,
    *,
    budget: float,
    at_any_speed: bool = False,
    repeats: int = 10,
    folds: int = 5,
    seed: int = 0,
) -> PrecisionChoice:
    """Run at another precision every stage that is faster there, as far as accuracy allows.

    It begins with all variants that are clearly faster, and chooses thresholds anew. While the
    cascade loses more than the budget, or is no cheaper than the base that is as accurate, the
    stage whose variant changes most labels for the time that it saves goes back.

    At any speed it begins with all variants, and accuracy alone decides: the stage that changes
    most labels goes back first.

    Args:
        mixes: Bundle, data, signal and base.
        times: What each variant takes.
        effects: What each stage alone does; others are ignored.
        before: The base with its thresholds.
        goal: What thresholds are chosen for, against the full model at the same precisions.
        budget: Accuracy that the cascade may lose against `before` on the data, a fraction.
        at_any_speed: Whether the times don't matter, since they are not those of the device that
            the choice is for.
        repeats: Of the cross-validation of the final choice; 0 for none.
        folds: See `calib.crossval.cross_validate`.
        seed: See `calib.crossval.cross_validate`.

    Returns:
        The choice; the same input gives the same one.

    Raises:
        ConfigError: The budget is negative or no number.
        CalibrationError: There is no effect of a stage that is faster, or too little data.
    """
    if not (math.isfinite(budget) and budget >= 0):
        raise ConfigError("accuracy budget", got=budget, expected="a number >= 0")
    alone = {effect.stages[0]: effect for effect in effects if len(effect.stages) == 1}
    chosen = list(times.ratios if at_any_speed else times.faster)
    for name in chosen:
        if name not in alone:
            raise CalibrationError(f"there is no effect of stage {name!r}")
    left = {} if at_any_speed else dict(times.not_faster)
    front = sweep(mixes.judged({}).exit_table, _costs(mixes, times, {}))
    choice: Choice | None = None
    while chosen:
        variants = dict.fromkeys(chosen, times.precision)
        table, costs = mixes.judged(variants).exit_table, _costs(mixes, times, variants)
        choice = choose(table, costs, goal, repeats=0)
        rival = None if at_any_speed else _rival(front, choice.point)
        trouble = _trouble(before.point, choice.point, rival, budget)
        if not trouble:
            choice = choose(table, costs, goal, repeats=repeats, folds=folds, seed=seed)
            break
        worst = _worst(chosen, alone, times, at_any_speed)
        chosen.remove(worst)
        gain = "" if at_any_speed else f" to save {times.saved(worst) * 1e3:.3g} ms"
        loss = f"{alone[worst].agreement_loss:.1%} of an exit's labels"
        left[worst] = f"{trouble}, and it changes {loss}{gain}"
        choice = None
    variants = dict.fromkeys(chosen, times.precision)
    after = before if choice is None else _figures(choice)
    rival = None if choice is None else _rival(front, choice.point)
    lost, interval = _loss(
        mixes.judged({}), before.point.thresholds, mixes.judged(variants), after.point.thresholds
    )
    return PrecisionChoice(
        precision=times.precision,
        variants=variants,
        left={name: left[name] for name in times.ratios if name in left},
        budget=budget,
        before=before,
        forgotten=at_thresholds(mixes, times, variants, before.thresholds),
        after=after,
        rival=None if rival is None else Figures(mixes.exits, rival, front.base),
        choice=choice,
        loss=lost,
        interval=interval,
        at_any_speed=at_any_speed,
    )


def _trouble(before: Point, after: Point, rival: Point | None, budget: float) -> str:
    """Why a mix is not acceptable; empty if it is."""
    lost = before.correct - after.correct
    # A budget of 0.07 of 100 samples is 7 of them, whatever 0.07 * 100 rounds to.
    if lost > budget * sum(before.counts) + 1e-6:
        return (
            f"with it the cascade loses {100 * lost / sum(before.counts):.2f} points, "
            f"{100 * budget:g} are allowed"
        )
    if rival is not None and rival.cost <= after.cost:
        return "with it the cascade is no cheaper than one without that is as accurate"
    return ""


def _rival(front: Front, after: Point) -> Point | None:
    """The cheapest point of the base that is as accurate as another one."""
    rows = np.flatnonzero(front.correct >= after.correct)
    points = [front.point(int(rows[0]))] if len(rows) else []
    if front.base.correct >= after.correct:
        points.append(front.base)
    return min(points, key=lambda point: point.cost, default=None)


def _worst(
    chosen: Sequence[str],
    alone: Mapping[str, StageEffect],
    times: VariantTimes,
    at_any_speed: bool,
) -> str:
    """The stage whose variant changes most labels, for the time that it saves if that counts."""

    def harm(name: str) -> tuple[float, float]:
        saved = times.saved(name)
        return alone[name].agreement_loss / (1 if at_any_speed else saved), -saved

    return max(chosen, key=harm)


def _loss(
    before: JudgedTable, old: Thresholds, after: JudgedTable, new: Thresholds
) -> tuple[float, tuple[float, float]]:
    """Accuracy lost from one cascade to another on the same samples, with its interval."""
    was, is_ = _right(before, old), _right(after, new)
    worse, better = int((was & ~is_).sum()), int((is_ & ~was).sum())
    return (worse - better) / len(was), paired_interval(worse, better, len(was))


def _right(table: JudgedTable, thresholds: Thresholds) -> NDArray[np.bool_]:
    """Whether the cascade is right on each sample."""
    at = table.exit_table.leave_at(thresholds)
    right: NDArray[np.bool_] = table.correct[np.arange(len(at)), at]
    return right


def _figures(choice: Choice) -> Figures:
    return Figures(choice.exits, choice.point, choice.base, choice.cross_validation)


def _costs(mixes: Mixes, times: VariantTimes, variants: Mapping[str, str]) -> CostModel:
    return CostModel.from_stages(
        mixes.bundle.cascade, times.stage_seconds(variants), times.decide_s, times.frame_s
    )
