"""Augmentation: of camera images one by one, of batches of the model's input, and between samples.

The order is that of the deployed model: what varies the camera image comes before preprocessing,
what varies the input after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.errors import ConfigError
from edge_runtime.image_sources import import_pillow
from engines.timm_package import timm
from engines.training.config import AugmentRecipe
from engines.training.draws import kept_generators, seed_generators

Pixels = NDArray[np.uint8]

#: What fills the places that a turned or shifted image leaves; timm's own value.
_GREY = 128


class ImageAugment:
    """Varies camera images with Pillow and timm.

    Args:
        recipe: What is done; `per_image` is true.
        size: (height, width) of the images.
        channels: 1 or 3.

    Raises:
        ConfigError: timm can't read the policy.
        BackendUnavailable: timm or Pillow is missing.
    """

    def __init__(self, recipe: AugmentRecipe, size: tuple[int, int], channels: int) -> None:
        self._recipe = recipe
        self._size = size
        self._channels = channels
        self._steps: list[Callable[[Any], Any]] | None = None
        self._open()

    def __getstate__(self) -> dict[str, Any]:
        """Without timm's transforms, which a worker makes anew."""
        return {**self.__dict__, "_steps": None}

    def __call__(self, image: Pixels, seed: int) -> Pixels:
        """Another image of the same shape and type; all draws come from `seed`.

        Changes the global generators: call it within `kept_generators`.

        Args:
            image: Shape (H, W, C), uint8.
            seed: >= 0.
        """
        pillow = import_pillow()
        seed_generators(seed)
        picture = pillow.fromarray(image if self._channels == 3 else image[..., 0])
        mode = picture.mode
        for step in self._open():
            picture = step(picture)
        pixels = np.array(picture.convert(mode), np.uint8)
        return pixels.reshape(image.shape)

    def _open(self) -> list[Callable[[Any], Any]]:
        if self._steps is None:
            timm()
            from timm.data.transforms import RandomResizedCropAndInterpolation

            import_pillow()
            self._steps = []
            if self._recipe.crop is not None:
                self._steps.append(
                    RandomResizedCropAndInterpolation(  # type: ignore[no-untyped-call]
                        self._size, scale=self._recipe.crop, interpolation="bilinear"
                    )
                )
            if self._recipe.auto is not None:
                self._steps.append(self._policy(self._recipe.auto))
        return self._steps

    def _policy(self, text: str) -> Callable[[Any], Any]:
        from timm.data import auto_augment

        side = min(self._size)
        grey: Any = (_GREY,) * 3 if self._channels == 3 else _GREY
        values = {"translate_const": int(side * 0.45), "img_mean": grey}
        make = (
            auto_augment.rand_augment_transform
            if text.startswith("rand")
            else auto_augment.auto_augment_transform
        )
        try:
            policy: Callable[[Any], Any] = make(text, values)
        except (AssertionError, LookupError, ValueError, TypeError) as error:
            raise ConfigError(f"auto {text!r}: timm can't read it: {error}") from error
        return policy


def moved(
    images: Tensor, rows: Tensor, flip: bool, shift: int, generator: torch.Generator
) -> Tensor:
    """Take samples, some of them mirrored, each shifted by its own offset; edges are reflected.

    Args:
        images: Shape (N, H, W, C), float.
        rows: Which of them, shape (n,), int64.
        flip: Whether half of them are mirrored.
        shift: Largest offset, below H and W.
        generator: Where the draws come from.

    Returns:
        Shape (n, C, H, W), channels last in memory.
    """
    count, (_, height, width, channels) = len(rows), images.shape
    if not flip and not shift:
        return images[rows].permute(0, 3, 1, 2)
    down, right = (
        torch.randint(-shift, shift + 1, (count, 1), generator=generator) for _ in range(2)
    )
    lines = _reflected(torch.arange(height) + down, height)
    columns = _reflected(torch.arange(width) + right, width)
    if flip:
        mirrored = torch.rand((count, 1), generator=generator) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    pixels = (rows[:, None] * height + lines)[:, :, None] * width + columns[:, None, :]
    taken = images.reshape(-1, channels).index_select(0, pixels.reshape(-1))
    return taken.reshape(count, height, width, channels).permute(0, 3, 1, 2)


def _reflected(places: Tensor, length: int) -> Tensor:
    """Places beyond an edge as their mirror images on the other side of it."""
    places = places.abs()
    return torch.where(places >= length, 2 * (length - 1) - places, places)


def mixed(
    images: Tensor,
    targets: Tensor,
    recipe: AugmentRecipe,
    smoothing: float,
    classes: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Mix each sample with another one of the batch, by mixup or cutmix; changes `images`.

    Args:
        images: Shape (n, C, H, W), n even.
        targets: Classes, shape (n,), int64.
        recipe: The alphas; `mixes` is true.
        smoothing: Label smoothing.
        classes: Number of classes.
        seed: Where all draws come from.

    Returns:
        The images, and shares of the classes, shape (n, classes).
    """
    timm()
    from timm.data.mixup import Mixup

    mixup = Mixup(  # type: ignore[no-untyped-call]
        recipe.mixup, recipe.cutmix, label_smoothing=smoothing, num_classes=classes, mode="batch"
    )
    with kept_generators():
        seed_generators(seed)
        images, shares = mixup(images, targets)
    return images, shares
