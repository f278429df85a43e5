"""Which paths a gate considers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np

from edge_runtime.errors import ConfigError
from edge_runtime.paths import Levels

#: Above this many paths, more than any cascade has, they are not even listed.
_MOST_LISTED = 200_000


def valid_paths(levels: int, exits: int, *, most: int = 50, seed: int = 0) -> tuple[Levels, ...]:
    """All paths that never return to a higher precision, or some of them.

    Above `most` they are drawn at random, as in the paper. It does not say what happens to a sample
    whose drawn paths begin otherwise than the sample has run; here a path is drawn together with
    all of its beginnings, so that a sample may always leave where it is, and can't get stuck. The
    dearest path, and with it the exits at the highest level, is always among them.

    Args:
        levels: Number of precisions, >= 1.
        exits: Number of exits, >= 1.
        most: How many paths there may be, >= `exits`.
        seed: Of the draw.

    Returns:
        Paths, the first block of each at level 0; the shorter ones first, then in order of levels.

    Raises:
        ConfigError: A number is out of range.

    Reference:
        Regol et al., QuEE, 2024, section 5.2.
    """
    if levels < 1 or exits < 1:
        raise ConfigError(
            "paths", got=f"{levels} levels and {exits} exits", expected="at least one of each"
        )
    if most < exits:
        raise ConfigError(
            "the most paths",
            got=most,
            expected=f">= {exits}, the path through all {exits} exits and its beginnings",
        )
    count = sum(math.comb(e + levels - 2, levels - 1) for e in range(1, exits + 1))
    if count > _MOST_LISTED:
        raise ConfigError(
            f"paths of {levels} levels and {exits} exits", got=count, expected=f"<= {_MOST_LISTED}"
        )
    paths = list(_all(levels, exits))
    if count <= most:
        return tuple(paths)
    kept = {(0,) * e for e in range(1, exits + 1)}
    for index in np.random.default_rng(seed).permutation(count):
        path = paths[index]
        missing = {path[:e] for e in range(1, len(path) + 1)} - kept
        if len(kept) + len(missing) <= most:
            kept |= missing
    return tuple(path for path in paths if path in kept)


def _all(levels: int, exits: int) -> Iterator[Levels]:
    for e in range(exits):
        for rest in itertools.combinations_with_replacement(range(levels), e):
            yield (0, *rest)
