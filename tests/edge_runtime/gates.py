"""Gates with random weights, for tests of what a gate does with them."""

from __future__ import annotations

import itertools

import numpy as np

from edge_runtime.gate_model import ErrorPredictor, GateKind, GateModel
from edge_runtime.paths import Levels, Paths

LEVELS = ("fp32", "fp16", "int8")
EXITS = ("a", "b", "c", "d")
BUNDLE = "0123456789abcdef" * 4


def all_paths(levels: int = len(LEVELS), exits: int = len(EXITS)) -> tuple[Levels, ...]:
    tails = (
        (0, *rest)
        for e in range(exits)
        for rest in itertools.combinations_with_replacement(range(levels), e)
    )
    return tuple(tails)


def model(
    seed: int = 0,
    *,
    classes: int = 5,
    hidden: int = 8,
    paths: tuple[Levels, ...] | None = None,
    kind: GateKind = "paths",
) -> GateModel:
    generator = np.random.default_rng(seed)
    shapes = ErrorPredictor.shapes(classes, len(EXITS), hidden)
    predictors = [
        ErrorPredictor(
            **{
                name: generator.normal(size=shape).astype(np.float32)
                for name, shape in shapes.items()
            }
        )
        for _ in EXITS[1:]
    ]
    return GateModel(
        bundle=BUNDLE,
        classes=classes,
        paths=Paths(LEVELS, EXITS, all_paths() if paths is None else paths),
        predictors=tuple(predictors),
        figures={"seed": seed},
        kind=kind,
        trade_off=None if kind == "paths" else 0.5,
    )


def costs(paths: tuple[Levels, ...] | None = None) -> dict[Levels, float]:
    """Seconds of a device: a block takes 8, 5 or 3."""
    known = all_paths() if paths is None else paths
    return {path: float(sum((8, 5, 3)[level] for level in path)) for path in known}


def probabilities(samples: int, seed: int, classes: int = 5) -> np.ndarray:
    drawn = np.random.default_rng(seed).dirichlet(np.full(classes, 0.4), samples)
    return drawn.astype(np.float32)
