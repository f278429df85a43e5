"""What another precision does to the exits of a bundle, measured on labelled data.

Rounding moves the signals that thresholds are compared with, so variants are compared at unchanged
thresholds: which labels change, how far signals move, and who leaves elsewhere.

```
mixes = Mixes(bundle, data, console, open_scheduler, "max_softmax")
effects = stage_effects(mixes, "int8", {"early": 0.9})
effects[0].stages, effects[0].agreement_loss    # ("segment1",), 0.012: one label in 83 is another
```

Shares and drops are fractions: 0.01 is one point of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from calib.tables import JudgedTable, collect, judge
from edge_runtime.confidence import Metric
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.scheduler import Scheduler

#: Opens the bundle at an operating point; the caller closes what it gets.
Open = Callable[[OperatingPoint], Scheduler]
#: Thresholds per exit but the last, in the order of the cascade; None where the exit is pruned.
Thresholds = tuple[float | None, ...]


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
        self.temperatures = dict(temperatures or {})
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
            self._known[key] = judge(table, self.metric, self.temperatures)
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
    def suffering(self) -> ExitEffect:
        """The exit that gives most samples another label; of equal ones, the signal decides."""
        return min(self.exits, key=lambda exit_: (exit_.agreement, -exit_.signal_shift))

    @property
    def agreement_loss(self) -> float:
        """Share of samples that the exit which suffers most labels differently."""
        return 1 - self.suffering.agreement


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
    found = []
    for group in groups:
        after = mixes.judged(dict.fromkeys(group, precision))
        found.append(StageEffect(group, precision, *compare(mixes, after, thresholds)))
    return tuple(found)


def compare(
    mixes: Mixes, after: JudgedTable, thresholds: Mapping[str, float | None]
) -> tuple[tuple[ExitEffect, ...], float, float]:
    """Compare what the exits say on the same samples with what they say in the base.

    Args:
        mixes: Data, signal and base.
        after: What they say.
        thresholds: Exit name -> threshold at which both run.

    Returns:
        `exits`, `exit_agreement` and `accuracy_drop` of a `StageEffect`.
    """
    exits, before = mixes.exits, mixes.judged({})
    early = tuple(thresholds.get(name) for name in exits[:-1])
    rows = np.arange(len(before.truth))
    at = [table.exit_table.leave_at(early) for table in (before, after)]
    labels = [table.labels[rows, a] for table, a in zip((before, after), at, strict=True)]
    rates = [np.bincount(a, minlength=len(exits)) / len(rows) for a in at]
    drops = before.correct.mean(axis=0) - after.correct.mean(axis=0)
    agreements = (before.labels == after.labels).mean(axis=0)
    shifts = np.abs(after.signals.astype(np.float64) - before.signals).mean(axis=0)
    columns = zip(exits, drops, agreements, shifts, rates[1] - rates[0], strict=True)
    return (
        tuple(ExitEffect(name, *map(float, values)) for name, *values in columns),
        float(((at[0] == at[1]) & (labels[0] == labels[1])).mean()),
        float((labels[0] == before.truth).mean() - (labels[1] == after.truth).mean()),
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
