"""The data of a training: opened, checked, and read as what the deployed preprocessing makes of it.

Preprocessing is the bundle's own ONNX stage, run by ONNX Runtime, so that models learn from exactly
what they will be given. What fits in memory is decoded and preprocessed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.dataset import ImageDataset
from edge_runtime.errors import ConfigError
from engines.preprocess import PreprocessSpec, camera_image, preprocess_model
from engines.timm_package import timm
from engines.training.augment import ImageAugment
from engines.training.config import SourceRecipe, TrainingRecipe
from engines.training.draws import kept_generators, seed_of

#: Bytes of images, and of preprocessed images, that are held in memory, each per data set.
IN_MEMORY = 2 * 2**30

#: Images that are read or preprocessed together.
_CHUNK = 500

#: Images that a class needs for learning and for measuring.
_LEAST = {"training": 2, "validation": 1}

Pixels = NDArray[np.uint8]


def open_data(recipe: TrainingRecipe) -> tuple[ImageDataset, ImageDataset]:
    """Open training and validation data.

    Raises:
        ConfigError: There is no such data, its classes are others, or a class has too few images.
        BackendUnavailable: Pillow or torchvision is missing.
    """
    classes = recipe.class_names
    training = _open(recipe.data.train, recipe, classes, "data: train")
    if isinstance(recipe.data.validation, SourceRecipe):
        validation = _open(recipe.data.validation, recipe, classes, "data: validation")
    else:
        share = recipe.data.validation
        _check_counts(training, "training and validation", sum(_LEAST.values()))
        training, validation = training.split((1 - share, share), recipe.seed)
    for data, name in ((training, "training"), (validation, "validation")):
        _check_counts(data, name, _LEAST[name])
    if training.image_shape != validation.image_shape and recipe.data.image.size is None:
        raise ConfigError(
            "images of training and validation differ in size",
            got=f"{training.image_shape[:2]} and {validation.image_shape[:2]}",
            expected="one size",
            remedy="Give data.image.size",
        )
    return training, validation


def _open(
    source: SourceRecipe, recipe: TrainingRecipe, classes: Sequence[str], where: str
) -> ImageDataset:
    image = recipe.data.image
    try:
        if source.path is not None:
            return ImageDataset.open(
                source.path, classes, image_size=image.size, channels=image.channels
            )
        data = _torchvision(source, classes)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    if (
        data.image_shape[2] != image.channels
        or (image.size or data.image_shape[:2]) != (data.image_shape[:2])
    ):
        raise ConfigError(
            f"{where}: images of {source.torchvision}",
            got=f"size {list(data.image_shape[:2])}, {data.image_shape[2]} channel(s)",
            expected=f"size {image.size and list(image.size)}, {image.channels} channel(s)",
            remedy="Set data.image to it",
        )
    return data


def _torchvision(source: SourceRecipe, classes: Sequence[str]) -> ImageDataset:
    timm()  # declares what a torchvision beside another torch lacks
    from torchvision import datasets

    try:
        found = getattr(datasets, str(source.torchvision))(
            source.root, train=source.train, download=False
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"{source.torchvision} in {source.root} can't be read: {error}".splitlines()[0],
            remedy="Download it there first",
        ) from error
    if set(classes) == set(found.classes) and list(classes) != list(found.classes):
        raise ConfigError(
            f"classes of {source.torchvision}",
            got=", ".join(classes)[:80],
            expected=", ".join(found.classes)[:200],
        )
    return ImageDataset.from_arrays(np.asarray(found.data), np.asarray(found.targets), classes)


def _check_counts(data: ImageDataset, name: str, least: int) -> None:
    counts = np.bincount(data.labels, minlength=len(data.classes))
    rare = int(counts.argmin())
    if counts[rare] < least:
        raise ConfigError(
            f"class {data.classes[rare]!r}: images for {name}",
            got=int(counts[rare]),
            expected=f"at least {least}",
            remedy="Add images of it, remove the class, or keep another share for validation",
        )


class Images:
    """A data set as the models read it.

    Args:
        dataset: Camera images.
        spec: What the models expect.
        limit: Bytes that decoded images, and preprocessed ones, may take in memory each.
    """

    def __init__(self, dataset: ImageDataset, spec: PreprocessSpec, limit: int = IN_MEMORY) -> None:
        from edge_runtime.backends.onnxrt import new_session

        self.dataset = dataset
        self.labels = torch.from_numpy(np.array(dataset.labels))
        self._limit = limit
        self._shape = (*spec.size, spec.channels)
        image = camera_image(spec.channels, (dataset.image_shape[0], dataset.image_shape[1]))
        model = preprocess_model(spec, image, "pixels").SerializeToString()
        self._session = new_session(model)
        self._decoded: Pixels | None = None
        self._ready: Tensor | None = None

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.labels)

    def preprocessed(self, images: Pixels) -> Tensor:
        """Camera images, shape (n, H, W, C), uint8, as the models read them: NHWC float32."""
        (pixels,) = self._session.run(["pixels"], {"image": np.ascontiguousarray(images)})
        return torch.from_numpy(pixels).permute(0, 2, 3, 1).contiguous()

    def ready(self) -> Tensor | None:
        """All samples preprocessed, shape (N, H, W, C), float32; None where they are too many."""
        needed = 4 * len(self) * int(np.prod(self._shape))
        if self._ready is None and needed <= self._limit:
            self._ready = torch.empty((len(self), *self._shape))
            source = self.decoded()
            for start in range(0, len(self), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(self)))
                self._ready[start : rows.stop] = self.preprocessed(source[np.array(rows)])
        return self._ready

    def decoded(self, augment: ImageAugment | None = None) -> Decoded:
        """Camera images by row, from memory where they fit."""
        needed = len(self) * int(np.prod(self.dataset.image_shape))
        if self._decoded is None and needed <= self._limit:
            chunks = [images for images, _ in self.dataset.batches(_CHUNK)]
            self._decoded = np.concatenate(chunks)
        return Decoded(self.dataset, self._decoded, augment)

    def in_order(self, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples for measuring: inputs (n, C, H, W) and labels."""
        ready, decoded = self.ready(), self.decoded()
        for rows in torch.split(torch.arange(len(self)), batch):
            pixels = self.preprocessed(decoded[rows.numpy()]) if ready is None else ready[rows]
            yield pixels.permute(0, 3, 1, 2), self.labels[rows]


