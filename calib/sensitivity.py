"""What another precision does to each stage of a bundle, and which stages should run at it.

The variants of a stage differ in two ways that no file shows: how fast they are on this device, and
what they do to the exits behind them. Both are measured. Rounding moves the signals that thresholds
are compared with, so thresholds that were chosen at one precision let other samples leave at
another: a choice of precisions is a choice of thresholds too.

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

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.crossval import CrossValidation, paired_interval
from calib.exit_table import CostModel, Point
from calib.sweep import Front, measure, sweep
from calib.tables import JudgedTable, collect, judge
from calib.thresholds import ByExit, Choice, Goal, choose
from edge_runtime.confidence import Metric, bounds
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import BackendError, CalibrationError, ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.prediction import Prediction
from edge_runtime.scheduler import Scheduler
from edge_runtime.timing import Clock, Ratio, ratio, warm_up

#: Opens the bundle at an operating point; the caller closes what it gets.
Open = Callable[[OperatingPoint], Scheduler]
#: Thresholds per exit but the last, in the order of the cascade; None where the exit is pruned.
Thresholds = tuple[float | None, ...]

#: Rounds in which both precisions are timed.
_ROUNDS = 400


class Mixes:
    """What every exit says at any mix of precisions; each mix is run on the data once.

    Args:
        bundle: The bundle.
        data: Labelled images.
        console: Shows progress.
        open_scheduler: Opens the bundle at an operating point.
        metric: The signal that exits are judged by.
        temperatures: Exit name -> temperature of its logits; 1 where absent.
        base: Stage name -> precision of the mix that others are compared with, for stages that
            do not run at their first variant.

    Raises:
        ConfigError: The bundle has one exit, or `base` names what it has not.
    """

    def __init__(
        self,
        bundle: Bundle,
        data: ImageDataset,
        console: Console,
        open_scheduler: Open,
        metric: Metric = "max_softmax",
        *,
        temperatures: Mapping[str, float] | None = None,
        base: Mapping[str, str] | None = None,
    ) -> None:
        if len(bundle.cascade.exits) < 2:
            raise ConfigError(
                f"the bundle {bundle.path} has one exit: there are no thresholds to choose"
            )
        self.bundle = bundle
        self.data = data
        self.console = console
        self.metric: Metric = metric
        self.base = dict(base or {})
        self._open = open_scheduler
        self._temperatures = dict(temperatures or {})
        self._known: dict[tuple[str, ...], JudgedTable] = {}

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits."""
        return tuple(exit_.name for exit_ in self.bundle.cascade.exits)

    def judged(self, variants: Mapping[str, str]) -> JudgedTable:
        """What the exits say when some stages run at other precisions than in the base.

        Args:
            variants: Stage name -> precision.
        """
        mix = {**self.base, **variants}
        names = [record.name for record in self.bundle.manifest.stages]
        key = tuple(self.bundle.precision(name, mix) for name in names)
        if key not in self._known:
            everything = OperatingPoint.all_exits(self.bundle.cascade, variants=mix)
            with self._open(everything) as scheduler:
                table = collect(scheduler, self.data, self.console)
            self._known[key] = judge(table, self.metric, self._temperatures)
        return self._known[key]


@dataclass(frozen=True, slots=True)
class ExitEffect:
    """What other precisions do to one exit.

    Attributes:
        exit: Its name.
        accuracy_drop: Accuracy that it loses on all samples, in [-1, 1]; negative where it gains.
        agreement: Share of samples that it gives the same label, in [0, 1].
        signal_shift: Mean absolute change of its signal.
        rate_shift: Share of samples that leave here at the old thresholds, minus the share before.
    """

    exit: str
    accuracy_drop: float
    agreement: float
    signal_shift: float
    rate_shift: float


@dataclass(frozen=True, slots=True)
class StageEffect:
    """What it does to a cascade that stages run at another precision, thresholds unchanged.

    Attributes:
        stages: Which: one, or several for their joint effect.
        precision: The precision.
        exits: One entry per exit, in order.
        exit_agreement: Share of samples that leave at the same exit with the same label.
        accuracy_drop: Accuracy that the cascade loses, in [-1, 1].
    """

    stages: tuple[str, ...]
    precision: str
    exits: tuple[ExitEffect, ...]
    exit_agreement: float
    accuracy_drop: float

    @property
    def agreement_loss(self) -> float:
        """Share of samples that the exit which suffers most labels differently."""
        return 1 - min(exit_.agreement for exit_ in self.exits)


def stage_effects(
    mixes: Mixes,
    precision: str,
    thresholds: Mapping[str, float | None],
    *,
    stages: Sequence[str] | None = None,
) -> tuple[StageEffect, ...]:
    """Run each stage alone at a precision, and then all of them, against the base.

    Args:
        mixes: Bundle, data, signal and base.
        precision: The precision.
        thresholds: Exit name -> threshold at which the base runs.
        stages: Which stages; None for all that have the variant.

    Returns:
        One effect per stage, in order of execution, and as the last one the joint effect; that is
        left out where there is one stage.

    Raises:
        ConfigError: See `stages_with`.
    """
    names = stages_with(mixes.bundle, precision, mixes.base, stages)
    groups = [(name,) for name in names] + ([names] if len(names) > 1 else [])
    early = tuple(thresholds.get(name) for name in mixes.exits[:-1])
    before = mixes.judged({})
    return tuple(
        _effect(mixes.exits, group, precision, before, mixes.judged(_at(group, precision)), early)
        for group in groups
    )


