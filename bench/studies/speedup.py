"""The speed-up of leaving early as a formula: what all samples would cost over what they cost.

A formula knows neither what deciding and launching take nor what a device makes of a layer, so a
measured speed-up belongs beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_runtime.errors import ConfigError


def layer_speed_up(samples: Mapping[int, int], layers: int) -> float:
    """Speed-up counted in layers: sum L m_i / sum i m_i. The exits themselves cost nothing in it.

    Args:
        samples: Executed layers i, the index of the exit's layer + 1, L for the last exit ->
            samples m_i that leave there.
        layers: L, layers of the whole model.

    Returns:
        At least 1; 1 where nobody leaves early.

    Raises:
        ConfigError: A number of layers is not in 1..L, or there is no sample.

    Reference:
        Xu et al., LGViT: Dynamic Early Exiting for Accelerating Vision Transformer, ACM MM 2023.
    """
    for executed in samples:
        if not 1 <= executed <= layers:
            raise ConfigError("executed layers", got=executed, expected=f"1..{layers}")
    return cost_speed_up(list(samples.values()), list(samples), layers)


def cost_speed_up(samples: Sequence[int], costs: Sequence[float], base: float) -> float:
    """Speed-up in any unit of cost, such as MACs; what an exit's head costs can be part of it.

    Args:
        samples: Samples that leave at each exit.
        costs: Cost of a sample that leaves there, all that it has passed included; >= 0.
        base: Cost of a sample without early exits; > 0.

    Returns:
        Below 1 where early exits cost more than they save.

    Raises:
        ConfigError: The lengths differ, a number is negative, or nothing costs anything.
    """
    counts, paid = np.asarray(samples, np.float64), np.asarray(costs, np.float64)
    if counts.shape != paid.shape or counts.ndim != 1:
        raise ConfigError(
            "a speed-up", got=f"{counts.size} counts and {paid.size} costs", expected="as many"
        )
    if not (np.all(counts >= 0) and np.all(paid >= 0) and counts.sum() > 0 and base > 0):
        raise ConfigError(
            "a speed-up",
            got=f"counts {list(samples)}, costs {list(costs)}, without exits {base}",
            expected="numbers >= 0, some sample, and a cost > 0 without exits",
        )
    total = float(counts @ paid)
    if not total > 0:
        raise ConfigError("a speed-up", got="samples that cost nothing", expected="costs > 0")
    return float(counts.sum()) * base / total