class Decoded(torch.utils.data.Dataset[Any]):
    """Camera images by row, varied where asked for; what workers of a loader hold."""

    def __init__(
        self, dataset: ImageDataset, pixels: Pixels | None, augment: ImageAugment | None
    ) -> None:
        self._dataset = dataset
        self._pixels = pixels
        self._augment = augment
        self._draw: tuple[int | str, ...] = ()

    def drawing(self, *what: int | str) -> Decoded:
        """The same images, varied by draws that depend on `what` and their rows."""
        same = Decoded(self._dataset, self._pixels, self._augment)
        same._draw = what
        return same

    def __getitem__(self, rows: NDArray[np.int64]) -> Pixels:
        """Images, shape (n, H, W, C), uint8."""
        if self._pixels is not None:
            images = self._pixels[rows]
        else:
            images = np.stack([self._dataset.image(int(row)) for row in rows])
        if self._augment is not None:
            with kept_generators():
                for slot, row in enumerate(rows):
                    images[slot] = self._augment(images[slot], seed_of(*self._draw, int(row)))
        return images


def save_arrays(data: ImageDataset, path: Path) -> None:
    """Write images, labels and class names as the npz that `ImageDataset.open` reads.

    Raises:
        EdgeRuntimeError: The file can't be written.
    """
    import io

    from edge_runtime.files import write_bytes

    images = np.concatenate([images for images, _ in data.batches(_CHUNK)])
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, images=images, labels=np.array(data.labels), classes=np.array(data.classes)
    )
    write_bytes(path, buffer.getvalue())
