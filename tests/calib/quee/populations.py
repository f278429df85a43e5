"""A population of which it is known which path each kind of sample needs."""

from __future__ import annotations

import numpy as np

from calib.quee.paths import valid_paths
from calib.quee.table import PathTable, StageWork, bit_operations
from edge_runtime.paths import Paths

LEVELS, EXITS, CLASSES = ("fp32", "int8"), ("early", "middle", "last"), 4
PATHS = Paths(LEVELS, EXITS, valid_paths(len(LEVELS), len(EXITS)))
EASY, DEEP, PRECISE = range(3)


def needs(kind: int, path: tuple[int, ...]) -> bool:
    """Whether a path is right about a kind of sample.

    Easy samples are right on every path, deep ones at the last exit, precise ones only there and
    with all blocks at the highest precision.
    """
    return kind == EASY or (len(path) == 3 and (kind == DEEP or set(path) == {0}))


def population(samples: int, seed: int, paths: Paths = PATHS) -> tuple[PathTable, np.ndarray]:
    """A path table and the kind of each sample.

    How sure a path is tells the kind: each has a confidence of its own where it isn't understood.
    """
    generator = np.random.default_rng(seed)
    kinds = generator.integers(3, size=samples)
    labels = generator.integers(CLASSES, size=samples)
    probabilities = np.empty((samples, len(paths), CLASSES), np.float32)
    for i, path in enumerate(paths.paths):
        for row, (kind, label) in enumerate(zip(kinds, labels, strict=True)):
            right = needs(kind, path)
            sure = 0.9 if right else (0.7 if kind == DEEP else 0.5)
            logits = np.full(CLASSES, (1 - sure) / (CLASSES - 1))
            logits[label if right else (label + 1) % CLASSES] = sure
            noisy = logits * np.exp(0.05 * generator.normal(size=CLASSES))
            probabilities[row, i] = noisy / noisy.sum()
    blocks = [[StageWork(100.0, (32, 8))]] * len(paths.exits)
    costs = {
        "bitops": bit_operations(paths, blocks),
        "exits": np.array([len(path) for path in paths.paths], np.float64),
    }
    return PathTable(paths, probabilities, labels, costs, "b" * 64), kinds
