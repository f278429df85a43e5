"""Batches of an epoch: which samples, how they vary, what they are to be classified as."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edge_runtime.errors import ConfigError, EdgeRuntimeError
from engines.training.augment import ImageAugment, mixed, moved
from engines.training.config import PhaseRecipe
from engines.training.data import Decoded, Images
from engines.training.draws import seed_of


class Feed:
    """Training batches of one phase; an epoch's are the same however often it is begun.

    Args:
        images: The training data.
        phase: The phase.
        index: Its place, from 0.
        seed: Of the training.
        workers: Processes that read and vary camera images; 0 for none.
    """

    def __init__(
        self, images: Images, phase: PhaseRecipe, index: int, seed: int, workers: int
    ) -> None:
        self._images = images
        self._phase = phase
        self._place = (seed, index)
        self._workers = workers
        self._ready: Tensor | None = None
        augment = None
        if phase.augment.per_image:
            height, width, channels = images.dataset.image_shape
            augment = ImageAugment(phase.augment, (height, width), channels)
        else:
            self._ready = images.ready()
        self._decoded = images.decoded(augment) if self._ready is None else None

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return len(self._rows(0))

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of an epoch from the one at `start`.

        Args:
            epoch: From 0.
            start: From 0.

        Yields:
            Inputs, shape (n, C, H, W), float32; and classes, shape (n,), int64, or with mixing or
            smoothing shares of them, shape (n, classes), float32.

        Raises:
            ConfigError: An image can't be read.
        """
        rows = self._rows(epoch)[start:]
        augment = self._phase.augment
        for step, (taken, source, places) in enumerate(self._sources(rows, epoch), start):
            seed = seed_of("batch", *self._place, epoch, step)
            generator = torch.Generator().manual_seed(seed)
            pixels = moved(source, places, augment.flip, augment.shift, generator)
            yield self._targeted(pixels, self._images.labels[taken], seed)

    def _rows(self, epoch: int) -> list[Tensor]:
        """Rows of each batch, in the epoch's order; a last one that is too small is left out."""
        generator = torch.Generator().manual_seed(seed_of("order", *self._place, epoch))
        order = torch.randperm(len(self._images), generator=generator)
        batches = list(torch.split(order, self._phase.batch))
        if self._phase.augment.mixes and len(batches[-1]) % 2:
            batches[-1] = batches[-1][:-1]
        # Batch norm has no statistics of one sample.
        return [rows for rows in batches if len(rows) > 1]

    def _sources(
        self, batches: Sequence[Tensor], epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each batch its rows, inputs that hold them (NHWC), and their places in these."""
        if self._ready is not None:
            for rows in batches:
                yield rows, self._ready, rows
            return
        assert self._decoded is not None
        decoded = self._decoded.drawing("image", *self._place, epoch)
        pictures = _read(decoded, [rows.numpy() for rows in batches], self._workers)
        for rows, images in zip(batches, pictures, strict=True):
            yield rows, self._images.preprocessed(images), torch.arange(len(rows))

    def _targeted(self, pixels: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        phase, classes = self._phase, len(self._images.dataset.classes)
        smoothing = phase.label_smoothing
        if phase.augment.mixes:
            return mixed(pixels, labels, phase.augment, smoothing, classes, seed)
        if smoothing:
            shares = torch.full((len(labels), classes), smoothing / classes)
            shares.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)
            return pixels, shares
        return pixels, labels


def _read(
    decoded: Decoded, batches: Sequence[NDArray[np.int64]], workers: int
) -> Iterator[NDArray[np.uint8]]:
    if not workers:
        for rows in batches:
            yield decoded[rows]
        return
    loader = torch.utils.data.DataLoader(
        _Guarded(decoded),
        batch_size=None,
        sampler=batches,
        num_workers=min(workers, len(batches)),
        worker_init_fn=_quiet,
        generator=torch.Generator(),
    )
    for found in loader:
        if isinstance(found, str):
            raise ConfigError(found)
        yield found.numpy()


class _Guarded(torch.utils.data.Dataset[Any]):
    """Gives an error's text instead of raising it: torch would put the worker's traceback in."""

    def __init__(self, decoded: Decoded) -> None:
        self._decoded = decoded

    def __getitem__(self, rows: NDArray[np.int64]) -> NDArray[np.uint8] | str:
        try:
            return self._decoded[rows]
        except EdgeRuntimeError as error:
            return str(error)


def _quiet(_: int) -> None:
    """Leave Ctrl-C to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
