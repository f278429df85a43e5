"""The toy bundle with stages at several precisions, and gates with random weights for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime import Bundle, OperatingPoint
from edge_runtime.backends.base import Backend
from edge_runtime.blocks import Blocks
from edge_runtime.confidence import probabilities
from edge_runtime.files import sha256
from edge_runtime.gate_model import ErrorPredictor, GateKind, GateModel
from edge_runtime.operating_point import GateChoice
from edge_runtime.paths import Levels, Paths
from edge_runtime.scheduler import image_axes
from engines.bundle import with_variants
from tests.edge_runtime.gates import all_paths
from tests.toys import DENSE, dense_model, toy_bundle

LEVELS = ("fp32", "fp16", "int8")
EXITS = ("saver", "middle", "final")
SIZE = (5, 7)
#: Which stages have which levels besides fp32; by how much their weights are off.
VARIANTS = {"segment1": ("fp16", "int8"), "segment2": ("int8",), "head2": ("fp16", "int8")}
CHANGED = {"fp16": 1.2, "int8": 1.5}


def gated_bundle(folder: Path) -> Bundle:
    """The toy bundle; what a stage computes at a level differs from what it does at the others."""
    folder.mkdir(exist_ok=True)
    plain = toy_bundle(folder / "plain.bundle")
    models = {}
    for name, levels in VARIANTS.items():
        record = plain.record(name)
        (source,), (target,) = record.inputs, record.outputs
        shape, seed, scale = DENSE[name]
        models[name] = {
            level: dense_model(
                source.name,
                target.name,
                *shape,
                seed=seed,
                scale=scale * CHANGED[level],
                batch=source.shape[0],
            )
            for level in levels
        }
    return with_variants(plain, models, folder / "toy.bundle", provenance={"made_by": "tests"})


def gate_model(
    bundle: Bundle,
    *,
    levels: Sequence[str] = LEVELS,
    paths: Sequence[Levels] | None = None,
    kind: GateKind = "paths",
    seed: int = 244,
    costs: dict[str, Any] | None = None,
) -> GateModel:
    """A gate whose random weights make it take many paths."""
    generator = np.random.default_rng(seed)
    known = Paths(tuple(levels), EXITS, tuple(paths or all_paths(len(levels), len(EXITS))))
    predictors = tuple(_predictor(generator) for _ in EXITS[1:])
    if costs is None:
        costs = {
            "latency": {known.name(path): sum(8 - 2 * b for b in path) for path in known.paths},
            "macs": {known.name(path): len(path) for path in known.paths},
        }
    return GateModel(
        bundle=bundle.hash,
        classes=4,
        paths=known,
        predictors=predictors,
        figures={"costs": costs},
        kind=kind,
        trade_off=None if kind == "paths" else 0.5,
    )


def _predictor(generator: np.random.Generator) -> ErrorPredictor:
    """Random weights under which what exits say counts as much as the path does."""
    shapes = ErrorPredictor.shapes(4, len(EXITS), 16)
    drawn = {name: generator.normal(size=shape) for name, shape in shapes.items()}
    drawn["features"] *= 6
    drawn["bias"] -= drawn["features"][:4].mean(axis=0) + drawn["features"][4:8].mean(axis=0)
    drawn["codes"] *= 3
    drawn["output"] /= 4
    return ErrorPredictor(**{name: array.astype(np.float32) for name, array in drawn.items()})


def gate_point(bundle: Bundle, model: GateModel, name: str = "gate", **options: Any) -> Any:
    """The operating point of a gate, both written into the bundle."""
    folder = bundle.path / "operating_points"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.npz"
    model.write(file)
    choice = GateChoice(
        file.name,
        sha256(file.read_bytes()),
        options.pop("cost", "latency"),
        options.pop("trade_off", 0.3),
    )
    point = OperatingPoint(name, policy="gate", gate=choice, bundle=bundle.hash, **options)
    bundle.write_operating_point(point)
    return point


def walked(
    bundle: Bundle, paths: Paths, backend: Backend, images: np.ndarray, variants: dict[str, str]
) -> tuple[np.ndarray, np.ndarray]:
    """Logits and probabilities of every path on every image, by running its stages one by one."""
    blocks = Blocks(bundle, paths, variants)
    plan = bundle.cascade.plan(range(len(EXITS)))
    logits = np.empty((len(images), len(paths), 4), np.float32)
    with backend:
        backend.open(blocks.loaded(plan), image_axes(plan, SIZE), variants)
        for i, image in enumerate(images):
            for p, path in enumerate(paths.paths):
                backend.feed(image[None])
                for step, level in zip(plan.steps, path, strict=False):
                    for stage in blocks.runs(step, level):
                        backend.run(stage)
                (logits[i, p],) = backend.read(plan.steps[len(path) - 1].exit.logits)
                backend.done()
    return logits, probabilities(logits)
