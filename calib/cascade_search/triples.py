"""Cascades of three models: the first threshold swept, the second solved exactly for each.

A point of a triple is a first cut (how many samples leave at the first exit) and a second one (up
to which place, in the order of the second exit's signals, those leave that have stayed). Only few
of them beat what is known. So places are divided into blocks, and for each first cut and block
(a *cell*) the accuracy of any cut within is bounded from above and its cost from below, from counts
of samples alone. Only the cells whose bounds beat the frontier are searched place by place. Nothing
that would enter the front is lost: the bounds hold, ties and rounding included.

Measured on the table of `bench.search` with 50,000 samples and every tenth first cut: all 2,925
triples of 27 models take 57 s on one core, 20 ms each.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.exits import Exits
from calib.cascade_search.frontier import Frontier
from calib.cascade_search.ranking import Ranking

#: Places per block, doubled where there would be more cells than memory should hold.
_BLOCK, _MOST_CELLS = 256, 2**25
#: First cuts whose cells are bounded together, so that they stay in the cache of a core.
_CUTS_AT_ONCE = 512
#: Cells that are searched together.
_CELLS_AT_ONCE = 2048


class SecondExit:
    """What all cascades share that begin with the same two models.

    Args:
        exits: What the exits say.
        models: The two models.
        costs: Cost of each of them.
        first: The order of the first model's signals.
        second: The order of the second exit's signals.
        stride: Every so many samples a first cut.
    """

    def __init__(
        self,
        exits: Exits,
        models: tuple[str, str],
        costs: tuple[float, float],
        first: Ranking,
        second: Ranking,
        stride: int,
    ) -> None:
        self._exits = exits
        self._models = models
        self._first, self._second = first, second
        self._cuts = first.every(stride)
        samples, cuts = len(first.order), len(self._cuts)
        self._block = _BLOCK
        while samples * cuts // self._block > _MOST_CELLS:
            self._block *= 2
        self._blocks = -(-samples // self._block)
        #: Number of first cuts at which the sample at each place has not left yet; 0 beyond.
        self._stays = np.zeros(self._blocks * self._block, np.int32)
        self._stays[:samples] = np.searchsorted(self._cuts, first.place[second.order], side="right")
        self._ends = np.zeros(self._blocks * self._block, bool)
        self._ends[:samples] = second.ends
        # The cell in which each sample is counted last.
        self._cell = self._stays[:samples] * self._blocks + np.arange(samples) // self._block

        reaching = samples - self._cuts
        self._paid = samples * costs[0] + reaching * costs[1]
        staying = self._count(np.arange(samples))
        #: Samples that stay and stand behind the block, shape (cuts, blocks).
        self._behind = reaching[:, None] - np.cumsum(staying, axis=1, dtype=np.int32)
        self._staying = staying
        right = exits.after(models[:1]).correct[first.order]
        self._right_first = _sums(right)[self._cuts]
        self._right_second = exits.after(models).correct[second.order]

    def solve(self, third: str, cost: float, frontier: Frontier) -> None:
        """Offer the points of a cascade that may be better than all known ones.

        Args:
            third: The last model.
            cost: Its cost.
            frontier: Takes the points.

        Reference:
            Lebovitz et al., TMLR 2023, section 4.1 ("3-model cascades").
        """
        models = (*self._models, third)
        last = self._exits.after(models).correct
        if_last = last[self._second.order]
        gains = np.flatnonzero(self._right_second & ~if_last)
        losses = np.flatnonzero(if_last & ~self._right_second)
        right_last = _sums(last[self._first.order])
        #: Right answers if nobody leaves at the second exit, by first cut.
        base = self._right_first + right_last[-1] - right_last[self._cuts]
        nobody = self._paid + (len(last) - self._cuts) * cost
        frontier.offer(models, base, nobody, self._cuts, np.zeros_like(self._cuts))

        gained, lost = self._count(gains), self._count(losses)
        change = np.zeros(self._blocks * self._block, np.int8)
        change[gains], change[losses] = 1, -1
        for begin in range(0, len(self._cuts), _CUTS_AT_ONCE):
            rows = slice(begin, begin + _CUTS_AT_ONCE)
            net = gained[rows] - lost[rows]
            # Right answers if everybody before the block leaves at the second exit.
            before = np.cumsum(net, axis=1, dtype=np.int32) - net + base[rows, None]
            least = self._behind[rows] * cost + self._paid[rows, None]
            cells = np.flatnonzero(frontier.cheapest[before + gained[rows]] > least)
            for part in range(0, len(cells), _CELLS_AT_ONCE):
                row, block = np.divmod(cells[part : part + _CELLS_AT_ONCE], self._blocks)
                right = before[row, block]
                self._search(models, cost, row + begin, block, right, change, frontier)

    def _search(
        self,
        models: tuple[str, str, str],
        cost: float,
        row: NDArray[np.intp],
        block: NDArray[np.intp],
        right: NDArray[np.int32],
        change: NDArray[np.int8],
        frontier: Frontier,
    ) -> None:
        """Offer every second cut within some cells.

        Args:
            models: The cascade.
            cost: Of its last model.
            row: Index of the first cut of each cell, shape (n,).
            block: The block of each cell, shape (n,).
            right: Right answers if everybody before the block leaves, shape (n,).
            change: What an answer of the second exit is worth against the last, by place.
            frontier: Takes the points.
        """
        shape = (self._blocks, self._block)
        stays = self._stays.reshape(shape)[block] > row[:, None]
        correct = np.cumsum(change.reshape(shape)[block] * stays, axis=1, dtype=np.int32)
        correct += right[:, None]
        reach = self._behind[row, block] + self._staying[row, block]
        last = reach[:, None] - np.cumsum(stays, axis=1, dtype=np.int32)
        total = last * cost + self._paid[row, None]
        good = (total < frontier.cheapest[correct]) & self._ends.reshape(shape)[block]
        cell, place = np.nonzero(good)
        frontier.offer(
            models,
            correct[cell, place],
            total[cell, place],
            self._cuts[row[cell]],
            block[cell] * self._block + place + 1,
        )

    def _count(self, places: NDArray[np.intp]) -> NDArray[np.signedinteger]:
        """How many of the samples at some places have not left yet, shape (cuts, blocks)."""
        dtype = np.int16 if self._block < 2**15 else np.int32
        last = np.zeros((len(self._cuts) + 1) * self._blocks, dtype)
        np.add.at(last, self._cell[places], 1)
        counted = last.reshape(-1, self._blocks)[::-1]
        return np.cumsum(counted, axis=0, dtype=dtype)[::-1][1:]


def _sums(right: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Right answers among the first n samples, for n from 0 on."""
    return np.concatenate(([0], np.cumsum(right, dtype=np.int32)))
