"""A whole search, from tables and costs to operating points, by one method or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from calib.cascade_search.exits import Exits
from calib.cascade_search.held_out import held_out
from calib.cascade_search.improvement import Improvement, improvement
from calib.cascade_search.methods import Method, exits_of, signals_of
from calib.cascade_search.points import MAX_IMPROVEMENT, OperatingPoints, operating_points
from calib.cascade_search.search import SearchResult, cascades_of, in_order, search
from calib.cascade_search.shift import Shift, shifted
from calib.cascade_search.signals import JudgedModels, check_metrics, judge
from calib.crossval import CrossValidation
from calib.model_table import ModelTable
from calib.temperature import fit_in_blocks
from calib.time_left import time_left
from edge_runtime.console import Console
from edge_runtime.errors import ConfigError


@dataclass(frozen=True)
class Settings:
    """What is searched, and what is asked of it.

    Attributes:
        costs: Model -> cost of a sample, > 0.
        top: A model is right where the label is among so many of its largest logits: 1 or 5.
        longest: Number of models of the longest cascades: 2 or 3.
        stride: Every so many samples a first threshold of three models.
        budgets: Costs for which the most accurate point is wanted.
        ranges: Accuracy ranges, fractions, over which the improvement is averaged too.
        repeats: Times the cross-validation is repeated; 0 for none.
        folds: Its folds.
        seed: Its seed.
    """

    costs: Mapping[str, float]
    top: int = 1
    longest: int = 2
    stride: int = 10
    budgets: Sequence[float] = ()
    ranges: Sequence[tuple[float, float]] = ()
    repeats: int = 0
    folds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What came of one method.

    Attributes:
        method: The method.
        result: The front.
        improvement: Of the front against single models, over the whole range.
        averages: Accuracy range -> mean improvement over it.
        points: The operating points.
        held_out: Name of an operating point -> its cross-validated figures; empty without.
        shift: The same cascades on another table, None without one.
    """

    method: Method
    result: SearchResult
    improvement: Improvement
    averages: Mapping[tuple[float, float], float]
    points: OperatingPoints
    held_out: Mapping[str, CrossValidation]
    shift: Shift | None


@dataclass(frozen=True)
class _Judged:
    """A table with what its models say."""

    table: ModelTable
    models: JudgedModels


@dataclass
class Study:
    """Searches a table by one method after the other.

    Args:
        table: Predictions to choose on.
        methods: The methods that will be asked for.
        settings: What is searched.
        console: Shows progress.
        shift: Predictions of the same models on other samples, where what was chosen is evaluated.

    Attributes:
        temperatures: Model -> temperature, for scaled methods; without the models for which the
            table determines none, whose logits stay as they are.

    Raises:
        ConfigError: From the constructor: the table has one model, a method needs logits that the
            table lacks, or the tables differ in models or classes. From `prepare` and `run`: an
            array can't be read, a number in it is NaN or infinite, or a range has no accuracy of
            single models.
    """

    table: ModelTable
    methods: Sequence[Method]
    settings: Settings
    console: Console
    shift: ModelTable | None = None
    temperatures: dict[str, float] = field(default_factory=dict, init=False)
    _judged: list[_Judged] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Check what the headers of the tables tell."""
        if len(self.table.names) < 2:
            raise ConfigError(
                f"table {self.table.path}: models",
                got=f"one, {self.table.names[0]!r}",
                expected="at least 2",
            )
        if self.shift is not None:
            self.table.check_same_models(self.shift)
        for method in self.methods:
            method.check(self.table)
        check_metrics(self.table, signals_of(self.methods), self.settings.top)

    def prepare(self) -> None:
        """Read the tables: fit temperatures, and reduce logits to signals."""
        if any(method.scaled for method in self.methods):
            self._fit()
        for table in (self.table, self.shift):
            if table is None:
                continue
            with time_left(
                self.console, f"judging {table.path}", len(table.names), "models"
            ) as done:
                models = judge(
                    table,
                    signals_of(self.methods),
                    top=self.settings.top,
                    temperatures=self.temperatures,
                    judged=done,
                )
            self._judged.append(_Judged(table, models))

    def run(self, method: Method) -> Outcome:
        """Search by one of the methods."""
        settings, judged = self.settings, self._judged[0].models
        bounds = judged.bounds(method.metric)
        order = in_order(judged.of(method.signal), settings.costs)
        cascades = cascades_of(order, settings.longest)
        exits = self._exits(self._judged[0], method, cascades)
        with time_left(self.console, f"searching by {method}", len(cascades), "cascades") as done:
            result = search(
                exits,
                settings.costs,
                longest=settings.longest,
                stride=settings.stride,
                solved=done,
            )
        gain = improvement(result.front, result.single_front)
        points = operating_points(result, gain, settings.budgets)
        return Outcome(
            method=method,
            result=result,
            improvement=gain,
            averages={
                one: improvement(result.front, result.single_front, *one).average
                for one in settings.ranges
            },
            points=points,
            held_out={
                name: figures
                for name, figures in self._held_out(exits, bounds, result, points).items()
                if name not in points.unreached
            },
            shift=self._shifted(method, bounds, result),
        )

    def _fit(self) -> None:
        table = self.table
        with time_left(self.console, "fitting temperatures", len(table.names), "models") as done:
            for name in table.names:
                fitted = fit_in_blocks(partial(table.labelled, name))
                if fitted is None:
                    self.console.note(f"no temperature is determined for {name!r}: it stays at 1")
                else:
                    self.temperatures[name] = fitted
                done()

    def _exits(self, judged: _Judged, method: Method, cascades: Sequence[tuple[str, ...]]) -> Exits:
        title = f"averaging {judged.table.path} by {method}"
        with time_left(self.console, title, len(judged.table), "samples") as done:
            return exits_of(
                method,
                judged.table,
                judged.models,
                cascades,
                top=self.settings.top,
                temperatures=self.temperatures,
                averaged=done,
            )

    def _held_out(
        self,
        exits: Exits,
        bounds: tuple[float, float],
        result: SearchResult,
        points: OperatingPoints,
    ) -> dict[str, CrossValidation]:
        settings, best = self.settings, points.points[MAX_IMPROVEMENT]
        if not settings.repeats:
            return {}
        searches = settings.repeats * settings.folds
        with time_left(self.console, "cross-validating", searches, "searches") as done:
            return held_out(
                exits,
                settings.costs,
                bounds,
                result.reference.models[0],
                longest=settings.longest,
                stride=settings.stride,
                budgets=settings.budgets,
                improved_at=None if best is None else result.reference.accuracy - best.accuracy,
                repeats=settings.repeats,
                folds=settings.folds,
                seed=settings.seed,
                searched=done,
            )

    def _shifted(
        self, method: Method, bounds: tuple[float, float], result: SearchResult
    ) -> Shift | None:
        if self.shift is None:
            return None
        used = {point.models for point in result.front if len(point.models) > 1}
        exits = self._exits(self._judged[1], method, sorted(used))
        title = f"evaluating on {self.shift.path}"
        with time_left(self.console, title, len(result.front), "points") as done:
            return shifted(result, exits, self.settings.costs, bounds, done)