def _effect(
    exits: tuple[str, ...],
    stages: tuple[str, ...],
    precision: str,
    before: JudgedTable,
    after: JudgedTable,
    early: Thresholds,
) -> StageEffect:
    rows = np.arange(len(before.truth))
    at = [table.exit_table.leave_at(early) for table in (before, after)]
    labels = [table.labels[rows, a] for table, a in zip((before, after), at, strict=True)]
    rates = [np.bincount(a, minlength=len(exits)) / len(rows) for a in at]
    drops = before.correct.mean(axis=0) - after.correct.mean(axis=0)
    agreements = (before.labels == after.labels).mean(axis=0)
    shifts = np.abs(after.signals.astype(np.float64) - before.signals).mean(axis=0)
    columns = zip(exits, drops, agreements, shifts, rates[1] - rates[0], strict=True)
    return StageEffect(
        stages,
        precision,
        tuple(ExitEffect(name, *map(float, values)) for name, *values in columns),
        exit_agreement=float(((at[0] == at[1]) & (labels[0] == labels[1])).mean()),
        accuracy_drop=float((labels[0] == before.truth).mean() - (labels[1] == after.truth).mean()),
    )


def stages_with(
    bundle: Bundle, precision: str, base: Mapping[str, str], stages: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Stages that can run at a precision and do not in the base, in order of execution.

    Args:
        bundle: The bundle.
        precision: The precision.
        base: Stage name -> precision, for stages that do not run at their first variant.
        stages: Consider these only; None for all that an exit needs.

    Raises:
        ConfigError: There is none, or one of `stages` does not exist, has no such variant, runs
            at it already or serves no exit.
    """
    remedy = _how_to_make(bundle, precision)
    needed = bundle.cascade.plan(range(len(bundle.cascade.exits))).stages
    for name in stages or ():
        if precision not in bundle.record(name).variants:
            raise ConfigError(f"stage {name!r} has no variant {precision!r}", remedy=remedy)
        if bundle.precision(name, base) == precision:
            raise ConfigError(f"stage {name!r} runs at {precision} already")
        if name not in [stage.name for stage in needed]:
            raise ConfigError(f"stage {name!r} serves no exit: it never runs")
    found = tuple(
        stage.name
        for stage in needed
        if precision in bundle.record(stage.name).variants
        and bundle.precision(stage.name, base) != precision
        and (stages is None or stage.name in stages)
    )
    if not found:
        have = {p for stage in needed for p in bundle.record(stage.name).variants}
        if precision in have:
            raise ConfigError(
                f"every stage of the bundle {bundle.path} that can runs at {precision} already",
                remedy="Compare with a point of the default precision",
            )
        raise ConfigError(
            f"no stage of the bundle {bundle.path} has a variant {precision!r}", remedy=remedy
        )
    return found


def _how_to_make(bundle: Bundle, precision: str) -> str:
    command = f"quantize {bundle.path} --data DIR"
    if precision != "int8":
        command = f"convert {bundle.path} --precision {precision}"
    return f"Make it with: edge-runtime {command} --out NEW"


@dataclass(frozen=True)
class VariantTimes:
    """What stages take at two precisions on this device, measured in turn.

    Attributes:
        precision: The precision that was compared with the base.
        base: Stage name -> its precision in the base, of every stage that an exit needs.
        seconds: Stage name -> precision -> median seconds for one image.
        ratios: Stage name -> time at the precision over that in the base, with its interval; of
            the stages that were compared.
        decide_s: Median seconds per exit that go to deciding.
        rounds: Number of images that each was timed on.
    """

    precision: str
    base: Mapping[str, str]
    seconds: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Ratio]
    decide_s: float = 0.0
    rounds: int = 0

    @property
    def faster(self) -> tuple[str, ...]:
        """Stages whose whole interval is below 1, in order of execution."""
        return tuple(name for name, one in self.ratios.items() if one.high < 1)

    @property
    def not_faster(self) -> dict[str, str]:
        """Why the other stages are not worth another precision."""
        found = {}
        for name, one in self.ratios.items():
            if one.low > 1:
                found[name] = f"slower here: {one} of its time"
            elif not one.high < 1:
                found[name] = f"not clearly faster here: {one} of its time"
        return found

    def saved(self, stage: str) -> float:
        """Seconds that a stage saves whenever it runs."""
        return self.seconds[stage][self.base[stage]] - self.seconds[stage][self.precision]

    def stage_seconds(self, variants: Mapping[str, str]) -> dict[str, float]:
        """Seconds of each stage when some run at other precisions than in the base."""
        return {
            name: times[variants.get(name, self.base[name])] for name, times in self.seconds.items()
        }


def variant_times(
    bundle: Bundle,
    precision: str,
    data: ImageDataset,
    console: Console,
    open_scheduler: Open,
    *,
    base: Mapping[str, str] | None = None,
    stages: Sequence[str] | None = None,
    rounds: int = _ROUNDS,
    clock: Clock = time.perf_counter,
) -> VariantTimes:
    """Time every stage at two precisions, image by image in turn.

    Both cascades are open at once and run all their exits, so each stage finds the caches as the
    other left them.

    Args:
        bundle: The bundle.
        precision: The precision to compare with the base.
        data: Images.
        console: Shows progress.
        open_scheduler: Opens the bundle at an operating point.
        base: Stage name -> precision, for stages that do not run at their first variant.
        stages: Which stages to compare; None for all that have the variant.
        rounds: How often each is run.
        clock: Monotonic seconds, for the warm-up.

    Raises:
        ConfigError: See `stages_with`.
        BackendError: The backend does not know what a stage takes.
    """
    base = dict(base or {})
    compared = stages_with(bundle, precision, base, stages)
    images = [data.image(i) for i in range(min(len(data), rounds))]
    mixes = (base, {**base, **_at(compared, precision)})
    points = [OperatingPoint.all_exits(bundle.cascade, variants=mix) for mix in mixes]
    with open_scheduler(points[0]) as a, open_scheduler(points[1]) as b:
        some = itertools.cycle(images)

        def each() -> tuple[Prediction, ...]:
            image = next(some)[None]
            return (*a.classify(image), *b.classify(image))

        warm_up(each, clock=clock)
        names = [stage.name for stage in a.plan.stages]
        took = np.empty((2, len(names), rounds))
        rest = np.empty(rounds)
        for i in console.progress(range(rounds), "timing both precisions"):
            for which, prediction in enumerate(each()):
                took[which, :, i] = [run.duration_s for run in prediction.trace.stages]
                if which == 0:
                    rest[i] = prediction.latency_s - took[which, :, i].sum()
        exits = len(a.exits)
    if np.isnan(took).any():
        raise BackendError("the backend does not tell how long a stage took")
    medians = np.median(took, axis=2)
    own = {name: bundle.precision(name, base) for name in names}
    seconds = {name: {own[name]: float(medians[0, i])} for i, name in enumerate(names)}
    for name in compared:
        seconds[name][precision] = float(medians[1, names.index(name)])
    return VariantTimes(
        precision,
        own,
        seconds,
        {name: ratio(took[1, names.index(name)], took[0, names.index(name)]) for name in compared},
        decide_s=max(0.0, float(np.median(rest)) / exits),
        rounds=rounds,
    )


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
    repeats: int = 10,
    folds: int = 5,
    seed: int = 0,
) -> PrecisionChoice:
    """Run at another precision every stage that is faster there, as far as accuracy allows.

    It begins with all variants that are clearly faster, and chooses thresholds anew. While the
    cascade loses more than the budget, or is no cheaper than the base that is as accurate, the
    stage whose variant changes most labels for the time that it saves goes back.

    Args:
        mixes: Bundle, data, signal and base.
        times: What each variant takes.
        effects: What each stage alone does; others are ignored.
        before: The base with its thresholds.
        goal: What thresholds are chosen for, against the full model at the same precisions.
        budget: Accuracy that the cascade may lose against `before` on the data, a fraction.
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
    chosen = list(times.faster)
    for name in chosen:
        if name not in alone:
            raise CalibrationError(f"there is no effect of stage {name!r}")
    left = dict(times.not_faster)
    front = sweep(mixes.judged({}).exit_table, _costs(mixes, times, {}))
    choice: Choice | None = None
    while chosen:
        variants = _at(chosen, times.precision)
        table, costs = mixes.judged(variants).exit_table, _costs(mixes, times, variants)
        choice = choose(table, costs, goal, repeats=0)
        trouble = _trouble(before.point, choice.point, _rival(front, choice.point), budget)
        if not trouble:
            choice = choose(table, costs, goal, repeats=repeats, folds=folds, seed=seed)
            break
        worst = max(chosen, key=lambda name: (_harm(alone[name], times), -times.saved(name)))
        chosen.remove(worst)
        left[worst] = (
            f"{trouble}, and it changes {alone[worst].agreement_loss:.1%} of an exit's labels to "
            f"save {times.saved(worst) * 1e3:.3g} ms"
        )
        choice = None
    variants = _at(chosen, times.precision)
    after = before if choice is None else _figures(choice)
    rival = None if choice is None else _rival(front, choice.point)
    loss, interval = _loss(
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
        loss=loss,
        interval=interval,
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


def _harm(effect: StageEffect, times: VariantTimes) -> float:
    """Labels that a stage's variant changes, per second that it saves."""
    return effect.agreement_loss / times.saved(effect.stages[0])


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
        mixes.bundle.cascade, times.stage_seconds(variants), times.decide_s
    )


def _at(stages: Sequence[str], precision: str) -> dict[str, str]:
    return dict.fromkeys(stages, precision)
