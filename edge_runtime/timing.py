"""Clocks, percentiles, and ratios of medians with their interval.

All durations are seconds on a monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: A clock returns seconds since an arbitrary moment and never goes back.
Clock = Callable[[], float]


class FakeClock:
    """A clock that stands still until somebody moves it."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        """Seconds since the clock was made."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


@dataclass(frozen=True, slots=True)
class Latency:
    """Summary of durations, in seconds.

    Attributes:
        count: Number of durations.
        mean: Arithmetic mean.
        p50: Median.
        p90: 90th percentile.
        p99: 99th percentile.
        p999: 99.9th percentile.
        max: Largest.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    p999: float
    max: float

    @classmethod
    def of(cls, seconds: ArrayLike) -> Latency:
        """Summarise one or more durations."""
        values = np.asarray(seconds, np.float64)
        p50, p90, p99, p999 = np.percentile(values, [50, 90, 99, 99.9])
        return cls(
            count=values.size,
            mean=float(values.mean()),
            p50=float(p50),
            p90=float(p90),
            p99=float(p99),
            p999=float(p999),
            max=float(values.max()),
        )


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio with its 95 % interval.

    Attributes:
        value: Statistic of the numerator over that of the denominator.
        low: 2.5th percentile over bootstrap resamples.
        high: 97.5th percentile.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """As people write it: 1.84 [1.79, 1.88]."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    statistic: Callable[[NDArray[np.float64]], np.floating] = np.median,
    block: int = 50,
    resamples: int = 2000,
    seed: int = 0,
) -> Ratio:
    """Compare two series that were measured in turn (A B A B ...).

    Neighbouring measurements share the machine's mood, so whole blocks of `block` rounds are
    drawn, the same ones for both series (circular block bootstrap).

    Args:
        numerator: Durations of A, one per round, shape (rounds,).
        denominator: Durations of B, same shape.
        statistic: `numpy.median`, or `numpy.mean` where expectations are compared.
        block: Rounds per block; shortened where there are fewer than 20 blocks, of which resamples
            would be too alike.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Returns:
        The ratio of the two statistics with its 95 % interval.

    Reference:
        Politis and Romano, A circular block-resampling procedure for stationary data, 1992.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    rounds = len(a)
    if a.shape != b.shape or a.ndim != 1 or rounds == 0:
        raise ValueError(f"series of one length: got {a.shape} and {b.shape}")
    block = max(1, min(block, rounds // 20))
    starts = np.random.default_rng(seed).integers(0, rounds, (resamples, -(-rounds // block)))
    if statistic is np.mean:
        sums = [_block_sums(series, block)[starts].sum(axis=1) for series in (a, b)]
        values = sums[0] / sums[1]
    else:
        values = np.empty(resamples)
        for i, row in enumerate(starts):
            rows = ((row[:, None] + np.arange(block)) % rounds).ravel()[:rounds]
            values[i] = statistic(a[rows]) / statistic(b[rows])
    low, high = np.percentile(values, [2.5, 97.5])
    return Ratio(float(statistic(a) / statistic(b)), float(low), float(high))


def _block_sums(values: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    """Sum of the block that begins at each value, around the end, shape as `values`."""
    around = np.concatenate([[0.0], np.cumsum(np.concatenate([values, values[: block - 1]]))])
    sums: NDArray[np.float64] = around[block:] - around[:-block]
    return sums


def warm_up(
    work: Callable[[], object], *, clock: Clock, iterations: int = 200, seconds: float = 0.2
) -> None:
    """Call `work` until both `iterations` calls were made and `seconds` have passed.

    The defaults are those of every measurement here (docs/concepts.md, "How numbers are made").
    """
    begin, calls = clock(), 0
    while calls < iterations or clock() - begin < seconds:
        work()
        calls += 1


def interleave(
    subjects: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Clock,
    each_round: Callable[[], object] = lambda: None,
) -> dict[str, NDArray[np.float64]]:
    """Time several subjects in turn: A B C A B C ...

    Args:
        subjects: Name -> what to time.
        rounds: How often each is called.
        clock: Monotonic seconds.
        each_round: Called before each round, for progress.

    Returns:
        Name -> durations in seconds, shape (rounds,).
    """
    durations = {name: np.empty(rounds) for name in subjects}
    for i in range(rounds):
        each_round()
        for name, subject in subjects.items():
            begin = clock()
            subject()
            durations[name][i] = clock() - begin
    return durations
