"""Rules, run as the scheduler runs them: exit after exit, dropping the samples that leave."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.confidence import Decision
from edge_runtime.errors import ConfigError
from edge_runtime.policy import (
    Never,
    Patience,
    PatientAndConfident,
    Policy,
    Streak,
    Threshold,
    check_patience,
)
from tests.edge_runtime.bundles import refused


def exits_of(policy: Policy, labels: np.ndarray, signals: np.ndarray) -> list[int]:
    """The exit at which each sample leaves; tables of shape (samples, exits)."""
    samples, exits = labels.shape
    found = [-1] * samples
    rows = np.arange(samples)
    streak = Streak()
    evaluated = policy.evaluated(exits)
    assert list(evaluated) == sorted(set(evaluated))
    for position in evaluated:
        signal = signals[rows, position].astype(np.float32)
        decision = Decision(labels[rows, position], signal, signal)
        if position == evaluated[-1]:
            leaves = np.ones(len(rows), bool)
        else:
            leaves = policy.leaves(position, decision, streak)
        assert leaves.shape == rows.shape
        assert leaves.dtype == bool
        for sample in rows[leaves]:
            found[sample] = position
        staying = np.flatnonzero(~leaves)
        rows = rows[staying]
        streak.keep(staying)
    return found


signal_values = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])


@st.composite
def tables(draw, exits=None):
    """(labels, signals) of a few samples at 2 to 5 exits."""
    samples = draw(st.integers(1, 6))
    exits = exits or draw(st.integers(2, 5))
    labels = draw(st.lists(st.integers(0, 2), min_size=samples * exits, max_size=samples * exits))
    signals = draw(st.lists(signal_values, min_size=samples * exits, max_size=samples * exits))
    shape = (samples, exits)
    return np.array(labels, np.int64).reshape(shape), np.array(signals, np.float32).reshape(shape)


def thresholds_for(exits: int):
    return st.lists(
        st.none() | signal_values | st.sampled_from([-1.0, 2.0]),
        min_size=exits - 1,
        max_size=exits - 1,
    ).map(tuple)


def by_hand(labels, signals, thresholds):
    """Lebovitz et al., Algorithm 1, one sample at a time."""
    return [
        next(
            (
                i
                for i, t in enumerate(thresholds)
                if t is not None and signals[sample, i] >= np.float32(t)
            ),
            len(thresholds),
        )
        for sample in range(len(labels))
    ]


class TestThreshold:
    @settings(deadline=None)
    @given(st.data(), tables())
    def test_the_first_exit_that_reaches_its_threshold(self, data, table):
        thresholds = data.draw(thresholds_for(table[0].shape[1]))
        assert exits_of(Threshold(thresholds, 0.0), *table) == by_hand(*table, thresholds)

    @settings(deadline=None)
    @given(st.data(), tables())
    def test_a_higher_threshold_never_exits_earlier(self, data, table):
        exits = table[0].shape[1]
        thresholds = list(data.draw(thresholds_for(exits)))
        raised = [
            None if t is None else data.draw(st.none() | st.floats(t, 3, width=32))
            for t in thresholds
        ]
        before = exits_of(Threshold(tuple(thresholds), 0.0), *table)
        after = exits_of(Threshold(tuple(raised), 0.0), *table)
        assert all(b <= a for b, a in zip(before, after, strict=True))

    @settings(deadline=None)
    @given(st.data(), tables())
    def test_a_sample_leaves_alone_where_it_leaves_in_a_batch(self, data, table):
        labels, signals = table
        rule = Threshold(data.draw(thresholds_for(labels.shape[1])), 0.0)
        together = exits_of(rule, labels, signals)
        alone = [
            exits_of(rule, labels[i : i + 1], signals[i : i + 1])[0] for i in range(len(labels))
        ]
        assert together == alone

    @pytest.mark.parametrize(
        ("thresholds", "evaluated"),
        [
            ((0.5, 0.5), (0, 1, 2)),
            ((None, 0.5), (1, 2)),
            ((0.5, None), (0, 2)),
            ((None, None), (2,)),
            ((0.0, 0.5), (0,)),
            ((0.5, -1.0), (0, 1)),
            ((None, 0.0), (1,)),
        ],
    )
    def test_evaluated(self, thresholds, evaluated):
        assert Threshold(thresholds, 0.0).evaluated(3) == evaluated

    def test_equal_leaves(self):
        signal = np.array([0.5, np.nextafter(np.float32(0.5), np.float32(0))], np.float32)
        decision = Decision(np.zeros(2, np.int64), signal, signal)
        leaves = Threshold((0.5,), 0.0).leaves(0, decision, Streak())
        assert leaves.tolist() == [True, False]

    def test_an_exit_without_a_threshold_lets_nobody_leave(self):
        decision = Decision(np.zeros(2, np.int64), np.ones(2, np.float32), np.ones(2, np.float32))
        for rule in (Threshold((None,), 0.0), PatientAndConfident((None,), 1)):
            assert not rule.leaves(0, decision, Streak()).any()


class TestNever:
    @settings(deadline=None)
    @given(tables())
    def test_everybody_goes_to_the_last_exit(self, table):
        labels, _ = table
        assert exits_of(Never(), *table) == [labels.shape[1] - 1] * len(labels)

    def test_only_the_last_exit_is_evaluated(self):
        assert Never().evaluated(4) == (3,)
        ones = np.ones(2, np.float32)
        decision = Decision(np.zeros(2, np.int64), ones, ones)
        assert not Never().leaves(0, decision, Streak()).any()


class TestPatience:
    @pytest.mark.parametrize(
        ("patience", "labels", "exit_"),
        [
            (1, [0, 0, 1, 1], 1),
            (1, [0, 1, 1, 0], 2),
            (1, [0, 1, 0, 1], 3),
            (2, [0, 0, 0, 1], 2),
            (2, [0, 1, 1, 1], 3),
            (2, [0, 0, 1, 1], 3),
            (3, [0, 0, 0, 0], 3),
        ],
    )
    def test_exits_that_agree_in_a_row(self, patience, labels, exit_):
        table = np.array([labels]), np.zeros((1, 4))
        assert exits_of(Patience(patience), *table) == [exit_]

    @settings(deadline=None)
    @given(tables(), st.integers(1, 5))
    def test_one_sample_at_a_time(self, table, patience):
        labels, _ = table
        exits = labels.shape[1]
        expected = []
        for row in labels:
            agreed, leaves = 0, exits - 1
            for i in range(1, exits - 1):
                agreed = agreed + 1 if row[i] == row[i - 1] else 0
                if agreed >= patience:
                    leaves = i
                    break
            expected.append(leaves)
        assert exits_of(Patience(patience), *table) == expected

    @settings(deadline=None)
    @given(tables(), st.integers(1, 4))
    def test_more_patience_never_exits_earlier(self, table, patience):
        before = exits_of(Patience(patience), *table)
        after = exits_of(Patience(patience + 1), *table)
        assert all(b <= a for b, a in zip(before, after, strict=True))

    @pytest.mark.parametrize(
        ("patience", "exits", "evaluated"),
        [(1, 3, (0, 1, 2)), (1, 2, (1,)), (2, 3, (2,)), (2, 4, (0, 1, 2, 3)), (9, 4, (3,))],
    )
    def test_a_patience_that_no_exit_can_reach_prunes_them(self, patience, exits, evaluated):
        assert Patience(patience).evaluated(exits) == evaluated


class TestPatientAndConfident:
    @settings(deadline=None)
    @given(st.data(), tables())
    def test_patience_1_is_threshold(self, data, table):
        thresholds = data.draw(thresholds_for(table[0].shape[1]))
        patient = exits_of(PatientAndConfident(thresholds, 1), *table)
        assert patient == exits_of(Threshold(thresholds, 0.0), *table)

    @settings(deadline=None)
    @given(st.data(), tables(), st.integers(1, 4))
    def test_one_sample_at_a_time(self, data, table, patience):
        labels, signals = table
        thresholds = data.draw(thresholds_for(labels.shape[1]))
        expected = []
        for row in signals:
            streak, leaves = 0, len(thresholds)
            for i, threshold in enumerate(thresholds):
                if threshold is None:
                    continue
                streak = streak + 1 if row[i] >= np.float32(threshold) else 0
                if streak >= patience:
                    leaves = i
                    break
            expected.append(leaves)
        assert exits_of(PatientAndConfident(thresholds, patience), *table) == expected

    @settings(deadline=None)
    @given(st.data(), tables(), st.integers(1, 3))
    def test_more_of_either_never_exits_earlier(self, data, table, patience):
        thresholds = data.draw(thresholds_for(table[0].shape[1]))
        raised = tuple(
            None if t is None else data.draw(st.floats(t, 3, width=32)) for t in thresholds
        )
        before = exits_of(PatientAndConfident(thresholds, patience), *table)
        for rule in (
            PatientAndConfident(raised, patience),
            PatientAndConfident(thresholds, patience + 1),
        ):
            after = exits_of(rule, *table)
            assert all(b <= a for b, a in zip(before, after, strict=True))

    @pytest.mark.parametrize(
        ("thresholds", "patience", "evaluated"),
        [
            ((0.5, 0.5, 0.5), 2, (0, 1, 2, 3)),
            ((0.5, None, 0.5), 2, (0, 2, 3)),
            ((0.5, None, None), 2, (3,)),
            ((None, None, None), 1, (3,)),
        ],
    )
    def test_evaluated(self, thresholds, patience, evaluated):
        assert PatientAndConfident(thresholds, patience).evaluated(4) == evaluated


def test_a_streak_keeps_the_rows_that_stay():
    streak = Streak()
    streak.keep(np.array([0, 1, 2]))
    assert streak.repeats(np.array([4, 5, 6])).tolist() == [False, False, False]
    assert streak.count(np.array([True, False, True])).tolist() == [1, 0, 1]
    streak.keep(np.array([0, 2]))
    assert streak.repeats(np.array([4, 5])).tolist() == [True, False]
    assert streak.count(np.array([True, True])).tolist() == [2, 2]


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_is_at_least_1(patience):
    with refused(ConfigError, f"patience: got {patience}, expected >= 1"):
        check_patience(patience)
