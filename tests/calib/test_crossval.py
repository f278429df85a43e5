"""Held-out figures: what they are made of, and how often their interval holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from calib.crossval import cross_validate, paired_interval
from calib.exit_table import ExitTable
from calib.sweep import measure
from calib.thresholds import AccuracyDrop, Goal, ZeroLoss, choose
from edge_runtime.errors import CalibrationError, ConfigError
from tests.calib.populations import BOUNDS, model_costs, population

COSTS = model_costs(2)


def chosen_by(goal: Goal, data: ExitTable) -> tuple[float | None, ...]:
    return choose(data, COSTS, goal, repeats=0).point.thresholds


def drop_of(thresholds: Sequence[float | None], data: ExitTable) -> float:
    point = measure(data, COSTS, thresholds)
    return float(data.correct[:, -1].mean()) - point.accuracy


def test_fixed_thresholds_give_the_figures_of_the_whole_table() -> None:
    data = population(203, (1.0, 1.5), seed=0)
    point = measure(data, COSTS, (0.7,))
    validation = cross_validate(data, COSTS, lambda _: (0.7,), repeats=3, folds=4)
    assert validation.drop == pytest.approx(drop_of((0.7,), data))
    assert validation.cost == pytest.approx(point.cost)
    assert validation.exit_rates == pytest.approx(point.exit_rates)
    at = data.leave_at((0.7,))
    cascade, base = data.correct[np.arange(203), at], data.correct[:, -1]
    assert validation.worse == pytest.approx((base & ~cascade).sum())
    assert validation.better == pytest.approx((cascade & ~base).sum())
    assert validation.worse > 0 and validation.better > 0
    assert validation.base_alone == 0
    assert (validation.samples, validation.repeats, validation.folds) == (203, 3, 4)


def test_each_sample_is_held_out_once_per_repeat_and_never_seen() -> None:
    numbers = np.linspace(0, 1, 23, dtype=np.float32)
    data = ExitTable(numbers[:, None], np.ones((23, 2), bool), BOUNDS)
    held_out: list[list[float]] = []

    def procedure(training: ExitTable) -> tuple[None]:
        held_out.append(sorted(set(numbers.tolist()) - set(training.signals[:, 0].tolist())))
        return (None,)

    validation = cross_validate(data, COSTS, procedure, repeats=2, folds=5)
    for repeat in (held_out[:5], held_out[5:]):
        assert sorted(number for fold in repeat for number in fold) == numbers.tolist()
        assert [len(fold) for fold in repeat] == [5, 5, 5, 4, 4]
    assert held_out[:5] != held_out[5:]
    assert validation.base_alone == 1
    assert (validation.drop, validation.below) == (0, 0)


def test_below_counts_folds_and_not_ties() -> None:
    # One sample in ten is lost, always the same one: one fold of five is below, four are ties.
    correct = np.ones((10, 2), bool)
    correct[3, 0] = False
    data = ExitTable(np.full((10, 1), 0.5, np.float32), correct, BOUNDS)
    validation = cross_validate(data, COSTS, lambda _: (0.0,), repeats=4)
    assert validation.below == pytest.approx(0.2)
    assert validation.drop == pytest.approx(0.1)


def test_same_seed_same_result() -> None:
    data = population(150, (1.0, 1.5), seed=1)

    def run(seed: int) -> object:
        return cross_validate(data, COSTS, lambda part: chosen_by(ZeroLoss(), part), seed=seed)

    assert run(5) == run(5)
    assert run(5) != run(6)


@pytest.mark.parametrize("seed", range(3))
def test_zero_loss_on_one_half_is_a_coin_flip_on_the_other(seed: int) -> None:
    """Measured on a real pair: 60 % of the halves fall below the base (methods.md, "Beyond")."""
    data = population(2000, (1.2, 1.4), seed=seed)
    validation = cross_validate(
        data, COSTS, lambda part: chosen_by(ZeroLoss(), part), repeats=25, folds=2, seed=seed
    )
    in_sample = choose(data, COSTS, ZeroLoss(), repeats=0)
    assert in_sample.point.correct >= in_sample.base.correct
    assert 0.2 < validation.below < 0.8
    assert validation.drop > 0
    low, high = validation.interval
    assert low < 0 < high


def test_interval_of_a_published_example() -> None:
    """Output of ci.prop.ps(.05, 12, 4, 26, 6) of the R package statpsych, by the same authors."""
    assert paired_interval(26, 4, 48) == pytest.approx((0.2548067, 0.6251933), abs=1e-7)


def test_interval_without_discordant_pairs_has_a_width() -> None:
    low, high = paired_interval(0, 0, 450)
    assert low == -high
    assert high == pytest.approx(1.96 * math.sqrt(2) / 452, rel=1e-3)


def test_interval_for_new_data_is_wider_and_tends_to_that_of_the_truth() -> None:
    widths = [np.ptp(paired_interval(9, 2, 300, new)) for new in (50, 300, 10**9, math.inf)]
    assert widths[0] > widths[1] > widths[2] == pytest.approx(widths[3])
    assert widths[1] == pytest.approx(math.sqrt(1 + 302 / 300) * widths[3])


def test_interval_stays_within_what_is_possible() -> None:
    assert paired_interval(3, 0, 3)[1] == 1
    assert paired_interval(0, 3, 3)[0] == -1


@pytest.mark.parametrize(
    ("goal", "samples"),
    [(ZeroLoss(), 100), (ZeroLoss(), 450), (AccuracyDrop(0.01), 450)],
    ids=["zero loss of 100", "zero loss of 450", "drop of 450"],
)
def test_interval_covers_the_true_drop(goal: Goal, samples: int) -> None:
    """Draws from a population: the interval must hold for the thresholds chosen on all the data.

    A 95 % interval that covered in 95 % would fall below 91 % of 150 draws once in 50.
    """
    everything = population(200_000, (1.2, 1.6), seed=3)
    generator = np.random.default_rng(4)
    truth, measured, intervals, predictions = [], [], [], []
    for draw in range(150):
        rows = generator.permutation(everything.samples)[: 2 * samples]
        data, new = everything.rows(rows[:samples]), everything.rows(rows[samples:])
        choice = choose(data, COSTS, goal, repeats=3, seed=draw)
        assert choice.cross_validation is not None
        truth.append(drop_of(choice.point.thresholds, everything))
        measured.append(drop_of(choice.point.thresholds, new))
        intervals.append(choice.cross_validation.interval)
        predictions.append(choice.cross_validation.interval_on(samples))

    def coverage(ends: list[tuple[float, float]], values: list[float]) -> float:
        low, high = np.array(ends).T
        return float(((low <= values) & (values <= high)).mean())

    assert coverage(intervals, truth) >= 0.91
    assert coverage(predictions, measured) >= 0.91
    # Neither by being too wide to be of use, nor by a truth that stands still at zero.
    assert np.std(truth) > 0.001
    assert np.ptp(intervals, axis=1).mean() < 10 / math.sqrt(samples) * math.sqrt(0.02)


@pytest.mark.parametrize(("samples", "folds"), [(9, 5), (3, 2), (1, 2)])
def test_too_little_data(samples: int, folds: int) -> None:
    data = population(samples, (1.0, 1.5), seed=0)
    with pytest.raises(CalibrationError, match=f"got {samples}, expected >= {2 * folds}"):
        cross_validate(data, COSTS, lambda _: (None,), folds=folds)


@pytest.mark.parametrize(("repeats", "folds"), [(0, 5), (10, 1)])
def test_no_cross_validation_at_all(repeats: int, folds: int) -> None:
    data = population(50, (1.0, 1.5), seed=0)
    with pytest.raises(ConfigError, match=f"got {folds} folds, {repeats} repeats"):
        cross_validate(data, COSTS, lambda _: (None,), repeats=repeats, folds=folds)
