"""The best cascades of two or three models: all of them, at all thresholds, without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.exits import Exits, Models
from calib.cascade_search.frontier import Found, Frontier
from calib.cascade_search.pairs import solve_pair
from calib.cascade_search.ranking import Ranking
from calib.cascade_search.signals import Judgement
from calib.cascade_search.triples import SecondExit
from calib.exit_table import CostModel, ExitTable, Point
from calib.sweep import measure
from edge_runtime.errors import ConfigError

#: Of the first cuts of triples, every so many-th is looked at first. Measured with 27 models and
#: 50,000 samples: it takes a fifth of the time, and halves the whole.
_COARSE = 30


@dataclass(frozen=True)
class CascadePoint(Point):
    """A cascade with its thresholds, and what it does on a table.

    Attributes:
        thresholds: As of `Point`, for each model but the last; None where nobody leaves at an exit
            though its model runs, which only an ensemble has a use for.
        models: Its models in the order in which they run; one of them where it is no cascade.
    """

    models: Models


@dataclass(frozen=True)
class SearchResult:
    """The best of everything that was searched.

    Attributes:
        singles: Each model alone, in the order in which cascades take them: by cost, of equals the
            less accurate first.
        single_front: Those of `singles` that no other one beats, by ascending accuracy and cost.
        front: Cascades and single models that nothing beats, by ascending accuracy and cost.
    """

    singles: tuple[CascadePoint, ...]
    single_front: tuple[CascadePoint, ...]
    front: tuple[CascadePoint, ...]

    @property
    def reference(self) -> CascadePoint:
        """The most accurate single model, of equals the cheapest: drops are counted from it."""
        return self.single_front[-1]


def search(
    exits: Exits,
    costs: Mapping[str, float],
    *,
    longest: int = 2,
    stride: int = 10,
    solved: Callable[[int], None] = lambda _: None,
) -> SearchResult:
    """Find the cheapest cascade at each accuracy.

    All pairs are solved exactly. Of triples the first threshold takes every `stride`-th sorted
    value, and the second one is solved exactly for each.

    Args:
        exits: What the exits of all cascades say.
        costs: Model -> cost of a sample, > 0; every model counts that has run.
        longest: Number of models of the longest cascades: 2 or 3.
        stride: Every so many samples a first threshold of three models; 1 is exact.
        solved: Called with the number of cascades that were solved since the last call.

    Returns:
        The front with its figures.

    Raises:
        ConfigError: Fewer models than 2, or another `longest` or `stride`.

    Reference:
        Lebovitz et al., Efficient Inference With Model Cascades, TMLR 2023, sections 3 and 4.1.
    """
    order = in_order(exits.models, costs)
    if longest not in (2, 3) or stride < 1:
        raise ConfigError(
            "a search", got=f"{longest} models, stride {stride}", expected="2 or 3 models, >= 1"
        )
    singles, single_front = measure_singles(exits, costs)
    samples = sum(singles[0].counts)
    frontier = Frontier(samples)
    for point in single_front:
        cost = samples * costs[point.models[0]]
        frontier.offer(point.models, np.array([point.correct]), np.array([cost]))
    rankings = _Rankings(exits)
    for a, b in combinations(order, 2):
        solve_pair(exits, (a, b), (costs[a], costs[b]), rankings.after((a,)), frontier)
        solved(1)
    if longest == 3:
        # A first look at some of the cuts raises the front, so that fewer cells are searched then.
        _solve_triples(exits, costs, order, rankings, frontier, _COARSE * stride)
        _solve_triples(exits, costs, order, rankings, frontier, stride, solved)
    return SearchResult(singles, single_front, _points(exits, costs, rankings, frontier.front()))


def in_order(models: Mapping[str, Judgement], costs: Mapping[str, float]) -> list[str]:
    """Models in the order in which cascades take them: by cost, of equals the less accurate first.

    Raises:
        ConfigError: There are fewer than 2.
    """
    names = list(models)
    if len(names) < 2:
        raise ConfigError(
            "models of a search", got=f"one, {names[0]!r}" if names else 0, expected=">= 2"
        )
    return sorted(names, key=lambda name: (costs[name], models[name].correct.sum()))


def cascades_of(order: Sequence[str], longest: int) -> list[Models]:
    """All pairs, and where `longest` is 3 all triples, of models in order."""
    return [models for k in range(2, longest + 1) for models in combinations(order, k)]


def measure_singles(
    exits: Exits, costs: Mapping[str, float]
) -> tuple[tuple[CascadePoint, ...], tuple[CascadePoint, ...]]:
    """What each model does alone.

    Args:
        exits: What the exits of all cascades say.
        costs: Model -> cost of a sample.

    Returns:
        All of them in the order of `in_order`, and the Pareto front of them: those that no other
        one beats, by ascending accuracy and cost.
    """
    singles = []
    for name in in_order(exits.models, costs):
        right = exits.models[name].correct
        singles.append(
            CascadePoint((), (len(right),), int(np.count_nonzero(right)), costs[name], (name,))
        )
    front: list[CascadePoint] = []
    for point in sorted(singles, key=lambda point: (point.cost, -point.correct)):
        if not front or point.correct > front[-1].correct:
            front.append(point)
    return tuple(singles), tuple(front)


def measure_cascade(
    exits: Exits,
    costs: Mapping[str, float],
    bounds: tuple[float, float],
    models: Models,
    thresholds: Sequence[float | None],
) -> CascadePoint:
    """What a cascade does on a table.

    Args:
        exits: What the exits of all cascades say.
        costs: Model -> cost of a sample.
        bounds: The smallest and largest value that the signal can take.
        models: The cascade, in order; one model alone is allowed.
        thresholds: For each model but the last; see `CascadePoint`.

    Returns:
        The same figures as `search` reports.
    """
    if len(models) == 1:
        right = exits.after(models).correct
        count = int(np.count_nonzero(right))
        return CascadePoint((), (len(right),), count, costs[models[0]], models)
    # Every exit needs all models before it: an ensemble runs them even where nobody leaves.
    needs = tuple(frozenset(models[: k + 1]) for k in range(len(models)))
    cost = CostModel(models, needs, {name: costs[name] for name in models})
    point = measure(_exit_table(exits, bounds, models), cost, thresholds)
    return CascadePoint(point.thresholds, point.counts, point.correct, point.cost, models)


def answers(
    exits: Exits,
    bounds: tuple[float, float],
    models: Models,
    thresholds: Sequence[float | None],
) -> NDArray[np.bool_]:
    """Which samples a cascade answers correctly, shape (N,); arguments as of `measure_cascade`."""
    if len(models) == 1:
        return exits.after(models).correct
    table = _exit_table(exits, bounds, models)
    right: NDArray[np.bool_] = table.correct[np.arange(table.samples), table.leave_at(thresholds)]
    return right


def _exit_table(exits: Exits, bounds: tuple[float, float], models: Models) -> ExitTable:
    said = [exits.after(models[: k + 1]) for k in range(len(models))]
    return ExitTable(
        np.stack([one.signal for one in said[:-1]], axis=1),
        np.stack([one.correct for one in said], axis=1),
        bounds,
    )


def _solve_triples(
    exits: Exits,
    costs: Mapping[str, float],
    order: Sequence[str],
    rankings: _Rankings,
    frontier: Frontier,
    stride: int,
    solved: Callable[[int], None] = lambda _: None,
) -> None:
    for i, j in combinations(range(len(order) - 1), 2):
        pair = (order[i], order[j])
        second = SecondExit(
            exits,
            pair,
            (costs[pair[0]], costs[pair[1]]),
            rankings.after(pair[:1]),
            rankings.after(pair),
            stride,
        )
        for third in order[j + 1 :]:
            second.solve(third, costs[third], frontier)
        solved(len(order) - 1 - j)


class _Rankings:
    """The orders of signals, sorted when they are asked for; those of one model are kept."""

    def __init__(self, exits: Exits) -> None:
        self._exits = exits
        self._known: dict[Models, Ranking] = {}

    def after(self, models: Models) -> Ranking:
        key = self._exits.key(models)
        if key in self._known:
            return self._known[key]
        ranking = Ranking.of(self._exits.after(models).signal)
        if len(key) == 1:
            self._known[key] = ranking
        return ranking


def _points(
    exits: Exits, costs: Mapping[str, float], rankings: _Rankings, front: Sequence[Found]
) -> tuple[CascadePoint, ...]:
    """The figures of the points of a front, from their cuts."""
    points = {}
    for models, same in groupby(sorted(front), key=lambda found: found.models):
        signals = [exits.after(models[: k + 1]).signal for k in range(len(models) - 1)]
        ranked = [rankings.after(models[: k + 1]) for k in range(len(models) - 1)]
        for found in same:
            points[found.correct] = _point(exits, costs, found, signals, ranked)
    return tuple(points[found.correct] for found in front)


def _point(
    exits: Exits,
    costs: Mapping[str, float],
    found: Found,
    signals: Sequence[NDArray[np.float32]],
    ranked: Sequence[Ranking],
) -> CascadePoint:
    reaches: NDArray[np.bool_] | None = None
    reaching = [len(exits.models[found.models[0]].correct)]
    thresholds = []
    for signal, ranking, cut in zip(signals, ranked, found.cuts, strict=True):
        thresholds.append(ranking.threshold(signal, cut, reaches))
        stays = ranking.place >= cut
        reaches = stays if reaches is None else reaches & stays
        reaching.append(int(np.count_nonzero(reaches)))
    counts = tuple(here - on for here, on in zip(reaching, [*reaching[1:], 0], strict=True))
    cost = sum(here * costs[name] for here, name in zip(reaching, found.models, strict=True))
    return CascadePoint(tuple(thresholds), counts, found.correct, cost / reaching[0], found.models)
