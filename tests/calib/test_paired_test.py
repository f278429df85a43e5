"""The exact test on paired answers, against a sum over all that can happen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from calib.paired_test import fewest_samples, paired_test, samples_for
from edge_runtime.errors import CalibrationError


def passing(samples: int, epsilon: float, delta: float, lost: float, won: float) -> float:
    """Probability that the test passes at given true rates: all counts, one by one."""
    test = paired_test(samples, epsilon, delta)
    x, y = np.meshgrid(np.arange(samples + 1), np.arange(samples + 1), indexing="ij")
    possible = x + y <= samples
    x, y = x[possible], y[possible]
    chance = binom.pmf(x, samples, lost) * binom.pmf(y, samples - x, won / (1 - lost))
    return float(chance[test.passes(x, y)].sum())


@pytest.mark.parametrize(
    ("samples", "epsilon", "delta"), [(40, 0.1, 0.1), (75, 0.05, 0.05), (120, 0.03, 0.2)]
)
def test_a_drop_of_epsilon_passes_with_delta_at_most(
    samples: int, epsilon: float, delta: float
) -> None:
    rates = np.linspace(1e-6, 0.45, 150) ** 2 / 0.45
    at_epsilon = [passing(samples, epsilon, delta, won + epsilon, won) for won in rates]
    assert max(at_epsilon) <= delta
    # No more is given away than counts can't help.
    assert max(at_epsilon) >= 0.75 * delta
    above = [passing(samples, epsilon, delta, won + 1.3 * epsilon, won) for won in rates[::10]]
    assert max(above) <= max(at_epsilon)


@pytest.mark.parametrize("samples", [310, 2000, 20_000])
def test_one_sample_won_instead_of_lost_never_harms(samples: int) -> None:
    allowed = paired_test(samples, 0.01, 0.05).allowed
    assert len(allowed) == samples + 1
    assert set(np.diff(allowed).tolist()) == {0, 1}


def test_wins_count() -> None:
    """1.2 % lost and 0.9 % won: the lost samples alone would show nothing."""
    draws = np.random.default_rng(0).multinomial(2000, [0.012, 0.009, 0.979], 4000)
    lost, won = draws[:, 0], draws[:, 1]
    assert paired_test(2000, 0.01, 0.05).passes(lost, won).mean() > 0.6
    assert (binom.cdf(lost, 2000, 0.01) <= 0.05).mean() < 0.01
    # Where nothing is won it takes no more than the binomial test does.
    lost = np.arange(40)
    paired = paired_test(2000, 0.01, 0.05).passes(lost, np.zeros_like(lost))
    assert (paired >= (binom.cdf(lost, 2000, 0.01) <= 0.05)).all()


@pytest.mark.parametrize(("epsilon", "delta"), [(0.01, 0.05), (0.005, 0.1), (0.1, 0.01)])
def test_fewest_samples(epsilon: float, delta: float) -> None:
    fewest = fewest_samples(epsilon, delta)
    assert (1 - epsilon) ** fewest <= delta < (1 - epsilon) ** (fewest - 1)
    assert paired_test(fewest - 1, epsilon, delta).allowed[0] == -1
    assert paired_test(math.ceil(1.2 * fewest), epsilon, delta).allowed[0] == 0


def test_so_many_samples_do_with_a_chance_of_nine_in_ten() -> None:
    generator = np.random.default_rng(1)
    for lost, won in ((0.004, 0.002), (0.02, 0.016)):
        samples = samples_for(lost, won, 0.01, 0.05)
        assert samples is not None
        draws = generator.multinomial(samples, [lost, won, 1 - lost - won], 4000)
        passed = paired_test(samples, 0.01, 0.05).passes(draws[:, 0], draws[:, 1])
        assert 0.85 < passed.mean() < 0.95
    assert samples_for(0.02, 0.01, 0.01, 0.05) is None
    assert samples_for(0, 0, 0.01, 0.05) == fewest_samples(0.01, 0.05)


def test_too_many_samples() -> None:
    with pytest.raises(CalibrationError, match=r"got 200001, expected at most 200000. Test a"):
        paired_test(200_001, 0.01, 0.05)
