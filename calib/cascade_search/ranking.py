"""Samples in the order of a signal, and the only places where that order may be cut.

A threshold lets samples of equal signal leave together, so a cut lies between two distinct values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.sweep import midway


@dataclass(frozen=True, eq=False)
class Ranking:
    """The order of one exit's signals.

    Attributes:
        order: Samples from the most to the least confident, shape (N,).
        place: Where each sample stands in `order`, shape (N,), int32.
        cuts: How many samples leave at each threshold that not everybody passes, ascending from 0
            (nobody leaves); shape (C,).
        ends: Whether a cut may follow each place of `order`, the last one included, shape (N,).
    """

    order: NDArray[np.intp]
    place: NDArray[np.int32]
    cuts: NDArray[np.intp]
    ends: NDArray[np.bool_]

    @classmethod
    def of(cls, signal: NDArray[np.float32]) -> Ranking:
        """Sort once."""
        order = np.argsort(-signal, kind="stable")
        place = np.empty(len(order), np.int32)
        place[order] = np.arange(len(order), dtype=np.int32)
        sorted_ = signal[order]
        ends = np.append(sorted_[:-1] != sorted_[1:], True)
        cuts = np.concatenate(([0], np.flatnonzero(ends[:-1]) + 1))
        return cls(order, place, cuts, ends)

    def every(self, stride: int) -> NDArray[np.intp]:
        """The cuts after every `stride`-th sample, each moved down to where it may lie.

        Args:
            stride: >= 1; 1 gives all cuts.

        Returns:
            Some of `cuts`, 0 among them.
        """
        wanted = np.arange(0, len(self.order), stride)
        after = np.searchsorted(self.cuts, wanted)
        return self.cuts[np.unique(after[after < len(self.cuts)])]

    def threshold(
        self, signal: NDArray[np.float32], cut: int, reaches: NDArray[np.bool_] | None = None
    ) -> float | None:
        """The threshold that makes a cut.

        Args:
            signal: What was sorted, shape (N,).
            cut: Place in `order`; samples before it leave, some sample after it stays.
            reaches: Which samples reach the exit, shape (N,); all where None.

        Returns:
            Midway, in float32, between the nearest signals on both sides of samples that reach the
            exit; None where there is none on one side.
        """
        leaving = _first(self.order[:cut][::-1], reaches)
        staying = _first(self.order[cut:], reaches)
        if leaving is None or staying is None:
            return None
        return float(midway(signal[[leaving]], signal[[staying]])[0])


def _first(samples: NDArray[np.intp], reaches: NDArray[np.bool_] | None) -> int | None:
    """The first of some samples that reaches the exit; the search is short, it is near."""
    if reaches is None:
        return int(samples[0]) if len(samples) else None
    begin, count = 0, 64
    while begin < len(samples):
        some = samples[begin : begin + count]
        found = np.flatnonzero(reaches[some])
        if len(found):
            return int(some[found[0]])
        begin, count = begin + count, 2 * count
    return None
