"""How much longer one run's frames take than another's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from bench.result import Distribution, Result
from edge_runtime.timing import Ratio

RESAMPLES = 2000
#: With fewer blocks (1,000 frames) intervals are too narrow: of 100 pairs of equal, independent
#: runs about 13 exclude 1 at 4 blocks, 8 at 10, and 5 from 20 on.
LEAST_BLOCKS = 20
#: More blocks than this are merged with their neighbours, so that any file takes a moment only.
_MOST_BLOCKS = 2000
#: Resamples that are drawn in one call.
_AT_ONCE = 100


def block_ratio(
    numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0
) -> Ratio | None:
    """Compare two runs that were not made in turn, by the means of their blocks of frames.

    The blocks of each run are drawn anew, independently of the other run's. The interval covers
    what changes from block to block within these two runs: noise, and which images a block held
    (also where both runs had the same images, so that it is rather too wide there). It does not
    cover what changes between runs: another start of the process, other clocks or temperatures,
    another day. Only repeated runs can tell that; a ratio of two subjects of one run, measured in
    turn, is free of most of it.

    Args:
        numerator: Mean seconds of each block of one run, shape (blocks,).
        denominator: Those of the other, shape (its blocks,).
        seed: Of the resampling.

    Returns:
        Mean over mean with its 95 % percentile interval over 2,000 resamples; None where a run has
        fewer than 20 blocks, or a block whose time is not positive.
    """
    a, b = _merged(numerator), _merged(denominator)
    if min(a.size, b.size) < LEAST_BLOCKS or min(a.min(), b.min()) <= 0:
        return None
    rng = np.random.default_rng(seed)
    values = _resampled_means(a, rng) / _resampled_means(b, rng)
    low, high = np.percentile(values, [2.5, 97.5])
    return Ratio(float(a.mean() / b.mean()), float(low), float(high))


def ratio_of_runs(one: Result, first: Result) -> Ratio | float | None:
    """A run's mean latency over another's, end to end.

    Returns:
        The ratio of the means of all frames, with the interval of `block_ratio` where there is one,
        else alone; None where a mean is not positive.
    """
    value = ratio_of_means(one.end_to_end, first.end_to_end)
    subjects = one.subject("cascade"), first.subject("cascade")
    if value is None or None in subjects:
        return value
    found = block_ratio(*(subject.blocks if subject else () for subject in subjects))
    return value if found is None else Ratio(value, found.low, found.high)


def ratio_of_means(one: Distribution | None, first: Distribution | None) -> float | None:
    """Mean over mean; None where one is not known or not positive."""
    if one is None or first is None:
        return None
    return quotient(one.mean, first.mean)


def quotient(one: float | None, first: float | None) -> float | None:
    """One positive number over another; None where one is not known or not positive."""
    if one is None or first is None or one <= 0 or first <= 0:
        return None
    return one / first


def value_of(ratio: Ratio | float | None) -> float | None:
    """The ratio without its interval."""
    return ratio.value if isinstance(ratio, Ratio) else ratio


def _resampled_means(blocks: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of resamples of blocks, shape (RESAMPLES,), made in parts that fit any memory."""
    parts = [
        blocks[rng.integers(0, blocks.size, (_AT_ONCE, blocks.size))].mean(axis=1)
        for _ in range(RESAMPLES // _AT_ONCE)
    ]
    return np.concatenate(parts)


def _merged(blocks: Sequence[float]) -> NDArray[np.float64]:
    """Block means, neighbours merged where there are very many."""
    values = np.asarray(blocks, np.float64)
    if values.size <= _MOST_BLOCKS:
        return values
    return np.array([part.mean() for part in np.array_split(values, _MOST_BLOCKS)])
