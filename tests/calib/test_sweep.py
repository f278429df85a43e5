"""The sweep against a brute force, and its figures against the policy that runs."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.exit_table import CostModel, ExitTable
from calib.sweep import ALWAYS, NEVER, Front, measure, sweep
from edge_runtime.cascade import Cascade
from edge_runtime.confidence import Decision
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.policy import Streak, Threshold
from tests.calib.populations import BOUNDS, cascade, model_costs, population, table

HALF = np.float32(0.5)
# Few values, so that ties are common, and neighbours between which no float32 lies.
VALUES = [0.0, 0.25, float(HALF), float(np.nextafter(HALF, np.float32(1))), 0.75, 1.0]


@st.composite
def problems(draw: st.DrawFn) -> tuple[ExitTable, Cascade, dict[str, float], float]:
    exits = draw(st.integers(2, 4))
    samples = draw(st.integers(1, {2: 12, 3: 8, 4: 5}[exits]))

    def rows(values: st.SearchStrategy[object], columns: int) -> list[list[object]]:
        row = st.lists(values, min_size=columns, max_size=columns)
        return draw(st.lists(row, min_size=samples, max_size=samples))

    signals = rows(st.sampled_from(VALUES), exits - 1)
    correct = rows(st.integers(0, 1), exits)
    graph = cascade(exits)
    # Whole numbers add up exactly, so that costs may be compared as they are.
    cost = {stage.name: float(draw(st.integers(0, 4))) for stage in graph.stages}
    cost["preprocess"] += 1
    return table(signals, correct), graph, cost, float(draw(st.integers(0, 2)))


def naive_outcome(
    problem: tuple[ExitTable, Cascade, dict[str, float], float],
    thresholds: tuple[float | None, ...],
) -> tuple[int, float]:
    """Right answers and summed cost, one sample after the other, straight from the plan."""
    data, graph, stage_cost, decide_cost = problem
    active = [k for k, threshold in enumerate(thresholds) if threshold is not None]
    correct, total = 0, 0.0
    for sample in range(data.samples):
        for step in graph.plan([*active, data.exits - 1]).steps:
            total += sum(stage_cost[stage.name] for stage in step.stages) + decide_cost
            k = step.position
            if k == data.exits - 1 or data.signals[sample, k] >= np.float32(thresholds[k]):
                correct += int(data.correct[sample, k])
                break
    return correct, total


def naive_front(
    problem: tuple[ExitTable, Cascade, dict[str, float], float],
) -> list[tuple[int, float]]:
    """Pareto front over all combinations of values that occur, with at least one active exit."""
    data = problem[0]
    choices = [
        [None, BOUNDS[0], *sorted(set(data.signals[:, k].tolist()))] for k in range(data.exits - 1)
    ]
    outcomes = {
        naive_outcome(problem, thresholds)
        for thresholds in itertools.product(*choices)
        if any(threshold is not None for threshold in thresholds)
    }
    return sorted(
        one
        for one in outcomes
        if not any(other != one and other[0] >= one[0] and other[1] <= one[1] for other in outcomes)
    )


def as_outcomes(front: Front, samples: int) -> list[tuple[int, float]]:
    return list(zip(front.correct.tolist(), (front.cost * samples).round(6).tolist(), strict=True))


@settings(max_examples=300, deadline=None)
@given(problems())
def test_front_equals_brute_force(
    problem: tuple[ExitTable, Cascade, dict[str, float], float],
) -> None:
    data, graph, stage_cost, decide_cost = problem
    front = sweep(data, CostModel.from_stages(graph, stage_cost, decide_cost))
    assert front.exact
    assert as_outcomes(front, data.samples) == naive_front(problem)
    base = naive_outcome(problem, (None,) * (data.exits - 1))
    assert (front.base.correct, front.base.cost * data.samples) == pytest.approx(base)


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([1, 3, 2000]))
def test_figures_are_what_the_policy_does(
    problem: tuple[ExitTable, Cascade, dict[str, float], float], solutions: int
) -> None:
    data, graph, stage_cost, decide_cost = problem
    costs = CostModel.from_stages(graph, stage_cost, decide_cost)
    front = sweep(data, costs, solutions)
    points = [front.base, *(front.point(row) for row in range(len(front.cost)))]
    for point in points:
        policy = Threshold(point.thresholds, BOUNDS[0])
        plan = graph.plan(policy.evaluated(data.exits))
        staying = np.arange(data.samples)
        counts, correct, total, paid = [0] * data.exits, 0, 0.0, 0.0
        for step in plan.steps:
            k = step.position
            paid += sum(stage_cost[stage.name] for stage in step.stages) + decide_cost
            leaves = np.ones(len(staying), bool)
            if step is not plan.steps[-1]:
                decision = Decision(
                    np.zeros(len(staying), np.int64),
                    data.signals[staying, k],
                    data.signals[staying, k],
                )
                leaves = policy.leaves(k, decision, Streak())
            counts[k] += int(leaves.sum())
            correct += int(data.correct[staying[leaves], k].sum())
            total += paid * leaves.sum()
            staying = staying[~leaves]
        assert point.counts == tuple(counts)
        assert point.correct == correct
        assert point.cost == pytest.approx(total / data.samples, rel=1e-12)
        assert point.accuracy == correct / data.samples
        assert point.exit_rates == tuple(count / data.samples for count in counts)
        assert measure(data, costs, point.thresholds) == point
    assert front.accuracy.tolist() == [point.accuracy for point in points[1:]]
    assert front.exit_rates.tolist() == [list(point.exit_rates) for point in points[1:]]


@settings(max_examples=100, deadline=None)
@given(problems())
def test_threshold_lies_between_distinct_neighbours(
    problem: tuple[ExitTable, Cascade, dict[str, float], float],
) -> None:
    data, graph, stage_cost, _ = problem
    front = sweep(data, CostModel.from_stages(graph, stage_cost))
    for row in front.thresholds:
        arriving = np.ones(data.samples, bool)
        for k, threshold in enumerate(row):
            signal = data.signals[arriving, k]
            if NEVER > threshold > ALWAYS:
                lower, upper = signal[signal < threshold].max(), signal[signal >= threshold].min()
                middle = np.float32((float(lower) + float(upper)) / 2)
                assert threshold == (middle if middle > lower else upper)
            arriving &= ~(data.signals[:, k] >= threshold)


def test_midway_and_neighbours_without_a_middle() -> None:
    # The first exit is right where it is confident, the second one elsewhere.
    right = [[1, 0], [0, 1]]
    wide = sweep(table([[0.75], [0.25]], right), model_costs(2))
    assert wide.thresholds[-1].tolist() == [0.5]
    above = float(np.nextafter(HALF, np.float32(1)))
    narrow = sweep(table([[above], [0.5]], right), model_costs(2))
    assert narrow.thresholds[-1].tolist() == [above]
    assert narrow.counts[-1].tolist() == [1, 1]


def test_samples_of_equal_signal_leave_together() -> None:
    front = sweep(table([[0.5], [0.5], [0.5]], [[1, 0], [0, 1], [0, 1]]), model_costs(2))
    assert front.thresholds.tolist() == [[ALWAYS]]
    assert front.counts.tolist() == [[3, 0]]
    assert front.point(0).thresholds == (0.0,)


def test_exit_that_nobody_should_use_is_pruned() -> None:
    """The middle exit is always wrong: with a threshold no one reaches it would still cost."""
    data = population(300, (0.8, 1.2, 1.6), seed=0)
    correct = data.correct.copy()
    correct[:, 1] = False
    front = sweep(ExitTable(data.signals, correct, BOUNDS), model_costs(3))
    accurate = front.correct > correct[:, 0].sum()
    assert accurate.any()
    assert (front.thresholds[accurate, 1] == NEVER).all()


def best_cost(front: Front, correct: int | np.ndarray) -> np.ndarray:
    """Cost of the cheapest cascade with at least so many right answers."""
    return front.cost[np.searchsorted(front.correct, correct)]


@pytest.mark.parametrize(
    ("samples", "margins", "solutions", "all_solutions", "mean", "worst"),
    [
        (3000, (0.7, 1.1, 1.6), 200, 3001, 0.001, 0.02),
        (120, (0.7, 0.9, 1.2, 1.6), 400, 120**2, 0.001, 0.02),
    ],
)
def test_a_coarse_grid_is_polished_to_nearly_the_optimum(
    samples: int,
    margins: tuple[float, ...],
    solutions: int,
    all_solutions: int,
    mean: float,
    worst: float,
) -> None:
    data, costs = population(samples, margins, seed=1), model_costs(len(margins))
    coarse, full = sweep(data, costs, solutions), sweep(data, costs, all_solutions)
    assert full.exact and not coarse.exact
    correct = np.arange(full.correct[0], min(full.correct[-1], coarse.correct[-1]) + 1)
    excess = best_cost(coarse, correct) / best_cost(full, correct) - 1
    assert excess.min() > -1e-9
    assert excess.mean() < mean
    assert excess.max() < worst


@pytest.mark.parametrize("seed", range(2))
def test_no_single_threshold_improves_a_polished_front(seed: int) -> None:
    generator = np.random.default_rng(seed)
    signals = generator.integers(0, 25, (80, 6)).astype(np.float32) / 25
    data = ExitTable(signals, generator.random((80, 7)) < 0.5, BOUNDS)
    costs = model_costs(7)
    front = sweep(data, costs, 1000)
    assert not front.exact
    for point in map(front.point, range(len(front.cost))):
        for k in range(6):
            for value in (None, BOUNDS[0], *set(signals[:, k].tolist())):
                changed = (*point.thresholds[:k], value, *point.thresholds[k + 1 :])
                if any(threshold is not None for threshold in changed):
                    other = measure(data, costs, changed)
                    assert other.correct <= front.correct[-1]
                    assert best_cost(front, other.correct) <= other.cost + 1e-9
        if BOUNDS[0] in point.thresholds:
            # An exit that always answers is the last one that is named.
            assert set(point.thresholds[point.thresholds.index(BOUNDS[0]) + 1 :]) <= {None}


def test_many_exits_from_a_grid_of_one_value() -> None:
    """A grid of one solution leaves the rest to the polish."""
    data, costs = population(200, np.linspace(0.6, 1.6, 9).tolist(), seed=2), model_costs(9)
    start, polished = sweep(data, costs, 1), sweep(data, costs, 2000)
    zero_loss = [front.cost[front.correct >= front.base.correct] for front in (start, polished)]
    assert zero_loss[1].min() < 0.9 * min([*zero_loss[0], start.base.cost])


def test_sweep_refuses_what_does_not_fit() -> None:
    data = population(10, (1.0, 1.5), seed=0)
    with pytest.raises(ConfigError, match=re.escape("exits of the cost model: got 3, expected 2")):
        sweep(data, model_costs(3))
    with pytest.raises(ConfigError, match="solutions of a sweep: got 0"):
        sweep(data, model_costs(2), 0)


@pytest.mark.parametrize(
    ("signals", "correct", "message"),
    [
        (np.zeros((2, 1)), np.zeros((2, 2), bool), "signals of an exit table: got 2 axes of float"),
        (np.zeros(2, np.float32), np.zeros((2, 2), bool), "signals of an exit table: got 1 axes"),
        (np.zeros((2, 1), np.float32), np.zeros((2, 2)), "correct of an exit table"),
        (
            np.zeros((2, 2), np.float32),
            np.zeros((2, 2), bool),
            r"an exit table: got signals \(2, 2",
        ),
        (np.zeros((3, 1), np.float32), np.zeros((2, 2), bool), "an exit table: got signals"),
        (np.zeros((0, 1), np.float32), np.zeros((0, 2), bool), "an exit table: got signals"),
        (np.zeros((2, 0), np.float32), np.zeros((2, 1), bool), "an exit table: got signals"),
        (
            np.float32([[0], [np.nan]]),
            np.zeros((2, 2), bool),
            "signal of sample 1 at exit 0: got n",
        ),
        (
            np.float32([[np.inf], [0]]),
            np.zeros((2, 2), bool),
            "signal of sample 0 at exit 0: got i",
        ),
        (
            np.float32([[0], [-0.1]]),
            np.zeros((2, 2), bool),
            "signal of sample 1 at exit 0: got -0.1",
        ),
        (np.float32([[0], [1.1]]), np.zeros((2, 2), bool), "signal of sample 1 at exit 0: got 1.1"),
    ],
)
def test_table_refuses_bad_arrays(signals: np.ndarray, correct: np.ndarray, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        ExitTable(signals, correct, BOUNDS)


def test_cost_of_an_exit_depends_on_the_exits_before_it() -> None:
    stage_cost = {
        "preprocess": 1.0,
        "saver": 2.0,
        "segment1": 4.0,
        "head1": 8.0,
        "segment2": 16.0,
        "head2": 32.0,
    }
    costs = CostModel.from_stages(cascade(3), stage_cost, 0.5)
    assert costs.exits == ("exit0", "exit1", "exit2")
    assert costs.leaving(()).tolist() == [53.5]
    assert costs.leaving((0,)).tolist() == [3.5, 56]
    assert costs.leaving((1,)).tolist() == [13.5, 62]
    assert costs.leaving((0, 1)).tolist() == [3.5, 16, 64.5]
    assert costs.base == 53.5


def test_independent_models_add_up() -> None:
    costs = CostModel.from_models({"small": 1.0, "large": 10.0})
    assert costs.leaving((0,)).tolist() == [1, 11]
    assert costs.base == 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"heads2": 1.0},
            "names the stage 'heads2', which the cascade lacks. Did you mean 'head2'",
        ),
        ({"head1": -1.0}, "cost of 'head1': got -1.0"),
        ({"head1": float("nan")}, "cost of 'head1': got nan"),
        ({"head1": None}, "no cost for 'head1'"),
        ({"preprocess": 0, "segment1": 0, "segment2": 0, "head2": 0}, "cost of the full model"),
    ],
)
def test_cost_model_refuses(change: dict[str, float | None], message: str) -> None:
    graph = cascade(3)
    stage_cost = {stage.name: 1.0 for stage in graph.stages} | change
    with pytest.raises(ConfigError, match=message):
        CostModel.from_stages(graph, {k: v for k, v in stage_cost.items() if v is not None})
