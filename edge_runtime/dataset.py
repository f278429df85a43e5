"""Labelled images: a folder of class folders, or an npz; hashed, and split without overlap.

Images come out as a camera would deliver them: uint8, height x width x channels, all of one size.
What a model does to them (resize, crop, normalise) is its preprocess stage's business.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.errors import ConfigError
from edge_runtime.image_sources import MODES, ArraySource, FolderSource, Pixels, Source


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Labelled images, in a fixed order; `open` makes one.

    Attributes:
        classes: Names, in the order of the labels.
        labels: Class index of each sample, shape (N,), int64, read-only.
        image_shape: (height, width, channels) of every image.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    image_shape: tuple[int, int, int]
    _source: Source
    _rows: NDArray[np.int64]

    @classmethod
    def open(
        cls,
        path: str | Path,
        classes: Sequence[str],
        *,
        image_size: tuple[int, int] | None = None,
        channels: int = 3,
        skip_unreadable: bool = False,
    ) -> ImageDataset:
        """Open labelled images.

        Args:
            path: A folder with a folder of images (jpg, png, bmp, webp) for each class, named as
                the class or `<index>_<anything>`, the index counted from 0; or an npz with
                `images`, uint8 (N, H, W, C), for one channel also (N, H, W), `labels`, integers
                (N,), and optionally `classes`, the names.
            classes: The model's class names; the data may lack some of them.
            image_size: (height, width) that images are scaled to cover and cropped to, around
                their centre; that stands for the camera. None takes them as they are.
            channels: 3 for RGB, 1 for grey.
            skip_unreadable: Whether files that can't be read are left to whoever reads the images,
                instead of being refused now.

        Returns:
            All samples: of a folder by name, of an npz in its order.

        Raises:
            ConfigError: There is no such data, it is empty, has one class or classes other than
                the model's, or its images differ in size and `image_size` is None.
            BackendUnavailable: Pillow is not installed and needed.
        """
        path = Path(path)
        if channels not in MODES:
            raise ConfigError("channels", got=channels, expected="3 (RGB) or 1 (grey)")
        if image_size is not None and min(image_size) < 1:
            raise ConfigError("image size", got=image_size, expected="(height, width) >= 1")
        source: FolderSource | ArraySource
        if path.is_dir():
            source = FolderSource.open(path, tuple(classes), image_size, channels, skip_unreadable)
        elif path.is_file():
            source = ArraySource.open(path, tuple(classes), image_size, channels)
        else:
            raise ConfigError(f"the data {path} does not exist")
        return cls._of(source, f"the data {path}", classes, channels)

    @classmethod
    def from_arrays(
        cls, images: ArrayLike, labels: ArrayLike, classes: Sequence[str]
    ) -> ImageDataset:
        """Labelled images that are in memory already.

        Args:
            images: Shape (N, H, W, C) with 1 or 3 channels, or (N, H, W), uint8.
            labels: Shape (N,), integers.
            classes: Names, in the order of the labels.

        Raises:
            ConfigError: Shapes, dtypes or labels don't fit, or there is one class.
        """
        images, labels = np.array(images), np.asarray(labels)
        channels = 3 if images.ndim == 4 and images.shape[3] == 3 else 1
        source = ArraySource.checked("the arrays", images, labels, len(classes), None, channels)
        return cls._of(source, "the arrays", classes, channels)

    @classmethod
    def _of(
        cls, source: FolderSource | ArraySource, where: str, classes: Sequence[str], channels: int
    ) -> ImageDataset:
        labels = source.labels
        if len(np.unique(labels)) < 2:
            raise ConfigError(
                f"{where} has images of a single class",
                got=repr(classes[int(labels[0])]),
                expected="at least two classes",
            )
        labels.flags.writeable = False
        return cls(tuple(classes), labels, (*source.size, channels), source, np.arange(len(labels)))

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._rows)

    def image(self, index: int) -> Pixels:
        """One image, shape (H, W, C), uint8; the caller's own.

        Raises:
            ConfigError: Its file can't be read.
        """
        return self._source.image(int(self._rows[index]))

    def batches(self, size: int) -> Iterator[tuple[Pixels, NDArray[np.int64]]]:
        """Images and labels in order, read when they are asked for.

        Args:
            size: Samples per batch, >= 1; the last batch may be smaller.

        Yields:
            Images, shape (n, H, W, C), uint8, and labels, shape (n,), int64.

        Raises:
            ConfigError: A file can't be read, or `size` < 1.
        """
        if size < 1:
            raise ConfigError("batch size", got=size, expected=">= 1")
        for start in range(0, len(self), size):
            indices = range(start, min(start + size, len(self)))
            images = np.empty((len(indices), *self.image_shape), np.uint8)
            for slot, index in enumerate(indices):
                images[slot] = self.image(index)
            yield images, self.labels[start : indices.stop].copy()

    @cached_property
    def hash(self) -> str:
        """Hex digest of the data as stored: of names, labels and contents.

        It depends on which samples there are, not on their order, the folder's path or
        `image_size`. Reads every file once.

        Raises:
            ConfigError: A file can't be read.
        """
        digests = sorted(self._source.digest(int(row)) for row in self._rows)
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def subset(self, indices: ArrayLike) -> ImageDataset:
        """The samples at `indices`, in that order.

        Raises:
            ConfigError: No index, one that does not exist, or one twice.
        """
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or chosen.size == 0 or chosen.dtype.kind not in "iu":
            raise ConfigError(
                "indices of a subset",
                got=f"shape {chosen.shape}, {chosen.dtype}",
                expected="a list of at least one integer",
            )
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise ConfigError(
                "indices of a subset",
                got=f"{chosen.min()}..{chosen.max()}",
                expected=f"0..{len(self) - 1}",
            )
        if len(np.unique(chosen)) < len(chosen):
            raise ConfigError("indices of a subset: one appears twice")
        labels = self.labels[chosen]
        labels.flags.writeable = False
        return ImageDataset(
            self.classes, labels, self.image_shape, self._source, self._rows[chosen]
        )

    def split(self, fractions: Sequence[float], seed: int) -> tuple[ImageDataset, ...]:
        """Divide the samples into disjoint parts, together all of them.

        Each class is divided by the fractions as far as its count allows, and so is the whole;
        classes with a single image are spread at random. Which sample goes where depends on the
        samples' names and the seed only, so it is the same on every machine.

        Args:
            fractions: Share of each part, > 0, together 1.
            seed: Another one gives another division.

        Returns:
            One dataset per fraction, each in this dataset's order.

        Raises:
            ConfigError: The fractions don't make 1, or a part gets no sample.
        """
        if not fractions or min(fractions) <= 0 or not math.isclose(sum(fractions), 1.0):
            raise ConfigError(
                "fractions of a split", got=list(fractions), expected="numbers > 0 that make 1"
            )
        members: list[list[int]] = [[] for _ in fractions]
        for dealt, index in enumerate(self._shuffled_by_class(seed), start=1):
            # The part that is furthest behind its share. Classes come one after another, so this
            # holds the shares within each of them too.
            missing = [f * dealt - len(part) for f, part in zip(fractions, members, strict=True)]
            members[missing.index(max(missing))].append(index)
        for part in members:
            if not part:
                raise ConfigError(
                    f"a part of a split in {len(fractions)} gets no image",
                    got=f"{len(self)} images",
                    expected=f"shares {', '.join(f'{f:g}' for f in fractions)}"[:80],
                )
        return tuple(self.subset(sorted(part)) for part in members)

    def part(self, k: int, n: int, seed: int) -> ImageDataset:
        """The k-th of n equal parts, k counted from 1; parts of one seed are disjoint.

        Raises:
            ConfigError: There is no such part, or it gets no sample.
        """
        if not 1 <= k <= n:
            raise ConfigError("part", got=f"{k}/{n}", expected="K/N with 1 <= K <= N")
        return self.split([1 / n] * n, seed)[k - 1]

    def balanced(self, samples: int, seed: int) -> ImageDataset:
        """Some samples, as many of each class as the class's count allows.

        Which ones depends on the samples' names and the seed only.

        Args:
            samples: How many; all where the data has no more.
            seed: Another one gives another choice.

        Returns:
            They, in this dataset's order.

        Raises:
            ConfigError: `samples` < 1.
        """
        if samples < 1:
            raise ConfigError("samples", got=samples, expected=">= 1")
        taken: Counter[int] = Counter()
        turns = []
        for index in self._shuffled_by_class(seed):
            label = int(self.labels[index])
            turns.append((taken[label], index))
            taken[label] += 1
        # Stable: within a turn the classes keep their random order.
        turns.sort(key=lambda turn: turn[0])
        return self.subset(sorted(index for _, index in turns[:samples]))

    def _shuffled_by_class(self, seed: int) -> list[int]:
        """All indices: classes in random order, and in each its samples in random order."""

        def rank(what: str) -> bytes:
            # Not NumPy's generators, whose streams may change between versions.
            return hashlib.sha256(f"{seed}:{what}".encode("utf-8", "surrogateescape")).digest()

        classes = {label: rank(f"class {label}") for label in set(self.labels.tolist())}
        names = self._source.names
        return sorted(
            range(len(self)),
            key=lambda i: (classes[int(self.labels[i])], rank(names[int(self._rows[i])])),
        )

    def _pixel_digests(self) -> list[bytes]:
        return [hashlib.sha256(self.image(i).tobytes()).digest() for i in range(len(self))]


def overlap(a: ImageDataset, b: ImageDataset) -> int:
    """Number of samples of `a` whose pixels occur in `b` too, whatever their names and labels.

    Raises:
        ConfigError: The images differ in shape, so that equal pictures could go unnoticed.
    """
    if a.image_shape != b.image_shape:
        raise ConfigError(
            "overlap of data with images of different shapes",
            got=a.image_shape,
            expected=b.image_shape,
        )
    known = set(b._pixel_digests())
    return sum(digest in known for digest in a._pixel_digests())


def parse_part(text: str) -> tuple[int, int]:
    """Read the option --part K/N, such as "1/2".

    Raises:
        ConfigError: It is not K/N with 1 <= K <= N.
    """
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError("--part", got=repr(text), expected="K/N with 1 <= K <= N, such as 1/2")
    return int(match[1]), int(match[2])


def parse_size(text: str) -> tuple[int, int]:
    """Read an option HEIGHTxWIDTH, such as "480x640".

    Returns:
        (height, width) in pixels.

    Raises:
        ConfigError: It is something else.
    """
    match = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if match is None or 0 in (int(match[1]), int(match[2])):
        raise ConfigError("image size", got=repr(text), expected="HEIGHTxWIDTH, such as 480x640")
    return int(match[1]), int(match[2])
