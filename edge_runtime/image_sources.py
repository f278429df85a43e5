"""Where labelled images come from: a folder of class folders, or the arrays of an npz."""

from __future__ import annotations

import hashlib
import logging
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
MODES = {1: "L", 3: "RGB"}

#: What a damaged file makes Pillow and NumPy raise; neither documents it.
BROKEN = (
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


class Source(Protocol):
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


class FolderSource:
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
        self._mode = MODES[channels]
        self._fit = fit
        self._digests: dict[int, bytes] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        classes: tuple[str, ...],
        image_size: tuple[int, int] | None,
        channels: int,
        skip_unreadable: bool = False,
    ) -> FolderSource:
        """Find the images below `path`; see `ImageDataset.open`."""
        import_pillow()
        files: list[Path] = []
        labels: list[int] = []
        for folder, label in _class_folders(path, classes).items():
            found = _image_files(folder)
            files += found
            labels += [label] * len(found)
        names = [f"{file.parent.name}/{file.name}" for file in files]
        size = image_size or _common_size(files, skip_unreadable)
        fit = image_size is not None
        return cls(files, names, np.array(labels, np.int64), size, channels, fit)

    def image(self, row: int) -> Pixels:
        """Decode an image, and fit it to the camera's size where one was given."""
        pixels = _decode(self._files[row], self._mode)
        if self._fit:
            return _cover(pixels, self.size)
        height, width = pixels.shape[:2]
        if (height, width) != self.size:
            raise _unequal(self._files[row], (height, width), self.size)
        return pixels

    def digest(self, row: int) -> bytes:
        """A hash of the file's name and contents, computed once."""
        if row not in self._digests:
            try:
                contents = hashlib.sha256(self._files[row].read_bytes()).digest()
            except OSError as error:
                raise _unreadable("the image", self._files[row], error) from error
            name = self.names[row].encode("utf-8", "surrogateescape")
            self._digests[row] = hashlib.sha256(name + b"\0" + contents).digest()
        return self._digests[row]


class ArraySource:
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
    ) -> ArraySource:
        """Read the npz at `path`; see `ImageDataset.open`."""
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
    ) -> ArraySource:
        """Check shapes, dtypes and labels; `where` names the data in errors."""
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
        """An image, fitted to the camera's size where one was given."""
        return _cover(self._images[row], self.size)

    def digest(self, row: int) -> bytes:
        """A hash of the pixels and the label."""
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


def _common_size(files: Sequence[Path], skip_unreadable: bool) -> tuple[int, int]:
    """(height, width) of all images, from the files' headers."""
    first: tuple[int, int] | None = None
    unreadable: ConfigError | None = None
    for file in files:
        try:
            size = _header_size(file)
        except ConfigError as error:
            if not skip_unreadable:
                raise
            unreadable = unreadable or error
            continue
        first = first or size
        if size != first:
            raise _unequal(file, size, first)
    if first is None:
        assert unreadable is not None  # there is a file
        raise unreadable
    return first


def _header_size(file: Path) -> tuple[int, int]:
    pillow = import_pillow()
    try:
        with pillow.open(file, formats=_FORMATS) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION) in _TURNED
    except (*BROKEN, pillow.DecompressionBombError) as error:
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
    except (*BROKEN, pillow.DecompressionBombError) as error:
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
    except BROKEN as error:
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
