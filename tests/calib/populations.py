"""Cascades, tables and populations that the tests of `calib` share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from calib.exit_table import CostModel, ExitTable
from edge_runtime.cascade import Cascade, Exit, Stage
from edge_runtime.tensors import TensorSpec

BOUNDS = (0.0, 1.0)


def cascade(exits: int) -> Cascade:
    """A saver beside a backbone, whose segments have a head each: exits that share stages."""
    image = TensorSpec("image", ("batch", 8, 8, 3), "uint8")
    pixels = TensorSpec("pixels", ("batch", 3), "float32")
    logits = [TensorSpec(f"logits{k}", ("batch", 2), "float32") for k in range(exits)]
    features = [TensorSpec(f"features{k}", ("batch", 4), "float32") for k in range(exits)]
    stages = [
        Stage("preprocess", "preprocess", (image,), (pixels,)),
        Stage("saver", "saver", (pixels,), (logits[0],)),
    ]
    for k in range(1, exits):
        source = pixels if k == 1 else features[k - 1]
        stages.append(Stage(f"segment{k}", "segment", (source,), (features[k],)))
        stages.append(Stage(f"head{k}", "head", (features[k],), (logits[k],)))
    return Cascade(
        ("no", "yes"),
        image,
        tuple(stages),
        tuple(Exit(f"exit{k}", f"logits{k}") for k in range(exits)),
    )


def table(signals: Sequence[Sequence[float]], correct: Sequence[Sequence[int]]) -> ExitTable:
    """A table from lists, one row per sample."""
    return ExitTable(np.array(signals, np.float32), np.array(correct, bool), BOUNDS)


def population(samples: int, margins: Sequence[float], seed: int) -> ExitTable:
    """Samples that are hard for all exits alike, up to noise; a larger margin is a better exit."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(size=samples)
    signals, correct = [], []
    for margin in margins:
        score = margin - 0.9 * difficulty + 0.44 * generator.normal(size=samples)
        noisy = 0.7 * score + 0.6 * generator.normal(size=samples)
        correct.append(score > 0)
        signals.append(1 / (1 + np.exp(-2 * np.abs(noisy))))
    return ExitTable(
        np.stack(signals[:-1], axis=1).astype(np.float32), np.stack(correct, axis=1), BOUNDS
    )


def model_costs(exits: int) -> CostModel:
    """Independent models, the last of which costs eight times the first."""
    return CostModel.from_models(
        {f"model{k}": float(cost) for k, cost in enumerate(np.geomspace(1, 8, exits))}
    )
