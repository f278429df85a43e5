"""Percentiles, ratios and loops."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.timing import FakeClock, Latency, interleave, ratio, warm_up


def test_latency_of_known_numbers() -> None:
    latency = Latency.of(np.arange(1, 1002))
    assert (latency.count, latency.mean, latency.p50, latency.max) == (1001, 501, 501, 1001)
    assert (latency.p90, latency.p99, latency.p999) == pytest.approx((901, 991, 1000))


def test_a_ratio_survives_a_drifting_machine() -> None:
    """Both series drift together by a factor of three; their ratio is known."""
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 2000)
    a = drift * 1.10 * rng.lognormal(0, 0.05, 2000)
    b = drift * rng.lognormal(0, 0.05, 2000)
    found = ratio(a, b)
    assert found.value == pytest.approx(1.10, rel=0.01)
    assert found.low < 1.10 < found.high
    assert found.high - found.low < 0.2


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for i in range(200):
        a, b = rng.lognormal(0.1, 0.2, 400), rng.lognormal(0, 0.2, 400)
        found = ratio(a, b, resamples=200, seed=i)
        hits += found.low <= np.exp(0.1) <= found.high
    assert 0.85 <= hits / 200 <= 0.99


def test_correlated_noise_widens_the_interval() -> None:
    rng = np.random.default_rng(2)
    slow = np.repeat(rng.lognormal(0, 0.2, 40), 50)
    fast = rng.lognormal(0, 0.2, 2000)
    ones = np.ones(2000)

    def width(series):
        found = ratio(series, ones, statistic=np.mean)
        return found.high - found.low

    assert width(slow) > 3 * width(fast)


def test_a_ratio_is_the_same_every_time() -> None:
    a, b = np.random.default_rng(3).random((2, 100))
    assert ratio(a, b) == ratio(a, b)
    assert str(ratio([2.0] * 8, [1.0] * 8)) == "2.000 [2.000, 2.000]"


@pytest.mark.parametrize("shapes", [((3,), (4,)), ((0,), (0,)), ((2, 2), (2, 2))])
def test_series_of_different_lengths_are_refused(shapes) -> None:
    with pytest.raises(ValueError, match="series of one length"):
        ratio(*(np.ones(shape) for shape in shapes))


def test_subjects_take_turns() -> None:
    clock, order = FakeClock(), []

    def subject(name, seconds):
        def work():
            order.append(name)
            clock.advance(seconds)

        return work

    subjects = {"a": subject("a", 1.0), "b": subject("b", 2.0)}
    times = interleave(subjects, rounds=3, clock=clock)
    assert order == ["a", "b"] * 3
    np.testing.assert_allclose(times["b"], [2, 2, 2])


def test_warm_up_lasts_for_both_iterations_and_seconds() -> None:
    clock, calls = FakeClock(), []

    def work():
        calls.append(1)
        clock.advance(0.5)

    warm_up(work, iterations=3, seconds=5.0, clock=clock)
    assert len(calls) == 10
    warm_up(work, iterations=30, seconds=0.0, clock=clock)
    assert len(calls) == 40
