"""Improvement over single models, operating points, held-out figures: on examples made by hand."""

from __future__ import annotations

import re

import numpy as np
import pytest

from calib.cascade_search.exits import Alone
from calib.cascade_search.held_out import held_out
from calib.cascade_search.improvement import improvement
from calib.cascade_search.methods import Method
from calib.cascade_search.points import operating_points, why_not_deployable
from calib.cascade_search.search import CascadePoint, search
from calib.cascade_search.shift import shifted
from calib.cascade_search.signals import Judgement
from edge_runtime.errors import CalibrationError, ConfigError

BOUNDS = (0.0, 1.0)


def point(correct: int, cost: float, *models: str) -> CascadePoint:
    """Of ten samples."""
    return CascadePoint((0.5,) * (len(models) - 1), (10,), correct, cost, models or ("m",))


SINGLES = [point(6, 1.0), point(8, 3.0)]
FRONT = [point(6, 1.0), point(7, 1.25, "a", "b"), point(8, 2.0, "a", "b"), point(9, 3.5, "b", "c")]


def test_the_factor_is_interpolated_cost_over_that_of_the_cheapest_cascade() -> None:
    gain = improvement(FRONT, SINGLES)
    assert gain.accuracy.tolist() == [0.6, 0.7, 0.8]
    # Halfway between the single models the baseline costs (1 + 3) / 2.
    assert gain.factor == pytest.approx([1.0, 2 / 1.25, 3 / 2])
    assert gain.maximum == pytest.approx(1.6)
    assert gain.best_accuracy == 0.7
    # Up to 0.7 the baseline is 1.5 on average, beyond 2.5.
    assert gain.average == pytest.approx((1.5 / 1.25 + 2.5 / 2) / 2)
    xs, ys = gain.line
    assert xs.tolist() == [0.6, 0.6, 0.7, 0.7, 0.8]
    assert ys == pytest.approx([1, 1 / 1.25, 1.6, 2 / 2, 1.5])


def test_the_average_over_a_part_of_the_range() -> None:
    gain = improvement(FRONT, SINGLES, 0.65, 0.75)
    assert gain.accuracy.tolist() == [0.65, 0.7, 0.75]
    assert gain.average == pytest.approx((1.75 / 1.25 + 2.25 / 2) / 2)
    assert improvement(FRONT, SINGLES, 0.5, 1.0).average == improvement(FRONT, SINGLES).average
    with pytest.raises(ConfigError, match=re.escape("expected one within 0.6000..0.8000")):
        improvement(FRONT, SINGLES, 0.85, 0.95)


def test_cascades_that_do_not_reach_the_best_model_end_the_range() -> None:
    gain = improvement(FRONT[:2], SINGLES)
    assert gain.accuracy.tolist() == [0.6, 0.7]
    one = improvement([point(7, 2.0)], [point(7, 3.0)])
    assert (one.average, one.maximum) == (1.5, 1.5)


def test_peaks_have_valleys_between_them() -> None:
    singles = [point(0, 10.0), point(9, 10.0 + 1e-9)]
    factors = [1.0, 4.0, 3.8, 1.2, 2.0, 1.9, 2.05, 1.0, 1.0, 3.0]
    # Descending in cost is no front, so let the cheapest be the one at each accuracy.
    gain = improvement([point(i, 10.0) for i in range(10)], singles)
    object.__setattr__(gain, "cost", gain.baseline / np.array(factors))
    assert gain.peaks(2) == [0.1, 0.9]
    assert gain.peaks(9) == [0.1, 0.6, 0.9]


def exits_of(correct: dict[str, str], signal: dict[str, list[float]]) -> Alone:
    return Alone(
        {
            name: Judgement(np.array(signal[name], np.float32), np.array([c == "1" for c in right]))
            for name, right in correct.items()
        }
    )


def test_operating_points_of_a_cascade_that_helps() -> None:
    """The small model is right where it is confident; the large one is wrong once there."""
    exits = exits_of(
        {"small": "1111110000", "large": "0111110110"},
        {"small": [0.9, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1], "large": [0.5] * 10},
    )
    costs = {"small": 1.0, "large": 10.0}
    result = search(exits, costs)
    gain = improvement(result.front, result.single_front)
    found = operating_points(result, gain, budgets=[6.0, 0.5])
    assert list(found.points) == [
        "zero_loss",
        "drop_0.01",
        "drop_0.1",
        "drop_0.5",
        "drop_1.0",
        "budget_6",
        "budget_0.5",
        "max_accuracy",
        "max_improvement",
    ]
    best = found.points["max_accuracy"]
    assert (best.models, best.counts, best.correct) == (("small", "large"), (7, 3), 8)
    assert best.thresholds == pytest.approx([0.35])
    assert best.cost == pytest.approx(4)
    zero_loss = found.points["zero_loss"]
    assert (zero_loss.counts, zero_loss.correct) == ((8, 2), 7)
    assert zero_loss.cost == pytest.approx(3)
    assert found.points["budget_6"] == best
    assert found.points["budget_0.5"] is None
    assert found.unreached == {
        "budget_0.5": "nothing achieves a mean cost of at most 0.5: the cheapest is small at 1"
    }


