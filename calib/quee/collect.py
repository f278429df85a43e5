"""Path tables from a bundle: every path on every image, shared beginnings run once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calib.quee.paths import valid_paths
from calib.quee.table import PathTable
from edge_runtime import confidence
from edge_runtime.backends.base import Backend
from edge_runtime.blocks import Blocks
from edge_runtime.cascade import Plan
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.paths import Levels, Paths
from edge_runtime.scheduler import image_axes

#: Precisions that people choose, the highest first; others are made for one backend's sake.
PRECISIONS = ("fp32", "fp16", "int8")
#: Images per call.
_BATCH = 32

#: Makes a backend, not opened.
NewBackend = Callable[[], Backend]


@dataclass(frozen=True)
class Family:
    """Paths through a bundle, and what its stages run at where they have no variant of a level.

    Attributes:
        name: As tables show it: "fp32 -> int8", "all int8", "mixed".
        paths: The paths.
        variants: Stage name -> precision.
    """

    name: str
    paths: Paths
    variants: Mapping[str, str]


def precisions_of(bundle: Bundle) -> tuple[str, ...]:
    """The precisions at which some stage but preprocessing can run, the highest first."""
    found = {
        name
        for record in bundle.manifest.stages
        if record.kind != "preprocess"
        for name in record.variants
    }
    return tuple(name for name in PRECISIONS if name in found)


def family_of(
    bundle: Bundle, levels: Sequence[str], *, most: int = 50, seed: int = 0, name: str = ""
) -> Family:
    """The paths of a bundle at some levels.

    Args:
        bundle: The bundle.
        levels: Names of precisions, the highest first.
        most: How many paths at most.
        seed: Of their draw where there are more.
        name: Of the family; that of its levels where empty.

    Raises:
        ConfigError: No stage has some level.
    """
    known = precisions_of(bundle)
    for level in levels:
        if level not in known:
            raise ConfigError(
                f"level {level!r}: no stage of {bundle.path} has this variant",
                got=level,
                expected=", ".join(known),
                remedy="Make it with: edge-runtime quantize, or convert",
            )
    exits = tuple(exit_.name for exit_ in bundle.cascade.exits)
    paths = valid_paths(len(levels), len(exits), most=most, seed=seed)
    return Family(name or " -> ".join(levels), Paths(tuple(levels), exits, paths), {})


def mixed_family(bundle: Bundle, variants: Mapping[str, str]) -> Family:
    """The paths of a bundle whose stages each run at a precision of their own."""
    exits = tuple(exit_.name for exit_ in bundle.cascade.exits)
    return Family("mixed", Paths(("mixed",), exits, valid_paths(1, len(exits))), variants)


def collect_paths(
    bundle: Bundle, family: Family, new_backend: NewBackend, data: ImageDataset, console: Console
) -> PathTable:
    """Run every path on every image.

    Args:
        bundle: The bundle.
        family: The paths.
        new_backend: Makes what runs the stages.
        data: Labelled images.
        console: Shows progress.

    Returns:
        A table without costs.
    """
    blocks = Blocks(bundle, family.paths, family.variants)
    cascade = bundle.cascade
    plan = cascade.plan(range(len(cascade.exits)))
    height, width, _ = data.image_shape
    backend = new_backend()
    backend.host_decides = True
    walk = _Walk(blocks, plan, family.paths, backend)
    found = np.empty((len(data), len(family.paths), len(cascade.classes)), np.float32)
    try:
        backend.open(blocks.loaded(plan), image_axes(plan, (height, width)), family.variants)
        size = min(_BATCH, backend.largest_batch or _BATCH)
        done = 0
        batches = data.batches(size)
        what = f"running {len(family.paths)} paths, {family.name}"
        for images, _ in console.progress(batches, what, -(-len(data) // size)):
            walk.run(images, found[done : done + len(images)])
            done += len(images)
    finally:
        backend.close()
    return PathTable(family.paths, found, data.labels.astype(np.int64), {}, bundle.hash)


class _Walk:
    """Goes through the tree of paths, depth first: what a block wrote stays until its sibling."""

    def __init__(self, blocks: Blocks, plan: Plan, paths: Paths, backend: Backend) -> None:
        self._blocks = blocks
        self._plan = plan
        self._index = {path: i for i, path in enumerate(paths.paths)}
        self._backend = backend

    def run(self, images: NDArray[np.uint8], into: NDArray[np.float32]) -> None:
        self._backend.feed(images)
        self._visit((), into)
        self._backend.done()

    def _visit(self, begin: Levels, into: NDArray[np.float32]) -> None:
        if len(begin) == len(self._plan.steps):
            return
        step = self._plan.steps[len(begin)]
        for level in self._blocks.levels_at(step.position):
            path = (*begin, level)
            if path not in self._index:
                continue
            for stage in self._blocks.runs(step, level):
                self._backend.run(stage)
            logits = self._backend.read(step.exit.logits)
            into[:, self._index[path]] = confidence.probabilities(logits)
            self._visit(path, into)
