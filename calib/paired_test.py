"""Is a cascade at most epsilon less accurate than its base? An exact test on the same samples.

Of two classifiers that answer the same samples, only the disagreements tell: the samples that only
the base has right (lost) and those that only the cascade has right (won). Their difference bounds
the drop of accuracy; its noise grows with their sum, so it matters that wins are counted too.

The test is *exact*: whatever the rates of lost and won samples are, a cascade whose true drop is
epsilon or more passes with a probability of at most delta. Of the ways to do so it needs the least
data by far. Chance to certify epsilon = 0.01 at delta = 0.05 with 2,000 samples (4,000 draws each):

```
true rates, lost / won             0.3 / 0.1 %   0.5 / 0.3 %   1.2 / 0.9 %   3.0 / 2.7 %
this test                              0.999         0.971         0.662         0.350
exact binomial, lost samples alone     0.993         0.795         0.004         0
betting, in a random order             0.971         0.882         0.472         0.227
two Clopper-Pearson bounds             0.985         0.844         0.235         0.060
Hoeffding-Bentkus                      0             0             0             0
```

Reference:
    Hsueh, Liu and Chen, Unconditional Exact Tests for Equivalence or Noninferiority for Paired
    Binary Endpoints, Biometrics 57(2), 2001: the test, with the score statistic of Nam, Biometrics
    53(4), 1997 (that of Tango, Statistics in Medicine 17, 1998), and the worst case on the boundary
    of the hypothesis. Compared above: Waudby-Smith and Ramdas, Estimating Means of Bounded Random
    Variables by Betting, JRSS B 86(1), 2024, with predictable plug-in bets; Clopper and Pearson,
    Biometrika 26, 1934, at 0.6 and 0.4 delta; Bates et al., Distribution-Free, Risk-Controlling
    Prediction Sets, J. ACM 68(6), 2021.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import CalibrationError

#: Share of delta that is given away so that the worst case between grid points is covered too.
_SLACK = 0.02
#: The critical value is first found on every so many-th point of the grid.
_COARSE = 16
_CRITICAL_STEP = 2e-3
#: A test of so many samples takes up to 10 s to set up, one of 50,000 up to 2 s (one core).
_MOST_SAMPLES = 200_000
#: Chance of success that `samples_for` plans for.
_POWER = 0.9


@dataclass(frozen=True)
class PairedTest:
    """Which counts of lost and won samples prove a drop below epsilon.

    Attributes:
        samples: Number of samples that both classifiers answered.
        epsilon: The drop to exclude, a fraction.
        delta: Largest probability of passing although the true drop is epsilon or more.
        allowed: The most samples that may be lost among m disagreements, m from 0 to `samples`;
            -1 where that many can't pass; shape (samples + 1,), int64.
    """

    samples: int
    epsilon: float
    delta: float
    allowed: NDArray[np.int64]

    def passes(self, lost: NDArray[np.int64], won: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the counts prove it.

        Args:
            lost: Samples that only the base has right, any shape.
            won: Samples that only the cascade has right, same shape.
        """
        proved: NDArray[np.bool_] = lost <= self.allowed[lost + won]
        return proved


@functools.lru_cache(maxsize=64)
def paired_test(samples: int, epsilon: float, delta: float) -> PairedTest:
    """Set up the test for a number of samples.

    Counts pass where the score statistic is at least a critical value: the smallest for which the
    probability of passing is at most delta, in the worst case over the unknown rate of won samples.

    Args:
        samples: Number of samples, from 1 to 200,000.
        epsilon: In (0, 0.5).
        delta: From 0.001 to below 0.5.

    Raises:
        CalibrationError: There are more samples than that.
    """
    if samples > _MOST_SAMPLES:
        raise CalibrationError(
            "samples of one test",
            got=samples,
            expected=f"at most {_MOST_SAMPLES}",
            remedy="Test a random part of them",
        )
    trinomial = _Trinomial(samples, epsilon, delta)
    grid = list(trinomial.grid())
    level = delta * (1 - _SLACK)
    low, high = 0.0, NormalDist().inv_cdf(1 - delta) + 0.5
    while trinomial.size(_allowed(samples, epsilon, high), grid[::_COARSE]) > level:
        low, high = high, high + 1
    while high - low > _CRITICAL_STEP:
        middle = (low + high) / 2
        if trinomial.size(_allowed(samples, epsilon, middle), grid[::_COARSE]) > level:
            low = middle
        else:
            high = middle
    while trinomial.size(allowed := _allowed(samples, epsilon, high), grid) > level:
        high += _CRITICAL_STEP
    allowed.flags.writeable = False
    return PairedTest(samples, epsilon, delta, allowed)


def fewest_samples(epsilon: float, delta: float) -> int:
    """Below this many samples nothing is proved by a cascade that never disagrees with its base."""
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def samples_for(lost: float, won: float, epsilon: float, delta: float) -> int | None:
    """About how many samples prove it with a chance of 90 %.

    Args:
        lost: True rate of samples that only the base has right.
        won: True rate of samples that only the cascade has right.
        epsilon: See `PairedTest`.
        delta: See `PairedTest`.

    Returns:
        The number, None where the drop is epsilon or more.
    """
    drop = lost - won
    if drop >= epsilon:
        return None
    # At the boundary as many more are lost as the drop lacks.
    least = max(lost, won + epsilon) + won - epsilon**2
    spread = NormalDist().inv_cdf(1 - delta) * math.sqrt(least)
    spread += NormalDist().inv_cdf(_POWER) * math.sqrt(lost + won - drop**2)
    return max(math.ceil((spread / (epsilon - drop)) ** 2), fewest_samples(epsilon, delta))


