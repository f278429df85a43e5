"""Savers for some bases, chosen on one table and judged on another."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from calib.cascade_search.ranking import Ranking
from calib.cascade_search.search import CascadePoint
from calib.cascade_search.signals import JudgedModels, Judgement, Metric, Signal, judge
from calib.crossval import CrossValidation, paired_interval
from calib.model_table import ModelTable
from calib.saver_crossval import Repeats, cross_validate_pair
from calib.saver_selection import (
    Candidate,
    PairCurve,
    operating_points,
    rank_savers,
    replay,
)
from calib.side_by_side import Stopped, side_by_side
from calib.time_left import time_left
from edge_runtime.console import Console
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.schema import nearest


@dataclass(frozen=True)
class TrainedPoint:
    """An operating point whose threshold is from the training table.

    Attributes:
        train: Its figures there, in sample.
        held_out: Cross-validated figures there; None without.
        test: Its figures on the test table.
        interval: 95 % interval for its drop against the base, from the test table.
    """

    train: CascadePoint
    held_out: CrossValidation | None
    test: CascadePoint
    interval: tuple[float, float]


@dataclass(frozen=True)
class PairFigures:
    """A saver with its base.

    Attributes:
        candidate: Its place in the ranking.
        train: The curve on the training table.
        test: The curve on the test table.
        trained: Name of an operating point -> with the threshold from the training table.
        oracle: Name of an operating point -> with the best threshold of the test table, which
            nobody knows beforehand.
    """

    candidate: Candidate
    train: PairCurve
    test: PairCurve
    trained: Mapping[str, TrainedPoint]
    oracle: Mapping[str, CascadePoint]


@dataclass(frozen=True)
class BaseFigures:
    """A base with its savers.

    Attributes:
        base: Name of the base.
        ranking: All savers, the best first; empty where no model is cheaper.
        pairs: The best of them, with figures.
    """

    base: str
    ranking: Sequence[Candidate]
    pairs: Sequence[PairFigures]


@dataclass
class SaverStudy:
    """Chooses savers.

    Args:
        train: Predictions to choose on.
        test: Predictions of the same models on other samples.
        costs: Model -> cost of a sample, > 0.
        metric: The savers' signal.
        console: Shows progress.

    Raises:
        ConfigError: From the constructor: the tables differ in models or classes, or there are
            fewer than 2 models. From `prepare`: an array can't be read, a number in it is NaN or
            infinite, or the metric needs logits that the tables lack.
    """

    train: ModelTable
    test: ModelTable
    costs: Mapping[str, float]
    metric: Metric
    console: Console
    _judged: list[dict[str, Judgement]] = field(default_factory=list, init=False)
    _rankings: dict[str, Ranking] = field(default_factory=dict, init=False)
    _lowest: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """Check what the headers of the tables tell."""
        names = self.train.names
        if len(names) < 2:
            raise ConfigError(
                f"table {self.train.path}: models", got=f"one, {names[0]!r}", expected="at least 2"
            )
        self.train.check_same_models(self.test)

    def pairs(self, bases: Sequence[str], best: int) -> int:
        """How many pairs `run` will judge; arguments as of it."""
        cheaper = [sum(cost < self.costs[base] for cost in self.costs.values()) for base in bases]
        return sum(min(best, count) for count in cheaper)

    def prepare(self) -> None:
        """Reduce the logits of both tables to signals, the tables side by side."""
        signal = Signal(self.metric, scaled=False)
        title = f"judging {self.train.path} and {self.test.path}"
        stop, lock = threading.Event(), threading.Lock()
        with time_left(self.console, title, 2 * len(self.train.names), "models") as done:

            def judged() -> None:
                if stop.is_set():
                    raise Stopped
                with lock:
                    done()

            def judge_one(table: ModelTable) -> JudgedModels:
                return judge(table, [signal], judged=judged)

            models = side_by_side(judge_one, (self.train, self.test), stop)
        self._judged = [one.of(signal) for one in models]
        self._lowest = models[0].bounds(self.metric)[0]
        self._rankings = {name: Ranking.of(one.signal) for name, one in self._judged[0].items()}

    def check(self, bases: Sequence[str], repeats: Repeats) -> None:
        """Refuse what `run` can't do, before the logits are read.

        Args:
            bases: Names of the bases.
            repeats: How pairs are cross-validated.

        Raises:
            ConfigError: A base is no model of the tables, or one that is asked for alone has no
                cheaper model.
            CalibrationError: There are fewer than two samples per fold.
        """
        for base in bases:
            if base not in self.train.names:
                raise ConfigError(
                    f"--base: the tables have no model {base!r}",
                    remedy=nearest(base, self.train.names),
                )
        if repeats.repeats and len(self.train) < 2 * repeats.folds:
            raise CalibrationError(
                f"samples for a cross-validation in {repeats.folds} folds",
                got=len(self.train),
                expected=f">= {2 * repeats.folds}",
                remedy="Give more labelled data, or --repeats 0 for none",
            )
        cheapest = min(self.costs.values())
        if all(self.costs[base] == cheapest for base in bases):
            raise ConfigError(
                f"--base {bases[0]}: no model is cheaper, so it has no saver",
                remedy="Give a dearer base, or another --cost-column",
            )

    def run(self, bases: Sequence[str], best: int, repeats: Repeats) -> list[BaseFigures]:
        """Rank savers of bases, and judge the best ones.

        Args:
            bases: Names of the bases.
            best: Number of savers per base that are judged, >= 1.
            repeats: How they are cross-validated.

        Returns:
            Figures in the order of `bases`.
        """
        rankings = {
            base: rank_savers(self._judged[0], self.costs, base, self._lowest, self._rankings)
            for base in self.console.progress(bases, "ranking savers")
        }
        wanted = [one for ranking in rankings.values() for one in ranking[:best]]
        stop, lock = threading.Event(), threading.Lock()
        with time_left(self.console, "judging savers", max(1, len(wanted)), "pairs") as done:

            def figures(candidate: Candidate) -> PairFigures:
                found = self._figures(candidate, repeats, stop)
                with lock:
                    done()
                return found

            pairs = side_by_side(figures, wanted, stop)
        return [
            BaseFigures(base, ranking, [pair for pair in pairs if pair.candidate.base == base])
            for base, ranking in rankings.items()
        ]

    def _figures(
        self, candidate: Candidate, repeats: Repeats, stop: threading.Event
    ) -> PairFigures:
        train, test = self._judged
        pair = (candidate.saver, candidate.base)
        costs = (self.costs[pair[0]], self.costs[pair[1]])
        seen = PairCurve.of(train, pair, self.costs, self._lowest, self._rankings[pair[0]])
        other = PairCurve.of(test, pair, self.costs, self._lowest)
        held_out = {}
        if repeats.repeats:
            held_out = cross_validate_pair(train, pair, self.costs, self._lowest, repeats, stop)
        trained = {}
        for name, point in operating_points(seen).items():
            found, worse, better = replay(test, pair, costs, point.thresholds[0])
            interval = paired_interval(worse, better, len(self.test))
            trained[name] = TrainedPoint(point, held_out.get(name), found, interval)
        return PairFigures(candidate, seen, other, trained, operating_points(other))
