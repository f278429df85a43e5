"""Histograms that grow without growing, and the ranges chosen from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.histogram import BINS, LEVELS, METHODS, Histogram
from edge_runtime import CalibrationError


def histogram_of(*parts: np.ndarray) -> Histogram:
    histogram = Histogram()
    for part in parts:
        histogram.add(np.asarray(part, np.float32))
    return histogram


def quantised(values: np.ndarray, limit: float) -> np.ndarray:
    step = limit / LEVELS
    return np.clip(np.rint(values / step), -LEVELS, LEVELS) * step


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(1e-3, 1e4), min_size=1, max_size=8), st.integers(0, 2**32 - 1))
def test_no_value_is_lost_however_the_end_moves(scales: list[float], seed: int) -> None:
    random = np.random.default_rng(seed)
    parts = [random.standard_normal(100) * scale for scale in scales]
    histogram = histogram_of(*parts)
    everything = np.abs(np.concatenate(parts).astype(np.float32))
    assert histogram.counts.shape == (BINS,)
    assert histogram.counts.sum() == everything.size
    assert histogram.largest == everything.max()
    assert histogram.largest <= histogram.end


def test_doubling_keeps_values_in_the_bins_of_their_size() -> None:
    values = np.linspace(0.01, 1, 1000)
    grown = histogram_of(values, [7.9])
    direct = np.histogram([*values, 7.9], BINS, (0, grown.end))[0]
    assert np.abs(np.cumsum(grown.counts) - np.cumsum(direct)).max() <= 1
    assert grown.end == 8.0


def test_zeros_before_anything_else_are_counted() -> None:
    histogram = histogram_of(np.zeros(10), [-2.0])
    assert histogram.counts.sum() == 11
    assert histogram.counts[0] == 10


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        histogram_of([1.0, bad])


def test_a_tensor_that_is_always_zero_has_no_range() -> None:
    with pytest.raises(CalibrationError, match="always zero"):
        histogram_of(np.zeros(5)).range("minmax")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", range(3))
def test_a_range_lies_within_what_was_seen(method: str, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(20000) * 3
    found = histogram_of(values).range(method)
    assert 0 < found <= np.abs(values.astype(np.float32)).max()


def test_minmax_is_the_largest_value() -> None:
    assert histogram_of([1.0, -3.25], [2.0]).range("minmax") == 3.25


def test_percentile_leaves_out_its_share() -> None:
    values = np.random.default_rng(0).random(100_000)
    values[:5] = 50.0
    found = histogram_of(values).range("percentile")
    assert 0.99 < found < 1.05


def test_mse_is_the_range_of_the_least_error() -> None:
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    histogram = histogram_of(values)
    limits = np.linspace(1, histogram.largest, 200)
    errors = [np.mean((quantised(values, limit) - values) ** 2) for limit in limits]
    found = histogram.range("mse")
    assert np.mean((quantised(values, found) - values) ** 2) <= min(errors) * 1.01


def test_entropy_cuts_a_lonely_outlier_and_keeps_a_plain_distribution() -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    assert histogram_of(values, [40.0]).range("entropy") < 8
    uniform = np.random.default_rng(0).random(200_000)
    assert histogram_of(uniform).range("entropy") > 0.98


def test_a_relu_s_zeros_do_not_decide_the_entropy() -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    positive = histogram_of(np.maximum(values, 0)).range("entropy")
    assert positive > 0.9 * histogram_of(values).range("entropy")


def test_scaling_the_values_scales_every_range() -> None:
    values = np.random.default_rng(1).laplace(size=50_000)
    for method in METHODS:
        one, four = (histogram_of(values * scale).range(method) for scale in (1.0, 4.0))
        assert four == pytest.approx(4 * one, rel=1e-5)