def _score(
    lost: NDArray[np.int64], won: NDArray[np.int64], samples: int, epsilon: float
) -> NDArray[np.float64]:
    """How far the drop lies below epsilon, in standard errors at a true drop of epsilon."""
    b = 2 * samples * epsilon - (lost + won) - epsilon * (lost - won)
    c = won * epsilon * (1 - epsilon)
    rate = (np.sqrt(b * b + 8 * samples * c) - b) / (4 * samples)
    variance = samples * (2 * np.maximum(rate, 0) + epsilon * (1 - epsilon))
    score: NDArray[np.float64] = (samples * epsilon - (lost - won)) / np.sqrt(variance)
    return score


def _allowed(samples: int, epsilon: float, critical: float) -> NDArray[np.int64]:
    """The most lost samples among m disagreements whose score is at least `critical`.

    Where a sample is lost less or won more, what passed still passes. Without that the worst case
    would not lie at a drop of epsilon.
    """
    disagreements = np.arange(_most_disagreements(samples, epsilon) + 1)
    low = np.full(len(disagreements), -1)
    high = disagreements.copy()
    while (low < high).any():
        middle = (low + high + 1) // 2
        enough = _score(middle, disagreements - middle, samples, epsilon) >= critical
        low, high = np.where(enough, middle, low), np.where(enough, high, middle - 1)
    rising = np.minimum.accumulate(low[::-1])[::-1]
    by_one = np.minimum.accumulate(rising - disagreements) + disagreements
    return np.concatenate((by_one, np.full(samples - len(by_one) + 1, by_one[-1])))


def _most_disagreements(samples: int, epsilon: float) -> int:
    """Disagreements beyond these do not raise what may be lost; none of that size is of use."""
    return min(int(samples * (0.25 + epsilon)), samples)


class _Trinomial:
    """Probabilities at a true drop of epsilon, which leaves one unknown: the rate of won samples.

    Of the disagreements M, binomial, the lost ones are binomial again.
    """

    def __init__(self, samples: int, epsilon: float, delta: float) -> None:
        self._samples = samples
        self._epsilon = epsilon
        self._delta = delta
        self._log_factorial = np.concatenate(
            ([0.0], np.cumsum(np.log(np.arange(1, samples + 1, dtype=np.float64))))
        )

    def grid(self) -> Iterator[float]:
        """Rates of won samples, so dense that between them no probability is larger by the slack.

        The second derivative of the probability of any event is at most the Fisher information of
        the rate, which bounds what a maximum between two points may add. At both ends, where the
        information is infinite, the total variation bounds it. Beyond the last rate a test passes
        with a probability below delta by Hoeffding's inequality, for what passes has no more
        disagreements than `_most_disagreements`, or loses no more than at that number.
        """
        n, epsilon, extra = self._samples, self._epsilon, _SLACK * self._delta
        most = _most_disagreements(n, epsilon) / n + math.sqrt(2 * math.log(2 / self._delta) / n)
        end = min((most - epsilon) / 2, (1 - epsilon) / 2)
        rate = extra / (2 * n)
        while rate < end and 2 * n * ((1 - epsilon) / 2 - rate) > extra:
            yield rate
            agree = 1 - epsilon - 2 * rate
            information = n * (1 / rate + 1 / (rate + epsilon) + 8 / agree)
            rate += min(math.sqrt(8 * extra / information), agree / 4)
        yield min(rate, (1 - epsilon) / 2 - extra / (4 * n))

    def size(self, allowed: NDArray[np.int64], rates: list[float]) -> float:
        """The largest probability of passing over the rates of won samples."""
        return max(self._passing(allowed, rate) for rate in rates)

    def _passing(self, allowed: NDArray[np.int64], won: float) -> float:
        total = 2 * won + self._epsilon
        share = (won + self._epsilon) / total
        first, last = self._around(self._samples, total)
        m = np.arange(first, last + 1)
        most = allowed[first : last + 1]
        # P(lost <= most) for the first m; then one disagreement more at a time.
        lost = np.arange(max(self._around(first, share)[0], 0), most[0] + 1)
        start = self._binomial(lost, np.full(len(lost), first), share).sum()
        step = np.where(
            np.diff(most) > 0,
            self._binomial(most[1:], m[1:], share),
            0.0,
        ) - share * self._binomial(most[:-1], m[:-1], share)
        below = np.concatenate(([start], start + np.cumsum(step)))
        weight = self._binomial(m, np.full(len(m), self._samples), total)
        # What lies outside of the window counts as passing.
        return float(weight @ below) + max(0.0, 1 - float(weight.sum()))

    def _around(self, trials: int, rate: float) -> tuple[int, int]:
        """The numbers of successes that are not utterly unlikely."""
        wide = 8 * math.sqrt(trials * rate * (1 - rate)) + 40
        return max(int(trials * rate - wide), 0), min(int(trials * rate + wide), trials)

    def _binomial(
        self, successes: NDArray[np.int64], trials: NDArray[np.int64], rate: float
    ) -> NDArray[np.float64]:
        """Probabilities; 0 for a negative number of successes."""
        known = np.maximum(successes, 0)
        of = self._log_factorial
        log = of[trials] - of[known] - of[trials - known]
        log += known * math.log(rate) + (trials - known) * math.log1p(-rate)
        probability: NDArray[np.float64] = np.where(successes >= 0, np.exp(log), 0.0)
        return probability
