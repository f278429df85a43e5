"""Histograms of absolute values that grow with the data, and the INT8 ranges chosen from them.

A histogram has a fixed number of bins. When a value lies beyond its end, the end is doubled and
neighbouring bins are merged, so that memory does not depend on how much data is seen.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from edge_runtime.errors import CalibrationError

Method = Literal["minmax", "entropy", "percentile", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

#: Even, since bins are merged in pairs.
BINS = 2048
#: Positive levels of symmetric INT8: -127 to 127.
LEVELS = 127
#: Share of the values that the method "percentile" keeps, in percent.
PERCENTILE = 99.99


class Histogram:
    """Counts of |x| of one tensor.

    Attributes:
        counts: Shape (`BINS`,), int64, of equal bins from 0 to `end`.
        end: Upper end of the last bin; 0 as long as nothing but zeros was seen.
        largest: Largest |x| seen.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.end = 0.0
        self.largest = 0.0
        self._zeros = 0

    def add(self, values: NDArray[np.floating[Any]]) -> None:
        """Count values of any shape.

        Raises:
            CalibrationError: A value is NaN or infinite.
        """
        sizes = np.abs(values, dtype=np.float32).ravel()
        top = float(sizes.max(initial=0.0))
        if not np.isfinite(top):
            raise CalibrationError("values that are NaN or infinite have no range")
        self.largest = max(self.largest, top)
        if top == 0:
            self._zeros += sizes.size
            return
        if self.end == 0:
            self.end = top
            self.counts[0] += self._zeros
            self._zeros = 0
        while self.end < top:
            merged = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate([merged, np.zeros(BINS // 2, np.int64)])
            self.end *= 2
        self.counts += np.histogram(sizes, BINS, (0.0, self.end))[0]

    def range(self, method: Method) -> float:
        """The largest |x| that INT8 shall represent; larger values saturate.

        Raises:
            CalibrationError: Nothing but zeros was seen.
        """
        if self.end == 0:
            raise CalibrationError("a tensor that is always zero has no range")
        if method == "minmax":
            return self.largest
        if method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            found = int(np.searchsorted(share, PERCENTILE / 100)) + 1
        else:
            found = _least_error(self.counts) if method == "mse" else _least_divergence(self.counts)
        return min(found * self.end / BINS, self.largest)


def _least_error(counts: NDArray[np.int64]) -> int:
    """Number of bins in the range at which quantising costs the least squared error."""
    centres = np.arange(BINS) + 0.5
    candidates = np.arange(LEVELS + 1, BINS + 1)
    steps = candidates[:, None] / LEVELS
    levels = np.minimum(np.rint(centres / steps), LEVELS)
    errors = ((levels * steps - centres) ** 2) @ counts
    return int(candidates[errors.argmin()])


def _least_divergence(counts: NDArray[np.int64]) -> int:
    """Number of bins in the range at which quantised and original distribution diverge least.

    Reference:
        Migacz, 8-bit Inference with TensorRT, GTC 2017: the values beyond the range are counted
        into the last bin, and each level spreads evenly over the bins of its values.
    """
    # Zero is exact in every range; behind a ReLU it is most of the mass and would decide alone.
    counts = np.concatenate([counts[1:2], counts[1:]])
    total = counts.sum()
    best, least = BINS, np.inf
    for bins in range(LEVELS + 1, BINS + 1):
        original = counts[:bins].astype(np.float64)
        level = np.arange(bins) * (LEVELS + 1) // bins
        taken = original > 0
        mass = np.bincount(level, original)
        width = np.bincount(level, taken)
        original[-1] += total - counts[:bins].sum()
        quantised = np.where(taken, (mass / np.maximum(width, 1))[level], 0.0)
        divergence = _divergence(original, quantised)
        if divergence < least:
            best, least = bins, divergence
    return best


def _divergence(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence of two histograms; infinite where q misses a value of p."""
    here = p > 0
    if (q[here] == 0).any() or q.sum() == 0:
        return np.inf
    p, q = p[here] / p.sum(), q[here] / q.sum()
    return float((p * np.log(p / q)).sum())
