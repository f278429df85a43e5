"""Labelled images: a folder of class folders, or an npz; hashed, and split without overlap.

Images come out as a camera would deliver them: uint8, height x width x channels, all of one size.
What a model does to them (resize, crop, normalise) is its preprocess stage's business.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edge_runtime.errors import ConfigError, missing_package
from edge_runtime.schema import nearest

logger = logging.getLogger(__name__)

#: Suffixes that are read, and the formats that a file of any of them may have.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP")

# The EXIF tag, and its values that swap height and width.
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)

#: Pillow's modes for each number of channels.
_MODES = {1: "L", 3: "RGB"}

# Neither Pillow nor NumPy document what a damaged file makes them raise.
_BROKEN = (
    OSError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)

Pixels = NDArray[np.uint8]


class _Source(Protocol):
    """Where samples come from."""

    @property
    def names(self) -> Sequence[str]:
        """What names each sample, the same on every machine."""
        ...

    def image(self, row: int) -> Pixels:
        """The image, shape (H, W, C), uint8; the caller's own."""
        ...

    def digest(self, row: int) -> bytes:
        """A hash of name, label and stored contents."""
        ...


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
    _source: _Source
    _rows: NDArray[np.int64]

    @classmethod
    def open(
        cls,
        path: str | Path,
        classes: Sequence[str],
        *,
        image_size: tuple[int, int] | None = None,
        channels: int = 3,
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

        Returns:
            All samples: of a folder by name, of an npz in its order.

        Raises:
            ConfigError: There is no such data, it is empty, has one class or classes other than
                the model's, or its images differ in size and `image_size` is None.
            BackendUnavailable: Pillow is not installed and needed.
        """
        path = Path(path)
        if channels not in _MODES:
            raise ConfigError("channels", got=channels, expected="3 (RGB) or 1 (grey)")
        if image_size is not None and min(image_size) < 1:
            raise ConfigError("image size", got=image_size, expected="(height, width) >= 1")
        source: _Folder | _Arrays
        if path.is_dir():
            source = _Folder.open(path, tuple(classes), image_size, channels)
        elif path.is_file():
            source = _Arrays.open(path, tuple(classes), image_size, channels)
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
        source = _Arrays.checked("the arrays", images, labels, len(classes), None, channels)
        return cls._of(source, "the arrays", classes, channels)

    @classmethod
    def _of(
        cls, source: _Folder | _Arrays, where: str, classes: Sequence[str], channels: int
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


class _Folder:
    """Images in a folder of class folders; nothing but paths is held in memory."""

    def __init__(
        self,
        files: Sequence[Path],
        names: Sequence[str],
        labels: NDArray[np.int64],
        size: tuple[int, int],
        channels: int,
        fit: bool,
    ) -> None:
        self.names = names
        self.labels = labels
        self.size = size
        self._files = files
        self._mode = _MODES[channels]
        self._fit = fit
        self._digests: dict[int, bytes] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        classes: tuple[str, ...],
        image_size: tuple[int, int] | None,
        channels: int,
    ) -> _Folder:
        import_pillow()
        files: list[Path] = []
        labels: list[int] = []
        for folder, label in _class_folders(path, classes).items():
            found = _image_files(folder)
            files += found
            labels += [label] * len(found)
        names = [f"{file.parent.name}/{file.name}" for file in files]
        size = image_size or _common_size(files)
        fit = image_size is not None
        return cls(files, names, np.array(labels, np.int64), size, channels, fit)

    def image(self, row: int) -> Pixels:
        pixels = _decode(self._files[row], self._mode)
        if self._fit:
            return _cover(pixels, self.size)
        height, width = pixels.shape[:2]
        if (height, width) != self.size:
            raise _unequal(self._files[row], (height, width), self.size)
        return pixels

    def digest(self, row: int) -> bytes:
        if row not in self._digests:
            try:
                contents = hashlib.sha256(self._files[row].read_bytes()).digest()
            except OSError as error:
                raise _unreadable("the image", self._files[row], error) from error
            name = self.names[row].encode("utf-8", "surrogateescape")
            self._digests[row] = hashlib.sha256(name + b"\0" + contents).digest()
        return self._digests[row]


class _Arrays:
    """Images in an npz."""

    def __init__(
        self, images: Pixels, labels: NDArray[np.int64], image_size: tuple[int, int] | None
    ) -> None:
        self.names = [str(row) for row in range(len(labels))]
        self.labels = labels
        self._images = images
        height, width = images.shape[1:3]
        self.size = image_size or (height, width)

    @classmethod
    def open(
        cls,
        path: Path,
        classes: tuple[str, ...],
        image_size: tuple[int, int] | None,
        channels: int,
    ) -> _Arrays:
        arrays = _read_npz(path)
        source = cls.checked(
            str(path), arrays["images"], arrays["labels"], len(classes), image_size, channels
        )
        if "classes" in arrays:
            _check_classes(path, arrays["classes"], classes)
        source.image(0)  # tells now whether Pillow is needed and missing
        return source

    @classmethod
    def checked(
        cls,
        where: str,
        images: NDArray[Any],
        labels: NDArray[Any],
        classes: int,
        image_size: tuple[int, int] | None,
        channels: int,
    ) -> _Arrays:
        found = f"shape {images.shape}, {images.dtype}"
        if channels == 1 and images.ndim == 3:
            images = images[..., None]
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != channels:
            raise ConfigError(
                f"{where}: images",
                got=found,
                expected=f"shape (N, height, width, {channels}), uint8",
            )
        if images.size == 0:
            raise ConfigError(f"{where}: there is no image", got=found)
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise ConfigError(
                f"{where}: labels",
                got=f"shape {labels.shape}, {labels.dtype}",
                expected=f"shape ({len(images)},), integers",
            )
        outside = labels[(labels < 0) | (labels >= classes)]
        if outside.size:
            raise ConfigError(
                f"{where}: label of a sample", got=outside[0], expected=f"0..{classes - 1}"
            )
        return cls(images, labels.astype(np.int64), image_size)

    def image(self, row: int) -> Pixels:
        return _cover(self._images[row], self.size)

    def digest(self, row: int) -> bytes:
        image = self._images[row]
        facts = f"{image.shape} {self.labels[row]}\0".encode()
        return hashlib.sha256(facts + image.tobytes()).digest()


def import_pillow() -> Any:
    """Pillow's Image module.

    Raises:
        BackendUnavailable: It is not installed.
    """
    try:
        from PIL import Image as PillowImage
    except ImportError as error:
        raise missing_package("Pillow", "cpu") from error
    return PillowImage


def _class_folders(path: Path, classes: tuple[str, ...]) -> dict[Path, int]:
    """The folders in `path` by name, each with its class index."""
    found: dict[Path, int] = {}
    owners: dict[int, Path] = {}
    plain = [_plain(name) for name in classes]
    for folder in _entries(path):
        if not folder.is_dir():
            continue
        label = _class_of(folder, classes, plain)
        if label in owners:
            raise ConfigError(
                f"{path}: the folders {owners[label].name!r} and {folder.name!r} are of one class, "
                f"{classes[label]!r}",
                remedy="Put their images into one folder",
            )
        found[folder] = label
        owners[label] = folder
    if not found:
        raise ConfigError(
            f"the data {path} has no class folder",
            remedy="Make a folder of images for each class, named as the class",
        )
    return found


def _class_of(folder: Path, classes: tuple[str, ...], plain: Sequence[str]) -> int:
    """The class index that a folder's name stands for; `plain` are the classes' `_plain` names."""
    name = folder.name
    match = re.fullmatch(r"([0-9]{1,9})_(.+)", name)
    index = int(match[1]) if match else -1
    if name in classes:
        label = classes.index(name)
        if match and index < len(classes) and index != label:
            raise ConfigError(
                f"the folder {folder} is ambiguous: class {label} has this name, and its number "
                f"is that of {classes[index]!r}",
                remedy="Rename it to <index>_<name> of its class",
            )
        return label
    if match is None:
        raise ConfigError(
            f"the folder {folder} is none of the model's classes", remedy=nearest(name, classes)
        )
    if index >= len(classes):
        raise ConfigError(
            f"the folder {folder}: class index", got=index, expected=f"0..{len(classes) - 1}"
        )
    # A folder counted from 1, or with a background class, would be silently off by one.
    own = _plain(match[2])
    same = [i for i, other in enumerate(plain) if other == own]
    if same and index not in same and own not in plain[index]:
        raise ConfigError(
            f"the folder {folder} is ambiguous: class {index} is {classes[index]!r}, and "
            f"{classes[same[0]]!r} is class {same[0]}",
            remedy="Count classes from 0, in the model's order",
        )
    return index


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _image_files(folder: Path) -> list[Path]:
    """The images in a class folder, by name."""
    entries = _entries(folder)
    images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and entry.is_file()]
    if not images:
        raise ConfigError(
            f"the class folder {folder} has no image",
            got=f"{len(entries)} other files",
            expected=", ".join(SUFFIXES),
            remedy="Put images there, or remove the folder",
        )
    if len(images) < len(entries):
        logger.warning(
            "%s: left out %d files without an image's suffix", folder, len(entries) - len(images)
        )
    return images


def _entries(folder: Path) -> list[Path]:
    """What is in a folder, by name, without hidden entries."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise _unreadable("the folder", folder, error) from error


def _common_size(files: Sequence[Path]) -> tuple[int, int]:
    """(height, width) of all images, from the files' headers."""
    first = _header_size(files[0])
    for file in files[1:]:
        size = _header_size(file)
        if size != first:
            raise _unequal(file, size, first)
    return first


def _header_size(file: Path) -> tuple[int, int]:
    pillow = import_pillow()
    try:
        with pillow.open(file, formats=_FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except (*_BROKEN, pillow.DecompressionBombError) as error:
        raise _unreadable("the image", file, error) from error
    return (width, height) if turned else (height, width)


def _decode(file: Path, mode: str) -> Pixels:
    """The pixels of an image file as its EXIF orientation shows them, (H, W, C)."""
    pillow = import_pillow()
    from PIL import ImageOps

    try:
        with pillow.open(file, formats=_FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            found = image.mode
            if found == "P":
                image = image.convert("RGBA")  # keeps Pillow from warning of transparency
            pixels = np.array(image.convert(mode))
    except (*_BROKEN, pillow.DecompressionBombError) as error:
        raise _unreadable("the image", file, error) from error
    if found.startswith(("I", "F")):
        raise ConfigError(
            f"the image {file} has more than 8 bits per channel",
            got=f"Pillow's mode {found}",
            remedy="Convert it to 8 bits: nobody can know which range matters",
        )
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _cover(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Scale an image to cover `size` and crop it around its centre; always a copy.

    Args:
        pixels: Shape (h, w, C), uint8.
        size: (height, width) wanted.

    Returns:
        Shape (height, width, C), uint8; without resampling where the scale is 1.
    """
    height, width = size
    h, w = pixels.shape[:2]
    # The larger of the scales height / h and width / w.
    if height * w >= width * h:
        h, w, scaled = height, max(width, round(w * height / h)), height != h
    else:
        h, w, scaled = max(height, round(h * width / w)), width, width != w
    if scaled:
        pillow = import_pillow()
        image = pillow.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
        resized = np.asarray(image.resize((w, h), pillow.Resampling.BILINEAR))
        pixels = resized.reshape(h, w, pixels.shape[2])
    top, left = (h - height) // 2, (w - width) // 2
    cropped: Pixels = pixels[top : top + height, left : left + width].copy()
    return cropped


def _read_npz(path: Path) -> Mapping[str, NDArray[Any]]:
    """The arrays `images`, `labels` and, where there is one, `classes`."""
    if not zipfile.is_zipfile(path):
        raise ConfigError(
            f"the data {path} is neither a folder nor a whole npz", remedy="Unpack archives first"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in ("images", "labels", "classes") if name in file.files]
            arrays = {name: file[name] for name in names}
    except _BROKEN as error:
        raise _unreadable("the data", path, error) from error
    for name in ("images", "labels"):
        if not isinstance(arrays.get(name), np.ndarray):
            raise ConfigError(
                f"the data {path} has no array {name!r}",
                expected="images, labels and optionally classes",
            )
    return arrays


def _check_classes(path: Path, found: NDArray[Any], classes: tuple[str, ...]) -> None:
    names = found.tolist() if isinstance(found, np.ndarray) else found
    if names == list(classes):
        return
    if not isinstance(names, list) or len(names) != len(classes):
        got = len(names) if isinstance(names, list) else repr(names)[:80]
        raise ConfigError(
            f"{path}: classes", got=got, expected=f"the model's {len(classes)} class names"
        )
    first = next(i for i, pair in enumerate(zip(names, classes, strict=True)) if pair[0] != pair[1])
    raise ConfigError(
        f"{path}: class {first} is not the model's",
        got=repr(names[first])[:80],
        expected=repr(classes[first]),
    )


def _unreadable(what: str, path: Path, error: BaseException) -> ConfigError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"{what} {path} can't be read: {reason}")


def _unequal(file: Path, size: tuple[int, int], first: tuple[int, int]) -> ConfigError:
    return ConfigError(
        f"the images differ in size: {file}",
        got=f"{size[0]}x{size[1]}",
        expected=f"{first[0]}x{first[1]} as the first",
        remedy="Pass --image-size HEIGHTxWIDTH: each is then scaled to cover it and cropped",
    )