def test_a_cascade_that_does_not_help_leaves_single_models() -> None:
    exits = exits_of(
        {"small": "0011", "large": "1111"},
        {"small": [0.9, 0.8, 0.2, 0.1], "large": [0.5] * 4},
    )
    result = search(exits, {"small": 1.0, "large": 1.5})
    gain = improvement(result.front, result.single_front)
    found = operating_points(result, gain)
    assert found.points["zero_loss"].models == ("large",)
    assert found.points["zero_loss"].thresholds == ()
    assert found.points["max_improvement"] is None
    assert found.unreached == {
        "max_improvement": "no cascade costs less than single models of equal accuracy"
    }


@pytest.mark.parametrize(
    ("models", "method", "top", "reason"),
    [
        (("a", "b"), Method("entropy", scaled=True), 1, None),
        (("a",), Method("conf", "comparison"), 1, None),
        (("a", "b"), Method(ensemble="comparison"), 1, "the runtime does not ensemble"),
        (("a", "b"), Method(ensemble="mean_logits"), 1, "the runtime does not ensemble"),
        (("a", "b"), Method("top5_sum"), 1, "'top5_sum' is no metric of the runtime"),
        (("a", "b"), Method("conf"), 1, "'conf' is no metric of the runtime"),
        (("a", "p"), Method("conf"), 1, "the table has none of 'p'"),
        (("p",), Method("conf"), 1, "the table has none of 'p'"),
        (("a",), Method(), 5, "the runtime answers with one class, not with 5"),
    ],
)
def test_what_the_runtime_can_not_run(models, method: Method, top: int, reason) -> None:
    why_not = why_not_deployable(point(5, 1.0, *models), method, top, ["a", "b"])
    assert why_not is None if reason is None else reason in why_not


def population(samples: int, seed: int) -> Alone:
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=samples)
    found = {}
    for name, skill in (("a", 0.6), ("b", 1.0), ("c", 1.5)):
        score = skill - difficulty + 0.6 * generator.normal(size=samples)
        signal = 1 / (1 + np.exp(-np.abs(score + 0.5 * generator.normal(size=samples))))
        found[name] = Judgement(signal.astype(np.float32), score > 0)
    return Alone(found)


COSTS = {"a": 1.0, "b": 3.0, "c": 20.0}


def test_a_shift_evaluates_the_same_thresholds_on_other_samples() -> None:
    here, there = population(300, 0), population(200, 1)
    result = search(here, COSTS)
    shift = shifted(result, there, COSTS, BOUNDS)
    assert [p.models for p in shift.front] == [p.models for p in result.front]
    for before, after in zip(result.front, shift.front, strict=True):
        said = [there.models[name] for name in before.models]
        leaves = np.ones(200, bool)
        if before.thresholds:
            leaves = said[0].signal >= np.float32(before.thresholds[0])
        right = np.where(leaves, said[0].correct, said[-1].correct)
        assert after.thresholds == before.thresholds
        assert after.accuracy == right.mean()
        assert after.exit_rates[0] == leaves.mean()
    assert {p.models[0]: p.correct for p in shift.singles} == {
        name: one.correct.sum() for name, one in there.models.items()
    }
    assert shift.improvement.accuracy[0] == shift.single_front[0].accuracy


def test_held_out_figures_are_of_samples_that_were_not_searched() -> None:
    """By hand for one partition: search on each half, judge on the other."""
    exits = population(120, 3)
    found = held_out(exits, COSTS, BOUNDS, "c", repeats=1, folds=2, seed=5, budgets=[0.1])
    fold_of = np.random.default_rng(5).permutation(np.arange(120) % 2)
    worse = better = 0
    cost = 0.0
    for fold in range(2):
        seen = exits.rows(np.flatnonzero(fold_of != fold))
        unseen = exits.rows(np.flatnonzero(fold_of == fold))
        wanted = seen.models["c"].correct.sum()
        chosen = next(p for p in search(seen, COSTS).front if p.correct >= wanted)
        first, last = unseen.models[chosen.models[0]], unseen.models[chosen.models[-1]]
        leaves = first.signal >= np.float32(chosen.thresholds[0])
        right = np.where(leaves, first.correct, last.correct)
        reference = unseen.models["c"].correct
        worse += (reference & ~right).sum()
        better += (right & ~reference).sum()
        cost += 60 * COSTS[chosen.models[0]] + (~leaves).sum() * COSTS[chosen.models[-1]]
    figures = found["zero_loss"]
    assert (figures.worse, figures.better) == (worse, better)
    assert figures.drop == pytest.approx((worse - better) / 120)
    assert figures.cost == pytest.approx(cost / 120)
    assert figures.interval[0] < figures.drop < figures.interval[1]
    assert found["budget_0.1"].base_alone == 1
    assert found["budget_0.1"].drop == 0
    with pytest.raises(CalibrationError, match="in 5 folds: got 9, expected >= 10"):
        held_out(population(9, 0), COSTS, BOUNDS, "c")
