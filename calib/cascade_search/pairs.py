"""Every threshold of a cascade of two models, from one pass over the sorted signals."""

from __future__ import annotations

import numpy as np

from calib.cascade_search.exits import Exits
from calib.cascade_search.frontier import Frontier
from calib.cascade_search.ranking import Ranking


def solve_pair(
    exits: Exits,
    models: tuple[str, str],
    costs: tuple[float, float],
    ranking: Ranking,
    frontier: Frontier,
) -> None:
    """Offer all points of a cascade of two models, but the first model alone.

    Args:
        exits: What the exits say.
        models: The cascade.
        costs: Cost of each model.
        ranking: The order of the first model's signals.
        frontier: Takes the points.

    Reference:
        Lebovitz et al., TMLR 2023, section 3 ("Evaluation").
    """
    first, last = exits.after(models[:1]).correct, exits.after(models).correct
    samples = len(first)
    gain = (first.view(np.int8) - last.view(np.int8))[ranking.order]
    # Right answers if so many samples leave early, from none on.
    correct = np.concatenate(([0], np.cumsum(gain, dtype=np.int32))) + np.count_nonzero(last)
    leaving = ranking.cuts
    cost = samples * costs[0] + (samples - leaving).astype(np.float64) * costs[1]
    frontier.offer(models, correct[leaving], cost, leaving)
