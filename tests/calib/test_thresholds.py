"""Goals, the choice among points, and the verdict on it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.exit_table import CostModel, ExitTable
from calib.sweep import measure
from calib.thresholds import AccuracyDrop, Choice, CostBudget, Goal, ZeroLoss, choose, pays
from edge_runtime.errors import CalibrationError, ConfigError
from edge_runtime.operating_point import OperatingPoint
from edge_runtime.schema import plain
from tests.calib.populations import BOUNDS, cascade, model_costs, population, table

COSTS = CostModel.from_models({"small": 1.0, "large": 4.0})
# From the most to the least confident: the small model is right, wrong, right, wrong; the large
# one is right but at the third. So leaving one loses nothing, two lose one, three break even.
FOUR = table([[0.9], [0.7], [0.5], [0.3]], [[1, 1], [0, 1], [1, 0], [0, 1]])


def pick(data: ExitTable, goal: Goal, costs: CostModel = COSTS) -> Choice:
    return choose(data, costs, goal, repeats=0)


def test_zero_loss_takes_the_cheapest_that_loses_nothing() -> None:
    choice = pick(FOUR, ZeroLoss())
    assert choice.thresholds == {"small": pytest.approx(0.4)}
    assert choice.exit_rates == {"small": 0.75, "large": 0.25}
    assert (choice.point.correct, choice.base.correct) == (3, 3)
    assert choice.point.cost == 1 * 0.75 + 5 * 0.25
    assert not choice.base_alone
    assert choice.best_cascade == choice.point


def test_a_drop_buys_cost() -> None:
    assert pick(FOUR, AccuracyDrop(0.24)).point.cost == 2
    everything = pick(FOUR, AccuracyDrop(0.25))
    assert everything.point.cost == 1
    assert everything.thresholds == {"small": 0.0}


def test_a_budget_buys_accuracy() -> None:
    assert pick(FOUR, CostBudget(1.9)).point.correct == 2
    assert pick(FOUR, CostBudget(2.0)).point.correct == 3
    # Four out of four are out of reach, so a larger budget is not spent.
    assert pick(FOUR, CostBudget(100)).point.cost == 2


def test_a_budget_below_the_cheapest_names_it() -> None:
    with pytest.raises(
        CalibrationError, match=r"at most 0.9. The cheapest choice costs 1 .* 50.00%"
    ):
        pick(FOUR, CostBudget(0.9))


def test_the_base_is_the_cheapest_where_an_early_exit_is_dearer() -> None:
    """The exit needs all of the base, and a head more."""
    parts = {"backbone": 1.0, "head": 0.5, "exit head": 2.0}
    needs = (frozenset({"backbone", "exit head"}), frozenset({"backbone", "head"}))
    costs = CostModel(("early", "last"), needs, parts)
    choice = pick(FOUR, CostBudget(1.5), costs)
    assert choice.base_alone
    assert choice.best_cascade is None
    with pytest.raises(CalibrationError, match=r"The cheapest choice costs 1.5 .* 75.00%"):
        pick(FOUR, CostBudget(1.4), costs)
    verdict = pays(choice)
    assert (verdict.pays, verdict.saved, verdict.cascade_saved) == (False, 0, None)
    assert verdict.text == (
        "The cascade does not pay: the base alone is the best choice for a mean cost of at most "
        "1.5. No cascade with an early exit achieves it."
    )


def test_the_base_wins_where_a_cascade_is_only_as_good() -> None:
    """One of four leaves: 1/4 * 1 + 3/4 * 5 = 4, the cost of the base."""
    data = table([[0.9], [0.7], [0.7], [0.7]], [[1, 1], [0, 1], [0, 1], [0, 1]])
    for goal in (ZeroLoss(), CostBudget(4.0)):
        choice = pick(data, goal)
        assert choice.base_alone
        assert choice.best_cascade is not None
        assert choice.best_cascade.cost == choice.base.cost == 4


def test_a_budget_of_exactly_the_base_admits_it() -> None:
    """The mean of three costs of 0.1 is a little more than 0.1."""
    data = table([[0.5]] * 3, [[0, 1]] * 3)
    choice = pick(data, CostBudget(0.1), CostModel.from_models({"small": 0.05, "large": 0.1}))
    assert choice.base.cost > 0.1
    assert choice.base_alone


def test_a_drop_is_counted_in_samples_and_not_in_rounding_errors() -> None:
    for lost in range(1, 100):
        data = table([[0.5]] * 100, [[0, 1]] * lost + [[1, 1]] * (100 - lost))
        assert not pick(data, AccuracyDrop(lost / 100)).base_alone
        assert pick(data, AccuracyDrop((lost - 0.001) / 100)).base_alone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(5, 40), st.floats(0, 0.3), st.floats(1.01, 12))
def test_no_pair_of_thresholds_is_better(
    seed: int, samples: int, drop: float, budget: float
) -> None:
    data, costs = population(samples, (0.5, 0.8, 1.1), seed), model_costs(3)
    candidates: list[list[float | None]] = [
        [None, *sorted({BOUNDS[0], *data.signals[:, k].tolist()})] for k in range(2)
    ]
    points = [measure(data, costs, (a, b)) for a in candidates[0] for b in candidates[1]]
    base = points[0].correct
    zero, loss, most = (
        choose(data, costs, goal, repeats=0).point
        for goal in (ZeroLoss(), AccuracyDrop(drop), CostBudget(budget))
    )
    accurate = [point.cost for point in points if point.correct >= base]
    assert zero.correct >= base
    assert zero.cost == pytest.approx(min(accurate))
    enough = [point.cost for point in points if point.correct >= base - drop * samples]
    assert loss.correct >= base - drop * samples
    assert loss.cost == pytest.approx(min(enough))
    affordable = [point.correct for point in points if point.cost <= budget]
    assert most.cost <= budget
    assert most.correct == max(affordable)


def test_verdict_of_a_cascade_that_pays() -> None:
    verdict = pays(pick(FOUR, ZeroLoss()))
    assert (verdict.pays, verdict.saved, verdict.cascade_saved) == (True, 0.5, 0.5)
    assert verdict.text == (
        "The cascade pays: it saves 50.0% of the base's mean cost and is as accurate."
    )
    assert pays(pick(FOUR, AccuracyDrop(0.25))).text == (
        "The cascade pays: it saves 75.0% of the base's mean cost and is 25.00 points less "
        "accurate."
    )


def test_verdict_of_a_cascade_that_does_not_pay() -> None:
    """Of ten samples, only the most confident one may leave: 1/10 * 1 + 9/10 * 5 = 4.6 > 4."""
    signals = [[0.9]] + [[0.5]] * 9
    data = table(signals, [[1, 1]] + [[0, 1]] * 9)
    choice = pick(data, ZeroLoss())
    verdict = pays(choice)
    assert choice.base_alone
    assert (verdict.pays, verdict.saved) == (False, 0)
    assert verdict.cascade_saved == pytest.approx(-0.15)
    assert verdict.cascade_drop == 0
    assert verdict.text == (
        "The cascade does not pay: the base alone is the best choice for no loss of accuracy. The "
        "best cascade with an early exit costs 15.0% more than the base and is as accurate."
    )


def test_verdict_of_accuracy_bought_with_cost() -> None:
    """The small model knows one sample that the large one does not."""
    data = table([[0.9]] + [[0.5]] * 9, [[1, 0]] + [[0, 1]] * 9)
    verdict = pays(pick(data, CostBudget(10)))
    assert not verdict.pays
    assert verdict.text == (
        "The cascade does not pay: it costs 15.0% more than the base and is 10.00 points more "
        "accurate."
    )
    assert verdict.cascade_drop == pytest.approx(-0.1)


def test_verdict_adds_the_held_out_figures() -> None:
    choice = choose(population(300, (1.0, 1.6), seed=5), model_costs(2), AccuracyDrop(0.02))
    held_out = choice.cross_validation
    low, high = (100 * end for end in held_out.interval)
    assert held_out.drop > 0
    assert pays(choice).text.endswith(
        f"it saves {1 - held_out.cost / choice.base.cost:.1%} of the base's mean cost and is "
        f"{100 * held_out.drop:.2f} points less accurate (drop of {low:.2f} to {high:.2f} points, "
        "95% interval)."
    )


def test_cross_validation_is_of_the_same_goal() -> None:
    data = population(300, (1.0, 1.6), seed=5)
    strict, loose = (
        choose(data, model_costs(2), goal) for goal in (ZeroLoss(), AccuracyDrop(0.05))
    )
    for choice in (strict, loose):
        assert choice.cross_validation is not None
        assert choice.cross_validation.samples == 300
    assert loose.cross_validation.drop > strict.cross_validation.drop + 0.02
    assert loose.cross_validation.cost < strict.cross_validation.cost
    # In the sample the drop is bounded; on held-out data it may exceed the bound, and says so.
    assert loose.base.accuracy - loose.point.accuracy <= 0.05


def test_cross_validation_is_of_what_was_chosen() -> None:
    """Not of a mixture of cascades and the base, where some folds prefer the one or the other."""
    data, goal = population(400, (1.0, 1.6), seed=5), AccuracyDrop(0.02)
    leave = choose(data, model_costs(2), goal, repeats=0).exit_rates["model0"]
    for gain in (0.005, -0.005):
        costs = CostModel.from_models({"small": leave - gain, "large": 1.0})
        choice = choose(data, costs, goal)
        held_out = choice.cross_validation
        assert choice.base_alone == (gain < 0)
        assert held_out.base_alone == (gain < 0)
        if choice.base_alone:
            assert (held_out.drop, held_out.worse, held_out.cost) == (0, 0, pytest.approx(1))
        else:
            assert held_out.drop > 0.005


def test_too_little_data_to_cross_validate() -> None:
    with pytest.raises(CalibrationError, match="samples for a cross-validation in 5 folds: got 4"):
        choose(FOUR, COSTS, ZeroLoss())


@pytest.mark.parametrize("drop", [-0.01, 1.01, float("nan")])
def test_drop_out_of_range(drop: float) -> None:
    with pytest.raises(ConfigError, match="accuracy drop: got"):
        AccuracyDrop(drop)


@pytest.mark.parametrize("cost", [0.0, -1.0, float("nan")])
def test_budget_out_of_range(cost: float) -> None:
    with pytest.raises(ConfigError, match="cost budget: got"):
        CostBudget(cost)


def test_choice_becomes_an_operating_point() -> None:
    graph = cascade(3)
    data = population(200, (1.0, 1.3, 1.6), seed=6)
    costs = CostModel.from_stages(graph, {stage.name: 0.001 for stage in graph.stages})
    choice = choose(data, costs, AccuracyDrop(0.02))
    point = OperatingPoint("drop", thresholds=choice.thresholds, expected=plain(choice))
    policy = point.policy_for(graph)
    active = [k for k, threshold in enumerate(choice.point.thresholds) if threshold is not None]
    assert active
    assert policy.evaluated(3) == (*active, 2)
    read = json.loads(point.to_json())
    assert read["expected"]["cross_validation"]["drop"] == choice.cross_validation.drop
    assert read["thresholds"] == choice.thresholds
    for name, threshold in choice.thresholds.items():
        assert threshold is None or float(np.float32(threshold)) == threshold, name
