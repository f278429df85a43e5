"""What is classified: labelled images, kept in memory, or noise where there are none."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.studies.turns import shuffled_rows
from edge_runtime import options
from edge_runtime.console import Console
from edge_runtime.dataset import ImageDataset, parse_size
from edge_runtime.errors import ConfigError
from edge_runtime.manifest import Bundle
from edge_runtime.scheduler import image_axes

#: Images that are held in memory at most, so that no file is read between two frames.
_MAX_BYTES = 2**30
_NOISE_IMAGES = 32


@dataclass(frozen=True)
class Frames:
    """Images in the order in which they are classified.

    Attributes:
        images: Shape (n, height, width, channels), uint8.
        labels: True class indices, shape (n,); None for noise.
        data: Where they come from; None for noise.
        note: What a reader must know of them.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
    data: ImageDataset | None
    note: str = ""

    def __len__(self) -> int:
        """Number of different images."""
        return len(self.images)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.images.shape[1], self.images.shape[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is classified."""
    options.add_data(
        parser,
        without="noise leaves where the operating point's record says that images leave, which is "
        "enough for a latency table",
    )


def open_frames(args: argparse.Namespace, bundle: Bundle, console: Console) -> Frames:
    """The images that `args` name, or noise.

    Raises:
        ConfigError: The data does not fit the bundle, or noise has no size.
    """
    if args.data is None:
        return _noise(args, bundle)
    data = options.open_data(args, bundle)
    first = data.image(0)
    room = max(1, _MAX_BYTES // first.nbytes)
    rows = shuffled_rows(data, min(len(data), room), args.seed)
    images = np.empty((len(rows), *first.shape), np.uint8)
    for i, row in enumerate(console.progress(rows.tolist(), "reading images", len(rows))):
        images[i] = data.image(row)
    note = ""
    if len(rows) < len(data):
        note = f"{len(rows)} of {len(data)} images were classified: more don't fit in 1 GiB"
    return Frames(images, data.labels[rows].astype(np.int64), data, note)


def _noise(args: argparse.Namespace, bundle: Bundle) -> Frames:
    for option in ("part",):
        if getattr(args, option):
            raise ConfigError(f"--{option} needs --data")
    cascade = bundle.cascade
    plan = cascade.plan([len(cascade.exits) - 1])
    size = parse_size(args.image_size) if args.image_size else None
    image = plan.image.resolve(image_axes(plan, size))
    if len(image.shape) != 4 or image.dtype != "uint8":
        raise ConfigError(
            "the bundle does not take camera images",
            got=str(image),
            expected="(batch, height, width, channels) uint8",
        )
    shape: tuple[Any, ...] = image.sample_shape()
    images = np.random.default_rng(args.seed).integers(0, 256, (_NOISE_IMAGES, *shape), np.uint8)
    return Frames(images, None, None)
