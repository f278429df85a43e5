"""The cheapest cascade found so far for every number of right answers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calib.cascade_search.exits import Models


class Found(NamedTuple):
    """A cascade on the front.

    Attributes:
        models: Its models.
        correct: Samples that it answers correctly.
        cuts: At each exit but the last, the place in the order of its signals up to which samples
            leave that reach it.
    """

    models: Models
    correct: int
    cuts: tuple[int, ...]


class Frontier:
    """Keeps what is both cheaper and at least as accurate as anything before.

    Args:
        samples: N.
    """

    def __init__(self, samples: int) -> None:
        self._cost = np.full(samples + 1, np.inf)
        self._cascade = np.full(samples + 1, -1, np.int32)
        self._cuts = np.zeros((samples + 1, 2), np.int32)
        self._cascades: list[Models] = []
        #: Summed cost of the cheapest cascade with at least so many right answers, shape (N + 1,),
        #: float64; infinite where there is none.
        self.cheapest = self._cost.copy()

    def offer(
        self,
        models: Models,
        correct: NDArray[np.integer],
        cost: NDArray[np.float64],
        *cuts: NDArray[np.integer],
    ) -> None:
        """Keep the points of a cascade that are better than all known ones.

        Args:
            models: The cascade.
            correct: Right answers of each point, shape (P,).
            cost: Summed cost of each point, shape (P,).
            *cuts: For each exit but the last, see `Found`, shape (P,).
        """
        better = np.flatnonzero(cost < self.cheapest[correct])
        if not len(better):
            return
        # The cheapest of each number of right answers; of equals the first.
        better = better[np.lexsort((cost[better], correct[better]))]
        at = correct[better]
        first = np.concatenate(([True], at[1:] != at[:-1]))
        better, at = better[first], at[first]
        if not self._cascades or self._cascades[-1] != models:
            self._cascades.append(models)
        self._cost[at] = cost[better]
        self._cascade[at] = len(self._cascades) - 1
        for k, cut in enumerate(cuts):
            self._cuts[at, k] = cut[better]
        self.cheapest = np.minimum.accumulate(self._cost[::-1])[::-1]

    def front(self) -> list[Found]:
        """All that no other one beats, by ascending accuracy and cost."""
        above = np.append(self.cheapest[1:], np.inf)
        found = []
        for correct in np.flatnonzero(self._cost < above).tolist():
            models = self._cascades[self._cascade[correct]]
            cuts = tuple(self._cuts[correct, : len(models) - 1].tolist())
            found.append(Found(models, correct, cuts))
        return found
